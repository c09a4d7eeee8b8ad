"""Writes docs/results, the README's tables and its picture from comparisons that were run.

Called by `make results`, which runs the comparisons first.
"""

import json
import re
import shutil
import sys
from pathlib import Path

from penex.compare import plots, tables
from penex.compare.analysis import EPOCHS

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"
NAMES = ("digits", "digits-noisy")


def readme_table(results: Path) -> str:
    """Both tables of a results.json, as they stand in the README."""
    content = json.loads(results.read_text(encoding="utf-8"))
    parts = [f"{title}:\n\n{tables.markdown(content, epoch)}" for epoch, title in EPOCHS.items()]
    return "\n\n".join(parts)


def insert(text: str, name: str, table: str) -> str:
    """`text` with `table` between the marks that carry `name`."""
    marked = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    text, count = marked.subn(lambda match: f"{match[1]}\n{table}\n\n{match[2]}", text)
    if count != 1:
        sys.exit(f"README.md: expected one place for the table {name}, found {count}")
    return text


def main(folder: Path) -> None:
    text = README.read_text(encoding="utf-8")
    for name in NAMES:
        saved = DOCS / "results" / f"{name}.json"
        shutil.copyfile(folder / name / "results.json", saved)
        text = insert(text, name, readme_table(saved))
    README.write_text(text, encoding="utf-8")
    plots.overview(folder / "digits-noisy", DOCS / "images" / "overview.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
