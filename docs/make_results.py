"""Write docs/results, and the tables and the picture made from them, for comparisons that were run.

Called by `make results`, which runs the comparisons first.
"""

import json
import re
import shutil
import sys
from itertools import product
from pathlib import Path
from typing import Any

from penex.compare.analysis import plots, tables, verdict
from penex.compare.registry import REFERENCE
from penex.compare.training.selection import SELECTIONS
from penex.metrics import METRICS

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"
WHEN_NOT = DOCS / "when-not.md"
NAMES = ("digits", "digits-noisy")
CHOOSING = DOCS / "choosing.md"
DECAY = {"weight-decay": "divided by α", "weight-decay-own": "as defined"}
SHOWN = ("refined", "nll", "last")
"""Selections of the table in when-not.md."""


def readme_table(results: dict[str, Any]) -> str:
    """The recommendation and the table at the selected epoch, as they stand in the README."""
    selected = results["config"]["select"]
    title = SELECTIONS[selected]
    return (
        f"> {verdict.recommendation(results)}\n\n{title}:\n\n{tables.markdown(results, selected)}"
    )


def penex_table(results: dict[str, Any]) -> str:
    """PENEX beside cross-entropy and the best loss, by selection and metric; worse is bold."""
    labels = {loss["spec"]: loss["label"] for loss in results["losses"]}
    lines = [
        "| Epoch | Metric | Cross-entropy | PENEX | Difference | Best |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    columns = [
        (title, *column)
        for title, column in zip(tables.header(), tables.COLUMNS, strict=True)
        if column[0] in METRICS
    ]
    for selection, (title, name, scaling) in product(SHOWN, columns):
        values = results["summary"][selection][scaling][name]
        cells = {spec: tables.cell(name, value) for spec, value in values.items()}
        up = METRICS[name].higher_is_better
        change, difference = cells["penex"].difference, values["penex"]["difference"]["mean"]
        if (difference < 0) == up:
            change = f"**{change}**"
        if cells["penex"].sign:
            change += "\N{NO-BREAK SPACE}✓"
        best = (max if up else min)(values, key=lambda spec: values[spec]["mean"])
        named = labels[best] if best == "penex" else f"{labels[best]}, {cells[best].value}"
        row = selection, title, cells[REFERENCE].value, cells["penex"].value, change, named
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def decay_table(several: dict[str, dict[str, Any]]) -> str:
    """Accuracy at the last epoch with weight decay, by the scale of the gradient."""
    lines = ["| Loss | Gradient | Accuracy % |", "| --- | --- | ---: |"]
    for name, results in several.items():
        for loss in results["losses"]:
            value = results["summary"]["last"]["link"]["accuracy"][loss["spec"]]
            scale = "–" if loss["spec"] == REFERENCE else DECAY[name]
            line = f"| {loss['label']} | {scale} | {tables.cell('accuracy', value).value} |"
            if line not in lines:  # cross-entropy is the same in both
                lines.append(line)
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
        results = json.loads(saved.read_text(encoding="utf-8"))
        insert(README, name, readme_table(results))
        insert(WHEN_NOT, name, penex_table(results))
    several = {}
    for name in DECAY:
        results = json.loads((folder / name / "results.json").read_text(encoding="utf-8"))
        del results["runs"]  # most of the file, and nothing that the page shows
        text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
        (DOCS / "results" / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        several[name] = results
    insert(CHOOSING, "weight-decay", decay_table(several))
    plots.overview(plots.read(folder / "digits-noisy"), DOCS / "images" / "overview.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
