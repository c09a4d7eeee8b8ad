"""Tuning: the same budget for every loss, and the same proposals after a restart."""

import json
import math
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from waiting import GUARD, wait_until

from penex.compare.config import Config, Execution
from penex.compare.data.load import load
from penex.compare.errors import CompareError
from penex.compare.files import read_json
from penex.compare.finished_runs import read_logits
from penex.compare.output_folder import read_comparison, run_folder, trial_folder
from penex.compare.registry import parse_loss
from penex.compare.training.tune import LR_SPAN, Study, open_studies, tune

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


def score(record: dict[str, Any]) -> float:
    """What tuning minimises unless it is told otherwise."""
    return float(record["validation"]["refined"]["refined_nll"])


def rescore(folder: Path, trial: int, value: float | None) -> None:
    """Give a finished trial of PENEX another score; None: it diverged."""
    path = trial_folder(folder, "penex", trial) / "run.json"
    record = read_json(path)
    if value is None:
        record["validation"] = {"last": None}
    else:
        record["validation"]["refined"]["refined_nll"] = value
    path.write_text(json.dumps(record))


@pytest.mark.parametrize("spec", LOSSES)
def test_every_loss_gets_the_same_budget_in_its_range(tuned: Path, spec: str) -> None:
    candidate, records = parse_loss(spec), trials(tuned, spec)
    assert len(records) == 4
    assert {record["seed"] for record in records} == {0}
    # The first trial is what would run without tuning.
    assert records[0]["lr"] == 1e-3
    assert records[0]["knob"] == (None if math.isnan(candidate.untuned) else candidate.untuned)
    rates, values = ([record[name] for record in records] for name in ("lr", "knob"))
    assert all(1e-3 / LR_SPAN <= rate <= 1e-3 * LR_SPAN for rate in rates)
    assert len(set(rates)) == 4
    if spec == "penex=0.3":
        assert values == [0.3] * 4
    elif candidate.loss.knob is not None:
        assert all(candidate.loss.knob.low <= value <= candidate.loss.knob.high for value in values)
        assert len(set(values)) == 4


@pytest.mark.parametrize("spec", LOSSES)
def test_runs_use_the_best_trial(tuned: Path, spec: str) -> None:
    config, _ = read_comparison(tuned)
    records = trials(tuned, spec)
    best = min(records, key=score)
    run = read_json(run_folder(tuned, spec, 0) / "run.json")
    assert (run["lr"], run["knob"]) == (best["lr"], best["knob"])
    # Seed 0 is that of the trials, so the run is the trial.
    assert run["validation"] == best["validation"]
    knob = chosen(tuned, spec, config)["knob"]
    assert knob == best["knob"] or (math.isnan(knob) and best["knob"] is None)


CONFIG = Config(data="iris", epochs=8, hidden=(4,), tune=13)
HERE = Execution()


class Tuning:
    """A process that tunes PENEX until all trials are finished, as one of several may."""

    PROGRAM = """
import signal, sys, time
from pathlib import Path
from penex.compare.training import run as train
from penex.compare.config import Config, Execution
from penex.compare.data.load import load
from penex.compare.training.tune import Study, tune
config, folder = Config.model_validate_json(sys.argv[1]), Path(sys.argv[2])
where, wait = Execution(storage=sys.argv[3] or None), sys.argv[4]
run, seeded = train.run, train._seed
def waiting_run(task, *others):
    def seed(seed, epoch, rank):
        if epoch == 3 and (wait == "any" or task.folder.name == wait):
            print(task.folder.name, flush=True)
            signal.pause()
        seeded(seed, epoch, rank)
    train._seed = seed
    run(task, *others)
train.run = waiting_run
data = load(config)
study = Study(folder, "penex", config, data, where)
print("ready", flush=True)
sys.stdin.readline()
while not study.is_finished():
    tune(folder, "penex", config, data, where, beat=0.5)
    time.sleep(0.2)
"""

    def __init__(
        self, config: Config, folder: Path, storage: str = "", *, wait: str = "never"
    ) -> None:
        """It waits, to be killed, in the middle of the trial `wait`, which may be "any"."""
        self.folder = folder
        arguments = [config.model_dump_json(), str(folder), storage, wait]
        self.popen = subprocess.Popen(
            [sys.executable, "-c", self.PROGRAM, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.guard = threading.Timer(GUARD, self.popen.kill)
        self.guard.start()

    def says(self) -> str:
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline().strip()
        assert line, self.popen.communicate()
        return line

    def go(self) -> None:
        assert self.popen.stdin is not None
        assert self.says() == "ready"
        self.popen.stdin.write("\n")
        self.popen.stdin.flush()

    def kill(self) -> None:
        self.popen.kill()
        self.popen.communicate()
        self.guard.cancel()

    def finish(self) -> None:
        _, err = self.popen.communicate()
        self.guard.cancel()
        assert self.popen.returncode == 0, err
        assert err == ""


def assert_same_trials(one: Path, other: Path, count: int) -> None:
    for number in range(count):
        folders = [trial_folder(folder, "penex", number) for folder in (one, other)]
        a, b = (read_json(folder / "run.json") for folder in folders)
        for name in ("lr", "knob", "epochs", "validation"):
            assert a[name] == b[name], (number, name)
        a, b = (read_logits(folder) for folder in folders)
        assert all(np.array_equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirteen trials of PENEX: beyond TPE's ten random first ones."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    tune(folder, "penex", CONFIG, load(CONFIG), HERE)
    return folder


def test_a_restarted_study_makes_the_same_proposals(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    for trial in ("trial-004", "trial-011"):  # killed in the middle of it
        process = Tuning(CONFIG, folder, wait=trial)
        process.go()
        assert process.says() == trial
        process.kill()
    process = Tuning(CONFIG, folder)
    process.go()
    process.finish()
    assert_same_trials(whole, folder, 13)
    assert len(trials(folder, "penex")) == 13


def test_proposals_depend_on_all_results_before_them(whole: Path, tmp_path: Path) -> None:
    """The last one too, very good or very bad; told by the runs, where the journal is lost."""
    proposals = set()
    for value in (-9.0, 9.0):
        folder = Path(shutil.copytree(whole, tmp_path / str(value)))
        (folder / "tuning" / "study.journal").unlink()
        shutil.rmtree(trial_folder(folder, "penex", 12))
        rescore(folder, 11, value)
        tune(folder, "penex", CONFIG, load(CONFIG), HERE)
        proposals.add(trials(folder, "penex")[12]["lr"])
    assert len(proposals) == 2


def test_without_its_journal_a_study_continues_from_the_runs(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "out"))
    (folder / "tuning" / "study.journal").unlink()
    for number in (11, 12):
        shutil.rmtree(trial_folder(folder, "penex", number))
    kept = trial_folder(folder, "penex", 10).stat()
    tune(folder, "penex", CONFIG, load(CONFIG), HERE)
    assert trial_folder(folder, "penex", 10).stat() == kept
    assert_same_trials(whole, folder, 13)


def test_an_incomplete_line_of_the_journal_is_removed(whole: Path, tmp_path: Path) -> None:
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
    config = CONFIG.model_copy(update={"tune": 4})
    storage = f"{kind}{tmp_path / 'study'}"
    one = Tuning(config, tmp_path / "one", storage, wait="any")
    other = Tuning(config, tmp_path / "other", storage)
    one.go()
    number = int(one.says().removeprefix("trial-"))
    lost = stored(storage)[number]
    other.go()
    wait_until(lambda: list(other.folder.glob("tuning/penex/trial-*")), other.popen)
    one.kill()
    other.finish()
    after, extra = stored(storage)[:4], stored(storage)[4:]
    assert [trial.state.name for trial in after] == ["COMPLETE"] * 4
    # Opened by both at once, a study may hold more than were asked for; nobody takes those.
    assert {trial.state.name for trial in extra} <= {"WAITING"}
    # What the killed one was at was done again, by the other one, with the same parameters.
    assert after[lost.number].params == lost.params
    assert after[lost.number].user_attrs["owner"] != lost.user_attrs["owner"]
    record = read_json(trial_folder(other.folder, "penex", lost.number) / "run.json")
    assert score(record) == after[lost.number].value
    assert len({trial.params["lr"] for trial in after}) == 4


def test_a_study_finished_by_others_is_reused(make: Make, tmp_path: Path) -> None:
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
def test_an_unusable_storage_is_refused(make: Make, url: str, message: str, tmp_path: Path) -> None:
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


SELECTED: dict[str, Callable[[np.ndarray], float]] = {
    "refined": lambda curve: curve["validation_refined_nll"].min(),
    "nll": lambda curve: curve["validation_nll"].min(),
    "accuracy": lambda curve: -curve["validation_accuracy"].max(),
    "last": lambda curve: curve["validation_nll"][-1],
}


@pytest.mark.parametrize("select", SELECTED)
def test_trials_are_scored_at_the_epoch_that_is_selected(
    make: Make, tmp_path: Path, select: str
) -> None:
    options = {"losses": ("penex",), "seeds": 1, "epochs": 3, "tune": 2, "lr": 0.01}
    folder = make(tmp_path / "out", select=select, **options)
    curves = [
        np.genfromtxt(trial_folder(folder, "penex", n) / "curve.csv", delimiter=",", names=True)
        for n in range(2)
    ]
    scores = [trial.value for trial in stored(f"journal://{folder}/tuning/study.journal")]
    assert scores == pytest.approx([SELECTED[select](curve) for curve in curves], rel=1e-5)
    picked = read_json(run_folder(folder, "penex", 0) / "run.json")["lr"]
    assert picked == trials(folder, "penex")[int(np.argmin(scores))]["lr"]


def test_losses_can_be_added_to_a_folder_but_not_trials(make: Make, tmp_path: Path) -> None:
    options = {"seeds": 1, "epochs": 1, "tune": 2}
    folder = make(tmp_path / "out", losses=("penex",), **options)
    before = [record["lr"] for record in trials(folder, "penex")]
    make(folder, losses=("penex", "focal"), **options)
    assert [record["lr"] for record in trials(folder, "penex")] == before
    assert len(trials(folder, "focal")) == 2
    changed = r"tune was 2, is 3; select was 'refined', is 'last'"
    with pytest.raises(CompareError, match=rf"another configuration \({changed}\)"):
        make(folder, losses=("penex",), **(options | {"tune": 3, "select": "last"}))


def test_a_trial_that_diverged_is_not_chosen(tuned: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tuned, tmp_path / "out"))
    config, _ = read_comparison(folder)
    (folder / "tuning" / "study.journal").unlink()
    shutil.rmtree(trial_folder(folder, "penex", 3))
    ranked = sorted(range(3), key=lambda n: score(trials(folder, "penex")[n]))
    rescore(folder, ranked[0], None)
    # The search goes on from it.
    tune(folder, "penex", config, load(config), HERE)
    last = trials(folder, "penex")[3]
    winner = min(trials(folder, "penex")[ranked[1]], last, key=score)
    assert chosen(folder, "penex", config)["lr"] == winner["lr"]


def test_if_all_trials_diverge_the_first_is_used(make: Make, tmp_path: Path) -> None:
    folder = make(tmp_path / "out", losses=("penex",), seeds=1, epochs=1, tune=2, lr=1e30)
    assert [record["validation"] for record in trials(folder, "penex")] == [{"last": None}] * 2
    config, _ = read_comparison(folder)
    assert chosen(folder, "penex", config) == {"lr": 1e30, "knob": 0.1}
    assert np.isnan(read_logits(run_folder(folder, "penex", 0))["test_1"]).any()
