"""What every source gives, and the checks that are the same for all of them."""

import lzma
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from penex.compare.data.images import Images
from penex.compare.errors import CompareError
from penex.compare.files import require_regular

# What pandas, pyarrow and numpy raise on a file that is not what its ending says.
UNREADABLE = (
    ValueError,
    OSError,
    EOFError,
    NotImplementedError,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
)


class Texts:
    """Texts to classify, with the methods of :class:`~penex.compare.data.images.Images`."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = list(texts)

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Iterable[int]) -> list[str]:
        """The texts of `rows`, in their order."""
        return [self.texts[row] for row in rows]


ClassType = Literal["str", "int", "float", "bool"]
Features = npt.NDArray[np.float32] | pd.DataFrame | Images | Texts


@dataclass(frozen=True)
class Dataset:
    """Everything that was read, before any split.

    Attributes:
        name: The source's name, or the file's or folder's without its ending.
        features: float32 array of shape (N, ...), all finite; or a DataFrame of N rows whose
            columns are float64 (NaN: missing), dates, or text; or N images; or N texts.
        target: int64 class codes of shape (N,), each in 0..K-1.
        classes: The K class names; code k stands for ``classes[k]``. Sorted (numbers by value),
            unless the source has an order of its own.
        fingerprint: SHA-256 over features, target, classes and parts, in hexadecimal. The same on
            every machine; equal for two sources only if all values read from them are equal. Of
            images too many to decode at once, file sizes stand for the pixels.
        official: Row numbers (int64) of the parts that the data set comes with: "validation" and
            "test", either of which may be missing. All other rows are for training.
        groups: int64 code of the group of each row, of shape (N,), or None: rows of one group must
            stay in one part.
        time: int64 rank of each row in time, of shape (N,), or None: the newest rows are the test.
        left_out: Columns of a table that are no features, with the reason.
        notes: What the user should know of how it was read, a sentence each.
        class_type: What the class names were before they became text.
    """

    name: str
    features: Features
    target: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    fingerprint: str
    official: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    groups: npt.NDArray[np.int64] | None = None
    time: npt.NDArray[np.int64] | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    class_type: ClassType = "str"


@dataclass(frozen=True)
class Content:
    """What a source holds; attributes as those of :class:`Dataset`, still to be checked."""

    features: Features
    target: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    official: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    groups: npt.NDArray[np.int64] | None = None
    time: npt.NDArray[np.int64] | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


PARTS = ("train", "validation", "test")
PART_NAMES = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
}
"""Parts by the names of their folders or files."""


def roles(available: Iterable[str], use: str, source: str) -> dict[str, str]:
    """What each part that a source comes with is used as, the training part first.

    Args:
        available: Names of the parts; those other than :data:`PARTS` are left out, unless there is
            one part alone.
        use: ``Config.parts``.
        source: For messages.

    Raises:
        CompareError: A part that is needed is missing.
    """
    given = list(available)
    known = [part for part in PARTS if part in given]
    if use == "validation-as-test":
        if "train" not in known or "validation" not in known:
            raise CompareError(
                f"parts: {source} should have the parts train and validation for validation-as-"
                f"test; it has {quoted(given)}."
            )
        return {"train": "train", "validation": "test"}
    if use == "test" and "test" not in known:
        raise CompareError(f"parts: {source} has no part test; it has {quoted(given)}.")
    if len(given) == 1:
        return {given[0]: "train"}
    if "train" not in known:
        raise CompareError(f"{source} has no part train; it has {quoted(given)}.")
    if use == "drawn":
        return dict.fromkeys(known, "train")
    return {part: "train" if use == "test" and part == "validation" else part for part in known}


def official_rows(sizes: Iterable[tuple[str, int]]) -> dict[str, npt.NDArray[np.int64]]:
    """Rows of the parts that are not for training, of the roles and sizes of successive rows."""
    rows, start = {}, 0
    for role, size in sizes:
        if role != "train":
            rows[role] = np.arange(start, start + size, dtype=np.int64)
        start += size
    return rows


def encode_labels(labels: pd.Series, source: str) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Class codes and sorted class names; refuses labels that are no classes."""
    blank = labels.isna() | (labels.astype(str).str.strip() == "")
    if blank.any():
        raise CompareError(
            f"{source}: the label is missing in {int(blank.sum())} of {len(labels)} rows (empty, "
            "NA, None, null and the like count as missing). Fill it in or remove the rows."
        )
    kind = pd.api.types.infer_dtype(labels)
    if kind in ("integer", "floating", "decimal", "mixed-integer-float"):
        distinct, codes = np.unique(_whole_if_possible(labels, source), return_inverse=True)
    else:
        distinct, codes = np.unique(labels.astype(str).to_numpy(dtype=str), return_inverse=True)
    return codes.astype(np.int64), tuple(str(value) for value in distinct)


def _whole_if_possible(
    labels: pd.Series, source: str
) -> npt.NDArray[np.signedinteger | np.unsignedinteger | np.floating]:
    """Numeric labels as integers where all are whole; refuses those that look continuous."""
    if labels.dtype.kind in "iu":
        return labels.to_numpy()
    values = labels.to_numpy(dtype=np.float64)
    if not np.isfinite(values).all():
        raise CompareError(f"{source}: labels must be finite; some are infinite.")
    if (values == np.round(values)).all():
        return values.astype(np.int64)
    distinct = len(np.unique(values))
    if distinct > min(20, len(values) // 5):
        raise CompareError(
            f"{source}: expected classes to predict; the target has {distinct} different "
            f"fractional values in {len(values)} rows and looks continuous (a regression). "
            "Choose another target, or bin it into classes first."
        )
    return values


def require_file(path: Path) -> None:
    """Refuse a file that is not there, or no regular file."""
    require_regular(path)
    if not path.is_file():
        raise CompareError(f"no such file: {path} (looked in {path.absolute().parent}).")


def unreadable_file(path: Path, expected: str, error: BaseException) -> CompareError:
    """One line for whatever a reader raised."""
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return CompareError(f"cannot read {path}: expected {expected}; {reason[0]}")


def quoted(names: Iterable[object], most: int = 20) -> str:
    """Names in quotes, the first twenty."""
    shown = [repr(str(name)) for name in names]
    more = f", ... ({len(shown)} in all)" if len(shown) > most else ""
    return (", ".join(shown[:most]) or "none") + more
