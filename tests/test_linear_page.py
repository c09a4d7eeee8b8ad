"""The page on very many classes is what the committed results say, losing rows included."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import linear_page as page
from benchmarks.harness import RESULTS, Results
from benchmarks.linear import COMPILED, CURVES, HEAD, LOGITS, PLAIN, REFERENCE, SHAPES, LinearRow

ROOT = Path(__file__).parent.parent


def test_page_is_made_from_the_results() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.fill(text) == text


def test_picture_is_that_of_the_results(tmp_path: Path) -> None:
    page.draw(page.read("cpu"), tmp_path / "new.svg")
    assert (tmp_path / "new.svg").read_text() == page.PICTURE.read_text()


@pytest.mark.parametrize("slug", page.slugs())
def test_results_are_whole_runs(slug: str) -> None:
    results = page.read(slug)
    assert not results.quick
    shapes = {part: {row.shape for row in results.rows if row.part == part} for part in CURVES}
    assert shapes == {part: set(curve) for part, curve in CURVES.items()}
    heads = {(row.shape, row.head) for row in results.rows if row.part == "table"}
    skipped = {part.what for part in results.skipped}
    for shape in SHAPES:
        for head in {REFERENCE, HEAD, LOGITS, PLAIN, COMPILED} - skipped:
            assert (shape, head) in heads


def test_losing_rows_are_marked(tmp_path: Path) -> None:
    """With another's time made smaller than ours, and a missed target, the page says so."""
    folder = tmp_path / "results"
    shutil.copytree(RESULTS, folder)
    results = page.read("cpu", folder)
    changed = {
        HEAD: {"ratio": 7.77, "extra": results.rows[0].extra * 2},
        LOGITS: {"ratio": 6.66},
    }
    rows = [
        row.model_copy(update=changed.get(row.head, {}))
        if (row.part, row.shape) == ("table", SHAPES[0])
        else row
        for row in results.rows
    ]
    results.model_copy(update={"rows": rows}).save(folder)
    text = page.fill(page.PAGE.read_text(encoding="utf-8"), folder)
    lines = [line for line in text.splitlines() if line.startswith("| 4096 × 256 × 32768")]
    assert any(page.LABELS[LOGITS] in line and "**6.66**" in line for line in lines)
    assert any("| 7.77 |" in line for line in lines)
    assert any("**7.77**" in line and line.endswith("| **no** |") for line in lines)


def test_a_run_measures_every_head(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.linear", "--quick", "--out", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    results = Results[LinearRow].model_validate_json((tmp_path / "linear-cpu.json").read_text())
    assert results.quick
    measured = {REFERENCE, HEAD, LOGITS, PLAIN} - {part.what for part in results.skipped}
    assert {row.head for row in results.rows} == measured
    rows = {row.head: row for row in results.rows}
    for row in rows.values():
        assert row.ratio == row.timing.median / rows[REFERENCE].timing.median
        assert row.gradients == 4 * 8 * (40 + 300)
    logits = 4 * 40 * 300
    assert rows[REFERENCE].extra > 2 * logits
    assert re.fullmatch(r"\d+ MB|[\d.]+ [MG]B", page.size(rows[REFERENCE].extra))
