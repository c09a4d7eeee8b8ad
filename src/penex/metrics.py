r"""What a set of logits and labels is worth: accuracy, likelihood, calibration, margins.

Every function takes the logits (N, K) and the integer labels (N,) of a whole set, as numpy arrays,
torch tensors (any device, any dtype) or nested lists, and computes in float64. Nothing here is
averaged over mini-batches: a calibration error is not a mean over samples, and its average over
batches makes a perfectly calibrated predictor look bad.

"Logits" are those of the predicted probabilities, softmax(logits). For a network :math:`f` trained
with PENEX pass :math:`(1+\alpha) f`, and everything, margins included, compares with other losses.

All functions of (logits, target) refuse the same things. ValueError: shapes other than (N, K) and
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

need("penex.metrics", "compare", "numpy", "scipy", "sklearn")

import numpy as np  # noqa: E402
from numpy.typing import ArrayLike, NDArray  # noqa: E402
from scipy.optimize import brentq  # noqa: E402
from scipy.special import log_softmax, logsumexp, softmax  # noqa: E402

__all__ = [
    "METRICS",
    "TEMPERATURE_BOUNDS",
    "Metric",
    "Reliability",
    "Spread",
    "accuracy",
    "bootstrap",
    "brier",
    "classwise_ece",
    "confidence_auroc",
    "ece",
    "evaluate",
    "fit_temperature",
    "margin_bound",
    "margins",
    "nll",
    "reliability",
    "spread",
]

Floats = NDArray[np.float64]
Integers = NDArray[np.intp]

TEMPERATURE_BOUNDS = (math.exp(-7), math.exp(7))
"""Where :func:`fit_temperature` stops; a result at a bound says that the set cannot tell T."""


class Metric(NamedTuple):
    """How a table shows a metric."""

    label: str
    higher_is_better: bool
    percent: bool = False

    def format(self, value: float) -> str:
        """The number without its unit: an accuracy of 0.934 is "93.4", an NLL of 1/3 "0.333"."""
        return f"{100 * value:.1f}" if self.percent else f"{value:.3f}"


class Spread(NamedTuple):
    """What :func:`spread` measures."""

    label: float
    """The variance of f_y."""
    partition: float
    """The variance of log Z."""


METRICS: Mapping[str, Metric] = {  # what `evaluate` returns, in its order
    "accuracy": Metric("Accuracy", higher_is_better=True, percent=True),
    "nll": Metric("NLL", higher_is_better=False),
    "brier": Metric("Brier", higher_is_better=False),
    "ece": Metric("ECE", higher_is_better=False),
    "ece_mass": Metric("ECE (equal mass)", higher_is_better=False),
    "classwise_ece": Metric("Classwise ECE", higher_is_better=False),
    "auroc": Metric("AUROC", higher_is_better=True),
    "margin": Metric("Margin", higher_is_better=True),
}


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram: accuracy against confidence in B equal-width bins.

    Attributes:
        edges: (B + 1,) from 0 to 1. Bin b is [edges[b], edges[b + 1]), the last one closed.
        count: (B,) integers, samples in each bin.
        confidence: (B,) mean confidence, NaN in an empty bin.
        accuracy: (B,) share of right predictions, NaN in an empty bin.
    """

    edges: Floats
    count: Integers
    confidence: Floats
    accuracy: Floats


@dataclass(frozen=True)
class _Predictions:
    """What `_predictions` has checked; nothing below checks logits or labels again."""

    log_prob: Floats  # (N, K)
    target: Integers  # (N,)
    predicted: Integers  # (N,), the first class with the largest logit

    @cached_property
    def correct(self) -> Floats:
        return np.asarray(self.predicted == self.target, np.float64)

    @cached_property
    def confidence(self) -> Floats:
        return np.asarray(np.exp(self.of(self.predicted)))

    def of(self, classes: Integers) -> Floats:
        """(N,) log-probabilities of one class per row."""
        return np.asarray(self.log_prob[np.arange(len(classes)), classes])

    def without(self, classes: Integers) -> Floats:
        """(N, K) log-probabilities, one class per row set to -inf."""
        others = self.log_prob.copy()
        others[np.arange(len(classes)), classes] = -np.inf
        return others


def _array(values: Any) -> NDArray[Any]:
    if hasattr(values, "detach"):  # a torch tensor, told by its methods: torch is not imported
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


def _classwise_ece(p: _Predictions, bins: int) -> float:
    gaps = []
    for k, log_prob in enumerate(p.log_prob.T):
        prob, event = np.exp(log_prob), (p.target == k).astype(np.float64)
        gaps.append(_binned_gap(prob, event, _bin_index(prob, bins)))
    return float(np.mean(gaps))


def _confidence_auroc(p: _Predictions) -> float:
    from sklearn.metrics import roc_auc_score  # slow to import, and needed here alone

    if p.correct.min() == p.correct.max():
        return math.nan
    # log(c / (1 - c)) orders as the confidence c does, without tying all that round to 1. It is
    # +inf where every other class is masked, which scikit-learn refuses.
    log_odds = p.of(p.predicted) - logsumexp(p.without(p.predicted), axis=1)
    return float(roc_auc_score(p.correct, np.nan_to_num(log_odds)))


def accuracy(logits: ArrayLike, target: ArrayLike) -> float:
    """Share of samples whose largest logit is the label's; of equal logits the first class counts.

    Args:
        logits: (N, K), softmax(logits) being the prediction.
        target: (N,) integer labels in [0, K).

    Returns:
        The share, in [0, 1].
    """
    return float(_predictions(logits, target).correct.mean())


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
            floor(b N / B), so sizes differ by one at most; but equal confidences always share a
            bin (the last that any of them would be in), so the order of samples does not matter.

    Returns:
        The calibration error.

    Raises:
        ValueError: Also if `bins` < 1 or `binning` is neither.
    """
    return _ece(_predictions(logits, target), bins, binning)


def classwise_ece(logits: ArrayLike, target: ArrayLike, *, bins: int = 15) -> float:
    r"""Calibration error of all K probabilities (Kull et al., 2019), in [0, 1].

    .. math:: \frac{1}{K} \sum_k \sum_b \frac{n_{bk}}{N} |\bar y_{bk} - \bar p_{bk}|

    with :math:`\bar y_{bk}` the share of label k among the samples whose :math:`p_k` is in
    equal-width bin b, and :math:`\bar p_{bk}` the mean of that :math:`p_k`.

    Arguments as in :func:`ece`.
    """
    return _classwise_ece(_predictions(logits, target), bins)


def confidence_auroc(logits: ArrayLike, target: ArrayLike) -> float:
    """The chance that a right prediction has more confidence than a wrong one (area under ROC).

    Arguments as in :func:`accuracy`. NaN if all predictions are right or all are wrong.
    Confidences that float64 rounds to 1 keep their order.
    """
    return _confidence_auroc(_predictions(logits, target))


def margins(logits: ArrayLike, target: ArrayLike) -> Floats:
    r"""(N,) margins :math:`\log p_y - \max_{j \ne y} \log p_j`, positive for right predictions.

    In nats. Arguments as in :func:`accuracy`. +inf where all other classes have probability zero.
    """
    return _margins(_predictions(logits, target))


def spread(logits: ArrayLike, target: ArrayLike) -> Spread:
    r"""The variances of :math:`f_y` and of :math:`\log \sum_j e^{f_j}`, in square nats.

    Half of each, times a power, is what the log-domain loss adds to cross-entropy for small powers:
    :func:`penex.functional.log_penex_loss`. The one metric for logits as the network has them,
    without the factor of inference. Arguments as in :func:`accuracy`.
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

    No loss is below its limit for :math:`m \to \infty`, so for :math:`\gamma \ge 0` the bound is
    above 1 and says nothing.

    Args:
        mean_loss: Mean of :math:`e^{-\alpha f_y} + \rho \sum_j e^{f_j}`; no weights, no smoothing.
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


def fit_temperature(logits: ArrayLike, target: ArrayLike) -> float:
    """The temperature T that minimises the NLL of softmax(logits / T) (Guo et al., 2017).

    The NLL is convex in 1 / T; the root of its derivative is sought over log T in [-7, 7].

    Args:
        logits: As in :func:`accuracy`, of samples that the network was not trained on.
        target: As in :func:`accuracy`.

    Returns:
        T. A bound means that these samples cannot tell T: exp(-7) if every label has the largest
        logit (smaller is always better, but the first error on new samples then costs hundreds of
        nats), exp(7) (uniform probabilities) if the logits say nothing of the labels, or are
        constant.
    """
    p = _predictions(logits, target)
    lead = p.log_prob - p.of(p.target)[:, None]
    finite_lead = np.where(np.isfinite(lead), lead, 0.0)  # a class of probability 0 adds nothing

    def slope(log_temperature: float) -> float:
        """dNLL / d(1 / T): the mean of sum_j p_j z_j - z_y."""
        prob = softmax(lead * math.exp(-log_temperature), axis=1)
        return float(np.vdot(prob, finite_lead)) / len(prob)

    lowest, highest = TEMPERATURE_BOUNDS
    low, high = math.log(lowest), math.log(highest)
    if slope(high) >= 0:
        return highest
    if slope(low) <= 0:
        return lowest
    return math.exp(float(brentq(slope, low, high)))


def reliability(logits: ArrayLike, target: ArrayLike, *, bins: int = 15) -> Reliability:
    """Accuracy against confidence, for a diagram: the bins of :func:`ece`. Arguments as there."""
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
    """All of :data:`METRICS`, by name and in that order. Arguments as in :func:`ece`.

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
        "nll": float(-p.of(p.target).mean()),
        "brier": float(_brier(p).mean()),
        "ece": _ece(p, bins, "width"),
        "ece_mass": _ece(p, bins, "mass"),
        "classwise_ece": _classwise_ece(p, bins),
        "auroc": _confidence_auroc(p),
        "margin": float(_margins(p).mean()),
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

    The N predictions are drawn N at a time with replacement. This is the uncertainty due to a
    finite test set, not to training. For a small ECE the interval lies too high, and may exclude
    the ECE itself: resampling adds noise to every gap, and absolute values do not cancel.

    Args:
        logits: As in :func:`accuracy`.
        target: As in :func:`accuracy`.
        resamples: How many sets to draw.
        level: Coverage of the intervals, in (0, 1).
        seed: Of the draws.
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
    # each sample is drawn. One at a time: the memory does not grow with their number. By einsum,
    # as the last bits of a BLAS product depend on its threads.
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
