"""The losses as modules: they hold arguments and the running penalty, and call the functions."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from penex import _links, functional
from penex import _row_losses as row_losses
from penex._inputs import (
    check_reduction,
    choice,
    integer,
    nonnegative,
    number,
    positive,
    smoothing,
)
from penex._links import ProbabilityMixin
from penex._penalty import Bounds, PenaltyRule, RunningPenalty, world
from penex._row_losses import RowLoss

__all__ = [
    "PENEX",
    "ConfidencePenaltyLoss",
    "CrossEntropyLoss",
    "FocalLoss",
    "GeneralizedCrossEntropyLoss",
    "LogPENEX",
    "ZLoss",
]

Check = Callable[[str, Any], Any]


def _weight(name: str, value: Any) -> Tensor | None:
    if value is not None and not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value is not None and value.ndim != 1:
        raise ValueError(
            f"{name}: expected one weight per class, shape (K,), got {tuple(value.shape)}"
        )
    return value


def _process_group(name: str, value: Any) -> Any:
    return choice(name, value, ("world",)) if isinstance(value, str) else value


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")
    return value


def _float32(name: str, value: Any) -> float:
    """`value` as a float, refused unless positive and float32, the buffer's dtype, holds it."""
    result = positive(name, value)
    limits = torch.finfo(torch.float32)
    if not limits.tiny <= result <= limits.max:
        raise ValueError(
            f"{name}: expected a number that float32 can hold, "
            f"in [{limits.tiny:.3g}, {limits.max:.3g}], got {result:g}"
        )
    return result


class _Loss(ProbabilityMixin, nn.Module):
    """The keywords of :class:`torch.nn.CrossEntropyLoss`, and the link.

    Arguments are checked whenever they are set, not in the constructor alone.
    """

    weight: Tensor | None

    _checks: ClassVar[dict[str, Check]] = {
        "weight": _weight,
        "ignore_index": integer,
        "reduction": lambda name, value: check_reduction(value),
        "label_smoothing": lambda name, value: smoothing(value),
    }

    def __init__(
        self,
        weight: Tensor | None,
        ignore_index: int,
        reduction: str,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", _weight("weight", weight))
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing

    def __setattr__(self, name: str, value: Any) -> None:
        check = self._checks.get(name)
        super().__setattr__(name, value if check is None else check(name, value))

    def extra_repr(self) -> str:
        """What torch prints of the module: all arguments but those that are None."""
        arguments = {name: getattr(self, name) for name in self._checks}
        return ", ".join(
            f"{name.removeprefix('initial_')}="
            + (f"<shape {tuple(value.shape)}>" if isinstance(value, Tensor) else f"{value!r}")
            for name, value in arguments.items()
            if value is not None
        )

    @torch.jit.unused
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of `input` (logits) and `target`."""
        return self._loss(input, target, self._row_loss())

    def _loss(self, input: Tensor, target: Tensor, loss: RowLoss) -> Tensor:
        return functional.evaluate(
            input,
            target,
            loss,
            self.weight,
            self.ignore_index,
            self.reduction,
            self.label_smoothing,
        )

    def _row_loss(self) -> RowLoss:
        """The loss with the arguments that are set."""
        raise NotImplementedError

    def _link(self, logits: Tensor, dim: int) -> Tensor:
        """Calibrated logits of the targets as they are after smoothing: see `penex._links`."""
        raise NotImplementedError

    def _calibrated_logits(self, logits: Tensor, dim: int) -> Tensor:
        smoothed = self._link(logits, dim)
        return _links.remove_smoothing(smoothed, self.label_smoothing, dim, self.weight)


class PENEX(_Loss):
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

    State: the buffer ``penalty``, 0-d, float32 whatever the module is cast to. It is always there,
    so a fresh criterion loads a trained one's state strictly and the other way round. Until a batch
    has been seen it is 0; any value outside of [`penalty_min`, `penalty_max`], such as one that
    comes of memory without values, stands for "none seen" too. It changes in training mode with
    gradients enabled, and then only; a batch whose estimate means nothing (no kept row, a NaN or
    infinite sum) leaves it as it is, and so does the recomputation of activation checkpointing. In
    evaluation ``"running"`` uses it, or the batch's own estimate before any was seen. With
    ``"fixed"`` the argument counts, whatever state is loaded. A state that belongs to another
    sensitivity gives a warning, and the running penalty starts again.

    `weight`, `sensitivity`, `huberization`, `ignore_index`, `reduction`, `label_smoothing` and
    `normalize` are those of the function.

    Args:
        penalty_mode: ``"running"``, ``"auto"`` or ``"fixed"``.
        penalty: :math:`\rho`, the constant of ``"fixed"`` or the start of ``"running"``.
        penalty_min: Estimates are clamped to at least this.
        penalty_max: Estimates are clamped to at most this.
        ema: Share of the newest estimate in the running penalty, in [0, 1].
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

    penalty: Tensor

    _checks: ClassVar[dict[str, Check]] = {
        "sensitivity": positive,
        "penalty_mode": lambda name, value: choice(name, value, ("running", "auto", "fixed")),
        "initial_penalty": lambda name, value: None if value is None else _float32(name, value),
        "penalty_min": _float32,
        "penalty_max": _float32,
        "ema": lambda name, value: number(name, value, 0.0, 1.0),
        "huberization": lambda name, value: None if value is None else positive(name, value),
        "process_group": _process_group,
        **_Loss._checks,
        "normalize": _boolean,
    }

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        sensitivity: float = 0.1,
        penalty_mode: Literal["running", "auto", "fixed"] | None = None,
        penalty: float | None = None,
        penalty_min: float = 1e-10,
        penalty_max: float = 100.0,
        ema: float = 0.1,
        huberization: float | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        process_group: dist.ProcessGroup | Literal["world"] | None = None,
        normalize: bool = False,
    ) -> None:
        super().__init__(weight, ignore_index, reduction, label_smoothing)
        if penalty_mode is None:
            penalty_mode = "running" if penalty is None else "fixed"
        self.penalty_mode = penalty_mode
        if penalty is not None:
            penalty = _float32("penalty", penalty)
        if penalty_mode == "fixed" and penalty is None:
            raise ValueError("penalty: penalty_mode='fixed' needs a positive number, got None")
        if penalty_mode == "auto" and penalty is not None:
            raise ValueError(f"penalty: penalty_mode='auto' estimates it, got {penalty}")
        Bounds.checked(sensitivity, penalty_min, penalty_max)
        self.sensitivity = sensitivity
        self.initial_penalty = penalty
        self.penalty_min, self.penalty_max = penalty_min, penalty_max
        self.ema, self.huberization = ema, huberization
        self.process_group = process_group
        self.normalize = normalize
        self.register_buffer("penalty", torch.empty((), dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the penalty to its start, as after construction.

        For modules whose memory was made without values, as by ``to_empty``.
        """
        start = self.initial_penalty
        with torch.no_grad():
            self.penalty.fill_(0.0 if start is None else start)

    def _penalty_rule(self) -> RunningPenalty:
        if self.penalty_mode == "fixed" and self.initial_penalty is None:
            raise ValueError(
                "penalty_mode: 'fixed' needs a penalty, and this criterion was made without one; "
                f"expected initial_penalty to be set, for example to {self.penalty.item():g}"
            )
        return RunningPenalty(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the penalty like any buffer, but keep it float32: 1e-10 is 0 in float16."""
        penalty = self.penalty
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.penalty.dtype != torch.float32:
            self.penalty = penalty.to(self.penalty.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Next to the version of the module, where a state dict has no keys of its own.
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1], {})
        metadata["sensitivity"] = self.sensitivity

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, *args: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if self.penalty_mode == "fixed":  # the argument counts, not the state
            self.reset_parameters()
            return
        sensitivity = (local_metadata or {}).get("sensitivity", self.sensitivity)
        if sensitivity != self.sensitivity and prefix + "penalty" in state_dict:
            warnings.warn(
                f"penalty: the state to be loaded belongs to sensitivity {sensitivity:g}, and this "
                f"criterion has {self.sensitivity:g}; the running penalty starts again",
                stacklevel=2,
            )
            self.reset_parameters()

    def _row_loss(self) -> RowLoss:
        return self._with_penalty(self._penalty_rule())

    def _with_penalty(self, penalty: PenaltyRule) -> RowLoss:
        return row_losses.Penex(self.sensitivity, penalty, self.huberization, self.normalize)

    def _link(self, logits: Tensor, dim: int) -> Tensor:
        return _links.penex(logits, self.sensitivity, self.huberization)


class LogPENEX(_Loss):
    r"""PENEX in the log domain, in the place of :class:`torch.nn.CrossEntropyLoss`.

    Computes :func:`penex.functional.log_penex_loss`, where shapes, options and what it means are
    described. There is no penalty to estimate and no state. The model it trains predicts
    :math:`\operatorname{softmax}((1+\alpha) f)`, whatever the power: :meth:`predict_proba`.

    The other arguments are those of the function.

    Args:
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
        tensor(1.3863, grad_fn=<_ByRowsBackward>)
    """

    _checks: ClassVar[dict[str, Check]] = {
        "sensitivity": nonnegative,
        "power": nonnegative,
        "process_group": _process_group,
    } | _Loss._checks

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
        self.sensitivity, self.power = sensitivity, power
        self.process_group = process_group

    def _row_loss(self) -> RowLoss:
        training = self.training and torch.is_grad_enabled()
        group = world(self.process_group) if training else None
        return row_losses.LogPenex(self.sensitivity, self.power, group)

    def _link(self, logits: Tensor, dim: int) -> Tensor:
        return _links.penex(logits, self.sensitivity)


class CrossEntropyLoss(_Loss):
    """Cross-entropy, equal to :class:`torch.nn.CrossEntropyLoss` in every option.

    Computes :func:`penex.functional.cross_entropy`.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(weight, ignore_index, reduction, label_smoothing)

    def _row_loss(self) -> RowLoss:
        return row_losses.CrossEntropy()

    def _link(self, logits: Tensor, dim: int) -> Tensor:
        return logits


class FocalLoss(_Loss):
    """Focal loss with the keywords of :class:`torch.nn.CrossEntropyLoss`.

    Computes :func:`penex.functional.focal_loss`, where the arguments are described.
    """

    _checks: ClassVar[dict[str, Check]] = {"gamma": nonnegative} | _Loss._checks

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
        self.gamma = gamma

    def _row_loss(self) -> RowLoss:
        return row_losses.Focal(self.gamma)

    def _link(self, logits: Tensor, dim: int) -> Tensor:
        return _links.focal(logits, self.gamma, dim)


class ConfidencePenaltyLoss(_Loss):
    """Confidence penalty with the keywords of :class:`torch.nn.CrossEntropyLoss`.

    Computes :func:`penex.functional.confidence_penalty_loss`, where the arguments are described.
    """

    _checks: ClassVar[dict[str, Check]] = {"strength": nonnegative} | _Loss._checks

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
        self.strength = strength

    def _row_loss(self) -> RowLoss:
        return row_losses.ConfidencePenalty(self.strength)

    def _link(self, logits: Tensor, dim: int) -> Tensor:
        return _links.confidence_penalty(logits, self.strength, dim)


class ZLoss(_Loss):
    """The z-loss with the keywords of :class:`torch.nn.CrossEntropyLoss`.

    Computes :func:`penex.functional.z_loss`, where the arguments are described.
    """

    _checks: ClassVar[dict[str, Check]] = {"strength": nonnegative} | _Loss._checks

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
        self.strength = strength

    def _row_loss(self) -> RowLoss:
        return row_losses.ZPenalty(self.strength)

    def _link(self, logits: Tensor, dim: int) -> Tensor:
        return logits  # the penalty moves all logits of a row together, until log Z is 0


class GeneralizedCrossEntropyLoss(_Loss):
    """Generalised cross-entropy of class indices.

    Computes :func:`penex.functional.generalized_cross_entropy_loss`, where the arguments are
    described.
    """

    _checks: ClassVar[dict[str, Check]] = {
        "q": lambda name, value: number(name, value, 0.0, 1.0, open_low=True)
    } | _Loss._checks

    def __init__(
        self,
        q: float = 0.7,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, ignore_index, reduction)
        self.q = q

    def _row_loss(self) -> RowLoss:
        return row_losses.GeneralizedCrossEntropy(self.q)

    def _link(self, logits: Tensor, dim: int) -> Tensor:
        return _links.generalized_cross_entropy(logits, self.q, dim)
