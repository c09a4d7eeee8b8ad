"""The losses that can be compared. Adding a loss is adding an entry to :data:`LOSSES`.

Nothing else in the comparison knows one loss from another: it asks the entry for a criterion, for
the range in which to tune its one knob, and for the factor that turns trained logits into the
logits of its probabilities.
"""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from penex.compare.errors import CompareError

if TYPE_CHECKING:
    from torch import nn


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
class Loss:
    """An entry of the registry."""

    name: str
    label: str
    build: Callable[[float], "nn.Module"]
    """The criterion for a value of the knob."""
    knob: Knob | None = None
    scale: Callable[[float], float] = lambda knob: 1.0
    """What multiplies trained logits before softmax gives this loss's probabilities."""


def _cross_entropy(knob: float) -> "nn.Module":
    from torch import nn

    return nn.CrossEntropyLoss()


def _label_smoothing(knob: float) -> "nn.Module":
    from torch import nn

    return nn.CrossEntropyLoss(label_smoothing=knob)


def _confidence_penalty(knob: float) -> "nn.Module":
    from penex.losses import ConfidencePenaltyLoss

    return ConfidencePenaltyLoss(strength=knob)


def _focal(knob: float) -> "nn.Module":
    from penex.losses import FocalLoss

    return FocalLoss(gamma=knob)


def _penex(knob: float) -> "nn.Module":
    from penex.losses import PENEX

    return PENEX(sensitivity=knob)


REFERENCE = "cross-entropy"
"""What every other loss is compared with, pair by pair."""

LOSSES = {
    loss.name: loss
    for loss in (
        Loss(REFERENCE, "Cross-entropy", _cross_entropy),
        Loss(
            "label-smoothing",
            "Label smoothing",
            _label_smoothing,
            Knob("smoothing", "ε", default=0.1, low=0.0, high=0.5, most=1.0),
        ),
        Loss(
            "confidence-penalty",
            "Confidence penalty",
            _confidence_penalty,
            Knob("strength", "β", default=0.1, low=0.0, high=2.0),
        ),
        Loss("focal", "Focal", _focal, Knob("gamma", "γ", default=2.0, low=0.0, high=5.0)),
        Loss(
            "penex",
            "PENEX",
            _penex,
            Knob("sensitivity", "α", default=0.1, low=0.003, high=1.0, log=True),
            scale=lambda alpha: 1 + alpha,
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
        return f"{self.loss.label} {self.loss.knob.symbol}={self.value:g}"

    @property
    def untuned(self) -> float:
        """The value the user fixed, else the loss's default; NaN if it has no knob."""
        if self.loss.knob is None:
            return math.nan
        return self.loss.knob.default if self.value is None else self.value


def contender(spec: str) -> Contender:
    """Parse ``name`` or ``name=value``.

    Raises:
        CompareError: No such loss, no knob to set, or a value the loss refuses.
    """
    name, equals, text = spec.partition("=")
    if name not in LOSSES:
        close = difflib.get_close_matches(name, LOSSES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
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
