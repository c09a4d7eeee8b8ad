"""Files are written whole, and read only if they are what they should be."""

import threading
from pathlib import Path

import disk
import pytest

from penex.compare import files
from penex.compare.errors import CompareError


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_text_is_the_old_one_until_it_is_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "text"
    texts = ["a" * 300_000, "b" * 500_000]
    files.write_text(path, texts[0])
    done = threading.Event()

    def rewrite() -> None:
        for number in range(60):
            files.write_text(path, texts[number % 2])
        done.set()

    writer = threading.Thread(target=rewrite)
    writer.start()
    seen = []
    while not done.is_set():
        seen.append(texts.index(path.read_text()))
    writer.join()
    assert set(seen) == {0, 1}
    assert names(tmp_path) == {"text"}


def test_a_text_without_room_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "text"
    files.write_text(path, "old")
    with disk.full(1000), pytest.raises(OSError, match="too large"):
        files.write_text(path, "n" * 1001)
    assert path.read_text() == "old"
    assert names(tmp_path) == {"text"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_has_no_such_numbers(tmp_path: Path, value: float) -> None:
    path = tmp_path / "values.json"
    files.write_json(path, {"ok": 0.1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"deep": [1.0, value]})
    assert files.read_json(path) == {"ok": 0.1}
    assert names(tmp_path) == {"values.json"}


def test_json_comes_back(tmp_path: Path) -> None:
    value = {"ε±": [0.1, 1e-300, None, True, 10**30, "\u2028\n"]}
    files.write_json(tmp_path / "v", value)
    assert files.read_json(tmp_path / "v") == value


@pytest.mark.parametrize("content", [b"", b'{"config": {', b"\xff\xfe", b'{"a": 1}}'])
def test_damaged_json_is_named_with_the_way_out(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "seed-0" / "run.json"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(CompareError) as refusal:
        files.read_json(path)
    # To remove run.json alone would leave a folder that is taken for a finished run.
    assert str(refusal.value).startswith(f"{path} is damaged (")
    assert f"remove {path.parent} and run the comparison again" in str(refusal.value)
