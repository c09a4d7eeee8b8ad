"""Summaries of saved logits against scipy, scikit-learn, statsmodels and definitions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import EPOCHS, TEST, VALIDATION, calibrated, with_nll, with_right, write
from scipy.special import softmax
from sklearn.metrics import accuracy_score, f1_score, log_loss
from statsmodels.stats.multitest import multipletests

from penex.compare.analysis.statistics import Estimate, crossed_interval, resplit_interval
from penex.compare.analysis.summary import (
    GROUPS,
    SCALINGS,
    _pseudo_values,
    predictions,
    summarize,
)
from penex.compare.config import Config
from penex.compare.errors import CompareError
from penex.compare.files import read_json, write_json
from penex.compare.finished_runs import read_curve, read_logits
from penex.compare.output_folder import run_folder
from penex.compare.training.selection import LAST, SELECTIONS
from penex.metrics import METRICS, decompose_nll, evaluate, fit_temperature, row_values

OTHERS = ("label-smoothing=0", "focal=0")
SPECS = ("cross-entropy", *OTHERS, "penex")
SHARE = 0.25
"""Of test rows, by default."""


def noisy(separation: float, runs: int = 4, **options: Any) -> list[np.ndarray]:
    """Calibrated test logits of several seeds."""
    return [calibrated(TEST, separation, 100 + seed, **options) for seed in range(runs)]


def mixed(fixed: bool) -> dict[str, Any]:
    """Four losses at four seeds, of different quality, with seeds that differ."""
    test = {spec: noisy(1.4 + 0.2 * place) for place, spec in enumerate(SPECS)}
    return {"test": test, "test_split": "once" if fixed else "per-seed"}


@pytest.fixture(scope="module", params=[False, True], ids=["resplit", "fixed"])
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    return summarize(write(tmp_path_factory.mktemp("mixed") / "out", **mixed(request.param)))


def steady(tmp_path: Path, nll: dict[str, list[float]], **options: Any) -> dict[str, Any]:
    """Results where all rows of a run have the same NLL."""
    test = {spec: [with_nll(TEST, value) for value in values] for spec, values in nll.items()}
    return summarize(write(tmp_path / "out", test, **({"select": "nll"} | options)))


def column(
    results: dict[str, Any], metric: str = "nll", scaling: str = "link", selection: str = "nll"
) -> dict[str, Any]:
    return dict(results["summary"][selection][scaling][metric])


def matches(cell: dict[str, Any], estimate: Estimate) -> bool:
    found = [cell[name] for name in ("mean", "low", "high", "n")]
    wanted = [estimate.mean, estimate.low, estimate.high, estimate.seeds]
    return found == pytest.approx(wanted, rel=1e-6, abs=1e-9)


# ---- predictions -----------------------------------------------------------------------------


def penex(f: np.ndarray) -> np.ndarray:
    return softmax(1.3 * f, axis=1)


def smoothed(f: np.ndarray) -> np.ndarray:
    return (softmax(f, axis=1) - 0.1 / 3) / 0.9


def focal(f: np.ndarray) -> np.ndarray:
    p = softmax(f, axis=1)
    q = p / ((1 - p) ** 2 - 2 * (1 - p) * p * np.log(p))
    return q / q.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("spec", "link"),
    [
        ("cross-entropy", lambda f: softmax(f, axis=1)),
        ("penex=0.3", penex),
        ("label-smoothing=0.1", smoothed),
        ("focal=2", focal),
    ],
)
def test_predictions_are_those_of_the_link(tmp_path: Path, spec: str, link: Any) -> None:
    rng = np.random.default_rng(0)
    logits = {part: rng.uniform(-1, 1, (n, 3)) for part, n in (("validation", 240), ("test", 120))}
    folder = write(
        tmp_path / "out", {spec: [logits["test"]]}, validation={spec: [logits["validation"]]}
    )
    saved = read_logits(run_folder(folder, spec, 0))
    saved |= {f"{part}_8": values.astype(np.float32) for part, values in logits.items()}
    record = read_json(run_folder(folder, spec, 0) / "run.json")
    found = predictions(Config(), record, saved, "refined")
    assert found is not None
    p = {part: link(saved[f"{part}_8"].astype(np.float64)) for part in logits}
    np.testing.assert_allclose(np.exp(found.scaled("link")), p["test"], rtol=1e-6)
    plain = softmax(saved["test_8"].astype(np.float64), axis=1)
    np.testing.assert_allclose(np.exp(found.scaled("softmax")), plain, rtol=1e-9)
    assert found.temperature == pytest.approx(fit_temperature(np.log(p["validation"]), VALIDATION))
    scaled = softmax(np.log(p["test"]) / found.temperature, axis=1)
    np.testing.assert_allclose(softmax(found.scaled("scaled"), axis=1), scaled, rtol=1e-6)
    # No epoch, or one that diverged.
    assert predictions(Config(), record | {"epochs": {LAST: 20}}, saved, "refined") is None
    for part in logits:
        bad = saved[f"{part}_8"].copy()
        bad[3, 1] = np.nan
        assert predictions(Config(), record, saved | {f"{part}_8": bad}, "refined") is None


def test_metrics_of_runs(results: dict[str, Any]) -> None:
    for run in results["runs"]:
        separation = 1.4 + 0.2 * SPECS.index(run["loss"])
        logits = calibrated(TEST, separation, 100 + run["seed"])
        validation = calibrated(VALIDATION, 2.0, run["seed"])
        at = run["test"]["refined"]
        assert at["link"]["nll"] == pytest.approx(log_loss(TEST, softmax(logits, axis=1)), rel=1e-5)
        assert at["link"]["accuracy"] == accuracy_score(TEST, logits.argmax(1))
        f1 = f1_score(TEST, logits.argmax(1), average="macro")
        assert at["link"]["macro_f1"] == pytest.approx(f1)
        # The NLL after temperature scaling is the refinement error.
        parts = decompose_nll(logits, TEST, validation, VALIDATION)
        assert at["scaled"]["nll"] == pytest.approx(parts.refinement, rel=1e-5)
        assert run["temperature"]["refined"] == pytest.approx(parts.temperature, rel=1e-5)
        plain = logits / 1.1 if run["loss"] == "penex" else logits
        nll = log_loss(TEST, softmax(plain, axis=1))
        assert at["softmax"]["nll"] == pytest.approx(nll, rel=1e-5)


def test_the_temperature_does_not_depend_on_test_rows(tmp_path: Path) -> None:
    one = summarize(write(tmp_path / "a", {"cross-entropy": noisy(1.5, 1)}))
    other = summarize(write(tmp_path / "b", {"cross-entropy": noisy(0.3, 1)}))
    assert one["runs"][0]["temperature"] == other["runs"][0]["temperature"]
    assert one["runs"][0]["test"] != other["runs"][0]["test"]


# ---- intervals -------------------------------------------------------------------------------


KINDS = ("accuracy", "nll", "macro_f1", "smooth_ece")
"""A share and a mean over rows; a metric that is no mean, with and without bounds that matter."""


def test_intervals_and_holm_of_every_column(results: dict[str, Any]) -> None:
    """Over seeds and overlapping test sets, or over seeds and test rows that all seeds share."""
    fixed = results["primary"]["fixed_test"]
    for scaling in ("link", "scaled"):
        varied = {
            (run["loss"], run["seed"]): of_rows(run, scaling) if fixed else {}
            for run in results["runs"]
        }
        for name in KINDS:
            metric = METRICS[name]
            values, rows = {}, {}
            for spec in SPECS:
                runs = [run for run in results["runs"] if run["loss"] == spec]
                values[spec] = np.array([run["test"]["refined"][scaling][name] for run in runs])
                rows[spec] = np.array([varied[spec, seed].get(name, []) for seed in range(4)])
            cells = results["summary"]["refined"][scaling][name]
            low, high = metric.bounds
            estimates = {}
            for spec in SPECS:
                if fixed:
                    alone = crossed_interval(rows[spec], bounds=metric.bounds)
                    pair = rows[spec] - rows["cross-entropy"]
                    estimates[spec] = crossed_interval(pair, bounds=(low - high, high - low))
                else:
                    options = {"test_share": SHARE, "level": 0.95}
                    alone = resplit_interval(values[spec], **options, bounds=metric.bounds)
                    pair = values[spec] - values["cross-entropy"]
                    estimates[spec] = resplit_interval(pair, **options)
                assert alone.mean == pytest.approx(values[spec].mean())
                assert matches(cells[spec], alone), (name, scaling, spec)
            assert cells["cross-entropy"]["difference"] is None
            raw = [estimates[spec].p_value for spec in SPECS[1:]]
            adjusted = multipletests(raw, method="holm")[1]
            for spec, p in zip(SPECS[1:], adjusted, strict=True):
                assert matches(cells[spec]["difference"] | {"n": 4}, estimates[spec])
                assert cells[spec]["difference"]["p"] == pytest.approx(p, rel=1e-4)


def of_rows(run: dict[str, Any], scaling: str) -> dict[str, np.ndarray]:
    """What varies with test rows: values of rows, or by the jackknife's definition of groups."""
    logits = calibrated(TEST, 1.4 + 0.2 * SPECS.index(run["loss"]), 100 + run["seed"])
    logits = logits.astype(np.float32).astype(np.float64)
    if scaling == "scaled":
        logits = logits / run["temperature"]["refined"]
    group = np.random.default_rng(0).permutation(len(TEST)) % GROUPS
    without = [evaluate(logits[group != g], TEST[group != g]) for g in range(GROUPS)]
    found = {}
    for name, whole in evaluate(logits, TEST).items():
        pseudo = GROUPS * whole - (GROUPS - 1) * np.array([each[name] for each in without])
        found[name] = pseudo - pseudo.mean() + whole
    return found | row_values(logits, TEST)


def test_pseudo_values_of_a_mean_give_its_interval() -> None:
    """Of means, they are the means of the groups: the same variance of rows, nearly."""
    target = np.arange(3000) % 3
    several = [calibrated(target, 1.5, 7) + calibrated(target, 0.3, seed) for seed in range(5)]
    whole = [evaluate(logits, target) for logits in several]
    found = [_pseudo_values(*each, target) for each in zip(whole, several, strict=True)]
    for name in ("accuracy", "nll", "brier", "margin"):
        by_group = crossed_interval([values[name] for values in found])
        by_row = crossed_interval([row_values(logits, target)[name] for logits in several])
        assert by_group.mean == pytest.approx(by_row.mean)
        assert by_group.standard_error == pytest.approx(by_row.standard_error, rel=0.35)
    for name in METRICS:
        means = [values[name].mean() for values in found]
        assert means == pytest.approx([each[name] for each in whole])
    assert _pseudo_values(whole[0], several[0][:19], target[:19]) == {}


@pytest.mark.parametrize(
    ("options", "fixed"),
    [
        ({}, False),
        ({"test_split": "once"}, True),
        ({"tune": 3}, True),
        ({"parts": ["test"]}, True),
        ({"parts": ["validation"]}, False),
    ],
)
def test_which_interval(tmp_path: Path, options: dict[str, Any], fixed: bool) -> None:
    folder = write(tmp_path / "out", {"cross-entropy": noisy(1.5, 3)}, **options)
    found = summarize(folder)
    assert found["primary"]["fixed_test"] == fixed
    cell = column(found)["cross-entropy"]
    rows = [row_values(logits, TEST)["nll"] for logits in noisy(1.5, 3)]
    means = np.mean(rows, axis=1)
    own = crossed_interval(rows) if fixed else resplit_interval(means, test_share=SHARE)
    assert (cell["low"], cell["high"]) == pytest.approx((own.low, own.high), rel=1e-5)


@pytest.mark.parametrize("fixed", ["once", "per-seed"])
def test_intervals_are_clipped_to_the_metrics_bounds(tmp_path: Path, fixed: str) -> None:
    right = {"cross-entropy": (118, 120, 114, 120), "focal=0": (119, 120, 120, 113)}
    test = {spec: [with_right(TEST, n) for n in each] for spec, each in right.items()}
    found = summarize(write(tmp_path / "out", test, test_split=fixed))
    for cell in column(found, "accuracy").values():
        assert cell["low"] < cell["mean"] < cell["high"] == 1


@pytest.mark.parametrize("runs", [1, 2])
def test_no_interval_below_three_seeds(tmp_path: Path, runs: int) -> None:
    found = summarize(write(tmp_path / "out", {spec: noisy(1.5, runs) for spec in SPECS[:2]}))
    for cell in column(found).values():
        assert cell["low"] is cell["high"] is None
        assert (cell["n"], cell["sign"], cell["best"]) == (runs, 0, False)
    assert column(found)[SPECS[1]]["difference"]["p"] is None


# ---- better, worse and best ------------------------------------------------------------------

REFERENCE = [0.50, 0.51, 0.49, 0.50]


@pytest.mark.parametrize(
    ("nll", "starred", "signs"),
    [
        # Better than the reference and than the runner-up.
        (([0.40, 0.41, 0.40, 0.39], [0.45, 0.46, 0.45, 0.44]), "label-smoothing=0", (1, 1)),
        # Better than the reference, but not clearly than the runner-up.
        (([0.40, 0.41, 0.40, 0.39], [0.41, 0.39, 0.40, 0.41]), None, (1, 1)),
        # The best mean, but it varies; another one is better than the reference.
        (([0.20, 0.60, 0.15, 0.55], [0.45, 0.46, 0.45, 0.44]), None, (0, 1)),
        # The reference is better than both, or than one.
        (([0.60, 0.61, 0.60, 0.59], [0.70, 0.71, 0.70, 0.69]), "cross-entropy", (-1, -1)),
        (([0.52, 0.49, 0.50, 0.51], [0.70, 0.71, 0.70, 0.69]), None, (0, -1)),
        # Equal.
        ((REFERENCE, REFERENCE), None, (0, 0)),
    ],
)
def test_star(
    tmp_path: Path, nll: tuple[list[float], ...], starred: str | None, signs: tuple[int, int]
) -> None:
    values = {"cross-entropy": REFERENCE} | dict(zip(OTHERS, nll, strict=True))
    found = steady(tmp_path, values)
    assert found["primary"]["starred"] == starred
    assert [cell["sign"] for cell in column(found).values()] == [0, *signs]
    # The star is in the column of the recommendation, and in no other.
    stars = [
        (selection, scaling, name, spec)
        for selection, at in found["summary"].items()
        for scaling, metrics in at.items()
        for name, cells in metrics.items()
        for spec, cell in cells.items()
        if cell["best"]
    ]
    assert stars == ([] if starred is None else [("nll", "link", "nll", starred)])
    # By the same rows Brier scores are as clear, and are coloured.
    assert [cell["sign"] for cell in column(found, "brier").values()] == [0, *signs]


def test_the_primary_column(tmp_path: Path) -> None:
    test = {"cross-entropy": [with_right(TEST, n) for n in (80, 81, 82, 83)]}
    test["focal=0"] = [with_right(TEST, n) for n in (100, 102, 101, 103)]
    folder = write(tmp_path / "out", test)
    primary = summarize(folder)["primary"]
    found = [primary[name] for name in ("metric", "selection", "scaling", "starred")]
    assert found == ["nll", "refined", "scaled", "focal=0"]
    accuracy = summarize(folder, metric="accuracy")
    assert accuracy["primary"]["metric"] == accuracy["config"]["metric"] == "accuracy"
    assert accuracy["summary"]["refined"]["scaled"]["accuracy"]["focal=0"]["best"]
    assert not accuracy["summary"]["refined"]["scaled"]["nll"]["focal=0"]["best"]
    with pytest.raises(CompareError, match="metric: expected one of accuracy, .*, got 'speed'"):
        summarize(folder, metric="speed")


@pytest.mark.parametrize(
    ("gain", "option", "sign"),
    [
        (0.006, None, 1),  # the reference is at 0.5, so 0.005 matter
        (0.004, None, 0),
        (0.004, 0.002, 1),
        (0.004, 0.0, 1),
        (0.0005, 0.0, 0),  # below the last printed digit
        (0.2, 0.3, 0),
    ],
)
def test_differences_that_matter(
    tmp_path: Path, gain: float, option: float | None, sign: int
) -> None:
    ours = [value - gain - 1e-5 * n for n, value in enumerate(REFERENCE)]
    values = {"cross-entropy": REFERENCE, "focal=0": ours}
    found = steady(tmp_path, values, min_difference=option)
    cell = column(found)["focal=0"]
    assert cell["difference"]["p"] < 1e-3
    assert cell["sign"] == sign
    threshold = 0.005 if option is None else max(option, 0.001)
    assert found["primary"]["threshold"] == pytest.approx(threshold, rel=1e-3)
    # The option is in units of the primary metric, and says nothing of the others.
    again = summarize(tmp_path / "out", metric="brier", min_difference=0.5)
    assert column(again)["focal=0"]["sign"] == (1 if gain > 0.005 else 0)
    assert column(again, "brier")["focal=0"]["sign"] == 0


def test_half_a_point_of_accuracy_matters(tmp_path: Path) -> None:
    target = np.arange(3000) % 3
    for gain, sign in ((12, 0), (18, 1)):
        test = {
            "cross-entropy": [with_right(target, n) for n in (2500, 2501, 2502)],
            "focal=0": [with_right(target, n + gain) for n in (2500, 2502, 2501)],
        }
        found = summarize(write(tmp_path / str(gain), test, test_target=target))
        cell = column(found, "accuracy", selection="refined")["focal=0"]
        assert cell["difference"]["p"] < 0.05
        assert cell["sign"] == sign


# ---- runs that are missing or diverged -------------------------------------------------------


def spoil(folder: Path, spec: str, seed: int, *names: str) -> None:
    """Make saved logits those of a run that diverged."""
    where = run_folder(folder, spec, seed)
    arrays = read_logits(where)
    for name in names:
        arrays[name][0, 0] = np.nan
    np.savez(where / "logits.npz", **arrays)


@pytest.mark.parametrize("part", ["test", "validation"])
def test_a_loss_that_diverged_is_not_ranked(tmp_path: Path, part: str) -> None:
    values = {"cross-entropy": REFERENCE, "focal=0": [0.4] * 4, "label-smoothing=0": [0.3] * 4}
    values["focal=0"][0] -= 0.01
    steady(tmp_path, values)
    spoil(tmp_path / "out", "label-smoothing=0", 1, f"{part}_8")
    found = summarize(tmp_path / "out")
    assert found["primary"]["incomplete"] == ["label-smoothing=0"]
    assert found["primary"]["best_group"] == ["focal=0"]
    cell = column(found)["label-smoothing=0"]
    assert (cell["n"], cell["difference"], cell["sign"]) == (3, None, 0)
    assert cell["mean"] == pytest.approx(0.3)
    loss = found["losses"][2]
    assert (loss["diverged"], loss["runs"]) == (1, 4)
    run = next(r for r in found["runs"] if (r["loss"], r["seed"]) == ("label-smoothing=0", 1))
    assert run["test"]["nll"] == dict.fromkeys(SCALINGS)
    assert run["temperature"]["nll"] is None
    assert run["test"][LAST]["link"] is not None
    json.dumps(found, allow_nan=False)


def test_a_loss_that_diverged_after_its_selected_epoch_is_ranked(tmp_path: Path) -> None:
    steady(tmp_path, {"cross-entropy": REFERENCE, "focal=0": [0.4, 0.41, 0.4, 0.39]})
    spoil(tmp_path / "out", "focal=0", 2, "test_20")
    found = summarize(tmp_path / "out")
    assert found["primary"]["starred"] == "focal=0"
    assert found["losses"][1]["diverged"] == 1
    assert column(found, selection=LAST)["focal=0"]["n"] == 3


def test_a_reference_that_diverged_everywhere(tmp_path: Path) -> None:
    steady(tmp_path, {"cross-entropy": REFERENCE, "focal=0": REFERENCE})
    for seed in range(4):
        where = run_folder(tmp_path / "out", "cross-entropy", seed)
        record = read_json(where / "run.json")
        write_json(where / "run.json", record | {"epochs": {LAST: 20}, "validation": {}})
        spoil(tmp_path / "out", "cross-entropy", seed, "test_20")
    found = summarize(tmp_path / "out")
    cell = column(found)["cross-entropy"]
    assert {cell["mean"], cell["low"], cell["high"], cell["difference"]} == {None}
    assert found["losses"][0]["epochs"]["nll"] == [None] * 4
    other = column(found)["focal=0"]
    assert (other["difference"], other["sign"]) == (None, 0)
    assert found["primary"]["best"] == "focal=0"
    assert found["primary"]["starred"] is None


def test_an_unfinished_comparison_uses_the_seeds_in_common(tmp_path: Path) -> None:
    test: dict[str, list[Any]] = {
        "cross-entropy": [with_nll(TEST, v) for v in (0.1, 0.5, 0.6, 0.7, 0.5)],
        "focal=0": [with_nll(TEST, v) for v in (0.9, 0.4, 0.5, 0.6)],
        "penex": [None, None, None, None],
    }
    test["cross-entropy"][3] = None
    found = summarize(write(tmp_path / "out", test, select="nll"))
    assert found["seeds"] == [0, 1, 2]
    assert (len(found["runs"]), found["planned_runs"]) == (8, 15)
    cells = column(found)
    assert [cells[spec]["n"] for spec in test] == [3, 3, 0]
    assert cells["cross-entropy"]["mean"] == pytest.approx(0.4)
    assert cells["focal=0"]["difference"]["mean"] == pytest.approx(0.2)
    assert (found["losses"][2]["runs"], found["losses"][2]["lr"]) == (0, None)


def test_no_seed_in_common(tmp_path: Path) -> None:
    test = {"cross-entropy": [None, with_nll(TEST, 0.5)], "focal=0": [with_nll(TEST, 0.5)]}
    found = summarize(write(tmp_path / "out", test))
    assert found["seeds"] == []
    assert all(cell["mean"] is None for cell in column(found).values())


def test_without_the_reference_nothing_is_marked(tmp_path: Path) -> None:
    found = steady(tmp_path, {"focal=0": REFERENCE, "penex": [0.3, 0.31, 0.3, 0.3]})
    assert found["primary"]["best"] == "penex"
    assert found["primary"]["starred"] is None
    assert all(cell["difference"] is None for cell in column(found).values())


# ---- the rest --------------------------------------------------------------------------------


def test_the_summary_is_plain_json(results: dict[str, Any], tmp_path: Path) -> None:
    write_json(tmp_path / "results.json", results)
    assert read_json(tmp_path / "results.json") == results
    assert results["planned_runs"] == len(results["runs"]) == 16
    assert list(results["summary"]) == list(SELECTIONS)
    for at in results["summary"].values():
        assert {tuple(names) for names in at.values()} == {tuple(METRICS)}
    for loss in results["losses"]:
        assert loss["epochs"] == {name: [epoch] * 4 for name, epoch in EPOCHS.items()}
        assert (loss["lr"], loss["runs"], loss["diverged"]) == (0.001, 4, 0)
    assert [loss["value"] for loss in results["losses"]] == [None, 0, 0, 0.1]


def test_majority_class(tmp_path: Path) -> None:
    """The class frequencies of the training rows, one row added to each class."""
    target = np.array([0] * 50 + [1] * 40 + [2] * 30)
    options = {"test_target": target, "class_counts": (100, 300, 80)}
    test = {"cross-entropy": [calibrated(target, 2, seed) for seed in range(3)]}
    found = summarize(write(tmp_path / "out", test, **options))["baseline"]
    share = np.array([101, 301, 81]) / 483
    assert found["accuracy"] == pytest.approx(40 / 120)
    assert found["balanced_accuracy"] == pytest.approx(1 / 3)
    assert found["nll"] == pytest.approx(log_loss(target, np.tile(share, (120, 1))))
    assert found["auroc"] == pytest.approx(0.5)


def test_the_floor_is_what_calibrated_predictions_have(tmp_path: Path) -> None:
    """These are calibrated, so their smooth ECE is near it; a factor of 3 makes them differ."""
    target = np.arange(3000) % 3
    good = [calibrated(target, 1.5, seed) for seed in range(3)]
    test = {"cross-entropy": good, "focal=0": [3 * logits for logits in good]}
    found = summarize(write(tmp_path / "out", test, test_target=target))
    ours, sharp = (found["summary"]["refined"]["link"]["smooth_ece"][spec]["mean"] for spec in test)
    floors = {run["loss"]: run["floor"]["link"] for run in found["runs"]}
    assert 0.5 < ours / floors["cross-entropy"] < 2
    assert sharp > 5 * floors["focal=0"]


def test_extreme_rows_and_times(tmp_path: Path) -> None:
    nll = np.full(300, 0.2)
    nll[:3] = 40, 30, 20
    target = np.arange(300) % 3
    folder = write(
        tmp_path / "out",
        {"cross-entropy": [with_nll(target, nll)]},
        test_target=target,
        seconds={"cross-entropy": 0.25},
    )
    found = summarize(folder)
    (run,) = found["runs"]
    assert run["extreme_rows"] == {
        "rows": 3,
        "share": pytest.approx(90 / nll.sum(), rel=1e-4),
        "largest": pytest.approx(40, rel=1e-4),
    }
    assert found["seconds_per_epoch"] == {"cross-entropy": 0.25}
    (folder / "timing.json").unlink()
    assert summarize(folder)["seconds_per_epoch"] == {}


def test_nothing_finished(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", {"cross-entropy": [None]})
    with pytest.raises(CompareError, match="has no finished run yet; run penex compare first"):
        summarize(folder)
    with pytest.raises(CompareError, match="holds no comparison"):
        summarize(tmp_path)


# numpy leaves the file of a broken archive to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["run.json", "logits.npz"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "out", {spec: noisy(1.5, 2) for spec in SPECS[:2]})
    path = run_folder(folder, SPECS[1], 1) / name
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(CompareError, match=f"{path} is damaged .*; remove {path.parent} and run"):
        summarize(folder)


def test_curves(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", {"cross-entropy": noisy(1.5, 1)})
    columns = read_curve(run_folder(folder, "cross-entropy", 0))
    assert next(iter(columns)) == "epoch"
    np.testing.assert_array_equal(columns["epoch"], np.arange(1, 21))
    np.testing.assert_allclose(columns["train_nll"], 1 / columns["epoch"], rtol=1e-5)
    path = run_folder(folder, "cross-entropy", 0) / "curve.csv"
    path.write_text("epoch,train_nll\n1,x\n")
    with pytest.raises(CompareError, match=f"{path} is damaged"):
        read_curve(run_folder(folder, "cross-entropy", 0))
