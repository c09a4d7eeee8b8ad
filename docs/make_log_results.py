"""Writes docs/results/log-penex and the tables of docs/log-penex.md, from comparisons made before.

Called by `make log-results`, which runs the comparisons first.
"""

import json
import sys
from pathlib import Path

from make_results import DOCS, insert

from penex.compare import tables

PAGE = DOCS / "log-penex.md"
RESULTS = DOCS / "results" / "log-penex"
NAMES = ("digits", "digits-noisy", "letter", "letter-noisy", "fashion", "fashion-noisy")
COLUMNS = (
    ("best", "raw", "accuracy"),
    ("best", "raw", "nll"),
    ("best", "scaled", "nll"),
    ("last", "raw", "accuracy"),
    ("last", "raw", "nll"),
)


def table(results: Path) -> str:
    """A row for each loss; what is clear of chance, and better than cross-entropy, is bold."""
    content = json.loads(results.read_text(encoding="utf-8"))
    lines = [
        "| Loss | Accuracy % ↑ | NLL ↓ | NLL (T) ↓ | last: % ↑ | last: NLL ↓ |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for loss in content["losses"]:
        row = [loss["label"]]
        for epoch, scaling, metric in COLUMNS:
            cell = tables.cell(metric, content["summary"][epoch][scaling][metric][loss["spec"]])
            row.append(f"**{cell.value}**" if cell.sign > 0 else cell.value)
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def main(folder: Path) -> None:
    RESULTS.mkdir(exist_ok=True)
    for name in NAMES:
        content = json.loads((folder / name / "results.json").read_text(encoding="utf-8"))
        del content["runs"]  # most of the file, and nothing that the page shows
        saved = RESULTS / f"{name}.json"
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        saved.write_text(text + "\n", encoding="utf-8")
        insert(PAGE, name, table(saved))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
