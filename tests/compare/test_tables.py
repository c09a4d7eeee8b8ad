"""The tables show the numbers of the results, whole, in every form they are written in."""

import copy
import io
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from penex.compare import tables
from penex.compare.analysis import EPOCHS, summarize

Make = Callable[..., Path]
AWKWARD = r"a|b & c_d 100% #1 \x {y} ~^ <i> *z* `k` $5 \* \|"


@pytest.fixture(scope="module")
def results(make: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All five losses and one fixed value: the longest labels, and every kind of mark."""
    losses = ("cross-entropy", "label-smoothing", "confidence-penalty=0.25", "focal", "penex=0.3")
    folder = make(tmp_path_factory.mktemp("tables") / "out", losses=losses, seeds=3, epochs=6)
    return summarize(folder)


@pytest.fixture
def awkward(results: dict[str, Any]) -> dict[str, Any]:
    changed = copy.deepcopy(results)
    changed["losses"][1]["label"] = AWKWARD
    changed["data"]["name"] = "50%_off\n\\input{x}"
    return changed


def expected(results: dict[str, Any], epoch: str) -> list[list[str]]:
    """Label and numbers of every row, formatted here on their own."""
    lines = []
    for loss in results["losses"]:
        line = [loss["label"]]
        for metric, scaling in tables.COLUMNS:
            cell = results["summary"][epoch][scaling][metric][loss["spec"]]
            factor, digits = (100, 1) if metric == "accuracy" else (1, 3)
            value, half = (f"{factor * cell[name]:.{digits}f}" for name in ("mean", "half_width"))
            line.append(f"{value}±{half}")
        lines.append([*line, f"{1000 * loss['seconds_per_epoch']['least']:.3g}"])
    return lines


def rendered(results: dict[str, Any], epoch: str, width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(tables.terminal(results, epoch, width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def columns(text: str) -> list[str]:
    """The text of each column of a terminal's table, read from top to bottom without spaces."""
    rule = next(n for n, line in enumerate(text.splitlines()) if set(line.strip()) == {"─"})
    lines = [line.ljust(200) for line in text.splitlines()[rule + 1 :]]
    gaps = [n for n in range(200) if all(line[n] == " " for line in lines)]
    starts = [n + 1 for n in gaps[:-1] if n + 1 not in gaps]
    bounds = [0, *starts[-len(tables.COLUMNS) - 1 :], 200]  # labels have gaps of their own
    found = ["".join(line[a:b] for line in lines) for a, b in pairwise(bounds)]
    return ["".join(column.split()) for column in found]


def test_some_cell_is_marked(results: dict[str, Any]) -> None:
    """What the tests below look for occurs."""
    cells = [cell for epoch in EPOCHS for row in tables.rows(results, epoch) for cell in row.cells]
    assert any(cell.best for cell in cells)
    assert any(cell.sign for cell in cells)
    assert any(cell.difference and not cell.sign for cell in cells)


@pytest.mark.parametrize("epoch", EPOCHS)
def test_rows_are_the_results(results: dict[str, Any], epoch: str) -> None:
    lines = list(tables.rows(results, epoch))
    assert [[row.label, *(c.value for c in row.cells), row.time] for row in lines] == expected(
        results, epoch
    )
    for row, loss in zip(lines, results["losses"], strict=True):
        for cell, (metric, scaling) in zip(row.cells, tables.COLUMNS, strict=True):
            value = results["summary"][epoch][scaling][metric][loss["spec"]]
            assert cell.best == value["best"]
            if value["difference"] is None:
                assert (cell.difference, cell.sign) == ("", 0)
                continue
            mean, half = value["difference"]["mean"], value["difference"]["half_width"]
            factor, digits = (100, 1) if metric == "accuracy" else (1, 3)
            sign = "−" if mean < 0 else "+"
            shown = f"{sign}{factor * abs(mean):.{digits}f}±{factor * half:.{digits}f}"
            assert cell.difference == shown
            better = mean > 0 if metric == "accuracy" else mean < 0
            assert cell.sign == (0 if abs(mean) <= half else 1 if better else -1)


@pytest.mark.parametrize("width", [80, 100, 120, 200])
@pytest.mark.parametrize("epoch", EPOCHS)
def test_nothing_is_cut_off_in_a_terminal(results: dict[str, Any], epoch: str, width: int) -> None:
    text = rendered(results, epoch, width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert EPOCHS[epoch] in text.splitlines()[0]
    found = columns(text)
    lines = list(tables.rows(results, epoch))
    assert found[0] == "".join(row.label.replace(" ", "") for row in lines)
    assert found[-1] == "".join(row.time for row in lines)
    for number, column in enumerate(found[1:-1]):
        cells = [row.cells[number] for row in lines]
        assert column == "".join(f"{c.value}{'★' * c.best}{c.difference}" for c in cells)


def test_a_wide_terminal_shows_a_number_in_one_piece(results: dict[str, Any]) -> None:
    text = rendered(results, "best", 120)
    for line in expected(results, "best"):
        assert all(value in text for value in line)
    assert not any("±" in line.split() for line in text.splitlines())


def test_a_narrow_terminal_breaks_before_the_sign_only(results: dict[str, Any]) -> None:
    text = rendered(results, "best", 80)
    for line in expected(results, "best"):
        for value in line[1:-1]:
            mean, half = value.split("±")
            assert re.search(rf"(^|\s){re.escape(mean)}\s", text)
            assert re.search(rf"\s±{re.escape(half)}[★\s]", text)


def test_diverged_runs_are_counted_beside_the_label(results: dict[str, Any]) -> None:
    changed = copy.deepcopy(results)
    changed["losses"][2]["diverged"] = 2
    empty = {"mean": None, "half_width": None, "n": 0, "difference": None, "best": False}
    changed["summary"]["best"]["raw"]["nll"]["confidence-penalty=0.25"] = empty
    row = list(tables.rows(changed, "best"))[2]
    assert row.label == "Confidence penalty β=0.25 (2 of 3 diverged)"
    assert row.cells[1] == tables.Cell("–", "", best=False, sign=0)
    for width in (80, 120):
        text = rendered(changed, "best", width)
        assert "…" not in text
        assert row.label.replace(" ", "") in columns(text)[0]


def test_without_intervals(make: Make, tmp_path: Path) -> None:
    results = summarize(make(tmp_path / "out", seeds=1))
    text = "".join(tables.markdown(results, "best") + tables.latex(results))
    assert "±" not in text
    assert r"\pm" not in text
    assert rendered(results, "best", 80).count("±") == 0
    cell = list(tables.rows(results, "best"))[1].cells[1]
    assert re.fullmatch(r"[+−]\d\.\d{3}", cell.difference)


def markdown_rows(text: str) -> list[list[str]]:
    """Cells as CommonMark with GitHub's tables reads them, without markup."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    assert [token.type for token in tokens if token.level == 0] == ["table_open", "table_close"]
    lines: list[list[str]] = []
    for token in tokens:
        if token.type == "tr_open":
            lines.append([])
        if token.type == "inline":
            children = token.children or []
            assert {child.type for child in children} <= {"text", "strong_open", "strong_close"}
            lines[-1].append("".join(child.content for child in children))
    return lines


@pytest.mark.parametrize("epoch", EPOCHS)
def test_markdown(awkward: dict[str, Any], epoch: str) -> None:
    lines = markdown_rows(tables.markdown(awkward, epoch))
    assert lines[0] == ["Loss", *tables.header(), "ms/epoch"]
    assert [[cell.removesuffix(" ★") for cell in line] for line in lines[1:]] == expected(
        awkward, epoch
    )
    stars = [[cell.endswith("★") for cell in line[1:-1]] for line in lines[1:]]
    assert stars == [[cell.best for cell in row.cells] for row in tables.rows(awkward, epoch)]


def test_latex(awkward: dict[str, Any]) -> None:
    text = tables.latex(awkward)
    code = [line for line in text.splitlines() if not line.startswith("%")]
    assert "% 50%_off \\input{x}: 90 training," in text  # one comment, whatever the name
    assert code[0] == "\\begin{tabular}{lrrrrrrr}"
    assert code[-1] == "\\end{tabular}"
    body = [line for line in code if re.search(r"(?<!\\)&", line)]
    wanted = [["Loss", *tables.header(), "ms/epoch"]]
    wanted += expected(awkward, "best") + expected(awkward, "last")
    assert [[plain(cell) for cell in cells(line)] for line in body] == wanted
    bold = [["textbf" in cell for cell in cells(line)[1:-1]] for line in body[1:]]
    assert bold == [
        [cell.best for cell in row.cells] for epoch in EPOCHS for row in tables.rows(awkward, epoch)
    ]


def cells(line: str) -> list[str]:
    assert line.endswith(" \\\\")
    return [cell.strip() for cell in re.split(r"(?<!\\)&", line[:-2])]


def plain(cell: str) -> str:
    """What LaTeX prints for `cell`; fails on any active character."""
    cell = re.sub(r"^\\textbf\{(.*)\}$", r"\1", cell)
    words = {
        "textbackslash{}": "\\",
        "textasciitilde{}": "~",
        "textasciicircum{}": "^",
        "uparrow": "↑",
        "downarrow": "↓",
        "pm": "±",
        "alpha": "α",
        "beta": "β",
        "gamma": "γ",
        "varepsilon": "ε",
    }
    shown, rest = "", cell
    while rest:
        macro = re.match(r"\$\\(\w+)\$|\\(text\w+\{\})|\\([&%$#_{}])", rest)
        if macro:
            word = macro[1] or macro[2]
            shown += words[word] if word else macro[3]
            rest = rest[macro.end() :]
        else:
            assert rest[0] not in "\\&%$#_{}~^", cell
            shown, rest = shown + rest[0], rest[1:]
    return shown


@pytest.mark.parametrize(
    ("changes", "caption"),
    [
        ({}, "iris: 90 training, 22 validation and 38 test rows, 3 seeds. Nothing tuned."),
        ({"label_noise": 0.2}, "3 seeds, 20% label noise in training. Nothing tuned."),
        ({"tune": 8}, "3 seeds. Tuned with 8 trials per loss on validation NLL."),
    ],
)
def test_caption(results: dict[str, Any], changes: dict[str, Any], caption: str) -> None:
    changed = results | {"config": results["config"] | changes}
    assert tables.caption(changed).endswith(caption)
    unfinished = changed | {"planned_runs": 20}
    assert tables.caption(unfinished).endswith(f"{caption} Unfinished: 15 of 20 runs.")


# ---- several comparisons ---------------------------------------------------------------------


@pytest.fixture
def several(results: dict[str, Any], awkward: dict[str, Any]) -> list[dict[str, Any]]:
    return [results, awkward]


def expected_merged(results: dict[str, Any], epoch: str) -> list[list[str]]:
    """Label, numbers and bootstrap intervals of every row, formatted here on their own."""
    lines = []
    for loss in results["losses"]:
        line = [loss["label"]]
        for metric in ("accuracy", "nll", "ece", "brier"):
            cell = results["summary"][epoch]["raw"][metric][loss["spec"]]
            runs = [run for run in results["runs"] if run["loss"] == loss["spec"]]
            low, high = np.mean([run["interval"][epoch][metric] for run in runs], axis=0)
            factor, digits = (100, 1) if metric == "accuracy" else (1, 3)
            numbers = (cell["mean"], cell["half_width"], low, high)
            shown = [f"{factor * number:.{digits}f}" for number in numbers]
            line.append("{}±{} [{}, {}]".format(*shown))
        lines.append(line)
    return lines


@pytest.mark.parametrize("epoch", EPOCHS)
def test_merged_rows(several: list[dict[str, Any]], epoch: str) -> None:
    blocks = tables.merged(several, epoch)
    for results, block in zip(several, blocks, strict=True):
        shown = [
            [line.label, *(f"{cell.value} {ends}" for cell, ends in zip(*line[1:], strict=True))]
            for line in block.lines
        ]
        assert shown == expected_merged(results, epoch)


def test_titles_tell_comparisons_apart(several: list[dict[str, Any]]) -> None:
    results = several[0]
    assert tables.titles([results]) == ["iris, 90 training rows, 3 seeds"]
    assert tables.titles([results, results]) == [
        "iris, 90 training rows, 3 seeds (1)",
        "iris, 90 training rows, 3 seeds (2)",
    ]
    noisy = results | {"config": results["config"] | {"label_noise": 0.1, "model": "vit"}}
    assert tables.titles([noisy]) == ["iris, 90 training rows, 10% label noise, vit, 3 seeds"]


@pytest.mark.parametrize("epoch", EPOCHS)
def test_merged_terminal(several: list[dict[str, Any]], epoch: str) -> None:
    console = Console(width=80, file=io.StringIO())
    for table in tables.merged_terminal(several, epoch):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "…" not in text
    words = text.split()
    for line in expected_merged(several[0], epoch):
        for cell in line[1:]:
            value, low, high = cell.split()
            assert {low, high} <= set(words)
            assert value in words or f"{value}★" in words


@pytest.mark.parametrize("epoch", EPOCHS)
def test_merged_markdown(several: list[dict[str, Any]], epoch: str) -> None:
    tokens = MarkdownIt().enable("table").parse(tables.merged_markdown(several, epoch))
    cells = [token.children or [] for token in tokens if token.type == "inline"]
    texts = ["".join(child.content for child in cell) for cell in cells]
    assert texts[:2] == ["Data", "Loss"]
    rows = [texts[n : n + 6] for n in range(6, len(texts), 6)]
    lines = [line for results in several for line in expected_merged(results, epoch)]
    assert [[row[1], *(cell.replace(" ★", "") for cell in row[2:])] for row in rows] == lines
    assert rows[0][0] == "iris, 90 training rows, 3 seeds"


def test_merged_latex(several: list[dict[str, Any]]) -> None:
    code = [line for line in tables.merged_latex(several).splitlines() if line[0] != "%"]
    assert code[0] == "\\begin{tabular}{lrrrr}"
    assert code[-1] == "\\end{tabular}"
    header, *body = [cells(line) for line in code if re.search(r"(?<!\\)&", line)]
    assert [plain(cell) for cell in header] == ["Loss", *tables.merged_header()]
    shown = []
    for label, *numbers in body:
        parts = [re.fullmatch(r"(.*) \{\\small (.*)\}", cell) for cell in numbers]
        shown.append([plain(label), *(f"{plain(part[1])} {part[2]}" for part in parts if part)])
    assert shown == [
        line for epoch in EPOCHS for results in several for line in expected_merged(results, epoch)
    ]
    titles = [
        match[1] for line in code if (match := re.match(r"\\multicolumn\{5\}\{l\}\{(.*)\} ", line))
    ]
    assert len(titles) == 4
    assert plain(titles[1]).startswith("50%_off \\input{x}, 90 training rows")


def test_a_loss_that_diverged_in_the_merged_table(results: dict[str, Any]) -> None:
    changed = copy.deepcopy(results)
    for run in changed["runs"]:
        if run["loss"] == "focal":
            run["interval"]["last"] = None
    changed["summary"]["last"]["raw"]["nll"]["focal"] |= {"mean": None, "half_width": None}
    (block,) = tables.merged([changed], "last")
    line = next(line for line in block.lines if line.label == "Focal")
    assert line.bootstraps == [""] * 4
    assert line.cells[1].value == "–"
    assert tables.merged_markdown([changed], "last").count("| – |") == 1
    assert "small" not in tables.merged_latex([changed]).splitlines()[-3].partition("Focal")[2]
