"""Leaderboards against scipy, scikit-posthocs and their definitions written as loops."""

import io

import numpy as np
import pandas as pd
import pytest
import scikit_posthocs
from scipy import stats

from penex.compare.analysis.leaderboard import Leaderboard, critical_difference_diagram, leaderboard

LOSSES = ("ce", "a", "b", "c")


def results(
    blocks: int = 12, settings: int = 1, step: float = 0.5, losses: tuple[str, ...] = LOSSES
) -> pd.DataFrame:
    """An error for each loss, larger by `step` for each further one, on data sets of all levels."""
    rng = np.random.default_rng(blocks)
    return pd.DataFrame(
        [
            (f"set {block}, {setting}", f"set {block}", loss, block + step * place + rng.normal())
            for block in range(blocks)
            for setting in range(settings)
            for place, loss in enumerate(losses)
        ],
        columns=["data_set", "block", "loss", "value"],
    )


def test_ranks_and_tests_agree_with_scipy_and_scikit_posthocs() -> None:
    frame = results()
    table = frame.pivot(index="block", columns="loss", values="value")[list(LOSSES)]
    board = leaderboard(frame, higher_is_better=False)
    assert (board.data_sets, board.blocks) == (12, 12)
    expected = stats.rankdata(table.to_numpy(), axis=1).mean(axis=0)
    assert board.ranks["rank"].to_dict() == pytest.approx(dict(zip(LOSSES, expected, strict=True)))
    assert board.ranks["rank"].is_monotonic_increasing
    assert board.friedman == pytest.approx(stats.friedmanchisquare(*table.to_numpy().T).pvalue)
    peer = scikit_posthocs.posthoc_wilcoxon(
        table.melt(), val_col="value", group_col="loss", p_adjust="holm"
    )
    order = board.ranks.index
    assert board.p_values.columns.equals(order)
    assert board.p_values.to_numpy() == pytest.approx(peer.loc[order, order].to_numpy())
    best = pd.Series(np.array(LOSSES)[table.to_numpy().argmin(axis=1)]).value_counts(normalize=True)
    assert board.ranks["wins"].to_dict() == pytest.approx(dict.fromkeys(LOSSES, 0) | best.to_dict())


def test_direction() -> None:
    frame = results()
    up = leaderboard(frame, higher_is_better=True)
    down = leaderboard(frame.assign(value=-frame["value"]), higher_is_better=False)
    pd.testing.assert_frame_equal(up.ranks, down.ranks)
    pd.testing.assert_frame_equal(up.win_low, down.win_low)


def test_settings_of_one_data_set_add_no_evidence() -> None:
    """Ten copies of every data set in its block change no test and no interval."""
    once = leaderboard(results(), higher_is_better=False)
    copies = [results().assign(data_set=lambda x, i=i: x["data_set"] + f" {i}") for i in range(10)]
    often = leaderboard(pd.concat(copies), higher_is_better=False)
    assert (often.data_sets, often.blocks) == (120, 12)
    for name in ("ranks", "p_values", "win_rates", "win_low", "win_high"):
        pd.testing.assert_frame_equal(getattr(once, name), getattr(often, name))
    independent = pd.concat([copy.assign(block=copy["data_set"]) for copy in copies])
    narrow = leaderboard(independent, higher_is_better=False)
    assert narrow.p_values.loc["ce", "a"] < once.p_values.loc["ce", "a"]


def test_win_rates() -> None:
    frame = results(blocks=9, settings=2)
    board = leaderboard(frame, higher_is_better=False, resamples=4000)
    table = frame.pivot(index="data_set", columns="loss", values="value")
    for row in LOSSES:
        for column in LOSSES:
            rate = board.win_rates.loc[row, column]
            if row == column:
                assert np.isnan(rate)
                continue
            wins = table[row] < table[column]
            assert rate == pytest.approx(wins.mean())
            assert board.win_low.loc[row, column] <= rate <= board.win_high.loc[row, column]
            other = 1 - board.win_high.loc[column, row]
            assert board.win_low.loc[row, column] == pytest.approx(other)
            # The spread of a mean over 9 blocks.
            of_block = wins.groupby(wins.index.str.split(",").str[0]).mean()
            error = of_block.std(ddof=0) / 3
            width = board.win_high.loc[row, column] - board.win_low.loc[row, column]
            assert width == pytest.approx(2 * 1.96 * error, abs=0.1)


def test_ties() -> None:
    frame = results(blocks=4).assign(value=1.0)
    board = leaderboard(frame, higher_is_better=False)
    assert board.ranks["rank"].tolist() == [2.5] * 4
    assert board.ranks["wins"].tolist() == [0.25] * 4
    assert (board.p_values == 1).all(axis=None)
    assert np.isnan(board.friedman)
    assert board.win_rates.loc["ce", "a"] == 0.5


def test_data_sets_without_all_losses_are_left_out() -> None:
    frame = results()
    frame.loc[frame["data_set"] == "set 3, 0", "value"] = np.nan
    frame = frame[~((frame["data_set"] == "set 5, 0") & (frame["loss"] == "b"))]
    board = leaderboard(frame, higher_is_better=False)
    assert board.blocks == 10
    kept = results()[lambda x: ~x["block"].isin(["set 3", "set 5"])]
    pd.testing.assert_frame_equal(
        board.p_values, leaderboard(kept, higher_is_better=False).p_values
    )


def default_process_group(board: Leaderboard) -> set[frozenset[str]]:
    """The losses below each bar of the diagram, from its lines."""
    (axes,) = critical_difference_diagram(board, title="NLL").axes
    position = {round(rank, 9): loss for loss, rank in board.ranks["rank"].items()}
    bars = [line for line in axes.lines if line.get_linewidth() == 3]
    return {frozenset(position[round(x, 9)] for x in line.get_xdata()) for line in bars}


def test_diagram_joins_what_is_not_distinguished() -> None:
    board = leaderboard(results(blocks=20, step=0.7), higher_is_better=False)
    bars = default_process_group(board)
    for i, first in enumerate(LOSSES):
        for second in LOSSES[i + 1 :]:
            together = any({first, second} <= bar for bar in bars)
            assert together == (board.p_values.loc[first, second] >= 0.05)
    assert 0 < len(bars) < 6


@pytest.mark.parametrize("losses", [("ce", "a"), tuple(f"loss number {i}" for i in range(9))])
def test_diagram_shows_every_loss_within_the_figure(losses: tuple[str, ...]) -> None:
    board = leaderboard(results(losses=losses), higher_is_better=False)
    assert np.isnan(board.friedman) == (len(losses) == 2)
    figure = critical_difference_diagram(board)
    figure.savefig(io.BytesIO(), dpi=100)
    assert figure.bbox.width == 800
    texts = [text for text in figure.axes[0].texts if text.get_text()]
    assert len(texts) == len(losses)
    for text in texts:
        box = text.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= 800


def test_refused() -> None:
    frame = results(blocks=2)
    for bad, message in (
        (frame.drop(columns="block"), r"expected the columns .* \['block'\] missing"),
        (pd.concat([frame, frame]), "expected one value per data set and loss"),
        (frame.assign(block=range(len(frame))), "expected one block per data set"),
        (frame[frame["loss"] == "ce"], r"expected at least two losses, got \['ce'\]"),
        (frame.assign(value=np.nan), "no data set has a finite value for each loss"),
    ):
        with pytest.raises(ValueError, match=f"results: .*{message}|results: {message}"):
            leaderboard(bad, higher_is_better=False)
