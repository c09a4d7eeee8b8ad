"""The comparison as a whole: locks the output folder and executes the runs missing from it."""

import contextlib
import functools
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from penex.compare.config import Config, Execution, Task
from penex.compare.data.columns import describe_columns, warnings
from penex.compare.data.dataset import Dataset, Texts
from penex.compare.data.images import Images
from penex.compare.data.load import load
from penex.compare.data.split import draw_rows
from penex.compare.display import Display
from penex.compare.files import write_json
from penex.compare.finished_runs import discard_damaged, read_record
from penex.compare.output_folder import (
    clear_partial,
    epochs_done,
    lock,
    read_timing,
    report_full_disk,
    run_folder,
    start_or_resume,
    trial_folder,
)
from penex.compare.parallel import Workers, workers
from penex.compare.registry import parse_loss
from penex.compare.training.distributed import default_process_group, is_rank_zero, on_rank_zero
from penex.compare.training.duration import STEP_SECONDS, forecast, recorded, seconds_per_epoch

if TYPE_CHECKING:
    from penex.compare.training.tune import Study

MEASURED = 16
"""The most processes on which a few steps are timed for the forecast."""


def compare(
    config: Config,
    folder: Path,
    *,
    execution: Execution,
    display: Display,
    dataset: Dataset | None = None,
) -> None:
    """Train every loss at every seed, except for runs that `folder` already contains.

    Args:
        config: What to compare.
        folder: The output folder, new or of the same configuration. Its finished runs of other
            losses or further seeds stay part of the comparison.
        execution: Where to run, and how many runs at a time.
        display: Where progress is shown.
        dataset: The data; None: read from `config.data`.

    Raises:
        CompareError: The data, the folder or the workers cannot be used, or the disk is full.
            Finished runs are kept, and the same call continues.
    """
    folder = folder.absolute()  # workers may have another working directory
    dataset = load(config) if dataset is None else dataset
    for seed in range(config.seeds):  # fail now rather than after hours
        draw_rows(dataset, seed, config)
    for line in (*dataset.notes, *describe_columns(dataset)):
        display.note(line)
    for line in warnings(dataset):
        display.warn(line)
    with contextlib.ExitStack() as stack:
        stack.enter_context(default_process_group())
        for reason in on_rank_zero(lambda: _acquire(stack, config, folder, dataset)):
            display.warn(f"{reason}; that run is done again")
        pool = stack.enter_context(
            workers(
                execution,
                folder,
                *(folder, config, dataset, execution),
                user_objects=config.user_objects,
            )
        )
        studies: Mapping[str, Study] = {}
        if config.tune:
            from penex.compare.training.tune import open_studies  # imports Optuna

            studies = open_studies(folder, config, dataset, execution)
        _print_forecast(config, folder, dataset, execution, studies, pool, display)
        values = {spec: _untuned(config, spec) for spec in config.losses}
        if studies:
            values |= _tuned(config, folder, execution, studies, pool, display)
        tasks = [
            Task(run_folder(folder, spec, seed), spec, seed, **values[spec])
            for seed, spec in _pairs(config)
        ]
        done = functools.partial(epochs_done, [task.folder for task in tasks], config.epochs)
        with display.stage("Training", len(tasks) * config.epochs, done):
            missing = on_rank_zero(lambda: [task for task in tasks if not task.folder.exists()])
            for line in pool.each(_train, missing):
                display.finished(line)
        _measure_times(config, folder, values, pool)


def _measure_times(
    config: Config, folder: Path, values: Mapping[str, Mapping[str, float]], pool: Workers
) -> None:
    """Record the time of a training epoch of each loss, measured one at a time."""
    known = on_rank_zero(lambda: read_timing(folder))
    missing = [spec for spec in config.losses if spec not in known]
    for spec in missing:
        (known[spec],) = pool.each(_measure, [(spec, values[spec]["knob"])])
    if missing and is_rank_zero():
        write_json(folder / "timing.json", known)


def _pairs(config: Config) -> list[tuple[int, str]]:
    """All runs, seed by seed, so that an unfinished comparison is still paired."""
    return [(seed, spec) for seed in range(config.seeds) for spec in config.losses]


def _untuned(config: Config, spec: str) -> dict[str, float]:
    return {"lr": config.lr_for(spec), "knob": parse_loss(spec).untuned}


def _acquire(
    stack: contextlib.ExitStack, config: Config, folder: Path, dataset: Dataset
) -> list[str]:
    """Make `folder` this comparison's until `stack` is closed; says which runs were damaged."""
    stack.enter_context(lock(folder))
    stack.enter_context(report_full_disk(folder))
    stack.enter_context(_clearing_partial(folder))
    start_or_resume(folder, config, dataset)
    trials = folder.glob("tuning/*/trial-*")
    return discard_damaged(
        [*(run_folder(folder, spec, seed) for seed, spec in _pairs(config)), *trials]
    )


def _print_forecast(
    config: Config,
    folder: Path,
    dataset: Dataset,
    execution: Execution,
    studies: Mapping[str, "Study"],
    pool: Workers,
    display: Display,
) -> None:
    """Print how long the comparison will take, estimated from a few training steps, if long."""
    trials = [
        trial_folder(folder, spec, number)
        for spec, study in studies.items()
        for number in range(study.trials)
    ]
    runs = [run_folder(folder, spec, seed) for seed, spec in _pairs(config)]
    finished = on_rank_zero(lambda: [run for run in (*trials, *runs) if run.exists()])
    stages = []
    for stage, most in ((trials, len(studies) * execution.tune_jobs), (runs, len(runs))):
        left = len(set(stage) - set(finished))
        stages.append((left, max(1, min(pool.jobs, most, left))))
    rows = [len(part) for part in draw_rows(dataset, 0, config)]
    seconds = on_rank_zero(lambda: recorded(finished))
    if seconds is None:
        steps = math.ceil(rows[0] / config.batch_size)
        small = config.model in (None, "mlp") and not isinstance(dataset.features, Images | Texts)
        if small and forecast(stages, config.epochs, steps * STEP_SECONDS) is None:
            return
        side = max(side for _, side in stages)
        first = config.losses[0]
        sample = [(first, parse_loss(first).untuned)] * min(side, MEASURED)
        seconds = mean(pool.each(_measure, sample))
    line = forecast(stages, config.epochs, seconds_per_epoch(seconds, rows))
    if line is not None:
        display.note(f"This will take {line}")


def _measure(
    loss: tuple[str, float], folder: Path, config: Config, dataset: Dataset, execution: Execution
) -> float:
    from penex.compare.training.run import measure

    return measure(*loss, config, dataset, execution)


def _tuned(
    config: Config,
    folder: Path,
    execution: Execution,
    studies: Mapping[str, "Study"],
    pool: Workers,
    display: Display,
) -> dict[str, dict[str, float]]:
    """Tune the losses that are not tuned yet, and return the values found for every loss."""
    from penex.compare.training.tune import HEARTBEAT_SECONDS

    trials = [
        trial_folder(folder, spec, number)
        for spec, study in studies.items()
        for number in range(study.trials)
    ]
    done = functools.partial(epochs_done, trials, config.epochs)
    with display.stage("Tuning", len(trials) * config.epochs, done):
        while missing := on_rank_zero(lambda: [s for s in studies if not studies[s].is_finished()]):
            found = set()
            shares = [(spec, worker) for worker in range(execution.tune_jobs) for spec in missing]
            for spec in pool.each(_tune, shares):
                if spec not in found and on_rank_zero(studies[spec].is_finished):
                    found.add(spec)
                    display.finished(_tuned_line(spec, studies[spec].best()))
            if len(found) < len(missing):
                # Another command runs the last trials: wait until they finish or it is dead.
                time.sleep(HEARTBEAT_SECONDS)
    return on_rank_zero(lambda: {spec: study.best() for spec, study in studies.items()})


def _tuned_line(spec: str, best: dict[str, float]) -> str:
    candidate = parse_loss(spec)
    knob = candidate.loss.knob
    tuned_knob = f", {knob.name} {best['knob']:.3g}" if knob else ""
    return f"{candidate.label}: tuned to learning rate {best['lr']:.3g}{tuned_knob}"


def _tune(
    share: tuple[str, int], folder: Path, config: Config, dataset: Dataset, execution: Execution
) -> str:
    from penex.compare.training.tune import tune

    spec, worker = share
    tune(folder, spec, config, dataset, execution, worker=worker)
    return spec


def _train(task: Task, folder: Path, config: Config, dataset: Dataset, execution: Execution) -> str:
    from penex.compare.training.run import run  # imports torch and Lightning: only when training

    run(task, config, dataset, execution)
    record = on_rank_zero(lambda: read_record(task.folder))
    scores, epoch = record["validation"].get(config.select), record["epochs"].get(config.select)
    if scores is None:
        result = "diverged"
    elif config.select == "accuracy":
        result = f"validation accuracy {100 * scores['accuracy']:.1f} % at epoch {epoch}"
    else:
        scaled = config.select == "refined"
        nll = scores["refined_nll" if scaled else "nll"]
        how = " after temperature scaling" if scaled else ""
        result = f"validation NLL {nll:.4f}{how} at epoch {epoch}"
    return f"{parse_loss(task.spec).label}, seed {task.seed}: {result}"


@contextlib.contextmanager
def _clearing_partial(folder: Path) -> Iterator[None]:
    """Remove partially written folders on exit."""
    try:
        yield
    finally:
        clear_partial(folder)
