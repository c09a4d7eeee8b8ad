"""What a comparison will take, before it starts."""

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from penex.compare.errors import CompareError
from penex.compare.finished_runs import read_record

WORTH_SAYING = 30.0
"""Seconds; a shorter comparison is over before anybody has read what it will take."""
SURELY_SHORT = 0.002
"""Seconds that a step of the small network for numbers takes at most, as a rule: where so little is
to be done that even these come to nothing worth saying, nothing is measured."""
FORWARD = 1 / 3
"""Time of a validation row, in those of a training row: forward alone, and not backward."""


def seconds_per_epoch(training: float, rows: Sequence[int]) -> float:
    """Of a whole epoch, from that of its training part; `rows` of training and validation."""
    return training * (1 + FORWARD * rows[1] / rows[0])


def recorded(runs: Sequence[Path]) -> float | None:
    """Mean seconds of the training part of an epoch over finished runs; None if there are none."""
    seconds = []
    for run in runs:
        with contextlib.suppress(CompareError):  # damaged: said later, if it matters
            seconds.append(float(read_record(run)["seconds_per_epoch"]))
    return mean(seconds) if seconds else None


def forecast(stages: Sequence[tuple[int, int]], epochs: int, seconds: float) -> str | None:
    """A line for the person who waits; None if it is not worth saying.

    Args:
        stages: Runs, and how many of them at a time, of each stage after the other.
        epochs: Of each run.
        seconds: Of each epoch.
    """
    rounds = sum(math.ceil(runs / side) for runs, side in stages if runs)
    total = rounds * epochs * seconds
    if total < WORTH_SAYING:
        return None
    runs, jobs = sum(runs for runs, _ in stages), max(side for _, side in stages)
    side = f"{jobs} at a time" if jobs > 1 else "one at a time"
    work = f"{runs} run{'s' * (runs != 1)} × {epochs} epoch{'s' * (epochs != 1)}"
    each = f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}"
    return f"about {duration(total)} ({work} × {each} s, {side})"


def duration(seconds: float) -> str:
    """In words, to about a tenth."""
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
