r"""Metrics of classifiers from logits and labels: accuracy, likelihood, calibration, margins.

Every function takes the logits (N, K) and the integer labels (N,) of a whole set, as numpy arrays,
torch tensors (any device, any dtype) or nested lists, and computes in float64. Nothing here is
averaged over mini-batches: a calibration error is not a mean over samples, and averaging it over
batches makes a perfectly calibrated predictor look bad.

The predicted probabilities are softmax(logits). For a network :math:`f` trained with PENEX, pass
:math:`(1+\alpha) f`; all metrics, margins included, can then be compared with other losses.

All functions of (logits, target) raise the same errors. ValueError: shapes other than (N, K) and
(N,) with N >= 1 and K >= 2; labels outside [0, K); NaN or +inf logits, and -inf for the label
(for another class -inf is a probability of zero). TypeError: logits that are not real numbers,
labels that are not integers.
"""

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from penex._extras import need

need("penex.metrics", "compare", "numpy", "scipy")

import numpy as np  # noqa: E402
from numpy.typing import ArrayLike, NDArray  # noqa: E402
from scipy.fft import dct, idct  # noqa: E402
from scipy.optimize import brentq  # noqa: E402
from scipy.special import log_softmax, logsumexp, softmax  # noqa: E402

__all__ = [
    "METRICS",
    "Decomposition",
    "Metric",
    "Reliability",
    "Spread",
    "accuracy",
    "aurc",
    "balanced_accuracy",
    "bootstrap",
    "brier",
    "calibration_floor",
    "classwise_ece",
    "confidence_auroc",
    "decompose_nll",
    "ece",
    "evaluate",
    "fit_temperature",
    "macro_f1",
    "majority_baseline",
    "margin_bound",
    "margins",
    "nll",
    "reliability",
    "row_values",
    "smooth_ece",
    "spread",
]

Floats = NDArray[np.float64]
Integers = NDArray[np.intp]

SMOOTH_ECE_CELLS = 4096
"""Cells of [0, 1] into which :func:`smooth_ece` rounds confidences, an error of at most 1/8192."""


class Metric(NamedTuple):
    """How tables show a metric."""

    label: str
    higher_is_better: bool
    percent: bool = False
    bounds: tuple[float, float] = (0.0, 1.0)
    """The lowest and the highest possible value."""

    def format(self, value: float) -> str:
        """A value without its unit: "93.4" for an accuracy of 0.934, "0.333" for an NLL of 1/3."""
        return f"{100 * value:.1f}" if self.percent else f"{value:.3f}"


class Spread(NamedTuple):
    """The result of :func:`spread`."""

    label: float
    """The variance of f_y."""
    partition: float
    """The variance of log Z."""


class Decomposition(NamedTuple):
    """The result of :func:`decompose_nll`; `refinement` + `calibration` is `nll`."""

    nll: float
    """NLL of the predictions as they are."""
    refinement: float
    """NLL of the predictions after temperature scaling, which no better scale reduces."""
    calibration: float
    """Reduction of the NLL by temperature scaling; negative if scaling makes these rows worse."""
    temperature: float
    """T, fitted on other rows."""


METRICS: Mapping[str, Metric] = {  # in the order of `evaluate`
    "accuracy": Metric("Accuracy", higher_is_better=True, percent=True),
    "balanced_accuracy": Metric("Balanced accuracy", higher_is_better=True, percent=True),
    "macro_f1": Metric("Macro-F1", higher_is_better=True, percent=True),
    "nll": Metric("NLL", higher_is_better=False, bounds=(0.0, math.inf)),
    "brier": Metric("Brier", higher_is_better=False, bounds=(0.0, 2.0)),
    "ece": Metric("ECE", higher_is_better=False),
    "ece_mass": Metric("ECE (equal mass)", higher_is_better=False),
    "classwise_ece": Metric("Classwise ECE", higher_is_better=False),
    "smooth_ece": Metric("Smooth ECE", higher_is_better=False),
    "auroc": Metric("AUROC", higher_is_better=True),
    "aurc": Metric("AURC", higher_is_better=False),
    "margin": Metric("Margin", higher_is_better=True, bounds=(-math.inf, math.inf)),
}


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram: accuracy against confidence in B equal-width bins.

    Attributes:
        edges: (B + 1,) from 0 to 1. Bin b is [edges[b], edges[b + 1]), the last one closed.
        count: (B,) integers, samples in each bin.
        confidence: (B,) mean confidence, NaN in an empty bin.
        accuracy: (B,) share of correct predictions, NaN in an empty bin.
    """

    edges: Floats
    count: Integers
    confidence: Floats
    accuracy: Floats


@dataclass(frozen=True)
class _Predictions:
    """Predictions checked by `_predictions`; nothing below checks logits or labels again."""

    log_prob: Floats  # (N, K)
    target: Integers  # (N,)
    predicted: Integers  # (N,), the first class with the largest logit

    @cached_property
    def correct(self) -> Floats:
        return np.asarray(self.predicted == self.target, np.float64)

    @cached_property
    def confidence(self) -> Floats:
        return np.asarray(np.exp(self.of(self.predicted)))

    @cached_property
    def log_odds(self) -> Floats:
        """(N,) log(c / (1 - c)) of the confidence c, finite.

        They have the order of c, without ties among the values that round to 1.
        """
        log_odds = self.of(self.predicted) - logsumexp(self.without(self.predicted), axis=1)
        return np.asarray(np.nan_to_num(log_odds))  # +inf where every other class is masked

    def of(self, classes: Integers) -> Floats:
        """(N,) log-probabilities of one class per row."""
        return np.asarray(self.log_prob[np.arange(len(classes)), classes])

    def without(self, classes: Integers) -> Floats:
        """(N, K) log-probabilities, one class per row set to -inf."""
        others = self.log_prob.copy()
        others[np.arange(len(classes)), classes] = -np.inf
        return others


def _array(values: Any) -> NDArray[Any]:
    if hasattr(values, "detach"):  # a torch tensor; torch is not imported to check for one
        values = values.detach().cpu()
        if values.is_floating_point():
            values = values.double()  # numpy has no bfloat16
    return np.asarray(values)


def _predictions(logits: ArrayLike, target: ArrayLike) -> _Predictions:
    z, y = _array(logits), _array(target)
    if z.ndim != 2 or z.shape[0] < 1 or z.shape[1] < 2:
        raise ValueError(f"logits: expected shape (N, K), N >= 1 and K >= 2, got {z.shape}")
    if y.shape != z.shape[:1]:
        raise ValueError(f"target: expected shape {z.shape[:1]} as logits {z.shape}, got {y.shape}")
    if z.dtype.kind not in "fiu":
        raise TypeError(f"logits: expected real numbers, got dtype {z.dtype}")
    if y.dtype.kind not in "iu":
        raise TypeError(f"target: expected integer labels, got dtype {y.dtype}")
    outside = (y < 0) | (y >= z.shape[1])
    if outside.any():
        row = outside.argmax()
        raise ValueError(f"target: expected labels in [0, {z.shape[1]}), got {y[row]} in row {row}")
    z, y = z.astype(np.float64), y.astype(np.intp)
    refused = np.isnan(z) | (z == np.inf) | ((z == -np.inf) & (np.arange(z.shape[1]) == y[:, None]))
    if refused.any():
        row, column = np.argwhere(refused)[0]
        raise ValueError(
            "logits: expected finite values, or -inf for a class that is not the label; "
            f"got {z[row, column]} in row {row}, column {column}, where the label is {y[row]}"
        )
    return _Predictions(np.asarray(log_softmax(z, axis=1)), y, z.argmax(axis=1))


def _brier(p: _Predictions) -> Floats:
    error: Floats = np.exp(p.log_prob)
    error[np.arange(len(error)), p.target] -= 1.0
    return np.asarray(np.einsum("nk,nk->n", error, error))


def _margins(p: _Predictions) -> Floats:
    return np.asarray(p.of(p.target) - p.without(p.target).max(axis=1))


def _bin_index(prob: Floats, bins: int, binning: str = "width") -> Integers:
    if operator.index(bins) < 1:
        raise ValueError(f"bins: expected at least 1, got {bins}")
    if binning == "width":
        inner_edges = np.linspace(0.0, 1.0, bins + 1)[1:-1]
    elif binning == "mass":
        inner_edges = np.sort(prob)[np.arange(1, bins) * prob.size // bins]
    else:
        raise ValueError(f"binning: expected 'width' or 'mass', got {binning!r}")
    # Without the outer edges a probability of 1 falls into the last bin, not into one beyond it.
    return np.searchsorted(inner_edges, prob, side="right")


def _binned_gap(prob: Floats, event: Floats, index: Integers) -> float:
    """Sum over bins of (n_b / N) |mean event - mean prob of bin b|, in which n_b cancels."""
    return float(np.abs(np.bincount(index, weights=event - prob)).sum() / prob.size)


def _ece(p: _Predictions, bins: int, binning: str) -> float:
    return _binned_gap(p.confidence, p.correct, _bin_index(p.confidence, bins, binning))


def _smooth_ece(confidence: Floats, correct: Floats) -> float:
    cells = SMOOTH_ECE_CELLS
    cell = np.minimum((confidence * cells).astype(np.intp), cells - 1)
    gap = np.bincount(cell, weights=correct - confidence, minlength=cells) / confidence.size
    # A reflected Gaussian kernel is diffusion on [0, 1], where each cosine decays at its own rate.
    waves, decay = dct(gap), -0.5 * (math.pi * np.arange(cells)) ** 2

    def excess(width: float) -> float:
        return float(np.abs(idct(waves * np.exp(decay * width**2))).sum()) - width

    # The error is at most 1, so at 2 the width is larger even with rounding.
    return 0.0 if excess(0.0) <= 0 else min(float(brentq(excess, 0.0, 2.0)), 1.0)


def _classwise_ece(p: _Predictions, bins: int) -> float:
    gaps = []
    for k, log_prob in enumerate(p.log_prob.T):
        prob, event = np.exp(log_prob), (p.target == k).astype(np.float64)
        gaps.append(_binned_gap(prob, event, _bin_index(prob, bins)))
    return float(np.mean(gaps))


def _confidence_auroc(p: _Predictions) -> float:
    """The AUROC by the Mann-Whitney rank sum: scikit-learn's input checks take longer than this."""
    from scipy.stats import rankdata  # slow to import, and needed only here

    right = int(p.correct.sum())
    wrong = len(p.correct) - right
    if not (right and wrong):
        return math.nan
    ranks = float(rankdata(p.log_odds)[p.correct == 1].sum())
    return (ranks - right * (right + 1) / 2) / (right * wrong)


def _aurc(p: _Predictions) -> float:
    """The mean over coverages i / N of the risk among the i most confident rows, ties averaged."""
    levels, level = np.unique(p.log_odds, return_inverse=True)
    count = np.bincount(level, minlength=len(levels))
    risk = np.bincount(level, weights=1 - p.correct) / count
    by_confidence = np.repeat(risk[::-1], count[::-1])
    return float((by_confidence.cumsum() / np.arange(1, len(level) + 1)).mean())


def _hits_and_sizes(p: _Predictions) -> tuple[Integers, Integers, Integers]:
    """Per class: rows predicted correctly, rows with that label, rows with that prediction."""
    k = p.log_prob.shape[1]
    hits = np.bincount(p.target[p.correct == 1], minlength=k)
    return hits, np.bincount(p.target, minlength=k), np.bincount(p.predicted, minlength=k)


def _balanced_accuracy(p: _Predictions) -> float:
    hits, labels, _ = _hits_and_sizes(p)
    return float((hits[labels > 0] / labels[labels > 0]).mean())


def _macro_f1(p: _Predictions) -> float:
    hits, labels, predictions = _hits_and_sizes(p)
    size = labels + predictions
    return float((2 * hits[size > 0] / size[size > 0]).mean())


def accuracy(logits: ArrayLike, target: ArrayLike) -> float:
    """Share of samples whose largest logit is the label's; among equal logits the first counts.

    Args:
        logits: (N, K), softmax(logits) being the prediction.
        target: (N,) integer labels in [0, K).

    Returns:
        The share, in [0, 1].
    """
    return float(_predictions(logits, target).correct.mean())


def balanced_accuracy(logits: ArrayLike, target: ArrayLike) -> float:
    """The mean over classes of the recall, the share of their rows that are predicted correctly.

    Only classes with rows count, as in :func:`sklearn.metrics.balanced_accuracy_score`. Arguments
    as in :func:`accuracy`.
    """
    return _balanced_accuracy(_predictions(logits, target))


def macro_f1(logits: ArrayLike, target: ArrayLike) -> float:
    """The mean over classes of F1, the harmonic mean of precision and recall.

    As :func:`sklearn.metrics.f1_score` with ``average="macro"``: a class without rows counts, with
    an F1 of 0, if it is predicted for any row; a class that is neither a label nor predicted does
    not. Arguments as in :func:`accuracy`.
    """
    return _macro_f1(_predictions(logits, target))


def nll(logits: ArrayLike, target: ArrayLike) -> float:
    r"""Negative log-likelihood, the mean of :math:`-\log p_y`, in nats.

    Arguments as in :func:`accuracy`.
    """
    p = _predictions(logits, target)
    return float(-p.of(p.target).mean())


def brier(logits: ArrayLike, target: ArrayLike) -> float:
    r"""Brier score (1950), the mean of :math:`\sum_k (p_k - 1[y = k])^2`, in [0, 2].

    Arguments as in :func:`accuracy`. For two classes this is twice the binary score.
    """
    return float(_brier(_predictions(logits, target)).mean())


def ece(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    bins: int = 15,
    binning: Literal["width", "mass"] = "width",
) -> float:
    r"""Expected calibration error of the largest probability (Guo et al., 2017), in [0, 1].

    .. math:: \sum_b \frac{n_b}{N} |\mathrm{accuracy}_b - \mathrm{mean\ confidence}_b|

    Args:
        logits: As in :func:`accuracy`.
        target: As in :func:`accuracy`.
        bins: The number of bins B.
        binning: ``"width"``: bins [b / B, (b + 1) / B), the last one closed, so a confidence of
            exactly 1 is in it. ``"mass"``: in order of confidence, bin b starts at rank
            floor(b N / B), so sizes differ by at most one; but equal confidences always share a
            bin (the last that any of them would be in), so the order of samples does not matter.

    Returns:
        The calibration error.

    Raises:
        ValueError: Also if `bins` < 1 or `binning` is neither of the two.
    """
    return _ece(_predictions(logits, target), bins, binning)


def classwise_ece(logits: ArrayLike, target: ArrayLike, *, bins: int = 15) -> float:
    r"""Calibration error of all K probabilities (Kull et al., 2019), in [0, 1].

    .. math:: \frac{1}{K} \sum_k \sum_b \frac{n_{bk}}{N} |\bar y_{bk} - \bar p_{bk}|

    where :math:`\bar y_{bk}` is the share of label k among the samples whose :math:`p_k` is in
    equal-width bin b, and :math:`\bar p_{bk}` is the mean of their :math:`p_k`.

    Arguments as in :func:`ece`.
    """
    return _classwise_ece(_predictions(logits, target), bins)


def smooth_ece(logits: ArrayLike, target: ArrayLike) -> float:
    r"""Smooth calibration error of the largest probability (Błasiok & Nakkiran, 2023), in [0, 1].

    With confidences :math:`c_i`, :math:`a_i` = 1 for correct predictions (0 for others) and a
    Gaussian kernel :math:`K_\sigma` reflected at 0 and 1, it is

    .. math:: \int_0^1 \Bigl|\frac1N \sum_i (a_i - c_i) K_\sigma(t, c_i)\Bigr|\, dt

    for the one width :math:`\sigma` that is equal to it. Unlike :func:`ece`, it has no bins to
    choose and changes continuously with the predictions. Like any calibration error, it is positive
    even for calibrated predictions: see :func:`calibration_floor`. Arguments as in
    :func:`accuracy`.
    """
    p = _predictions(logits, target)
    return _smooth_ece(p.confidence, p.correct)


def calibration_floor(
    logits: ArrayLike, target: ArrayLike, *, draws: int = 200, seed: int = 0
) -> float:
    """The mean :func:`smooth_ece` that these predictions would have if they were calibrated.

    In each draw, row i counts as correct with a probability equal to its confidence. A smooth ECE
    near this floor is no evidence of miscalibration.

    Args:
        logits: As in :func:`accuracy`.
        target: As in :func:`accuracy`; checked, but otherwise not used.
        draws: Number of sets to simulate.
        seed: Seed of the simulation.

    Returns:
        The floor, of the order of 1 / sqrt(N).

    Raises:
        ValueError: Also if `draws` < 1.
    """
    if operator.index(draws) < 1:
        raise ValueError(f"draws: expected at least 1, got {draws}")
    confidence = _predictions(logits, target).confidence
    rng = np.random.default_rng(seed)
    simulated = (rng.random(confidence.size) < confidence for _ in range(draws))
    return float(np.mean([_smooth_ece(confidence, right.astype(float)) for right in simulated]))


def confidence_auroc(logits: ArrayLike, target: ArrayLike) -> float:
    """Probability that a correct prediction has more confidence than a wrong one (AUROC).

    Arguments as in :func:`accuracy`. NaN if all predictions are correct or all are wrong.
    Confidences that float64 rounds to 1 keep their order.
    """
    return _confidence_auroc(_predictions(logits, target))


def aurc(logits: ArrayLike, target: ArrayLike) -> float:
    """Area under the risk-coverage curve (Geifman & El-Yaniv, 2017), in [0, 1]; lower is better.

    The risk at coverage i / N is the share of wrong predictions among the i with the most
    confidence; the area is the mean over i = 1 … N. For rows of equal confidence, the result is
    averaged over their orders. Arguments as in :func:`accuracy`.
    """
    return _aurc(_predictions(logits, target))


def margins(logits: ArrayLike, target: ArrayLike) -> Floats:
    r"""(N,) margins :math:`\log p_y - \max_{j \ne y} \log p_j`, positive for correct predictions.

    In nats. Arguments as in :func:`accuracy`. +inf where all other classes have probability zero.
    """
    return _margins(_predictions(logits, target))


def spread(logits: ArrayLike, target: ArrayLike) -> Spread:
    r"""The variances of :math:`f_y` and of :math:`\log \sum_j e^{f_j}`, in square nats.

    Half of each, times a power, is what the log-domain loss adds to cross-entropy for small powers;
    see :func:`penex.functional.log_penex_loss`. This is the one metric that takes the network's own
    logits, without the inference factor. Arguments as in :func:`accuracy`.
    """
    p = _predictions(logits, target)
    label = np.asarray(_array(logits), np.float64)[np.arange(len(p.target)), p.target]
    return Spread(float(label.var()), float((label - p.of(p.target)).var()))


def margin_bound(mean_loss: float, margin: float, sensitivity: float, penalty: float) -> float:
    r"""Upper bound on the share of samples with a small margin, from the mean PENEX loss (derived).

    For a sample of margin :math:`m = f_y - \max_{j \ne y} f_j`, the loss is at least
    :math:`(1+\alpha) (\rho/\alpha)^{\alpha/(1+\alpha)} e^{-\alpha m/(1+\alpha)}`, so by Markov

    .. math::
        \Pr(m \le \gamma) \le \frac{\overline{\ell}\; e^{\alpha\gamma/(1+\alpha)}}
        {(1+\alpha)\, (\rho/\alpha)^{\alpha/(1+\alpha)}}.

    The denominator is the infimum of the loss, its limit for :math:`m \to \infty`, so for
    :math:`\gamma \ge 0` the bound is above 1 and says nothing.

    Args:
        mean_loss: Mean of :math:`e^{-\alpha f_y} + \rho \sum_j e^{f_j}`, without class weights and
            label smoothing.
        margin: :math:`\gamma`, a margin of the network's own logits :math:`f`; :func:`margins` of
            the probabilities' logits are :math:`1+\alpha` times as large.
        sensitivity: :math:`\alpha > 0`.
        penalty: :math:`\rho > 0`, one value for all samples.

    Returns:
        The bound, not clipped to 1.

    Raises:
        ValueError: `mean_loss`, `sensitivity` or `penalty` is not positive.
    """
    given = {"mean_loss": mean_loss, "sensitivity": sensitivity, "penalty": penalty}
    for name, value in given.items():
        if not value > 0:
            raise ValueError(f"{name}: expected a number > 0, got {value}")
    exponent = sensitivity / (1 + sensitivity)
    with np.errstate(over="ignore"):
        growth = float(np.exp(exponent * margin))
    return mean_loss * growth / ((1 + sensitivity) * math.pow(penalty / sensitivity, exponent))


def fit_temperature(logits: ArrayLike, target: ArrayLike, *, smoothing: float = 0.1) -> float:
    r"""Fit the temperature T of softmax(logits / T) (Guo et al., 2017), with a little smoothing.

    The likelihood alone may have no maximum: T goes to zero if every label has the largest logit,
    and to infinity if the logits carry no information about the labels. To prevent the first, a
    share :math:`\varepsilon = s / (N + s)` of every label is spread evenly over the classes
    (Laplace smoothing), as if s of N + s rows had random labels. To prevent the second, log T is
    added with the same weight. The objective

    .. math:: (1 - \varepsilon)\, \mathrm{NLL}(T)
        + \varepsilon \Bigl(-\frac1{NK} \sum_{ik} \log p_{ik}(T) + \log T\Bigr)

    is convex in 1 / T and has one minimum, at a finite T > 0, which scales with the logits. With s
    fixed the bias vanishes as 1 / N.

    Args:
        logits: As in :func:`accuracy`, of samples that the network was not trained on.
        target: As in :func:`accuracy`.
        smoothing: s > 0, in rows. The more confident the network, the more a random label costs,
            so a whole row is too much: with labels drawn from softmax(logits) for 50 rows, 10
            classes and an accuracy of 95 %, it makes T 3 times too large on average. A tenth of a
            row makes it 1.35 times too large, and was also best or close to best for 2 classes,
            1,000 rows and lower accuracies.

    Returns:
        T. If the logits contradict the labels it is large, up to N / s times their range: the
            probabilities are then practically uniform. 1 if the logits of every row are equal, as
            T then does not change the probabilities.

    Raises:
        ValueError: Also if `smoothing` is not positive and finite.
    """
    if not 0 < smoothing < math.inf:
        raise ValueError(f"smoothing: expected a number > 0, got {smoothing}")
    p = _predictions(logits, target)
    possible = np.isfinite(p.log_prob)  # a masked class takes no part
    lead = p.log_prob - p.of(p.predicted)[:, None]
    finite_lead = np.where(possible, lead, 0.0)
    scale = -float(finite_lead.min())
    if scale == 0:
        return 1.0
    lead, finite_lead = lead / scale, finite_lead / scale
    share = smoothing / (len(lead) + smoothing)
    label = finite_lead[np.arange(len(lead)), p.target]
    even = finite_lead.sum(axis=1) / possible.sum(axis=1)
    expected = float(((1 - share) * label + share * even).mean())

    def slope(log_inverse: float) -> float:
        """The derivative of the objective in 1 / T, times 1 / T, which keeps its sign."""
        inverse = math.exp(log_inverse)
        prob = softmax(lead * inverse, axis=1)
        return inverse * (float(np.vdot(prob, finite_lead)) / len(prob) - expected) - share

    low, high = -1.0, 1.0
    while slope(low) >= 0:
        low *= 2
    while slope(high) <= 0:
        high *= 2
    return scale * math.exp(-float(brentq(slope, low, high)))


def decompose_nll(
    logits: ArrayLike,
    target: ArrayLike,
    validation_logits: ArrayLike,
    validation_target: ArrayLike,
    *,
    smoothing: float = 0.1,
) -> Decomposition:
    """Decompose the NLL into refinement error and calibration error (arXiv 2501.19195).

    The refinement error is the lowest NLL that a map of the predictions can reach; the calibration
    error is the reduction by that map. Here the map is temperature scaling, fitted on rows other
    than those it is measured on, so the calibration error may be slightly negative.

    Args:
        logits: As in :func:`accuracy`, of the test rows.
        target: As in :func:`accuracy`, of the test rows.
        validation_logits: (M, K) of the rows on which the temperature is fitted.
        validation_target: (M,) their labels.
        smoothing: As in :func:`fit_temperature`.

    Returns:
        The NLL of the test rows, its two parts and the temperature.
    """
    temperature = fit_temperature(validation_logits, validation_target, smoothing=smoothing)
    p = _predictions(logits, target)
    total = float(-p.of(p.target).mean())
    refinement = nll(p.log_prob / temperature, p.target)
    return Decomposition(total, refinement, total - refinement, temperature)


def majority_baseline(
    train_target: ArrayLike, test_target: ArrayLike, num_classes: int
) -> dict[str, float]:
    """All :data:`METRICS` of predicting the class shares of the training rows for every row.

    The predicted class is the majority class; among equally frequent classes, the first. One row is
    added to the count of each class, so that a class without training rows does not make the NLL
    infinite.

    Args:
        train_target: (M,) integer labels in [0, `num_classes`).
        test_target: (N,) integer labels in [0, `num_classes`).
        num_classes: K >= 2.

    Returns:
        As :func:`evaluate`.

    Raises:
        ValueError: As all functions here.
        TypeError: As all functions here.
    """
    labels = _array(train_target)
    checked = _predictions(np.zeros((len(labels), num_classes)), labels)
    share = np.bincount(checked.target, minlength=num_classes) + 1
    return evaluate(np.tile(np.log(share), (len(_array(test_target)), 1)), test_target)


def reliability(logits: ArrayLike, target: ArrayLike, *, bins: int = 15) -> Reliability:
    """Accuracy against confidence in equal-width bins. Arguments as in :func:`ece`."""
    p = _predictions(logits, target)
    index = _bin_index(p.confidence, bins)
    count = np.bincount(index, minlength=bins)
    divisor = np.where(count > 0, count, np.nan)
    return Reliability(
        edges=np.linspace(0.0, 1.0, bins + 1),
        count=count,
        confidence=np.bincount(index, weights=p.confidence, minlength=bins) / divisor,
        accuracy=np.bincount(index, weights=p.correct, minlength=bins) / divisor,
    )


def evaluate(logits: ArrayLike, target: ArrayLike, *, bins: int = 15) -> dict[str, float]:
    """All :data:`METRICS`, by name and in that order. Arguments as in :func:`ece`.

    "ece" has bins of equal width, "ece_mass" of equal mass; "auroc" is :func:`confidence_auroc`,
    "margin" the mean of :func:`margins`.

    Example:
        >>> scores = evaluate([[2.0, 0.0], [0.0, 0.0], [0.0, 1.0]], [0, 1, 1])
        >>> {name: METRICS[name].format(scores[name]) for name in ("accuracy", "nll", "margin")}
        {'accuracy': '66.7', 'nll': '0.378', 'margin': '1.000'}
    """
    p = _predictions(logits, target)
    return {
        "accuracy": float(p.correct.mean()),
        "balanced_accuracy": _balanced_accuracy(p),
        "macro_f1": _macro_f1(p),
        "nll": float(-p.of(p.target).mean()),
        "brier": float(_brier(p).mean()),
        "ece": _ece(p, bins, "width"),
        "ece_mass": _ece(p, bins, "mass"),
        "classwise_ece": _classwise_ece(p, bins),
        "smooth_ece": _smooth_ece(p.confidence, p.correct),
        "auroc": _confidence_auroc(p),
        "aurc": _aurc(p),
        "margin": float(_margins(p).mean()),
    }


def row_values(logits: ArrayLike, target: ArrayLike) -> dict[str, Floats]:
    """The values per row of the metrics of :func:`evaluate` that are means over rows.

    Arguments as in :func:`accuracy`.

    Returns:
        (N,) for "accuracy" (1 if correct, else 0), "nll", "brier" and "margin".
    """
    p = _predictions(logits, target)
    return {
        "accuracy": p.correct,
        "nll": -p.of(p.target),
        "brier": _brier(p),
        "margin": _margins(p),
    }


def bootstrap(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    bins: int = 15,
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap intervals of accuracy, NLL, Brier score and equal-width ECE.

    Each resample draws N of the N predictions with replacement. The intervals show the uncertainty
    due to a finite test set, not that due to training. For a small ECE the interval is too high,
    and may exclude the ECE itself: resampling adds noise to every gap, and absolute values do not
    cancel.

    Args:
        logits: As in :func:`accuracy`.
        target: As in :func:`accuracy`.
        resamples: Number of resamples.
        level: Coverage of the intervals, in (0, 1).
        seed: Seed of the resampling.
        bins: As in :func:`ece`.

    Returns:
        (lower, upper) for "accuracy", "nll", "brier" and "ece".

    Raises:
        ValueError: Also if `resamples` < 1, `level` is outside (0, 1) or `bins` < 1.
    """
    if operator.index(resamples) < 1:
        raise ValueError(f"resamples: expected at least 1, got {resamples}")
    if not 0 < level < 1:
        raise ValueError(f"level: expected a value in (0, 1), got {level}")
    p = _predictions(logits, target)
    n, index = len(p.target), _bin_index(p.confidence, bins)
    # The metrics are functions of sums over samples, so a resample is this matrix times how often
    # each sample is drawn. Resamples are taken one at a time, so that memory does not grow with
    # their number, and by einsum, as the last bits of a BLAS product depend on its threads.
    per_sample = np.zeros((3 + bins, n))
    per_sample[:3] = p.correct, -p.of(p.target), _brier(p)
    per_sample[3 + index, np.arange(n)] = p.correct - p.confidence
    rng = np.random.default_rng(seed)
    means = np.empty((resamples, 3 + bins))
    for mean in means:
        times_drawn = np.bincount(rng.integers(n, size=n), minlength=n).astype(np.float64)
        mean[:] = np.einsum("sn,n->s", per_sample, times_drawn) / n
    values = np.column_stack([means[:, :3], np.abs(means[:, 3:]).sum(axis=1)])
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0).tolist()
    names = ("accuracy", "nll", "brier", "ece")
    return dict(zip(names, zip(low, high, strict=True), strict=True))
