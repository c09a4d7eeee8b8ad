"""From the source a user names to features and class codes, checked, before any split.

Three kinds of source: a data set bundled with scikit-learn, a table (CSV, TSV or Parquet) with the
name of its target column, and an NPZ file with arrays ``X`` and ``y``. What the comparison cannot
use is refused here. Reading decides what a column *is* (number, date, text) from the whole file;
every statistic is fitted later, on training rows only (see :mod:`penex.compare.splits`).
"""

import difflib
import hashlib
import json
import warnings
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq
from sklearn import datasets as bundled

from penex.compare.errors import CompareError

BUNDLED = ("breast_cancer", "digits", "iris", "wine")
SEPARATORS = {".csv": ",", ".csv.gz": ",", ".tsv": "\t", ".tsv.gz": "\t"}
ENDINGS = (*SEPARATORS, ".parquet", ".npz")
# One row for each part: training, validation, test.
MIN_ROWS_PER_CLASS = 3
# What pandas, pyarrow and numpy raise on a file that is not what its ending says.
UNREADABLE = (ValueError, OSError, EOFError, NotImplementedError, zlib.error, zipfile.BadZipFile)


@dataclass(frozen=True)
class Dataset:
    """Everything that was read, before any split.

    Attributes:
        name: The bundled name, or the file's name without its ending.
        features: float32 array of shape (N, ...), all finite; or a DataFrame of N rows whose
            columns are float64 (NaN: missing), dates, or text.
        target: int64 class codes of shape (N,), each in 0..K-1.
        classes: The K class names, sorted (numbers by value); code k stands for ``classes[k]``.
        fingerprint: SHA-256 over features, target and classes, in hexadecimal. The same on every
            machine; equal for two sources only if all values read from them are equal.
    """

    name: str
    features: npt.NDArray[np.float32] | pd.DataFrame
    target: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    fingerprint: str


def load(source: str, target: str | None = None) -> Dataset:
    """Read a source and check that classifiers can be compared on it.

    Args:
        source: ``"digits"``, ``"wine"``, ``"breast_cancer"``, ``"iris"``, or the path of a file
            that ends in .csv, .csv.gz, .tsv, .tsv.gz, .parquet or .npz. An NPZ file holds ``X`` of
            shape (N, ...), real numbers, and ``y`` of shape (N,), integers or strings.
        target: Name of the column to predict. Needed for a table, refused for anything else.

    Returns:
        The data set. Text that stands for a missing value ("", "NA", "?", ...) has become missing;
        text columns whose values are all numbers or all dates have become such columns. Row
        numbers (a first column without a name, of distinct integers) are left out.

    Raises:
        CompareError: The source cannot be found, read or used; the message says what to change.
    """
    path = Path(source).expanduser()
    ending = next((e for e in ENDINGS if path.name.lower().endswith(e)), None)
    features: npt.NDArray[np.float32] | pd.DataFrame
    if source not in BUNDLED and ending is None:
        raise CompareError(
            f"unknown data {source!r}: expected one of {', '.join(BUNDLED)}, or a file ending in "
            f"{', '.join(ENDINGS)}.{_did_you_mean(source, BUNDLED)}"
        )
    if source in BUNDLED or ending == ".npz":
        if target is not None:
            raise CompareError(
                f"{source} has no columns to choose from, but target {target!r} was given; "
                "leave the target out."
            )
        features, labels = _read_bundled(source) if source in BUNDLED else _read_npz(path)
    else:
        features, labels = _read_table(path, str(ending), target)

    name = path.name[: -len(ending)] if ending else source
    codes, classes = _encode_labels(labels, source)
    return Dataset(name, features, codes, classes, _fingerprint(features, codes, classes))


def _read_bundled(name: str) -> tuple[npt.NDArray[np.float32], pd.Series]:
    """Features and class names of one of scikit-learn's own data sets; nothing is downloaded."""
    content = getattr(bundled, f"load_{name}")()
    features = content.get("images", content.data)
    return features.astype(np.float32), pd.Series(content.target_names[content.target])


def _read_npz(path: Path) -> tuple[npt.NDArray[np.float32], pd.Series]:
    """X as float32 and y of an NPZ file, neither of them pickled."""
    _must_exist(path)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            arrays = dict(content)
    except (*UNREADABLE, TypeError) as error:  # TypeError: a bare .npy array under this name
        raise _unreadable(path, "an NPZ archive without pickled objects", error) from error
    if set(arrays) != {"X", "y"}:
        raise CompareError(f"{path}: expected exactly the arrays X, y; found {_listed(arrays)}.")
    x, y = arrays["X"], arrays["y"]
    if x.ndim < 2 or y.ndim != 1 or len(x) != len(y):
        raise CompareError(
            f"{path}: expected X of shape (N, ...) with features and y of shape (N,); "
            f"got X of shape {x.shape} and y of shape {y.shape}."
        )
    if x.dtype.kind not in "biuf" or y.dtype.kind not in "biufSU":
        raise CompareError(
            f"{path}: expected X to hold real numbers and y integers or strings; "
            f"got X of dtype {x.dtype} and y of dtype {y.dtype}."
        )
    if x.size == 0:
        raise CompareError(f"{path}: X of shape {x.shape} holds no values; nothing to learn from.")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf and is refused
        features = np.ascontiguousarray(x, dtype=np.float32)
    if bad := int(features.size - np.isfinite(features).sum()):
        raise CompareError(
            f"{path}: X must be finite in float32; {bad} of {features.size} values are NaN, "
            "infinite or beyond 3.4e38. Replace them or remove their rows."
        )
    return features, pd.Series(np.char.decode(y, "utf-8") if y.dtype.kind == "S" else y)


def _read_table(path: Path, ending: str, target: str | None) -> tuple[pd.DataFrame, pd.Series]:
    """Typed feature columns and the raw target column of a table."""
    _must_exist(path)
    try:
        names, frame = _read_parquet(path) if ending == ".parquet" else _read_text(path, ending)
    except (*UNREADABLE, pd.errors.ParserWarning) as error:
        expected = "a Parquet file" if ending == ".parquet" else f"a {ending} table in UTF-8"
        raise _unreadable(path, expected, error) from error
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise CompareError(
            f"{path}: column names must differ, but {_listed(repeated)} come(s) more than once."
        )
    columns = f"its columns are {_listed(names)}"
    if target is None:
        raise CompareError(f"{path} is a table: name the column to predict (target); {columns}.")
    if target not in frame.columns:
        hint = _did_you_mean(target, names)
        raise CompareError(f"{path} has no column {target!r}; {columns}.{hint}")
    labels = frame.pop(target)
    if frame.empty:
        what = "rows below its header" if frame.shape[1] else f"feature columns beside {target!r}"
        raise CompareError(f"{path} has no {what}; nothing to learn from.")
    return _typed(frame, path), labels


def _read_text(path: Path, ending: str) -> tuple[list[str], pd.DataFrame]:
    """Header as written, and content, of a CSV or TSV file in UTF-8."""
    with warnings.catch_warnings():
        # Rows longer than the header would lose their last fields with no more than this warning.
        warnings.simplefilter("error", pd.errors.ParserWarning)
        # The header apart, because pandas renames what comes twice ("a", "a.1").
        separator = SEPARATORS[ending]
        header = pd.read_csv(
            path, sep=separator, index_col=False, header=None, nrows=1, dtype=str, na_filter=False
        )
        frame = pd.read_csv(path, sep=separator, index_col=False, low_memory=False)
    written = [str(name) for name in header.iloc[0]]
    first = frame.iloc[:, 0]
    if not written[0] and first.is_unique and pd.api.types.is_integer_dtype(first):
        # Row numbers, as pandas writes them; in a file sorted by class they would give it away.
        written, frame = written[1:], frame.iloc[:, 1:]
    # A blank name is no name; pandas calls such columns "Unnamed: <number>".
    return [name or str(column) for name, column in zip(written, frame, strict=True)], frame


def _read_parquet(path: Path) -> tuple[list[str], pd.DataFrame]:
    """Column names and content of a Parquet file; a named index is a column like the others."""
    names = [str(name) for name in pq.read_schema(path).names]
    if len(set(names)) < len(names):
        return names, pd.DataFrame()  # pyarrow cannot read it, the caller refuses it
    frame = pd.read_parquet(path, engine="pyarrow")
    frame = frame.reset_index(drop=all(name is None for name in frame.index.names))
    frame.columns = pd.Index([str(name) for name in frame.columns])
    return list(frame.columns), frame


def _typed(frame: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Columns as float64, dates or text; refuses what is none of these, and infinite numbers."""
    # Half a second and 50 MB that the other sources need not pay in every process.
    from skrub import Cleaner

    for name in frame.columns:
        kind = pd.api.types.infer_dtype(frame[name], skipna=True)
        if kind in ("mixed", "bytes", "complex"):
            sample = frame[name].dropna().iloc[0]
            raise CompareError(
                f"{path}: column {name!r} holds values such as {type(sample).__name__} "
                f"({kind}); expected numbers, text or dates. Remove or convert it."
            )
        if kind == "timedelta64":
            frame[name] = frame[name].dt.total_seconds()
        elif kind in ("boolean", "decimal", "empty") or pd.api.types.is_numeric_dtype(frame[name]):
            frame[name] = frame[name].to_numpy(dtype=np.float64, na_value=np.nan)

    others = frame.columns[frame.dtypes != np.float64]
    if len(others):
        # Missing-value words become missing, date strings dates; None: keep columns without values.
        cleaned = Cleaner(drop_null_fraction=None).fit_transform(frame[others])
        for name in others:
            frame[name] = _as_number(cleaned[name])

    for name in frame.columns[frame.dtypes == np.float64]:
        with np.errstate(over="ignore"):
            infinite = int(np.isinf(frame[name].to_numpy().astype(np.float32)).sum())
        if infinite:
            raise CompareError(
                f"{path}: column {name!r} must be finite; {infinite} of its values are infinite "
                "or beyond 3.4e38. Replace them or leave them empty (missing)."
            )
    return frame


def _as_number(column: pd.Series) -> pd.Series:
    """A text column as float64 if every value in it is a number, else unchanged."""
    if not (pd.api.types.is_string_dtype(column) or pd.api.types.is_object_dtype(column)):
        return column
    try:
        return pd.to_numeric(column).astype(np.float64)
    except (ValueError, TypeError):
        return column


def _encode_labels(labels: pd.Series, source: str) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Class codes and sorted class names; refuses labels that are not classes to split."""
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
    classes = tuple(str(value) for value in distinct)
    if len(classes) < 2:
        raise CompareError(
            f"{source}: expected at least 2 classes to tell apart; every label is {classes[0]!r}."
        )
    counts = np.bincount(codes)
    if (rare := np.flatnonzero(counts < MIN_ROWS_PER_CLASS)).size:
        listed = ", ".join(f"{classes[k]!r} ({counts[k]})" for k in rare[:10])
        raise CompareError(
            f"{source}: every class needs at least {MIN_ROWS_PER_CLASS} rows, one each for "
            f"training, validation and test; too few in {rare.size} of {len(classes)} classes: "
            f"{listed}{', ...' if rare.size > 10 else ''}. Add rows, merge classes or remove them."
        )
    return codes.astype(np.int64), classes


def _whole_if_possible(
    labels: pd.Series, source: str
) -> npt.NDArray[np.int64] | npt.NDArray[np.float64]:
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


def _fingerprint(
    features: npt.NDArray[np.float32] | pd.DataFrame,
    target: npt.NDArray[np.int64],
    classes: tuple[str, ...],
) -> str:
    """SHA-256 of a form that depends on values alone, each piece preceded by what and how long."""
    digest = hashlib.sha256(json.dumps([len(target), classes]).encode())
    digest.update(target.astype("<i8").tobytes())
    if isinstance(features, np.ndarray):
        digest.update(json.dumps(["array", features.shape]).encode())
        digest.update(features.astype("<f4").tobytes())
        return digest.hexdigest()
    for name, column in features.items():
        number = column.dtype == np.float64
        date = pd.api.types.is_datetime64_any_dtype(column)
        kind = "number" if number else "date" if date else "text"
        digest.update(json.dumps([kind, str(name)]).encode())
        if number:
            values = column.to_numpy(dtype="<f8")
            # NaN has many bit patterns; one stands for all.
            digest.update(np.where(np.isnan(values), np.nan, values).tobytes())
        else:
            gaps = column.isna()
            texts = [None if gap else str(value) for gap, value in zip(gaps, column, strict=True)]
            digest.update(json.dumps(texts).encode())
    return digest.hexdigest()


def _must_exist(path: Path) -> None:
    if not path.is_file():
        raise CompareError(f"no such file: {path} (looked in {path.absolute().parent}).")


def _unreadable(path: Path, expected: str, error: BaseException) -> CompareError:
    """One line for whatever a reader raised."""
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return CompareError(f"cannot read {path}: expected {expected}; {reason[0]}")


def _listed(names: Iterable[str], most: int = 20) -> str:
    """Names in quotes, the first twenty."""
    quoted = [repr(str(name)) for name in names]
    more = f", ... ({len(quoted)} in all)" if len(quoted) > most else ""
    return (", ".join(quoted[:most]) or "none") + more


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence with the nearest names, case aside, or nothing."""
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), by_lower, n=3)
    return f" Did you mean {' or '.join(repr(by_lower[name]) for name in near)}?" if near else ""
