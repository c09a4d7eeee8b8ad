"""Tuning: the same budget for every loss, and the same proposals after a restart."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penex.compare.config import Config, configure
from penex.compare.data import load
from penex.compare.registry import contender
from penex.compare.store import read_comparison, read_json, read_logits, run_folder, trial_folder
from penex.compare.tune import LR_SPAN, best_trial, tune

Make = Callable[..., Path]
LOSSES = ("cross-entropy", "label-smoothing", "focal", "penex", "penex=0.3")


@pytest.fixture(scope="module")
def tuned(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four trials for each of five losses."""
    return make(tmp_path_factory.mktemp("tuned") / "out", losses=LOSSES, seeds=1, epochs=2, tune=4)


def trials(folder: Path, spec: str) -> list[dict[str, Any]]:
    count = len(list((folder / "tuning" / spec).iterdir()))
    return [read_json(trial_folder(folder, spec, n) / "run.json") for n in range(count)]


@pytest.mark.parametrize("spec", LOSSES)
def test_every_loss_gets_the_same_budget_in_its_range(tuned: Path, spec: str) -> None:
    who, records = contender(spec), trials(tuned, spec)
    assert len(records) == 4
    assert {record["seed"] for record in records} == {0}
    # The first trial is what would run without tuning.
    assert records[0]["lr"] == 1e-3
    assert records[0]["knob"] == (None if math.isnan(who.untuned) else who.untuned)
    rates, values = ([record[name] for record in records] for name in ("lr", "knob"))
    assert all(1e-3 / LR_SPAN <= rate <= 1e-3 * LR_SPAN for rate in rates)
    assert len(set(rates)) == 4
    if spec == "penex=0.3":
        assert values == [0.3] * 4
    elif who.loss.knob is not None:
        assert all(who.loss.knob.low <= value <= who.loss.knob.high for value in values)
        assert len(set(values)) == 4


@pytest.mark.parametrize("spec", LOSSES)
def test_the_best_trial_makes_the_runs(tuned: Path, spec: str) -> None:
    config, _ = read_comparison(tuned)
    records = trials(tuned, spec)
    best = min(records, key=lambda record: record["validation_nll"])
    run = read_json(run_folder(tuned, spec, 0) / "run.json")
    assert (run["lr"], run["knob"]) == (best["lr"], best["knob"])
    # Seed 0 is that of the trials, so the run is the trial.
    assert run["validation_nll"] == best["validation_nll"]
    knob = best_trial(tuned, spec, config)["knob"]
    assert knob == best["knob"] or (math.isnan(knob) and best["knob"] is None)


def test_a_restart_proposes_what_would_have_been_proposed(tmp_path: Path) -> None:
    """Also beyond TPE's ten random first trials, where proposals depend on all results so far."""
    config = Config(data="iris", epochs=1, hidden=(4,), tune=13)
    dataset = load("iris")
    whole, restarted = tmp_path / "whole", tmp_path / "restarted"
    tune(whole, "penex", config, dataset)
    shutil.copytree(whole, restarted)
    for number in (5, 11, 12):
        shutil.rmtree(trial_folder(restarted, "penex", number))
    kept = trial_folder(restarted, "penex", 10).stat()
    tune(restarted, "penex", config, dataset)
    assert trial_folder(restarted, "penex", 10).stat() == kept
    for number in range(13):
        folders = [trial_folder(folder, "penex", number) for folder in (whole, restarted)]
        one, other = (read_json(folder / "run.json") for folder in folders)
        assert [one[name] for name in ("lr", "knob", "validation_nll")] == [
            other[name] for name in ("lr", "knob", "validation_nll")
        ]
        one, other = (read_logits(folder) for folder in folders)
        assert all(np.array_equal(one[name], other[name]) for name in one)
    # A proposal takes all trials before it into account, the last one too: very good or very bad.
    path = trial_folder(restarted, "penex", 11) / "run.json"
    text, proposals = path.read_text(), set()
    for score in (-9, 9):
        path.write_text(text.replace('"validation_nll": ', f'"validation_nll": {score}, "x": '))
        shutil.rmtree(trial_folder(restarted, "penex", 12))
        tune(restarted, "penex", config, dataset)
        proposals.add(trials(restarted, "penex")[12]["lr"])
    assert len(proposals) == 2


def test_more_trials_are_another_configuration_but_more_losses_are_not(
    make: Make, tmp_path: Path
) -> None:
    options = {"seeds": 1, "epochs": 1, "tune": 2}
    folder = make(tmp_path / "out", losses=("penex",), **options)
    before = [record["lr"] for record in trials(folder, "penex")]
    make(folder, losses=("penex", "focal"), **options)
    assert [record["lr"] for record in trials(folder, "penex")] == before
    assert len(trials(folder, "focal")) == 2


def test_a_trial_that_diverged_is_not_chosen(tuned: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tuned, tmp_path / "out"))
    config, _ = read_comparison(folder)
    ranked = sorted(range(4), key=lambda n: trials(folder, "penex")[n]["validation_nll"])
    path = trial_folder(folder, "penex", ranked[0]) / "run.json"
    path.write_text(path.read_text().replace('"validation_nll": ', '"validation_nll": null, "x": '))
    assert best_trial(folder, "penex", config)["lr"] == trials(folder, "penex")[ranked[1]]["lr"]
    # And the search goes on from it.
    shutil.rmtree(trial_folder(folder, "penex", 3))
    tune(folder, "penex", config, load("iris"))
    assert trials(folder, "penex")[3]["validation_nll"] is not None


def test_where_all_trials_diverge_the_first_one_is_kept(make: Make, tmp_path: Path) -> None:
    config = configure(data="iris", losses=("penex",), seeds=1, epochs=1, tune=2, lr=1e30)
    folder = make(tmp_path / "out", losses=("penex",), seeds=1, epochs=1, tune=2, lr=1e30)
    assert [record["validation_nll"] for record in trials(folder, "penex")] == [None, None]
    assert best_trial(folder, "penex", config) == {"lr": 1e30, "knob": 0.1}
    assert np.isnan(read_logits(run_folder(folder, "penex", 0))["test_last"]).any()
