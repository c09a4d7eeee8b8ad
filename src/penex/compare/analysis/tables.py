"""The tables of a comparison from results.json, for terminals, LaTeX and Markdown."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean as average
from typing import Any, NamedTuple

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from penex._terminal import printable
from penex.compare.analysis.leaderboard import Leaderboard
from penex.compare.analysis.robustness import NORMS, summary
from penex.compare.analysis.summary import primary_scaling
from penex.compare.analysis.verdict import settings, signed
from penex.compare.registry import LOSSES, REFERENCE
from penex.compare.training.selection import LAST, SELECTIONS, in_sentence
from penex.metrics import METRICS, Metric

COLUMNS = (
    ("accuracy", "link"),
    ("nll", "link"),
    ("nll", "scaled"),
    ("calibration", "link"),
    ("brier", "scaled"),
    ("smooth_ece", "link"),
    ("smooth_ece", "scaled"),
)
"""Metric and scaling, in the order shown; temperature scaling does not change the accuracy."""


class Cell(NamedTuple):
    """A number as the tables show it."""

    value: str
    """Mean ± half-width; mean [low, high] if the interval is clipped to the metric's bounds; a dash
    if there is no value."""
    difference: str = ""
    """The difference to the reference, in the same form; empty for the reference itself."""
    best: bool = False
    sign: int = 0
    """1 if the loss is better than the reference, -1 if it is worse, else 0."""


class Row(NamedTuple):
    """A loss, or the majority class."""

    label: str
    settings: str
    """Hyperparameter and learning rate; empty for the majority class."""
    epochs: str
    """The selected epochs; empty for the majority class."""
    cells: list[Cell]


def header() -> list[str]:
    """The titles of the columns after the loss."""
    return [_title(name, " (T)" if scaling == "scaled" else "") for name, scaling in COLUMNS]


def _title(name: str, mark: str = "") -> str:
    if name == "calibration":
        return "Calibration ↓"
    metric = METRICS[name]
    unit = " %" if metric.percent else ""
    return f"{metric.label}{mark}{unit} {'↑' if metric.higher_is_better else '↓'}"


def _label(loss: dict[str, Any]) -> str:
    diverged = f" ({loss['diverged']} of {loss['runs']} diverged)" if loss["diverged"] else ""
    return f"{loss['label']}{diverged}"


def rows(results: dict[str, Any], selection: str) -> Iterator[Row]:
    """The rows of the table at a selection, the majority class first."""
    table = results["summary"][selection]
    yield Row("Majority class", "", "", [_of_majority(results, *column) for column in COLUMNS])
    for loss in results["losses"]:
        cells = [
            _calibration(table, loss["spec"])
            if name == "calibration"
            else cell(name, table[scaling][name][loss["spec"]])
            for name, scaling in COLUMNS
        ]
        epochs = span(loss["epochs"][selection])
        yield Row(_label(loss), settings(loss), epochs, cells)


def _of_majority(results: dict[str, Any], name: str, scaling: str) -> Cell:
    value = results["baseline"].get(name)
    shown = value is not None and scaling == "link"
    return Cell(METRICS[name].format(value) if shown else "–")


def _calibration(table: dict[str, Any], spec: str) -> Cell:
    """NLL minus NLL after temperature scaling."""
    whole, refined = (table[scaling]["nll"][spec]["mean"] for scaling in ("link", "scaled"))
    return Cell("–" if whole is None else signed(METRICS["nll"], whole - refined).removeprefix("+"))


def span(epochs: Sequence[int | None]) -> str:
    """The range of epochs, as in "epochs 34–61"."""
    known = sorted(epoch for epoch in epochs if epoch is not None)
    if not known:
        return ""
    if known[0] == known[-1]:
        return f"epoch {known[0]}"
    return f"epochs {known[0]}–{known[-1]}"


def cell(name: str, value: dict[str, Any]) -> Cell:
    """The cell of a metric, from its entry in the summary."""
    metric = METRICS[name]
    if value["mean"] is None:
        return Cell("–")
    difference = value["difference"]
    change = "" if difference is None else _with_interval(metric, difference, difference=True)
    return Cell(_with_interval(metric, value), change, value["best"], value["sign"])


def _with_interval(metric: Metric, value: Mapping[str, Any], *, difference: bool = False) -> str:
    def number(x: float) -> str:
        return signed(metric, x) if difference or x < 0 else metric.format(x)

    mean, low, high = value["mean"], value["low"], value["high"]
    if low is None:
        return number(mean)
    below, above = mean - low, high - mean
    if not math.isclose(below, above, rel_tol=1e-6, abs_tol=1e-9):
        return f"{number(mean)} [{number(low)}, {number(high)}]"
    return f"{number(mean)}±{metric.format(above)}"


BY_SELECTION = (("accuracy", "link"), ("nll", "link"), ("nll", "scaled"))
"""Metric and scaling of the table that compares the selections."""
SHORT_SELECTIONS = {
    "refined": "Lowest NLL (T)",
    "nll": "Lowest NLL",
    "accuracy": "Highest accuracy",
    LAST: "Last",
}
"""Titles of the selections in that table."""


class Selection(NamedTuple):
    """A loss at a selection, without intervals."""

    title: str
    epochs: str
    values: list[str]


def selections_header() -> list[str]:
    """The titles of the columns after the loss in the table that compares the selections."""
    names = [_title(name, " (T)" * (scaling == "scaled")) for name, scaling in BY_SELECTION]
    return ["Epoch by validation", "Epochs", *names]


def selections(results: dict[str, Any]) -> Iterator[tuple[str, list[Selection]]]:
    """For every loss, its results at each selection."""
    for loss in results["losses"]:
        found = []
        for selection, title in SHORT_SELECTIONS.items():
            table = results["summary"][selection]
            values = [
                (METRICS[name], table[scaling][name][loss["spec"]]["mean"])
                for name, scaling in BY_SELECTION
            ]
            texts = ["–" if mean is None else metric.format(mean) for metric, mean in values]
            epochs = span(loss["epochs"][selection]).rpartition(" ")[2] or "–"
            found.append(Selection(title, epochs, texts))
        yield loss["label"], found


def timing(results: dict[str, Any]) -> str:
    """A sentence on the time of a training epoch of each loss; empty if not measured."""
    seconds = results["seconds_per_epoch"]
    if not seconds:
        return ""
    labels = {loss["spec"]: loss["label"] for loss in results["losses"]}
    parts = [
        f"{labels[spec]} {_milliseconds(value)} ms"
        for spec, value in seconds.items()
        if spec in labels
    ]
    return f"Training time per epoch, each loss measured alone: {', '.join(parts)}."


def floor(results: dict[str, Any]) -> str:
    """Sentences on the smooth ECE that calibrated predictions would have; empty if unknown."""
    floors = [run["floor"] for run in results["runs"] if run["floor"]]
    if not floors:
        return ""
    link, scaled = (
        METRICS["smooth_ece"].format(average(each[scaling] for each in floors))
        for scaling in ("link", "scaled")
    )
    return (
        "A smooth ECE is above zero even without miscalibration: for calibrated predictions with "
        f"the same confidences and number of rows it would be about {link}, and {scaled} (T)."
    )


class Published(NamedTuple):
    """A published value and ours."""

    label: str
    metric: str
    epoch: str
    ours: str
    published: str
    source: str


def published(results: dict[str, Any]) -> list[Published]:
    """The published values of a comparison, in the order of its file."""
    found = []
    for entry in results["published"]:
        name, on = entry["metric"], "test"
        if name == "validation_nll":
            name, on = "nll", "validation"
        metric, mean = METRICS[name], entry["ours"]["mean"]
        ours = "–" if mean is None else metric.format(mean)
        found.append(
            Published(
                entry["label"],
                f"{metric.label} ({on}){' %' if metric.percent else ''}",
                SELECTIONS[entry["at"]],
                ours,
                metric.format(entry["value"]),
                entry["source"],
            )
        )
    return found


class Attacked(NamedTuple):
    """The table of accuracies under attack in one norm."""

    name: str
    label: str
    radii: list[str]
    rows: list[tuple[str, list[str]]]
    """A loss at an epoch, and its accuracies in percent."""


ROBUST_LEGEND = (
    "Accuracy on test rows that an adversary may change within the radius. A row counts as correct "
    "if it withstands all attacks: PGD and, from AutoAttack and where they apply, APGD on "
    "cross-entropy, APGD on the difference of logits ratio, and Square. Mean over seeds ± "
    "half-width of the 95 % interval. Filled markers, solid lines: selected epoch; hollow, "
    "dotted: last epoch."
)


def robust(results: dict[str, Any], records: Sequence[dict[str, Any]]) -> list[Attacked]:
    """The tables of the accuracies recorded by :mod:`penex.paper.attacks`, one per norm."""
    found = []
    for norm in {record["norm"]: None for record in records}:
        own = [record for record in records if record["norm"] == norm]
        radii = sorted({0.0, *(record["radius"] for record in own)})
        rows = []
        for loss in results["losses"]:
            for epoch in dict.fromkeys(record["epoch"] for record in own):
                cells = summary(records, loss["spec"], epoch, norm)
                texts = [_share(cells.get(radius)) for radius in radii]
                if cells:
                    rows.append((f"{loss['label']}, {in_sentence(epoch)}", texts))
        found.append(Attacked(norm, NORMS[norm], [radius_name(radius) for radius in radii], rows))
    return found


def radius_name(radius: float) -> str:
    """Format a radius in the usual notation: 2/255, 0.25."""
    steps = radius * 255
    if 0 < steps < 64 and abs(steps - round(steps)) < 1e-6:
        return f"{round(steps)}/255"
    return f"{radius:g}"


def _share(cell: dict[str, Any] | None) -> str:
    if cell is None or cell["mean"] is None:
        return "–"
    return _with_interval(METRICS["accuracy"], cell)


_STYLES = {1: "green", 0: "", -1: "red"}
"""Styles of differences to the reference in a terminal, by sign."""

MERGED = (("accuracy", "link"), ("nll", "link"), ("nll", "scaled"), ("brier", "scaled"))
"""Metric and scaling of the table of several comparisons."""


class Ranking(NamedTuple):
    """A leaderboard as tables show it."""

    title: str
    summary: str
    """How many data sets there are, and whether the losses differ at all."""
    header: list[str]
    lines: list[list[str]]
    """For each loss: label, average rank, share of data sets where it is best, win rate against
    cross-entropy with its interval, adjusted p of the difference to it."""
    picture: str
    """The critical-difference diagram, as SVG."""


def tidy(several: Sequence[dict[str, Any]], metric: str) -> pd.DataFrame:
    """A metric of several comparisons, in the columns of :func:`~.leaderboard.leaderboard`.

    Only losses that are part of all comparisons are included.
    """
    common = set.intersection(*({loss["label"] for loss in each["losses"]} for each in several))
    lines = []
    for results, title in zip(several, titles(several), strict=True):
        selection = results["config"]["select"]
        column = results["summary"][selection][primary_scaling(selection)][metric]
        block = results["data"]["name"]
        lines += [
            (title, block, loss["label"], column[loss["spec"]]["mean"])
            for loss in results["losses"]
            if loss["label"] in common
        ]
    table = pd.DataFrame(lines, columns=["data_set", "block", "loss", "value"])
    return table.astype({"value": float})


def ranking(title: str, board: Leaderboard, picture: str) -> Ranking:
    """The rows of a leaderboard, ordered by average rank, best first."""
    reference = LOSSES[REFERENCE].label
    header = ["Loss", "Average rank", "Best on, %"]
    against = reference in board.ranks.index
    if against:
        header += [f"Wins against {reference.lower()}, %", "Adjusted p"]
    lines = []
    rates, low, high, p_values = (
        dict(zip(table.index, table[reference].to_numpy(float), strict=True)) if against else {}
        for table in (board.win_rates, board.win_low, board.win_high, board.p_values)
    )
    for loss, rank, wins in zip(
        board.ranks.index,
        board.ranks["rank"].to_numpy(float),
        board.ranks["wins"].to_numpy(float),
        strict=True,
    ):
        line = [str(loss), f"{rank:.2f}", f"{100 * wins:.0f}"]
        if against and loss == reference:
            line += ["–", "–"]
        elif against:
            ends = f"{100 * low[loss]:.0f}, {100 * high[loss]:.0f}"
            line += [f"{100 * rates[loss]:.0f} [{ends}]", f"{p_values[loss]:.2g}"]
        lines.append(line)
    count = f"{board.data_sets} comparisons of {board.blocks} data sets"
    test = "" if math.isnan(board.friedman) else f"; Friedman test p = {board.friedman:.2g}"
    return Ranking(title, f"{count}{test}", header, lines, picture)


def softmax(results: dict[str, Any], selection: str) -> list[str]:
    """NLL of plain softmax for every loss, "" if softmax is its link; empty if it is for all."""
    found = []
    for loss in results["losses"]:
        link, plain = (
            results["summary"][selection][scaling]["nll"][loss["spec"]]
            for scaling in ("link", "softmax")
        )
        same = link["mean"] is None or abs(link["mean"] - plain["mean"]) < 1e-9
        found.append("" if same else cell("nll", plain).value)
    return found if any(found) else []


class Line(NamedTuple):
    """A loss in the table of several comparisons."""

    label: str
    cells: list[Cell]


class Block(NamedTuple):
    """A comparison in the table of several comparisons."""

    title: str
    lines: list[Line]


def merged_header() -> list[str]:
    """The titles of the columns after the loss."""
    return [_title(name, " (T)" if scaling == "scaled" else "") for name, scaling in MERGED]


def merged(several: Sequence[dict[str, Any]], selection: str) -> list[Block]:
    """The table of several comparisons at a selection."""
    blocks = []
    for results, title in zip(several, titles(several), strict=True):
        table = results["summary"][selection]
        lines = [
            Line(
                _label(loss),
                [cell(name, table[scaling][name][loss["spec"]]) for name, scaling in MERGED],
            )
            for loss in results["losses"]
        ]
        blocks.append(Block(title, lines))
    return blocks


def titles(several: Sequence[dict[str, Any]]) -> list[str]:
    """A short title for each comparison; equal titles are numbered."""
    found = []
    for results in several:
        config, rows = results["config"], results["runs"][0]["rows"]
        parts = [results["data"]["name"], f"{rows['train']} training rows"]
        if config["label_noise"]:
            parts.append(f"{100 * config['label_noise']:.3g} % label noise")
        if config.get("model"):
            parts.append(str(config["model"]))
        parts.append("1 seed" if config["seeds"] == 1 else f"{config['seeds']} seeds")
        found.append(", ".join(parts))
    return [
        f"{title} ({found[: n + 1].count(title)})" if found.count(title) > 1 else title
        for n, title in enumerate(found)
    ]


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f}" if seconds >= 1 else f"{1000 * seconds:.3g}"


def caption(results: dict[str, Any]) -> str:
    """The caption of a table: data set, rows, seeds and tuning."""
    config = results["config"]
    counts = results["runs"][0]["rows"]
    noise = ""
    if config["label_noise"]:
        parts = config["noise_parts"].replace("+", " and ")
        noise = f", {100 * config['label_noise']:.3g} % label noise in {parts} rows"
    tuned = f"Tuned with {config['tune']} trials per loss."
    seeds = "1 seed" if config["seeds"] == 1 else f"{config['seeds']} seeds"
    done, planned = len(results["runs"]), results["planned_runs"]
    unfinished = "" if done == planned else f" Unfinished: {done} of {planned} runs."
    fixed = results["primary"]["fixed_test"]
    shared = "the same for all seeds" if fixed else "drawn separately for each seed"
    return (
        f"{results['data']['name']}: {counts['train']} training, {counts['validation']} validation "
        f"and {counts['test']} test rows ({shared}), {seeds}{noise}. "
        f"{tuned if config['tune'] else 'Not tuned.'}{unfinished}"
    )


def legend(results: dict[str, Any]) -> str:
    """Explanation of the numbers in the tables."""
    if results["primary"]["fixed_test"]:
        method = "over seeds and test rows"
    else:
        method = "over seeds, corrected for overlapping test sets (Nadeau and Bengio, 2003)"
    return (
        f"Mean ± half-width of the 95 % interval {method}, and below it the paired difference from "
        "cross-entropy. Coloured differences are significant at the 5 % level after Holm’s "
        "correction within the column, and large enough to matter. ★ (only in the metric of the "
        "recommendation): significantly better than cross-entropy and every other loss. (T): after "
        "temperature scaling, fitted on the validation rows. NLL = NLL (T), the refinement error, "
        "+ Calibration, the calibration error."
    )


MERGED_LEGEND = (
    "Mean ± half-width of the 95 % interval. ★ (only in the metric of the recommendation): "
    "significantly better than cross-entropy and every other loss. (T): after temperature scaling, "
    "fitted on the validation rows."
)


def terminal(results: dict[str, Any], selection: str, width: int) -> Table:
    """A Rich table for `width` columns; if too narrow, each ± starts a new line.

    Nothing is truncated on 80 columns or more.
    """
    table = _terminal(results, selection, stacked=False)
    needed = Console(width=1000).measure(table).maximum
    return table if needed <= width else _terminal(results, selection, stacked=True)


def _terminal(results: dict[str, Any], selection: str, *, stacked: bool) -> Table:
    table = _bare(f"Test results: {in_sentence(selection)}")
    table.leading = int(stacked)
    table.add_column("Loss")  # may wrap; in columns of numbers Rich would truncate instead
    for title in header():
        text = title.replace(" ", "\n", 1) if stacked else title
        table.add_column(f"{text} ", justify="right", no_wrap=True)
    for row in rows(results, selection):
        texts = []
        for cell in row.cells:
            value, change = (_stacked(part) if stacked else part for part in cell[:2])
            number = Text(f"{value}{'★' if cell.best else ' '}", "bold" if cell.best else "")
            if change:
                number.append(f"\n{change} ", style=_STYLES[cell.sign] or "dim")
            texts.append(number)
        label = Text(row.label.replace(" (", "\n("))
        for line in filter(None, (row.settings, row.epochs)):
            label.append(f"\n{line.replace(', ', chr(10)) if stacked else line}", style="dim")
        table.add_row(label, *texts)
    return table


def _stacked(text: str) -> str:
    return text.replace("±", "\n±").replace(" [", "\n[").replace(", ", ",\n")


def selections_terminal(results: dict[str, Any]) -> Table:
    """A Rich table for 80 columns or more: every loss at all selections."""
    table = _bare("Test results by selected epoch")
    table.add_column("Loss")
    for place, title in enumerate(selections_header()):
        table.add_column(f" {title}", justify="left" if place == 0 else "right", no_wrap=True)
    for label, found in selections(results):
        lines = [[one.title, one.epochs, *one.values] for one in found]
        columns = zip(*lines, strict=True)
        cells = ("\n".join(f" {value}" for value in column) for column in columns)
        table.add_row(Text(label), *cells)  # one row per loss: a long label wraps beside it
    return table


def _bare(title: str) -> Table:
    """An empty table with a rule below its header and no other lines."""
    return Table(
        title=Text(title),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )


def merged_terminal(several: Sequence[dict[str, Any]], selection: str) -> Iterator[Table]:
    """Rich tables for 80 columns or more, one for each comparison."""
    for block in merged(several, selection):
        table = _bare(printable(f"{block.title}: {in_sentence(selection)}"))
        table.add_column("Loss")
        for title in merged_header():
            table.add_column(f"{title} ", justify="right", no_wrap=True)
        for line in block.lines:
            texts = [
                Text(f"{cell.value}{'★' if cell.best else ' '}", _STYLES[cell.sign])
                for cell in line.cells
            ]
            table.add_row(Text(line.label), *texts)
        yield table


def merged_markdown(several: Sequence[dict[str, Any]], selection: str) -> str:
    """A Markdown table of several comparisons, with a column for the data."""
    titles = ["Data", "Loss", *merged_header()]
    lines = [titles, ["---", "---", *["---:"] * len(MERGED)]]
    for block in merged(several, selection):
        for line in block.lines:
            cells = [_starred(cell) for cell in line.cells]
            lines.append([_md(block.title), _md(line.label), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(results: dict[str, Any], selection: str) -> str:
    """A Markdown table without differences."""
    titles = ["Loss", *header()]
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    for row in rows(results, selection):
        facts = ", ".join(filter(None, (row.settings, row.epochs)))
        label = f"{_md(row.label)}{f'<br>{_md(facts)}' if facts else ''}"
        lines.append([label, *(_starred(cell) for cell in row.cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _starred(cell: Cell) -> str:
    return f"**{cell.value}** ★" if cell.best else cell.value


def _md(text: str) -> str:
    return re.sub(r"([\\`*_<>|])", r"\\\1", " ".join(text.split()))


LATEX_SELECTIONS = ("refined", "nll", LAST)


def latex(results: dict[str, Any]) -> str:
    """A booktabs table at three selections, with hyperparameters and epochs below each loss."""
    columns = 1 + len(COLUMNS)
    lines = _latex_start(len(COLUMNS), [caption(results), legend(results)], ["Loss", *header()])
    for selection in LATEX_SELECTIONS:
        lines += _latex_section(SELECTIONS[selection], columns)
        for row in rows(results, selection):
            lines.append(" & ".join([_tex(row.label), *map(_bold, row.cells)]) + r" \\")
            facts = ", ".join(filter(None, (row.settings, row.epochs)))
            if facts:
                lines.append(f"\\multicolumn{{{columns}}}{{l}}{{\\quad\\small {_tex(facts)}}} \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def merged_latex(several: Sequence[dict[str, Any]]) -> str:
    """A booktabs table of several comparisons at three selections."""
    columns = 1 + len(MERGED)
    lines = _latex_start(len(MERGED), [MERGED_LEGEND], ["Loss", *merged_header()])
    for selection in LATEX_SELECTIONS:
        for block in merged(several, selection):
            title = f"{block.title}: {in_sentence(selection)}"
            lines += _latex_section(title, columns)
            for line in block.lines:
                lines.append(" & ".join([_tex(line.label), *map(_bold, line.cells)]) + r" \\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def _latex_start(columns: int, comments: Sequence[str], titles: Sequence[str]) -> list[str]:
    return [
        "% Needs \\usepackage{booktabs}",
        *(f"% {' '.join(comment.split())}" for comment in comments),
        f"\\begin{{tabular}}{{l{'r' * columns}}}",
        "\\toprule",
        " & ".join(map(_tex, titles)) + r" \\",
    ]


def _latex_section(title: str, columns: int) -> list[str]:
    words = _tex(" ".join(title.split()))
    return ["\\midrule", f"\\multicolumn{{{columns}}}{{l}}{{{words}}} \\\\", "\\midrule"]


def _bold(cell: Cell) -> str:
    return f"\\textbf{{{_tex(cell.value)}}}" if cell.best else _tex(cell.value)


_TEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "–": "--",
    "α": r"$\alpha$",
    "β": r"$\beta$",
    "γ": r"$\gamma$",
    "ε": r"$\varepsilon$",
    "λ": r"$\lambda$",
    "ρ": r"$\rho$",
    "−": "$-$",
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)
