r"""Intervals, tests and decisions for paired comparisons over seeds.

A comparison trains every loss with the same J seeds. Two designs need two intervals:

- *Resplits*: every seed draws its own test part from one pool of rows. The test parts overlap, so
  the values are correlated, and :func:`resplit_interval` widens the t-interval accordingly.
- *Fixed test rows*: the test part is given, or drawn once. Then both the seeds and the rows are
  samples; use :func:`crossed_interval` for metrics that are means over rows, and
  :func:`crossed_bootstrap_interval` for all others.

All return an :class:`Estimate`. :func:`decide` turns the estimates of one metric into a verdict.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

__all__ = [
    "MIN_SEEDS",
    "Decision",
    "Estimate",
    "crossed_bootstrap_interval",
    "crossed_interval",
    "decide",
    "holm",
    "resplit_interval",
]

MIN_SEEDS = 3
"""With fewer seeds there is no interval: a variance of two values has one degree of freedom."""

UNBOUNDED = (-math.inf, math.inf)


@dataclass(frozen=True)
class Estimate:
    """A mean with its confidence interval and the two-sided test that it is zero.

    Attributes:
        mean: Mean over the seeds (and rows). NaN without a seed.
        seeds: The number of seeds.
        standard_error: Standard error of the mean. This and all that follow are None if there is no
            interval: with fewer than :data:`MIN_SEEDS` seeds, and if all values are the same number
            other than zero, which says nothing about their spread.
        df: Degrees of freedom of the t-distribution.
        low: Lower end of the interval, at least the metric's lower bound.
        high: Upper end of the interval, at most the metric's upper bound.
        p_value: Two-sided p-value of the hypothesis that the mean is zero, from the same
            t-distribution; it is below 1 - level exactly if the interval, before clipping, excludes
            zero.
    """

    mean: float
    seeds: int
    standard_error: float | None = None
    df: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None


def resplit_interval(
    values: ArrayLike,
    *,
    test_share: float,
    level: float = 0.95,
    bounds: tuple[float, float] = UNBOUNDED,
) -> Estimate:
    r"""The corrected resampled t-interval (Nadeau & Bengio, 2003, Machine Learning 52, section 3).

    For J values :math:`d_j` from random splits of one data set with mean :math:`\bar d` and sample
    variance :math:`S^2`,

    .. math:: \bar d \pm t_{J-1} \sqrt{\Bigl(\frac1J + \frac{s}{1-s}\Bigr) S^2}.

    The usual :math:`S^2 / J` is the variance of the mean of independent values. Two random test
    parts share a fraction s of their rows, so values that vary with the test rows have the
    correlation s; then :math:`E[S^2] = (1 - s) \sigma^2` and the variance of the mean is
    :math:`\sigma^2 (s + (1-s)/J)`, which gives the formula. If all rows outside the test part are
    used for training, :math:`s / (1 - s) = n_\text{test} / n_\text{train}` as in the paper.

    s is an approximation: no estimate of that correlation is unbiased (Bengio & Grandvalet, 2004).
    The interval is correct if most of the noise comes from the rows of the test part. It is too
    wide if most comes from the training itself (initialisation, small training sets), and too
    narrow if the differences depend mainly on which rows are in the training part, because training
    parts overlap as well.

    Args:
        values: (J,) one per seed: paired differences, or values of one loss.
        test_share: s in (0, 1): the number of test rows divided by that of all rows *from which
            test rows are drawn*. Validation rows belong to the denominator, because the procedure
            under test learns from them. So do rows that no part uses (a small `train_size`): they
            do not change which rows two test parts share, and n_test / n_train would inflate the
            variance without limit.
        level: Coverage, in (0, 1).
        bounds: The smallest and largest possible value; the interval is clipped to them.

    Returns:
        The estimate, without an interval for J < 3.

    Raises:
        ValueError: `values` are not (J,) finite numbers, or `test_share` or `level` is outside
            (0, 1).
    """
    if not 0 < test_share < 1:
        raise ValueError(f"test_share: expected a value in (0, 1), got {test_share}")
    d = _finite(values, "values", ndim=1)
    if len(d) < MIN_SEEDS:
        return _without_interval(d)
    factor = 1 / len(d) + test_share / (1 - test_share)
    variance = factor * float(d.var(ddof=1))
    return _estimate(float(d.mean()), len(d), variance, len(d) - 1, level, bounds)


def crossed_interval(
    values: ArrayLike,
    *,
    level: float = 0.95,
    bounds: tuple[float, float] = UNBOUNDED,
) -> Estimate:
    r"""Interval for a mean over seeds and test rows, both random and fully crossed.

    With the two-way random-effects model :math:`d_{ji} = \mu + a_j + b_i + e_{ji}` and the mean
    squares of its analysis of variance, the variance of the grand mean is estimated by

    .. math:: V = (MS_\text{seeds} + MS_\text{rows} - MS_\text{residual}) / (J n),

    which is unbiased, and then raised to what either factor alone gives if it is below that. It is
    also the two-way cluster-robust variance (Cameron, Gelbach & Miller, 2011). The quantile is that
    of a t-distribution with Satterthwaite's (1946) degrees of freedom: close to J - 1 if the seeds
    dominate, to n - 1 if the rows do. A bootstrap over 5 seeds would be too narrow by the factor
    :math:`\sqrt{4/5}` and use a normal quantile.

    The interval is conditional on the rows outside the test part: it covers the variation over
    other seeds and other test rows, but not over other training sets.

    Args:
        values: (J, n) per seed and row, in the same order of rows for all seeds: differences of
            per-row metrics, or per-row metrics themselves, such as -log p_y, Brier terms, or 1 for
            a correct prediction and 0 for others.
        level: Coverage, in (0, 1).
        bounds: The smallest and largest possible mean; the interval is clipped to them.

    Returns:
        The estimate, without an interval for J < 3.

    Raises:
        ValueError: `values` are not (J, n) finite numbers with n >= 2, or `level` is outside
            (0, 1).
    """
    d = _finite(values, "values", ndim=2)
    seeds, rows = d.shape
    if rows < 2:
        raise ValueError(f"values: expected at least 2 rows (columns), got shape {d.shape}")
    of_seed = d.mean(axis=1)
    if seeds < MIN_SEEDS:
        return _without_interval(of_seed)
    of_row, mean = d.mean(axis=0), float(d.mean())
    residual = d - of_seed[:, None] - of_row + mean
    residual_df = (seeds - 1) * (rows - 1)
    return _crossed(
        mean,
        (seeds, rows),
        seed_term=float(of_seed.var(ddof=1)) / seeds,
        row_term=float(of_row.var(ddof=1)) / rows,
        residual_term=float(np.vdot(residual, residual)) / residual_df / (seeds * rows),
        row_df=rows - 1,
        level=level,
        bounds=bounds,
    )


def crossed_bootstrap_interval(
    values: ArrayLike,
    resampled: ArrayLike,
    *,
    rows: int,
    level: float = 0.95,
    bounds: tuple[float, float] = UNBOUNDED,
) -> Estimate:
    r"""As :func:`crossed_interval`, for metrics that are not means over rows (ECE, macro-F1, AURC).

    The variance over seeds is that of `values`; the variance over rows is that of R bootstrap
    samples of rows, each drawn once and used for all seeds (and for both members of a pair). With
    :math:`v_j` the bootstrap variance of seed j and :math:`v` that of the mean over seeds, the
    three terms of :math:`V` are :math:`S^2 / J`, :math:`v` and
    :math:`(\tfrac1J \sum_j v_j - v) / (J - 1)`. For means over rows, the result is that of
    :func:`crossed_interval` up to bootstrap noise.

    Args:
        values: (J,) the metric per seed on all rows: paired differences, or values of one loss.
        resampled: (R, J) the same on R >= 2 bootstrap samples of the rows; 200 samples give the
            standard error to within 5 %.
        rows: n >= 2, the number of test rows.
        level: Coverage, in (0, 1).
        bounds: The smallest and largest possible value; the interval is clipped to them.

    Returns:
        The estimate, without an interval for J < 3. Its centre is the mean of `values`, not of
        the bootstrap samples, which are biased for an ECE.

    Raises:
        ValueError: Other shapes, numbers that are not finite, or `level` outside (0, 1).
    """
    d, draws = _finite(values, "values", ndim=1), _finite(resampled, "resampled", ndim=2)
    if draws.shape[1] != len(d) or len(draws) < 2:
        raise ValueError(f"resampled: expected shape (R >= 2, {len(d)}), got {draws.shape}")
    if rows < 2:
        raise ValueError(f"rows: expected at least 2, got {rows}")
    seeds = len(d)
    if seeds < MIN_SEEDS:
        return _without_interval(d)
    of_mean = float(draws.mean(axis=1).var(ddof=1))
    of_each = float(draws.var(axis=0, ddof=1).mean())
    return _crossed(
        float(d.mean()),
        (seeds, rows),
        seed_term=float(d.var(ddof=1)) / seeds,
        row_term=of_mean,
        residual_term=max(of_each - of_mean, 0.0) / (seeds - 1),
        row_df=min(rows, len(draws)) - 1,
        level=level,
        bounds=bounds,
    )


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Adjust p-values for multiple testing by Holm's step-down method (1979).

    Rejecting those below 0.05 keeps the probability of any false rejection at or below 5 %, under
    any dependence.

    Args:
        p_values: (m,) in [0, 1]; m may be 0.

    Returns:
        (m,) adjusted p-values, in the order of `p_values`.

    Raises:
        ValueError: `p_values` is not a vector of numbers in [0, 1].
    """
    p = np.asarray(p_values, np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p_values: expected a vector of numbers in [0, 1], got {p_values!r}")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(np.arange(len(p), 0, -1) * p[order]), 1.0)
    return adjusted


@dataclass(frozen=True)
class Decision:
    """What one metric says about a set of losses.

    Attributes:
        reference: The loss that all others are compared with.
        best: The loss with the best mean among the complete ones; None if there is none.
        starred: `best`, if it is clearly the best; otherwise None. See :func:`decide`.
        best_group: `best` and every loss that cannot be distinguished from it, from best to worst.
        better: Losses that are better than the reference.
        worse: Losses that are worse than the reference.
        incomplete: Losses that lack a value for at least one seed; they are not compared.
        differences: Loss minus reference, for every other complete loss.
        p_adjusted: Holm-adjusted p-values of `differences`; None where there is no interval.
        threshold: The smallest absolute difference that counts.
    """

    reference: str
    best: str | None
    starred: str | None
    best_group: tuple[str, ...]
    better: tuple[str, ...]
    worse: tuple[str, ...]
    incomplete: tuple[str, ...]
    differences: Mapping[str, Estimate]
    p_adjusted: Mapping[str, float | None]
    threshold: float


def decide(
    values: Mapping[str, ArrayLike],
    compare: Callable[[str, str], Estimate],
    *,
    reference: str,
    higher_is_better: bool,
    smallest_difference: float = 0.0,
    printed_step: float = 0.0,
    level: float = 0.95,
) -> Decision:
    """Decide which losses are better or worse than the reference, and if one is clearly the best.

    Two losses are *distinguished* if the Holm-adjusted p-value of their paired difference is below
    1 - level and the difference is at least the threshold, the larger of `smallest_difference`
    and `printed_step`. There are two families: every loss against the reference, and every loss
    against the best one. The best loss is *starred* if it is distinguished from the reference and
    from every other loss, the runner-up included. The reference itself can be starred.

    Choosing the best by its mean does not inflate the second family: among k equal losses the gap
    between the first two means is largest for k = 2, where there is nothing to choose.

    Args:
        values: Per loss (J,) the metric per seed, seeds in the same order; NaN where a run
            diverged or is missing.
        compare: A function that returns the estimate of the paired difference first minus second,
            from one of the functions above. It is called with two complete losses.
        reference: The loss that the others are compared with. If it is not in `values`, or
            incomplete, nothing is better, worse or starred.
        higher_is_better: The direction of the metric.
        smallest_difference: The smallest difference that matters, in units of the metric.
        printed_step: One unit of the last printed digit, in units of the metric.
        level: 1 minus the error rate of each family.

    Returns:
        The decision.

    Raises:
        ValueError: The losses have different numbers of seeds, or a threshold is negative.
    """
    threshold = max(smallest_difference, printed_step)
    if min(smallest_difference, printed_step) < 0:
        raise ValueError(
            "smallest_difference, printed_step: expected numbers >= 0, "
            f"got {smallest_difference}, {printed_step}"
        )
    arrays = {name: np.asarray(value, np.float64) for name, value in values.items()}
    if len({array.shape for array in arrays.values()}) > 1:
        shapes = {name: array.shape for name, array in arrays.items()}
        raise ValueError(f"values: expected as many seeds for every loss, got shapes {shapes}")
    sign = 1 if higher_is_better else -1
    complete = {
        name: sign * float(array.mean())
        for name, array in arrays.items()
        if array.size and np.isfinite(array).all()
    }
    ranked = sorted(complete, key=lambda name: -complete[name])

    def distinguished(
        others: Sequence[str], from_one: str
    ) -> tuple[dict[str, Estimate], dict[str, float | None], set[str]]:
        estimates = {name: compare(name, from_one) for name in others}
        tested = {n: e.p_value for n, e in estimates.items() if e.p_value is not None}
        p_adjusted: dict[str, float | None] = dict.fromkeys(others)
        p_adjusted |= dict(zip(tested, holm(list(tested.values())).tolist(), strict=True))
        found = {
            name
            for name, p in p_adjusted.items()
            if p is not None and p < 1 - level and abs(estimates[name].mean) >= threshold
        }
        return estimates, p_adjusted, found

    differences: dict[str, Estimate] = {}
    p_adjusted: dict[str, float | None] = {}
    distinct: set[str] = set()
    if reference in complete:
        others = [name for name in values if name in complete and name != reference]
        differences, p_adjusted, distinct = distinguished(others, reference)
    best: str | None = None
    starred: str | None = None
    best_group: tuple[str, ...] = ()
    if ranked:
        best, rivals = ranked[0], ranked[1:]
        _, _, behind = distinguished(rivals, best)
        best_group = (best, *(name for name in rivals if name not in behind))
        beats_reference = best == reference or best in distinct
        if rivals and len(best_group) == 1 and reference in complete and beats_reference:
            starred = best
    return Decision(
        reference=reference,
        best=best,
        starred=starred,
        best_group=best_group,
        better=tuple(n for n in differences if n in distinct and sign * differences[n].mean > 0),
        worse=tuple(n for n in differences if n in distinct and sign * differences[n].mean < 0),
        incomplete=tuple(name for name in values if name not in complete),
        differences=differences,
        p_adjusted=p_adjusted,
        threshold=threshold,
    )


def _finite(values: ArrayLike, name: str, ndim: int) -> NDArray[np.float64]:
    array = np.asarray(values, np.float64)
    if array.ndim != ndim or not np.isfinite(array).all():
        kind = {1: "a vector", 2: "a matrix"}[ndim]
        raise ValueError(f"{name}: expected {kind} of finite numbers, got {values!r}")
    return array


def _without_interval(of_seed: NDArray[np.float64]) -> Estimate:
    return Estimate(float(of_seed.mean()) if len(of_seed) else math.nan, len(of_seed))


def _crossed(
    mean: float,
    shape: tuple[int, int],
    *,
    seed_term: float,
    row_term: float,
    residual_term: float,
    row_df: int,
    level: float,
    bounds: tuple[float, float],
) -> Estimate:
    """The interval from the mean squares, each divided by J n."""
    seeds, rows = shape
    variance = max(seed_term + row_term - residual_term, seed_term, row_term)
    spread = (
        seed_term**2 / (seeds - 1)
        + row_term**2 / row_df
        + residual_term**2 / ((seeds - 1) * (rows - 1))
    )
    df = variance**2 / spread if spread > 0 else float(seeds - 1)
    return _estimate(mean, seeds, variance, df, level, bounds)


def _estimate(
    mean: float,
    seeds: int,
    variance: float,
    df: float,
    level: float,
    bounds: tuple[float, float],
) -> Estimate:
    if not 0 < level < 1:
        raise ValueError(f"level: expected a value in (0, 1), got {level}")
    error = math.sqrt(variance)
    if error <= 1e-12 * abs(mean):  # equal up to rounding
        if mean != 0:
            return Estimate(mean, seeds)
        p_value = 1.0
    else:
        p_value = float(2 * stats.t.sf(abs(mean) / error, df))
    half = float(stats.t.ppf((1 + level) / 2, df)) * error
    return Estimate(
        mean=mean,
        seeds=seeds,
        standard_error=error,
        df=float(df),
        low=max(mean - half, bounds[0]),
        high=min(mean + half, bounds[1]),
        p_value=p_value,
    )
