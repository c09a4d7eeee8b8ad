"""Micro-batches that add up to the whole batch, and training that can be repeated."""

import re
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor, nn

import penex
from penex import PENEX, penex_loss

WEIGHT = torch.tensor([0.3, 1.0, 2.0, 0.7, 1.3])
SPLIT = (1, 6, 3, 13)
"""Rows of the micro-batches; the first is ignored altogether."""
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weighted": {"weight": WEIGHT},
    "all": {"weight": WEIGHT, "label_smoothing": 0.2, "huberization": 0.9},
}


def make_model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5))


def make_batch(kind: str) -> tuple[Tensor, Tensor]:
    x = torch.randn(sum(SPLIT), 6)
    if kind == "soft":
        return x, torch.rand(len(x), 5).softmax(1)
    target = torch.randint(5, (len(x),))
    target[0] = target[4] = -100
    return x, target


def denominator_of(target: Tensor, weight: Tensor | None) -> Tensor:
    if target.is_floating_point():
        return torch.tensor(float(len(target)))
    kept = target[target != -100]
    return torch.tensor(float(len(kept))) if weight is None else weight[kept].sum()


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def close(got: Tensor, expected: Tensor) -> None:
    atol = 1e-6 * expected.abs().max().item()
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=atol)


# 1. Accumulation.


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["indices", "soft"])
@pytest.mark.parametrize("mode", ["fixed", "frozen"])
def test_sums_over_one_denominator_are_the_mean_of_the_whole_batch(
    mode: str, kind: str, options: str
) -> None:
    x, target = make_batch(kind)
    keywords = OPTIONS[options]
    whole, parts = make_model(), make_model()
    if mode == "fixed":
        criterion = PENEX(penalty=0.07, reduction="sum", **keywords)
    else:
        criterion = PENEX(reduction="sum", **keywords)
        criterion(whole(x[5:]), target[5:])  # the batch before
        criterion.eval()
    rho = criterion.penalty.clone()
    expected = penex_loss(whole(x), target, penalty=rho, **keywords)
    expected.backward()

    total = torch.zeros(())
    denominator = denominator_of(target, keywords.get("weight"))
    for some_x, some_target in zip(x.split(SPLIT), target.split(SPLIT), strict=True):
        loss = criterion(parts(some_x), some_target) / denominator
        loss.backward()
        total += loss.detach()
    close(total, expected.detach())
    close(gradients(parts), gradients(whole))
    assert torch.equal(criterion.penalty, rho)


def test_means_of_micro_batches_are_not_the_mean_of_the_batch() -> None:
    """What the documentation warns of is true."""
    x, target = make_batch("indices")
    whole, parts = make_model(), make_model()
    criterion = PENEX(penalty=0.07)
    criterion(whole(x), target).backward()
    for some_x, some_target in zip(x.split(SPLIT), target.split(SPLIT), strict=True):
        (criterion(parts(some_x), some_target) / len(SPLIT)).backward()
    assert not torch.allclose(gradients(parts), gradients(whole), rtol=1e-2)


def test_the_documented_recipe_is_training_on_whole_batches() -> None:
    """The code of docs/loss.md, run, against a loop over whole batches with the penalty before."""
    page = (Path(__file__).parents[1] / "docs" / "loss.md").read_text()
    section = page.split("## Gradient accumulation")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    torch.manual_seed(5)
    names: dict[str, Any] = {}
    exec(code, names)

    torch.manual_seed(5)
    model = nn.Linear(20, 5)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    penalty = 0.02
    for x, y in names["batches"]:
        optimiser.zero_grad()
        logits = model(x)
        penex_loss(logits, y, penalty=penalty).backward()
        optimiser.step()
        penalty += 0.1 * (oracles.estimate_penalty(logits, y) - penalty)
    assert names["criterion"].penalty.item() == pytest.approx(penalty, rel=1e-5)
    for got, expected in zip(names["model"].parameters(), model.parameters(), strict=True):
        close(got.detach(), expected.detach())


def test_running_over_micro_batches_moves_with_each() -> None:
    x, target = make_batch("indices")
    logits = make_model()(x).detach()
    criterion, penalties = PENEX(ema=0.3), set()
    expected = None
    for some, some_target in zip(logits.split(SPLIT), target.split(SPLIT), strict=True):
        criterion(some, some_target)
        penalties.add(criterion.penalty.item())
        if (some_target != -100).any():
            estimate = penex.functional.estimate_penalty(some, some_target)
            expected = estimate if expected is None else expected + 0.3 * (estimate - expected)
            torch.testing.assert_close(criterion.penalty, expected)
    assert len(penalties) == len(SPLIT)


# 2. Determinism.


def trained(kind: str, **options: Any) -> Tensor:
    """Every number that four steps leave behind, losses and penalties included."""
    torch.manual_seed(7)
    model, criterion = nn.Linear(40, 130), PENEX(**options)
    optimiser = torch.optim.SGD(model.parameters(), lr=5.0)
    record = []
    for _ in range(4):
        x, target = torch.randn(257, 40), torch.randint(130, (257,))
        if kind == "soft":
            target = torch.rand(257, 130).softmax(1)
        optimiser.zero_grad()
        loss = criterion(model(x), target)
        loss.backward()
        optimiser.step()
        record += [loss.detach().reshape(1), criterion.penalty.clone().reshape(1)]
    return torch.cat([*record, *(p.detach().flatten() for p in model.parameters())])


@pytest.mark.parametrize("mode", [{}, {"penalty_mode": "auto"}, {"penalty": 0.01}], ids=str)
@pytest.mark.parametrize("kind", ["indices", "soft", "smoothed", "weighted", "huberized"])
def test_training_twice_is_bitwise_the_same(kind: str, mode: dict[str, Any]) -> None:
    more: dict[str, dict[str, Any]] = {
        "smoothed": {"label_smoothing": 0.1},
        "weighted": {"weight": torch.linspace(0.5, 2, 130)},
        "huberized": {"huberization": 1.1},
    }
    first, second = (trained(kind, **mode, **more.get(kind, {})) for _ in range(2))
    assert first.isfinite().all()
    assert torch.equal(first, second)


@pytest.fixture
def _deterministic() -> Any:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("shape", [(33, 5), (4, 5, 3, 7)], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("_deterministic")
def test_deterministic_algorithms(
    shape: tuple[int, ...], smoothing: float, reduction: str, dtype: torch.dtype
) -> None:
    """They refuse nothing, and memory that they fill with NaN is never read."""
    target = torch.randint(5, (shape[0], *shape[2:]))
    target.view(-1)[::4] = -100
    options: dict[str, Any] = {"label_smoothing": smoothing, "weight": WEIGHT}
    values = torch.randn(shape).to(dtype)
    for soft in (False, True):
        dense = torch.rand(shape).softmax(1)
        logits = values.clone().requires_grad_()
        labels = dense if soft else target
        loss = PENEX(reduction=reduction, **options)(logits, labels)
        loss.sum().backward()
        exact = oracles.penex(logits, labels, reduction=reduction, **options)
        rtol, atol = (1e-5, 1e-7) if dtype == torch.float32 else (1e-2, 1e-4)
        torch.testing.assert_close(loss.detach().double(), exact.value, rtol=rtol, atol=atol)
        torch.testing.assert_close(logits.grad.double(), exact.gradient, rtol=rtol, atol=atol)
