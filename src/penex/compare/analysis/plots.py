"""Pictures of a comparison, drawn from its saved curves and logits.

`read` reads a folder, the functions that take an `Axes` draw a panel each, `svg` makes a panel an
element of an HTML page, and `overview` a picture file of its own.
"""

import html
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray

from penex.compare.analysis.robustness import NORMS, summary
from penex.compare.analysis.summary import predictions, summarize
from penex.compare.config import Config
from penex.compare.errors import CompareError
from penex.compare.files import replacing
from penex.compare.finished_runs import read_curve, read_logits
from penex.compare.output_folder import run_folder
from penex.compare.registry import LOSSES, REFERENCE, parse_loss
from penex.compare.training.selection import LAST, SELECTIONS
from penex.metrics import Reliability, margins, reliability

Floats = NDArray[np.float64]

INK = "#1a1d21"
"""Text, axes and the first loss. In a page it becomes the colour of the text around the picture."""
COLOURS = (INK, "#0072b2", "#009e73", "#c56fa0", "#d55e00")
"""One per registered loss, in order: told apart by the colour-blind, and with a contrast of at
least 3 to white and to black."""
MORE_COLOURS = ("#b8860b", "#3a9bd1", "#aa4499", "#808000")
"""For what is beyond: further losses, and further instances of a loss, which are dashed as well."""
DASHES: tuple[tuple[float, ...], ...] = ((), (4, 1.5), (1.5, 1.5), (6, 1.5, 1.5, 1.5))
POINTS = 400
"""At most so many points to a line; a picture shows no more, and a page should stay small."""
CURVES = ("train_nll", "validation_nll", "train_accuracy", "validation_accuracy")
"""The columns of curve.csv that are drawn by epoch."""
JOINED = 0.01
"""The least share of all samples in a bin that the line of a reliability diagram goes through."""
STYLE: Any = [
    "default",  # whatever the user's own matplotlibrc says
    dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "grid.color", "text.color"), INK),
    dict.fromkeys(("xtick.color", "ytick.color"), INK),
    dict.fromkeys(("axes.linewidth", "grid.linewidth"), 0.6),
    dict.fromkeys(("xtick.major.width", "ytick.major.width"), 0.6),
    {"axes.grid": True, "axes.spines.right": False, "axes.spines.top": False, "grid.alpha": 0.15},
    {"font.size": 9, "legend.frameon": False},
    {"svg.fonttype": "none"},  # text stays text: small, selectable, in the page's font
]


@dataclass(frozen=True)
class LossResults:
    """What the pictures show of one loss.

    Attributes:
        spec: As in the configuration.
        label: As in the tables.
        colour: In hexadecimal.
        dashes: Lengths of dashes and gaps in line widths; empty for a solid line.
        curves: The columns of curve.csv by name, each (runs, epochs), NaN where not finite.
        selected: (epoch, validation NLL) of the runs' selected epochs.
        diagrams: Reliability on test at the selected epochs, "link" and "scaled", pooled over the
            runs whose logits are finite; empty if there is none.
        margins: (N,) margins of the same rows by the link's probabilities, sorted.
        errors: (N,) 1 - p(label) of the same rows by the link's probabilities, sorted.
    """

    spec: str
    label: str
    colour: str
    dashes: tuple[float, ...]
    curves: dict[str, Floats]
    selected: list[tuple[int, float]]
    diagrams: dict[str, Reliability]
    margins: Floats
    errors: Floats

    @property
    def line(self) -> Any:
        """How Matplotlib draws it."""
        return {"color": self.colour, "linestyle": (0, self.dashes) if self.dashes else "-"}

    @property
    def error(self) -> float:
        """Share of negative margins; NaN if there is no margin."""
        return float(np.mean(self.margins < 0)) if len(self.margins) else np.nan


@dataclass(frozen=True)
class Comparison:
    """What tables and pictures may show of an output folder.

    Attributes:
        folder: The output folder.
        results: Its results, of :func:`penex.compare.analysis.summary.summarize`.
        loss_results: Curves and predictions of the losses that have a finished run.
    """

    folder: Path
    results: dict[str, Any]
    loss_results: list[LossResults]

    @property
    def name(self) -> str:
        """Of the data, in plain text."""
        return plain(self.results["data"]["name"])

    def finished(self, spec: str) -> list[dict[str, Any]]:
        """The records of the runs of a loss, by seed."""
        return [run for run in self.results["runs"] if run["loss"] == spec]


def read(folder: Path, **options: Any) -> Comparison:
    """Read an output folder.

    The options are those of :func:`penex.compare.analysis.summary.summarize`.

    Raises:
        CompareError: It holds no comparison, no finished run, or a damaged file.
    """
    results = summarize(folder, **options)
    return Comparison(folder, results, gather(folder, results))


class LineStyle(NamedTuple):
    """How a loss is drawn; see `LossResults`."""

    colour: str
    dashes: tuple[float, ...]


def line_styles(specs: Iterable[str]) -> dict[str, LineStyle]:
    """A distinct style for each loss; the first of a registered name has the style of that name."""
    found: dict[str, LineStyle] = {}
    seen: set[str] = set()
    more = 0
    for spec in specs:
        name = parse_loss(spec).loss.name
        position = list(LOSSES).index(name) if name in LOSSES else len(COLOURS)
        if name not in seen and position < len(COLOURS):
            found[spec] = LineStyle(COLOURS[position], DASHES[0])
        else:  # all pairs of a colour and dashes before one comes again
            dashes = DASHES[(1 + more + more // len(MORE_COLOURS)) % len(DASHES)]
            found[spec] = LineStyle(MORE_COLOURS[more % len(MORE_COLOURS)], dashes)
            more += 1
        seen.add(name)
    return found


def gather(folder: Path, results: dict[str, Any]) -> list[LossResults]:
    """Read curves and logits of the losses that have a finished run, one run at a time.

    Args:
        folder: The output folder.
        results: Of `summarize` on it.

    Raises:
        CompareError: A file is damaged.
    """
    found = []
    look = line_styles(loss["spec"] for loss in results["losses"])
    config = Config(**results["config"])
    for loss in results["losses"]:
        runs = [run for run in results["runs"] if run["loss"] == loss["spec"]]
        if runs:
            read = [_curve(folder, run, results["config"]["epochs"]) for run in runs]
            columns = {name: np.stack([curve[name] for curve in read]) for name in CURVES}
            selected = [
                (run["epochs"][config.select], run["validation"][config.select]["nll"])
                for run in runs
                if run["validation"].get(config.select)
            ]
            style = look[loss["spec"]]
            diagrams, margin, error = _tested(folder, config, runs)
            found.append(
                LossResults(
                    loss["spec"], loss["label"], *style, columns, selected, diagrams, margin, error
                )
            )
    return found


def _curve(folder: Path, run: dict[str, Any], epochs: int) -> dict[str, Floats]:
    where = run_folder(folder, run["loss"], run["seed"])
    curve = read_curve(where)
    if any(name not in curve or len(curve[name]) != epochs for name in CURVES):
        raise CompareError(
            f"{where / 'curve.csv'} is damaged (expected {', '.join(CURVES)} of {epochs} epochs); "
            f"remove {where} and run again"
        )
    return {name: np.where(np.isfinite(curve[name]), curve[name], np.nan) for name in CURVES}


def _tested(
    folder: Path, config: Config, runs: Sequence[dict[str, Any]]
) -> tuple[dict[str, Reliability], Floats, Floats]:
    link, scaled, pooled, errors = [], [], [np.empty(0)], [np.empty(0)]
    for run in runs:
        saved = read_logits(run_folder(folder, run["loss"], run["seed"]))
        found = predictions(config, run, saved, config.select)
        if found is not None:
            target = found.target
            link.append(reliability(found.scaled("link"), target))
            scaled.append(reliability(found.scaled("scaled"), target))
            pooled.append(margins(found.test, target))
            errors.append(1 - np.exp(found.test)[np.arange(len(target)), target])
    diagrams = {"link": _pool(link), "scaled": _pool(scaled)} if link else {}
    return diagrams, np.sort(np.concatenate(pooled)), np.sort(np.concatenate(errors))


def _pool(diagrams: Sequence[Reliability]) -> Reliability:
    """The diagram of all samples together."""
    count = np.sum([each.count for each in diagrams], axis=0)
    divisor = np.where(count > 0, count, np.nan)
    confidence = np.nansum([each.count * each.confidence for each in diagrams], axis=0) / divisor
    accuracy = np.nansum([each.count * each.accuracy for each in diagrams], axis=0) / divisor
    return Reliability(diagrams[0].edges, count, confidence, accuracy)


def _thinned(n: int) -> NDArray[np.intp]:
    """At most POINTS of n indices, the first and the last among them."""
    return np.unique(np.linspace(0, n - 1, min(n, POINTS)).round().astype(np.intp))


def learning(axes: Axes, loss_results: Sequence[LossResults], column: str) -> None:
    """A column of curve.csv by epoch: the mean over runs, and every run in a thin line.

    A mean line ends where a run stopped being finite. Dots are the runs' selected epochs.
    """
    is_nll = column.endswith("nll")
    for one in loss_results:
        index = _thinned(one.curves[column].shape[1])
        values = (1 if is_nll else 100) * one.curves[column][:, index]
        axes.plot(index + 1, values.T, color=one.colour, linewidth=0.5, alpha=0.4)
        axes.plot(index + 1, values.mean(axis=0), **one.line, linewidth=1.6, label=one.label)
        if column == "validation_nll" and one.selected:
            axes.plot(
                *zip(*one.selected, strict=True), "o", color=one.colour, markersize=3, alpha=0.8
            )
    if is_nll:
        logarithmic(axes, np.concatenate([one.curves[column].ravel() for one in loss_results]))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axes.set(xlabel="Epoch", ylabel="NLL" if is_nll else "Accuracy, %")


def logarithmic(axes: Axes, values: Floats) -> None:
    """Make the y axis logarithmic if the positive `values` span enough, with plain numbers."""
    values = values[values > 0]
    decades = np.log10(values.max() / values.min()) if values.size else 0
    if decades > 0.7:  # less leaves a logarithmic axis without labels
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if decades > 2 else (1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def diagram(axes: Axes, one: LossResults) -> None:
    """Accuracy against confidence by bin, the area of a disc growing with the samples in it."""
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, alpha=0.5)
    for scaling, face, edge, line in (
        ("link", one.colour, one.colour, "-"),
        ("scaled", "none", INK, ":"),
    ):
        bins = one.diagrams[scaling]
        share = bins.count / bins.count.sum()
        joined = share >= JOINED
        axes.plot(bins.confidence[joined], bins.accuracy[joined], line, color=edge, linewidth=1.2)
        axes.scatter(
            bins.confidence[share > 0],
            bins.accuracy[share > 0],
            s=8 + 180 * share[share > 0],
            facecolor=face,
            edgecolor=edge,
            linewidth=0.8,
            alpha=0.8,
        )
    axes.set(xlim=(0, 1.04), ylim=(-0.04, 1.04), xlabel="Confidence", ylabel="Accuracy")


def distribution(axes: Axes, loss_results: Sequence[LossResults]) -> None:
    """The share of test samples with at most a margin, for every margin."""
    for one in loss_results:
        if n := len(one.margins):
            index = _thinned(n)
            style = one.line | {"linewidth": 1.5, "label": one.label}
            axes.step(one.margins[index], (index + 1) / n, where="post", **style)
    axes.axvline(0, color=INK, linewidth=0.8, alpha=0.5)
    axes.set(ylim=(0, 1), xlabel="Margin, log p(y) − max log p(j)", ylabel="Share of test rows")


def robust(
    axes: Axes, loss_results: Sequence[LossResults], records: Sequence[dict[str, Any]], norm: str
) -> None:
    """Accuracy by radius under attack, with intervals; solid: selected epoch, dotted: last.

    Args:
        axes: Where to draw.
        loss_results: The losses.
        records: Of `robustness.read`.
        norm: "linf" or "l2".
    """
    pixels = any(record["box"] for record in records)
    in_255 = pixels and norm == "linf"
    unit = (1 / 255, " in 1/255 of the range of pixels") if in_255 else (1, "")
    for one in loss_results:
        for epoch in dict.fromkeys(record["epoch"] for record in records):
            face, line = ("white", ":") if epoch == LAST else (one.colour, "-")
            cells = summary(records, one.spec, epoch, norm)
            axes.errorbar(
                [radius / unit[0] for radius in cells],
                [100 * cell["mean"] for cell in cells.values()],
                yerr=100 * np.transpose([half_widths(cell) for cell in cells.values()]),
                fmt="o",
                linestyle=line,
                color=one.colour,
                mfc=face,
                markersize=4,
                linewidth=1.4,
                elinewidth=0.7,
                label=None if epoch == LAST else one.label,
            )
    radii = sorted(
        {0.0, *(record["radius"] / unit[0] for record in records if record["norm"] == norm)}
    )
    axes.set_xticks(radii, [f"{radius:.3g}" for radius in radii])
    axes.set(xlabel=f"Radius, {NORMS[norm]}{unit[1]}", ylabel="Accuracy under attack, %")
    axes.set_ylim(0, 1.04 * axes.get_ylim()[1])


def differences(axes: Axes, results: dict[str, Any], loss_results: Sequence[LossResults]) -> None:
    """Paired differences in test NLL to the reference with their intervals over seeds."""
    others = [one for one in loss_results if one.spec != REFERENCE]
    shown = (("refined", "scaled", None), ("nll", "link", "white"), (LAST, "link", "#888888"))
    for (epoch, scaling, face), below in zip(shown, (-0.22, 0, 0.22), strict=True):
        for row, one in enumerate(others):
            found = results["summary"][epoch][scaling]["nll"][one.spec]["difference"]
            if found is not None:
                look: Any = {"fmt": "o", "color": one.colour, "mfc": face or one.colour}
                error = np.transpose([half_widths(found)])
                axes.errorbar(found["mean"], row + below, xerr=error, **look)
        name = SELECTIONS[epoch] + (", scaled" if scaling == "scaled" else "")
        axes.plot([], [], "o", color=INK, mfc=face or INK, label=name)
    axes.axvline(0, color=INK, linewidth=0.8, alpha=0.5)
    axes.set_yticks(range(len(others)), [one.label for one in others])
    axes.set(xlabel="Test NLL less that of cross-entropy, 95 % interval")
    axes.set_ylim(len(others) - 0.5, -0.5)


def half_widths(cell: Mapping[str, Any]) -> tuple[float, float]:
    """How far an interval reaches below and above its mean; 0 where there is none."""
    if cell["low"] is None:
        return 0.0, 0.0
    return cell["mean"] - cell["low"], cell["high"] - cell["mean"]


def plain(text: str) -> str:
    """Text from the data for a picture, where a pair of dollars would set it as a formula."""
    return text.replace("$", r"\$")


def svg(
    name: str, description: str, draw: Callable[[Axes], None], size: tuple[float, float]
) -> str:
    """A panel of `size` inches for a page; see :func:`embedded`."""

    def panel() -> Figure:
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        return figure

    return embedded(name, description, panel)


def embedded(name: str, description: str, make: Callable[[], Figure]) -> str:
    """A figure for a page: ids start with `name`, INK becomes the text's colour."""
    with matplotlib.style.context([*STYLE, {"svg.hashsalt": name}]):
        figure = make()
        stream = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    _, _, text = stream.getvalue().partition("<svg ")  # leaves the XML prologue behind
    # Its one rule would hold for the whole page, which has it for its pictures.
    text = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)
    text = text.replace(INK, "currentColor")
    return f'<svg role="img" aria-label="{html.escape(description)}" {text}'


def overview(comparison: Comparison, path: Path) -> None:
    """Draw a comparison in one picture: validation NLL by epoch, and test NLL.

    The second panel shows paired differences to cross-entropy, which has to be in the comparison.

    Args:
        comparison: Of an output folder with finished runs.
        path: The picture, .svg or .png by its ending.
    """
    results, loss_results = comparison.results, comparison.loss_results
    with matplotlib.style.context([*STYLE, {"svg.hashsalt": "overview"}]):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        learning(left, loss_results, "validation_nll")
        left.set_ylabel("Validation NLL")
        left.legend()
        differences(right, results, loss_results)
        right.legend(loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=8)
        save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a picture in the format that its ending says, without a date in it."""
    dated = {".svg": "Date", ".pdf": "CreationDate"}.get(path.suffix)
    metadata = {dated: None} if dated else None
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as stream:
        figure.savefig(stream, format=path.suffix[1:], dpi=200, metadata=metadata)
