"""Forecast of the duration of a comparison, before it starts."""

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from penex.compare.errors import CompareError
from penex.compare.finished_runs import read_record

SHORTEST_FORECAST = 30.0
"""Seconds below which no forecast is printed: it would be read after the comparison has ended."""
STEP_SECONDS = 0.002
"""Upper estimate of the seconds that a step of the small network for numbers usually takes. Where
even this gives no forecast, no step is measured."""
FORWARD = 1 / 3
"""Time of a validation row relative to that of a training row: forward, without backward."""


def seconds_per_epoch(training: float, rows: Sequence[int]) -> float:
    """Seconds of a whole epoch from those of its training part.

    Args:
        training: Seconds of the training part.
        rows: Numbers of training and of validation rows, in this order.
    """
    return training * (1 + FORWARD * rows[1] / rows[0])


def recorded(runs: Sequence[Path]) -> float | None:
    """Mean seconds of the training part of an epoch of finished runs; None if there are none."""
    seconds = []
    for run in runs:
        with contextlib.suppress(CompareError):  # damaged: said later, if it matters
            seconds.append(float(read_record(run)["seconds_per_epoch"]))
    return mean(seconds) if seconds else None


def forecast(stages: Sequence[tuple[int, int]], epochs: int, seconds: float) -> str | None:
    """The forecast as one line; None if it is shorter than :data:`SHORTEST_FORECAST`.

    Args:
        stages: For each stage, the number of runs and how many of them run at a time.
        epochs: Epochs of each run.
        seconds: Seconds of each epoch.
    """
    rounds = sum(math.ceil(runs / side) for runs, side in stages if runs)
    total = rounds * epochs * seconds
    if total < SHORTEST_FORECAST:
        return None
    runs, jobs = sum(runs for runs, _ in stages), max(side for _, side in stages)
    side = f"{jobs} at a time" if jobs > 1 else "one at a time"
    work = f"{runs} run{'s' * (runs != 1)} × {epochs} epoch{'s' * (epochs != 1)}"
    each = f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}"
    return f"about {duration(total)} ({work} × {each} s, {side})"


def duration(seconds: float) -> str:
    """Seconds in readable units, rounded to about a tenth."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{round(seconds, -1):.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 600:
        hours, minutes = divmod(10 * round(minutes / 10), 60)
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(round(minutes / 60), 24)
    return f"{days} d {hours} h" if days else f"{hours} h"
