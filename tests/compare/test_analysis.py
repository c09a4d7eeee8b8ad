"""Numbers from saved logits, against scipy and scikit-learn; marks, gaps and refusals."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from scipy.special import softmax
from sklearn.metrics import accuracy_score, log_loss

from penex.compare.analysis import EPOCHS, SCALINGS, clear, curves, summarize
from penex.compare.errors import CompareError
from penex.compare.store import read_json, read_logits, run_folder, write_json
from penex.metrics import METRICS, fit_temperature

Make = Callable[..., Path]
SPECS = ("cross-entropy", "focal", "penex")
SEEDS = range(4)


@pytest.fixture(scope="module")
def real(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three losses at four seeds, long enough to make few errors but not none."""
    folder = tmp_path_factory.mktemp("real") / "out"
    return make(folder, losses=SPECS, seeds=4, epochs=15, label_noise=0.3)


@pytest.fixture(scope="module")
def results(real: Path) -> dict[str, Any]:
    return summarize(real)


@pytest.fixture
def copy(real: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(real, tmp_path / "out"))


def rewrite(folder: Path, spec: str, seed: int, **arrays: np.ndarray) -> None:
    where = run_folder(folder, spec, seed)
    np.savez(where / "logits.npz", **(read_logits(where) | arrays))


def set_accuracy(folder: Path, spec: str, rights: list[int]) -> None:
    """Make every seed's run one with so many test rows right, all of them with the same margin."""
    for seed, right in enumerate(rights):
        where = run_folder(folder, spec, seed)
        target = read_logits(where)["test_target"]
        chosen = np.where(np.arange(len(target)) < right, target, (target + 1) % 3)
        scale = read_json(where / "run.json")["scale"]
        logits = (np.eye(3)[chosen] / scale).astype(np.float32)
        rewrite(folder, spec, seed, test_best=logits, test_last=logits)


def marks(folder: Path, metric: str = "accuracy", epoch: str = "best") -> list[str]:
    column = summarize(folder)["summary"][epoch]["raw"][metric]
    return [spec for spec, cell in column.items() if cell["best"]]


def difference(folder: Path, spec: str) -> dict[str, Any]:
    column = summarize(folder)["summary"]["best"]["raw"]["accuracy"]
    return dict(column[spec]["difference"])


def own_values(folder: Path, spec: str, epoch: str, metric: str) -> np.ndarray:
    found = []
    for seed in SEEDS:
        where = run_folder(folder, spec, seed)
        logits, scale = read_logits(where), read_json(where / "run.json")["scale"]
        probabilities = softmax(scale * logits[f"test_{epoch}"].astype(np.float64), axis=1)
        target = logits["test_target"]
        if metric == "nll":
            found.append(log_loss(target, probabilities, labels=[0, 1, 2]))
        else:
            found.append(accuracy_score(target, probabilities.argmax(1)))
    return np.array(found)


@pytest.mark.parametrize("epoch", EPOCHS)
@pytest.mark.parametrize("metric", ["accuracy", "nll"])
def test_intervals_over_seeds(real: Path, results: dict[str, Any], epoch: str, metric: str) -> None:
    column = results["summary"][epoch]["raw"][metric]
    reference = own_values(real, "cross-entropy", epoch, metric)
    assert column["cross-entropy"]["difference"] is None
    for spec in SPECS:
        values, cell = own_values(real, spec, epoch, metric), column[spec]
        assert np.ptp(values) > 0
        low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert cell["mean"] - cell["half_width"] == pytest.approx(low)
        assert cell["mean"] + cell["half_width"] == pytest.approx(high)
        assert cell["n"] == 4
        if spec != "cross-entropy":
            paired, test = cell["difference"], stats.ttest_rel(values, reference)
            low, high = test.confidence_interval(0.95)
            assert paired["mean"] - paired["half_width"] == pytest.approx(low)
            assert paired["mean"] + paired["half_width"] == pytest.approx(high)
            assert clear(paired) == (test.pvalue < 0.05)


def test_temperature_is_that_of_validation_alone(
    results: dict[str, Any], real: Path, copy: Path
) -> None:
    for run in results["runs"]:
        logits = read_logits(run_folder(real, run["loss"], run["seed"]))
        validation = run["scale"] * logits["validation_last"].astype(np.float64)
        fitted = fit_temperature(validation, logits["validation_target"])
        assert run["temperature"]["last"] == fitted
        test = run["scale"] * logits["test_last"].astype(np.float64) / fitted
        nll = log_loss(logits["test_target"], softmax(test, axis=1), labels=[0, 1, 2])
        assert run["test"]["last"]["scaled"]["nll"] == pytest.approx(nll)
    shift = read_logits(run_folder(copy, "penex", 0))["test_last"][::-1]
    rewrite(copy, "penex", 0, test_last=shift)
    assert [run["temperature"] for run in summarize(copy)["runs"]] == [
        run["temperature"] for run in results["runs"]
    ]


def test_it_is_plain_json(results: dict[str, Any], real: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "results.json", results)
    assert summarize(real) == results
    assert results["planned_runs"] == len(results["runs"]) == 12
    for epoch in EPOCHS:
        for scaling in SCALINGS:
            assert list(results["summary"][epoch][scaling]) == list(METRICS)
    low, high = results["runs"][0]["interval"]["best"]["nll"]
    assert low < results["runs"][0]["test"]["best"]["raw"]["nll"] < high


@pytest.mark.parametrize(
    ("rights", "marked"),
    [
        # The one with the best mean, clearly ahead of the reference.
        ({"cross-entropy": [20, 21, 22, 23], "penex": [25, 26, 27, 29]}, ["penex"]),
        # Ahead in the mean, but not in every seed.
        ({"cross-entropy": [20, 21, 22, 23], "penex": [26, 26, 21, 23]}, []),
        # A third loss clearly better than the reference does not help where it is not the best.
        (
            {
                "cross-entropy": [20, 21, 22, 23],
                "focal": [21, 22, 23, 25],
                "penex": [10, 38, 12, 38],
            },
            [],
        ),
        # The reference is ahead of both, clearly.
        (
            {
                "cross-entropy": [30, 31, 32, 33],
                "focal": [25, 26, 27, 27],
                "penex": [20, 22, 21, 24],
            },
            ["cross-entropy"],
        ),
        # The reference is ahead of both, of one by chance.
        (
            {
                "cross-entropy": [30, 31, 32, 33],
                "focal": [29, 33, 31, 32],
                "penex": [20, 22, 21, 24],
            },
            [],
        ),
    ],
)
def test_best_is_marked_where_it_is_more_than_chance(
    copy: Path, rights: dict[str, list[int]], marked: list[str]
) -> None:
    for spec in SPECS:
        set_accuracy(copy, spec, rights.get(spec, [5, 6, 7, 8]))
    assert marks(copy) == marked
    # Where less is better, the same runs are judged the other way round; a fixed margin makes
    # NLL and Brier score fall as accuracy rises.
    assert marks(copy, "nll") == marks(copy, "brier") == marked


def test_equal_losses_are_not_told_apart(copy: Path) -> None:
    for spec in SPECS:
        set_accuracy(copy, spec, [25, 26, 27, 28])
    assert difference(copy, "penex") == {"mean": 0, "half_width": 0, "n": 4}
    assert marks(copy) == []


def test_a_difference_is_clear_if_its_interval_excludes_zero() -> None:
    assert clear({"mean": -0.2, "half_width": 0.1, "n": 3})
    assert not clear({"mean": -0.1, "half_width": 0.1, "n": 3})
    assert not clear({"mean": 0.2, "half_width": None, "n": 1})
    assert not clear(None)


def test_a_loss_that_diverged_at_a_seed_is_neither_marked_nor_hides_it(copy: Path) -> None:
    set_accuracy(copy, "cross-entropy", [20, 21, 22, 23])
    set_accuracy(copy, "focal", [22, 23, 24, 26])
    set_accuracy(copy, "penex", [30, 31, 32, 34])
    assert marks(copy) == ["penex"]
    bad = read_logits(run_folder(copy, "penex", 1))["test_last"]
    bad[3, 1] = np.nan
    rewrite(copy, "penex", 1, test_last=bad)
    results = summarize(copy)
    # At the best epoch it has all its values; at the last one it lacks one.
    assert marks(copy) == ["penex"]
    assert marks(copy, epoch="last") == ["focal"]
    penex = results["losses"][SPECS.index("penex")]
    assert (penex["diverged"], penex["runs"]) == (1, 4)
    cell = results["summary"]["last"]["raw"]["accuracy"]["penex"]
    assert cell["n"] == cell["difference"]["n"] == 3
    assert cell["mean"] == pytest.approx(np.mean([30, 32, 34]) / 38)
    assert cell["difference"]["mean"] == pytest.approx(np.mean([10, 10, 11]) / 38)
    run = next(r for r in results["runs"] if (r["loss"], r["seed"]) == ("penex", 1))
    assert run["test"]["last"] == {"raw": None, "scaled": None}
    assert run["temperature"]["last"] is run["interval"]["last"] is None
    json.dumps(results, allow_nan=False)


def test_validation_logits_that_diverged_count_too(copy: Path) -> None:
    bad = read_logits(run_folder(copy, "focal", 0))["validation_last"]
    bad[0] = np.inf
    rewrite(copy, "focal", 0, validation_last=bad)
    assert summarize(copy)["losses"][SPECS.index("focal")]["diverged"] == 1


def test_a_reference_that_diverged_everywhere(copy: Path) -> None:
    for seed in SEEDS:
        nothing = np.full((38, 3), np.nan, dtype=np.float32)
        rewrite(copy, "cross-entropy", seed, test_best=nothing, test_last=nothing)
    column = summarize(copy)["summary"]["best"]["raw"]["nll"]
    assert column["cross-entropy"] == {
        "mean": None,
        "half_width": None,
        "n": 0,
        "difference": None,
        "best": False,
    }
    assert all(cell["difference"] is None and not cell["best"] for cell in column.values())


def test_pairs_are_of_the_same_seed(copy: Path) -> None:
    """Where each loss misses another seed, only what both have is compared."""
    set_accuracy(copy, "cross-entropy", [20, 25, 30, 35])
    set_accuracy(copy, "penex", [21, 26, 31, 36])
    shutil.rmtree(run_folder(copy, "cross-entropy", 0))
    shutil.rmtree(run_folder(copy, "penex", 3))
    paired = difference(copy, "penex")
    assert paired["n"] == 2
    assert paired["mean"] == pytest.approx(1 / 38)
    results = summarize(copy)
    assert (len(results["runs"]), results["planned_runs"]) == (10, 12)


def test_one_seed_has_no_interval(make: Make, tmp_path: Path) -> None:
    results = summarize(make(tmp_path / "out", seeds=1))
    for cell in results["summary"]["last"]["raw"]["nll"].values():
        assert cell["half_width"] is None
        assert not cell["best"]
    assert results["summary"]["last"]["raw"]["nll"]["penex"]["difference"]["n"] == 1


def test_without_the_reference_there_is_nothing_to_mark(make: Make, tmp_path: Path) -> None:
    folder = make(tmp_path / "out", losses=("focal", "penex"))
    set_accuracy(folder, "focal", [10, 11])
    set_accuracy(folder, "penex", [30, 31])
    assert marks(folder) == []
    cells = summarize(folder)["summary"]["best"]["raw"]["accuracy"].values()
    assert all(cell["difference"] is None for cell in cells)


def test_a_loss_without_runs_yet(copy: Path) -> None:
    shutil.rmtree(copy / "runs" / "penex")
    results = summarize(copy)
    penex = results["losses"][SPECS.index("penex")]
    assert (penex["runs"], penex["lr"], penex["seconds_per_epoch"]["least"]) == (0, None, None)
    assert results["summary"]["best"]["raw"]["nll"]["penex"]["n"] == 0


def test_no_run_yet(copy: Path) -> None:
    shutil.rmtree(copy / "runs")
    with pytest.raises(CompareError, match="has no finished run yet; run penex compare first"):
        summarize(copy)


@pytest.mark.parametrize("name", ["run.json", "logits.npz"])
def test_a_damaged_file_is_named(copy: Path, name: str) -> None:
    path = run_folder(copy, "focal", 2) / name
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(CompareError, match=f"{path} is damaged .*; remove {path.parent} and run"):
        summarize(copy)


def test_curves(real: Path) -> None:
    columns = curves(real, "penex", 3)
    assert next(iter(columns)) == "epoch"
    np.testing.assert_array_equal(columns["epoch"], np.arange(1, 16))
    assert columns["train_nll"][-1] < columns["train_nll"][0]
