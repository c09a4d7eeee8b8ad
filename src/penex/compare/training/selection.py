"""Selection of the epoch of a run, by its validation rows alone.

There are four selections: the last epoch; the epoch with the lowest validation NLL; the one with
the lowest validation NLL after temperature scaling ("refine, then calibrate", Berta et al., arXiv
2501.19195: stop training where the classes are separated best, and fix calibration afterwards); and
the one with the highest validation accuracy.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penex.metrics import accuracy, fit_temperature, nll

LAST = "last"
SELECTIONS = {
    "refined": "Lowest validation NLL after temperature scaling",
    "nll": "Lowest validation NLL",
    "accuracy": "Highest validation accuracy",
    LAST: "Last epoch",
}
"""Selections by name, with their titles in reports."""

Scores = Mapping[str, float]


def in_sentence(selection: str) -> str:
    """The title of a selection for use within a sentence."""
    title = SELECTIONS[selection]
    return title[0].lower() + title[1:]


_RANK: dict[str, Callable[[Scores], tuple[float, ...]]] = {
    "refined": lambda scores: (scores["refined_nll"],),
    "nll": lambda scores: (scores["nll"],),
    "accuracy": lambda scores: (-scores["accuracy"], scores["nll"]),
}
"""The key that each selection minimises; among equal epochs the first is selected."""


def validation_scores(
    logits: NDArray[np.float64], log_proba: NDArray[np.float64], target: NDArray[np.int64]
) -> Scores:
    """Scores of the validation rows after an epoch.

    Args:
        logits: Shape (N, K).
        log_proba: Log-probabilities of the loss's link, shape (N, K).
        target: Labels, shape (N,).

    Returns:
        "nll", of the link's probabilities; "refined_nll", the same after temperature scaling fitted
        to the same rows; "softmax_nll", of plain softmax; and "accuracy". All are NaN if `logits`
        or `log_proba` contain NaN or infinite values.
    """
    if not (np.isfinite(logits).all() and np.isfinite(log_proba).all()):
        return dict.fromkeys(("nll", "refined_nll", "softmax_nll", "accuracy"), math.nan)
    temperature = fit_temperature(log_proba, target)
    return {
        "nll": nll(log_proba, target),
        "refined_nll": nll(log_proba / temperature, target),
        "softmax_nll": nll(logits, target),
        "accuracy": accuracy(log_proba, target),
    }


class Selected:
    """The epochs selected so far, with a snapshot of the network after each of them.

    Attributes:
        epochs: The epoch of every selection except "last", counted from 1; empty while no epoch
            has had finite scores.
        scores: The validation scores of these epochs, by epoch.
        snapshots: The snapshots of these epochs, by epoch.
    """

    def __init__(self) -> None:
        self.epochs: dict[str, int] = {}
        self.scores: dict[int, dict[str, float]] = {}
        self.snapshots: dict[int, dict[str, Any]] = {}

    def update(self, epoch: int, scores: Scores, snapshot: Callable[[], dict[str, Any]]) -> None:
        """Consider an epoch; `snapshot` is called only if the epoch is selected."""
        if not all(math.isfinite(score) for score in scores.values()):
            return
        for name, rank in _RANK.items():
            held = self.epochs.get(name)
            if held is None or rank(scores) < rank(self.scores[held]):
                self.epochs[name] = epoch
        in_use = set(self.epochs.values())
        if epoch in in_use:
            self.scores[epoch], self.snapshots[epoch] = dict(scores), snapshot()
        for unused in self.snapshots.keys() - in_use:
            del self.scores[unused], self.snapshots[unused]

    def state(self) -> dict[str, Any]:
        """The state, for :meth:`load`."""
        return {"epochs": self.epochs, "scores": self.scores, "snapshots": self.snapshots}

    def load(self, state: dict[str, Any]) -> None:
        """Restore a result of :meth:`state`."""
        self.epochs, self.scores = state["epochs"], state["scores"]
        self.snapshots = state["snapshots"]
