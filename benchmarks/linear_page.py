"""Writes the tables and the picture of docs/linear-penex.md from benchmarks/results/linear-*."""

import sys
from pathlib import Path

import matplotlib.style
from matplotlib.figure import Figure

from benchmarks.harness import RESULTS, Results
from benchmarks.linear import (
    APPLE,
    COMPILED,
    CURVES,
    HEAD,
    LIGER,
    LOGITS,
    PLAIN,
    REFERENCE,
    LinearRow,
)
from benchmarks.page import DOCS, about, against, between_marks, duration, shape_name, table
from penex.compare.analysis.plots import COLOURS, STYLE

PAGE = DOCS / "linear-penex.md"
PICTURE = DOCS / "images" / "linear-penex.svg"
TIME_TARGET, MEMORY_TARGET = 0.8, 0.1
"""At most so many times cross-entropy's time, and its memory beyond the gradients, on the CPU."""
LABELS = {
    REFERENCE: "Cross-entropy",
    COMPILED: "Cross-entropy, compiled",
    LOGITS: "PENEX of the logits",
    HEAD: "PENEX without logits",
    PLAIN: "PENEX without logits, oneDNN off",
    LIGER: "Liger's cross-entropy",
    APPLE: "Apple's cut cross-entropy",
}


def read(slug: str, folder: Path = RESULTS) -> Results[LinearRow]:
    path = folder / f"linear-{slug}.json"
    return Results[LinearRow].model_validate_json(path.read_text(encoding="utf-8"))


def slugs(folder: Path = RESULTS) -> list[str]:
    """The devices that there are results of, the CPU first."""
    found = {path.stem.removeprefix("linear-") for path in folder.glob("linear-*.json")}
    return sorted(found, key=lambda slug: (slug != "cpu", slug))


def size(number: int) -> str:
    """Bytes, for people."""
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.3g} MB"


def _groups(results: Results[LinearRow], part: str) -> list[dict[str, LinearRow]]:
    """Rows of one shape and dtype, by head."""
    found: dict[tuple[object, ...], dict[str, LinearRow]] = {}
    for row in results.rows:
        if row.part == part:
            found.setdefault((row.shape, row.dtype), {})[row.head] = row
    return list(found.values())


def main_table(results: Results[LinearRow]) -> str:
    """Bold where another head is better than PENEX without logits, or a target is missed."""
    lines = []
    for group in _groups(results, "table"):
        ours, reference = group[HEAD], group[REFERENCE]
        for name in (name for name in LABELS if name in group):
            row = group[name]
            time = f"{row.ratio:.2f}"
            faster = row.ratio < ours.ratio
            smaller = row.extra < ours.extra
            lines.append(
                [
                    f"{shape_name(row.shape)}, {row.dtype}",
                    LABELS[name],
                    duration(row.timing),
                    f"**{time}**" if faster else time,
                    f"**{size(row.extra)}**" if smaller else size(row.extra),
                    f"{row.extra / max(reference.extra, 1):.3f}",
                    size(row.gradients),
                ]
            )
    head = ["Rows × size × classes", "Head", "Time", "Ratio", "Memory", "Ratio", "Gradients"]
    return table(head, *lines)


def targets(results: Results[LinearRow]) -> str:
    lines = []
    for group in _groups(results, "table"):
        row, reference = group[HEAD], group[REFERENCE]
        share = row.extra / max(reference.extra, 1)
        holds = row.ratio <= TIME_TARGET and share <= MEMORY_TARGET
        lines.append(
            [
                f"{shape_name(row.shape)}, {row.dtype}",
                against(row.ratio, TIME_TARGET),
                f"{TIME_TARGET:g}",
                f"{share:.3f}" if share <= MEMORY_TARGET else f"**{share:.3f}**",
                f"{MEMORY_TARGET:g}",
                "yes" if holds else "**no**",
            ]
        )
    head = ["Rows × size × classes", "Time", "At most", "Memory", "At most", "Holds"]
    return table(head, *lines)


def parts(results: Results[LinearRow]) -> dict[str, str]:
    notes = [f"Not measured: {LABELS[part.what]}, {part.reason}." for part in results.skipped]
    return {
        "linear machine": about(results.machine),
        "linear targets": targets(results),
        "linear table": "\n\n".join([main_table(results), *notes]),
    }


def elsewhere(folder: Path) -> str:
    texts = []
    for slug in slugs(folder)[1:]:
        results = read(slug, folder)
        texts += [f"### {results.machine.device}", *parts(results).values()]
    return "\n\n".join(texts) or "None is published yet."


def fill(text: str, folder: Path = RESULTS) -> str:
    """`text`, the page with marks, with what the results in `folder` say between them."""
    content = parts(read("cpu", folder)) | {"linear elsewhere": elsewhere(folder)}
    return between_marks(text, content, PAGE)


def draw(results: Results[LinearRow], path: Path) -> None:
    """Time and memory against rows, and against classes."""
    with matplotlib.style.context([*STYLE, {"svg.hashsalt": "linear"}]):
        figure = Figure(figsize=(7.5, 5), layout="constrained")
        axes = figure.subplots(2, 2, sharex="col")
        for column, part in enumerate(CURVES):
            groups = _groups(results, part)
            places = [group[HEAD].shape[0 if part == "rows" else 2] for group in groups]
            for name, colour in zip((REFERENCE, HEAD), COLOURS, strict=False):
                seconds = [group[name].timing.median for group in groups]
                memory = [group[name].extra / 1e6 for group in groups]
                for row, values in enumerate((seconds, memory)):
                    label = LABELS[name] if (row, column) == (0, 0) else None
                    axes[row, column].plot(places, values, "o-", c=colour, ms=4, label=label)
            axes[1, column].set_xlabel(part.capitalize())
            for row in range(2):
                axes[row, column].set_ylim(0)
                axes[row, column].set_xlim(0)
        axes[0, 0].set_ylabel("Seconds")
        axes[1, 0].set_ylabel("Memory beyond the gradients, MB")
        figure.legend(loc="outside upper center", ncols=2)
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    if any(read(slug).quick for slug in slugs()):
        sys.exit("a trial run (--quick) is not published")
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    draw(read("cpu"), PICTURE)


if __name__ == "__main__":
    main()
