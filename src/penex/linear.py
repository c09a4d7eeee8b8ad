"""The last linear layer and its loss in one module, for very many classes."""

from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from penex._inputs import choice, count
from penex._linear import Shard, linear_loss, options_of, sampled_head_loss
from penex.losses import PENEX

__all__ = ["LinearLoss", "LinearPENEX"]


class LinearLoss(nn.Module):
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

    bias: nn.Parameter | None

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
        self.in_features = count("in_features", in_features)
        self.num_classes = count("num_classes", num_classes)
        self.criterion = PENEX() if criterion is None else criterion
        options_of(self.criterion)  # refuses those that have none
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

    def reset_parameters(self) -> None:
        """Start the layer as :class:`torch.nn.Linear`, and the criterion as after construction."""
        self._reset_layer()
        reset = getattr(self.criterion, "reset_parameters", None)
        if reset is not None:
            reset()

    def _reset_layer(self) -> None:
        """With the same seed, ranks start as one layer."""
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
        if self.vocab_group is not None:
            raise ValueError(
                "predict_proba: needs all classes, and this module holds the share of one rank"
            )
        criterion: Any = self.criterion
        probabilities: Tensor = criterion.predict_proba(self.logits(hidden), dim=-1)
        return probabilities

    def extra_repr(self) -> str:
        """What torch prints of the module."""
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, "
            f"bias={self.bias is not None}"
        )


class LinearPENEX(LinearLoss):
    r"""A linear layer with PENEX as its loss, which never holds all logits at a time.

    :class:`LinearLoss` with a :class:`penex.PENEX` made from the arguments given here; in training
    the sum over the classes can be estimated from few of them. The layer predicts
    :math:`\operatorname{softmax}((1+\alpha)(h W^\top + b))`: :meth:`predict_proba`.

    The arguments of the loss are attributes of ``criterion``; to change one, set it there. Setting
    one on this module raises AttributeError.

    Args:
        in_features: D, the size of the hidden states.
        num_classes: K, the number of all classes.
        bias: Whether there is one.
        class_weight: :math:`w`, shape (K), the `weight` of :class:`penex.PENEX`.
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

    criterion: PENEX

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
        criterion = PENEX(
            class_weight,
            sensitivity=sensitivity,
            penalty_mode=penalty_mode,
            penalty=penalty,
            penalty_min=penalty_min,
            penalty_max=penalty_max,
            ema=ema,
            huberization=huberization,
            ignore_index=ignore_index,
            reduction=reduction,
            process_group=process_group,
        )
        super().__init__(
            in_features,
            num_classes,
            criterion=criterion,
            bias=bias,
            chunk_size=chunk_size,
            vocab_group=vocab_group,
            device=device,
            dtype=dtype,
        )
        self.num_sampled = None if num_sampled is None else count("num_sampled", num_sampled)
        self.sampler = choice("sampler", sampler, ("uniform", "log-uniform"))
        if num_sampled is not None and vocab_group is not None:
            raise ValueError("num_sampled: classes shared out over a vocab_group are all used")

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight" and name in PENEX._checks:  # the weight is the layer's
            raise AttributeError(f"{name}: set it on the head's criterion, head.criterion.{name}")
        super().__setattr__(name, value)

    @property
    def sensitivity(self) -> float:
        """That of the criterion."""
        return self.criterion.sensitivity

    @property
    def penalty(self) -> Tensor:
        """That of the criterion."""
        return self.criterion.penalty

    @property
    def class_weight(self) -> Tensor | None:
        """That of the criterion."""
        return self.criterion.weight

    @torch.jit.unused
    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        """The loss of hidden states (..., D) and class indices (...)."""
        if self.num_sampled is None or not self.training:
            return super().forward(hidden, target)
        return sampled_head_loss(
            hidden,
            self.weight,
            target,
            self.bias,
            num_sampled=self.num_sampled,
            sampler=self.sampler,
            generator=None,
            **options_of(self.criterion),
        )
