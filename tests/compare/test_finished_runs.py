"""What is read of a finished run is checked."""

from pathlib import Path

import numpy as np
import pytest

from penex.compare import finished_runs
from penex.compare.errors import CompareError


def saved_logits(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    np.savez(folder / "logits.npz", test_last=rng.normal(size=(40, 3)), test_target=np.arange(40))
    return folder / "logits.npz"


@pytest.mark.parametrize("position", np.linspace(0, 0.999, 11))
def test_logits_cut_short_or_changed_are_damaged(tmp_path: Path, position: float) -> None:
    path = saved_logits(tmp_path)
    whole = path.read_bytes()
    message = r"logits.npz is damaged .*; remove .* and run the comparison again"
    path.write_bytes(whole[: int(position * len(whole))])
    with pytest.raises(CompareError, match=message):
        finished_runs.read_logits(tmp_path)
    # Of one array: the checksum of the archive finds a single bit.
    index = whole.index(b"NUMPY") + 128 + int(position * 40 * 3 * 8)
    path.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
    with pytest.raises(CompareError, match=message):
        finished_runs.read_logits(tmp_path)


def test_logits_that_are_missing_or_pickled(tmp_path: Path) -> None:
    with pytest.raises(CompareError, match="logits.npz is damaged"):
        finished_runs.read_logits(tmp_path)
    np.savez(tmp_path / "logits.npz", test_last=np.array([{"code": 1}], dtype=object))
    with pytest.raises(CompareError, match="logits.npz is damaged"):
        finished_runs.read_logits(tmp_path)


@pytest.mark.parametrize("text", ["", "epoch,train_nll\n", "epoch,train_nll\n1,0.5\n2\n", "a\nx\n"])
def test_a_damaged_curve(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "seed-0"
    folder.mkdir()
    (folder / "curve.csv").write_text(text)
    with pytest.raises(CompareError, match=r"curve.csv is damaged .*; remove .*seed-0 and run"):
        finished_runs.read_curve(folder)
