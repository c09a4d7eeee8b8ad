"""The tables show the numbers of the results, untruncated, in every format."""

import copy
import io
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import EPOCHS, TEST, calibrated, write
from markdown_it import MarkdownIt
from rich.console import Console
from rich.table import Table

from penex.compare.analysis import tables
from penex.compare.analysis.leaderboard import leaderboard
from penex.compare.analysis.summary import summarize
from penex.compare.analysis.verdict import settings
from penex.compare.registry import LOSSES
from penex.compare.training.selection import LAST, SELECTIONS
from penex.metrics import METRICS

AWKWARD = r"a|b & c_d 100% #1 \x {y} ~^ <i> *z* `k` $5 \* \|"
SPECS = {
    "cross-entropy": 1.5,
    "label-smoothing": 1.2,
    "confidence-penalty=0.25": 1.5,
    "focal": 1.9,
    "penex=0.3": 2.6,
}
"""All default losses and two fixed values: the longest labels."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    test = {spec: [calibrated(TEST, d, seed) for seed in range(4)] for spec, d in SPECS.items()}
    test["penex=0.3"] = [(2 + 0.05 * seed) * np.eye(3)[TEST] for seed in range(4)]
    epochs = {"focal": EPOCHS | {"refined": 11}}
    seconds = {"cross-entropy": 0.0081234, "penex=0.3": 1.26}
    folder = tmp_path_factory.mktemp("tables") / "out"
    return summarize(write(folder, test, epochs=epochs, seconds=seconds))


@pytest.fixture
def awkward(results: dict[str, Any]) -> dict[str, Any]:
    changed = copy.deepcopy(results)
    changed["losses"][1]["label"] = AWKWARD
    changed["data"]["name"] = "50%_off\n\\input{x}"
    return changed


def digits(metric: str, number: float) -> str:
    return f"{100 * number:.1f}" if METRICS[metric].percent else f"{number:.3f}"


def interval(metric: str, cell: dict[str, Any], signs: bool = False) -> str:
    """A cell formatted here on its own."""

    def number(x: float) -> str:
        text = digits(metric, abs(x))
        sign = "−" if x < 0 else "+"
        return text if not signs or float(text) == 0 else sign + text

    mean, low, high = cell["mean"], cell["low"], cell["high"]
    if low is None:  # the same value at every seed
        return number(mean)
    if abs((low + high) / 2 - mean) > 1e-6:
        return f"{number(mean)} [{number(low)}, {number(high)}]"
    return f"{number(mean)}±{digits(metric, high - mean)}"


def expected(results: dict[str, Any], selection: str) -> list[list[str]]:
    """Label and numbers of every row."""
    of_all = [digits(name, results["baseline"][name]) for name in ("accuracy", "nll", "smooth_ece")]
    lines = [["Majority class", *of_all[:2], "–", "–", "–", of_all[2], "–"]]
    for loss in results["losses"]:
        line = [loss["label"]]
        at = results["summary"][selection]
        for metric, scaling in tables.COLUMNS:
            if metric == "calibration":
                gain = [at[s]["nll"][loss["spec"]]["mean"] for s in ("link", "scaled")]
                line.append(f"{gain[0] - gain[1]:.3f}".replace("-", "−").replace("−0.000", "0.000"))
            else:
                line.append(interval(metric, at[scaling][metric][loss["spec"]]))
        lines.append(line)
    return lines


def printed(*several: Table, width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    for table in several:
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    return text


def columns(text: str) -> list[str]:
    """The text of each column of a terminal's table, read from top to bottom without spaces."""
    rule = next(n for n, line in enumerate(text.splitlines()) if set(line.strip()) == {"─"})
    lines = [line.ljust(200) for line in text.splitlines()[rule + 1 :]]
    gaps = [n for n in range(200) if all(line[n] == " " for line in lines)]
    starts = [n + 1 for n in gaps[:-1] if n + 1 not in gaps]
    bounds = [0, *starts[-len(tables.COLUMNS) :], 200]  # labels have gaps of their own
    found = ["".join(line[a:b] for line in lines) for a, b in pairwise(bounds)]
    return ["".join(column.split()) for column in found]


def test_some_cell_is_marked(results: dict[str, Any]) -> None:
    """What the tests below look for occurs."""
    cells = [
        cell for name in SELECTIONS for row in tables.rows(results, name) for cell in row.cells
    ]
    assert any(cell.best for cell in cells)
    assert {cell.sign for cell in cells} == {-1, 0, 1}
    assert any(cell.difference and not cell.sign for cell in cells)
    assert any("[" in cell.value for cell in cells)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_rows_are_the_results(results: dict[str, Any], selection: str) -> None:
    majority, *lines = list(tables.rows(results, selection))
    shown = [[row.label, *(cell.value for cell in row.cells)] for row in (majority, *lines)]
    assert shown == expected(results, selection)
    assert majority.settings == majority.epochs == ""
    for row, loss in zip(lines, results["losses"], strict=True):
        assert row.settings == settings(loss)
        epoch = 11 if (loss["spec"], selection) == ("focal", "refined") else EPOCHS[selection]
        assert row.epochs == f"epoch {epoch}"
        for cell, (metric, scaling) in zip(row.cells, tables.COLUMNS, strict=True):
            if metric == "calibration":
                assert cell[1:] == ("", False, 0)
                continue
            value = results["summary"][selection][scaling][metric][loss["spec"]]
            assert (cell.best, cell.sign) == (value["best"], value["sign"])
            difference = value["difference"]
            assert cell.difference == (
                "" if difference is None else interval(metric, difference, signs=True)
            )


@pytest.mark.parametrize(
    ("epochs", "text"),
    [([5, 3, 9], "epochs 3–9"), ([4, 4], "epoch 4"), ([None, 4], "epoch 4"), ([None], "")],
)
def test_span(epochs: list[int | None], text: str) -> None:
    assert tables.span(epochs) == text


def test_cells() -> None:
    whole = {"mean": 0.9, "low": 0.85, "high": 0.95, "difference": None, "best": 0, "sign": 0}
    assert tables.cell("accuracy", whole).value == "90.0±5.0"
    cut = whole | {"high": 0.92}
    assert tables.cell("accuracy", cut).value == "90.0 [85.0, 92.0]"
    assert tables.cell("accuracy", whole | {"low": None}).value == "90.0"
    assert tables.cell("accuracy", whole | {"mean": None}) == tables.Cell("–")
    tiny = {"mean": -0.0001, "low": -0.0003, "high": 0.0001}
    assert tables.cell("nll", whole | {"difference": tiny}).difference == "0.000±0.000"
    margin = whole | {"mean": -0.5, "low": -1.0, "high": 0.0}
    assert tables.cell("margin", margin).value == "−0.500±0.500"


@pytest.mark.parametrize("width", [80, 100, 120])
def test_nothing_is_truncated_in_a_terminal(results: dict[str, Any], width: int) -> None:
    text = printed(tables.terminal(results, "refined", width), width=width)
    title = " ".join(text.split("Loss")[0].split())
    assert title.startswith("Test results: lowest validation NLL after temperature scaling")
    found = columns(text)
    lines = list(tables.rows(results, "refined"))
    labels = "".join(f"{row.label}{row.settings}{row.epochs}" for row in lines)
    assert found[0].replace(",", "") == "".join(labels.split()).replace(",", "")
    for number, column in enumerate(found[1:]):
        cells = [row.cells[number] for row in lines]
        shown = "".join(f"{c.value}{'★' * c.best}{c.difference}" for c in cells)
        if width >= 100:
            assert column == "".join(shown.split())
        else:  # the star is at the end of the last line of its number
            assert sorted(column) == sorted("".join(shown.split()))


def test_a_wide_terminal_shows_a_number_in_one_piece(results: dict[str, Any]) -> None:
    text = printed(tables.terminal(results, "refined", 140), width=140)
    for line in expected(results, "refined"):
        assert all(value in text for value in line[1:])
    assert not any("±" in line.split() for line in text.splitlines())


def test_a_narrow_terminal_breaks_numbers_before_the_sign_only(results: dict[str, Any]) -> None:
    text = printed(tables.terminal(results, "refined", 80), width=80)
    for line in expected(results, "refined"):
        for value in line[1:]:
            for part in re.findall(r"±?[−\d.]+", value):
                assert re.search(rf"(^|[\s\[,]){re.escape(part)}[★\s\],]", text), part


@pytest.mark.parametrize("width", [80, 120])
def test_all_selections(results: dict[str, Any], width: int) -> None:
    text = printed(tables.selections_terminal(results), width=width)
    lines = {}
    for label, found in tables.selections(results):
        assert all(word in text for word in label.split())
        for one, selection in zip(found, ("refined", "nll", "accuracy", LAST), strict=True):
            spec = next(loss["spec"] for loss in results["losses"] if loss["label"] == label)
            at = results["summary"][selection]
            means = [
                digits(name, at[scaling][name][spec]["mean"])
                for name, scaling in (("accuracy", "link"), ("nll", "link"), ("nll", "scaled"))
            ]
            assert one.values == means
            lines[label, one.title] = [*one.title.split(), one.epochs, *means]
    assert lines["Focal", "Lowest NLL (T)"][3] == "11"
    assert lines["Focal", "Last"][1] == "20"
    shown = [line.split() for line in text.splitlines()]
    for line in lines.values():
        assert any(each[-len(line) :] == line for each in shown), line


def test_diverged_runs_are_counted_beside_the_label(results: dict[str, Any]) -> None:
    changed = copy.deepcopy(results)
    changed["losses"][2]["diverged"] = 2
    empty = {"mean": None, "low": None, "high": None, "n": 0, "difference": None}
    empty |= {"best": False, "sign": 0}
    for scaling in ("link", "scaled"):
        changed["summary"]["nll"][scaling]["nll"]["confidence-penalty=0.25"] = empty
    row = list(tables.rows(changed, "nll"))[3]
    assert row.label == "Confidence penalty β=0.25 (2 of 4 diverged)"
    assert row.cells[1:4] == [tables.Cell("–")] * 3
    for width in (80, 120):
        text = printed(tables.terminal(changed, "nll", width), width=width)
        assert row.label.replace(" ", "") in columns(text)[0]
    assert dict(tables.selections(changed))[row.label.split(" (")[0]][1].values[1:] == ["–", "–"]


def test_without_intervals(tmp_path: Path) -> None:
    test = {spec: [calibrated(TEST, 1.5, 0)] for spec in ("cross-entropy", "penex")}
    results = summarize(write(tmp_path / "out", test))
    text = "".join(tables.markdown(results, "refined") + tables.latex(results).split("begin")[1])
    assert "±" not in text
    assert r"\pm" not in text
    assert "±" not in printed(tables.terminal(results, "refined", 80), width=80)
    cell = list(tables.rows(results, "refined"))[2].cells[1]
    assert cell.difference == "0.000"


def test_lines_below_the_tables(results: dict[str, Any]) -> None:
    assert tables.timing(results) == (
        "Training time per epoch, each loss measured alone: Cross-entropy 8.12 ms, PENEX α=0.3 "
        "1260 ms."
    )
    assert tables.timing(results | {"seconds_per_epoch": {}}) == ""
    numbers = re.findall(r"\d\.\d{3}", tables.floor(results))
    floors = [run["floor"] for run in results["runs"]]
    means = [np.mean([each[scaling] for each in floors]) for scaling in ("link", "scaled")]
    assert numbers == [f"{mean:.3f}" for mean in means]
    assert tables.floor(results | {"runs": [{"floor": {}}]}) == ""
    # Some of these losses have another link than softmax.
    plain = tables.softmax(results, "refined")
    assert [bool(text) for text in plain] == [False, True, True, True, True]
    cell = results["summary"]["refined"]["softmax"]["nll"]["penex=0.3"]
    assert plain[-1] == interval("nll", cell)


@pytest.mark.parametrize(
    ("fixed", "words"),
    [
        (False, "over seeds, corrected for overlapping test sets (Nadeau and Bengio, 2003)"),
        (True, "over seeds and test rows"),
    ],
)
def test_legend(results: dict[str, Any], fixed: bool, words: str) -> None:
    changed = results | {"primary": results["primary"] | {"fixed_test": fixed}}
    assert f"interval {words}, and below it" in tables.legend(changed)
    rows = "the same for all seeds" if fixed else "drawn separately for each seed"
    assert f"120 test rows ({rows})" in tables.caption(changed)


@pytest.mark.parametrize(
    ("changes", "end"),
    [
        ({}, "4 seeds. Not tuned."),
        ({"label_noise": 0.2}, "4 seeds, 20 % label noise in training rows. Not tuned."),
        (
            {"label_noise": 0.025, "noise_parts": "training+validation"},
            "2.5 % label noise in training and validation rows. Not tuned.",
        ),
        ({"tune": 8}, "4 seeds. Tuned with 8 trials per loss."),
    ],
)
def test_caption(results: dict[str, Any], changes: dict[str, Any], end: str) -> None:
    changed = results | {"config": results["config"] | changes}
    assert tables.caption(changed).startswith("made-up: 480 training, 240 validation and 120 test")
    assert tables.caption(changed).endswith(end)
    unfinished = changed | {"planned_runs": 25}
    assert tables.caption(unfinished).endswith(f"{end} Unfinished: 20 of 25 runs.")


# ---- Markdown and LaTeX ----------------------------------------------------------------------


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
            kinds = {"text", "strong_open", "strong_close", "html_inline"}
            assert {child.type for child in children} <= kinds
            html = [child.content for child in children if child.type == "html_inline"]
            assert set(html) <= {"<br>"}
            lines[-1].append("".join(child.content for child in children))
    return lines


@pytest.mark.parametrize("selection", SELECTIONS)
def test_markdown(awkward: dict[str, Any], selection: str) -> None:
    lines = markdown_rows(tables.markdown(awkward, selection))
    assert lines[0] == ["Loss", *tables.header()]
    shown = [[cell.removesuffix(" ★") for cell in line] for line in lines[1:]]
    wanted = expected(awkward, selection)
    for line, row in zip(wanted[1:], awkward["losses"], strict=True):
        epoch = 11 if (row["spec"], selection) == ("focal", "refined") else EPOCHS[selection]
        line[0] += f"<br>{settings(row)}, epoch {epoch}"
    assert shown == wanted
    stars = [[cell.endswith("★") for cell in line[1:]] for line in lines[1:]]
    assert stars == [[cell.best for cell in row.cells] for row in tables.rows(awkward, selection)]


def test_latex(awkward: dict[str, Any]) -> None:
    text = tables.latex(awkward)
    code = [line for line in text.splitlines() if not line.startswith("%")]
    assert "% 50%_off \\input{x}: 480 training," in text  # one comment, whatever the name
    assert code[0] == "\\begin{tabular}{lrrrrrrr}"
    assert code[-1] == "\\end{tabular}"
    body = [line for line in code if re.search(r"(?<!\\)&", line)]
    wanted = [["Loss", *tables.header()]]
    shown = ("refined", "nll", LAST)
    wanted += [line for selection in shown for line in expected(awkward, selection)]
    assert [[plain(cell) for cell in cells(line)] for line in body] == wanted
    bold = [["textbf" in cell for cell in cells(line)[1:]] for line in body[1:]]
    assert bold == [
        [cell.best for cell in row.cells]
        for selection in shown
        for row in tables.rows(awkward, selection)
    ]
    facts = [line for line in code if "quad" in line]
    assert facts[0] == (r"\multicolumn{8}{l}{\quad\small lr = 0.001, epoch 8} \\")
    assert len(facts) == 3 * 5


def cells(line: str) -> list[str]:
    assert line.endswith(" \\\\")
    return [cell.strip() for cell in re.split(r"(?<!\\)&", line[:-2])]


def plain(cell: str) -> str:
    """What LaTeX prints for `cell`; fails on any active character and on any that is not ASCII."""
    cell = re.sub(r"^\\textbf\{(.*)\}$", r"\1", cell)
    assert cell.isascii()
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
    shown, rest = "", cell.replace("$-$", "−").replace("--", "–")
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


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A comparison of the whole registry: all symbols of hyperparameters."""
    test = {spec: [calibrated(TEST, 1.5, 0)] for spec in LOSSES}
    return summarize(write(tmp_path_factory.mktemp("every") / "out", test))


def test_latex_code_is_ascii(every: dict[str, Any]) -> None:
    symbols = {loss["symbol"] for loss in every["losses"] if loss["symbol"]}
    assert symbols >= set("αβγελρ")
    for text in (tables.latex(every), tables.merged_latex([every, every])):
        code = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
        assert code.isascii()


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_compiles(awkward: dict[str, Any], every: dict[str, Any], tmp_path: Path) -> None:
    several = (tables.latex(awkward), tables.latex(every), tables.merged_latex([awkward, every]))
    body = "\n\n".join(several)
    start = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\n"
    (tmp_path / "a.tex").write_text(f"{start}{body}\\end{{document}}\n", encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "a.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


# ---- several comparisons ---------------------------------------------------------------------


@pytest.fixture
def several(results: dict[str, Any], awkward: dict[str, Any]) -> list[dict[str, Any]]:
    return [results, awkward]


def expected_merged(results: dict[str, Any], selection: str) -> list[list[str]]:
    lines = []
    for loss in results["losses"]:
        at = results["summary"][selection]
        values = [
            interval(metric, at[scaling][metric][loss["spec"]])
            for metric, scaling in (
                ("accuracy", "link"),
                ("nll", "link"),
                ("nll", "scaled"),
                ("brier", "scaled"),
            )
        ]
        lines.append([loss["label"], *values])
    return lines


def test_titles_of_comparisons_are_unique(results: dict[str, Any]) -> None:
    assert tables.titles([results]) == ["made-up, 480 training rows, 4 seeds"]
    assert tables.titles([results, results]) == [
        "made-up, 480 training rows, 4 seeds (1)",
        "made-up, 480 training rows, 4 seeds (2)",
    ]
    noisy = results | {"config": results["config"] | {"label_noise": 0.1, "model": "vit"}}
    assert tables.titles([noisy]) == ["made-up, 480 training rows, 10 % label noise, vit, 4 seeds"]


@pytest.mark.parametrize("selection", ["refined", LAST])
def test_merged(several: list[dict[str, Any]], selection: str) -> None:
    lines = [line for results in several for line in expected_merged(results, selection)]
    blocks = tables.merged(several, selection)
    assert lines == [
        [line.label, *(cell.value for cell in line.cells)] for b in blocks for line in b.lines
    ]
    text = printed(*tables.merged_terminal(several, selection), width=80)
    for line in lines:
        assert all(f"{value}" in text for value in line[1:])
    title, *rows = markdown_rows(tables.merged_markdown(several, selection))
    assert title == ["Data", "Loss", *tables.merged_header()]
    assert [[cell.removesuffix(" ★") for cell in row[1:]] for row in rows] == lines
    assert rows[0][0] == "made-up, 480 training rows, 4 seeds"


def test_merged_latex(several: list[dict[str, Any]]) -> None:
    code = [line for line in tables.merged_latex(several).splitlines() if line[0] != "%"]
    assert code[0] == "\\begin{tabular}{lrrrr}"
    header, *body = [cells(line) for line in code if re.search(r"(?<!\\)&", line)]
    assert [plain(cell) for cell in header] == ["Loss", *tables.merged_header()]
    assert [[plain(cell) for cell in line] for line in body] == [
        line
        for selection in ("refined", "nll", LAST)
        for results in several
        for line in expected_merged(results, selection)
    ]
    found = [re.match(r"\\multicolumn\{5\}\{l\}\{(.*)\} ", line) for line in code]
    titles = [match[1] for match in found if match]
    assert len(titles) == 6
    assert plain(titles[1]).startswith("50%_off \\input{x}, 480 training rows")


def test_tidy_and_ranking(results: dict[str, Any]) -> None:
    """Of the losses in common, from the best rank."""
    other = copy.deepcopy(results)
    other["data"]["name"] = "other"
    del other["losses"][2]
    frame = tables.tidy([results, other], "nll")
    assert set(frame["loss"]) == {loss["label"] for loss in other["losses"]}
    assert list(frame["block"].unique()) == ["made-up", "other"]
    cells = results["summary"]["refined"]["scaled"]["nll"]
    assert frame["value"][0] == cells["cross-entropy"]["mean"]
    shown = tables.ranking("NLL", leaderboard(frame, higher_is_better=False), "<svg/>")
    order = sorted(other["losses"], key=lambda loss: cells[loss["spec"]]["mean"])
    assert [line[0] for line in shown.lines] == [loss["label"] for loss in order]
    assert [line[1] for line in shown.lines] == ["1.00", "2.00", "3.00", "4.00"]
    assert shown.lines[0][2:4] == ["100", "100 [100, 100]"]
    reference = next(line for line in shown.lines if line[0] == "Cross-entropy")
    assert reference[3:] == ["–", "–"]
    assert len(shown.header) == 5
    assert shown.summary.startswith("2 comparisons of 2 data sets; Friedman test p = ")


def test_radius_names() -> None:
    names = [tables.radius_name(radius) for radius in (0, 1 / 255, 8 / 255, 0.25, 0.5, 1.5)]
    assert names == ["0", "1/255", "8/255", "0.25", "0.5", "1.5"]
