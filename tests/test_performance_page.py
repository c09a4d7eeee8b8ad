"""The page on performance is what the committed results say, losing rows included."""

import re
import shutil
from pathlib import Path

import pytest

from benchmarks import page
from benchmarks.harness import RESULTS
from benchmarks.loss import COMPILED, OPTIONS, SHAPES


def test_page_is_made_from_the_results() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.fill(text) == text


def test_picture_shows_the_ratios_of_the_results() -> None:
    picture = page.PICTURE.read_text(encoding="utf-8")
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", picture)
    rows = page._find(page.read("cpu").loss, how="eager", option="plain", work="forward+backward")
    for shape, losses in rows.items():
        assert page.shape_name(shape) in texts
        assert f"{losses[page.PENEX].ratio:.2f}" in texts


@pytest.mark.parametrize("slug", page.slugs())
def test_results_are_whole_runs(slug: str) -> None:
    device = page.read(slug)
    assert not any(results.quick for results in device)
    eager = {(row.shape, row.option, row.work) for row in device.loss.rows if row.how == "eager"}
    assert len(eager) == len(SHAPES) * len(OPTIONS) * 2
    assert {(row.shape, row.option) for row in device.memory.rows} == {key[:2] for key in eager}
    compiled = {row.shape for row in device.loss.rows if row.how == "compiled"}
    assert compiled == set(COMPILED) or device.loss.skipped


def test_losing_rows_are_marked(tmp_path: Path) -> None:
    """With one PENEX time made ten times larger, the page says that this is slower, and no."""
    folder = tmp_path / "results"
    shutil.copytree(RESULTS, folder)
    cpu = page.read("cpu", folder).loss
    slower = [
        row.model_copy(update={"ratio": 12.34})
        if (row.loss, row.how, row.option, row.work, row.shape)
        == (page.PENEX, "eager", "plain", "forward+backward", (4096, 1000))
        else row
        for row in cpu.rows
    ]
    cpu.model_copy(update={"rows": slower}).save(folder)
    text = page.fill(page.PAGE.read_text(encoding="utf-8"), folder)
    (line,) = (line for line in text.splitlines() if "**12.34**" in line and "0.4 |" in line)
    assert line.startswith("| 4096 × 1000 |")
    assert line.endswith("| 0.4 | **no** |")
    assert text.count("**12.34**") == 3  # also among the options, and among the losses
