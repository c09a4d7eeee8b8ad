"""Every entry of the registry: its criterion, the range of its knob and its gradient scale."""

import math
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor, nn

from penex.compare.errors import CompareError
from penex.compare.registry import (
    DEFAULT_LOSSES,
    LOSSES,
    REFERENCE,
    Candidate,
    Context,
    Loss,
    parse_loss,
)
from penex.paper import ablations

LOGITS = 3 * torch.randn(13, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TARGET = torch.randint(7, (13,), generator=torch.Generator().manual_seed(2))
TRUE = LOGITS.gather(1, TARGET[:, None])
KNOBS = [name for name, loss in LOSSES.items() if loss.knob]
CONTEXT = Context(num_classes=7, steps_total=50, steps_per_epoch=5)
CONEX = 1 / 6


# Sensitivity and penalty of the ablations at the start of a training, for a value of the knob.
ABLATIONS: dict[str, Callable[[float], tuple[float, float | Tensor]]] = {
    "exponential": lambda knob: (knob, 0.0),
    "conex-hard": lambda knob: (CONEX, 0.0),
    "conex-squared": lambda knob: (CONEX, knob / 2 * LOGITS.sum(1).square().mean()),
    "conex-lagrangian": lambda knob: (CONEX, knob / 2 * LOGITS.sum(1).square().mean()),
    "logsumexp-penalty": lambda knob: (knob, LOGITS.logsumexp(1).mean()),
    "linear-penalty": lambda knob: (knob, knob * LOGITS.mean()),
    **dict.fromkeys(
        ("penex-linear-schedule", "penex-cosine-schedule"),
        lambda knob: (
            ablations.START_SENSITIVITY,
            ablations.START_SENSITIVITY * torch.exp(-ablations.START_SENSITIVITY * TRUE).mean(),
        ),
    ),
}


def _plain() -> Tensor:
    return LOGITS.exp().sum(1).log() - TRUE[:, 0]


# Of each row, for a value of the knob.
RIVALS: dict[str, Callable[[float], Tensor]] = {
    "generalized-cross-entropy": lambda q: (1 - (-q * _plain()).exp()) / q,
    "max-suppression": lambda strength: (
        _plain() + strength * (LOGITS.sort(1).values[:, -1] - LOGITS.sum(1) / 7)
    ),
    "margin-label-smoothing": lambda margin: (
        _plain()
        + 0.1 * sum((LOGITS.sort(1).values[:, -1] - f - margin).clamp(min=0) for f in LOGITS.T)
    ),
    "one-vs-rest": lambda _: (
        torch.stack(
            [
                -(f.sigmoid().log() if k == label else (-f).sigmoid().log())
                for row, label in zip(LOGITS, TARGET.tolist(), strict=True)
                for k, f in enumerate(row)
            ]
        )
        .view(13, 7)
        .sum(1)
    ),
}


def definition(name: str, knob: float) -> Tensor:
    """The mean loss: from formulas in 40-digit arithmetic, or by functions tested elsewhere."""
    if name == "log-penex":
        return oracles.log_penex(LOGITS, TARGET, sensitivity=0.0, power=knob).value
    if name == "z-loss":
        plain = oracles.focal(LOGITS, TARGET, gamma=0.0)
        return plain + knob * LOGITS.exp().sum(1).log().square().mean()
    if name == "penex":
        return oracles.penex(LOGITS, TARGET, sensitivity=knob).value
    if name == "focal":
        return oracles.focal(LOGITS, TARGET, gamma=knob)
    if name == "confidence-penalty":
        return oracles.confidence_penalty(LOGITS, TARGET, strength=knob)
    if name in RIVALS:
        return RIVALS[name](knob).mean()
    if name in ABLATIONS:
        sensitivity, penalty = ABLATIONS[name](knob)
        alone = ablations.exponential_loss(LOGITS, TARGET, sensitivity=sensitivity)
        return alone + penalty
    smoothing = knob if name == "label-smoothing" else 0.0
    return oracles.focal(LOGITS, TARGET, gamma=0.0, label_smoothing=smoothing)


def values(loss: Loss) -> list[float]:
    """Of the knob: both ends of the range, the default, and one in between."""
    if loss.knob is None:
        return [math.nan]
    return [loss.knob.low, loss.knob.default, loss.knob.low + 0.3 * loss.knob.high, loss.knob.high]


@pytest.mark.parametrize("name", LOSSES)
def test_the_criterion_is_the_loss(name: str) -> None:
    loss = LOSSES[name]
    assert loss.name == name
    assert (name in DEFAULT_LOSSES) == (name not in (*ABLATIONS, *RIVALS, "log-penex", "z-loss"))
    for knob in values(loss):
        criterion = loss.build(knob, CONTEXT)
        assert isinstance(criterion, nn.Module)
        torch.testing.assert_close(criterion(LOGITS, TARGET), definition(name, knob))


@pytest.mark.parametrize("name", KNOBS)
def test_the_range_contains_the_default_and_its_values_are_accepted(name: str) -> None:
    loss = LOSSES[name]
    assert loss.knob is not None
    assert loss.knob.low < loss.knob.default < loss.knob.high <= loss.knob.most
    assert not loss.knob.log or loss.knob.low > 0
    for value in values(loss):
        candidate = parse_loss(f"{name}={value!r}")
        assert candidate == Candidate(f"{name}={value!r}", loss, value)
        assert candidate.untuned == value
    assert parse_loss(name).untuned == loss.knob.default


def test_label_smoothing_ends_below_one() -> None:
    """At 1, no logits would stand for any class probabilities."""
    loss = parse_loss("label-smoothing=0.99").loss
    assert loss.knob is not None
    assert loss.build(loss.knob.most, CONTEXT)(LOGITS, TARGET).isfinite()
    assert loss.link(loss.knob.most, 7)(LOGITS).isfinite().all()
    with pytest.raises(CompareError, match="got 'label-smoothing=1'"):
        parse_loss("label-smoothing=1")


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("name", LOSSES)
def test_divided_by_its_scale_the_gradient_at_zero_is_that_of_cross_entropy(
    name: str, classes: int
) -> None:
    """But for its mean over classes. With a schedule, at every step."""
    loss, target = LOSSES[name], torch.arange(classes)
    expected = 1 / classes - torch.eye(classes, dtype=torch.float64)
    for knob in values(loss):
        criterion: Any = loss.build(knob, Context(classes, steps_total=4, steps_per_epoch=2))
        criterion = criterion.double()
        for _ in range(4 if hasattr(criterion, "after_step") else 1):
            # Of what a constraint returns, where the entry has one: zeros from zeros.
            logits = torch.zeros(classes, classes, dtype=torch.float64, requires_grad=True)
            (classes * criterion(logits, target)).backward()
            assert logits.grad is not None
            gradient = logits.grad - logits.grad.mean(1, keepdim=True)
            scale = loss.gradient_scale(criterion, classes)
            torch.testing.assert_close(gradient / scale, expected)
            if hasattr(criterion, "after_step"):
                criterion.after_step()


def test_only_the_hard_constraint_changes_the_logits() -> None:
    assert [name for name, loss in LOSSES.items() if loss.constrain] == ["conex-hard"]
    constrain = LOSSES["conex-hard"].constrain
    assert constrain is not None
    torch.testing.assert_close(constrain(LOGITS).sum(1), torch.zeros(13).double())


def test_a_schedule_ends_at_the_knob_with_the_run() -> None:
    for name in ("penex-linear-schedule", "penex-cosine-schedule"):
        criterion = LOSSES[name].build(0.3, CONTEXT)
        for _ in range(CONTEXT.steps_total - 1):
            assert criterion.sensitivity < 0.3
            criterion.after_step()
        assert criterion.sensitivity == 0.3


@pytest.mark.parametrize(
    ("spec", "label"),
    [
        ("cross-entropy", "Cross-entropy"),
        ("penex", "PENEX"),
        ("penex=0.30", "PENEX α=0.3"),
        ("focal=2", "Focal γ=2"),
        ("label-smoothing=.05", "Label smoothing ε=0.05"),
        ("confidence-penalty=1e-3", "Confidence penalty β=0.001"),
        ("conex-hard", "CONEX, hard"),
        ("conex-squared=773.46", "CONEX, squared penalty ρ=773.46"),
        ("penex-linear-schedule=0.2", "PENEX, linear schedule α=0.2"),
    ],
)
def test_labels(spec: str, label: str) -> None:
    assert parse_loss(spec).label == label


def test_without_a_knob_the_value_is_nan() -> None:
    assert math.isnan(parse_loss(REFERENCE).untuned)
