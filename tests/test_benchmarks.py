"""The benchmarks measure what they say. Nothing here depends on how fast the machine is."""

import json
import subprocess
import sys
import time
from itertools import groupby
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from benchmarks import harness
from benchmarks.harness import Results, Strict
from benchmarks.loss import LossRow, naive, typical
from benchmarks.memory import peak
from benchmarks.step import network
from penex import penex_loss

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def test_blocks_are_interleaved_and_in_turned_order() -> None:
    calls: list[str] = []

    def called(name: str) -> None:
        calls.append(name)
        time.sleep(0.004)

    functions = {name: lambda name=name: called(name) for name in "ab"}
    times = harness.compare(functions, CPU, seconds=0, blocks=4, calls=6)
    blocks = [(name, len(list(group))) for name, group in groupby(calls)]
    # Warming up; then a b, b a, a b, b a, where each block has an untimed call of its own.
    assert [name for name, _ in blocks] == list("abababa")
    per_block = times["a"].inner + 1
    assert per_block >= 7
    assert blocks[-2:] == [("b", 2 * (times["b"].inner + 1)), ("a", per_block)]


def test_a_call_is_timed_and_not_a_block() -> None:
    timing = harness.compare({"nap": lambda: time.sleep(0.004)}, CPU, seconds=0, blocks=3)["nap"]
    assert timing.blocks == 3
    assert timing.inner >= 5
    assert 0.004 <= timing.q1 <= timing.median <= timing.q3


def test_peak_counts_what_is_held_at_one_time() -> None:
    def hold() -> None:
        first, second = torch.empty(1000), torch.empty(500)
        del first
        torch.empty(250)
        del second

    assert peak(hold, CPU) == 4 * 1500


def test_naive_transcription_is_penex() -> None:
    target = torch.randint(5, (7,))
    logits = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    values = naive(logits, target), penex_loss(logits, target)
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in values))


def test_network_takes_what_the_step_gives() -> None:
    assert network()(torch.randn(2, 3, 32, 32)).shape == (2, 100)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results")
    options = ["--quick", "--shape", "6x5", "--processes", "2", "--out", out]
    command = [sys.executable, "-m", "benchmarks.loss", *options]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return out / "loss-cpu.json"


def test_the_typical_process_is_that_of_the_median_ratio(file: Path) -> None:
    run = Results[LossRow].model_validate_json(file.read_text())
    runs = []
    for ratio in (3.0, 1.0, 2.0):
        rows = [
            row.model_copy(update={"ratio": ratio, "passes": 10 * ratio})
            if row.loss == "penex running"
            else row
            for row in run.rows
        ]
        runs.append(run.model_copy(update={"rows": rows}))
    assert list(typical(runs)) == runs[2].rows


def test_run_has_every_loss_and_work(file: Path) -> None:
    results = Results[LossRow].model_validate_json(file.read_text())
    assert results.quick
    assert results.machine.torch == torch.__version__
    assert {row.shape for row in results.rows} == {(6, 5)}
    losses = {"cross-entropy", "naive", "focal", "confidence penalty", "pass", "fresh pass"}
    losses |= {"penex running", "penex auto", "penex fixed", "log-penex"}
    losses |= {"cross-entropy by rows", "z-loss", "generalised cross-entropy"}
    assert {(row.loss, row.work) for row in results.rows} == {
        (loss, work) for loss in losses for work in ("forward", "forward+backward")
    }
    assert [skipped.what for skipped in results.skipped] == ["torch.compile"]


def test_ratios_and_passes_are_quotients_of_medians(file: Path) -> None:
    results = Results[LossRow].model_validate_json(file.read_text())
    for work in ("forward", "forward+backward"):
        rows = {row.loss: row for row in results.rows if row.work == work}
        for row in rows.values():
            median = row.timing.median
            assert row.ratio == median / rows["cross-entropy"].timing.median
            assert row.passes == median / rows["pass"].timing.median
            assert row.fresh_passes == median / rows["fresh pass"].timing.median


@pytest.mark.parametrize(
    ("old", "new"),
    [('"quick"', '"quicker"'), ('"median": ', '"median": -'), ('"forward"', '"backward"')],
)
def test_schema_refuses_what_is_no_result(file: Path, old: str, new: str) -> None:
    with pytest.raises(ValidationError):
        Results[LossRow].model_validate_json(file.read_text().replace(old, new))


def test_a_result_that_is_not_finite_is_not_written(file: Path, tmp_path: Path) -> None:
    class Row(Strict):
        number: float

    machine = Results[LossRow].model_validate_json(file.read_text()).machine
    row = Row.model_construct(number=float("nan"))
    results = Results[Row].model_construct(name="x", machine=machine, quick=True, rows=[row])
    with pytest.raises(ValidationError):
        results.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_overhead_of_the_comparison_is_measured(tmp_path: Path) -> None:
    """It runs the trainer's own parts, which no other test of the benchmarks does."""
    command = [sys.executable, "-m", "benchmarks.overhead", "--quick", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    rows = json.loads((tmp_path / "overhead-cpu.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["mlp", "convnet"]
