"""The comparison as a whole, with real runs: paired, resumable and never half-written."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from typer.testing import CliRunner
from waiting import GUARD, wait_until

from penex import cli
from penex.compare.analysis import plots, report
from penex.compare.analysis.summary import summarize
from penex.compare.config import Config
from penex.compare.data.load import load
from penex.compare.data.split import split
from penex.compare.errors import CompareError
from penex.compare.files import read_json
from penex.compare.finished_runs import read_curve, read_logits
from penex.compare.models.saved_model import read_network
from penex.compare.output_folder import read_comparison, run_folder
from penex.compare.registry import LOSSES

Make = Callable[..., Path]


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Of every file of every finished run: what changes if it is written again."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.glob("runs/*/[!.]*/*")
    }


def partials(folder: Path) -> list[Path]:
    return list(folder.rglob(".partial-*"))


def finished_runs(folder: Path) -> int:
    return len(list(folder.glob("runs/*/[!.]*/run.json")))


def assert_same_runs(one: Path, other: Path) -> None:
    """Logits, weights and records are equal bit for bit."""
    runs = sorted(path.relative_to(one).parent for path in one.glob("runs/*/[!.]*/run.json"))
    assert runs
    for run in runs:
        a, b = read_logits(one / run), read_logits(other / run)
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=f"{run} {name}")
        names, others = (
            {path.name for path in (f / run).glob("*.safetensors")} for f in (one, other)
        )
        assert names == others
        for name in names:
            x, y = (
                read_network(folder / run / name)["network"]
                if name.startswith("epoch")
                else load_file(folder / run / name)
                for folder in (one, other)
            )
            assert x.keys() == y.keys()
            assert all(torch.equal(x[key], y[key]) for key in x), f"{run} {name}"


def untimed(results: dict[str, Any]) -> dict[str, Any]:
    """Results without the clock."""
    for entry in (*results["runs"], results):
        del entry["seconds_per_epoch"]
    return results


# Pairing


class Watch:
    """What the network of a run gets to see: its first weights, and every training batch."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.batches: list[torch.Tensor] = []

    def __call__(self, module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if module.training and isinstance(module, nn.Flatten):
            self.batches.append(inputs[0].detach().clone())
        if module.training and isinstance(module, nn.Linear) and len(self.weights) < 3:
            self.weights.append(module.weight.detach().clone())


def watched(make: Make, folder: Path, spec: str, **options: Any) -> Watch:
    watch = Watch()
    hook = register_module_forward_pre_hook(watch)
    try:
        make(folder, losses=(spec,), **options)
    finally:
        hook.remove()
    return watch


def test_every_loss_gets_the_same_weights_and_batches(make: Make, tmp_path: Path) -> None:
    seen = {spec: watched(make, tmp_path / spec, spec, seeds=1) for spec in LOSSES}
    for watch in seen.values():
        del watch.batches[6:]  # of the measurement of time
    reference = seen.pop("cross-entropy")
    assert len(reference.weights) == 3
    assert [len(batch) for batch in reference.batches] == [64, 26] * 3
    for watch in seen.values():
        for mine, theirs in (
            (watch.weights, reference.weights),
            (watch.batches, reference.batches),
        ):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    # An epoch is all training rows of the split of this seed, each epoch in another order.
    config = Config(data="iris")
    rows = split(load(config), seed=0, config=config).train[0]
    epochs = [torch.cat(reference.batches[start : start + 2]).numpy() for start in (0, 2, 4)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch, axis=0), np.sort(rows, axis=0))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])


def test_losses_equal_to_cross_entropy_reproduce_its_runs(make: Make, tmp_path: Path) -> None:
    equal = ("label-smoothing=0", "focal=0", "confidence-penalty=0")
    folder = make(tmp_path / "out", losses=("cross-entropy", *equal), label_noise=0.2)
    for seed in (0, 1):
        reference = read_logits(run_folder(folder, "cross-entropy", seed))
        curve = read_curve(run_folder(folder, "cross-entropy", seed))
        for spec in equal:
            logits = read_logits(run_folder(folder, spec, seed))
            assert logits.keys() == reference.keys()
            for name in logits:
                np.testing.assert_allclose(logits[name], reference[name], atol=1e-5, rtol=0)
            for name, column in read_curve(run_folder(folder, spec, seed)).items():
                if name != "seconds":
                    np.testing.assert_allclose(column, curve[name], rtol=1e-5)
    one, other = (read_logits(run_folder(folder, "cross-entropy", seed)) for seed in (0, 1))
    for name in ("validation_3", "test_3", "test_target"):
        assert not np.array_equal(one[name], other[name])


def test_a_run_records_the_scores_of_its_logits(make: Make, tmp_path: Path) -> None:
    """Curve, record and saved logits are of the same weights, at the epochs they name."""
    folder = make(tmp_path / "out", label_noise=0.3, lr=0.03, epochs=8)
    config, _ = read_comparison(folder)
    selected = set()
    for spec in config.losses:
        scale = {"cross-entropy": 1.0, "penex": 1.1}[spec]
        for seed in range(config.seeds):
            where, curve = (
                run_folder(folder, spec, seed),
                read_curve(run_folder(folder, spec, seed)),
            )
            record, logits = read_json(where / "run.json"), read_logits(where)
            np.testing.assert_array_equal(curve["epoch"], range(1, 9))
            nll, accuracy = curve["validation_nll"], curve["validation_accuracy"]
            assert record["epochs"] == {
                "refined": curve["validation_refined_nll"].argmin() + 1,
                "nll": nll.argmin() + 1,
                "accuracy": np.lexsort((nll, -accuracy))[0] + 1,
                "last": 8,
            }
            epochs = set(record["epochs"].values())
            selected |= epochs
            stored = {name.removeprefix("test_") for name in logits if name.startswith("test_")}
            assert stored - {"target"} == {str(epoch) for epoch in epochs}
            assert {path.name for path in where.glob("epoch-*")} == {
                f"epoch-{epoch}.safetensors" for epoch in epochs
            }
            parts = split(load(config), seed=seed, config=config)
            for part in ("validation", "test"):
                np.testing.assert_array_equal(logits[f"{part}_target"], getattr(parts, part)[1])
            target = torch.from_numpy(logits["validation_target"])
            for name, epoch in record["epochs"].items():
                own = torch.from_numpy(logits[f"validation_{epoch}"])
                scores = record["validation"][name]
                assert scores == pytest.approx(
                    {
                        "nll": F.cross_entropy(scale * own, target).item(),
                        "refined_nll": curve["validation_refined_nll"][epoch - 1],
                        "softmax_nll": F.cross_entropy(own, target).item(),
                        "accuracy": (own.argmax(1) == target).double().mean().item(),
                    },
                    rel=1e-5,
                )
                assert scores["refined_nll"] <= scores["nll"]
                for score, value in scores.items():
                    assert value == pytest.approx(curve[f"validation_{score}"][epoch - 1], rel=1e-5)
            counts = np.bincount(parts.train[1], minlength=3)
            assert record["class_counts"] == counts.tolist()
    assert len(selected) > 2  # or the selections would be the same


def test_an_epoch_is_timed_after_all_runs_and_once(make: Make, copy: Path) -> None:
    path = copy / "timing.json"
    before, stat = read_json(path), path.stat()
    assert list(before) == ["cross-entropy", "penex"]
    assert min(before.values()) > 0
    assert all(run.stat().st_mtime_ns < stat.st_mtime_ns for run in copy.glob("runs/*/*/run.json"))
    make(copy, seeds=3)
    assert path.stat() == stat
    make(copy, losses=("focal",))
    after = read_json(path)
    assert list(after) == ["cross-entropy", "penex", "focal"]
    assert {spec: after[spec] for spec in before} == before


# Interruptions

PROGRAM = "from penex.cli import main; main()"
COMMAND = ["compare", "iris", "--losses=cross-entropy,penex", "--seeds=5", "--epochs=120"]


@pytest.fixture(scope="module")
def uninterrupted(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make(tmp_path_factory.mktemp("whole") / "out", seeds=5, epochs=120)
    report.write(plots.read(folder))
    return folder


class Process:
    """The command in a process group of its own, as a shell would start it."""

    def __init__(self, folder: Path, jobs: int) -> None:
        self.folder = folder
        self.popen = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *COMMAND, f"--jobs={jobs}", f"--out={folder}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def until_mid_run(self, runs: int) -> None:
        """Wait until `runs` are finished and another one has some of its epochs behind it."""
        wait_until(lambda: finished_runs(self.folder) >= runs and self._training(), self.popen)

    def _training(self) -> bool:
        try:
            curves = self.folder.glob("runs/*/.partial-*/curve.csv")
            return any(len(curve.read_bytes().splitlines()) > 5 for curve in curves)
        except FileNotFoundError:
            return False

    def alive(self) -> list[int]:
        """Processes of the group that still run (Linux; a zombie does not run)."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
                if int(group) == self.popen.pid and state != "Z":
                    found.append(int(stat.parent.name))
        return found

    def must_be_gone(self) -> None:
        wait_until(lambda: not self.alive())


@pytest.fixture
def start() -> Iterator[Callable[[Path, int], Process]]:
    started: list[Process] = []

    def begin(folder: Path, jobs: int) -> Process:
        started.append(Process(folder, jobs))
        return started[-1]

    yield begin
    for process in started:  # only if a test failed half-way
        if process.popen.poll() is None:
            os.killpg(process.popen.pid, signal.SIGKILL)
            process.popen.communicate()


def test_an_interrupted_and_killed_comparison_gives_the_same_results(
    start: Callable[[Path, int], Process], make: Make, uninterrupted: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"

    # Ctrl-C, which a terminal sends to all processes of the command.
    process = start(folder, 2)
    process.until_mid_run(1)
    with pytest.raises(CompareError, match="^out: another comparison is running in "):
        make(folder)
    os.killpg(process.popen.pid, signal.SIGINT)
    out, err = process.popen.communicate(timeout=GUARD)
    assert process.popen.returncode == 130
    assert out.splitlines()[-1] == "Stopped. Finished runs are kept; the same command continues."
    assert err == ""
    process.must_be_gone()
    assert partials(folder) == []
    first = stamps(folder)
    assert 0 < finished_runs(folder) < 10

    # kill -9 of the command alone: its workers notice.
    process = start(folder, 2)
    process.until_mid_run(finished_runs(folder) + 1)
    os.kill(process.popen.pid, signal.SIGKILL)
    process.must_be_gone()
    process.popen.communicate()
    second = stamps(folder)
    assert first.items() < second.items()
    assert finished_runs(folder) < 10

    # A killed process cannot tidy up; the next one does.
    half = folder / "runs" / "penex" / ".partial-seed-4-0123abcd"
    half.mkdir(parents=True)
    (half / "run.json").write_text("{")
    result = CliRunner().invoke(cli.app, [*COMMAND, "--jobs=1", f"--out={folder}"])
    assert result.exit_code == 0, result.output
    assert second.items() < stamps(folder).items()
    assert partials(folder) == []
    assert finished_runs(folder) == 10
    assert_same_runs(uninterrupted, folder)
    assert untimed(read_json(folder / "results.json")) == untimed(
        read_json(uninterrupted / "results.json")
    )


def test_ctrl_c_with_a_single_process(
    start: Callable[[Path, int], Process], tmp_path: Path
) -> None:
    """Lightning, which trains in this process, would end it on its own terms."""
    process = start(tmp_path / "out", 1)
    process.until_mid_run(0)
    process.popen.send_signal(signal.SIGINT)
    out, err = process.popen.communicate(timeout=GUARD)
    assert process.popen.returncode == 130
    assert out.splitlines()[-1] == "Stopped. Finished runs are kept; the same command continues."
    assert err == ""
    assert partials(tmp_path) == []


def test_parallel_runs_equal_sequential_ones(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    options = ["--losses=cross-entropy,penex", "--seeds=2", "--epochs=3", "--jobs=2"]
    result = CliRunner().invoke(cli.app, ["compare", "iris", *options, f"--out={folder}"])
    assert result.exit_code == 0, result.output
    assert_same_runs(finished, folder)


# One folder, one comparison


def test_finished_runs_are_not_repeated(make: Make, copy: Path) -> None:
    before = stamps(copy)
    assert watched(make, copy, "penex").batches == []
    assert stamps(copy) == before


def test_the_selection_may_change_without_tuning(make: Make, copy: Path) -> None:
    before = stamps(copy)
    make(copy, select="nll")
    assert stamps(copy) == before
    assert read_comparison(copy)[0].select == "nll"


def test_further_seeds_and_losses_can_be_added(make: Make, copy: Path, tmp_path: Path) -> None:
    before = stamps(copy)
    make(copy, seeds=3, losses=("cross-entropy", "penex", "focal"))
    assert before.items() < stamps(copy).items()
    assert finished_runs(copy) == 9
    assert_same_runs(
        make(tmp_path / "at once", seeds=3, losses=("penex", "focal", "cross-entropy")), copy
    )
    # A call with fewer losses and seeds hides nothing.
    make(copy, seeds=1, losses=("focal",))
    assert finished_runs(copy) == 9
    results = summarize(copy)
    assert [loss["spec"] for loss in results["losses"]] == ["cross-entropy", "penex", "focal"]
    assert (len(results["runs"]), results["planned_runs"]) == (9, 9)


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({"epochs": 4}, "epochs was 3, is 4"),
        (
            {"lr": 0.01, "batch_size": 8},
            "lr was 0.001, is 0.01; batch_size (--batch-size) was 64, is 8",
        ),
        ({"hidden": (8,)}, "hidden was [128, 128], is [8]"),
        ({"train_size": 50}, "train_size (--train-size) was None, is 50"),
        ({"label_noise": 0.1}, "label_noise (--label-noise) was 0.0, is 0.1"),
        ({"tune": 2}, "tune was 0, is 2"),
        ({"data": "wine"}, "data was iris with 150 rows, content "),
    ],
)
def test_another_configuration_is_refused(
    make: Make, copy: Path, options: dict[str, Any], changed: str
) -> None:
    before = stamps(copy), (copy / "comparison.json").read_bytes()
    with pytest.raises(CompareError, match="belongs to another configuration") as refusal:
        make(copy, **options)
    assert f"({changed}" in str(refusal.value)
    assert (stamps(copy), (copy / "comparison.json").read_bytes()) == before


def test_data_is_identified_by_its_content(make: Make, tmp_path: Path) -> None:
    iris = load(Config(data="iris"))
    paths = [tmp_path / "one.npz", tmp_path / "other.npz"]
    for path in paths:
        np.savez(path, X=iris.features, y=iris.target)
    folder = make(tmp_path / "out", data=str(paths[0]), losses=("penex",), seeds=1)
    before = stamps(folder)
    make(folder, data=str(paths[1]), losses=("penex",), seeds=1)
    assert stamps(folder) == before
    changed = iris.features.copy()
    changed[0, 0] = np.nextafter(changed[0, 0], 9)
    np.savez(paths[1], X=changed, y=iris.target)
    with pytest.raises(CompareError, match="data was other with 150 rows, content .*, is other "):
        make(folder, data=str(paths[1]), losses=("penex",), seeds=1)


def test_refused_data_creates_no_folder(make: Make, tmp_path: Path) -> None:
    with pytest.raises(CompareError, match="unknown data 'irs'"):
        make(tmp_path / "out", data="irs")
    assert not (tmp_path / "out").exists()
