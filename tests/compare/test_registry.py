"""Every entry builds the loss it names, in its range, with the factor of its probabilities."""

import math

import oracles
import pytest
import torch
from torch import Tensor, nn

from penex.compare.errors import CompareError
from penex.compare.registry import LOSSES, REFERENCE, Contender, Loss, contender

LOGITS = 3 * torch.randn(13, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TARGET = torch.randint(7, (13,), generator=torch.Generator().manual_seed(2))
KNOBS = [name for name, loss in LOSSES.items() if loss.knob]


def definition(name: str, knob: float) -> Tensor:
    """The mean loss, from formulas in 40-digit arithmetic."""
    if name == "penex":
        return oracles.penex(LOGITS, TARGET, sensitivity=knob).value
    if name == "focal":
        return oracles.focal(LOGITS, TARGET, gamma=knob)
    if name == "confidence-penalty":
        return oracles.confidence_penalty(LOGITS, TARGET, strength=knob)
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
    for knob in values(loss):
        criterion = loss.build(knob)
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
    assert loss.build(loss.knob.most)(LOGITS, TARGET).isfinite()
    with pytest.raises(CompareError, match="got 'label-smoothing=1.5'"):
        contender("label-smoothing=1.5")


@pytest.mark.parametrize("name", [REFERENCE, "penex"])
def test_scaled_logits_give_the_probabilities_the_loss_was_minimised_for(name: str) -> None:
    """At the minimum over a known distribution, softmax(scale * f) is that distribution."""
    loss = LOSSES[name]
    probabilities = torch.tensor([0.6, 0.25, 0.1, 0.05], dtype=torch.float64)
    target = torch.arange(4).repeat_interleave((probabilities * 20).round().long())
    for knob in values(loss):
        scale = loss.scale(knob)
        logits = (probabilities.log() / scale).requires_grad_()
        loss.build(knob)(logits.expand(20, 4), target).backward()  # ρ is kept in float32
        torch.testing.assert_close(logits.grad, torch.zeros_like(logits), atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("spec", "label"),
    [
        ("cross-entropy", "Cross-entropy"),
        ("penex", "PENEX"),
        ("penex=0.30", "PENEX α=0.3"),
        ("focal=2", "Focal γ=2"),
        ("label-smoothing=.05", "Label smoothing ε=0.05"),
        ("confidence-penalty=1e-3", "Confidence penalty β=0.001"),
    ],
)
def test_labels(spec: str, label: str) -> None:
    assert contender(spec).label == label


def test_no_knob_has_no_value() -> None:
    assert math.isnan(contender(REFERENCE).untuned)
