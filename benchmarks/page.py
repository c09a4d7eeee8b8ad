"""Writes the tables and the picture of docs/performance.md from the files in benchmarks/results."""

import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from benchmarks.harness import RESULTS, Machine, Results, Timing
from benchmarks.loss import MODES, REFERENCE, LossRow
from benchmarks.memory import MemoryRow
from benchmarks.step import StepRow
from penex.compare.analysis.plots import COLOURS, STYLE

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "performance.md"
PICTURE = DOCS / "images" / "performance.svg"

TARGETS = {
    (64, 10): 2.0,
    (128, 100): 1.8,
    (1024, 1000): 0.5,
    (4096, 1000): 0.4,
    (1024, 32000): 0.45,
    (4, 21, 128, 128): 0.5,
}
"""At most so many times cross-entropy, for forward and backward on the CPU."""
PASSES_TARGET = {(4096, 1000): 4.0}
"""At most so many passes, for the same."""
STEP_TARGET = 1.02
OPTIONS = {
    "plain": "none",
    "weight": "`weight`",
    "ignored": "a tenth of the rows ignored",
    "smoothing": "`label_smoothing`",
    "bfloat16": "bfloat16",
}
PENEX = "penex running"
"""The default mode."""
PLAIN_LOSSES = (
    *(REFERENCE, PENEX, "log-penex", "naive", "cross-entropy by rows", "z-loss"),
    *("generalised cross-entropy", "focal", "confidence penalty"),
)
PLOTTED = dict(zip(("focal", PENEX, "naive", "confidence penalty"), COLOURS[1:], strict=True))
LABELS = {
    REFERENCE: "Cross-entropy",
    PENEX: "PENEX",
    "log-penex": "log-PENEX",
    "naive": "PENEX as published",
    "cross-entropy by rows": "Cross-entropy of this package",
    "z-loss": "z-loss",
    "generalised cross-entropy": "Generalised cross-entropy",
    "focal": "Focal",
    "confidence penalty": "Confidence penalty",
}


class Device(NamedTuple):
    """All that was measured on one device."""

    loss: Results[LossRow]
    memory: Results[MemoryRow]
    step: Results[StepRow]


def read(slug: str, folder: Path = RESULTS) -> Device:
    def text(name: str) -> str:
        return (folder / f"{name}-{slug}.json").read_text(encoding="utf-8")

    return Device(
        Results[LossRow].model_validate_json(text("loss")),
        Results[MemoryRow].model_validate_json(text("memory")),
        Results[StepRow].model_validate_json(text("step")),
    )


def slugs(folder: Path = RESULTS) -> list[str]:
    """The devices that there are results of, the CPU first."""
    found = {path.stem.removeprefix("loss-") for path in folder.glob("loss-*.json")}
    return sorted(found, key=lambda slug: (slug != "cpu", slug))


# The pieces of a table.


def shape_name(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def _three(number: float) -> str:
    """Three digits, and never an exponent."""
    return f"{number:.0f}" if number >= 1000 else f"{number:.3g}"


def duration(timing: Timing) -> str:
    """Median and quartiles."""
    scale, unit = (1e6, "µs") if timing.median < 1e-3 else (1e3, "ms")
    median, q1, q3 = (_three(scale * t) for t in (timing.median, timing.q1, timing.q3))
    return f"{median} {unit} ({q1} to {q3})"


def against(value: float, reference: float = 1.0) -> str:
    """A number that should not exceed the reference, in bold where it does."""
    return f"**{value:.2f}**" if value > reference else f"{value:.2f}"


def table(head: Iterable[str], *rows: Iterable[str]) -> str:
    head = list(head)
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# The tables.


def about(machine: Machine) -> str:
    place = f"{machine.processor}, {machine.cores} cores"
    if machine.kind == "cuda":
        place = f"{machine.device} ({place})"
    return (
        f"{place}, {machine.threads} threads, {machine.system}, Python {machine.python}, "
        f"torch {machine.torch}, penex {machine.penex}."
    )


def _ratio(row: LossRow) -> float:
    assert row.ratio is not None
    return row.ratio


def _find(results: Results[LossRow], **wanted: object) -> dict[tuple[int, ...], dict[str, LossRow]]:
    """The rows with these values, by shape and loss."""
    found: dict[tuple[int, ...], dict[str, LossRow]] = {}
    for row in results.rows:
        if all(getattr(row, name) == value for name, value in wanted.items()):
            found.setdefault(row.shape, {})[row.loss] = row
    return found


def main_table(results: Results[LossRow]) -> str:
    """Forward and backward of the default against cross-entropy, and against the targets."""
    head = ["Logits", "Cross-entropy", "PENEX", "Ratio", "Passes", "Passes, new memory"]
    targeted = results.machine.kind == "cpu"
    if targeted:
        head += ["At most", "Holds"]
    lines = []
    found = _find(results, how="eager", option="plain", work="forward+backward")
    for shape, rows in found.items():
        row = rows[PENEX]
        line = [shape_name(shape), duration(rows[REFERENCE].timing), duration(row.timing)]
        most = PASSES_TARGET.get(shape, math.inf) if targeted else math.inf
        line += [against(_ratio(row)), against(row.passes, most), against(row.fresh_passes, most)]
        if targeted:
            holds = _ratio(row) <= TARGETS[shape]
            line += [f"{TARGETS[shape]:g}", "yes" if holds else "**no**"]
        lines.append(line)
    return table(head, *lines)


def situations(results: Results[LossRow]) -> str:
    """Ratios for every option and mode."""
    head = ["Logits", "Option", *(mode.capitalize() for mode in MODES)]
    head += [f"{mode.capitalize()}, forward" for mode in MODES]
    lines = []
    for option, label in OPTIONS.items():
        both = _find(results, how="eager", option=option, work="forward+backward")
        forward = _find(results, how="eager", option=option, work="forward")
        for shape in both:
            ratios = [
                against(_ratio(rows[shape][f"penex {mode}"]))
                for rows in (both, forward)
                for mode in MODES
            ]
            lines.append([shape_name(shape), label, *ratios])
    return table(head, *lines)


def others(results: Results[LossRow]) -> str:
    found = _find(results, how="eager", option="plain", work="forward+backward")
    measured = set.intersection(*map(set, found.values()))
    names = [name for name in PLAIN_LOSSES[1:] if name in measured]
    lines = [
        [shape_name(shape), *(against(_ratio(rows[name])) for name in names)]
        for shape, rows in found.items()
    ]
    return table(["Logits", *(LABELS[name] for name in names)], *lines)


def operations(results: Results[LossRow]) -> str:
    lines = [
        [shape_name(shape), f"`{row.loss}`", duration(row.timing), f"{row.passes:.1f}"]
        for shape, rows in _find(results, how="operation").items()
        for row in rows.values()
    ]
    return table(["Logits", "Operation", "Time", "Passes"], *lines)


def floor(results: Results[LossRow]) -> str:
    names = {
        REFERENCE: LABELS[REFERENCE],
        "nothing": "A backward in Python, with nothing in it",
        "bare": "The same with PENEX's operations on tensors, and nothing else",
        PENEX: LABELS[PENEX],
    }
    lines = [
        [shape_name(shape), label, duration(rows[name].timing), f"{_ratio(rows[name]):.2f}"]
        for shape, rows in _find(results, how="floor").items()
        for name, label in names.items()
    ]
    return table(["Logits", "What", "Time", "Ratio"], *lines) if lines else "Not measured here."


def compiled(results: Results[LossRow]) -> str:
    lines = []
    for shape, rows in _find(results, how="compiled").items():
        times = (duration(rows[name].timing) for name in (REFERENCE, PENEX))
        lines.append([shape_name(shape), *times, against(_ratio(rows[PENEX]))])
    notes = [f"Not measured: {part.what}, {part.reason}." for part in results.skipped]
    tables = [table(["Logits", "Cross-entropy", "PENEX", "Ratio"], *lines)] if lines else []
    return "\n\n".join(tables + notes)


def memory(results: Results[MemoryRow]) -> str:
    """Bold where it is more than with cross-entropy."""
    found: dict[tuple[tuple[int, ...], str], dict[str, float]] = {}
    for row in results.rows:
        found.setdefault((row.shape, row.option), {})[row.loss] = row.extra
    lines = []
    for (shape, option), extra in found.items():
        line = [shape_name(shape), OPTIONS[option], f"{extra[REFERENCE]:.2f}"]
        line += [against(extra[PENEX], extra[REFERENCE])]
        lines.append([*line, f"{extra['naive']:.2f}" if "naive" in extra else ""])
    head = ["Logits", "Option", *(LABELS[name] for name in (REFERENCE, PENEX, "naive"))]
    return table(head, *lines)


def step(results: Results[StepRow]) -> str:
    lines = [
        [LABELS[row.loss], duration(row.timing), against(row.ratio, STEP_TARGET)]
        for row in results.rows
    ]
    return table(["Loss", "Step", "Ratio"], *lines)


def parts(device: Device) -> dict[str, tuple[str, str]]:
    """Every generated part of the page, with a title for where it is one of many."""
    machine = device.loss.machine
    return {
        "machine": ("", about(machine)),
        "main": ("Against cross-entropy", main_table(device.loss)),
        "situations": ("Modes and options", situations(device.loss)),
        "others": ("Other losses", others(device.loss)),
        "operations": ("Single operations", operations(device.loss)),
        "floor": ("Small batches", floor(device.loss)),
        "compiled": ("Compiled", compiled(device.loss)),
        "memory": ("Memory", memory(device.memory)),
        "step": ("Training step", step(device.step)),
    }


def elsewhere(devices: list[Device]) -> str:
    """The same tables of the devices that are not the CPU."""
    texts = []
    for device in devices:
        texts.append(f"### {device.loss.machine.device}")
        for title, text in parts(device).values():
            texts += [f"#### {title}", text] if title else [text]
    return "\n\n".join(texts) or "None is published yet."


def fill(text: str, folder: Path = RESULTS) -> str:
    """`text`, a page with marks, with what the results in `folder` say between them."""
    cpu, *others = (read(slug, folder) for slug in slugs(folder))
    content = {name: part for name, (_, part) in parts(cpu).items()}
    content["elsewhere"] = elsewhere(others)
    return between_marks(text, content, PAGE)


def between_marks(text: str, content: dict[str, str], page: Path) -> str:
    """`text` of `page`, with each part of `content` between the marks that carry its name."""
    for name, part in content.items():
        marked = re.compile(rf"(<!-- result: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = marked.subn(
            lambda match, part=part: f"{match[1]}\n{part}\n\n{match[2]}", text
        )
        if count != 1:
            sys.exit(f"{page.name}: expected one place for {name}, found {count}")
    return text


def draw(results: Results[LossRow], path: Path) -> None:
    """Ratios to cross-entropy by shape, forward and backward; the default's are written out."""
    found = _find(results, how="eager", option="plain", work="forward+backward")
    with matplotlib.style.context([*STYLE, {"svg.hashsalt": "performance"}]):
        figure = Figure(figsize=(7.5, 3.4), layout="constrained")
        axes = figure.subplots()
        places = range(len(found))[::-1]
        for name, colour in PLOTTED.items():
            rows = [shape[name] for shape in found.values()]
            size = 7 if name == PENEX else 5
            axes.plot(
                [_ratio(row) for row in rows], places, "o", c=colour, ms=size, label=LABELS[name]
            )
            if name == PENEX:
                for row, place in zip(rows, places, strict=True):
                    axes.annotate(
                        f"{_ratio(row):.2f}",
                        (_ratio(row), place),
                        (0, 7),
                        textcoords="offset points",
                        ha="center",
                        color=colour,
                    )
        axes.axvline(1, color=COLOURS[0], linewidth=1)
        axes.set_xscale("log")
        axes.set_xticks([0.25, 0.5, 1, 2, 4, 8])
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
        axes.set_yticks(places, [shape_name(shape) for shape in found])
        axes.set_ylim(-0.5, len(found) - 0.3)
        axes.set_xlabel("Time of forward and backward, cross-entropy = 1")
        figure.legend(loc="outside upper center", ncols=len(PLOTTED))
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    for slug in slugs():
        if any(results.quick for results in read(slug)):
            sys.exit(f"the results of {slug} are a trial run (--quick), which is not published")
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    draw(read("cpu").loss, PICTURE)


if __name__ == "__main__":
    main()
