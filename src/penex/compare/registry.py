"""The losses that can be compared. Adding a loss is adding an entry to :data:`LOSSES`.

Nothing else in the comparison knows one loss from another. An entry gives the criterion, the range
in which to tune its one hyperparameter, the scale of its gradient, and, through the criterion, the
link from logits to class probabilities. A criterion may have two methods, for state that follows
the training: ``after_step()``, called after every optimiser step, and ``after_epoch()``, called
after the last batch of every epoch.
"""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from penex.compare.errors import CompareError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Knob:
    """The hyperparameter of a loss: its name, its default, and where to look for better."""

    name: str
    symbol: str
    default: float
    low: float
    high: float
    log: bool = False
    most: float = math.inf
    """The largest value that the loss accepts; the smallest is 0, or above 0 where `log`."""


@dataclass(frozen=True)
class Context:
    """What a loss may need to know of the run it is built for."""

    num_classes: int
    steps_total: int
    """Optimiser steps of the whole run."""
    steps_per_epoch: int


@dataclass(frozen=True)
class Loss:
    """An entry of the registry."""

    name: str
    label: str
    build: Callable[[float, Context], "nn.Module"]
    """The criterion for a value of the knob."""
    knob: Knob | None = None
    gradient_scale: Callable[["nn.Module", int], float] = lambda criterion, num_classes: 1.0
    """From the criterion and the number of classes K: its gradient at f = 0 as a multiple of
    cross-entropy's, which is 1/K − 1[j = y] there. The mean over classes is subtracted first, as
    it changes no probability. Dividing the loss by it makes one learning rate, weight decay and
    clipping threshold mean the same for every loss."""
    constrain: Callable[["Tensor"], "Tensor"] | None = None
    """What the network's logits, classes last, go through before anything reads them: the
    criterion, the metrics, an attack. None: nothing."""

    def link(self, knob: float, num_classes: int) -> Callable[["Tensor"], "Tensor"]:
        """The function from logits (N, K) to the log-probabilities that this loss stands for."""
        from penex.inference import link

        return link(self.build(knob, Context(num_classes, steps_total=1, steps_per_epoch=1)))


def _cross_entropy(knob: float, context: Context) -> "nn.Module":
    from torch import nn

    return nn.CrossEntropyLoss()


def _label_smoothing(knob: float, context: Context) -> "nn.Module":
    from torch import nn

    return nn.CrossEntropyLoss(label_smoothing=knob)


def _confidence_penalty(knob: float, context: Context) -> "nn.Module":
    from penex.losses import ConfidencePenaltyLoss

    return ConfidencePenaltyLoss(strength=knob)


def _focal(knob: float, context: Context) -> "nn.Module":
    from penex.losses import FocalLoss

    return FocalLoss(gamma=knob)


def _penex(knob: float, context: Context) -> "nn.Module":
    from penex.losses import PENEX

    return PENEX(sensitivity=knob)


def _log_penex(knob: float, context: Context) -> "nn.Module":
    from penex.losses import LogPENEX

    return LogPENEX(sensitivity=0.0, power=knob)


def _z_loss(knob: float, context: Context) -> "nn.Module":
    from penex.losses import ZLoss

    return ZLoss(strength=knob)


def _exponential(knob: float, context: Context) -> "nn.Module":
    from penex.compare.ablations import ExponentialLoss

    return ExponentialLoss(knob)


def _sensitivity(criterion: Any, num_classes: int) -> float:
    return float(criterion.sensitivity)


def _unsmoothed(criterion: Any, num_classes: int) -> float:
    return 1 - float(criterion.label_smoothing)


def _focal_scale(criterion: Any, num_classes: int) -> float:
    gamma, p = float(criterion.gamma), 1 / num_classes
    return float((1 - p) ** gamma - gamma * p * (1 - p) ** (gamma - 1) * math.log(p))


def _conex_sensitivity(knob: float, context: Context) -> float:
    return 1 / (context.num_classes - 1)


def _conex_hard(knob: float, context: Context) -> "nn.Module":
    from penex.compare.ablations import ExponentialLoss

    return ExponentialLoss(_conex_sensitivity(knob, context))


def _sum_to_zero(logits: "Tensor") -> "Tensor":
    from penex.compare.ablations import sum_to_zero

    return sum_to_zero(logits)


def _conex_squared(knob: float, context: Context) -> "nn.Module":
    from penex.compare.ablations import SquaredPenaltyLoss

    return SquaredPenaltyLoss(_conex_sensitivity(knob, context), knob)


def _conex_lagrangian(knob: float, context: Context) -> "nn.Module":
    from penex.compare.ablations import AugmentedLagrangianLoss

    return AugmentedLagrangianLoss(_conex_sensitivity(knob, context), knob)


def _logsumexp(knob: float, context: Context) -> "nn.Module":
    from penex.compare.ablations import LogSumExpPenaltyLoss

    return LogSumExpPenaltyLoss(knob)


def _linear(knob: float, context: Context) -> "nn.Module":
    from penex.compare.ablations import LinearPenaltyLoss

    return LinearPenaltyLoss(knob)


def _linear_schedule(knob: float, context: Context) -> "nn.Module":
    from penex.compare.ablations import ScheduledPENEX

    return ScheduledPENEX(knob, steps=context.steps_total, shape="linear")


def _cosine_schedule(knob: float, context: Context) -> "nn.Module":
    from penex.compare.ablations import ScheduledPENEX

    return ScheduledPENEX(knob, steps=context.steps_total, shape="cosine")


REFERENCE = "cross-entropy"
"""What every other loss is compared with, pair by pair."""
_SENSITIVITY = Knob("sensitivity", "α", default=0.1, low=0.003, high=1.0, log=True)
# The range is that of the paper's study. Its optima, above 700, are those of quartic penalties; a
# quadratic one of that strength leaves little room to learn.
_CONSTRAINT = Knob("strength", "ρ", default=1.0, low=0.0, high=1000.0)

LOSSES = {
    loss.name: loss
    for loss in (
        Loss(REFERENCE, "Cross-entropy", _cross_entropy),
        Loss(
            "label-smoothing",
            "Label smoothing",
            _label_smoothing,
            Knob("smoothing", "ε", default=0.1, low=0.0, high=0.5, most=0.99),
            gradient_scale=_unsmoothed,
        ),
        Loss(
            "confidence-penalty",
            "Confidence penalty",
            _confidence_penalty,
            Knob("strength", "β", default=0.1, low=0.0, high=2.0),
        ),
        Loss(
            "focal",
            "Focal",
            _focal,
            Knob("gamma", "γ", default=2.0, low=0.0, high=5.0),
            gradient_scale=_focal_scale,
        ),
        Loss(
            "penex",
            "PENEX",
            _penex,
            _SENSITIVITY,
            gradient_scale=_sensitivity,
        ),
        # The log-domain family at sensitivity 0, where its one knob is the power.
        Loss(
            "log-penex",
            "log-PENEX",
            _log_penex,
            Knob("power", "β", default=1.0, low=0.25, high=64.0, log=True),
        ),
        Loss(
            "z-loss",
            "z-loss",
            _z_loss,
            Knob("strength", "λ", default=0.01, low=1e-4, high=1.0, log=True),
        ),
        # The paper's ablations; `penex.compare.ablations` derives their links.
        Loss(
            "exponential",
            "Exponential loss",
            _exponential,
            replace(_SENSITIVITY, default=0.03),
            gradient_scale=_sensitivity,
        ),
        Loss(
            "conex-hard",
            "CONEX, hard",
            _conex_hard,
            gradient_scale=_sensitivity,
            constrain=_sum_to_zero,
        ),
        Loss(
            "conex-squared",
            "CONEX, squared penalty",
            _conex_squared,
            _CONSTRAINT,
            gradient_scale=_sensitivity,
        ),
        Loss(
            "conex-lagrangian",
            "CONEX, augmented Lagrangian",
            _conex_lagrangian,
            _CONSTRAINT,
            gradient_scale=_sensitivity,
        ),
        Loss(
            "logsumexp-penalty",
            "LogSumExp penalty",
            _logsumexp,
            _SENSITIVITY,
            gradient_scale=_sensitivity,
        ),
        Loss(
            "linear-penalty",
            "Linear penalty",
            _linear,
            _SENSITIVITY,
            gradient_scale=_sensitivity,
        ),
        Loss(
            "penex-linear-schedule",
            "PENEX, linear schedule",
            _linear_schedule,
            _SENSITIVITY,
            gradient_scale=_sensitivity,
        ),
        Loss(
            "penex-cosine-schedule",
            "PENEX, cosine schedule",
            _cosine_schedule,
            _SENSITIVITY,
            gradient_scale=_sensitivity,
        ),
    )
}

DEFAULT_LOSSES = (REFERENCE, "label-smoothing", "confidence-penalty", "focal", "penex")
"""What is compared unless other losses are named; the rest of the registry is for ablations."""


@dataclass(frozen=True)
class Contender:
    """A loss as the user named it: ``penex``, or ``penex=0.3`` with the knob held at 0.3."""

    spec: str
    loss: Loss
    value: float | None

    @property
    def label(self) -> str:
        """The name in tables and pictures."""
        if self.value is None or self.loss.knob is None:
            return self.loss.label
        return f"{self.loss.label} {self.loss.knob.symbol}={exact(self.value)}"

    @property
    def untuned(self) -> float:
        """The value the user fixed, else the loss's default; NaN if it has no knob."""
        if self.loss.knob is None:
            return math.nan
        return self.loss.knob.default if self.value is None else self.value


def exact(value: float) -> str:
    """A number with six digits, or with as many as tell it from every other."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def contender(spec: str) -> Contender:
    """Parse ``name`` or ``name=value``.

    Raises:
        CompareError: No such loss, no knob to set, or a value the loss refuses.
    """
    name, equals, text = spec.partition("=")
    if name not in LOSSES:
        close = difflib.get_close_matches(name, LOSSES, n=1)
        hint = f"; did you mean {close[0]}?" if close else "."
        raise CompareError(f"losses: no loss is called {name!r}{hint} Known: {', '.join(LOSSES)}.")
    loss = LOSSES[name]
    if not equals:
        return Contender(spec, loss, None)
    if loss.knob is None:
        raise CompareError(f"losses: {name} has no hyperparameter to set, got {spec!r}")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    possible = math.isfinite(value) and 0 <= value <= loss.knob.most
    if not possible or (loss.knob.log and value == 0):
        raise CompareError(
            f"losses: expected {name}=NUMBER ({loss.knob.name}, between {loss.knob.low:g} and "
            f"{loss.knob.high:g} as a rule), got {spec!r}"
        )
    return Contender(spec, loss, value)
