"""The last linear layer and its loss in one module, for very many classes."""

from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from penex import _links, functional
from penex import _row_losses as row_losses
from penex._inputs import check_reduction, choice, count, integer
from penex._linear import Shard, check_criterion, head_loss, linear_loss, sampled_head_loss
from penex.losses import PENEX, Check, _CheckedModule, _PenaltyMixin

__all__ = ["LinearLoss", "LinearPENEX"]


class _LinearHead(_CheckedModule):
    """The parameters of a linear layer, or of the share of its classes that this rank holds."""

    bias: nn.Parameter | None

    def _hold_layer(
        self,
        in_features: int,
        num_classes: int,
        bias: bool,
        chunk_size: int | None,
        vocab_group: dist.ProcessGroup | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.in_features = count("in_features", in_features)
        self.num_classes = count("num_classes", num_classes)
        self.chunk_size = None if chunk_size is None else count("chunk_size", chunk_size)
        self.vocab_group = vocab_group
        shard = Shard.of(num_classes, vocab_group)
        own = shard.stop - shard.start
        self.weight = nn.Parameter(torch.empty(own, in_features, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(own, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self._reset_layer()

    def _reset_layer(self) -> None:
        """Start as :class:`torch.nn.Linear`; with the same seed, ranks start as one layer."""
        shard = Shard.of(self.num_classes, self.vocab_group)
        whole = nn.Linear(
            self.in_features,
            self.num_classes,
            self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        with torch.no_grad():
            self.weight.copy_(whole.weight[shard.start : shard.stop])
            if self.bias is not None:
                self.bias.copy_(whole.bias[shard.start : shard.stop])

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits, (..., K); of this rank's classes if they are shared out."""
        return F.linear(hidden, self.weight, self.bias)

    def _all_logits(self, hidden: Tensor) -> Tensor:
        if self.vocab_group is not None:
            raise ValueError(
                "predict_proba: needs all classes, and this module holds the share of one rank"
            )
        return self.logits(hidden)

    def extra_repr(self) -> str:
        """What torch prints of the module."""
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, "
            f"bias={self.bias is not None}"
        )


class LinearLoss(_LinearHead):
    r"""A linear layer with its loss, which never holds all logits at a time.

    In the place of :class:`torch.nn.Linear` followed by a criterion, with the same parameters and
    initial values; computes :func:`penex.functional.linear_loss`.

    State: ``weight`` and ``bias`` of the layer, and that of the criterion as ``criterion.…``. To
    tie the weight to an embedding's, assign it: ``head.weight = embedding.weight``.

    Args:
        in_features: D, the size of the hidden states.
        num_classes: K, the number of all classes.
        criterion: As in :func:`penex.functional.linear_loss`, but no rule. None:
            :class:`penex.PENEX` with its defaults.
        bias: Whether there is one.
        chunk_size: As in :func:`penex.functional.linear_loss`.
        vocab_group: Ranks with the same rows, which share the classes, as in
            :func:`penex.functional.linear_loss`; this module holds the share of this rank. With the
            same seed on all ranks they start as one layer.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range.

    Example:
        >>> from penex.losses import CrossEntropyLoss
        >>> head = LinearLoss(8, 1000, criterion=CrossEntropyLoss())
        >>> hidden, target = torch.randn(2, 5, 8), torch.randint(1000, (2, 5))
        >>> loss = head(hidden, target)
        >>> loss.backward()
        >>> head.predict_proba(hidden).shape
        torch.Size([2, 5, 1000])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        criterion: nn.Module | None = None,
        bias: bool = True,
        chunk_size: int | None = None,
        vocab_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.criterion = PENEX() if criterion is None else criterion
        check_criterion(self.criterion)
        self._hold_layer(in_features, num_classes, bias, chunk_size, vocab_group, device, dtype)

    def reset_parameters(self) -> None:
        """Start the layer as :class:`torch.nn.Linear`."""
        self._reset_layer()

    @torch.jit.unused
    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        """The loss of hidden states (..., D) and class indices (...)."""
        return linear_loss(
            hidden,
            self.weight,
            target,
            self.bias,
            criterion=self.criterion,
            chunk_size=self.chunk_size,
            vocab_group=self.vocab_group,
            num_classes=self.num_classes,
        )

    def predict_proba(self, hidden: Tensor) -> Tensor:
        """Class probabilities, (..., K), as those of the criterion.

        Raises:
            ValueError: The classes are shared out over ranks.
        """
        criterion: Any = self.criterion
        probabilities: Tensor = criterion.predict_proba(self._all_logits(hidden), dim=-1)
        return probabilities


class LinearPENEX(_PenaltyMixin, _LinearHead):
    r"""A linear layer with PENEX as its loss, which never holds all logits at a time.

    In the place of :class:`torch.nn.Linear` followed by :class:`penex.PENEX`, with their
    parameters, initial values and running penalty; computes
    :func:`penex.functional.linear_penex_loss`. The layer predicts
    :math:`\operatorname{softmax}((1+\alpha)(h W^\top + b))`: :meth:`predict_proba`.

    State: ``weight`` and ``bias`` of the layer, and the buffers ``penalty`` (see
    :class:`penex.PENEX`) and ``class_weight``, if it is given. To tie the weight to an embedding's,
    assign it: ``head.weight = embedding.weight``.

    Args:
        in_features: D, the size of the hidden states.
        num_classes: K, the number of all classes.
        bias: Whether there is one.
        class_weight: :math:`w`, shape (K).
        num_sampled: If given, in training the penalty is estimated from so many classes, by
            :func:`penex.functional.sampled_linear_penex_loss`; in evaluation it is exact.
        sampler: ``"uniform"`` or ``"log-uniform"``, if `num_sampled` is given.
        **others: Those of the loss are described at :class:`penex.PENEX`, those of the layer at
            :class:`LinearLoss`.

    Raises:
        TypeError, ValueError: As the two classes.

    Example:
        >>> head = LinearPENEX(8, 1000)
        >>> hidden, target = torch.randn(2, 5, 8), torch.randint(1000, (2, 5))
        >>> loss = head(hidden, target)
        >>> loss.backward()
        >>> head.predict_proba(hidden).shape
        torch.Size([2, 5, 1000])
    """

    class_weight: Tensor | None

    _checks: ClassVar[dict[str, Check]] = _PenaltyMixin._checks | {
        "ignore_index": integer,
        "reduction": lambda name, value: check_reduction(value),
        "sampler": lambda name, value: choice(name, value, ("uniform", "log-uniform")),
    }

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        bias: bool = True,
        *,
        class_weight: Tensor | None = None,
        sensitivity: float = 0.1,
        penalty_mode: Literal["running", "auto", "fixed"] | None = None,
        penalty: float | None = None,
        penalty_min: float = 1e-10,
        penalty_max: float = 100.0,
        ema: float = 0.1,
        huberization: float | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        process_group: dist.ProcessGroup | Literal["world"] | None = None,
        chunk_size: int | None = None,
        vocab_group: dist.ProcessGroup | None = None,
        num_sampled: int | None = None,
        sampler: str = "log-uniform",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.ignore_index, self.reduction = ignore_index, reduction
        self.sampler = sampler
        self.num_sampled = None if num_sampled is None else count("num_sampled", num_sampled)
        if num_sampled is not None and vocab_group is not None:
            raise ValueError("num_sampled: classes shared out over a vocab_group are all used")
        self._hold_penalty(
            sensitivity,
            penalty_mode,
            penalty,
            penalty_min,
            penalty_max,
            ema,
            huberization,
            process_group,
        )
        self.register_buffer("class_weight", class_weight)
        self._hold_layer(in_features, num_classes, bias, chunk_size, vocab_group, device, dtype)

    def reset_parameters(self) -> None:
        """Start the layer as :class:`torch.nn.Linear`, and the penalty as after construction."""
        self._reset_penalty()
        self._reset_layer()

    @torch.jit.unused
    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        """The loss of hidden states (..., D) and class indices (...)."""
        threshold = functional.log_threshold(self.huberization)
        loss = row_losses.Penex(self.sensitivity, self._penalty_rule(), threshold)
        options: dict[str, Any] = {
            "class_weight": self.class_weight,
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
        }
        if self.num_sampled is not None and self.training:
            return sampled_head_loss(
                hidden,
                self.weight,
                target,
                self.bias,
                num_sampled=self.num_sampled,
                sampler=self.sampler,
                loss=loss,
                generator=None,
                **options,
            )
        return head_loss(
            hidden,
            self.weight,
            target,
            self.bias,
            loss=loss,
            chunk_size=self.chunk_size,
            vocab_group=self.vocab_group,
            num_classes=self.num_classes,
            **options,
        )

    def predict_proba(self, hidden: Tensor) -> Tensor:
        """Class probabilities, (..., K), as those of :meth:`penex.PENEX.predict_proba`.

        Raises:
            ValueError: The classes are shared out over ranks.
        """
        logits = self._all_logits(hidden)
        calibrated = _links.penex(_links.precise(logits), self.sensitivity, self.huberization)
        return F.softmax(calibrated, -1).to(logits.dtype)

    def extra_repr(self) -> str:
        """What torch prints of the module."""
        return f"{_LinearHead.extra_repr(self)}, {super().extra_repr()}"
