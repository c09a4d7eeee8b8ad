"""Tables: CSV, TSV or Parquet with the name of the target column, and perhaps of a text column.

Reading decides what a column *is* (number, date, text) from the whole file; every statistic is
fitted later, on training rows only (see :mod:`penex.compare.splits`).
"""

import warnings
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from penex.compare.config import Config
from penex.compare.dataset import (
    PART_NAMES,
    UNREADABLE,
    Content,
    Texts,
    encode_labels,
    listed,
    must_exist,
    official_rows,
    roles,
    unreadable,
)
from penex.compare.errors import CompareError, did_you_mean

SEPARATORS = {".csv": ",", ".csv.gz": ",", ".tsv": "\t", ".tsv.gz": "\t"}


ENDINGS = (*SEPARATORS, ".parquet")


def read_table(path: Path, config: Config) -> Content:
    """Columns beside the target as features: all of them, typed; or the text of one.

    Raises:
        CompareError: The file cannot be read, or has no such columns.
    """
    must_exist(path)
    features, labels = _content(_frame(path, config), str(path), config)
    return Content(features, *encode_labels(labels, str(path)))


def part_tables(folder: Path) -> dict[str, list[Path]]:
    """Tables in a folder that are named after parts, such as train.csv and val.tsv.gz, by part."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        name, dot, ending = path.name.lower().partition(".")
        if name in PART_NAMES and dot + ending in ENDINGS and path.is_file():
            found.setdefault(PART_NAMES[name], []).append(path)
    return found


def holds_part_tables(folder: Path, config: Config) -> bool:
    """Whether `folder` is for :func:`read_tables`, not for images or for texts as on the hub.

    Parquet files with images, or with one column of text beside the target, are as on the hub.
    """
    paths = [path for found in part_tables(folder).values() for path in found]
    if not paths or any(path.is_dir() and path.name[0] != "." for path in folder.iterdir()):
        return False
    parquet = [path for path in paths if path.name.lower().endswith(".parquet")]
    if len(parquet) < len(paths) or not parquet:
        return True
    try:
        schema = pq.read_schema(parquet[0])
    except UNREADABLE:
        return False
    kinds = {field.name: field.type for field in schema if field.name != config.target}
    if any(pa.types.is_nested(kind) or pa.types.is_binary(kind) for kind in kinds.values()):
        return False
    strings = sum(pa.types.is_string(k) or pa.types.is_large_string(k) for k in kinds.values())
    return config.text is None and (strings == 0 or (config.target is not None and strings > 1))


def read_tables(folder: Path, config: Config) -> Content:
    """As :func:`read_table`, from the tables in `folder` that are named after their parts.

    Raises:
        CompareError: As there; or there are two tables of a part, or their columns differ.
    """
    files = part_tables(folder)
    for part, paths in files.items():
        if len(paths) > 1:
            raise CompareError(
                f"{folder} has the part {part} twice: {listed(path.name for path in paths)}."
            )
    used_as = roles(files, config.parts, str(folder))
    paths = [files[part][0] for part in used_as]
    frames = [_frame(path, config) for path in paths]
    for path, frame in zip(paths[1:], frames[1:], strict=True):
        if different := set(frame.columns) ^ set(frames[0].columns):
            raise CompareError(
                f"{path} and {paths[0]} must have the same columns; only one of them has "
                f"{listed(sorted(different))}."
            )
    features, labels = _content(_together(frames), str(folder), config)
    sizes = zip(used_as.values(), map(len, frames), strict=True)
    return Content(features, *encode_labels(labels, str(folder)), official_rows(sizes))


def _together(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """All rows. A column of numbers in one table and of text ("?", say) in another becomes text."""
    for name in frames[0].columns:
        if len({pd.api.types.is_numeric_dtype(frame[name]) for frame in frames}) > 1:
            for frame in frames:
                frame[name] = frame[name].astype(str).where(frame[name].notna())
    return pd.concat(frames, ignore_index=True)


def _frame(path: Path, config: Config) -> pd.DataFrame:
    """A table as it is, with the columns that the configuration names."""
    target, text = config.target, config.text
    names, frame = read_frame(path, text)
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise CompareError(
            f"{path}: column names must differ, but {listed(repeated)} come(s) more than once."
        )
    columns = f"its columns are {listed(names)}"
    if target is None:
        raise CompareError(f"{path} is a table: name the column to predict (--target); {columns}.")
    for name in (target, text):
        if name is not None and name not in frame.columns:
            hint = did_you_mean(name, names)
            raise CompareError(f"{path} has no column {name!r}; {columns}.{hint}")
    if text == target:
        raise CompareError(f"{path}: target and text are the same column, {text!r}.")
    if frame.empty or frame.shape[1] == 1:
        what = f"feature columns beside {target!r}" if len(frame) else "rows below its header"
        raise CompareError(f"{path} has no {what}; nothing to learn from.")
    return frame


def read_frame(
    path: Path, text: str | None, as_text: Collection[str] = ()
) -> tuple[list[str], pd.DataFrame]:
    """Column names as written, and the content of a table.

    Args:
        path: The file.
        text: A column that is read as it is written: "None", "NA" and "12" are texts too.
        as_text: Columns whose numbers are text ("007"), missing values aside.

    Raises:
        CompareError: The file cannot be read.
    """
    ending = next((ending for ending in ENDINGS if path.name.lower().endswith(ending)), None)
    if ending is None:
        raise CompareError(f"{path}: expected a table ending in {', '.join(ENDINGS)}")
    try:
        if ending == ".parquet":
            return _read_parquet(path)
        return _read_text(path, ending, text, as_text)
    except (*UNREADABLE, pd.errors.ParserWarning) as error:
        expected = "a Parquet file" if ending == ".parquet" else f"a {ending} table in UTF-8"
        raise unreadable(path, expected, error) from error


def _content(
    frame: pd.DataFrame, source: str, config: Config
) -> tuple["Texts | pd.DataFrame", pd.Series]:
    """Features and labels."""
    labels = frame.pop(str(config.target))
    if config.text is not None:
        return texts(frame[config.text], source), labels
    return typed(frame, source), labels


def texts(column: "pd.Series[str]", source: str) -> Texts:
    """A text column as it stands; refuses gaps, and what is no text."""
    kind = pd.api.types.infer_dtype(column, skipna=True)
    if kind not in ("string", "empty"):
        raise CompareError(f"{source}: column {column.name!r} holds {kind} values, not texts.")
    blank = int((column.isna() | (column.str.strip() == "")).sum())
    if blank:
        raise CompareError(
            f"{source}: the text in column {column.name!r} is missing in {blank} of {len(column)} "
            "rows. Fill it in or remove the rows."
        )
    return Texts(column.tolist())


def _read_text(
    path: Path, ending: str, text: str | None, as_text: Collection[str]
) -> tuple[list[str], pd.DataFrame]:
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
        for name in frame.columns.intersection(list(as_text)):
            frame[name] = pd.read_csv(
                path, sep=separator, index_col=False, usecols=[name], dtype=str
            )[name]
        if text in frame.columns:
            frame[text] = pd.read_csv(
                path, sep=separator, index_col=False, usecols=[text], dtype=str, na_filter=False
            )[text]
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


def typed(frame: pd.DataFrame, source: str) -> pd.DataFrame:
    """Columns as float64, dates or text; refuses what is none of these, and infinite numbers."""
    # Half a second and 50 MB that the other sources need not pay in every process.
    from skrub import Cleaner

    for name in frame.columns:
        kind = pd.api.types.infer_dtype(frame[name], skipna=True)
        if kind in ("mixed", "bytes", "complex"):
            sample = frame[name].dropna().iloc[0]
            raise CompareError(
                f"{source}: column {name!r} holds values such as {type(sample).__name__} "
                f"({kind}); expected numbers, text or dates. Remove or convert it."
            )
        if kind == "timedelta64":
            frame[name] = frame[name].dt.total_seconds()
        elif kind in ("boolean", "decimal", "empty") or pd.api.types.is_numeric_dtype(frame[name]):
            frame[name] = frame[name].to_numpy(dtype=np.float64, na_value=np.nan)

    others = frame.columns[frame.dtypes != np.float64]
    if len(others):
        # Missing-value words become missing, date strings dates; None: keep columns without values.
        cleaner = Cleaner(drop_null_fraction=None)
        cleaned = cleaner.fit_transform(frame[others])
        formats = {}
        for name in others:
            frame[name] = _as_number(cleaned[name])
            for step in cleaner.all_processing_steps_[name]:
                if hasattr(step, "format_"):
                    formats[name] = step.format_
        frame.attrs["date_formats"] = formats  # to read later rows in the same way

    for name in frame.columns[frame.dtypes == np.float64]:
        with np.errstate(over="ignore"):
            infinite = int(np.isinf(frame[name].to_numpy().astype(np.float32)).sum())
        if infinite:
            raise CompareError(
                f"{source}: column {name!r} must be finite; {infinite} of its values are infinite "
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
