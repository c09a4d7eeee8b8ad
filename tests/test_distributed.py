"""Several real processes with a process group are one process with the joined batch."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

import penex

CLASSES = 4
WEIGHT = torch.tensor([0.3, 1.0, 2.0, 0.7], dtype=torch.float64)
ROWS = ((5, 2, 9), (1, 7, 3), (6, 4, 2), (3, 3, 3))
"""For each step the number of rows of each rank."""
OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "rows": {"reduction": "none"},
    "auto": {"penalty_mode": "auto"},
    "fixed": {"penalty": 0.3},
    "weighted": {"weight": WEIGHT, "sensitivity": 0.4},
    "weighted sum": {"weight": WEIGHT, "reduction": "sum"},
    "smoothed": {"label_smoothing": 0.2},
    "everything": {"weight": WEIGHT, "label_smoothing": 0.2, "huberization": 0.9, "ema": 0.5},
    "probabilities": {"weight": WEIGHT, "label_smoothing": 0.1},
}
LOCAL = "without a group"
WORLD = "the world"
Results = tuple[dict[str, Any], list[dict[str, Any]]]


def make_steps(world_size: int, soft: bool = False) -> list[list[tuple[Tensor, Tensor]]]:
    """Ignored rows everywhere; in step 2 the last rank ignores all rows, in step 3 every rank."""
    steps = []
    for number, sizes in enumerate(ROWS):
        step = []
        for rank, rows in enumerate(sizes[:world_size]):
            logits = 2 * torch.randn(rows, CLASSES, dtype=torch.float64) + rank
            if soft:
                target = torch.rand(rows, CLASSES, dtype=torch.float64).softmax(1)
            else:
                target = torch.arange(rows) % CLASSES
                target[1::3] = -100
                if number == 3 or (number, rank) == (2, world_size - 1):
                    target[:] = -100
            step.append((logits, target))
        steps.append(step)
    return steps


def make_cases(size: int) -> dict[str, Any]:
    losses = {
        name: {
            "options": options,
            "group": True,
            "steps": make_steps(size, soft=name == "probabilities"),
        }
        for name, options in OPTIONS.items()
    }
    losses[LOCAL] = {"options": {}, "group": False, "steps": make_steps(size)}
    if size == 3:  # all there are
        options = {"process_group": "world"}
        losses[WORLD] = {"options": options, "group": False, "steps": make_steps(size)}
    wrapped = {
        "options": {"weight": WEIGHT},
        "parameters": nn.Linear(CLASSES, CLASSES).double().state_dict(),
        "steps": make_steps(size),
    }
    return {"losses": losses, "wrapped": wrapped}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, Any], list[Any]]:
    """The cases by the size of the group, and what each rank found; processes start once."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("ranks")
    cases = {size: make_cases(size) for size in (2, 3)}
    torch.save(cases, folder / "cases")
    with run_ranks(Path(__file__).with_name("distributed_worker.py"), 3, folder) as errors:
        pass
    assert not any("Warning" in text for text in errors), errors
    found = [torch.load(folder / f"result{rank}", weights_only=True) for rank in range(3)]
    return cases, found


@pytest.fixture(params=[2, 3], ids=["2 ranks", "3 ranks"])
def results(request: pytest.FixtureRequest, started: tuple[dict[int, Any], list[Any]]) -> Results:
    """The cases for so many ranks, and what each of them found."""
    cases, found = started
    return cases[request.param], [rank[request.param] for rank in found[: request.param]]


def joined(step: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    logits, target = (torch.cat(parts) for parts in zip(*step, strict=True))
    return logits, target


def close(got: Tensor, expected: Tensor) -> None:
    """To 1e-6 of the largest: an entry of a gradient is a difference, and may be next to zero."""
    atol = 1e-6 * expected.abs().max().item()
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("name", OPTIONS)
def test_ranks_are_one_process(results: Results, name: str) -> None:
    """Penalty, loss and gradient of every step.

    Means are averaged over ranks, as DistributedDataParallel does; sums are added.
    """
    cases, ranks = results
    single = penex.PENEX(**OPTIONS[name])
    for number, step in enumerate(cases["losses"][name]["steps"]):
        logits, target = joined(step)
        loss = single(logits.requires_grad_(), target)
        loss.sum().backward()
        found = [rank[name]["steps"][number] for rank in ranks]
        for rank in found:
            close(rank["penalty"], single.penalty)
        share = 1 / len(ranks) if single.reduction == "mean" else 1.0
        close(share * torch.cat([rank["gradient"] for rank in found]), logits.grad)
        losses = [rank["loss"] for rank in found]
        if single.reduction == "none":
            close(torch.cat(losses), loss.detach())
        else:
            close(share * torch.stack(losses).sum(), loss.detach())


def test_ranks_have_one_penalty_bit_for_bit(results: Results) -> None:
    _, ranks = results
    for name in OPTIONS:
        for steps in zip(*(rank[name]["steps"] for rank in ranks), strict=True):
            for other in steps[1:]:
                assert torch.equal(other["penalty"], steps[0]["penalty"])


@pytest.mark.parametrize("name", OPTIONS)
def test_one_small_collective_in_training_and_none_later(results: Results, name: str) -> None:
    _, ranks = results
    for rank in ranks:
        for sizes in rank[name]["collectives"]:
            assert len(sizes) == 1 or (name == "fixed" and not sizes)
            assert max(sizes, default=0) <= 4 * len(ranks)
        assert rank[name]["later collectives"] == []


@pytest.mark.parametrize("name", OPTIONS)
def test_evaluation_is_local_with_the_common_penalty(results: Results, name: str) -> None:
    cases, ranks = results
    for number, rank in enumerate(ranks):
        logits, target = cases["losses"][name]["steps"][0][number]
        evaluated, without_gradient, penalty = rank[name]["evaluated"]
        criterion = penex.PENEX(**OPTIONS[name]).eval()
        criterion.load_state_dict(criterion.state_dict() | {"penalty": penalty})
        close(evaluated, criterion(logits, target))
        close(without_gradient, evaluated)


def test_without_a_group_each_rank_is_a_process_of_its_own(results: Results) -> None:
    cases, ranks = results
    steps = cases["losses"][LOCAL]["steps"]
    for number, rank in enumerate(ranks):
        alone = penex.PENEX()
        for step, found in zip(steps, rank[LOCAL]["steps"], strict=True):
            logits, target = step[number]
            close(found["loss"], alone(logits.clone().requires_grad_(), target).detach())
            close(found["penalty"], alone.penalty)
        assert rank[LOCAL]["collectives"] == [[]] * len(steps)
    first, second = (rank[LOCAL]["steps"][0]["penalty"] for rank in ranks[:2])
    assert not torch.isclose(first, second, rtol=1e-2)


def test_the_world_is_every_rank_of_the_job(started: tuple[dict[int, Any], list[Any]]) -> None:
    cases, ranks = started
    single = penex.PENEX()
    for number, step in enumerate(cases[3]["losses"][WORLD]["steps"]):
        logits, target = joined(step)
        loss = single(logits.requires_grad_(), target)
        loss.backward()
        found = [rank[3][WORLD]["steps"][number] for rank in ranks]
        for rank in found:
            close(rank["penalty"], single.penalty)
        close(torch.cat([rank["gradient"] for rank in found]) / 3, logits.grad)


def test_without_a_job_the_world_is_this_process() -> None:
    original = penex.PENEX(process_group="world")
    copies = [copy.deepcopy(original), pickle.loads(pickle.dumps(original))]
    compiled = torch.compile(copy.deepcopy(original), fullgraph=True, backend="aot_eager")
    ((logits, target),) = make_steps(1)[0]
    expected = penex.PENEX()
    value = expected(logits.requires_grad_(), target)
    for criterion in (original, *copies, compiled):
        close(criterion(logits, target), value)
        close(criterion.penalty, expected.penalty)
    for criterion in copies:
        assert criterion.process_group == "world"


def test_a_word_that_is_no_group_is_refused() -> None:
    with pytest.raises(ValueError, match=r"process_group: expected one of 'world', got 'all'"):
        penex.PENEX(process_group="all")


@pytest.mark.parametrize("name", ["weighted", WORLD])
def test_compiled_it_is_the_same(started: tuple[dict[int, Any], list[Any]], name: str) -> None:
    _, ranks = started
    for rank in ranks:
        steps = rank[3][name]["steps"]
        expected = [*(step["loss"] for step in steps), steps[-1]["penalty"]]
        for got, exact in zip(rank[3][f"compiled {name}"], expected, strict=True):
            close(got, exact)


def test_distributed_data_parallel_trains_the_model_of_one_process(results: Results) -> None:
    cases, ranks = results
    case = cases["wrapped"]
    model = nn.Linear(CLASSES, CLASSES).double()
    model.load_state_dict(case["parameters"])
    criterion = penex.PENEX(**case["options"])
    optimiser = torch.optim.SGD(model.parameters(), lr=2.0)
    for step in case["steps"]:
        x, target = joined(step)
        optimiser.zero_grad()
        criterion(model(x), target).backward()
        optimiser.step()
    assert not torch.allclose(model.weight, case["parameters"]["weight"], rtol=0.05)
    for rank in ranks:
        for got, expected in zip(
            rank["wrapped"], (model.weight, model.bias, criterion.penalty), strict=True
        ):
            close(got, expected.detach())
