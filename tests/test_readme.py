"""The README's tables are what the committed results say, and name every loss they should."""

import importlib
import importlib.util
import json
from pathlib import Path

import pytest

from penex.compare.registry import DEFAULT_LOSSES

ROOT = Path(__file__).parent.parent


def _make_results():
    spec = importlib.util.spec_from_file_location("make_results", ROOT / "docs/make_results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["digits", "digits-noisy"])
def test_table_is_that_of_the_results_file(name: str) -> None:
    make_results = _make_results()
    table = make_results.readme_table(ROOT / "docs" / "results" / f"{name}.json")
    assert f"<!-- table: {name} -->\n\n{table}\n\n<!-- end -->" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", ["digits", "digits-noisy"])
def test_results_are_a_whole_comparison(name: str) -> None:
    results = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())
    assert [loss["spec"] for loss in results["losses"]] == list(DEFAULT_LOSSES)
    assert len(results["runs"]) == results["planned_runs"] == 25


@pytest.mark.parametrize("name", ["digits", "digits-noisy"])
def test_table_of_when_not_is_that_of_the_results_file(name: str) -> None:
    table = _make_results().penex_table(ROOT / "docs" / "results" / f"{name}.json")
    page = (ROOT / "docs" / "when-not.md").read_text()
    assert f"<!-- table: {name} -->\n\n{table}\n\n<!-- end -->" in page


LOG_NAMES = ("digits", "digits-noisy", "letter", "letter-noisy", "fashion", "fashion-noisy")


@pytest.mark.parametrize("name", LOG_NAMES)
def test_table_of_log_penex_is_that_of_the_results_file(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    table = importlib.import_module("make_log_results").table(
        ROOT / "docs" / "results" / "log-penex" / f"{name}.json"
    )
    page = (ROOT / "docs" / "log-penex.md").read_text()
    assert f"<!-- table: {name} -->\n\n{table}\n\n<!-- end -->" in page
