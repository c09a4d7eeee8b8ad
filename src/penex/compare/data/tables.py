"""Tables: delimited text, Excel or Parquet with the name of the target column.

Reading decides what a column *is* (number, date, text) from the whole file; every statistic is
fitted later, on training rows only (see :mod:`penex.compare.data.split`).
"""

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from penex._extras import need
from penex.compare.config import Config
from penex.compare.data import delimited
from penex.compare.data.dataset import (
    PART_NAMES,
    UNREADABLE,
    Content,
    Texts,
    encode_labels,
    official_rows,
    quoted,
    require_file,
    roles,
    unreadable_file,
)
from penex.compare.data.delimited import read_delimited
from penex.compare.errors import CompareError, did_you_mean, named
from penex.compare.files import MAX_BYTES, MAX_ROWS, check_archive, require_regular

EXCEL = (".xlsx", ".xlsm")
ENDINGS = (*delimited.ENDINGS, *EXCEL, ".parquet")

DECIMAL_COMMA = r"[+-]?(\d+|\d{1,3}(\.\d{3})+)(,\d+)?([eE][+-]?\d+)?"
"""A number as written where the comma is the decimal sign and the point may group thousands."""


@dataclass(frozen=True)
class Table:
    """A table as it was read.

    Attributes:
        frame: Its columns, under the names of the header without blanks around them.
        decimal_comma: Whether "1,5" is a number in it: where another sign separates fields.
        left_out: Columns that are no features, and why.
        notes: What the user should know of how it was read.
    """

    frame: pd.DataFrame
    decimal_comma: bool = False
    left_out: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_table(path: Path, config: Config) -> Content:
    """Columns beside the target as features: all of them, typed; or the text of one.

    Where `config` names files of validation and test rows, they are read with it.

    Raises:
        CompareError: The file cannot be read, or has no such columns.
    """
    files = {"train": path}
    for part, given in (("validation", config.validation_file), ("test", config.test_file)):
        if given is not None:
            files[part] = Path(given).expanduser()
            if not files[part].name.lower().endswith(ENDINGS):
                setting = named(f"{part}_file")
                raise CompareError(f"{setting}: expected a table, such as .csv; got {given!r}.")
    return _read(files, str(path), config)


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
    kinds = {each.name: each.type for each in schema if each.name != config.target}
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
                f"{folder} has the part {part} twice: {quoted(path.name for path in paths)}."
            )
    return _read({part: paths[0] for part, paths in files.items()}, str(folder), config)


def _read(files: dict[str, Path], source: str, config: Config) -> Content:
    """Features and labels of the tables of one or more parts, which are named after `source`."""
    used_as = roles(files, config.parts, source)
    paths = [files[part] for part in used_as]
    tables = [_table(path, config) for path in paths]
    frames = [table.frame for table in tables]
    for path, frame in zip(paths[1:], frames[1:], strict=True):
        if different := set(frame.columns) ^ set(frames[0].columns):
            raise CompareError(
                f"{path} and {paths[0]} must have the same columns; only one of them has "
                f"{quoted(sorted(different))}."
            )
    part = np.repeat(np.arange(len(frames)), list(map(len, frames)))
    whole = Table(
        _together(frames),
        any(table.decimal_comma for table in tables),
        {name: why for table in tables for name, why in table.left_out.items()},
        tuple(note for table in tables for note in table.notes),
    )
    return _content(whole, part, list(used_as.values()), source, config)


def _together(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """All rows. A column of numbers in one table and of text ("?", say) in another becomes text."""
    for name in frames[0].columns:
        if len({pd.api.types.is_numeric_dtype(frame[name]) for frame in frames}) > 1:
            for frame in frames:
                frame[name] = frame[name].astype(str).where(frame[name].notna())
    return pd.concat(frames, ignore_index=True)


def _table(path: Path, config: Config) -> Table:
    """A table as it is, checked for the columns that the configuration names."""
    names, table = read_file(path, config.text)
    _check_columns(names, table.frame, str(path), config)
    return table


def _check_columns(names: list[str], frame: pd.DataFrame, path: str, config: Config) -> None:
    """Refuse a table that lacks columns which the configuration names."""
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise CompareError(
            f"{path}: column names must differ, but {quoted(repeated)} come(s) more than once."
        )
    target = _stripped(config.target)
    if target is None:
        raise CompareError(
            f"{path} is a table: name the column to predict (--target); its columns are "
            f"{quoted(names)}."
        )
    roles_of: dict[str, str] = {}
    for role in ("target", "text", "group", "time"):
        name = _stripped(getattr(config, role))
        if name is None:
            continue
        _must_have(frame, name, path)
        if name in roles_of:
            raise CompareError(
                f"{path}: {roles_of[name]} and {role} are the same column, {name!r}."
            )
        roles_of[name] = role
    for option in ("drop", "keep"):
        for name in map(str.strip, getattr(config, option) or ()):
            _must_have(frame, name, f"{option}: {path}")
            if name in roles_of:
                raise CompareError(f"{option}: {name!r} is the {roles_of[name]} column.")
    if frame.empty or frame.shape[1] == 1:
        what = f"feature columns beside {target!r}" if len(frame) else "rows below its header"
        raise CompareError(f"{path} has no {what}; nothing to learn from.")


def read_file(
    path: Path, text: str | None, as_text: Collection[str] = ()
) -> tuple[list[str], Table]:
    """Column names as written, and the content of a table.

    Args:
        path: The file.
        text: A column that is read as it is written: "None", "NA" and "12" are texts too.
        as_text: Columns of delimited text whose numbers are texts ("007").

    Raises:
        CompareError: The file cannot be read.
    """
    require_file(path)
    ending = next((ending for ending in ENDINGS if path.name.lower().endswith(ending)), None)
    if ending is None:
        raise CompareError(f"{path}: expected a table, such as .csv, .xlsx or .parquet")
    text = _stripped(text)
    try:
        if ending == ".parquet":
            return _read_parquet(path)
        if ending in EXCEL:
            return _read_excel(path, text)
        return _read_text(path, text, as_text)
    except (*UNREADABLE, pd.errors.ParserWarning) as error:
        if isinstance(error, CompareError):
            raise
        raise unreadable_file(path, f"a table ({ending})", error) from error


def content_of(frame: pd.DataFrame, source: str, config: Config) -> Content:
    """As :func:`read_table`, of a table in memory."""
    part = np.zeros(len(frame), np.int64)
    table = Table(frame.set_axis([str(name).strip() for name in frame.columns], axis=1))
    _check_columns(list(table.frame.columns), table.frame, source, config)
    return _content(table, part, ["train"], source, config)


def _stripped(name: str | None) -> str | None:
    """The name of a column as it stands in a :class:`Table`."""
    return None if name is None else name.strip()


def _must_have(frame: pd.DataFrame, name: str, source: str) -> None:
    if name not in frame.columns:
        names = list(frame.columns)
        raise CompareError(
            f"{source} has no column {name!r}; its columns are {quoted(names)}."
            f"{did_you_mean(name, names)}"
        )


def _content(
    table: Table,
    part: npt.NDArray[np.int64],
    used_as: Sequence[str],
    source: str,
    config: Config,
) -> Content:
    """Features and labels of the rows that have a label.

    Args:
        table: All rows.
        part: Number of the part that each row is from.
        used_as: What each part is used as.
        source: For messages.
        config: Its columns are there.
    """
    frame, left_out, notes = table.frame, dict(table.left_out), list(table.notes)
    target = str(_stripped(config.target))
    missing = _missing(frame[target])
    if missing.any():
        if missing.all():
            raise CompareError(
                f"{source}: no row has a value of {target!r}; nothing to learn from."
            )
        notes.append(
            f"{int(missing.sum()):,} of {len(frame):,} rows of {source} have no {target} (empty, "
            "NA, ?, None, null and the like) and are left out."
        )
        frame, part = frame[~missing].reset_index(drop=True), part[~missing]
    codes, classes = encode_labels(_without_blanks(frame.pop(target)), source)
    groups = time = None
    if config.group is not None:
        name = config.group.strip()
        left_out[name] = "group"
        groups = _groups(frame.pop(name), source)
    if config.time is not None:
        name = config.time.strip()
        left_out[name] = "time"
        time = _times(frame.pop(name), source, decimal_comma=table.decimal_comma)
    features: Texts | pd.DataFrame
    if config.text is not None:
        name = config.text.strip()
        left_out |= {other: "not the text" for other in frame.columns if other != name}
        features = texts(frame[name], source)
    else:
        for each in frame.columns:
            if each in _names(config.drop):
                left_out[each] = "drop"
            elif config.keep is not None and each not in _names(config.keep):
                left_out[each] = "not in keep"
        frame = frame[[each for each in frame.columns if each not in left_out]]
        if frame.shape[1] == 0:
            raise CompareError(
                f"{source} has no feature columns besides those that are left out: "
                f"{quoted(left_out)}."
            )
        features = _typed(frame.copy(), source, decimal_comma=table.decimal_comma)
    sizes = zip(used_as, np.bincount(part, minlength=len(used_as)).tolist(), strict=True)
    return Content(
        features, codes, classes, official_rows(sizes), groups, time, left_out, tuple(notes)
    )


def _names(columns: tuple[str, ...] | None) -> set[str]:
    return {name.strip() for name in columns or ()}


def _missing(column: pd.Series) -> npt.NDArray[np.bool_]:
    """Which values are missing, by the words that stand for it in features too."""
    from skrub import Cleaner

    column = _without_blanks(column)
    cleaned = Cleaner(drop_null_fraction=None).fit_transform(column.to_frame())
    return np.asarray(column.isna() | cleaned[column.name].isna(), dtype=bool)


def _without_blanks(column: pd.Series) -> pd.Series:
    """The column, its texts without blanks around them."""
    strings = pd.api.types.infer_dtype(column, skipna=True) == "string"
    return column.str.strip() if strings else column


def _groups(column: pd.Series, source: str) -> npt.NDArray[np.int64]:
    """A code for each row, the same where the group is."""
    if gaps := int(_missing(column).sum()):
        raise CompareError(
            f"group: column {column.name!r} of {source} has no value in {gaps} of {len(column)} "
            "rows. Fill it in or remove the rows."
        )
    codes, _ = pd.factorize(_without_blanks(column))
    return codes.astype(np.int64)


def _times(column: pd.Series, source: str, *, decimal_comma: bool) -> npt.NDArray[np.int64]:
    """The rank of each row in time, from 0; the same where the time is."""
    name = column.name
    typed = _typed(column.to_frame(), source, decimal_comma=decimal_comma)[name]
    date = pd.api.types.is_datetime64_any_dtype(typed)
    if not date and typed.dtype != np.float64:
        example = typed.dropna().iloc[0] if typed.notna().any() else "nothing"
        raise CompareError(
            f"time: column {name!r} of {source} should hold dates or numbers; it has values such "
            f"as {str(example)!r}."
        )
    if gaps := int(typed.isna().sum()):
        raise CompareError(
            f"time: column {name!r} of {source} has no value in {gaps} of {len(typed)} rows. Fill "
            "it in or remove the rows."
        )
    return np.asarray(typed.rank(method="dense"), dtype=np.int64) - 1


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


def _read_text(path: Path, text: str | None, as_text: Collection[str]) -> tuple[list[str], Table]:
    """Header and content of delimited text."""
    read = read_delimited(path, text, as_text)
    notes: tuple[str, ...] = ()
    if not read.encoding.startswith("utf"):
        notes = (
            f"{path} is not in UTF-8 and is read as {read.encoding}. If letters look wrong, "
            "save it as UTF-8.",
        )
    return _named(read.names, read.frame, decimal_comma=read.separator != ",", notes=notes)


def _read_excel(path: Path, text: str | None) -> tuple[list[str], Table]:
    """Header and content of the first sheet of an Excel file."""
    need("Reading Excel tables", "excel", "openpyxl")
    check_archive(path, MAX_BYTES)
    try:
        with warnings.catch_warnings():
            # Of what it does not read: styles, validation rules and the like.
            warnings.simplefilter("ignore", UserWarning)
            with pd.ExcelFile(path, engine="openpyxl") as book:
                header = pd.read_excel(book, header=None, nrows=1, dtype=str, na_filter=False)
                names = [str(name).strip() for name in (header.iloc[0] if len(header) else ())]
                frame = pd.read_excel(book)
                if text in names:
                    frame[frame.columns[names.index(text)]] = pd.read_excel(
                        book, usecols=[names.index(text)], dtype=str, na_filter=False
                    ).iloc[:, 0]
                sheets = book.sheet_names
    except (KeyError, SyntaxError) as error:  # parts of the archive are missing, or no XML
        raise ValueError(str(error)) from error
    notes = (f"{path}: the first sheet is read, {sheets[0]!r}.",) if len(sheets) > 1 else ()
    return _named(names, frame, notes=notes)


def _named(
    names: list[str], frame: pd.DataFrame, *, decimal_comma: bool = False, notes: tuple[str, ...]
) -> tuple[list[str], Table]:
    """Columns under the names of the header; row numbers left out."""
    left_out = {}
    if frame.shape[1] and not names[0]:
        first = frame.iloc[:, 0]
        if first.is_unique and pd.api.types.is_integer_dtype(first):
            # As pandas writes them; in a file sorted by class they would give it away.
            left_out["(the first, without a name)"] = "row numbers"
            names, frame = names[1:], frame.iloc[:, 1:]
    # pandas calls columns without a name "Unnamed: <number>".
    names = [name or str(column) for name, column in zip(names, frame, strict=True)]
    frame = frame.set_axis(names, axis="columns")
    return names, Table(frame, decimal_comma, left_out, notes)


def _read_parquet(path: Path) -> tuple[list[str], Table]:
    """Column names and content of a Parquet file; a named index is a column like the others."""
    metadata = parquet_metadata(path)
    names = [str(name).strip() for name in metadata.schema.to_arrow_schema().names]
    if len(set(names)) < len(names):
        return names, Table(pd.DataFrame())  # pyarrow cannot read it, the caller refuses it
    frame = pd.read_parquet(path, engine="pyarrow")
    frame = frame.reset_index(drop=all(name is None for name in frame.index.names))
    frame.columns = pd.Index([str(name).strip() for name in frame.columns])
    return list(frame.columns), Table(frame)


def parquet_metadata(path: Path) -> pq.FileMetaData:
    """What a Parquet file says of itself.

    Raises:
        CompareError: It is no regular file, or has too many rows or bytes.
    """
    require_regular(path)
    metadata = pq.read_metadata(path)
    size = sum(metadata.row_group(k).total_byte_size for k in range(metadata.num_row_groups))
    if size > MAX_BYTES or metadata.num_rows > MAX_ROWS:
        raise CompareError(
            f"{path} has {metadata.num_rows:,} rows in {size / 2**30:.3g} GiB when decompressed; "
            f"at most {MAX_ROWS:,} rows and {MAX_BYTES / 2**30:.3g} GiB are read."
        )
    return metadata


def _typed(frame: pd.DataFrame, source: str, *, decimal_comma: bool) -> pd.DataFrame:
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
        else:
            frame[name] = _without_blanks(frame[name])

    others = frame.columns[frame.dtypes != np.float64]
    if len(others):
        # Missing-value words become missing, date strings dates; None: keep columns without values.
        cleaner = Cleaner(drop_null_fraction=None)
        cleaned = cleaner.fit_transform(frame[others])
        formats = {}
        for name in others:
            frame[name] = as_number(cleaned[name], decimal_comma=decimal_comma)
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


def as_number(column: pd.Series, *, decimal_comma: bool) -> pd.Series:
    """A text column as float64 if every value in it is a number, else unchanged."""
    if not (pd.api.types.is_string_dtype(column) or pd.api.types.is_object_dtype(column)):
        return column
    try:
        return pd.to_numeric(column).astype(np.float64)
    except (ValueError, TypeError):
        pass
    texts = column.dropna().astype(str)
    if decimal_comma and texts.str.fullmatch(DECIMAL_COMMA).all():
        numbers = column.str.replace(".", "").str.replace(",", ".")
        return pd.to_numeric(numbers).astype(np.float64)
    return column
