"""Classes shared out over several real processes give the loss and gradients of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor

import penex
from penex.functional import linear_penex_loss

CLASSES, SIZE = 11, 3  # in two shares of 6 and 5, in four of 3, 3, 3 and 2
OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "given": {"penalty": 0.2, "reduction": "sum"},
    "rows": {"reduction": "none"},
    "weighted": {
        "class_weight": torch.linspace(0.3, 2, CLASSES, dtype=torch.float64),
        "huberization": 0.9,
        "chunk_size": 4,
    },
}
Started = tuple[dict[str, Any], list[dict[str, Any]]]


def make_cases() -> dict[str, Any]:
    functions = {}
    for name, options in OPTIONS.items():
        for kind, offset in (("ordinary", 0.0), ("extreme", 400.0)):
            hidden, weight = torch.randn(9, SIZE).double(), torch.randn(CLASSES, SIZE).double()
            bias = torch.randn(CLASSES).double()
            bias[4] += offset / 2  # so large that the plain sum is not safe, on one rank alone
            target = torch.arange(9) + 1
            target[2] = -100
            functions[f"{name} {kind}"] = {
                "tensors": (hidden, weight, bias),
                "target": target,
                "options": options,
                "input gradient": kind == "extreme" or name != "given",
            }
    steps = [
        [(torch.randn(6, SIZE).double(), torch.randint(CLASSES, (6,))) for _ in range(2)]
        for _ in range(3)
    ]
    steps[1][0][1][:4] = -100  # of the one share most rows are ignored
    steps[2][1][1][:] = -100  # of the other all
    return {"functions": functions, "module": {"sizes": (SIZE, CLASSES), "steps": steps}}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Started:
    """The cases, and what each of four ranks found."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("ranks")
    cases = make_cases()
    torch.save(cases, folder / "cases")
    with run_ranks(Path(__file__).with_name("vocab_worker.py"), 4, folder) as errors:
        pass
    assert not any("Warning" in text for text in errors), errors
    return cases, [torch.load(folder / f"result{rank}", weights_only=True) for rank in range(4)]


def close(got: Tensor, expected: Tensor) -> None:
    atol = 1e-9 * expected.abs().max().item()
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=atol)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", ["ordinary", "extreme"])
@pytest.mark.parametrize("name", OPTIONS)
def test_ranks_are_one_process(started: Started, name: str, kind: str, size: int) -> None:
    cases, ranks = started
    case = cases["functions"][f"{name} {kind}"]
    hidden, weight, bias = (x.clone().requires_grad_() for x in case["tensors"])
    loss = linear_penex_loss(hidden, weight, case["target"], bias, **case["options"])
    loss.sum().backward()
    assert loss.isfinite().all()
    found = [rank[str(size)][f"{name} {kind}"] for rank in ranks]
    for rank in found:
        close(rank["loss"], loss.detach())
        if case["input gradient"]:
            close(rank["input"], hidden.grad)
        else:
            assert rank["input"] is None
    for group in range(0, 4, size):
        for number, expected in enumerate((weight.grad, bias.grad)):
            shares = [rank["own"][number] for rank in found[group : group + size]]
            close(torch.cat(shares), expected)


@pytest.mark.parametrize("name", ["pair", "both"])
def test_training_with_shared_rows_and_classes_is_that_of_one_process(
    started: Started, name: str
) -> None:
    """Same seed, same layer; the ranks' running penalties are the one of all rows."""
    cases, ranks = started
    case = cases["module"]
    torch.manual_seed(1)
    head = penex.LinearPENEX(*case["sizes"], dtype=torch.float64)
    optimiser = torch.optim.SGD(head.parameters(), lr=2.0)
    before = head.weight.detach().clone()
    for number, step in enumerate(case["steps"]):
        hidden, target = (torch.cat(parts) for parts in zip(*step, strict=True))
        hidden.requires_grad_()
        optimiser.zero_grad()
        head(hidden, target).backward()
        optimiser.step()
        if name == "pair":
            for rank in ranks:
                torch.testing.assert_close(rank[name]["input"][number], hidden.grad)
    assert not torch.allclose(head.weight, before, rtol=0.05)
    for first in (0, 2):
        pair = [rank[name]["own"] for rank in ranks[first : first + 2]]
        for shares, expected in zip(zip(*pair, strict=True), (head.weight, head.bias), strict=True):
            torch.testing.assert_close(torch.cat(shares), expected.detach(), rtol=1e-6, atol=1e-6)
    for rank in ranks:
        torch.testing.assert_close(rank[name]["penalty"], head.penalty)


def test_groups_without_shares_are_refused(started: Started) -> None:
    _, ranks = started
    for number, rank in enumerate(ranks):
        first, second, third, fourth, fifth, sixth = rank["refusals"]
        assert first.startswith("num_classes: a vocab_group shares the classes out")
        start = 2 * (number % 2)
        assert f"classes {start} to {start + 1} of 4, this rank's share, got 4 rows" in second
        assert "leave nothing for the last of 2 ranks" in third
        assert fourth == "vocab_group: this process does not belong to it"
        assert fifth.startswith("predict_proba: needs all classes")
        assert sixth.startswith("num_sampled: ")
