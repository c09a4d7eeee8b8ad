"""The recommendation and the warnings for results constructed to trigger them."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import EPOCHS, TEST, VERSIONS, calibrated, with_nll, with_right, write

from penex.compare.analysis.statistics import resplit_interval
from penex.compare.analysis.summary import summarize
from penex.compare.analysis.verdict import (
    recommendation,
    settings,
    signed,
    smallest_difference,
    versions,
    warnings,
)
from penex.compare.finished_runs import read_logits
from penex.compare.output_folder import run_folder
from penex.compare.registry import LOSSES
from penex.metrics import METRICS

REFERENCE = [0.50, 0.51, 0.49, 0.50]
EARLY = {"refined": 8, "nll": 8, "accuracy": 6, "last": 20}


def steady(tmp_path: Path, nll: dict[str, list[Any]], **options: Any) -> dict[str, Any]:
    """Results where all rows of a run have the same NLL; None for a run that is missing."""
    test = {
        spec: [None if value is None else with_nll(TEST, value) for value in values]
        for spec, values in nll.items()
    }
    return summarize(write(tmp_path / "out", test, **({"select": "nll"} | options)))


def said(tmp_path: Path, nll: dict[str, list[Any]], **options: Any) -> str:
    return recommendation(steady(tmp_path, {"cross-entropy": REFERENCE} | nll, **options))


# ---- recommendation --------------------------------------------------------------------------


def test_switch(tmp_path: Path) -> None:
    ours = [0.40, 0.42, 0.39, 0.40]
    interval = resplit_interval(np.subtract(ours, REFERENCE), test_share=0.25)
    low, high = (f"−{-end:.3f}" for end in (interval.low or 0, interval.high or 0))
    assert said(tmp_path, {"penex": ours, "focal=0": [0.6, 0.61, 0.6, 0.59]}) == (
        "Train with PENEX (α = 0.1, lr = 0.001): test NLL 0.403 instead of 0.500 (difference "
        f"−0.097, 95 % interval [{low}, {high}], adjusted p < 0.001). Use the epoch with the "
        "lowest validation NLL (here about 8 of 20)."
    )


def test_switch_with_others_that_are_as_good(tmp_path: Path) -> None:
    values = {
        "penex": [0.40, 0.42, 0.39, 0.40],
        "focal=0": [0.41, 0.40, 0.40, 0.42],
        "label-smoothing=0": [0.46, 0.47, 0.45, 0.46],
    }
    text = said(tmp_path, values, lr_of={"penex": 0.003})
    assert text.startswith("Train with PENEX (α = 0.1, lr = 0.003): ")
    assert "The difference between it and focal γ=0 is not significant." in text
    assert "Also better than cross-entropy: label smoothing ε=0." in text


def test_consider(tmp_path: Path) -> None:
    """The best mean varies; another loss is better than cross-entropy for sure."""
    values = {"penex": [0.1, 0.6, 0.15, 0.55], "focal=0": [0.45, 0.46, 0.45, 0.44]}
    text = said(tmp_path, values)
    assert text.startswith("Consider focal γ=0 (lr = 0.001): test NLL 0.450 instead of 0.500")
    assert "PENEX has the best mean, 0.350, but its difference from cross-entropy is not" in text


def test_keep(tmp_path: Path) -> None:
    text = said(tmp_path, {"penex": [0.3, 0.7, 0.2, 0.75], "focal=0": [0.6, 0.61, 0.6, 0.59]})
    assert text.startswith(
        "Keep cross-entropy (lr = 0.001): no loss improves the test NLL significantly and by at "
        "least 0.005 (PENEX: test NLL 0.487 instead of 0.500 (difference "
    )


def test_keep_where_others_are_worse(tmp_path: Path) -> None:
    worse = {"penex": [0.7, 0.71, 0.7, 0.69], "focal=0": [0.6, 0.61, 0.6, 0.59]}
    text = said(tmp_path / "a", worse)
    assert "Keep cross-entropy (lr = 0.001): every other loss has a significantly worse" in text
    del worse["focal=0"]
    assert ": PENEX has a significantly worse test NLL. " in said(tmp_path / "b", worse)


def test_no_reference(tmp_path: Path) -> None:
    found = steady(tmp_path, {"penex": [0.4] * 3, "focal=0": [0.5] * 3})
    assert recommendation(found) == (
        "No recommendation: cross-entropy, the loss that the others are compared with, is not part "
        "of this comparison. PENEX has the best test NLL: 0.400."
    )


def test_one_loss(tmp_path: Path) -> None:
    found = steady(tmp_path, {"cross-entropy": REFERENCE})
    assert recommendation(found) == "No recommendation: cross-entropy is the only loss."


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_seeds(tmp_path: Path, seeds: int) -> None:
    found = steady(tmp_path, {"cross-entropy": [0.5] * seeds, "penex": [0.4] * seeds})
    assert recommendation(found) == (
        f"No recommendation yet: the losses have {seeds} seed{'s' * (seeds > 1)} in common, and a "
        "confidence interval needs at least 3. PENEX has the best test NLL: 0.400."
    )


@pytest.mark.parametrize(
    ("reference", "other", "start"),
    [
        ([0.5] * 5, [None] * 5, "No recommendation yet: no run of any other loss has finished."),
        ([None] * 5, [0.5] * 5, "No recommendation yet: no run of cross-entropy has finished."),
        ([None, 0.5], [0.4, None], "No recommendation yet: the losses have 0 seeds in common"),
        ([0.5, 0.5, 0.5], [0.4, None, None], "No recommendation yet: the losses have 1 seed in "),
        ([0.5, 0.51, 0.49, 0.5], [0.4, 0.41, 0.4, None], "Train with PENEX"),
    ],
)
def test_unfinished(tmp_path: Path, reference: list[Any], other: list[Any], start: str) -> None:
    found = steady(tmp_path, {"cross-entropy": reference, "penex": other})
    text = recommendation(found)
    assert text.startswith(start)
    assert "diverged" not in text
    done, planned = len(found["runs"]), found["planned_runs"]
    missing = ", ".join(
        f"{label} (seed {seed})"
        for seed in range(len(reference))
        for label, values in (("Cross-entropy", reference), ("PENEX", other))
        if values[seed] is None
    )
    assert warnings(found)[0] == (
        f"Unfinished: {done} of {planned} runs have finished. The recommendation may change. "
        f"Missing: {missing}."
    )


def spoil(folder: Path, spec: str, seed: int, epoch: int) -> None:
    where = run_folder(folder, spec, seed)
    arrays = read_logits(where)
    arrays[f"test_{epoch}"][0] = np.nan
    np.savez(where / "logits.npz", **arrays)


def test_divergence(tmp_path: Path) -> None:
    values = {"cross-entropy": REFERENCE, "penex": [0.4] * 4, "focal=0": [0.6, 0.61, 0.6, 0.59]}
    steady(tmp_path, values)
    folder = tmp_path / "out"
    spoil(folder, "penex", 1, 8)
    found = summarize(folder)
    assert recommendation(found).startswith("Keep cross-entropy (lr = 0.001): focal γ=0 has a sig")
    assert "PENEX: 1 of 4 runs diverged, so it is not ranked. Lower its learning rate." in warnings(
        found
    )
    spoil(folder, "focal=0", 1, 8)
    assert ": every other loss diverged in some runs. " in recommendation(summarize(folder))
    spoil(folder, "cross-entropy", 1, 8)
    found = summarize(folder)
    assert recommendation(found) == (
        "No recommendation: cross-entropy, the loss that the others are compared with, diverged in "
        "some runs. Lower its learning rate and run the comparison again."
    )
    assert any(text.startswith("Cross-entropy: 1 of 4 runs diverged") for text in warnings(found))


def test_divergence_after_the_selected_epoch(tmp_path: Path) -> None:
    steady(tmp_path, {"cross-entropy": REFERENCE, "penex": [0.40, 0.42, 0.39, 0.40]})
    spoil(tmp_path / "out", "penex", 1, 20)
    found = summarize(tmp_path / "out")
    assert recommendation(found).startswith("Train with PENEX")
    assert "PENEX: 1 of 4 runs diverged. Lower its learning rate." in warnings(found)


@pytest.mark.parametrize(
    ("select", "end"),
    [
        (
            "refined",
            "Use the epoch with the lowest validation NLL after temperature scaling (here about 8 "
            "of 20), and apply temperature scaling.",
        ),
        ("nll", "Use the epoch with the lowest validation NLL (here about 8 of 20)."),
        ("accuracy", "Use the epoch with the highest validation accuracy (here about 6 of 20)."),
        ("last", "Train for 20 epochs."),
    ],
)
def test_how_to_stop(tmp_path: Path, select: str, end: str) -> None:
    text = said(tmp_path, {"penex": [0.3, 0.31, 0.3, 0.3]}, select=select)
    assert text.endswith(end)
    assert ("test NLL after temperature scaling " in text) == (select == "refined")


def test_late_epochs(tmp_path: Path) -> None:
    late = {"penex": EARLY | {"nll": 19}}
    text = said(tmp_path, {"penex": [0.3, 0.31, 0.3, 0.3]}, epochs=late)
    assert text.endswith("Train for 20 epochs or more: the best epoch is at the end of training.")


@pytest.mark.parametrize(
    ("metric", "shown", "least"),
    [
        (
            "accuracy",
            "test accuracy 85.0 % instead of 70.0 % (difference +15.0 points, 95 % interval [+",
            "0.5 points",
        ),
        ("macro_f1", "test macro-F1 ", "0.5 points"),
        ("brier", "test Brier score after temperature scaling ", "0.0"),
        ("aurc", "test AURC after temperature scaling ", "0.0"),
    ],
)
def test_other_metrics(tmp_path: Path, metric: str, shown: str, least: str) -> None:
    test = {
        "cross-entropy": [with_right(TEST, n) for n in (84, 83, 85, 84)],
        "penex": [with_right(TEST, n) for n in (102, 101, 102, 103)],
    }
    found = summarize(write(tmp_path / "out", test, metric=metric))
    assert shown in recommendation(found)
    assert smallest_difference(found).startswith(least)
    wide = summarize(tmp_path / "out", min_difference=0.9)
    assert recommendation(wide).startswith("Keep cross-entropy")
    assert smallest_difference(wide) == ("90 points" if METRICS[metric].percent else "0.9")


def test_labels_in_sentences(tmp_path: Path) -> None:
    specs = ["cross-entropy", *(name for name in LOSSES if name not in ("cross-entropy", "penex"))]
    test = {spec: [with_nll(TEST, 0.5)] for spec in specs}
    found = summarize(write(tmp_path / "out", test))
    for loss, spec in zip(found["losses"][1:], specs[1:], strict=True):
        one = copy.deepcopy(found)
        one["primary"]["best"] = spec
        one["seeds"] = [0]
        name = loss["label"]
        text = recommendation(one)
        first = name if name.startswith(("log-", "z-")) else name[0].upper() + name[1:]
        assert f"needs at least 3. {first} has the best" in text


def test_settings() -> None:
    loss = {"spec": "penex", "symbol": "α", "value": 0.123456, "lr": 0.00123456}
    assert settings(loss) == "α = 0.123, lr = 0.00123"
    assert settings(loss | {"spec": "penex=0.123456"}) == "lr = 0.00123"  # its label has it
    assert settings(loss | {"value": None}) == "lr = 0.00123"
    assert settings(loss | {"value": None, "lr": None}) == ""


def test_signed() -> None:
    nll, accuracy = METRICS["nll"], METRICS["accuracy"]
    assert [signed(nll, x) for x in (0.01, -0.01, 0.0004, -0.0004)] == [
        "+0.010",
        "−0.010",
        "0.000",
        "0.000",
    ]
    assert [signed(accuracy, x) for x in (0.01, -0.0004)] == ["+1.0", "0.0"]


# ---- warnings --------------------------------------------------------------------------------


def healthy(**options: Any) -> dict[str, Any]:
    test = {
        spec: [calibrated(TEST, 1.5, 10 * place + seed) for seed in range(3)]
        for place, spec in enumerate(("cross-entropy", "penex"))
    }
    return {"test": test} | options


def test_no_warnings(tmp_path: Path) -> None:
    assert warnings(summarize(write(tmp_path / "out", **healthy()))) == []


FEW = np.arange(199) % 3
MAJORITY = np.array([0] * 110 + [1] * 6 + [2] * 4)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"epochs": {"cross-entropy": EPOCHS | {"refined": 19}}},
            "Cross-entropy: in most runs the best epoch is at the end of training. Train longer "
            "(--epochs) before you compare.",
        ),
        (
            {"epochs": dict.fromkeys(("cross-entropy", "penex"), EPOCHS | {"refined": 20})},
            "Cross-entropy and PENEX: in most runs the best epoch is at the end of training. Train "
            "longer (--epochs) before you compare.",
        ),
        (
            {
                "validation_target": FEW,
                "validation": {
                    spec: [calibrated(FEW, 2, seed) for seed in range(3)]
                    for spec in ("cross-entropy", "penex")
                },
            },
            "Only 199 validation rows. With fewer than 200, the selected epochs and temperatures "
            "are unreliable.",
        ),
        (
            {
                "test_target": MAJORITY,
                "class_counts": (440, 24, 16),
                "test": {
                    spec: [np.tile([3.0, 0.0, -0.3], (120, 1))] * 3
                    for spec in ("cross-entropy", "penex")
                },
            },
            "The best accuracy (91.7 %) is hardly above that of always predicting the majority "
            "class (91.7 %). Look at balanced accuracy and macro-F1.",
        ),
        (
            {"versions": {("penex", 1): VERSIONS | {"torch": "1.0", "python": "3.12.0"}}},
            "Runs were made in different environments; they differ in python and torch (see "
            "Versions in the report).",
        ),
    ],
)
def test_warning(tmp_path: Path, options: dict[str, Any], expected: str) -> None:
    assert warnings(summarize(write(tmp_path / "out", **healthy() | options))) == [expected]


def test_late_epochs_of_the_published_protocol(tmp_path: Path) -> None:
    """The last epoch is always at the end; what counts is which one is the best."""
    late = {"penex": EPOCHS | {"refined": 20}}
    found = summarize(write(tmp_path / "a", **healthy(select="last", epochs=late)))
    assert [text[:6] for text in warnings(found)] == ["PENEX:"]
    assert warnings(summarize(write(tmp_path / "b", **healthy(select="last")))) == []


@pytest.mark.parametrize("factor", [10.0, 0.1])
def test_temperatures(tmp_path: Path, factor: float) -> None:
    target = np.arange(240) % 3
    sharp = [factor * calibrated(target, 2, seed) for seed in range(3)]
    test = healthy()["test"] | {"penex": [factor * logits for logits in healthy()["test"]["penex"]]}
    (text,) = (
        text
        for text in warnings(summarize(write(tmp_path / "out", test, validation={"penex": sharp})))
        if "temperature" in text
    )
    assert text.startswith(
        "PENEX: in 3 of 3 runs the fitted temperature is outside 0.2 to 5 (the most extreme is "
    )
    assert float(text.split("is ")[-1].split(")")[0]) == pytest.approx(factor, rel=0.35)


def test_extreme_rows(tmp_path: Path) -> None:
    target = np.arange(300) % 3
    test = {
        spec: [calibrated(target, 1.5, 10 * place + seed) for seed in range(3)]
        for place, spec in enumerate(("cross-entropy", "penex"))
    }
    nll = np.full(300, 0.3)
    nll[:2] = 500, 400
    test["penex"][1] = with_nll(target, nll)
    found = summarize(write(tmp_path / "out", test, test_target=target))
    assert warnings(found) == [
        "PENEX: in 1 of 3 runs a few test rows make up most of the NLL (in one run 3 rows 91 % of "
        "it; the largest NLL of a row is 500). Look for outliers in the features of these rows."
    ]
    # Rows that are merely wrong with confidence do not count, as in a nearly perfect classifier.
    nll[:2] = 20
    nll[2:] = 1e-4
    test["penex"][1] = with_nll(target, nll)
    assert warnings(summarize(write(tmp_path / "mild", test, test_target=target))) == []


def test_versions(tmp_path: Path) -> None:
    changed = {("penex", 1): VERSIONS | {"torch": "1.0"}}
    found = versions(summarize(write(tmp_path / "out", **healthy(versions=changed))))
    assert found == {"python": ["3.11.0"], "penex": ["0.1.0"], "torch": ["1.0", "2.13.0"]}
