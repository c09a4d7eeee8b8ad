"""Figures by name, drawn from the saved files of one comparison or several.

Each is a function from :class:`~penex.compare.analysis.plots.Comparison` objects to a figure;
:data:`FIGURES` has them by name. No network runs again, except where a figure shows its function:
then it is loaded from its checkpoint.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Polygon
from matplotlib.ticker import StrMethodFormatter
from numpy.typing import NDArray

from penex.compare.analysis import plots
from penex.compare.analysis.plots import INK, STYLE, Comparison, Floats, LossResults, save_figure
from penex.compare.analysis.robustness import NORMS, read
from penex.compare.analysis.summary import predictions
from penex.compare.config import Config
from penex.compare.errors import CompareError
from penex.compare.finished_runs import read_curve, read_logits
from penex.compare.output_folder import run_folder
from penex.compare.registry import LOSSES, REFERENCE, parse_loss
from penex.compare.training.selection import LAST, SELECTIONS
from penex.metrics import METRICS

FORMATS = ("png", "svg", "pdf")
SAVED: Any = {"svg.fonttype": "path", "pdf.fonttype": 42, "axes.titlesize": 9.5}
"""On top of STYLE: a file of its own looks the same where its font is missing."""
EPOCHS = {name: SELECTIONS[name] for name in ("nll", LAST)}
"""The epochs that are drawn: of early stopping, and of the published protocol."""
FILLED = {"nll": True, LAST: False}
"""Markers of the epochs."""
PENEX = "penex"
REGIONS = ("#d55e00", "#0072b2", "#009e73", "#c56fa0", "#b8860b", "#3a9bd1", "#aa4499", "#808000")
"""Colours of what is no loss of the registry."""
ROWS_SHOWN = 4
CLASSES_SHOWN = 5
LARGE, PANEL, SMALL = (6.0, 3.6), (4.0, 2.9), (3.1, 2.7)
"""Of panels, in inches."""


class NothingToShowError(CompareError):
    """The comparisons lack what a figure is of; the message says what that is."""


Draw = Callable[[Sequence[Comparison]], Figure]
FIGURES: dict[str, Draw] = {}
"""The figures by name."""


def _named(name: str) -> Callable[[Draw], Draw]:
    def register(draw: Draw) -> Draw:
        FIGURES[name] = draw
        return draw

    return register


def draw(name: str, comparisons: Sequence[Comparison]) -> Figure:
    """The figure called `name`, to be saved within :func:`style`.

    Raises:
        NothingToShowError: The comparisons lack what it is of.
        CompareError: There is no such figure, or a file is damaged.
    """
    if name not in FIGURES:
        raise CompareError(f"figures: none is called {name!r}. Known: {', '.join(FIGURES)}.")
    with style(name):
        return FIGURES[name](comparisons)


def save(name: str, comparisons: Sequence[Comparison], path: Path) -> None:
    """Draw a figure into `path`, whose ending is one of :data:`FORMATS`. Raises as :func:`draw`."""
    figure = draw(name, comparisons)
    with style(name):
        save_figure(figure, path)


def style(name: str) -> Any:
    """The context in which a figure is drawn and saved: the user's settings play no part."""
    return matplotlib.style.context([*STYLE, SAVED, {"svg.hashsalt": name}])


# ---- by epoch --------------------------------------------------------------------------------


@_named("curves")
def metric_curves(comparisons: Sequence[Comparison]) -> Figure:
    """NLL and accuracy by epoch, on training and validation rows."""
    parts = {"train": "training", "validation": "validation"}
    figure, panels = _grid(2 * len(comparisons), 2, sharex=False)
    for number, one in enumerate(comparisons):
        for row, metric in enumerate(("nll", "accuracy")):
            for axes, (part, title) in zip(panels[2 * number + row], parts.items(), strict=True):
                plots.learning(axes, one.loss_results, f"{part}_{metric}")
                axes.set_title(f"{one.name}: {title}", loc="left")
    _legend(figure, panels.flat)
    return figure


# ---- against the strength of a regulariser ---------------------------------------------------


@_named("alpha-sweep")
def alpha_sweep(comparisons: Sequence[Comparison]) -> Figure:
    """Test accuracy, NLL and ECE of PENEX against its sensitivity."""
    swept = _swept(comparisons, PENEX)
    figure, panels = _grid(len(swept), 3, size=SMALL)
    for one, row in zip(swept, panels, strict=True):
        for axes, metric in zip(row, ("accuracy", "nll", "ece"), strict=True):
            _against_strength(axes, one, PENEX, _test_metric(one, metric))
            axes.set_title(one.name, loc="left")
            axes.set_ylabel(f"{METRICS[metric].label} on test rows{_unit(metric)}")
    _legend(figure, panels.flat)
    return figure


@_named("gradient-norm")
def gradient_norm(comparisons: Sequence[Comparison]) -> Figure:
    """Norm of the gradient of all parameters against the sensitivity, mean over all steps."""
    swept = _swept(comparisons, PENEX)
    figure, panels = _panels(len(swept))
    for one, axes in _filled(swept, panels):

        def norm(spec: str, epoch: str, one: Comparison = one) -> dict[str, Any]:
            columns = [
                read_curve(run_folder(one.folder, spec, run["seed"])) for run in one.finished(spec)
            ]
            if any("gradient_norm" not in column for column in columns):
                raise NothingToShowError("curve.csv has no column gradient_norm")
            norms = [float(column["gradient_norm"].mean()) for column in columns]
            return {"mean": float(np.mean(norms)) if norms else None, "low": None, "high": None}

        _against_strength(axes, one, PENEX, norm, epochs={"": "Mean over training"})
        axes.set_yscale("log")
        axes.set_title(one.name, loc="left")
        axes.set_ylabel("Gradient norm, before clipping")
    _legend(figure, panels.flat)
    return figure


@_named("calibration-strength")
def calibration_strength(comparisons: Sequence[Comparison]) -> Figure:
    """Calibration, as −ECE on test rows, against the strength of every loss that was swept."""
    swept = {
        name: [one for one in comparisons if len(_sweep(one, name)) > 1]
        for name, loss in LOSSES.items()
        if loss.knob is not None
    }
    names = [name for name, found in swept.items() if found]
    if not names:
        raise NothingToShowError("no loss was trained at two values of its hyperparameter")
    shown = [one for one in comparisons if any(one in swept[name] for name in names)]
    figure, panels = _grid(len(shown), len(names), size=SMALL, sharey="row")
    for one, row in zip(shown, panels, strict=True):
        for axes, name in zip(row, names, strict=True):
            if one not in swept[name]:
                axes.set_axis_off()
                continue
            _against_strength(axes, one, name, _test_metric(one, "ece", -1), linear=name != PENEX)
            axes.set_title(f"{one.name}: {LOSSES[name].label}", loc="left")
        row[0].set_ylabel("−ECE on test rows")
    _legend(figure, panels.flat)
    return figure


Value = Callable[[str, str], dict[str, Any]]
"""Mean and interval of a loss at an epoch."""


def _test_metric(one: Comparison, metric: str, sign: int = 1) -> Value:
    """A metric of the summary, in the unit of :func:`_unit`."""
    factor = sign * (100 if METRICS[metric].percent else 1)

    def value(spec: str, epoch: str) -> dict[str, Any]:
        cell = one.results["summary"][epoch]["link"][metric][spec]
        scaled = {n: None if cell[n] is None else factor * cell[n] for n in ("mean", "low", "high")}
        if factor < 0:
            scaled["low"], scaled["high"] = scaled["high"], scaled["low"]
        return scaled

    return value


def _unit(metric: str) -> str:
    return ", %" if METRICS[metric].percent else ""


def _sweep(one: Comparison, name: str) -> dict[float, str]:
    """The specs of a loss with finished runs, by the value of its hyperparameter."""
    found = {
        loss["value"]: loss["spec"]
        for loss in one.results["losses"]
        if loss["runs"] and parse_loss(loss["spec"]).loss.name == name
    }
    return {value: found[value] for value in sorted(found)}


def _swept(comparisons: Sequence[Comparison], name: str) -> list[Comparison]:
    swept = [one for one in comparisons if len(_sweep(one, name)) > 1]
    if not swept:
        raise NothingToShowError(f"{LOSSES[name].label} was not trained at two values or more")
    return swept


def _against_strength(
    axes: Axes,
    one: Comparison,
    name: str,
    value: Value,
    *,
    epochs: dict[str, str] = EPOCHS,
    linear: bool = False,
) -> None:
    """A line per epoch with intervals over seeds, and that of the reference across."""
    knob, specs = LOSSES[name].knob, _sweep(one, name)
    colour = plots.line_styles([name])[name].colour
    for epoch, title in epochs.items():
        filled = FILLED.get(epoch, True)
        cells = {strength: value(spec, epoch) for strength, spec in specs.items()}
        known = {strength: cell for strength, cell in cells.items() if cell["mean"] is not None}
        axes.errorbar(
            list(known),
            [cell["mean"] for cell in known.values()],
            yerr=np.transpose([plots.half_widths(cell) for cell in known.values()]),
            fmt="o-" if filled else "o:",
            color=colour,
            mfc=colour if filled else "white",
            markersize=4.5,
            capsize=2,
            linewidth=1.4,
            elinewidth=0.8,
            label=title,
        )
        if any(run["loss"] == REFERENCE for run in one.results["runs"]):
            level = value(REFERENCE, epoch)["mean"]
            if level is not None:
                label = f"{LOSSES[REFERENCE].label}, {title[0].lower()}{title[1:]}"
                line = "-" if filled else ":"
                axes.axhline(level, color=INK, linewidth=1, linestyle=line, alpha=0.7, label=label)
    if not linear and min(specs) > 0:
        axes.set_xscale("log")
    axes.set_xlabel(f"{knob.name.capitalize()} {knob.symbol}" if knob else "")


# ---- of the test rows ------------------------------------------------------------------------


@_named("error-histogram")
def error_histogram(comparisons: Sequence[Comparison]) -> Figure:
    """How many test rows have which error 1 − p(label), at the selected epoch, of all seeds."""
    figure, panels = _panels(len(comparisons))
    for one, axes in _filled(comparisons, panels):
        for loss_results in one.loss_results:
            if n := len(loss_results.errors):
                weights = np.full(n, 100 / n)
                axes.hist(
                    loss_results.errors,
                    bins=list(np.linspace(0, 1, 21)),
                    weights=weights,
                    histtype="step",
                    linewidth=1.4,
                    color=loss_results.colour,
                    linestyle=loss_results.line["linestyle"],
                    label=loss_results.label,
                )
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.set_title(one.name, loc="left")
        axes.set(xlim=(0, 1), xlabel="Error, 1 − p(label)", ylabel="Share of test rows, %")
    _legend(figure, panels.flat)
    return figure


@_named("reliability")
def reliability(comparisons: Sequence[Comparison]) -> Figure:
    """Accuracy against confidence of every loss at the selected epoch, of all seeds together."""
    shown = [[each for each in one.loss_results if each.diagrams] for one in comparisons]
    if not any(shown):
        raise NothingToShowError("every run diverged")
    columns = min(5, max(map(len, shown)))
    rows = [
        (one, found[start : start + columns])
        for one, found in zip(comparisons, shown, strict=True)
        for start in range(0, len(found), columns)
    ]
    figure, panels = _grid(len(rows), columns, size=(2.6, 2.7))
    for row, (one, found) in zip(panels, rows, strict=True):
        for column, axes in enumerate(row):
            if column >= len(found):
                axes.set_axis_off()
                continue
            plots.diagram(axes, found[column])
            table = one.results["summary"][one.results["config"]["select"]]["link"]["ece"]
            error = table[found[column].spec]["mean"]
            value = "" if error is None else f", ECE {error:.3f}"
            axes.set_title(f"{found[column].label}\n{one.name}{value}", loc="left")
            if column:
                axes.set_ylabel("")
    return figure


@_named("margins")
def margins(comparisons: Sequence[Comparison]) -> Figure:
    """The share of test rows with at most a margin, at the selected epoch, of all seeds together.

    Margins are those of log-probabilities, so that losses are compared on one scale.
    """
    figure, panels = _panels(len(comparisons))
    for one, axes in _filled(comparisons, panels):
        plots.distribution(axes, one.loss_results)
        axes.set_title(one.name, loc="left")
    _legend(figure, panels.flat)
    return figure


@_named("qualitative")
def qualitative(comparisons: Sequence[Comparison]) -> Figure:
    """The largest probabilities that each loss gives to a few test rows, at seed 0, selected epoch.

    The rows are those at evenly spaced ranks of difficulty, the mean of p(label) over the losses,
    so none is picked by hand. Pictures are shown where the data can be read and are pictures.
    """
    tables = [(one, _one_per_loss(one.loss_results)) for one in comparisons]
    columns = max(len(found) for _, found in tables)
    height = 0.17 * CLASSES_SHOWN + 0.35
    figure, panels = _grid(
        ROWS_SHOWN * len(tables),
        columns + 1,
        size=(1.75, height),
        width_ratios=(0.8, *[1.6] * columns),
    )
    for number, (one, found) in enumerate(tables):
        target, probability = _probabilities(one, found)
        classes = one.results["data"]["classes"]
        mean = np.mean([each[np.arange(len(target)), target] for each in probability], axis=0)
        ranks = np.linspace(0, len(target) - 1, 2 * ROWS_SHOWN + 1).round().astype(int)[1::2]
        chosen = np.argsort(mean, kind="stable")[ranks]
        pictures = _pictures(one, chosen)
        for place, row in enumerate(chosen):
            first, *others = panels[ROWS_SHOWN * number + place]
            picture = pictures[place] if pictures else None
            _portrait(first, picture, _short(classes[target[row]]), row)
            if place == 0:
                first.set_ylabel(one.name)
            for axes in others[len(found) :]:
                axes.set_axis_off()
            for axes, each, values in zip(others, found, probability, strict=False):
                _bars(axes, values[row], int(target[row]), classes, each.colour)
                if place == 0:
                    axes.set_title(each.label, loc="left")
                if place == ROWS_SHOWN - 1:
                    axes.set_xlabel("Probability")
                else:
                    axes.set_xticklabels([])
    return figure


def _probabilities(
    one: Comparison, found: Sequence[LossResults]
) -> tuple[NDArray[np.int64], list[Floats]]:
    """Labels and (N, K) probabilities of the test rows at seed 0 and the selected epoch."""
    values, target = [], np.empty(0, np.int64)
    config = Config(**one.results["config"])
    for each in found:
        run = next((run for run in one.finished(each.spec) if run["seed"] == 0), None)
        known = None
        if run is not None:
            saved = read_logits(run_folder(one.folder, each.spec, 0))
            known = predictions(config, run, saved, config.select)
        if known is None:
            raise NothingToShowError(f"{each.label} has no finite run at seed 0 in {one.folder}")
        target = known.target
        values.append(np.exp(known.test))
    return target, values


def _pictures(one: Comparison, rows: NDArray[np.intp]) -> list[NDArray[np.uint8]]:
    """(H, W, C) pictures of test rows; none if the data are not pictures, or not there any more."""
    from penex.paper.trained_networks import test_pictures  # torch

    try:
        return test_pictures(one.folder, 0, rows)
    except (CompareError, ImportError, OSError):  # the probabilities are worth showing without
        return []


def _portrait(axes: Axes, picture: NDArray[np.uint8] | None, label: str, row: int) -> None:
    axes.grid(visible=False)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    if picture is None:
        axes.text(0, 0.5, f"{label}\nrow {row}", transform=axes.transAxes, va="center", fontsize=8)
        return
    grey = picture.shape[2] == 1
    axes.imshow(picture[..., 0] if grey else picture, cmap="gray" if grey else None)
    axes.set_title(label, loc="left", fontsize=8)
    axes.set_xlabel(f"row {row}", loc="left", fontsize=7)


def _short(name: str) -> str:
    return plots.plain(name if len(name) <= 14 else f"{name[:13]}…")


def _bars(
    axes: Axes, probability: Floats, target: int, classes: Sequence[str], colour: str
) -> None:
    """The largest probabilities as bars with the class's name; that of the label is coloured."""
    top = np.argsort(-probability, kind="stable")[:CLASSES_SHOWN]
    shades = [colour if index == target else "#b9bec5" for index in top]
    axes.barh(np.arange(len(top)), probability[top], color=shades, height=0.75)
    for place, index in enumerate(top):
        text = f"{_short(classes[index])}  {probability[index]:.2f}"
        inside = probability[index] > 0.55
        light = inside and index == target
        axes.text(
            probability[index] + (-0.02 if inside else 0.02),
            place,
            text,
            ha="right" if inside else "left",
            va="center",
            fontsize=7,
            color="white" if light else INK,
        )
    axes.grid(visible=False)
    axes.set(xlim=(0, 1), xticks=[0, 0.5, 1], ylim=(CLASSES_SHOWN - 0.4, -0.6), yticks=[])


def _one_per_loss(loss_results: Sequence[LossResults]) -> list[LossResults]:
    """The first of every loss, where the same is in a comparison at several strengths."""
    first: dict[str, LossResults] = {}
    for one in loss_results:
        first.setdefault(parse_loss(one.spec).loss.name, one)
    return list(first.values())


@_named("robustness")
def robustness(comparisons: Sequence[Comparison]) -> Figure:
    """Accuracy against the radius of the strongest of all attacks, from robustness.json."""
    found = [(one, records) for one in comparisons if (records := read(one.folder))]
    if not found:
        raise NothingToShowError("no comparison was attacked; run penex attack first")
    figure, panels = _grid(len(found), len(NORMS))
    for row, (one, records) in zip(panels, found, strict=True):
        for axes, norm in zip(row, NORMS, strict=True):
            plots.robust(axes, one.loss_results, records, norm)
            axes.set_title(one.name, loc="left")
    for fmt, face, title in (("o-", "#888888", "Selected epoch"), ("o:", "white", EPOCHS[LAST])):
        panels[0, 0].plot([], [], fmt, color="#888888", mfc=face, label=title)
    _legend(figure, panels.flat)
    return figure


@_named("runtime")
def runtime(comparisons: Sequence[Comparison]) -> Figure:
    """Time of the training part of an epoch, each loss measured alone."""
    figure, panels = _panels(len(comparisons))
    for one, axes in _filled(comparisons, panels):
        for place, each in enumerate(one.loss_results):
            seconds = one.results["seconds_per_epoch"].get(each.spec)
            if seconds is not None:
                axes.barh(place, 1000 * seconds, color=each.colour, height=0.5)
        axes.set_yticks(range(len(one.loss_results)), [each.label for each in one.loss_results])
        axes.invert_yaxis()
        axes.set_axisbelow(True)
        axes.grid(visible=False, axis="y")
        axes.set_title(one.name, loc="left")
        axes.set_xlabel("Time of a training epoch, ms")
        axes.set_xlim(left=0)
    return figure


# ---- of functions ----------------------------------------------------------------------------


@_named("binary-loss")
def binary_loss(comparisons: Sequence[Comparison] = ()) -> Figure:
    r"""Cross-entropy and PENEX of two classes, and their slopes, against the margin.

    At logits (m/2, −m/2) and the penalty ρ: e^{-αm/2} + ρ (e^{m/2} + e^{-m/2}), divided by α, the
    scale of its gradient. Constants, which no gradient sees, are added so that all are log 2 at 0.
    """
    del comparisons
    margin = np.linspace(-6, 10, 400)
    figure, ((left, right),) = _grid(1, 2)
    for axes, derivative in ((left, False), (right, True)):
        axes.plot(margin, _binary_ce(margin, derivative), color=INK, label="Cross-entropy")
        for colour, alpha in zip(REGIONS, (0.1, 0.5, 1.0), strict=False):
            for share, line in ((1.0, "-"), (0.1, "--")):
                values = _binary_penex(margin, alpha, share * alpha / 2, derivative)
                label = f"PENEX α={alpha:g}" if share == 1 else None
                axes.plot(margin, values, line, color=colour, label=label)
        axes.axvline(0, color=INK, linewidth=0.8, alpha=0.5)
        axes.set_xlabel("Margin of the logits, f(label) − f(other)")
    for line, rho in (("-", "ρ = α/2, as at equal logits"), ("--", "ρ = α/20")):
        left.plot([], [], line, color="#888888", label=rho)
    left.set(ylim=(-1.4, 6), ylabel="Loss (PENEX: / α, shifted)")
    right.axhline(0, color=INK, linewidth=0.8, alpha=0.5)
    right.set(ylim=(-1.6, 1.6), ylabel="Slope (PENEX: / α)")
    _legend(figure, [left])
    return figure


def _binary_ce(margin: Floats, derivative: bool) -> Floats:
    if derivative:
        return np.asarray(-1 / (1 + np.exp(margin)))
    return np.asarray(np.logaddexp(0, -margin))


def _binary_penex(margin: Floats, alpha: float, rho: float, derivative: bool) -> Floats:
    exponential, half = np.exp(-alpha * margin / 2), margin / 2
    if derivative:
        return np.asarray((-alpha / 2 * exponential + rho * np.sinh(half)) / alpha)
    loss = exponential + 2 * rho * np.cosh(half)
    return np.asarray((loss - (1 + 2 * rho)) / alpha + math.log(2))


@_named("decision-regions")
def decision_regions(comparisons: Sequence[Comparison]) -> Figure:
    """Decision regions of two features with the distances of training rows to their border.

    Seed 0, last epoch. The support vector machine is scikit-learn's SVC with its default radial
    kernel, C = 1, on the same training rows.
    """
    from penex.paper.trained_networks import plane  # torch

    views = []
    for one in comparisons:
        view = plane(one.folder, [each.spec for each in _one_per_loss(one.loss_results)])
        if view is not None:
            views.append((one, view))
    if not views:
        raise NothingToShowError("no comparison is of data with two features")
    columns = min(3, max(len(view.scores) for _, view in views))
    rows = [
        (one, view, list(view.scores)[start : start + columns])
        for one, view in views
        for start in range(0, len(view.scores), columns)
    ]
    figure, panels = _grid(len(rows), columns, size=(3.4, 3.4))
    for row, (one, view, names) in zip(panels, rows, strict=True):
        for column, axes in enumerate(row):
            if column >= len(names):
                axes.set_axis_off()
                continue
            _regions(axes, view, names[column])
            if column == 0:
                axes.set_ylabel(f"{one.name}: feature 2, standardised")
            axes.set_xlabel("Feature 1, standardised")
    return figure


def _regions(axes: Axes, view: Any, name: str) -> None:
    scores = view.scores[name]
    classes = scores.shape[-1]
    colours = [REGIONS[index % len(REGIONS)] for index in range(classes)]
    predicted = scores.argmax(-1)
    axes.pcolormesh(
        view.x,
        view.y,
        predicted,
        cmap=ListedColormap(colours),
        vmin=-0.5,
        vmax=classes - 0.5,
        alpha=0.2,
        shading="nearest",
        rasterized=True,
        linewidth=0,
    )
    edge = border(view.x, view.y, scores)
    distance = distances(view.features, edge)
    wrong = view.wrong[name]
    for index, colour in enumerate(colours):
        first, second = view.features[view.target == index].T
        axes.scatter(first, second, s=12, color=colour, linewidth=0)
    first, second = view.features[wrong].T
    axes.scatter(first, second, s=34, facecolor="none", edgecolor=INK, linewidth=0.9)
    axes.plot(*edge.T, ".", color=INK, markersize=1.2)
    right = distance[~wrong]
    margin = f"{right.min():.2f}, mean {right.mean():.2f}" if right.size else "none"
    axes.set_title(f"{name}: {wrong.sum()} wrong\nSmallest margin {margin}", loc="left")
    axes.grid(visible=False)
    axes.set(xlim=(view.x[0], view.x[-1]), ylim=(view.y[0], view.y[-1]), aspect="equal")


def border(x: Floats, y: Floats, scores: Floats) -> Floats:
    """(P, 2) points where two classes have the same, largest score, between points of a grid.

    Args:
        x: (X,) coordinates of the grid.
        y: (Y,) coordinates of the grid.
        scores: (Y, X, K) score of every class; the largest is predicted. Linear interpolation.
    """
    predicted = scores.argmax(-1)
    points = []
    grid = np.stack(np.meshgrid(x, y), -1)
    for here, there in (
        (np.s_[:, :-1], np.s_[:, 1:]),
        (np.s_[:-1, :], np.s_[1:, :]),
    ):
        changes = predicted[here] != predicted[there]
        a, b = predicted[here][changes], predicted[there][changes]
        each = np.arange(len(a))
        before, after = scores[here][changes], scores[there][changes]
        ahead, behind = before[each, a] - before[each, b], after[each, b] - after[each, a]
        share = (ahead / np.maximum(ahead + behind, np.finfo(np.float64).tiny))[:, None]
        points.append((1 - share) * grid[here][changes] + share * grid[there][changes])
    return np.concatenate(points)


def distances(features: Floats, edge: Floats) -> Floats:
    """(N,) Euclidean distance of each of (N, 2) rows to the nearest of (P, 2) border points."""
    from scipy.spatial import KDTree

    if not len(edge):
        return np.full(len(features), np.inf)
    return np.asarray(KDTree(edge).query(features)[0])


# ---- layout ----------------------------------------------------------------------------------


def _grid(
    rows: int,
    columns: int,
    *,
    size: tuple[float, float] = PANEL,
    sharex: Any = False,
    sharey: Any = False,
    width_ratios: Sequence[float] | None = None,
) -> tuple[Figure, NDArray[Any]]:
    """A figure of panels, each of `size` inches, and the (rows, columns) axes."""
    figure = Figure(figsize=(size[0] * columns, size[1] * rows + 0.4), layout="constrained")
    panels = figure.subplots(
        rows, columns, squeeze=False, sharex=sharex, sharey=sharey, width_ratios=width_ratios
    )
    return figure, panels


def _panels(n: int) -> tuple[Figure, NDArray[Any]]:
    """A grid of n panels or a few more, at most three in a row."""
    columns = min(n, 3)
    return _grid(-(-n // columns), columns, size=LARGE if n == 1 else PANEL)


def _filled(
    comparisons: Sequence[Comparison], panels: NDArray[Any]
) -> Iterable[tuple[Comparison, Axes]]:
    """A panel to every comparison; those left over disappear."""
    for axes in panels.flat[len(comparisons) :]:
        axes.set_axis_off()
    return zip(comparisons, panels.flat, strict=False)


def _legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """One legend above the panels; what has the same label and looks alike stands there once."""
    entries: dict[tuple[str, str, str], Any] = {}
    for axes in panels:
        legend: Any = axes.get_legend_handles_labels()
        for handle, label in zip(*legend, strict=True):
            line = handle[0] if isinstance(handle, tuple) else handle  # of what has error bars
            if isinstance(line, Polygon):  # of a histogram; the legend would show a box
                line = Line2D([], [], color=line.get_edgecolor(), linestyle=line.get_linestyle())
            entries.setdefault((label, to_hex(line.get_color()), str(line.get_linestyle())), line)
    if not entries:
        return
    labels = [label for label, *_ in entries]
    width = figure.get_figwidth() * 72
    columns = next(n for n in range(len(labels), 0, -1) if n == 1 or _spread(labels, n) < width)
    figure.legend(list(entries.values()), labels, loc="outside upper left", ncols=columns)


def _spread(labels: Sequence[str], columns: int) -> float:
    """About how many points wide a legend is, which is filled column by column."""
    height = -(-len(labels) // columns)
    longest = [
        max(map(len, labels[start : start + height])) for start in range(0, len(labels), height)
    ]
    return sum(5.2 * n + 42 for n in longest)


def names(only: Sequence[str]) -> list[str]:
    """The figures asked for, all of them if none is.

    Raises:
        CompareError: One is not known.
    """
    for name in only:
        if name not in FIGURES:
            raise CompareError(f"figures: none is called {name!r}. Known: {', '.join(FIGURES)}.")
    return list(dict.fromkeys(only or FIGURES))
