"""The README's tables are what the committed results say, and name every loss they should."""

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from penex.compare.registry import DEFAULT_LOSSES

ROOT = Path(__file__).parent.parent


def _make_results():
    spec = importlib.util.spec_from_file_location("make_results", ROOT / "docs/make_results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _results(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())


def test_table_of_weight_decay_is_that_of_the_results_files() -> None:
    make_results = _make_results()
    table = make_results.decay_table({name: _results(name) for name in make_results.DECAY})
    page = (ROOT / "docs" / "choosing.md").read_text()
    assert f"<!-- table: weight-decay -->\n\n{table}\n\n<!-- end -->" in page


@pytest.mark.parametrize("name", ["digits", "digits-noisy"])
def test_table_is_that_of_the_results_file(name: str) -> None:
    make_results = _make_results()
    table = make_results.readme_table(_results(name))
    assert f"<!-- table: {name} -->\n\n{table}\n\n<!-- end -->" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", ["digits", "digits-noisy"])
def test_results_are_a_whole_comparison(name: str) -> None:
    results = _results(name)
    assert [loss["spec"] for loss in results["losses"]] == list(DEFAULT_LOSSES)
    assert len(results["runs"]) == results["planned_runs"] == 25


@pytest.mark.parametrize("name", ["digits", "digits-noisy"])
def test_table_of_when_not_is_that_of_the_results_file(name: str) -> None:
    table = _make_results().penex_table(_results(name))
    page = (ROOT / "docs" / "when-not.md").read_text()
    assert f"<!-- table: {name} -->\n\n{table}\n\n<!-- end -->" in page


LOG_NAMES = ("digits", "digits-noisy", "letter", "letter-noisy", "fashion", "fashion-noisy")


@pytest.mark.parametrize("name", LOG_NAMES)
def test_table_of_log_penex_is_that_of_the_results_file(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    table = importlib.import_module("make_log_results").table(_results(f"log-penex/{name}"))
    page = (ROOT / "docs" / "log-penex.md").read_text()
    assert f"<!-- table: {name} -->\n\n{table}\n\n<!-- end -->" in page
