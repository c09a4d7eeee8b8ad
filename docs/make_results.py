"""Write docs/results, and the tables and the picture made from them, for comparisons that were run.

Called by `make results`, which runs the comparisons first.
"""

import json
import re
import shutil
import sys
import textwrap
from itertools import product
from pathlib import Path
from typing import Any

from penex.compare.analysis import plots, tables, verdict
from penex.compare.registry import REFERENCE
from penex.compare.training.selection import SELECTIONS
from penex.metrics import METRICS

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"
DIGITS = DOCS / "digits.md"
LINEAR = DOCS.parent / "benchmarks" / "results" / "linear-cpu.json"
HEAD_SHAPE = [8192, 768, 50257]
"""Rows, hidden size and classes of the linear head in README.md."""
WHEN_NOT = DOCS / "when-not.md"
NAMES = ("digits", "digits-noisy")
CHOOSING = DOCS / "choosing.md"
DECAY = {"weight-decay": "divided by α", "weight-decay-own": "as defined"}
SHOWN = ("refined", "nll", "last")
"""Selections of the table in when-not.md."""


def digits_table(results: dict[str, Any]) -> str:
    """The recommendation and the table at the selected epoch, for digits.md."""
    selected = results["config"]["select"]
    title = SELECTIONS[selected]
    return (
        f"> {verdict.recommendation(results)}\n\n{title}:\n\n{tables.markdown(results, selected)}"
    )


def readme_verdict(results: dict[str, Any]) -> str:
    """What `print(result.recommendation)` prints, as a quotation."""
    return f"> {verdict.recommendation(results)}"


def readme_summary(clean: dict[str, Any], noisy: dict[str, Any]) -> str:
    """Accuracy and NLL of both comparisons, one row for each loss."""
    lines = [
        "| Loss | Accuracy % ↑ | NLL (T) ↓ | noisy: Accuracy % ↑ | noisy: NLL (T) ↓ |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for loss in clean["losses"]:
        cells = [
            tables.cell(name, results["summary"]["refined"][scaling][name][loss["spec"]]).value
            for results in (clean, noisy)
            for name, scaling in (("accuracy", "link"), ("nll", "scaled"))
        ]
        lines.append(f"| {' | '.join([loss['label'], *cells])} |")
    return "\n".join(lines)


def readme_head(benchmark: dict[str, Any]) -> str:
    """Time and memory of the linear head beside every baseline that was measured."""
    rows = {
        row["head"]: f"{_memory(row['extra'])} and {row['timing']['median']:.1f} s"
        for row in benchmark["rows"]
        if (row["shape"], row["part"]) == (HEAD_SHAPE, "table")
    }
    ours = rows.pop("penex without logits")
    baselines = [
        f"{rows[head]} for {' '.join(reversed(head.split(', ')))}"
        for head in rows
        if not head.startswith("penex")
    ]
    shape, machine = " × ".join(map(str, HEAD_SHAPE)), benchmark["machine"]
    sentence = (
        f"For {shape} (rows × hidden size × classes) it needs {ours}, compared with "
        f"{' and '.join(baselines)}: forward and backward pass in float32 on {machine['cores']} "
        f"CPU cores ({machine['processor']}, torch {machine['torch'].partition('+')[0]}). Memory "
        "is the peak beyond inputs, weight and gradients."
    )
    return textwrap.fill(sentence, 100, break_on_hyphens=False)


def _memory(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


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


def write_readme(digits: dict[str, dict[str, Any]]) -> None:
    insert(README, "verdict", readme_verdict(digits["digits"]))
    insert(README, "summary", readme_summary(digits["digits"], digits["digits-noisy"]))
    insert(README, "head", readme_head(json.loads(LINEAR.read_text(encoding="utf-8"))))


def main(folder: Path) -> None:
    digits = {}
    for name in NAMES:
        saved = DOCS / "results" / f"{name}.json"
        shutil.copyfile(folder / name / "results.json", saved)
        digits[name] = json.loads(saved.read_text(encoding="utf-8"))
        insert(DIGITS, name, digits_table(digits[name]))
        insert(WHEN_NOT, name, penex_table(digits[name]))
    write_readme(digits)
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
