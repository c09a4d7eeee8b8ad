"""Writes docs/results, the tables and the picture made of them, from comparisons that were run.

Called by `make results`, which runs the comparisons first.
"""

import json
import re
import shutil
import sys
from itertools import product
from pathlib import Path

from penex.compare import plots, tables
from penex.compare.analysis import EPOCHS
from penex.compare.registry import REFERENCE
from penex.metrics import METRICS

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"
WHEN_NOT = DOCS / "when-not.md"
NAMES = ("digits", "digits-noisy")


def readme_table(results: Path) -> str:
    """Both tables of a results.json, as they stand in the README."""
    content = json.loads(results.read_text(encoding="utf-8"))
    parts = [f"{title}:\n\n{tables.markdown(content, epoch)}" for epoch, title in EPOCHS.items()]
    return "\n\n".join(parts)


def penex_table(results: Path) -> str:
    """PENEX beside cross-entropy and the best loss, by epoch and metric; worse is bold."""
    content = json.loads(results.read_text(encoding="utf-8"))
    labels = {loss["spec"]: loss["label"] for loss in content["losses"]}
    lines = [
        "| Epoch | Metric | Cross-entropy | PENEX | Less | Best |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    columns = zip(tables.header(), tables.COLUMNS, strict=True)
    for epoch, (title, (name, scaling)) in product(EPOCHS, columns):
        values = content["summary"][epoch][scaling][name]
        cells = {spec: tables.cell(name, value) for spec, value in values.items()}
        up = METRICS[name].higher_is_better
        less, difference = cells["penex"].difference, values["penex"]["difference"]["mean"]
        if (difference < 0) == up:
            less = f"**{less}**"
        if cells["penex"].sign:
            less += "\N{NO-BREAK SPACE}★"
        best = (max if up else min)(values, key=lambda spec: values[spec]["mean"])
        named = labels[best] if best == "penex" else f"{labels[best]}, {cells[best].value}"
        row = epoch, title, cells[REFERENCE].value, cells["penex"].value, less, named
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def insert(file: Path, name: str, table: str) -> None:
    """Put `table` between the marks in `file` that carry `name`."""
    marked = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    text = file.read_text(encoding="utf-8")
    text, count = marked.subn(lambda match: f"{match[1]}\n{table}\n\n{match[2]}", text)
    if count != 1:
        sys.exit(f"{file.name}: expected one place for the table {name}, found {count}")
    file.write_text(text, encoding="utf-8")


def main(folder: Path) -> None:
    for name in NAMES:
        saved = DOCS / "results" / f"{name}.json"
        shutil.copyfile(folder / name / "results.json", saved)
        insert(README, name, readme_table(saved))
        insert(WHEN_NOT, name, penex_table(saved))
    plots.overview(folder / "digits-noisy", DOCS / "images" / "overview.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
