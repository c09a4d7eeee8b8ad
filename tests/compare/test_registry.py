"""Every entry builds the loss it names, in its range, with the factor of its probabilities."""

import math
from collections.abc import Callable

import oracles
import pytest
import torch
from torch import Tensor, nn

from penex.compare import ablations
from penex.compare.errors import CompareError
from penex.compare.registry import (
    DEFAULT_LOSSES,
    LOSSES,
    REFERENCE,
    Contender,
    Context,
    Loss,
    contender,
)

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
    assert (name in DEFAULT_LOSSES) == (name not in (*ABLATIONS, "log-penex", "z-loss"))
    for knob in values(loss):
        criterion = loss.build(knob, CONTEXT)
        assert isinstance(criterion, nn.Module)
        torch.testing.assert_close(criterion(LOGITS, TARGET), definition(name, knob))


@pytest.mark.parametrize("name", KNOBS)
def test_the_range_holds_the_default_and_can_be_asked_for(name: str) -> None:
    loss = LOSSES[name]
    assert loss.knob is not None
    assert loss.knob.low < loss.knob.default < loss.knob.high <= loss.knob.most
    assert not loss.knob.log or loss.knob.low > 0
    for value in values(loss):
        who = contender(f"{name}={value!r}")
        assert who == Contender(f"{name}={value!r}", loss, value)
        assert who.untuned == value
    assert contender(name).untuned == loss.knob.default


def test_label_smoothing_of_one_is_the_most_that_torch_accepts() -> None:
    loss = contender("label-smoothing=1").loss
    assert loss.knob is not None
    assert loss.build(loss.knob.most, CONTEXT)(LOGITS, TARGET).isfinite()
    with pytest.raises(CompareError, match="got 'label-smoothing=1.5'"):
        contender("label-smoothing=1.5")


@pytest.mark.parametrize("name", [REFERENCE, "penex", "log-penex"])
def test_scaled_logits_give_the_probabilities_the_loss_was_minimised_for(name: str) -> None:
    """At the minimum over a known distribution, softmax(scale * f) is that distribution."""
    loss = LOSSES[name]
    probabilities = torch.tensor([0.6, 0.25, 0.1, 0.05], dtype=torch.float64)
    target = torch.arange(4).repeat_interleave((probabilities * 20).round().long())
    for knob in values(loss):
        logits = (probabilities.log() / loss.scale(knob, CONTEXT)).requires_grad_()
        loss.build(knob, CONTEXT)(logits.expand(20, 4), target).backward()  # ρ is kept in float32
        torch.testing.assert_close(logits.grad, torch.zeros_like(logits), atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", ABLATIONS)
def test_the_scales_of_the_ablations(name: str) -> None:
    """Those for which test_ablations.py finds the probabilities at the minimisers."""
    loss = LOSSES[name]
    for knob in values(loss):
        if name.startswith("conex"):
            expected = CONEX
        else:
            expected = knob if name in ("exponential", "linear-penalty") else 1 + knob
        assert loss.scale(knob, CONTEXT) == expected


def test_only_the_hard_constraint_touches_the_logits() -> None:
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
    assert contender(spec).label == label


def test_no_knob_has_no_value() -> None:
    assert math.isnan(contender(REFERENCE).untuned)
