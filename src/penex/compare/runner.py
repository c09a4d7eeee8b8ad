"""The comparison as a whole: claims a folder, runs what is missing in it, reports what is there."""

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import joblib

from penex.compare.config import Config, Task
from penex.compare.data import Dataset, load
from penex.compare.display import Display
from penex.compare.registry import contender
from penex.compare.splits import draw_rows
from penex.compare.store import (
    claim,
    clear_partial,
    epochs_done,
    lock,
    read_json,
    room,
    run_folder,
    trial_folder,
)
from penex.compare.tune import best_trial, tune


def compare(config: Config, folder: Path, *, jobs: int, display: Display) -> None:
    """Train every loss at every seed, except what `folder` has already.

    Args:
        config: What to compare.
        folder: The output folder, new or of the same configuration.
        jobs: How many runs at a time, each on one core.
        display: Where progress is shown.

    Raises:
        CompareError: The data or the folder is refused, or the disk is full. What was finished
            stays, and the same call continues.
    """
    dataset = load(config.data, config.target)
    for seed in range(config.seeds):  # refuse now what would be refused after hours
        draw_rows(dataset, seed, config.train_size, config.validation_size, config.test_size)
    with lock(folder), room(folder), _tidy(folder):
        claim(folder, config, dataset)
        if config.tune:
            trials = [
                trial_folder(folder, spec, trial)
                for spec in config.losses
                for trial in range(config.tune)
            ]
            done = functools.partial(epochs_done, trials, config.epochs)
            with display.stage("Tuning", len(trials) * config.epochs, done):
                tuning = [
                    functools.partial(_tune, folder, spec, config, dataset)
                    for spec in config.losses
                ]
                for line in _parallel(jobs, tuning):
                    display.finished(line)
        tasks = _tasks(config, folder)
        done = functools.partial(epochs_done, [task.folder for task in tasks], config.epochs)
        with display.stage("Training", len(tasks) * config.epochs, done):
            training = [
                functools.partial(_train, task, config, dataset)
                for task in tasks
                if not task.folder.exists()
            ]
            for line in _parallel(jobs, training):
                display.finished(line)


def _tasks(config: Config, folder: Path) -> list[Task]:
    """All runs, seed by seed, so that an unfinished comparison is still a paired one."""
    values = {}
    for spec in config.losses:
        untuned = {"lr": config.lr, "knob": contender(spec).untuned}
        values[spec] = best_trial(folder, spec, config) if config.tune else untuned
    return [
        Task(run_folder(folder, spec, seed), spec, seed, **values[spec])
        for seed in range(config.seeds)
        for spec in config.losses
    ]


def _tune(folder: Path, spec: str, config: Config, dataset: Dataset) -> str:
    _follow_the_parent()
    tune(folder, spec, config, dataset)
    who, best = contender(spec), best_trial(folder, spec, config)
    knob = f", {who.loss.knob.name} {best['knob']:.3g}" if who.loss.knob else ""
    return f"{who.label}: tuned to learning rate {best['lr']:.3g}{knob}"


def _train(task: Task, config: Config, dataset: Dataset) -> str:
    _follow_the_parent()
    from penex.compare.train import run  # torch and Lightning: only the process that trains

    run(task, config, dataset)
    record = read_json(task.folder / "run.json")
    nll, epoch = record["validation_nll"], record["best_epoch"]
    result = "diverged" if nll is None else f"validation NLL {nll:.4f} at epoch {epoch}"
    return f"{contender(task.spec).label}, seed {task.seed}: {result}"


def _parallel(jobs: int, calls: Sequence[Callable[[], str]]) -> Iterator[str]:
    """What the calls return, as they finish; on any exception the processes are stopped first."""
    if not calls:
        return
    parallel = joblib.Parallel(min(jobs, len(calls)), return_as="generator_unordered", batch_size=1)
    with contextlib.closing(parallel(joblib.delayed(call)() for call in calls)) as results:
        yield from results


@functools.cache  # once per process
def _follow_the_parent() -> None:
    """In a worker: leave Ctrl-C, which reaches all processes, to the parent; end when it ends."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent.pid:
            time.sleep(0.5)
        os._exit(1)  # the parent was killed: nobody waits for this run

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _tidy(folder: Path) -> Iterator[None]:
    """Leave nothing half-written behind."""
    try:
        yield
    finally:
        clear_partial(folder)
