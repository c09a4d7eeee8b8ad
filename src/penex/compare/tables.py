"""The table of a comparison, for terminals, LaTeX and Markdown, from results.json's content."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from penex.compare.analysis import EPOCHS, clear
from penex.compare.robustness import NORMS, summary
from penex.metrics import METRICS

COLUMNS = (
    ("accuracy", "raw"),
    ("nll", "raw"),
    ("nll", "scaled"),
    ("brier", "raw"),
    ("ece", "raw"),
    ("ece", "scaled"),
)
"""Metric and scaling, in the order shown; temperature scaling does not change the accuracy."""


class Cell(NamedTuple):
    """A number as the tables show it."""

    value: str
    """mean±half width, or what stands in its place"""
    difference: str
    """to the reference, in the same form; empty for the reference itself"""
    best: bool
    sign: int
    """1 or -1 where the difference is clearly better or worse, 0 where it may be chance."""


class Row(NamedTuple):
    """A loss."""

    label: str
    cells: list[Cell]
    time: str
    """milliseconds per epoch"""


def header() -> list[str]:
    """The columns between the loss and the time."""
    titles = []
    for name, scaling in COLUMNS:
        titles.append(_title(name, " (T)" if scaling == "scaled" else ""))
    return titles


def _title(name: str, mark: str = "") -> str:
    metric = METRICS[name]
    unit = " %" if metric.percent else ""
    return f"{metric.label}{mark}{unit} {'↑' if metric.higher_is_better else '↓'}"


def _label(loss: dict[str, Any]) -> str:
    diverged = f" ({loss['diverged']} of {loss['runs']} diverged)" if loss["diverged"] else ""
    return f"{loss['label']}{diverged}"


def rows(results: dict[str, Any], epoch: str) -> Iterator[Row]:
    """The table at "best" or "last" epoch."""
    for loss in results["losses"]:
        cells = [
            cell(name, results["summary"][epoch][scaling][name][loss["spec"]])
            for name, scaling in COLUMNS
        ]
        yield Row(_label(loss), cells, _milliseconds(loss["seconds_per_epoch"]["least"]))


def cell(name: str, value: dict[str, Any]) -> Cell:
    """The cell of a metric, from its entry in the summary."""
    metric = METRICS[name]
    if value["mean"] is None:
        return Cell("–", "", False, 0)
    text, difference, sign = metric.format(value["mean"]), value["difference"], 0
    if value["half_width"] is not None:
        text += f"±{metric.format(value['half_width'])}"
    if difference is None:
        return Cell(text, "", value["best"], 0)
    change = f"{'−' if difference['mean'] < 0 else '+'}{metric.format(abs(difference['mean']))}"
    if difference["half_width"] is not None:
        change += f"±{metric.format(difference['half_width'])}"
    if clear(difference):
        sign = 1 if (difference["mean"] > 0) == metric.higher_is_better else -1
    return Cell(text, change, value["best"], sign)


class Beside(NamedTuple):
    """A published figure and ours."""

    label: str
    metric: str
    epoch: str
    ours: str
    published: str
    source: str


def published(results: dict[str, Any]) -> list[Beside]:
    """The published figures of a comparison, in the order of its file."""
    found = []
    for entry in results["published"]:
        name, on = entry["metric"], "test"
        if name == "validation_nll":
            name, on = "nll", "validation"
        metric, mean, half = METRICS[name], entry["ours"]["mean"], entry["ours"]["half_width"]
        ours = "–" if mean is None else metric.format(mean)
        ours += "" if half is None else f"±{metric.format(half)}"
        found.append(
            Beside(
                entry["label"],
                f"{metric.label} ({on}){' %' if metric.percent else ''}",
                EPOCHS[entry["at"]],
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
    "Accuracy on test rows that an adversary may change within the radius, under the strongest of "
    "several attacks for each row (PGD, and of AutoAttack APGD on cross-entropy, APGD on the "
    "difference of logits ratio, and Square where they apply). Mean over seeds ± half the 95 % "
    "interval. Filled, solid: best validation epoch; hollow, dotted: last."
)


def robust(results: dict[str, Any], records: Sequence[dict[str, Any]]) -> list[Attacked]:
    """A table per norm of what :mod:`penex.compare.robustness` recorded."""
    found = []
    for norm in {record["norm"]: None for record in records}:
        own = [record for record in records if record["norm"] == norm]
        radii = sorted({0.0, *(record["radius"] for record in own)})
        rows = []
        for loss in results["losses"]:
            for epoch, title in EPOCHS.items():
                cells = summary(records, loss["spec"], epoch, norm)
                texts = [_share(cells.get(radius)) for radius in radii]
                if cells:
                    rows.append((f"{loss['label']}, {title.lower()}", texts))
        found.append(Attacked(norm, NORMS[norm], [radius_name(radius) for radius in radii], rows))
    return found


def radius_name(radius: float) -> str:
    """A radius as people write it: 2/255, 0.25."""
    steps = radius * 255
    if 0 < steps < 64 and abs(steps - round(steps)) < 1e-6:
        return f"{round(steps)}/255"
    return f"{radius:g}"


def _share(cell: dict[str, Any] | None) -> str:
    if cell is None or cell["mean"] is None:
        return "–"
    half = "" if cell["half_width"] is None else f"±{100 * cell['half_width']:.1f}"
    return f"{100 * cell['mean']:.1f}{half}"


_STYLES = {1: "green", 0: "", -1: "red"}
"""Of a difference to the reference in a terminal."""

MERGED = ("accuracy", "nll", "ece", "brier")
"""The metrics of the table of several comparisons, as trained."""


class Line(NamedTuple):
    """A loss in the table of several comparisons."""

    label: str
    cells: list[Cell]
    bootstraps: list[str]
    """For each cell the interval of one run over its test rows, as "[low, high]"."""


class Block(NamedTuple):
    """A comparison in the table of several."""

    title: str
    lines: list[Line]


def merged_header() -> list[str]:
    """The columns after the loss."""
    return [_title(name) for name in MERGED]


def merged(several: Sequence[dict[str, Any]], epoch: str) -> list[Block]:
    """The table of several comparisons at "best" or "last" epoch."""
    blocks = []
    for results, title in zip(several, titles(several), strict=True):
        lines = []
        for loss in results["losses"]:
            column = {name: results["summary"][epoch]["raw"][name] for name in MERGED}
            cells = [cell(name, column[name][loss["spec"]]) for name in MERGED]
            bootstraps = [_bootstrap(results, epoch, name, loss["spec"]) for name in MERGED]
            lines.append(Line(_label(loss), cells, bootstraps))
        blocks.append(Block(title, lines))
    return blocks


def titles(several: Sequence[dict[str, Any]]) -> list[str]:
    """What each comparison is of, in a few words; numbered where these are the same."""
    found = []
    for results in several:
        config, rows = results["config"], results["runs"][0]["rows"]
        parts = [results["data"]["name"], f"{rows['train']} training rows"]
        if config["label_noise"]:
            parts.append(f"{config['label_noise']:.0%} label noise")
        if config.get("model"):
            parts.append(str(config["model"]))
        parts.append("1 seed" if config["seeds"] == 1 else f"{config['seeds']} seeds")
        found.append(", ".join(parts))
    return [
        f"{title} ({found[: n + 1].count(title)})" if found.count(title) > 1 else title
        for n, title in enumerate(found)
    ]


def _bootstrap(results: dict[str, Any], epoch: str, metric: str, spec: str) -> str:
    """The mean over seeds of both ends of a run's bootstrap interval."""
    ends = [run["interval"][epoch] for run in results["runs"] if run["loss"] == spec]
    known = [end[metric] for end in ends if end is not None]
    if not known:
        return ""
    low, high = (
        METRICS[metric].format(sum(each) / len(known)) for each in zip(*known, strict=True)
    )
    return f"[{low}, {high}]"


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{1000 * seconds:.0f}" if seconds >= 1 else f"{1000 * seconds:.3g}"


def caption(results: dict[str, Any]) -> str:
    """What the numbers are, in words."""
    config = results["config"]
    counts = results["runs"][0]["rows"]
    noisy = config["noise_parts"].replace("+", " and ")
    noise = f", {config['label_noise']:.0%} label noise in {noisy}" if config["label_noise"] else ""
    tuned = (
        f" Tuned with {config['tune']} trials per loss on validation NLL."
        if config["tune"]
        else " Nothing tuned."
    )
    seeds = "1 seed" if config["seeds"] == 1 else f"{config['seeds']} seeds"
    done, planned = len(results["runs"]), results["planned_runs"]
    unfinished = "" if done == planned else f" Unfinished: {done} of {planned} runs."
    return (
        f"{results['data']['name']}: {counts['train']} training, {counts['validation']} validation "
        f"and {counts['test']} test rows, {seeds}{noise}.{tuned}{unfinished}"
    )


LEGEND = (
    "Mean over seeds ± half the 95 % interval; below it the paired difference to cross-entropy. "
    "★ best, where that difference is clear of chance (its interval excludes zero). "
    "(T): after temperature scaling fitted on validation, where that can tell the temperature. "
    "Time is that of the median training epoch, in the seed that other work disturbed least."
)


MERGED_LEGEND = (
    "Mean over seeds ± half the 95 % interval of that mean; below it, in brackets, the 95 % "
    "bootstrap interval over test rows of a single trained network, both ends averaged over "
    "seeds. ★ best, and its paired difference to cross-entropy is clear of chance. Probabilities "
    "as trained."
)


def terminal(results: dict[str, Any], epoch: str, width: int) -> Table:
    """For Rich to print on `width` columns, each ± on a line of its own where they do not suffice.

    Nothing is cut off on 80 columns or more.
    """
    table = _terminal(results, epoch, stacked=False)
    needed = Console(width=1000).measure(table).maximum
    return table if needed <= width else _terminal(results, epoch, stacked=True)


def _terminal(results: dict[str, Any], epoch: str, *, stacked: bool) -> Table:
    table = Table(
        title=EPOCHS[epoch],
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
        leading=int(stacked),
    )
    table.add_column("Loss")  # wraps between words; from numbers Rich would cut the end off
    for title in header():
        text = title.replace(" ", "\n", 1) if stacked else title
        table.add_column(f"{text} ", justify="right", no_wrap=True)
    table.add_column("ms/epoch", justify="right", no_wrap=True)
    plus_minus = "\n±" if stacked else "±"
    for row in rows(results, epoch):
        texts = []
        for cell in row.cells:
            value, change = (part.replace("±", plus_minus) for part in cell[:2])
            number = Text(f"{value}{'★' if cell.best else ' '}", "bold" if cell.best else "")
            if change:
                number.append(f"\n{change} ", style=_STYLES[cell.sign] or "dim")
            texts.append(number)
        table.add_row(Text(row.label.replace(" (", "\n(")), *texts, row.time)
    return table


def merged_terminal(several: Sequence[dict[str, Any]], epoch: str) -> Iterator[Table]:
    """For Rich to print on 80 columns or more, a table for each comparison."""
    for block in merged(several, epoch):
        table = Table(
            title=Text(f"{block.title}: {EPOCHS[epoch].lower()}"),
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=0,
            show_edge=False,
        )
        table.add_column("Loss")
        for title in merged_header():
            table.add_column(f"{title} ", justify="right", no_wrap=True)
        for line in block.lines:
            texts = []
            for cell, bootstrap in zip(line.cells, line.bootstraps, strict=True):
                number = Text(f"{cell.value}{'★' if cell.best else ' '}", _STYLES[cell.sign])
                number.append(f"\n{bootstrap} ", style="dim")
                texts.append(number)
            table.add_row(Text(line.label), *texts)
        yield table


def merged_markdown(several: Sequence[dict[str, Any]], epoch: str) -> str:
    """A pipe table with a column for the data."""
    titles = ["Data", "Loss", *merged_header()]
    lines = [titles, ["---", "---", *["---:"] * len(MERGED)]]
    for block in merged(several, epoch):
        for line in block.lines:
            cells = [
                f"{f'**{cell.value}** ★' if cell.best else cell.value} {bootstrap}".strip()
                for cell, bootstrap in zip(line.cells, line.bootstraps, strict=True)
            ]
            lines.append([_md(block.title), _md(line.label), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def merged_latex(several: Sequence[dict[str, Any]]) -> str:
    """A booktabs table of both epochs, with the bootstrap intervals in brackets."""
    columns = 1 + len(MERGED)
    lines = [
        "% Needs \\usepackage{booktabs}",
        "% Mean over seeds and half its 95 % interval; in brackets the 95 % bootstrap interval",
        "% over test rows of a single network. Bold: best, and clear of chance.",
        f"\\begin{{tabular}}{{l{'r' * len(MERGED)}}}",
        "\\toprule",
        " & ".join(map(_tex, ["Loss", *merged_header()])) + r" \\",
    ]
    for epoch, name in EPOCHS.items():
        for block in merged(several, epoch):
            title = _tex(" ".join(f"{block.title}: {name[0].lower()}{name[1:]}".split()))
            lines += ["\\midrule", f"\\multicolumn{{{columns}}}{{l}}{{{title}}} \\\\", "\\midrule"]
            for line in block.lines:
                cells = [
                    (f"\\textbf{{{_tex(cell.value)}}}" if cell.best else _tex(cell.value))
                    + (f" {{\\small {bootstrap}}}" if bootstrap else "")
                    for cell, bootstrap in zip(line.cells, line.bootstraps, strict=True)
                ]
                lines.append(" & ".join([_tex(line.label), *cells]) + r" \\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def markdown(results: dict[str, Any], epoch: str) -> str:
    """A pipe table, differences left out."""
    titles = ["Loss", *header(), "ms/epoch"]
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    for row in rows(results, epoch):
        cells = [f"**{cell.value}** ★" if cell.best else cell.value for cell in row.cells]
        lines.append([_md(row.label), *cells, row.time])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _md(text: str) -> str:
    return re.sub(r"([\\`*_<>|])", r"\\\1", " ".join(text.split()))


def latex(results: dict[str, Any]) -> str:
    """A booktabs table of both epochs."""
    titles = ["Loss", *header(), "ms/epoch"]
    lines = [
        "% Needs \\usepackage{booktabs}",
        f"% {' '.join(caption(results).split())}",
        "% Mean over seeds and half the 95 % interval. Bold: best, and clear of chance.",
        f"\\begin{{tabular}}{{l{'r' * (len(titles) - 1)}}}",
        "\\toprule",
        " & ".join(map(_tex, titles)) + r" \\",
    ]
    for epoch, name in EPOCHS.items():
        lines += ["\\midrule", f"\\multicolumn{{{len(titles)}}}{{l}}{{{name}}} \\\\", "\\midrule"]
        for row in rows(results, epoch):
            cells = [
                f"\\textbf{{{_tex(cell.value)}}}" if cell.best else _tex(cell.value)
                for cell in row.cells
            ]
            lines.append(" & ".join([_tex(row.label), *cells, _tex(row.time)]) + r" \\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


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
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)
