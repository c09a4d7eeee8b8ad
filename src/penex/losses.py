"""The losses as modules: they hold arguments and the running penalty, and call the functions."""

import math
from collections.abc import Callable
from typing import Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from penex import _links, functional
from penex._inputs import check_options, choice, number, positive
from penex._links import ProbabilityMixin
from penex._penalty import Penalty, PenaltySums, Settled, check_penalty_bounds, estimate

__all__ = ["PENEX", "ConfidencePenaltyLoss", "FocalLoss", "LogPENEX", "ZLoss"]


class _Loss(ProbabilityMixin, nn.Module):
    """The keywords of :class:`torch.nn.CrossEntropyLoss`, checked and held, and the link."""

    weight: Tensor | None

    def __init__(
        self, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
    ) -> None:
        super().__init__()
        check_options(ignore_index, reduction, label_smoothing)
        if weight is not None and not isinstance(weight, Tensor):
            raise TypeError(f"weight: expected a tensor, got {type(weight).__name__}")
        if weight is not None and weight.ndim != 1:
            raise ValueError(
                f"weight: expected one weight per class, shape (K,), got {tuple(weight.shape)}"
            )
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing

    def _link(self, logits: Tensor, dim: int) -> Tensor:
        """Calibrated logits of the targets as they are after smoothing: see `penex._links`."""
        raise NotImplementedError

    def _calibrated_logits(self, logits: Tensor, dim: int) -> Tensor:
        smoothed = self._link(logits, dim)
        return _links.remove_smoothing(smoothed, self.label_smoothing, dim, self.weight)

    def extra_repr(self) -> str:
        return (
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, "
            f"label_smoothing={self.label_smoothing}"
        )


class _Penalized(nn.Module):
    """The rule for the penalty, and the running penalty: what :class:`PENEX` says of them."""

    penalty: Tensor

    def _hold(
        self,
        sensitivity: float,
        penalty_mode: str | None,
        penalty: float | None,
        penalty_min: float,
        penalty_max: float,
        ema: float,
        huberization: float | None,
        process_group: dist.ProcessGroup | Literal["world"] | None,
    ) -> None:
        if penalty_mode is None:
            penalty_mode = "running" if penalty is None else "fixed"
        self.penalty_mode = choice("penalty_mode", penalty_mode, ("running", "auto", "fixed"))
        if penalty is not None:
            penalty = _float32("penalty", penalty)
        if penalty_mode == "fixed" and penalty is None:
            raise ValueError("penalty: penalty_mode='fixed' needs a positive number, got None")
        if penalty_mode == "auto" and penalty is not None:
            raise ValueError(f"penalty: penalty_mode='auto' estimates it, got {penalty}")
        check_penalty_bounds(penalty_min, penalty_max)
        self.sensitivity = positive("sensitivity", sensitivity)
        self.penalty_min = _float32("penalty_min", penalty_min)
        self.penalty_max = _float32("penalty_max", penalty_max)
        self.ema = number("ema", ema, 0.0, 1.0)
        self.huberization = None if huberization is None else positive("huberization", huberization)
        if isinstance(process_group, str):
            choice("process_group", process_group, ("world",))
        self.process_group = process_group
        start = math.nan if penalty is None else penalty
        self.register_buffer("penalty", torch.tensor(start, dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the penalty like any buffer, but keep it float32: 1e-10 is 0 in float16."""
        penalty = self.penalty
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.penalty.dtype != torch.float32:
            self.penalty = penalty.to(self.penalty.device)
        return self

    def _rule_repr(self) -> str:
        penalty = f", penalty={self.penalty.item():g}" if self.penalty_mode == "fixed" else ""
        return f"sensitivity={self.sensitivity}, penalty_mode={self.penalty_mode!r}{penalty}"


class PENEX(_Penalized, _Loss):
    r"""Penalized exponential loss, in the place of :class:`torch.nn.CrossEntropyLoss`.

    Computes :func:`penex.functional.penex_loss`, where shapes, options and the two differences to
    cross-entropy are described, and holds the penalty :math:`\rho`. The model it trains predicts
    :math:`\operatorname{softmax}((1+\alpha) f)`: :meth:`predict_proba`.

    ``penalty_mode`` says where :math:`\rho` comes from:

    - ``"running"`` (default): an exponential moving average of the batch estimates
      :func:`penex.functional.estimate_penalty`; the first batch sets it, unless `penalty` gives
      the start value, and each batch is computed with the average that includes it.
    - ``"auto"``: each batch's own estimate.
    - ``"fixed"`` (default if `penalty` is given): the constant `penalty`.

    State: the buffer ``penalty``, 0-d, float32 whatever the module is cast to, NaN until a batch
    has been seen. It is always there, so a fresh criterion loads a trained one's state strictly and
    the other way round. It changes in training mode with gradients enabled, and then only; a batch
    whose estimate means nothing (no kept row, a NaN or infinite sum) leaves it as it is. In
    evaluation ``"running"`` uses it, or the batch's own estimate before any was seen.

    Args:
        weight: Class weights, shape (K).
        sensitivity: :math:`\alpha > 0`.
        penalty_mode: ``"running"``, ``"auto"`` or ``"fixed"``.
        penalty: :math:`\rho`, the constant of ``"fixed"`` or the start of ``"running"``.
        penalty_min: Estimates are clamped to at least this.
        penalty_max: Estimates are clamped to at most this.
        ema: Share of the newest estimate in the running penalty, in [0, 1].
        huberization: As in :func:`penex.functional.penex_loss`.
        ignore_index: As in :func:`penex.functional.penex_loss`.
        reduction: As in :func:`penex.functional.penex_loss`.
        label_smoothing: As in :func:`penex.functional.penex_loss`.
        process_group: In training, estimate :math:`\rho` over the batches of all ranks of this
            group, and let ``"mean"`` divide by the average of their denominators: the gradients
            that DistributedDataParallel averages are then those of one process with the joined
            batch, however rows are ignored. One collective of three numbers a step; every rank
            must call the criterion equally often. ``"world"``: every rank of the job, looked up
            when a batch comes, so that the criterion can be built before
            :mod:`torch.distributed` is initialised; without that it is None. None: all from the
            local batch.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range.

    Example:
        >>> criterion = PENEX(sensitivity=0.1)
        >>> logits = torch.zeros(2, 4, requires_grad=True)
        >>> loss = criterion(logits, torch.tensor([0, 3]))
        >>> loss.backward()
        >>> criterion.penalty  # alpha / K at f = 0
        tensor(0.0250)
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        sensitivity: float = 0.1,
        penalty_mode: str | None = None,
        penalty: float | None = None,
        penalty_min: float = 1e-10,
        penalty_max: float = 100.0,
        ema: float = 0.1,
        huberization: float | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        process_group: dist.ProcessGroup | Literal["world"] | None = None,
    ) -> None:
        super().__init__(weight, ignore_index, reduction, label_smoothing)
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

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of `input` (logits) and `target`, as :func:`penex.functional.penex_loss`."""
        return self._loss(input, target, _Held(self))

    def _loss(self, input: Tensor, target: Tensor, penalty: Penalty) -> Tensor:
        return functional.penalized(
            input,
            target,
            alpha=self.sensitivity,
            penalty=penalty,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            huberization=self.huberization,
        )

    def extra_repr(self) -> str:
        return f"{self._rule_repr()}, {super().extra_repr()}"

    def _link(self, logits: Tensor, dim: int) -> Tensor:
        return _links.penex(logits, self.sensitivity, self.huberization)


def _ranks(group: dist.ProcessGroup | str | None) -> dist.ProcessGroup | None:
    """`group`, or what "world" stands for by now."""
    if isinstance(group, str):
        return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    return group


class _Held:
    """The penalty of a criterion for one batch; in training the batch is absorbed first."""

    def __init__(self, criterion: _Penalized) -> None:
        self.current, self.ema = criterion.penalty, criterion.ema
        self.mode = criterion.penalty_mode
        training = criterion.training and torch.is_grad_enabled()
        self.learning = training and self.mode != "fixed"
        self.group = _ranks(criterion.process_group) if training else None
        self.local = self.group is None
        self.needs_sums = self.mode != "fixed" or not self.local
        self.bounds = criterion.sensitivity, criterion.penalty_min, criterion.penalty_max

    def settle(self, sums: PenaltySums | None, denominator: Tensor) -> Settled:
        if sums is not None and self.group is not None:
            sums, denominator = sums.over_ranks(denominator, self.group)
        if sums is None or self.mode == "fixed":
            return Settled(self.current.log(), denominator)
        if self.learning:
            new = sums.penalty(*self.bounds).to(self.current.dtype)
            if self.mode == "running":
                new = self.current.lerp(new, self.ema).where(~self.current.isnan(), new)
            self.current.copy_(new.where(sums.finite(), self.current))
        estimate = sums.log_penalty(*self.bounds)
        if self.mode == "running":
            log_penalty = self.current.log().to(estimate.dtype)
            estimate = log_penalty.where(~self.current.isnan(), estimate)
        return Settled(estimate, denominator)

    def value(self, exponential: float, partition: float) -> float:
        if self.mode == "fixed":
            return self.current.item()
        value = estimate(exponential, partition, *self.bounds)
        if self.mode == "running":
            before = self.current.item()
            if not self.learning:
                return value if math.isnan(before) else before
            if not math.isnan(before):
                value = before + self.ema * (value - before)
        if self.learning:
            self.current.fill_(value)
        return value


class _Collecting(_Held):
    """The same, of a criterion in evaluation; it leaves the sums of the batch in a list.

    So several batches, which share one penalty, can be absorbed together: :func:`_absorb`.
    """

    def __init__(self, criterion: _Penalized, seen: list[PenaltySums]) -> None:
        super().__init__(criterion)
        self.seen = seen

    def settle(self, sums: PenaltySums | None, denominator: Tensor) -> Settled:
        if sums is not None:
            self.seen.append(sums)
        return super().settle(sums, denominator)

    def value(self, exponential: float, partition: float) -> float:
        logs = torch.tensor([exponential, partition], dtype=torch.float64).log()
        self.seen.append(PenaltySums(logs[0], logs[1], 1))
        return super().value(exponential, partition)


def _absorb(criterion: _Penalized, seen: list[PenaltySums]) -> None:
    """Move the penalty of a criterion in evaluation once, for batches that are one in training."""
    exponentials, partitions, classes = zip(*seen, strict=True)
    sums = PenaltySums.of(torch.stack(exponentials), torch.stack(partitions), classes[0])
    _Held(criterion.train()).settle(sums, torch.zeros_like(sums.partition))
    criterion.eval()


class LogPENEX(_Loss):
    r"""PENEX in the log domain, in the place of :class:`torch.nn.CrossEntropyLoss`.

    Computes :func:`penex.functional.log_penex_loss`, where shapes, options and what it means are
    described. There is no penalty to estimate and no state. The model it trains predicts
    :math:`\operatorname{softmax}((1+\alpha) f)`, whatever the power: :meth:`predict_proba`.

    Args:
        weight: Class weights, shape (K).
        sensitivity: :math:`\alpha \ge 0`.
        power: :math:`\beta \ge 0`.
        ignore_index: As in :func:`penex.functional.log_penex_loss`.
        reduction: As in :func:`penex.functional.log_penex_loss`.
        label_smoothing: As in :func:`penex.functional.log_penex_loss`.
        process_group: In training, take the batches of all ranks of this group for one: the
            gradients that DistributedDataParallel averages are then those of one process with the
            joined batch, however rows are ignored, and the ranks' losses average to its loss. One
            collective of four numbers a step; every rank must call the criterion equally often.
            Second derivatives then take what the other ranks contribute, and both logarithms of the
            batch, as constants. ``"world"``: every rank of the job, looked up when a batch comes;
            None where :mod:`torch.distributed` is not initialised. None: the local batch alone.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range.

    Example:
        >>> criterion = LogPENEX(sensitivity=0.1, power=4.0)
        >>> logits = torch.zeros(2, 4, requires_grad=True)
        >>> criterion(logits, torch.tensor([0, 3]))  # log 4
        tensor(1.3863, grad_fn=<_SmallBackward>)
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        sensitivity: float = 0.1,
        power: float = 1.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        process_group: dist.ProcessGroup | Literal["world"] | None = None,
    ) -> None:
        super().__init__(weight, ignore_index, reduction, label_smoothing)
        self.sensitivity = number("sensitivity", sensitivity, 0.0, math.inf)
        self.power = number("power", power, 0.0, math.inf)
        if isinstance(process_group, str):
            choice("process_group", process_group, ("world",))
        self.process_group = process_group

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of `input` (logits) and `target`."""
        training = self.training and torch.is_grad_enabled()
        return functional.log_domain(
            input,
            target,
            alpha=self.sensitivity,
            beta=self.power,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            group=_ranks(self.process_group) if training else None,
        )

    def extra_repr(self) -> str:
        return f"sensitivity={self.sensitivity}, power={self.power}, {super().extra_repr()}"

    def _link(self, logits: Tensor, dim: int) -> Tensor:
        return _links.penex(logits, self.sensitivity)


class FocalLoss(_Loss):
    """Focal loss with the keywords of :class:`torch.nn.CrossEntropyLoss`.

    Computes :func:`penex.functional.focal_loss`, where the arguments are described.
    """

    def __init__(
        self,
        gamma: float = 2.0,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(weight, ignore_index, reduction, label_smoothing)
        self.gamma = number("gamma", gamma, 0.0, math.inf)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of `input` (logits) and `target`."""
        return functional.focal_loss(
            input,
            target,
            gamma=self.gamma,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )

    def _link(self, logits: Tensor, dim: int) -> Tensor:
        return _links.focal(logits, self.gamma, dim)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, {super().extra_repr()}"


class ConfidencePenaltyLoss(_Loss):
    """Confidence penalty with the keywords of :class:`torch.nn.CrossEntropyLoss`.

    Computes :func:`penex.functional.confidence_penalty_loss`, where the arguments are described.
    """

    def __init__(
        self,
        strength: float = 0.1,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(weight, ignore_index, reduction, label_smoothing)
        self.strength = number("strength", strength, 0.0, math.inf)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of `input` (logits) and `target`."""
        return functional.confidence_penalty_loss(
            input,
            target,
            strength=self.strength,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )

    def _link(self, logits: Tensor, dim: int) -> Tensor:
        return _links.confidence_penalty(logits, self.strength, dim)

    def extra_repr(self) -> str:
        return f"strength={self.strength}, {super().extra_repr()}"


class ZLoss(_Loss):
    """The z-loss with the keywords of :class:`torch.nn.CrossEntropyLoss`.

    Computes :func:`penex.functional.z_loss`, where the arguments are described.
    """

    def __init__(
        self,
        strength: float = 1e-4,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(weight, ignore_index, reduction, label_smoothing)
        self.strength = number("strength", strength, 0.0, math.inf)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of `input` (logits) and `target`."""
        return functional.z_loss(
            input,
            target,
            strength=self.strength,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )

    def _link(self, logits: Tensor, dim: int) -> Tensor:
        return logits  # the penalty moves all logits of a row together, until log Z is 0

    def extra_repr(self) -> str:
        return f"strength={self.strength}, {super().extra_repr()}"


def _float32(name: str, value: object) -> float:
    """`value` as a float, refused unless positive and float32, the buffer's dtype, holds it."""
    result = positive(name, value)
    limits = torch.finfo(torch.float32)
    if not limits.tiny <= result <= limits.max:
        raise ValueError(
            f"{name}: expected a number that float32 can hold, "
            f"in [{limits.tiny:.3g}, {limits.max:.3g}], got {result:g}"
        )
    return result
