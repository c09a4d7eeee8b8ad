"""Tuning: the same budget for every loss, and the same proposals after a restart."""

import csv
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from penex.compare.config import Config, Execution
from penex.compare.data import load
from penex.compare.errors import CompareError
from penex.compare.registry import contender
from penex.compare.store import read_comparison, read_json, read_logits, run_folder, trial_folder
from penex.compare.tune import LR_SPAN, Study, open_studies, tune

Make = Callable[..., Path]
LOSSES = ("cross-entropy", "label-smoothing", "focal", "penex", "penex=0.3")


@pytest.fixture(scope="module")
def tuned(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four trials for each of five losses."""
    return make(tmp_path_factory.mktemp("tuned") / "out", losses=LOSSES, seeds=1, epochs=2, tune=4)


def chosen(folder: Path, spec: str, config: Config) -> dict[str, float]:
    return Study(folder, spec, config, load(config), HERE).best()


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
    knob = chosen(tuned, spec, config)["knob"]
    assert knob == best["knob"] or (math.isnan(knob) and best["knob"] is None)


CONFIG = Config(data="iris", epochs=30, hidden=(4,), tune=13)
HERE = Execution()


class Tuning:
    """A process that tunes PENEX until all trials are finished, as one of several may."""

    PROGRAM = """
import sys, time
from pathlib import Path
from penex.compare.config import Config, Execution
from penex.compare.data import load
from penex.compare.tune import Study, tune
config, folder = Config.model_validate_json(sys.argv[1]), Path(sys.argv[2])
where = Execution(storage=sys.argv[3] or None)
data = load(config)
print("ready", flush=True)
while not Study(folder, "penex", config, data, where).is_finished():
    tune(folder, "penex", config, data, where, beat=0.5)
    time.sleep(0.2)
"""

    def __init__(self, config: Config, folder: Path, storage: str = "") -> None:
        self.folder = folder
        self.popen = subprocess.Popen(
            [sys.executable, "-c", self.PROGRAM, config.model_dump_json(), folder, storage],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def kill_after(self, found: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not found():
            assert self.popen.poll() is None, self.popen.communicate()
            assert time.monotonic() < end
            time.sleep(0.005)
        self.popen.kill()
        self.popen.communicate()

    def finish(self) -> None:
        _, err = self.popen.communicate(timeout=120)
        assert self.popen.returncode == 0, err
        assert err == ""


def assert_same_trials(one: Path, other: Path, count: int) -> None:
    for number in range(count):
        folders = [trial_folder(folder, "penex", number) for folder in (one, other)]
        a, b = (read_json(folder / "run.json") for folder in folders)
        for name in ("lr", "knob", "validation_nll"):
            assert a[name] == b[name], (number, name)
        a, b = (read_logits(folder) for folder in folders)
        assert all(np.array_equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirteen trials of PENEX: beyond TPE's ten random first ones."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    tune(folder, "penex", CONFIG, load(CONFIG), HERE)
    return folder


def test_killed_and_restarted_it_proposes_what_it_would_have_proposed(
    whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    for number in (3, 10):  # killed somewhere in the trial after that
        done = trial_folder(folder, "penex", number)
        Tuning(CONFIG, folder).kill_after(done.exists)
    assert not trial_folder(folder, "penex", 12).exists()
    Tuning(CONFIG, folder).finish()
    assert_same_trials(whole, folder, 13)
    assert len(trials(folder, "penex")) == 13


def test_proposals_follow_all_results_before_them(whole: Path, tmp_path: Path) -> None:
    """The last one too, very good or very bad; told by the runs, where the journal is lost."""
    proposals = set()
    for score in (-9, 9):
        folder = Path(shutil.copytree(whole, tmp_path / str(score)))
        (folder / "tuning" / "study.journal").unlink()
        shutil.rmtree(trial_folder(folder, "penex", 12))
        path = trial_folder(folder, "penex", 11) / "run.json"
        text = path.read_text()
        path.write_text(text.replace('"validation_nll": ', f'"validation_nll": {score}, "x": '))
        tune(folder, "penex", CONFIG, load(CONFIG), HERE)
        proposals.add(trials(folder, "penex")[12]["lr"])
    assert len(proposals) == 2


def test_without_its_journal_it_goes_on_from_the_runs(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "out"))
    (folder / "tuning" / "study.journal").unlink()
    for number in (11, 12):
        shutil.rmtree(trial_folder(folder, "penex", number))
    kept = trial_folder(folder, "penex", 10).stat()
    tune(folder, "penex", CONFIG, load(CONFIG), HERE)
    assert trial_folder(folder, "penex", 10).stat() == kept
    assert_same_trials(whole, folder, 13)


def test_a_line_half_written_into_the_journal_is_cut_off(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "out"))
    journal = folder / "tuning" / "study.journal"
    content = journal.read_bytes()
    journal.write_bytes(content + b'{"op_code":')
    config = CONFIG.model_copy(update={"losses": ("penex",)})
    (study,) = open_studies(folder, config, load(CONFIG), HERE).values()
    assert study.is_finished()
    lines = journal.read_bytes().removeprefix(content).splitlines()
    assert lines
    assert all(json.loads(line) for line in lines)


# Shared by several processes


def stored(storage: str) -> list[optuna.trial.FrozenTrial]:
    """All trials of the one study in a storage, as Optuna itself reads them."""
    scheme, _, path = storage.partition("://")
    if scheme == "journal":
        backend = optuna.storages.journal.JournalFileBackend(path)
        where: Any = optuna.storages.JournalStorage(backend)
    else:
        where = optuna.storages.RDBStorage(storage)
    (name,) = optuna.study.get_all_study_names(where)
    return optuna.load_study(study_name=name, storage=where).trials


@pytest.mark.parametrize("kind", ["sqlite:///", "journal://"])
def test_two_processes_share_a_study_and_one_is_killed(kind: str, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"epochs": 1000, "tune": 4})
    storage = f"{kind}{tmp_path / 'study'}"
    one, other = (Tuning(config, tmp_path / name, storage) for name in ("one", "other"))
    for process in (one, other):
        assert process.popen.stdout is not None
        process.popen.stdout.readline()
    running: list[optuna.trial.FrozenTrial] = []

    def half_way() -> bool:
        if not list(one.folder.glob("tuning/penex/.partial-*/curve.csv")):
            return False
        running[:] = [
            trial
            for trial in stored(storage)
            if str(one.folder) in trial.user_attrs.get("owner", "")
            and trial.state.name == "RUNNING"
            and len(trial.params) == 2
        ]
        return bool(running)

    one.kill_after(half_way)
    other.finish()
    after, extra = stored(storage)[:4], stored(storage)[4:]
    assert [trial.state.name for trial in after] == ["COMPLETE"] * 4
    # Opened by both at once, a study may hold more than were asked for; nobody takes those.
    assert {trial.state.name for trial in extra} <= {"WAITING"}
    # What the killed one was at was done again, by the other one, with the same parameters.
    (lost,) = running
    assert after[lost.number].params == lost.params
    assert str(other.folder) in after[lost.number].user_attrs["owner"]
    record = read_json(trial_folder(other.folder, "penex", lost.number) / "run.json")
    assert record["validation_nll"] == after[lost.number].value
    assert len({trial.params["lr"] for trial in after}) == 4


def test_a_study_that_others_have_finished_is_used_as_it_is(make: Make, tmp_path: Path) -> None:
    shared = Execution(storage=f"sqlite:///{tmp_path / 'study.db'}")
    options: dict[str, Any] = {"losses": ("penex",), "seeds": 1, "epochs": 2, "tune": 3}
    one = make(tmp_path / "one", shared, **options)
    other = make(tmp_path / "other", shared, **options)
    assert len(trials(one, "penex")) == 3
    assert not (other / "tuning").exists()
    a, b = (read_json(run_folder(folder, "penex", 0) / "run.json") for folder in (one, other))
    assert (a["lr"], a["knob"]) == (b["lr"], b["knob"])
    # Other settings have a study of their own in it.
    third = make(tmp_path / "third", shared, **(options | {"epochs": 1}))
    assert len(trials(third, "penex")) == 3


def test_several_trials_of_a_loss_at_a_time(make: Make, tmp_path: Path) -> None:
    options: dict[str, Any] = {"losses": ("penex",), "seeds": 1, "epochs": 2, "tune": 5}
    folder = make(tmp_path / "out", Execution(jobs=2, tune_jobs=2), **options)
    assert len(trials(folder, "penex")) == 5
    assert len({record["lr"] for record in trials(folder, "penex")}) == 5


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql://me:secret@localhost:1/db", r"storage: cannot open postgresql://…@localhost"),
        ("nothing", "storage: cannot open nothing: "),
        ("sqlite:////absent/folder/study.db", "storage: cannot open sqlite:////absent"),
    ],
)
def test_a_storage_that_cannot_be_opened(
    make: Make, url: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CompareError, match=message) as refusal:
        make(tmp_path / "out", Execution(storage=url), tune=1)
    assert "secret" not in str(refusal.value)


# What is tuned


def test_without_the_learning_rate_only_the_knob_is_tuned(make: Make, tmp_path: Path) -> None:
    folder = make(tmp_path / "out", seeds=1, epochs=1, tune=2, tune_lr=False)
    assert {record["lr"] for record in trials(folder, "penex")} == {1e-3}
    assert len({record["knob"] for record in trials(folder, "penex")}) == 2
    # Cross-entropy then has nothing to tune.
    assert not (folder / "tuning" / "cross-entropy").exists()
    assert read_json(run_folder(folder, "cross-entropy", 0) / "run.json")["lr"] == 1e-3


def test_a_loss_is_tuned_around_its_own_learning_rate(make: Make, tmp_path: Path) -> None:
    options = {"losses": ("penex",), "lr_of": {"penex": 0.5}, "seeds": 1, "epochs": 1, "tune": 3}
    records = trials(make(tmp_path / "out", **options), "penex")
    assert records[0]["lr"] == 0.5
    assert all(0.5 / LR_SPAN <= record["lr"] <= 0.5 * LR_SPAN for record in records)


def test_the_last_epoch_may_decide(make: Make, tmp_path: Path) -> None:
    """Where the best epoch of one trial is better and the last one worse than another trial's."""
    options = {"losses": ("penex",), "seeds": 1, "epochs": 3, "tune": 2, "lr": 0.01}
    folder = make(tmp_path / "out", tune_at="last", **options)
    scores = []
    for number in range(2):
        with (trial_folder(folder, "penex", number) / "curve.csv").open() as stream:
            scores.append([float(line["validation_nll"]) for line in csv.DictReader(stream)][-1])
    picked = read_json(run_folder(folder, "penex", 0) / "run.json")["lr"]
    assert picked == trials(folder, "penex")[int(np.argmin(scores))]["lr"]
    stored_scores = [trial.value for trial in stored(f"journal://{folder}/tuning/study.journal")]
    assert stored_scores == scores


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
    (folder / "tuning" / "study.journal").unlink()
    shutil.rmtree(trial_folder(folder, "penex", 3))
    ranked = sorted(range(3), key=lambda n: trials(folder, "penex")[n]["validation_nll"])
    path = trial_folder(folder, "penex", ranked[0]) / "run.json"
    path.write_text(path.read_text().replace('"validation_nll": ', '"validation_nll": null, "x": '))
    # The search goes on from it.
    tune(folder, "penex", config, load(config), HERE)
    last = trials(folder, "penex")[3]
    assert last["validation_nll"] is not None
    rivals = [trials(folder, "penex")[ranked[1]], last]
    winner = min(rivals, key=lambda record: record["validation_nll"])
    assert chosen(folder, "penex", config)["lr"] == winner["lr"]


def test_where_all_trials_diverge_the_first_one_is_kept(make: Make, tmp_path: Path) -> None:
    folder = make(tmp_path / "out", losses=("penex",), seeds=1, epochs=1, tune=2, lr=1e30)
    assert [record["validation_nll"] for record in trials(folder, "penex")] == [None, None]
    config, _ = read_comparison(folder)
    assert chosen(folder, "penex", config) == {"lr": 1e30, "knob": 0.1}
    assert np.isnan(read_logits(run_folder(folder, "penex", 0))["test_last"]).any()
