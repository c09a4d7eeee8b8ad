"""The README: length, links, rendering, code, and numbers that are those of the results files."""

import importlib
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import penex
from penex.compare.registry import DEFAULT_LOSSES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")]
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def _script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _results(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())


def test_table_of_weight_decay_is_that_of_the_results_files() -> None:
    make_results = _script("make_results")
    table = make_results.decay_table({name: _results(name) for name in make_results.DECAY})
    page = (ROOT / "docs" / "choosing.md").read_text()
    assert f"<!-- table: weight-decay -->\n\n{table}\n\n<!-- end -->" in page


@pytest.mark.parametrize("name", ["digits", "digits-noisy"])
def test_table_is_that_of_the_results_file(name: str) -> None:
    table = _script("make_results").digits_table(_results(name))
    page = (ROOT / "docs" / "digits.md").read_text()
    assert f"<!-- table: {name} -->\n\n{table}\n\n<!-- end -->" in page


def test_numbers_of_the_readme_are_those_of_the_results_files() -> None:
    make_results = _script("make_results")
    clean, noisy = _results("digits"), _results("digits-noisy")
    for name, text in {
        "verdict": make_results.readme_verdict(clean),
        "summary": make_results.readme_summary(clean, noisy),
        "head": make_results.readme_head(json.loads(make_results.LINEAR.read_text())),
    }.items():
        assert f"<!-- table: {name} -->\n\n{text}\n\n<!-- end -->" in README


@pytest.mark.parametrize("name", ["digits", "digits-noisy"])
def test_results_are_a_whole_comparison(name: str) -> None:
    results = _results(name)
    assert [loss["spec"] for loss in results["losses"]] == list(DEFAULT_LOSSES)
    assert len(results["runs"]) == results["planned_runs"] == 25


@pytest.mark.parametrize("name", ["digits", "digits-noisy"])
def test_table_of_when_not_is_that_of_the_results_file(name: str) -> None:
    table = _script("make_results").penex_table(_results(name))
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


def test_command_line_page_is_current() -> None:
    """Regenerate it by `make api`."""
    script = _script("make_command_line")
    assert script.PAGE.read_text() == script.text()


def test_readme_has_at_most_900_words() -> None:
    """Everything but code blocks, HTML comments and the addresses of links."""
    text = re.sub(r"<!--.*?-->", "", FENCE.sub("", README), flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    words = re.findall(r"\S*\w\S*", text)
    assert len(words) <= 900


def _links(page: Path) -> Iterator[str]:
    """Relative addresses in links and pictures of a page, code left out."""
    text = re.sub(r"`[^`]*`", "", FENCE.sub("", page.read_text()))
    yield from re.findall(r"\]\((?!https?:|mailto:|/)([^)\s]+)\)", text)


def _anchors(page: Path) -> set[str]:
    """Anchors of headings, as code hosts and MyST make them."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in _links(page):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor and target.parent.name != "api":  # anchors of names come from the docstrings
            assert anchor in _anchors(target), link


def test_package_index_renders_the_readme() -> None:
    markdown = pytest.importorskip("readme_renderer.markdown")
    html = markdown.render(README)
    assert html is not None
    assert html.count("<table>") == README.count("\n| ---") + README.count("\n|---")
    assert 'alt="Left: validation NLL' in html
    assert "$" not in html  # the index shows mathematics in dollars as it is


def test_comparison_in_the_readme_runs() -> None:
    """The block that prints the verdict, made quick by options at the end of the call."""
    (block,) = (code for code in FENCE.findall(README) if "penex.compare_losses" in code)
    quick = "train_size=300, epochs=2, seeds=2, losses=['penex'], jobs=1, quiet=True)"
    code = block.removeprefix("```python").removesuffix("```")
    code = code.replace("train_size=300)", quick)
    assert quick in code
    variables: dict[str, Any] = {"penex": penex}
    exec(code, variables)
    assert variables["probabilities"].shape == (1797, 10)
