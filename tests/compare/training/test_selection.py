"""Selected epochs against a search over all epochs, and scores against scikit-learn."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.metrics import accuracy_score, log_loss

from penex.compare.training.selection import LAST, SELECTIONS, Selected, validation_scores

SCORES = ("nll", "refined_nll", "softmax_nll", "accuracy")

# Few values, so that ties are common.
epochs = st.lists(
    st.fixed_dictionaries({name: st.sampled_from([0.25, 0.5, 0.75, math.nan]) for name in SCORES}),
    min_size=1,
    max_size=12,
)


def test_scores() -> None:
    rng = np.random.default_rng(0)
    target = rng.integers(0, 4, 500)
    logits = rng.normal(size=(500, 4)) + np.eye(4)[target]
    link = log_softmax(1.7 * logits, axis=1)
    scores = validation_scores(logits, link, target)
    assert set(scores) == set(SCORES)
    assert scores["nll"] == pytest.approx(log_loss(target, np.exp(link)))
    assert scores["softmax_nll"] == pytest.approx(log_loss(target, softmax(logits, axis=1)))
    assert scores["accuracy"] == accuracy_score(target, logits.argmax(1))
    # The smoothing of the labels weighs a tenth of a row.
    least = minimize_scalar(
        lambda t: log_loss(target, softmax(link / t, axis=1)), bounds=(0.1, 10), method="bounded"
    )
    assert scores["refined_nll"] == pytest.approx(least.fun, abs=1e-5)
    assert scores["refined_nll"] < scores["nll"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["logits", "link"])
def test_non_finite_scores(where: str, bad: float) -> None:
    arrays = {"logits": np.zeros((6, 3)), "link": np.full((6, 3), -math.log(3))}
    arrays[where][2, 1] = bad
    scores = validation_scores(arrays["logits"], arrays["link"], np.arange(6) % 3)
    assert all(map(math.isnan, scores.values()))
    assert set(scores) == set(SCORES)


def searched(history: list[dict[str, float]]) -> dict[str, int]:
    """The first epoch with the best score, by looking at all of them."""
    keys: dict[str, Any] = {
        "refined": lambda s: s["refined_nll"],
        "nll": lambda s: s["nll"],
        "accuracy": lambda s: (-s["accuracy"], s["nll"]),
    }
    finite = [n for n, scores in enumerate(history, 1) if not any(map(math.isnan, scores.values()))]
    return (
        {name: min(finite, key=lambda n: (key(history[n - 1]), n)) for name, key in keys.items()}
        if finite
        else {}
    )


@given(history=epochs, cut=st.integers(0, 12))
def test_selected_epochs(history: list[dict[str, float]], cut: int) -> None:
    """Also when an interrupted run continues from its state."""
    selected = Selected()
    for epoch, scores in enumerate(history, 1):
        if epoch == cut:
            resumed = Selected()
            resumed.load(selected.state())
            selected = resumed
        selected.update(epoch, scores, lambda epoch=epoch: {"network of": epoch})  # type: ignore[misc]
    assert selected.epochs == searched(history)
    # A snapshot of each of them, and of no other.
    kept = set(selected.epochs.values())
    assert selected.snapshots == {epoch: {"network of": epoch} for epoch in kept}
    assert selected.scores == {epoch: history[epoch - 1] for epoch in kept}


def test_snapshots_are_taken_only_of_selected_epochs() -> None:
    made: list[int] = []
    selected = Selected()
    for epoch, nll in enumerate((0.9, 0.5, 0.7, 0.5, 0.4), 1):
        scores = dict.fromkeys(SCORES, nll) | {"accuracy": 0.5}
        selected.update(epoch, scores, lambda epoch=epoch: made.append(epoch) or {})  # type: ignore[func-returns-value,misc]
    assert made == [1, 2, 5]


def test_the_last_epoch_is_a_selection_of_every_run() -> None:
    assert list(SELECTIONS)[-1] == LAST
    assert Selected().epochs.keys() | {LAST} <= set(SELECTIONS)
