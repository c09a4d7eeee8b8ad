"""Tuning with the same budget for every loss: its learning rate and its one knob, by TPE.

All trials of a study are created at the start, numbered and waiting. The storage assigns each trial
to one process; if that process dies, the trial waits again and keeps its parameters. The parameters
proposed for trial n depend only on n and on the results so far, in the order of their numbers. So
several processes can share a study, and a single process proposes the same parameters after a
restart as without one.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import random
import re
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import optuna
from filelock import FileLock
from optuna.distributions import FloatDistribution
from optuna.exceptions import ExperimentalWarning, OptunaError, UpdateFinishedTrialError
from optuna.samplers import TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DBAPIError

from penex.compare.config import Config, Execution, Task
from penex.compare.data.load import Dataset
from penex.compare.errors import CompareError
from penex.compare.finished_runs import read_record
from penex.compare.output_folder import trial_folder
from penex.compare.registry import parse_loss
from penex.compare.training.distributed import on_rank_zero

LR_SPAN = 30.0
"""The learning rate is searched from `lr` / LR_SPAN to `lr` * LR_SPAN."""
HEARTBEAT_SECONDS = 15.0
"""Seconds between two heartbeats of a trial in a shared study."""
ATTEMPTS = 5
"""Attempts to open a database: of processes that create its tables at once, only one succeeds."""
MISSED = 6
"""Missed heartbeats after which a trial is considered dead."""


@dataclass(frozen=True)
class Trial:
    """A trial that this process has taken."""

    key: int
    """The storage's identifier of the trial."""
    task: Task


class Study:
    """The trials of one loss, `config.tune` of them, in any storage.

    Args:
        folder: The output folder.
        spec: The loss.
        config: The number of trials and the settings that define the search space.
        dataset: The data, by which a storage also distinguishes comparisons.
        execution: Names the storage.
        worker: Index of this process among those of this command that tune this loss.
        beat: Seconds between two heartbeats.

    Raises:
        CompareError: The storage cannot be opened.
    """

    def __init__(
        self,
        folder: Path,
        spec: str,
        config: Config,
        dataset: Dataset,
        execution: Execution,
        *,
        worker: int = 0,
        beat: float = HEARTBEAT_SECONDS,
    ) -> None:
        self.folder, self.spec, self.config, self.beat = folder, spec, config, beat
        self.space = _space(spec, config)
        self.trials = config.tune
        self.alone = execution.storage is None and execution.tune_jobs == 1
        # A digest: neither the machine's name nor a path goes into a file that may be shared.
        owner = f"{platform.node()}:{folder.absolute()}:{worker}"
        self.owner = hashlib.sha256(owner.encode()).hexdigest()
        self.storage = _storage(folder, execution.storage)
        facts = json.dumps(
            [config.fixed(), config.lr_for(spec), dataset.fingerprint], sort_keys=True
        )
        self.name = f"penex {spec} {hashlib.sha256(facts.encode()).hexdigest()[:12]}"
        study = optuna.create_study(storage=self.storage, study_name=self.name, load_if_exists=True)
        self.id = self.storage.get_study_id_from_name(self.name)
        # Two processes that start at the same time may create too many; the excess is never taken.
        for _ in range(self.storage.get_n_trials(self.id), self.trials):
            study.enqueue_trial({})

    def take(self) -> Trial | None:
        """Take the next waiting trial for this process; None if none is waiting."""
        for waiting in self._in(TrialState.WAITING):
            key = self._key(waiting)
            with contextlib.suppress(UpdateFinishedTrialError):
                if self.storage.set_trial_state_values(key, TrialState.RUNNING):
                    self.storage.set_trial_user_attr(key, "owner", self.owner)
                    return Trial(key, self._propose(waiting, key))
        return None

    def tell(self, trial: Trial) -> None:
        """Record the score of a trial whose run is finished."""
        score = _score(trial.task.folder, self.config)
        with contextlib.suppress(UpdateFinishedTrialError):  # by another process; the same score
            self.storage.set_trial_state_values(trial.key, TrialState.COMPLETE, [score])

    def give_back(self, key: int) -> None:
        """Return an unfinished trial to the waiting ones; it keeps its parameters."""
        with contextlib.suppress(UpdateFinishedTrialError):
            self.storage.set_trial_state_values(key, TrialState.WAITING)

    def reclaim(self, *, own: bool) -> None:
        """Return trials whose process is dead to the waiting ones.

        Args:
            own: Whether to include the trials of this process's predecessor, which is known to be
                dead.
        """
        for running in self._in(TrialState.RUNNING):
            mine = self.alone or running.user_attrs.get("owner") == self.owner
            if (own and mine) or self._silent(running):
                self.give_back(self._key(running))

    @contextlib.contextmanager
    def alive(self, key: int) -> Iterator[None]:
        """Send heartbeats for a trial, unless no other process uses the study."""
        if self.alone:
            yield
            return
        over = threading.Event()

        def beat() -> None:
            while not over.is_set():
                # A storage that fails here will also fail, and raise, when the score is recorded.
                with contextlib.suppress(OptunaError, OSError):
                    self.storage.set_trial_user_attr(key, "alive", time.time())
                over.wait(self.beat)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def is_finished(self) -> bool:
        """Whether all trials are finished."""
        return len(self._in(TrialState.COMPLETE)) == self.trials

    def best(self) -> dict[str, float]:
        """`lr` and `knob` of the best trial, or of the first if all diverged."""
        best = min(self._in(TrialState.COMPLETE), key=lambda trial: (trial.value, trial.number))
        return self._untuned() | best.params

    def _propose(self, waiting: FrozenTrial, key: int) -> Task:
        """The task of a trial, with earlier parameters, those of its run on disk, or new ones."""
        done = trial_folder(self.folder, self.spec, waiting.number)
        values = self._untuned()
        known = None
        if done.exists():
            known = read_record(done)
        elif waiting.number == 0:  # so that tuning can only improve the score
            known = values
        for name, span in self.space.items():
            if known is not None and name not in waiting.params:
                self.storage.set_trial_param(key, name, known[name], span)
        with _stable():
            sampler = TPESampler(seed=waiting.number, multivariate=True, constant_liar=True)
        # Loaded again, because a study caches its trials.
        study = optuna.load_study(study_name=self.name, storage=self.storage, sampler=sampler)
        trial = optuna.Trial(study, key)
        for name, span in self.space.items():
            values[name] = trial.suggest_float(name, span.low, span.high, log=span.log)
        return Task(done, self.spec, 0, **values)

    def _silent(self, running: FrozenTrial) -> bool:
        if self.alone or running.datetime_start is None:
            return False
        last = running.user_attrs.get("alive", running.datetime_start.timestamp())
        return bool(time.time() - last > MISSED * self.beat)

    def _untuned(self) -> dict[str, float]:
        return {"lr": self.config.lr_for(self.spec), "knob": parse_loss(self.spec).untuned}

    def _in(self, state: TrialState) -> list[FrozenTrial]:
        trials = self.storage.get_all_trials(self.id, deepcopy=False, states=(state,))
        return [trial for trial in trials if trial.number < self.trials]

    def _key(self, trial: FrozenTrial) -> int:
        return self.storage.get_trial_id_from_study_id_trial_number(self.id, trial.number)


def open_studies(
    folder: Path, config: Config, dataset: Dataset, execution: Execution
) -> dict[str, Study]:
    """Open the studies of losses that have something to tune, and create the missing ones.

    Must be called before any process tunes in `folder`.
    """

    def opened() -> dict[str, Study]:
        tunable = [spec for spec in config.losses if _space(spec, config)]
        return {spec: Study(folder, spec, config, dataset, execution) for spec in tunable}

    def create() -> None:
        if execution.storage is None:
            _repair(_journal(folder))
        opened()

    on_rank_zero(create)
    return opened()


def tune(
    folder: Path,
    spec: str,
    config: Config,
    dataset: Dataset,
    execution: Execution,
    *,
    worker: int = 0,
    beat: float = HEARTBEAT_SECONDS,
) -> None:
    """Run trials of one loss until none is waiting; other processes may do so at the same time.

    A trial is a run at seed 0, scored on the validation rows at the epoch that `config.select`
    selects. With tuning, the test rows are the same at all seeds, so no trial has seen any of them.
    For the arguments see :class:`Study`.
    """
    from penex.compare.training.run import run  # imports torch and Lightning: only when training

    study = Study(folder, spec, config, dataset, execution, worker=worker, beat=beat)
    on_rank_zero(lambda: study.reclaim(own=True))
    while (trial := on_rank_zero(study.take)) is not None:
        if not on_rank_zero(trial.task.folder.exists):
            try:
                with study.alive(trial.key):
                    run(trial.task, config, dataset, execution)
            except BaseException:
                with contextlib.suppress(OSError, OptunaError):
                    study.give_back(trial.key)
                raise
        on_rank_zero(functools.partial(study.tell, trial))
        on_rank_zero(lambda: study.reclaim(own=False))


def _space(spec: str, config: Config) -> dict[str, FloatDistribution]:
    candidate, lr = parse_loss(spec), config.lr_for(spec)
    space = {}
    if config.tune_lr:
        space["lr"] = FloatDistribution(lr / LR_SPAN, lr * LR_SPAN, log=True)
    knob = candidate.loss.knob
    if knob is not None and candidate.value is None:
        space["knob"] = FloatDistribution(knob.low, knob.high, log=knob.log)
    return space


def _score(run: Path, config: Config) -> float:
    """What tuning minimises, of a finished run; infinite if it diverged."""
    scores = read_record(run)["validation"].get(config.select)
    if scores is None:
        return math.inf
    if config.select == "accuracy":
        return -float(scores["accuracy"])
    return float(scores["refined_nll" if config.select == "refined" else "nll"])


def _journal(folder: Path) -> Path:
    return folder / "tuning" / "study.journal"


def _storage(folder: Path, url: str | None) -> BaseStorage:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    scheme, _, path = (url or "").partition("://")
    if url is None or scheme == "journal":
        journal = Path(path) if url else _journal(folder)
        journal.parent.mkdir(parents=True, exist_ok=True)
        with _stable():
            return JournalStorage(JournalFileBackend(str(journal), _Lock(journal)))
    left = ATTEMPTS
    while True:
        try:
            return RDBStorage(url)
        except Exception as error:  # from SQLAlchemy, or from the driver of this kind of database
            left -= 1
            if left and isinstance(error, DBAPIError):
                time.sleep(random.uniform(0.2, 1.0))  # noqa: S311
                continue
            hidden = re.sub(r"//[^@/]*@", "//…@", url)  # keeps the password out of logs
            raise CompareError(f"storage: cannot open {hidden}: {error}") from None


class _Lock(JournalFileOpenLock):
    """A lock that the system releases if its holder is killed, unlike Optuna's own."""

    def __init__(self, journal: Path) -> None:
        super().__init__(str(journal))
        self.lock = FileLock(f"{journal}.lock")

    def acquire(self) -> bool:
        self.lock.acquire()
        return True

    def release(self) -> None:
        self.lock.release()


@contextlib.contextmanager
def _stable() -> Iterator[None]:
    """Silence the warnings of Optuna versions in which these features are still experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


def _repair(journal: Path) -> None:
    """Remove an incomplete last line, left by a full disk or a crash."""
    if journal.exists():
        content = journal.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(journal, content.rfind(b"\n") + 1)
