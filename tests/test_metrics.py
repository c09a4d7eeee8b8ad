"""penex.metrics against loops over its definitions, closed forms, scikit-learn and torchmetrics."""

import itertools
import math
import tracemalloc
import warnings

import numpy as np
import pytest
import relplot
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax
from sklearn.metrics import (
    balanced_accuracy_score,
    brier_score_loss,
    f1_score,
    log_loss,
    roc_auc_score,
)
from torchmetrics.functional.classification import (
    binary_auroc,
    multiclass_accuracy,
    multiclass_calibration_error,
)

from penex import metrics

SINGLE = {
    "accuracy": metrics.accuracy,
    "balanced_accuracy": metrics.balanced_accuracy,
    "macro_f1": metrics.macro_f1,
    "nll": metrics.nll,
    "brier": metrics.brier,
    "ece": metrics.ece,
    "ece_mass": lambda z, y: metrics.ece(z, y, binning="mass"),
    "classwise_ece": metrics.classwise_ece,
    "smooth_ece": metrics.smooth_ece,
    "auroc": metrics.confidence_auroc,
    "aurc": metrics.aurc,
    "margin": lambda z, y: float(metrics.margins(z, y).mean()),
}
KEYS = tuple(SINGLE)


def sample(
    seed: int, n: int, k: int, scale: float = 2.0, temperature: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Random logits and labels drawn from softmax(logits / temperature)."""
    rng = np.random.default_rng(seed)
    logits = scale * rng.normal(size=(n, k))
    target = np.argmax(logits / temperature + rng.gumbel(size=(n, k)), axis=1)
    return logits, target


sets = st.builds(sample, st.integers(0, 10**6), st.integers(2, 60), st.integers(2, 7))


# --- Definitions, one sample at a time ------------------------------------------------------------


def probabilities(row: np.ndarray) -> list[float]:
    top = max(row)
    powers = [math.exp(z - top) for z in row]
    return [power / math.fsum(powers) for power in powers]


def gap(pairs: list[tuple[float, float]], n: int) -> float:
    """The share of n in this bin, times |mean event - mean probability|."""
    if not pairs:
        return 0.0
    prob, event = zip(*pairs, strict=True)
    return len(pairs) / n * abs(sum(event) / len(pairs) - sum(prob) / len(pairs))


def width_gap(prob: list[float], event: list[float], bins: int) -> float:
    pairs = list(zip(prob, event, strict=True))
    total = 0.0
    for b in range(bins):
        low, high = b / bins, (b + 1) / bins
        last = b == bins - 1
        total += gap([x for x in pairs if low <= x[0] and (x[0] < high or last)], len(pairs))
    return total


def oracle(logits: np.ndarray, target: np.ndarray, bins: int = 15) -> dict[str, float]:
    prob = [probabilities(row) for row in logits]
    labels = [int(y) for y in target]
    n, k = len(prob), len(prob[0])
    confidence = [max(p) for p in prob]
    correct = [float(p.index(max(p)) == y) for p, y in zip(prob, labels, strict=True)]
    # Without ties, bins of equal mass are slices of the sorted samples.
    ranked = sorted(zip(confidence, correct, strict=True))
    slices = [ranked[b * n // bins : (b + 1) * n // bins] for b in range(bins)]
    right = [c for c, ok in zip(confidence, correct, strict=True) if ok]
    wrong = [c for c, ok in zip(confidence, correct, strict=True) if not ok]
    by_confidence = [ok for _, ok in reversed(ranked)]
    predicted = [p.index(max(p)) for p in prob]
    pairs = list(zip(labels, predicted, strict=True))
    recalls = [sum(pair == (c, c) for pair in pairs) / labels.count(c) for c in set(labels)]
    f1 = [
        2 * sum(pair == (c, c) for pair in pairs) / (labels.count(c) + predicted.count(c))
        for c in set(labels + predicted)
    ]
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in right for b in wrong]
    return {
        "accuracy": sum(correct) / n,
        "balanced_accuracy": sum(recalls) / len(recalls),
        "macro_f1": sum(f1) / len(f1),
        "nll": -sum(math.log(p[y]) for p, y in zip(prob, labels, strict=True)) / n,
        "brier": sum(
            sum((p[j] - (j == y)) ** 2 for j in range(k)) for p, y in zip(prob, labels, strict=True)
        )
        / n,
        "ece": width_gap(confidence, correct, bins),
        "ece_mass": sum(gap(s, n) for s in slices),
        "classwise_ece": sum(
            width_gap([p[j] for p in prob], [float(y == j) for y in labels], bins) for j in range(k)
        )
        / k,
        "auroc": sum(wins) / len(wins) if wins else math.nan,
        "aurc": sum(1 - sum(by_confidence[:i]) / i for i in range(1, n + 1)) / n,
        "margin": sum(
            row[y] - max(z for j, z in enumerate(row) if j != y)
            for row, y in zip(logits, labels, strict=True)
        )
        / n,
    }


@given(sets, st.integers(1, 20))
def test_every_metric_is_its_definition(data: tuple[np.ndarray, np.ndarray], bins: int) -> None:
    result = metrics.evaluate(*data, bins=bins)
    assert tuple(result) == KEYS
    assert all(type(value) is float for value in result.values())
    del result["smooth_ece"]  # which has a test of its own
    assert result == pytest.approx(oracle(*data, bins), rel=1e-10, abs=1e-12, nan_ok=True)


@given(sets)
def test_each_function_alone_gives_what_evaluate_gives(
    data: tuple[np.ndarray, np.ndarray],
) -> None:
    alone = {name: function(*data) for name, function in SINGLE.items()}
    assert alone == pytest.approx(metrics.evaluate(*data), rel=0, abs=0, nan_ok=True)


def test_log_softmax_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = metrics.log_softmax
    monkeypatch.setattr(
        metrics, "log_softmax", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    metrics.evaluate(*sample(0, 50, 4))
    assert len(calls) == 1


# --- Peers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(7, 2), (501, 3), (1999, 10)])
def test_agrees_with_scikit_learn_and_torchmetrics(n: int, k: int) -> None:
    logits, target = sample(n, n, k)
    prob = torch.tensor(logits).softmax(1)
    labels = torch.tensor(target)
    confidence, correct = prob.max(1).values, (prob.argmax(1) == labels).long()
    result = metrics.evaluate(logits, target)
    peers = {
        "accuracy": multiclass_accuracy(prob, labels, k, average="micro").item(),
        "nll": log_loss(target, prob.numpy(), labels=range(k)),
        "brier": brier_score_loss(target, prob.numpy(), labels=list(range(k)), scale_by_half=False),
        "ece": multiclass_calibration_error(prob, labels, k, n_bins=15).item(),
        "auroc": binary_auroc(confidence, correct).item(),
    }
    # torchmetrics returns float32.
    assert {name: result[name] for name in peers} == pytest.approx(peers, abs=1e-6)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [0, 2], [1]])
def test_classes_without_rows_count_as_in_scikit_learn(labels: list[int]) -> None:
    logits, _ = sample(4, 37, 5)
    logits[:, 4] = -9.0  # neither a label nor predicted
    target = np.random.default_rng(0).choice(labels, size=37)
    predicted = logits.argmax(1)
    assert metrics.balanced_accuracy(logits, target) == pytest.approx(
        balanced_accuracy_score(target, predicted)
    )
    assert metrics.macro_f1(logits, target) == pytest.approx(
        f1_score(target, predicted, average="macro", zero_division=0)
    )


@given(sets)
def test_row_values_average_to_the_metrics(data: tuple[np.ndarray, np.ndarray]) -> None:
    values = metrics.row_values(*data)
    result = metrics.evaluate(*data)
    assert list(values) == ["accuracy", "nll", "brier", "margin"]
    assert {name: value.mean() for name, value in values.items()} == pytest.approx(
        {name: result[name] for name in values}
    )


# --- Calibration ----------------------------------------------------------------------------------


def test_calibration_error_of_a_calibrated_predictor_vanishes_over_the_whole_set() -> None:
    logits, target = sample(0, 64 * 1500, 10)
    result = metrics.evaluate(logits, target)
    assert result["ece"] < 0.01
    assert result["ece_mass"] < 0.01
    assert result["classwise_ece"] < 0.005
    # What the mean over mini-batches of 64 would say of the same predictions.
    batches = zip(np.split(logits, 1500), np.split(target, 1500), strict=True)
    assert np.mean([metrics.ece(*batch) for batch in batches]) > 0.1


def logits_of(confidence: list[float]) -> np.ndarray:
    """Two classes, the first with the given probability."""
    with np.errstate(divide="ignore"):
        return np.stack([np.log(confidence), np.log1p(-np.array(confidence))], axis=1)


def test_ece_by_hand() -> None:
    # Ten bins: 0.62 and 0.66 share one, 0.91 is alone. Gaps: |1 + 0 - 1.28| + |0 - 0.91|.
    logits, target = logits_of([0.62, 0.66, 0.91]), [0, 1, 1]
    assert metrics.ece(logits, target, bins=10) == pytest.approx((0.28 + 0.91) / 3)
    # Of two bins of equal mass, the first takes floor(3 / 2) = 1 sample.
    expected = (abs(1 - 0.62) + abs(0 - 0.66 - 0.91)) / 3
    assert metrics.ece(logits, target, bins=2, binning="mass") == pytest.approx(expected)
    # One bin: |accuracy - mean confidence|.
    assert metrics.ece(logits, target, bins=1) == pytest.approx((0.62 + 0.66 + 0.91 - 1) / 3)


def test_confidence_of_exactly_one_is_in_the_last_bin() -> None:
    # 0.95 (right) and 1.0 (wrong) share bin [0.9, 1]: their gaps +0.05 and -1 partly cancel.
    # In a bin of its own, as in torchmetrics#3510, the sum would be 1.05 / 2.
    logits, target = np.array([[math.log(0.95), math.log(0.05)], [1000.0, 0.0]]), [0, 1]
    assert metrics.ece(logits, target, bins=10) == pytest.approx(0.95 / 2)
    assert metrics.reliability(logits, target, bins=10).count.tolist() == [0] * 9 + [2]
    # Classwise: p_0 = 0.95, 1.0 against 1, 0; p_1 = 0.05, 0.0 against 0, 1 in the first bin.
    assert metrics.classwise_ece(logits, target, bins=10) == pytest.approx(0.95 / 2)


def test_confidence_on_an_inner_edge_belongs_to_the_bin_above() -> None:
    # 0.5 is exact. Together with 0.6 (right) in [0.5, 1]: |0 - 0.5 + 1 - 0.6| / 2.
    logits = np.concatenate([np.zeros((1, 2)), logits_of([0.6])])
    assert metrics.ece(logits, [1, 0], bins=2) == pytest.approx(0.05)
    assert metrics.reliability(logits, [1, 0], bins=2).count.tolist() == [0, 2]


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 20))
def test_equal_mass_with_ties_does_not_depend_on_the_order(seed: int, n: int, bins: int) -> None:
    rng = np.random.default_rng(seed)
    logits, target = logits_of(list(rng.choice([0.55, 0.7, 0.9], size=n))), rng.integers(2, size=n)
    order = rng.permutation(n)
    value = metrics.ece(logits, target, bins=bins, binning="mass")
    again = metrics.ece(logits[order], target[order], bins=bins, binning="mass")
    assert value == pytest.approx(again, abs=1e-12)
    # Samples of equal confidence share a bin, so with as many bins as samples each level is one.
    levels = metrics.ece(logits, target, bins=n, binning="mass")
    assert levels == pytest.approx(metrics.ece(logits, target, bins=20), abs=1e-12)


def test_equal_mass_when_most_confidences_saturate() -> None:
    logits = np.concatenate([logits_of([0.6, 0.8]), np.full((8, 2), [1000.0, 0.0])])
    target = [1, 0] + [0] * 7 + [1]
    expected = (0.6 + 0.2 + 1) / 10  # ten bins: 0.6, 0.8, and the eight at 1 together
    assert metrics.ece(logits, target, bins=10, binning="mass") == pytest.approx(expected)


def slow_smooth_ece(confidence: np.ndarray, correct: np.ndarray) -> float:
    """The definition: a sum over mirror images, integrated by the trapezoid rule; bisection."""
    t = np.linspace(0, 1, 2001)

    def error(width: float) -> float:
        images = [2 * k + sign * confidence for k in range(-2, 3) for sign in (1, -1)]
        kernel = sum(np.exp(-(((t[:, None] - f) / width) ** 2) / 2) for f in images)
        smoothed = kernel @ (correct - confidence) / (width * math.sqrt(2 * math.pi))
        return float(np.trapezoid(np.abs(smoothed) / len(correct), t))

    low, high = 1e-3, 1.0
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (middle, high) if error(middle) > middle else (low, middle)
    return low


@pytest.mark.parametrize(("n", "temperature"), [(20, 1.0), (100, 0.4), (101, 3.0)])
def test_smooth_ece_is_its_definition(n: int, temperature: float) -> None:
    logits, target = sample(n, n, 3, temperature=temperature)
    confidence, correct = relplot.multiclass_logits_to_confidences(logits, target)
    value = metrics.smooth_ece(logits, target)
    assert value == pytest.approx(slow_smooth_ece(confidence, correct), abs=3e-4)
    assert value == pytest.approx(relplot.smECE(confidence, correct), abs=2e-3)


def test_smooth_ece_at_its_ends() -> None:
    sure = np.array([[1000.0, 0.0]])
    assert metrics.smooth_ece(sure, [0]) == 0.0
    assert metrics.smooth_ece(sure, [1]) == pytest.approx(1.0)
    # All rows at one confidence: at any width the integral is |accuracy - confidence|.
    assert metrics.smooth_ece(np.repeat(logits_of([0.7]), 4, 0), [0, 0, 1, 1]) == pytest.approx(
        0.2, abs=2e-4
    )


def test_calibration_floor() -> None:
    logits, target = sample(5, 2000, 4)
    floor = metrics.calibration_floor(logits, target)
    rng = np.random.default_rng(123)
    calibrated = []
    for _ in range(100):
        labels = np.argmax(logits + rng.gumbel(size=logits.shape), axis=1)
        calibrated.append(metrics.smooth_ece(logits, labels))
    assert floor == pytest.approx(np.mean(calibrated), rel=0.1)
    assert metrics.smooth_ece(3 * logits, target) > 3 * metrics.calibration_floor(
        3 * logits, target
    )
    fewer = metrics.calibration_floor(logits[:125], target[:125])
    assert 2 < fewer / floor < 8  # 4 for 1 / sqrt(N)
    assert metrics.calibration_floor(logits, 0 * target) == floor
    with pytest.raises(ValueError, match="draws: expected at least 1, got 0"):
        metrics.calibration_floor(logits, target, draws=0)


def test_classwise_ece_by_hand() -> None:
    # One bin: per class |share of labels - mean probability|.
    logits, target = logits_of([0.9, 0.7, 0.2]), [0, 1, 1]
    assert metrics.classwise_ece(logits, target, bins=1) == pytest.approx(abs(1 / 3 - 0.6))


@given(sets, st.integers(1, 20))
def test_reliability_adds_up_to_the_ece(data: tuple[np.ndarray, np.ndarray], bins: int) -> None:
    diagram = metrics.reliability(*data, bins=bins)
    n = len(data[1])
    assert diagram.edges == pytest.approx([b / bins for b in range(bins + 1)])
    assert diagram.count.shape == diagram.confidence.shape == diagram.accuracy.shape == (bins,)
    assert diagram.count.sum() == n
    empty = diagram.count == 0
    assert np.array_equal(np.isnan(diagram.confidence), empty)
    assert np.array_equal(np.isnan(diagram.accuracy), empty)
    full = ~empty
    assert (diagram.edges[:-1][full] <= diagram.confidence[full]).all()
    assert (diagram.confidence[full] <= diagram.edges[1:][full]).all()
    weighted = diagram.count * np.abs(diagram.accuracy - diagram.confidence)
    assert np.nansum(weighted) / n == pytest.approx(metrics.ece(*data, bins=bins), abs=1e-12)
    hits = np.nansum(diagram.count * diagram.accuracy)
    assert hits == pytest.approx(n * metrics.accuracy(*data))


# --- The other metrics at their edges -------------------------------------------------------------


def test_auroc_is_nan_without_both_kinds() -> None:
    logits = np.array([[2.0, 0.0], [0.0, 1.0]])
    assert math.isnan(metrics.confidence_auroc(logits, [0, 1]))
    assert math.isnan(metrics.confidence_auroc(logits, [1, 0]))
    assert metrics.confidence_auroc(logits, [0, 0]) == 1.0
    assert metrics.confidence_auroc(logits, [1, 1]) == 0.0
    assert metrics.confidence_auroc(np.zeros((2, 2)), [0, 1]) == 0.5


def test_auroc_of_two_classes_survives_saturation() -> None:
    # With two classes the order of confidences does not depend on a temperature. At 1000 times
    # the logits nearly all confidences are 1.0 in float64, and their own AUROC is a coin toss.
    logits, target = sample(3, 400, 2, temperature=1.5)
    right = logits.argmax(1) == target
    saturated = [max(probabilities(row)) for row in 1000 * logits]
    assert roc_auc_score(right, saturated) < 0.6
    expected = metrics.confidence_auroc(logits, target)
    assert expected > 0.65
    assert metrics.confidence_auroc(1000 * logits, target) == pytest.approx(expected, abs=1e-12)


def test_aurc_with_ties_is_the_mean_over_their_orders() -> None:
    logits = logits_of([0.9, 0.7, 0.7, 0.7, 0.6])
    target = [1, 0, 1, 0, 1]
    areas = []
    for order in itertools.permutations([0, 1, 0]):
        wrong = np.array([1, *order, 1])
        areas.append(np.mean(wrong.cumsum() / np.arange(1, 6)))
    assert metrics.aurc(logits, target) == pytest.approx(np.mean(areas))


def test_aurc_survives_saturation() -> None:
    logits, target = sample(3, 400, 2, temperature=1.5)
    expected = metrics.aurc(logits, target)
    assert metrics.aurc(1000 * logits, target) == pytest.approx(expected)
    assert expected < 1 - metrics.accuracy(logits, target)  # what a random order would give


def test_margins_by_hand_and_by_sign() -> None:
    logits = np.array([[3.0, 1.0, 0.5], [3.0, 1.0, 0.5], [2.0, 2.0, 0.0]])
    assert metrics.margins(logits, [0, 2, 1]) == pytest.approx([2.0, -2.5, 0.0])
    logits, target = sample(0, 100, 5)
    assert np.array_equal(metrics.margins(logits, target) > 0, logits.argmax(1) == target)


@given(sets, st.integers(0, 10**6))
def test_a_constant_added_to_a_row_changes_nothing(
    data: tuple[np.ndarray, np.ndarray], seed: int
) -> None:
    logits, target = data
    shift = np.random.default_rng(seed).uniform(-1e3, 1e3, size=(len(target), 1))
    result = metrics.evaluate(logits + shift, target)
    assert result == pytest.approx(metrics.evaluate(logits, target), abs=1e-9, nan_ok=True)


def test_huge_logits() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits = 1e4 * np.array([[1, -1, 0], [-1, 1, 0], [0, -1, 1], [1, -1, 0]])
        result = metrics.evaluate(logits, [0, 1, 2, 1])
        interval = metrics.bootstrap(logits, [0, 1, 2, 1], resamples=10)
    assert result == pytest.approx(
        {
            "accuracy": 0.75,
            "balanced_accuracy": (1 + 1 / 2 + 1) / 3,
            "macro_f1": (2 / 3 + 2 / 3 + 1) / 3,
            "nll": 5000.0,
            "brier": 0.5,
            "ece": 0.25,
            "ece_mass": 0.25,
            "classwise_ece": (0.25 + 0.25 + 0.0) / 3,
            "smooth_ece": 0.25,
            "auroc": 0.5,  # all are equally confident
            "aurc": 0.25,
            "margin": (1e4 + 1e4 + 1e4 - 2e4) / 4,
        }
    )
    assert np.isfinite(list(interval.values())).all()


def test_a_masked_class_counts_as_probability_zero() -> None:
    logits, target = sample(1, 80, 3)
    masked = np.insert(logits, 3, -np.inf, axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = metrics.evaluate(masked, target)
        temperature = metrics.fit_temperature(masked, target)
    expected = metrics.evaluate(logits, target)
    expected["classwise_ece"] *= 3 / 4  # the fourth class has no gap
    assert result == pytest.approx(expected)
    assert temperature == pytest.approx(metrics.fit_temperature(logits, target))


def test_all_other_classes_masked() -> None:
    logits = np.array([[0.0, -np.inf, -np.inf], [1.0, 0.0, 2.0], [1.0, 0.0, 2.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = metrics.evaluate(logits, [0, 0, 2])
    assert metrics.margins(logits, [0, 0, 2]).tolist() == pytest.approx([math.inf, -1.0, 1.0])
    assert result["margin"] == math.inf
    assert result["auroc"] == pytest.approx(0.75)  # one right above, one right level with the wrong


def test_one_sample() -> None:
    result = metrics.evaluate([[math.log(3.0), 0.0]], [0])
    assert result == pytest.approx(
        {
            "accuracy": 1.0,
            "balanced_accuracy": 1.0,
            "macro_f1": 1.0,
            "nll": -math.log(0.75),
            "brier": 0.125,
            "ece": 0.25,
            "ece_mass": 0.25,
            "classwise_ece": 0.25,
            "smooth_ece": pytest.approx(0.25, abs=2e-4),
            "auroc": math.nan,
            "aurc": 0.0,
            "margin": math.log(3.0),
        },
        nan_ok=True,
    )


@given(sets)
def test_brier_bounds_and_uniform_prediction(data: tuple[np.ndarray, np.ndarray]) -> None:
    logits, target = data
    k = logits.shape[1]
    assert 0 <= metrics.brier(logits, target) <= 2
    assert metrics.brier(np.zeros_like(logits), target) == pytest.approx(1 - 1 / k)
    assert metrics.nll(np.zeros_like(logits), target) == pytest.approx(math.log(k))
    wrong = np.where(np.arange(k) == (target[:, None] + 1) % k, 1e4, 0.0)
    assert metrics.brier(wrong, target) == 2.0


# --- Inputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_torch_tensors_are_computed_in_float64(dtype: torch.dtype) -> None:
    logits, target = sample(5, 40, 3)
    tensor = torch.tensor(logits).to(dtype).requires_grad_()
    labels = torch.tensor(target).to(torch.int32)
    rounded = tensor.detach().double().numpy()
    assert metrics.evaluate(tensor, labels) == metrics.evaluate(rounded, target)
    assert metrics.fit_temperature(tensor, labels) == metrics.fit_temperature(rounded, target)


def test_lists_integers_and_strides() -> None:
    logits, target = np.array([[2, 0], [0, 1], [0, 3]]), np.array([0, 1, 0], dtype=np.uint8)
    expected = metrics.evaluate(logits.astype(float), target)
    assert metrics.evaluate(logits.tolist(), target.tolist()) == expected
    assert metrics.evaluate(np.asfortranarray(logits), target) == expected
    wide = np.repeat(logits, 2, axis=1)[:, ::2]
    assert metrics.evaluate(wide, target) == expected


def test_inputs_are_left_alone() -> None:
    logits, target = sample(5, 40, 3)
    before = logits.copy(), target.copy()
    metrics.evaluate(logits, target)
    metrics.bootstrap(logits, target, resamples=3)
    metrics.fit_temperature(logits, target)
    assert np.array_equal(logits, before[0])
    assert np.array_equal(target, before[1])


GOOD = np.array([[1.0, 0.0], [0.0, 1.0]])


@pytest.mark.parametrize(
    ("logits", "target", "error", "message"),
    [
        (GOOD[0], [0, 1], ValueError, r"logits: expected shape \(N, K\).* got \(2,\)"),
        (GOOD[None], [0, 1], ValueError, r"logits: expected shape .* got \(1, 2, 2\)"),
        (GOOD[:0], [], ValueError, r"logits: expected shape .* got \(0, 2\)"),
        (GOOD[:, :1], [0, 0], ValueError, r"logits: expected shape .* K >= 2, got \(2, 1\)"),
        (GOOD, [0, 1, 0], ValueError, r"target: expected shape \(2,\) .* got \(3,\)"),
        (GOOD, [[0], [1]], ValueError, r"target: expected shape \(2,\) .* got \(2, 1\)"),
        (GOOD, [0, 2], ValueError, r"target: expected labels in \[0, 2\), got 2 in row 1"),
        (GOOD, [-100, 1], ValueError, r"target: expected labels in \[0, 2\), got -100 in row 0"),
        (GOOD, [0.0, 1.0], TypeError, "target: expected integer labels, got dtype float64"),
        (GOOD, [True, False], TypeError, "target: expected integer labels, got dtype bool"),
        (GOOD * 1j, [0, 1], TypeError, "logits: expected real numbers, got dtype complex128"),
        ([["a", "b"]], [0], TypeError, "logits: expected real numbers, got dtype <U1"),
        ([[0, 1], [math.nan, 0]], [0, 1], ValueError, "got nan in row 1, column 0"),
        ([[0, math.inf]], [1], ValueError, "got inf in row 0, column 1"),
        ([[0, -math.inf]], [1], ValueError, "got -inf in row 0, column 1, where the label is 1"),
    ],
)
def test_refused(logits: object, target: object, error: type[Exception], message: str) -> None:
    for function in (*SINGLE.values(), metrics.evaluate, metrics.fit_temperature):
        with pytest.raises(error, match=message):
            function(logits, target)
    for function in (metrics.bootstrap, metrics.reliability):
        with pytest.raises(error, match=message):
            function(logits, target)


def test_refused_options() -> None:
    for function in (metrics.ece, metrics.classwise_ece, metrics.reliability, metrics.bootstrap):
        with pytest.raises(ValueError, match="bins: expected at least 1, got 0"):
            function(GOOD, [0, 1], bins=0)
    with pytest.raises(ValueError, match="binning: expected 'width' or 'mass', got 'quantile'"):
        metrics.ece(GOOD, [0, 1], binning="quantile")
    with pytest.raises(ValueError, match="resamples: expected at least 1, got 0"):
        metrics.bootstrap(GOOD, [0, 1], resamples=0)
    for level in (0.0, 1.0, 95, math.nan):
        with pytest.raises(ValueError, match=r"level: expected a value in \(0, 1\)"):
            metrics.bootstrap(GOOD, [0, 1], level=level)


# --- The margin bound -----------------------------------------------------------------------------


def penex_losses(logits: np.ndarray, target: np.ndarray, alpha: float, rho: float) -> np.ndarray:
    chosen = logits[np.arange(len(target)), target]
    return np.exp(-alpha * chosen) + rho * np.exp(logits).sum(axis=1)


@given(st.integers(0, 10**6), st.floats(0.01, 3.0), st.floats(1e-4, 10.0), st.floats(0.1, 5.0))
def test_margin_bound_holds(seed: int, alpha: float, rho: float, scale: float) -> None:
    logits, target = sample(seed, 200, 4, scale)
    logits = logits + math.log(alpha / rho) / (1 + alpha)  # near the loss's own minimum
    mean_loss = penex_losses(logits, target, alpha, rho).mean()
    margins = metrics.margins(logits, target)
    for gamma in (*np.quantile(margins, [0, 0.02, 0.1, 0.5, 1]), -100.0, 0.0):
        bound = metrics.margin_bound(mean_loss, gamma, alpha, rho)
        assert np.mean(margins <= gamma) <= bound * (1 + 1e-12)
        assert gamma < 0 or bound > 1


@pytest.mark.parametrize("alpha", [0.05, 0.5, 2.0])
@pytest.mark.parametrize("rho", [0.01, 1.7])
def test_margin_bound_is_the_least_loss_of_a_margin(alpha: float, rho: float) -> None:
    """For a very negative margin m a sample can reach the bound: share 1 at its own loss."""
    m = -12.0
    top = math.log(alpha / rho) / (1 + alpha) - alpha * m / (1 + alpha)
    loss = penex_losses(np.array([[m + top, top]]), np.array([0]), alpha, rho).item()
    assert metrics.margin_bound(loss, m, alpha, rho) == pytest.approx(1, rel=1e-4)


def test_margin_bound_refuses_and_does_not_overflow() -> None:
    assert metrics.margin_bound(1.0, 1e6, 0.1, 0.1) == math.inf
    for name in ("mean_loss", "sensitivity", "penalty"):
        arguments = {"mean_loss": 1.0, "margin": 0.0, "sensitivity": 0.1, "penalty": 0.1}
        for bad in (0.0, -1.0, math.nan):
            with pytest.raises(ValueError, match=f"{name}: expected a number > 0, got {bad}"):
                metrics.margin_bound(**(arguments | {name: bad}))


# --- Temperature ----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.02, 0.4, 1.0, 2.5, 300.0])
def test_temperature_of_scaled_logits_is_recovered(temperature: float) -> None:
    logits, target = sample(0, 20_000, 5)
    base = metrics.fit_temperature(logits, target)
    assert base == pytest.approx(1.0, abs=0.02)  # labels were drawn from softmax(logits)
    scaled = metrics.fit_temperature(temperature * logits, target)
    assert scaled == pytest.approx(temperature * base, rel=1e-9)


@given(st.integers(0, 10**6), st.integers(2, 6), st.floats(0.3, 3.0), st.floats(0.01, 20.0))
def test_no_other_temperature_is_better(
    seed: int, k: int, temperature: float, smoothing: float
) -> None:
    logits, target = sample(seed, 60, k, temperature=temperature)
    share = smoothing / (60 + smoothing)

    def objective(t: float) -> float:
        log_prob = log_softmax(logits / t, axis=1)
        even = -log_prob.mean() + math.log(t)
        return (1 - share) * metrics.nll(logits / t, target) + share * even

    fitted = metrics.fit_temperature(logits, target, smoothing=smoothing)
    best = objective(fitted)
    for log_t in np.linspace(-7, 7, 57):
        assert best <= objective(math.exp(log_t)) + 1e-12


@pytest.mark.parametrize("k", [2, 6])
def test_smoothing_vanishes_with_the_rows(k: int) -> None:
    logits, target = sample(k, 40, k)
    once = metrics.fit_temperature(logits, target, smoothing=1e-9)
    few, many = (
        metrics.fit_temperature(np.tile(logits, (times, 1)), np.tile(target, times)) / once - 1
        for times in (5, 50)
    )
    assert few == pytest.approx(10 * many, rel=0.05)


@pytest.mark.parametrize(("n", "k"), [(50, 10), (200, 2), (1000, 10)])
def test_temperature_of_confident_logits_has_little_bias(n: int, k: int) -> None:
    fitted = [metrics.fit_temperature(*sample(seed, n, k, scale=20.0)) for seed in range(40)]
    assert abs(np.mean(np.log(fitted))) < 0.4


@pytest.mark.parametrize("smoothing", [0.5, 1.0])
def test_temperature_of_two_classes_and_one_gap(smoothing: float) -> None:
    # Nine of ten samples right with the same gap g: with x = g / T and the share e of random
    # labels, the probability of the wrong class solves q = (1 - e) / 10 + e / 2 - e / x.
    logits, target = np.tile([4.0, 0.0], (10, 1)), [0] * 9 + [1]
    x = 4 / metrics.fit_temperature(logits, target, smoothing=smoothing)
    share = smoothing / (10 + smoothing)
    assert 1 / (1 + math.exp(x)) == pytest.approx((1 - share) / 10 + share / 2 - share / x)
    # Without smoothing g / T = log 9.
    plain = metrics.fit_temperature(logits, target, smoothing=1e-12)
    assert plain == pytest.approx(4 / math.log(9))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_temperature_is_finite_at_the_edges(scale: float) -> None:
    logits, _ = sample(0, 50, 4)
    separated = metrics.fit_temperature(scale * logits, logits.argmax(1)) / scale
    assert 0.05 < separated < 1
    wrong = (1 - softmax(logits / separated, axis=1).max(axis=1)).sum()
    assert 0.1 < wrong < 2  # rows, where none was
    reversed_ = metrics.fit_temperature(scale * logits, logits.argmin(1)) / scale
    assert 100 < reversed_ < 1e4
    assert metrics.nll(logits / reversed_, logits.argmin(1)) == pytest.approx(math.log(4), abs=0.1)
    assert metrics.fit_temperature(np.full((50, 4), scale), logits.argmax(1)) == 1.0


def test_temperature_grows_with_the_rows_that_contradict_it() -> None:
    fitted = [
        metrics.fit_temperature(np.tile([1.0, 0.0], (n, 1)), np.ones(n, int))
        for n in (100, 1000, 10_000)
    ]
    assert fitted[1] / fitted[0] == pytest.approx(10, rel=0.1)
    assert fitted[2] / fitted[1] == pytest.approx(10, rel=0.01)


def test_temperature_refuses_no_smoothing() -> None:
    for smoothing in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="smoothing: expected a number > 0"):
            metrics.fit_temperature(GOOD, [0, 1], smoothing=smoothing)


def test_nll_is_refinement_plus_calibration() -> None:
    test, validation = sample(1, 4000, 3), sample(2, 4000, 3)
    parts = metrics.decompose_nll(5 * test[0], test[1], 5 * validation[0], validation[1])
    assert parts.temperature == metrics.fit_temperature(5 * validation[0], validation[1])
    assert parts.nll == metrics.nll(5 * test[0], test[1])
    assert parts.refinement + parts.calibration == pytest.approx(parts.nll)
    # The labels were drawn from softmax(test): that is what is left after scaling.
    assert parts.refinement == pytest.approx(metrics.nll(*test), abs=1e-3)
    assert parts.calibration > 0.5
    calibrated = metrics.decompose_nll(*test, *validation)
    assert calibrated.calibration == pytest.approx(0, abs=1e-3)


def test_majority_baseline() -> None:
    train, test = [0] * 5 + [1] * 12, [1, 1, 0, 1, 2]
    result = metrics.majority_baseline(train, test, 3)
    assert tuple(result) == KEYS
    assert result["accuracy"] == 0.6
    assert result["balanced_accuracy"] == pytest.approx(1 / 3)
    share = [6 / 20, 13 / 20, 1 / 20]
    assert result["nll"] == pytest.approx(-np.mean([math.log(share[y]) for y in test]))
    with pytest.raises(ValueError, match=r"target: expected labels in \[0, 3\), got 3 in row 0"):
        metrics.majority_baseline([3], test, 3)
    with pytest.raises(ValueError, match=r"target: expected labels in \[0, 3\), got 4 in row 1"):
        metrics.majority_baseline(train, [0, 4], 3)


# --- Bootstrap ------------------------------------------------------------------------------------


def test_bootstrap_is_the_metric_of_resampled_predictions() -> None:
    logits, target = sample(7, 83, 4, temperature=0.5)
    intervals = metrics.bootstrap(logits, target, resamples=60, level=0.8, seed=11, bins=6)
    rng = np.random.default_rng(11)
    drawn = [rng.integers(83, size=83) for _ in range(60)]
    values = [oracle(logits[index], target[index], 6) for index in drawn]
    assert list(intervals) == ["accuracy", "nll", "brier", "ece"]
    for name, interval in intervals.items():
        expected = np.quantile([value[name] for value in values], [0.1, 0.9])
        assert interval == pytest.approx(tuple(expected), rel=1e-12), name


def test_bootstrap_against_other_draws_and_the_normal_approximation() -> None:
    logits, target = sample(8, 400, 3, temperature=2.0)
    intervals = metrics.bootstrap(logits, target, resamples=3000)
    rng = np.random.default_rng(999)
    values = []
    for _ in range(1500):
        index = rng.choice(400, size=400)
        values.append(metrics.ece(logits[index], target[index]))
    low, high = np.quantile(values, [0.025, 0.975])
    assert intervals["ece"] == pytest.approx((low, high), abs=0.1 * (high - low))
    per_sample = {
        "accuracy": logits.argmax(1) == target,
        "nll": [metrics.nll(z[None], [y]) for z, y in zip(logits, target, strict=True)],
        "brier": [metrics.brier(z[None], [y]) for z, y in zip(logits, target, strict=True)],
    }
    for name, value in per_sample.items():
        half = 1.96 * np.std(value) / 20
        expected = (np.mean(value) - half, np.mean(value) + half)
        assert intervals[name] == pytest.approx(expected, abs=0.2 * half), name


def test_bootstrap_seed_and_level() -> None:
    data = sample(9, 100, 3)
    assert metrics.bootstrap(*data, resamples=50) == metrics.bootstrap(*data, resamples=50, seed=0)
    assert metrics.bootstrap(*data, resamples=50) != metrics.bootstrap(*data, resamples=50, seed=1)
    narrow = metrics.bootstrap(*data, resamples=200, level=0.5)
    for name, (low, high) in metrics.bootstrap(*data, resamples=200).items():
        assert low < narrow[name][0] < narrow[name][1] < high


def test_bootstrap_of_one_sample_is_a_point() -> None:
    intervals = metrics.bootstrap([[math.log(3.0), 0.0]], [0], resamples=5)
    assert intervals["ece"] == pytest.approx((0.25, 0.25))
    assert intervals["accuracy"] == (1.0, 1.0)


def test_bootstrap_memory_does_not_grow_with_the_resamples() -> None:
    logits, target = sample(0, 50_000, 10)
    tracemalloc.start()
    metrics.bootstrap(logits, target, resamples=150)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6  # all draws at once would be 60 MB, in float64


# --- Tables ---------------------------------------------------------------------------------------


def test_metrics_table() -> None:
    assert tuple(metrics.METRICS) == KEYS
    assert {name for name, m in metrics.METRICS.items() if m.higher_is_better} == {
        "accuracy",
        "balanced_accuracy",
        "macro_f1",
        "auroc",
        "margin",
    }
    percent = [name for name, m in metrics.METRICS.items() if m.percent]
    assert percent == ["accuracy", "balanced_accuracy", "macro_f1"]
    assert len({m.label for m in metrics.METRICS.values()}) == len(KEYS)
    for name, value in metrics.evaluate(*sample(0, 30, 3)).items():
        low, high = metrics.METRICS[name].bounds
        assert low <= value <= high
    assert metrics.METRICS["brier"].bounds == (0, 2)
    assert metrics.METRICS["nll"].bounds == (0, math.inf)
    assert metrics.METRICS["accuracy"].format(0.93449) == "93.4"
    assert metrics.METRICS["nll"].format(1 / 3) == "0.333"
