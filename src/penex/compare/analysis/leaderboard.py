"""Comparison of losses over several data sets: average ranks, pairwise tests and win rates.

The input is one metric, as a table with a row per data set and loss. The independent units are
*blocks*: several settings of one data set (label noise, training sizes) are not independent, so
they form one block. Tests use one value per block, and the bootstrap draws whole blocks.
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from penex.compare.analysis.plots import COLOURS, INK
from penex.compare.analysis.statistics import holm

__all__ = ["Leaderboard", "critical_difference_diagram", "leaderboard"]

COLUMNS = ("data_set", "block", "loss", "value")


@dataclass(frozen=True)
class Leaderboard:
    """The results of a set of losses on several data sets, for one metric.

    Attributes:
        ranks: Indexed by loss, best first: "rank", the mean rank over blocks (1 is the best; ties
            share the mean of their ranks), and "wins", the share of data sets on which the loss
            is the best (a tie of m losses counts 1/m).
        p_values: Losses by losses, Holm-adjusted p-values of Wilcoxon's signed-rank test over
            blocks; 1 on the diagonal.
        friedman: P-value of Friedman's test that all losses rank equally; NaN for fewer than three
            losses, for which the test is not defined.
        win_rates: Losses by losses, the share of data sets on which the row beats the column; ties
            count half. NaN on the diagonal.
        win_low: Lower ends of the intervals of `win_rates`.
        win_high: Upper ends of the intervals of `win_rates`.
        data_sets: The number of data sets.
        blocks: The number of independent blocks.
    """

    ranks: pd.DataFrame
    p_values: pd.DataFrame
    friedman: float
    win_rates: pd.DataFrame
    win_low: pd.DataFrame
    win_high: pd.DataFrame
    data_sets: int
    blocks: int


def leaderboard(
    results: pd.DataFrame,
    *,
    higher_is_better: bool,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Leaderboard:
    """Ranks, tests and win rates of losses over data sets.

    Tests follow Demšar (2006), with the pairwise Wilcoxon tests and Holm's correction that
    Benavoli, Corani & Mangili (2016) recommend: unlike Nemenyi's test, they do not depend on which
    other losses are compared. A p-value below 0.05 needs at least 6 blocks, and more after the
    correction.

    Args:
        results: Columns "data_set", "block", "loss" and "value" (the metric, mean over seeds), with
            one row for each data set and loss. "block" is the same for data sets that share their
            rows; if all are independent, it equals "data_set".
        higher_is_better: The direction of the metric.
        level: Coverage of the intervals of win rates, in (0, 1).
        resamples: Number of bootstrap samples of blocks for these percentile intervals.
        seed: Seed of the bootstrap.

    Returns:
        The leaderboard of the data sets on which all losses have a finite value.

    Raises:
        ValueError: A column is missing; a data set has two values for a loss or two blocks; there
            are fewer than two losses; or no data set has values for all losses.
    """
    missing = [name for name in COLUMNS if name not in results]
    if missing:
        raise ValueError(f"results: expected the columns {COLUMNS}, {missing} missing")
    if results.duplicated(["data_set", "loss"]).any():
        raise ValueError("results: expected one value per data set and loss, got several")
    if (results.groupby("data_set")["block"].nunique() != 1).any():
        raise ValueError("results: expected one block per data set, got several")
    losses = list(dict.fromkeys(results["loss"]))
    if len(losses) < 2:
        raise ValueError(f"results: expected at least two losses, got {losses}")
    finite = results[np.isfinite(results["value"])]
    table = finite.pivot(index=["block", "data_set"], columns="loss", values="value")
    table = table.reindex(columns=losses).dropna()
    if table.empty:
        raise ValueError("results: no data set has a finite value for each loss")
    score = table if higher_is_better else -table
    of_block = score.groupby(level="block").mean()
    place = score.rank(axis=1, ascending=False, method="min")
    ranks = pd.DataFrame(
        {
            "rank": of_block.rank(axis=1, ascending=False).mean(),
            "wins": (place == 1).div((place == 1).sum(axis=1), axis=0).mean(),
        }
    ).sort_values("rank", kind="stable")
    order = list(ranks.index)
    wins, low, high = _win_rates(score[order], level, resamples, seed)
    return Leaderboard(
        ranks=ranks,
        p_values=_p_values(of_block[order]),
        friedman=_friedman(of_block),
        win_rates=wins,
        win_low=low,
        win_high=high,
        data_sets=len(table),
        blocks=len(of_block),
    )


def critical_difference_diagram(
    board: Leaderboard, *, title: str = "", level: float = 0.95
) -> Figure:
    """Draw average ranks on an axis, with bars joining losses that do not differ (Demšar, 2006).

    Losses are considered not to differ if the tests do not distinguish them.

    Args:
        board: A result of :func:`leaderboard`.
        title: Title above the axis, for example the metric.
        level: Losses are joined where their p-value is at least 1 - level.

    Returns:
        A figure 8 inches wide, to be saved at 100 dots per inch or more, or as SVG.
    """
    import scikit_posthocs  # takes a second, and is needed only here

    losses = len(board.ranks)
    figure = Figure(figsize=(8, 1.5 + 0.3 * losses), layout="constrained")
    axes = figure.subplots()
    scikit_posthocs.critical_difference_diagram(
        board.ranks["rank"],
        board.p_values,
        alpha=1 - level,
        ax=axes,
        label_fmt_left="{label}  {rank:.2f} ",
        label_fmt_right=" {rank:.2f}  {label}",
        color_palette=dict.fromkeys(board.ranks.index, INK),
        label_props={"fontsize": 10},
        marker_props={"s": 20},
        elbow_props={"linewidth": 0.8},
        # A marker at each joined loss: a bar may pass above a loss that it does not join.
        crossbar_props={"color": COLOURS[1], "linewidth": 3, "marker": "o", "markersize": 5},
        text_h_margin=0.05,
    )
    axes.set_xlim(0.9, losses + 0.1)
    axes.set_xticks(range(1, losses + 1))
    axes.tick_params(labelsize=9, colors=INK)
    axes.spines["top"].set_color(INK)
    if title:
        axes.set_title(title, fontsize=11, color=INK)
    axes.set_xlabel(
        f"Average rank over {board.blocks} data sets (1 is best); bars join losses "
        f"not distinguished at {1 - level:.0%}",
        fontsize=9,
        color=INK,
    )
    return figure


def _friedman(of_block: pd.DataFrame) -> float:
    if of_block.shape[1] < 3 or len(of_block) < 2 or (of_block.nunique(axis=1) == 1).all():
        return math.nan
    return float(stats.friedmanchisquare(*of_block.to_numpy().T).pvalue)


def _p_values(of_block: pd.DataFrame) -> pd.DataFrame:
    """Holm-adjusted p-values of Wilcoxon's signed-rank test between all pairs of columns."""
    x, losses = of_block.to_numpy(), of_block.columns
    first, second = np.triu_indices(len(losses), 1)
    raw = []
    for difference in (x[:, first] - x[:, second]).T:
        # Pratt's treatment keeps blocks without a difference, as evidence that there is none.
        equal = not difference.any()  # the test is not defined then
        raw.append(1.0 if equal else stats.wilcoxon(difference, zero_method="pratt").pvalue)
    p = np.ones((len(losses), len(losses)))
    p[first, second] = p[second, first] = holm(raw)
    return pd.DataFrame(p, index=losses, columns=losses)


def _win_rates(
    score: pd.DataFrame, level: float, resamples: int, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Rates, lower and upper ends; bootstrap samples draw blocks with all their data sets."""
    x = score.to_numpy()
    beats = (x[:, :, None] > x[:, None]) + 0.5 * (x[:, :, None] == x[:, None])
    block, names = pd.factorize(score.index.get_level_values("block"))
    count = np.bincount(block).astype(np.float64)
    total = np.zeros((len(names), *beats.shape[1:]))
    np.add.at(total, block, beats)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    rates = np.einsum("rb,bij->rij", drawn, total) / (drawn @ count)[:, None, None]
    ends = np.quantile(rates, [(1 - level) / 2, (1 + level) / 2], axis=0)
    found = []
    for matrix in (beats.mean(axis=0), *ends):
        np.fill_diagonal(matrix, np.nan)
        found.append(pd.DataFrame(matrix, index=score.columns, columns=score.columns))
    return found[0], found[1], found[2]
