"""The table of a comparison, for terminals, LaTeX and Markdown, from results.json's content."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from penex.compare.analysis import EPOCHS, clear
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
        metric = METRICS[name]
        unit = " %" if metric.percent else ""
        arrow = "↑" if metric.higher_is_better else "↓"
        titles.append(f"{metric.label}{' (T)' if scaling == 'scaled' else ''}{unit} {arrow}")
    return titles


def rows(results: dict[str, Any], epoch: str) -> Iterator[Row]:
    """The table at "best" or "last" epoch."""
    for loss in results["losses"]:
        cells = [
            cell(name, results["summary"][epoch][scaling][name][loss["spec"]])
            for name, scaling in COLUMNS
        ]
        label = loss["label"]
        if loss["diverged"]:
            label += f" ({loss['diverged']} of {loss['runs']} diverged)"
        yield Row(label, cells, _milliseconds(loss["seconds_per_epoch"]["mean"]))


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


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{1000 * seconds:.0f}" if seconds >= 1 else f"{1000 * seconds:.3g}"


def caption(results: dict[str, Any]) -> str:
    """What the numbers are, in words."""
    config = results["config"]
    counts = results["runs"][0]["rows"]
    noise = (
        f", {config['label_noise']:.0%} label noise in training" if config["label_noise"] else ""
    )
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
    "Time is that of one training epoch."
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
    styles = {1: "green", 0: "dim", -1: "red"}
    plus_minus = "\n±" if stacked else "±"
    for row in rows(results, epoch):
        texts = []
        for cell in row.cells:
            value, change = (part.replace("±", plus_minus) for part in cell[:2])
            number = Text(f"{value}{'★' if cell.best else ' '}", "bold" if cell.best else "")
            if change:
                number.append(f"\n{change} ", style=styles[cell.sign])
            texts.append(number)
        table.add_row(Text(row.label.replace(" (", "\n(")), *texts, row.time)
    return table


def markdown(results: dict[str, Any], epoch: str) -> str:
    """A pipe table, differences left out."""
    titles = ["Loss", *header(), "ms/epoch"]
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    for row in rows(results, epoch):
        cells = [f"**{cell.value}** ★" if cell.best else cell.value for cell in row.cells]
        lines.append([re.sub(r"([\\`*_<>|])", r"\\\1", row.label), *cells, row.time])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
