"""The last linear layer and PENEX in one module, for very many classes."""

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from penex import _links
from penex._inputs import check_options, choice, count
from penex._linear import linear_penalized, sampled_penalized
from penex._tiles import Shard
from penex.losses import _Held, _Penalized

__all__ = ["LinearPENEX"]


class LinearPENEX(_Penalized):
    r"""A linear layer with PENEX as its loss, which never makes all logits at a time.

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
        sensitivity: As in :class:`penex.PENEX`, like the arguments not listed here.
        penalty_mode: As in :class:`penex.PENEX`.
        penalty: As in :class:`penex.PENEX`.
        penalty_min: As in :class:`penex.PENEX`.
        penalty_max: As in :class:`penex.PENEX`.
        ema: As in :class:`penex.PENEX`.
        huberization: As in :class:`penex.PENEX`.
        ignore_index: As in :class:`penex.PENEX`.
        reduction: As in :class:`penex.PENEX`.
        process_group: As in :class:`penex.PENEX`: ranks with other rows.
        chunk_size: As in :func:`penex.functional.linear_penex_loss`.
        vocab_group: Ranks with the same rows, which share the classes, as in
            :func:`penex.functional.linear_penex_loss`; this module holds the share of this rank.
            With the same seed on all ranks they start as one layer.
        num_sampled: If given, in training the penalty is estimated from so many classes, by
            :func:`penex.functional.sampled_linear_penex_loss`; in evaluation it is exact.
        sampler: ``"uniform"`` or ``"log-uniform"``, if `num_sampled` is given.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range.

    Example:
        >>> head = LinearPENEX(8, 1000)
        >>> hidden, target = torch.randn(2, 5, 8), torch.randint(1000, (2, 5))
        >>> loss = head(hidden, target)
        >>> loss.backward()
        >>> head.predict_proba(hidden).shape
        torch.Size([2, 5, 1000])
    """

    class_weight: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        bias: bool = True,
        *,
        class_weight: Tensor | None = None,
        sensitivity: float = 0.1,
        penalty_mode: str | None = None,
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
        check_options(ignore_index, reduction, 0.0)
        choice("sampler", sampler, ("uniform", "log-uniform"))
        count("in_features", in_features)
        count("num_classes", num_classes)
        if chunk_size is not None:
            count("chunk_size", chunk_size)
        if num_sampled is not None:
            count("num_sampled", num_sampled)
            if vocab_group is not None:
                raise ValueError("num_sampled: classes shared out over a vocab_group are all used")
        self._hold(
            sensitivity,
            penalty_mode,
            penalty,
            penalty_min,
            penalty_max,
            ema,
            huberization,
            process_group,
        )
        self.in_features, self.num_classes = in_features, num_classes
        self.ignore_index, self.reduction, self.chunk_size = ignore_index, reduction, chunk_size
        self.num_sampled, self.sampler, self.vocab_group = num_sampled, sampler, vocab_group
        self.register_buffer("class_weight", class_weight)
        shard = Shard.of(num_classes, vocab_group)
        whole = nn.Linear(in_features, num_classes, bias, device, dtype)
        if vocab_group is None:
            self.weight, self.bias = whole.weight, whole.bias
        else:
            own = slice(shard.start, shard.stop)
            self.weight = nn.Parameter(whole.weight.detach()[own].clone())
            self.bias = nn.Parameter(whole.bias.detach()[own].clone()) if bias else None

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        """The loss of hidden states (..., D) and class indices (...)."""
        if self.num_sampled is not None and self.training:
            return sampled_penalized(
                hidden,
                self.weight,
                target,
                self.bias,
                num_sampled=self.num_sampled,
                sampler=self.sampler,
                alpha=self.sensitivity,
                penalty=_Held(self),
                class_weight=self.class_weight,
                ignore_index=self.ignore_index,
                reduction=self.reduction,
                huberization=self.huberization,
                generator=None,
            )
        return linear_penalized(
            hidden,
            self.weight,
            target,
            self.bias,
            alpha=self.sensitivity,
            penalty=_Held(self),
            class_weight=self.class_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            huberization=self.huberization,
            chunk_size=self.chunk_size,
            vocab_group=self.vocab_group,
            num_classes=self.num_classes,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits, (..., K); of this rank's classes if they are shared out."""
        return F.linear(hidden, self.weight, self.bias)

    def predict_proba(self, hidden: Tensor) -> Tensor:
        """Class probabilities, (..., K), as those of :meth:`penex.PENEX.predict_proba`.

        Raises:
            ValueError: The classes are shared out over ranks.
        """
        if self.vocab_group is not None:
            raise ValueError(
                "predict_proba: needs all classes, and this module holds the share of one rank"
            )
        logits = self.logits(hidden)
        calibrated = _links.penex(_links.precise(logits), self.sensitivity, self.huberization)
        return F.softmax(calibrated, -1).to(logits.dtype)

    def extra_repr(self) -> str:
        """What torch prints of the module."""
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, "
            f"bias={self.bias is not None}, {self._rule_repr()}, "
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}"
        )
