"""User-defined losses: their conversion to entries like those of the registry, and checks."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from penex.compare.errors import CompareError
from penex.compare.registry import Context, Loss, Make
from penex.inference import link

CLASSES = 3
"""Number of classes of the batch on which a loss is checked."""
SHARES = (0.5, 0.3, 0.15, 0.05)
"""The class probabilities that :func:`fisher_error` uses."""
STEPS = 200
_scales: "WeakKeyDictionary[nn.Module, float]" = WeakKeyDictionary()


def user_loss(name: str, thing: Any) -> Loss:
    """The entry for a user-defined loss.

    Args:
        name: Its name in configurations.
        thing: A :class:`~penex.compare.registry.Loss`; the class of a criterion, or a function that
            returns a criterion, whose keyword arguments are the options; a function of logits
            (N, K) and labels (N,) that returns the mean loss; or a criterion.

    Raises:
        CompareError: `thing` is none of these.
    """
    if isinstance(thing, Loss):
        return replace(thing, name=name)
    label = name.partition(":")[2]
    if isinstance(thing, nn.Module):
        build: Any = _Copier(thing)
    elif callable(thing):
        build = _FromFactory(
            path=name, factory=_Function(thing) if _takes_a_batch(thing) else thing
        )
    else:
        raise CompareError(
            f"losses: {name}: expected a criterion, its class, a function, or an entry "
            f"penex.compare.registry.Loss, got {type(thing).__name__}"
        )
    loss = Loss(name, label, build)
    return loss if _has_link(loss) else replace(loss, log_proba=_log_softmax)


@dataclass(frozen=True)
class _FromFactory(Make):
    """Builds a criterion with the user's class or function."""

    factory: Callable[..., Any] | None = None

    def __call__(self, knob: float, context: Context, **options: Any) -> nn.Module:
        assert self.factory is not None  # noqa: S101  # always given here
        values = dict(self.fixed)
        if self.keyword is not None:
            values[self.keyword] = knob
        criterion = self.factory(**values | options)
        if not isinstance(criterion, nn.Module):
            raise CompareError(
                f"losses: {self.path} returned {type(criterion).__name__}, expected an nn.Module"
            )
        return criterion


@dataclass(frozen=True)
class _Copier:
    """Builds copies of a criterion, as each run changes the state of its copy."""

    criterion: nn.Module

    def __call__(self, knob: float, context: Context) -> nn.Module:
        return copy.deepcopy(self.criterion)


class _Criterion(nn.Module):
    """Wraps a function of logits and labels as a criterion."""

    def __init__(self, function: Callable[..., Tensor], options: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.options = function, options

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return self.function(input, target, **self.options)


@dataclass(frozen=True)
class _Function:
    function: Callable[..., Tensor]

    def __call__(self, **options: Any) -> nn.Module:
        inspect.signature(self.function).bind(None, None, **options)
        return _Criterion(self.function, options)


def _takes_a_batch(thing: Callable[..., Any]) -> bool:
    """Whether `thing` has two parameters without defaults, as a function of logits and labels."""
    if inspect.isclass(thing):
        return False
    needed = [
        each
        for each in inspect.signature(thing).parameters.values()
        if each.default is each.empty
        and each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
    ]
    return len(needed) == 2


def _has_link(loss: Loss) -> bool:
    try:
        criterion = loss.build(float("nan"), Context(CLASSES, steps_total=1, steps_per_epoch=1))
        link(criterion)
    except (TypeError, ValueError):
        return False
    return True


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.log_softmax(1)


def check(loss: Loss) -> None:
    """Check before training that a loss can be trained with.

    Raises:
        CompareError: Its criterion does not return a finite number for each batch, with a finite
            gradient that depends on the label; or its link does not return log-probabilities.
    """

    def refuse(expected: str, got: object) -> CompareError:
        return CompareError(f"losses: {loss.name}: expected {expected}, got {got}")

    knob = float("nan") if loss.knob is None else loss.knob.default
    context = Context(CLASSES, steps_total=10, steps_per_epoch=5)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4 * CLASSES, CLASSES, generator=generator).requires_grad_()
    target = torch.arange(len(logits)) % CLASSES
    try:
        criterion = loss.build(knob, context)
        value = cast("Any", criterion(logits, target))
    except Exception as error:  # the user's code may raise anything
        raise CompareError(
            f"losses: {loss.name} failed on logits of shape {tuple(logits.shape)} and labels of "
            f"shape {tuple(target.shape)}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(value, Tensor) or value.ndim != 0:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise refuse("the mean loss of a batch, a tensor of no dimension", got)
    if not value.isfinite():
        raise refuse("a finite loss", value.item())
    if not value.requires_grad:
        raise refuse("a loss that depends on the logits", "one without a gradient")
    (gradient,) = torch.autograd.grad(value, logits)
    if not gradient.isfinite().all():
        raise refuse("a finite gradient", "NaN or infinity")
    log_proba = cast("Any", loss.link(knob, CLASSES)(logits.detach()))
    if not isinstance(log_proba, Tensor) or log_proba.shape != logits.shape:
        got = getattr(log_proba, "shape", type(log_proba).__name__)
        raise refuse(f"a link that keeps the shape {tuple(logits.shape)}", got)
    total = log_proba.exp().sum(1)
    if not torch.allclose(total, torch.ones_like(total), atol=1e-4):
        raise refuse(
            "a link to log-probabilities", f"probabilities that sum to {total[0].item():g}"
        )
    loss.scale(criterion, CLASSES)


def measured_scale(criterion: nn.Module, num_classes: int) -> float:
    """The gradient of a criterion at logits 0, as a multiple of that of cross-entropy.

    It is measured once for each criterion, on a batch with a row of each class, by projection onto
    the gradient of cross-entropy.

    Raises:
        CompareError: The multiple is not positive, so the loss cannot be trained with.
    """
    if criterion not in _scales:
        device = next((p.device for p in (*criterion.parameters(), *criterion.buffers())), None)
        # On a copy: a criterion may count the batches that it has seen.
        probe = copy.deepcopy(criterion)
        logits = torch.zeros(num_classes, num_classes, device=device, requires_grad=True)
        target = torch.arange(num_classes, device=device)
        with torch.enable_grad():
            value = probe(logits, target)
            reference = nn.functional.cross_entropy(logits, target)
            (gradient,) = torch.autograd.grad(value, logits)
            (unit,) = torch.autograd.grad(reference, logits)
        gradient = gradient - gradient.mean(1, keepdim=True)
        scale = float((gradient * unit).sum() / unit.square().sum())
        if not 0 < scale < float("inf"):
            raise CompareError(
                f"losses: the gradient of {type(criterion).__name__} at logits 0 is {scale:g} "
                "times that of cross-entropy; expected a positive multiple, so that training makes "
                "the label more probable"
            )
        _scales[criterion] = scale
    return _scales[criterion]


def fisher_error(loss: Any, knob: float | None = None) -> float:
    """Largest error of the link's probabilities at the minimum of the expected loss.

    It is near 0 for a loss whose link is correct. The expected loss of one input with class
    probabilities :data:`SHARES` is minimised over its logits in float64.

    Args:
        loss: An object that :func:`penex.compare_losses` takes as a loss, but not a name; or an
            entry of the registry.
        knob: The value of its hyperparameter; None: the default.

    Returns:
        The largest absolute difference between a probability of the link and the true one.
    """
    entry = loss if isinstance(loss, Loss) else user_loss("loss:loss", loss)
    value = float("nan") if entry.knob is None else entry.knob.default
    value = value if knob is None else knob
    shares = torch.tensor(SHARES, dtype=torch.float64)
    target = torch.arange(len(SHARES)).repeat_interleave((20 * shares).round().long())
    criterion = entry.build(value, Context(len(SHARES), STEPS, STEPS))
    logits = torch.zeros(len(SHARES), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        value: Tensor = criterion(logits.expand(len(target), -1), target)
        value.backward()  # type: ignore[no-untyped-call]
        return float(value.detach())

    for _ in range(5):  # lets a criterion with a running state converge
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    proba = entry.link(value, len(SHARES))(logits.detach()[None]).exp()[0]
    return float((proba - shares).abs().max())
