"""Published curves are compared with ours, up to the last common epoch."""

from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from penex.compare.config import Config
from penex.compare.output_folder import run_folder
from penex.paper.presets import PublishedCurves, preset
from penex.paper.published import draw, gather, write

CURVES = preset("cifar100-long").curves
assert CURVES is not None
PUBLISHED = pd.read_csv(str(files("penex.paper") / "presets" / CURVES.file), index_col="epoch")


def config(losses: list[str], seeds: int = 1) -> Config:
    return Config(data="digits", losses=losses, seeds=seeds, epochs=200)


def run(folder: Path, values: NDArray[np.float64], *, finished: bool) -> None:
    """Leave a run's curve behind, its values in the column that is to be read."""
    linked = folder.parent.name in CURVES.link
    columns = {"validation_nll": values if linked else values + 1000}
    columns["validation_softmax_nll"] = values + 1000 if linked else values
    where = folder if finished else folder.with_name(f".partial-{folder.name}-01234567")
    where.mkdir(parents=True)
    curve = pd.DataFrame({"epoch": np.arange(len(values)) + 1} | columns)
    curve.to_csv(where / "curve.csv", index=False)


def test_the_published_values() -> None:
    """Those that the presets have too."""
    assert list(PUBLISHED.index) == list(range(1, 801))
    for one in preset("cifar100-long").published:
        column = PUBLISHED[one.loss]
        best = one.selection == "nll"
        value = column.min() if best else column[780:].mean()
        assert value == pytest.approx(one.value, abs=0.005 if best else 0.02)


@pytest.mark.parametrize("finished", [True, False])
def test_the_distance(finished: bool, tmp_path: Path) -> None:
    spec = "penex=0.085"
    theirs = PUBLISHED[spec].to_numpy()
    # Far away in the epochs that do not count, 0.3 and 0.5 in turn in the 101 that do.
    ours = theirs[:120] + np.where(np.arange(120) < 19, 9, np.where(np.arange(120) % 2, 0.3, 0.5))
    for seed, sign in enumerate((1, -1)):  # whose mean is ours
        values = np.append(ours + sign * np.arange(120), [0.0] * seed)
        run(run_folder(tmp_path, spec, seed), values, finished=finished)
    (curve,) = gather(CURVES, config(["cross-entropy", spec], seeds=2), tmp_path)
    assert (curve.spec, curve.last, len(curve.published)) == (spec, 120, 200)
    np.testing.assert_allclose(curve.ours, ours)
    expected = np.sqrt((51 * 0.3**2 + 50 * 0.5**2) / 101)
    assert curve.distance == pytest.approx(expected)


@pytest.mark.parametrize("epochs", [1, 19, 20])
def test_few_epochs(epochs: int, tmp_path: Path) -> None:
    """There is a figure all the same, also of a loss that diverged and one never published."""
    values = {
        "cross-entropy": PUBLISHED["cross-entropy"].to_numpy()[:epochs] + 0.25,
        "penex=0.085": np.full(epochs, np.nan),
        "log-penex=1": np.full(epochs, 2.0),
    }
    for spec, curve in values.items():
        run(run_folder(tmp_path, spec, 0), curve, finished=True)
    said = write(CURVES, config(list(values)), tmp_path, tmp_path / "figures" / "published.png")
    assert (tmp_path / "figures" / "published.png").stat().st_size > 5_000
    first, diverged = said["distances"]
    assert first == {
        **{"loss": "cross-entropy", "first": 20, "last": epochs},
        "rms": pytest.approx(0.25) if epochs == 20 else None,
    }
    assert (diverged["loss"], diverged["rms"]) == ("penex=0.085", None)


def test_our_curves_are_solid_and_published_ones_dotted(tmp_path: Path) -> None:
    losses = ["cross-entropy", "log-penex=1"]
    for spec in losses:
        run(run_folder(tmp_path, spec, 0), np.linspace(4, 2, 60), finished=True)
    (axes,) = draw(gather(CURVES, config(losses), tmp_path)).axes
    assert [(line.get_linestyle(), len(np.asarray(line.get_xdata()))) for line in axes.lines] == [
        *(("-", 60), (":", 200)),  # cross-entropy
        *(("-", 60), (":", 0)),  # log-PENEX, of which nothing was published
        (":", 0),  # of the legend
    ]
    assert axes.get_legend_handles_labels()[1] == ["Cross-entropy", "log-PENEX β=1", "Published"]


def test_no_run(tmp_path: Path) -> None:
    assert gather(CURVES, config(["cross-entropy"]), tmp_path) == []


def test_curves_belong_to_an_experiment() -> None:
    facts = preset("cifar100").model_dump()
    with pytest.raises(ValueError, match="there is no experiment 'other'"):
        type(preset("cifar100"))(
            **facts | {"curves": PublishedCurves(experiment="other", file="", link=(), source="")}
        )
