"""The losses that can be compared. To add a loss, add an entry to :data:`LOSSES`.

Nothing else in the comparison depends on the loss. An entry gives the criterion, the range in which
to tune its one hyperparameter, the scale of its gradient, and, through the criterion, the link from
logits to class probabilities. A criterion may have two methods for state that changes during
training: ``after_step()``, called after every optimiser step, and ``after_epoch()``, called after
the last batch of every epoch.
"""

import contextlib
import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from penex.compare.errors import CompareError
from penex.compare.user_objects import OBJECT_NAME, registered, require_object

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Knob:
    """The hyperparameter of a loss: its name, its default and the range in which to tune it."""

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
    """What a loss may need to know about the run it is built for."""

    num_classes: int
    steps_total: int
    """Number of optimiser steps of the whole run."""
    steps_per_epoch: int


@dataclass(frozen=True)
class Loss:
    """An entry of the registry, or a loss of your own.

    Attributes:
        name: The name in configurations.
        label: The name in tables and figures.
        build: Builds the criterion for a value of the knob.
        knob: The hyperparameter to tune, if any.
        gradient_scale: A function of the criterion and the number of classes K that returns the
            gradient at f = 0 as a multiple of that of cross-entropy, which is 1/K − 1[j = y] there.
            The mean over classes is subtracted first, as it changes no probability. The loss is
            divided by this scale, so that learning rate, weight decay and clipping threshold mean
            the same for every loss. None: the scale is measured.
        constrain: A function applied to the network's logits, classes last, before anything uses
            them: the criterion, the metrics, an attack. None: no function.
        log_proba: The link, from logits (N, K) to log-probabilities. None: that of the criterion,
            see :func:`penex.inference.link`.
    """

    name: str
    label: str
    build: Callable[[float, Context], "nn.Module"]
    knob: Knob | None = None
    gradient_scale: Callable[["nn.Module", int], float] | None = None
    constrain: Callable[["Tensor"], "Tensor"] | None = None
    log_proba: Callable[["Tensor"], "Tensor"] | None = None

    def link(self, knob: float, num_classes: int) -> Callable[["Tensor"], "Tensor"]:
        """The function from logits (N, K) trained with this loss to log-probabilities."""
        if self.log_proba is not None:
            return self.log_proba
        from penex.inference import link

        return link(self.build(knob, Context(num_classes, steps_total=1, steps_per_epoch=1)))

    def scale(self, criterion: "nn.Module", num_classes: int) -> float:
        """The gradient scale of a criterion; see :attr:`gradient_scale`."""
        if self.gradient_scale is not None:
            return self.gradient_scale(criterion, num_classes)
        from penex.compare.user_losses import measured_scale

        return measured_scale(criterion, num_classes)


@dataclass(frozen=True)
class Make:
    """Builds a criterion from its class, which is imported on first use.

    Attributes:
        path: The class, as MODULE:CLASS.
        keyword: The keyword argument for the knob.
        fixed: Other keyword arguments.
    """

    path: str
    keyword: str | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, knob: float, context: Context, **options: Any) -> "nn.Module":
        """Build the criterion; `options` override all other arguments."""
        module, _, name = self.path.partition(":")
        values = dict(self.fixed)
        if self.keyword is not None:
            values[self.keyword] = knob
        criterion: nn.Module = getattr(import_module(module), name)(**values | options)
        return criterion


def _exponential(knob: float, context: Context) -> "nn.Module":
    from penex.paper.ablations import ExponentialLoss

    return ExponentialLoss(knob)


def _one(criterion: Any, num_classes: int) -> float:
    return 1.0


def _sensitivity(criterion: Any, num_classes: int) -> float:
    return float(criterion.sensitivity)


def _unsmoothed(criterion: Any, num_classes: int) -> float:
    return 1 - float(criterion.label_smoothing)


def _focal_scale(criterion: Any, num_classes: int) -> float:
    gamma, p = float(criterion.gamma), 1 / num_classes
    return float((1 - p) ** gamma - gamma * p * (1 - p) ** (gamma - 1) * math.log(p))


def _generalized_scale(criterion: Any, num_classes: int) -> float:
    return math.pow(num_classes, -criterion.q)


def _conex_sensitivity(knob: float, context: Context) -> float:
    return 1 / (context.num_classes - 1)


def _conex_hard(knob: float, context: Context) -> "nn.Module":
    from penex.paper.ablations import ExponentialLoss

    return ExponentialLoss(_conex_sensitivity(knob, context))


def _sum_to_zero(logits: "Tensor") -> "Tensor":
    from penex.paper.ablations import sum_to_zero

    return sum_to_zero(logits)


def _conex_squared(knob: float, context: Context) -> "nn.Module":
    from penex.paper.ablations import SquaredPenaltyLoss

    return SquaredPenaltyLoss(_conex_sensitivity(knob, context), knob)


def _conex_lagrangian(knob: float, context: Context) -> "nn.Module":
    from penex.paper.ablations import AugmentedLagrangianLoss

    return AugmentedLagrangianLoss(_conex_sensitivity(knob, context), knob)


def _logsumexp(knob: float, context: Context) -> "nn.Module":
    from penex.paper.ablations import LogSumExpPenaltyLoss

    return LogSumExpPenaltyLoss(knob)


def _linear(knob: float, context: Context) -> "nn.Module":
    from penex.paper.ablations import LinearPenaltyLoss

    return LinearPenaltyLoss(knob)


def _linear_schedule(knob: float, context: Context) -> "nn.Module":
    from penex.paper.ablations import ScheduledPENEX

    return ScheduledPENEX(knob, steps=context.steps_total, shape="linear")


def _cosine_schedule(knob: float, context: Context) -> "nn.Module":
    from penex.paper.ablations import ScheduledPENEX

    return ScheduledPENEX(knob, steps=context.steps_total, shape="cosine")


REFERENCE = "cross-entropy"
"""The loss with which every other loss is compared."""
_SENSITIVITY = Knob("sensitivity", "α", default=0.1, low=0.003, high=1.0, log=True)
# The range of the paper's study. Its optima, above 700, are for quartic penalties; a quadratic
# penalty of that strength leaves little room to learn.
_CONSTRAINT = Knob("strength", "ρ", default=1.0, low=0.0, high=1000.0)

LOSSES = {
    loss.name: loss
    for loss in (
        Loss(REFERENCE, "Cross-entropy", Make("torch.nn:CrossEntropyLoss"), gradient_scale=_one),
        Loss(
            "label-smoothing",
            "Label smoothing",
            Make("torch.nn:CrossEntropyLoss", "label_smoothing"),
            Knob("smoothing", "ε", default=0.1, low=0.0, high=0.5, most=0.99),
            gradient_scale=_unsmoothed,
        ),
        Loss(
            "confidence-penalty",
            "Confidence penalty",
            Make("penex.losses:ConfidencePenaltyLoss", "strength"),
            Knob("strength", "β", default=0.1, low=0.0, high=2.0),
            gradient_scale=_one,
        ),
        Loss(
            "focal",
            "Focal",
            Make("penex.losses:FocalLoss", "gamma"),
            Knob("gamma", "γ", default=2.0, low=0.0, high=5.0),
            gradient_scale=_focal_scale,
        ),
        Loss(
            "penex",
            "PENEX",
            Make("penex.losses:PENEX", "sensitivity"),
            _SENSITIVITY,
            gradient_scale=_sensitivity,
        ),
        # The log-domain family at sensitivity 0, where its one knob is the power.
        Loss(
            "log-penex",
            "log-PENEX",
            Make("penex.losses:LogPENEX", "power", {"sensitivity": 0.0}),
            Knob("power", "β", default=1.0, low=0.25, high=64.0, log=True),
            gradient_scale=_one,
        ),
        Loss(
            "z-loss",
            "z-loss",
            Make("penex.losses:ZLoss", "strength"),
            Knob("strength", "λ", default=0.01, low=1e-4, high=1.0, log=True),
            gradient_scale=_one,
        ),
        # The paper's ablations; `penex.paper.ablations` derives their links.
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
        Loss(
            "generalized-cross-entropy",
            "Generalised cross-entropy",
            Make("penex.losses:GeneralizedCrossEntropyLoss", "q"),
            Knob("q", "q", default=0.3, low=0.05, high=0.9, most=1.0, log=True),
            gradient_scale=_generalized_scale,
        ),
        Loss(
            "max-suppression",
            "Max suppression",
            Make("penex.compare.rival_losses:MaxSupLoss", "strength"),
            Knob("strength", "β", default=0.1, low=0.0, high=0.5),
            gradient_scale=_one,
        ),
        Loss(
            "margin-label-smoothing",
            "Margin-based label smoothing",
            Make("penex.compare.rival_losses:MarginLabelSmoothingLoss", "margin"),
            Knob("margin", "m", default=10.0, low=2.0, high=20.0, log=True),
            gradient_scale=_one,
        ),
        Loss(
            "one-vs-rest",
            "One-vs-rest sigmoid",
            Make("penex.compare.rival_losses:OneVsRestLoss"),
            gradient_scale=_one,
        ),
    )
}

DEFAULT_LOSSES = (REFERENCE, "label-smoothing", "confidence-penalty", "focal", "penex")
"""The losses that are compared by default."""


@dataclass(frozen=True)
class Candidate:
    """A loss as specified by the user, with the values that are held fixed.

    Attributes:
        spec: ``penex``; ``penex=0.3``, with the knob fixed at 0.3; or with options of the
            criterion, ``penex(sensitivity=0.3,penalty_mode=auto)``.
        loss: The entry of the registry, with these options applied.
        value: The value at which the knob is fixed; None: it is tuned, or has its default.
        options: The options other than the knob, as written in `spec`.
    """

    spec: str
    loss: Loss
    value: float | None
    options: str = ""

    @property
    def label(self) -> str:
        """The name in tables and figures."""
        label = f"{self.loss.label} ({self.options})" if self.options else self.loss.label
        if self.value is None or self.loss.knob is None:
            return label
        return f"{label} {self.loss.knob.symbol}={exact(self.value)}"

    @property
    def untuned(self) -> float:
        """The knob's value if the user has fixed it, else its default; NaN without a knob."""
        if self.loss.knob is None:
            return math.nan
        return self.loss.knob.default if self.value is None else self.value


def exact(value: float) -> str:
    """Format a number with six digits if they are exact, else with as many as it needs."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


_SPEC = re.compile(r"\s*([\w.:-]+)\s*(?:=\s*([^()\s]*)|\(([^()/\\\x00-\x1f]*)\))?\s*")


def parse_loss(spec: str) -> Candidate:
    """Parse ``name``, ``name=value``, or ``name(option=value, ...)``.

    An option is a keyword argument of the criterion; its value is a number, true, false, none or a
    word. One value may be a range, as in ``penex(ema=0.01..0.5)``; that option is then tuned in
    place of the knob.

    Raises:
        CompareError: There is no such loss or option, or the loss refuses a value.
    """
    found = _SPEC.fullmatch(spec)
    if found is None:
        raise CompareError(
            f"losses: expected NAME, NAME=NUMBER or NAME(OPTION=VALUE, ...), got {spec!r}"
        )
    name, value, options = found.groups()
    loss = _entry(name)
    if options is not None:
        return _with_options(loss, options)
    if value is None:
        return Candidate(name, loss, None)
    if loss.knob is None:
        raise CompareError(f"losses: {name} has no hyperparameter to set, got {spec!r}")
    return Candidate(spec.strip(), loss, _fixed_value(loss, value, spec))


def _entry(name: str) -> Loss:
    if name in LOSSES:
        return LOSSES[name]
    own = registered(name)
    if own is not None:
        from penex.compare.user_losses import user_loss

        return user_loss(name, own)
    if OBJECT_NAME.fullmatch(name):
        require_object(name, "losses")
    close = difflib.get_close_matches(name, LOSSES, n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    raise CompareError(f"losses: no loss is called {name!r}{hint} Known: {', '.join(LOSSES)}.")


def _fixed_value(loss: Loss, text: str, spec: str) -> float:
    """Parse the value of the knob."""
    knob = loss.knob
    assert knob is not None  # noqa: S101  # checked by the caller
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    possible = math.isfinite(value) and 0 <= value <= knob.most
    if not possible or (knob.log and value == 0):
        raise CompareError(
            f"losses: expected {loss.name}=NUMBER ({knob.name}, usually between {knob.low:g} and "
            f"{knob.high:g}), got {spec!r}"
        )
    return value


def _with_options(loss: Loss, text: str) -> Candidate:
    """Parse the options of a loss's criterion."""
    if not isinstance(loss.build, Make):
        raise CompareError(f"losses: {loss.name} has no options, got {text!r}")
    pairs = [[part.strip() for part in each.split("=")] for each in text.split(",") if each.strip()]
    if not pairs or any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise CompareError(f"losses: expected {loss.name}(OPTION=VALUE, ...), got {text!r}")
    spec = f"{loss.name}({','.join('='.join(pair) for pair in pairs)})"
    if len({option for option, _ in pairs}) < len(pairs):
        raise CompareError(f"losses: an option is repeated in {spec}")
    ranges = [pair for pair in pairs if ".." in pair[1]]
    if len(ranges) > 1:
        raise CompareError(f"losses: {spec}: one option can be tuned, not {len(ranges)}")
    knob, keyword, value = loss.knob, loss.build.keyword, None
    own = (keyword, knob.name) if knob is not None else ()
    held: dict[str, Any] = {}
    for option, written in pairs:
        if ".." in written:
            continue
        if option in own:
            value = _fixed_value(loss, written, spec)
        else:
            held[option] = _value(written)
    for option, written in ranges:
        if option in own:
            knob = _range(option, written, spec, knob)
        else:
            if knob is not None and keyword is not None:  # only one can be tuned
                held[keyword] = knob.default if value is None else value
            knob, keyword, value = _range(option, written, spec, None), option, None
    shown = [f"{o}={w}" for o, w in pairs if o not in own or o in held or keyword not in own]
    shown = [each for each in shown if ".." not in each]
    made = replace(
        loss,
        knob=knob,
        build=replace(loss.build, keyword=keyword, fixed={**loss.build.fixed, **held}),
    )
    chosen = Candidate(spec, made, value, ", ".join(shown))
    try:
        made.build(chosen.untuned, Context(num_classes=3, steps_total=1, steps_per_epoch=1))
    except (TypeError, ValueError) as error:
        raise CompareError(f"losses: {spec}: {error}") from None
    return chosen


def _value(text: str) -> float | int | bool | str | None:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for number in (int, float):
        with contextlib.suppress(ValueError):
            value: float = number(text)
            return value
    return text


def _range(option: str, text: str, spec: str, knob: Knob | None) -> Knob:
    """The knob for an option that is tuned in a range, LOW..HIGH."""
    try:
        low, high = map(float, text.split(".."))
    except ValueError:
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise CompareError(f"losses: {spec}: expected {option}=LOW..HIGH, got {text!r}")
    log = low > 0 and high / low >= 10
    middle = math.sqrt(low * high) if log else (low + high) / 2
    if knob is None:
        return Knob(option, option, middle, low, high, log=log)
    default = knob.default if low <= knob.default <= high else middle
    return replace(knob, default=default, low=low, high=high, log=log)
