"""Published curves of validation NLL compared with ours: a figure, and their distances."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from penex.compare.analysis import plots
from penex.compare.analysis.plots import Floats, save_figure
from penex.compare.config import Config
from penex.compare.output_folder import run_folder, unfinished_curves
from penex.compare.registry import parse_loss
from penex.paper import figures
from penex.paper.presets import PublishedCurves

FIRST = 20
"""The first epoch at which curves are compared: before, they fall too steeply."""
LINK, SOFTMAX = "validation_nll", "validation_softmax_nll"
"""Columns of curve.csv."""


@dataclass(frozen=True)
class Curve:
    """Validation NLL of a loss by epoch, starting with epoch 1.

    Attributes:
        spec: The loss, as written in the configuration.
        ours: (epochs,) mean over the seeds, up to the last epoch that all of them have reached.
        published: (epochs,) the published curve; empty if there is none.
    """

    spec: str
    ours: Floats
    published: Floats

    @property
    def last(self) -> int:
        """The last epoch that both curves have."""
        return min(len(self.ours), len(self.published))

    @property
    def distance(self) -> float | None:
        """Root mean square of the difference from epoch :data:`FIRST` on.

        None if there is no such epoch, or the NLL is not finite.
        """
        epochs = slice(FIRST - 1, self.last)
        squares = (self.ours[epochs] - self.published[epochs]) ** 2
        return (
            float(np.sqrt(squares.mean())) if len(squares) and np.isfinite(squares).all() else None
        )


def gather(published: PublishedCurves, config: Config, folder: Path) -> list[Curve]:
    """Collect published curves and those of the runs in `folder`, finished or not, by loss.

    Losses without a run are left out.
    """
    with (files("penex.paper") / "presets" / published.file).open(encoding="utf-8") as stream:
        values = pd.read_csv(stream, index_col="epoch")
    found = []
    for spec in config.losses:
        column = LINK if spec in published.link else SOFTMAX
        ours = _ours(folder, spec, config.seeds, column)
        if len(ours):
            known = values[spec].to_numpy() if spec in values else np.empty(0)
            found.append(Curve(spec, ours, known[: config.epochs]))
    return found


def _ours(folder: Path, spec: str, seeds: int, column: str) -> Floats:
    runs = []
    for seed in range(seeds):
        run = run_folder(folder, spec, seed)
        written = [run / "curve.csv"] if run.exists() else unfinished_curves(run)
        runs += [pd.read_csv(file)[column].to_numpy(np.float64) for file in written]
    epochs = min(map(len, runs), default=0)
    return np.mean([run[:epochs] for run in runs], axis=0) if epochs else np.empty(0)


def draw(curves: list[Curve]) -> Figure:
    """Draw our curves solid and published ones dotted; save the figure in the figures' style."""
    figure = Figure(figsize=figures.LARGE, layout="constrained")
    axes = figure.subplots()
    looks = plots.line_styles(curve.spec for curve in curves)
    for curve in curves:
        colour, label = looks[curve.spec].colour, parse_loss(curve.spec).label
        for values, line, name in ((curve.ours, "-", label), (curve.published, ":", None)):
            epochs = np.arange(len(values)) + 1
            axes.plot(epochs, values, line, color=colour, label=name, linewidth=1.4)
    axes.plot([], [], ":", color=plots.INK, label="Published")
    later = np.concatenate([v[FIRST - 1 :] for c in curves for v in (c.ours, c.published)])
    later = later[np.isfinite(later)]
    if len(later):  # otherwise the steep first epochs would leave little room for the differences
        margin = 0.05 * np.ptp(later)
        axes.set_ylim(later.min() - margin, later.max() + margin)
    axes.set(xlabel="Epoch", ylabel="NLL on validation rows")
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def write(published: PublishedCurves, config: Config, folder: Path, file: Path) -> dict[str, Any]:
    """Draw the curves to `file`, and return their distances.

    Args:
        published: The published curves of the preset.
        config: The configuration of the experiment.
        folder: The folder of its comparison.
        file: The file of the figure, as in :func:`penex.paper.figures.save`.

    Returns:
        The source of the published curves and, for each of them with a run of ours, "loss", "rms"
        and the epochs "first" to "last" over which rms is computed; rms is None before epoch
        :data:`FIRST`.
    """
    curves = gather(published, config, folder)
    with figures.style("published"):
        save_figure(draw(curves), file)
    return {
        "source": published.source,
        "distances": [
            {"loss": each.spec, "rms": each.distance, "first": FIRST, "last": each.last}
            for each in curves
            if len(each.published)
        ],
    }
