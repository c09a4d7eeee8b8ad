"""Write docs/results/log-penex and the tables of docs/log-penex.md, for comparisons that were run.

Called by `make log-results`, which runs the comparisons first.
"""

import json
import sys
from pathlib import Path
from typing import Any

from make_results import DOCS, insert

from penex.compare.analysis import tables, verdict

PAGE = DOCS / "log-penex.md"
RESULTS = DOCS / "results" / "log-penex"
NAMES = ("digits", "digits-noisy", "letter", "letter-noisy", "fashion", "fashion-noisy")
COLUMNS = (
    ("refined", "link", "accuracy"),
    ("refined", "scaled", "nll"),
    ("refined", "link", "nll"),
    ("refined", "scaled", "smooth_ece"),
    ("last", "link", "nll"),
)


def table(results: dict[str, Any]) -> str:
    """The recommendation, and a row for each loss; better than cross-entropy is bold."""
    lines = [
        f"> {verdict.recommendation(results)}",
        "",
        "| Loss | Accuracy % ↑ | NLL (T) ↓ | NLL ↓ | Smooth ECE (T) ↓ | last epoch: NLL ↓ |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for loss in results["losses"]:
        facts = f"{verdict.settings(loss)}, {tables.span(loss['epochs']['refined'])}"
        row = [f"{loss['label']}<br>{facts}"]
        for epoch, scaling, metric in COLUMNS:
            cell = tables.cell(metric, results["summary"][epoch][scaling][metric][loss["spec"]])
            star = " ★" if cell.best else ""
            row.append(f"**{cell.value}**{star}" if cell.sign > 0 else cell.value)
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def main(folder: Path) -> None:
    RESULTS.mkdir(exist_ok=True)
    for name in NAMES:
        content = json.loads((folder / name / "results.json").read_text(encoding="utf-8"))
        saved = RESULTS / f"{name}.json"
        insert(PAGE, name, table(content))
        del content["runs"]  # most of the file, and nothing that the page shows
        for setting in ("data", "data_dir"):  # a path is of the machine that ran it
            content["config"][setting] = Path(content["config"][setting] or "").name
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        saved.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
