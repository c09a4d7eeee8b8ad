"""Error messages name settings both as in files and Python and as on the command line."""

import ast
from pathlib import Path

import pytest

import penex.compare
from penex.compare.config import Config
from penex.compare.errors import IN_FILES_ONLY, named

SOURCES = sorted(Path(penex.compare.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("epochs", "epochs"),
        ("train_size", "train_size (--train-size)"),
        ("lr_of", "lr_of"),
    ],
)
def test_a_setting_is_named_both_ways_if_they_differ(setting: str, expected: str) -> None:
    assert named(setting) == expected


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_message_names_a_setting_without_its_option(path: Path) -> None:
    """In the literal text of errors; what `named` makes is not part of it."""
    settings = {name for name in Config.model_fields if "_" in name} - set(IN_FILES_ONLY)
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or getattr(node.func, "id", "") not in (
            "CompareError",
            "ValueError",
        ):
            continue
        inside = {id(n) for each in ast.walk(node) if isinstance(each, ast.FormattedValue)
                  for n in ast.walk(each)}  # fmt: skip
        found += [
            (name, text.value)
            for text in ast.walk(node)
            if isinstance(text, ast.Constant) and isinstance(text.value, str)
            and id(text) not in inside
            for name in settings
            if name in text.value
        ]  # fmt: skip
    assert found == []
