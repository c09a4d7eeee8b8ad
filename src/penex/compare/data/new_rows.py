"""New rows, in the form that the rows of a comparison had.

A column is read as it was in training: what was a number there must be one here.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from penex.compare.data.dataset import UNREADABLE, quoted, require_file, unreadable_file
from penex.compare.data.folders import ENDINGS, Files
from penex.compare.data.images import Encoded, Images, resized
from penex.compare.data.preprocessing import Date, Number, Table
from penex.compare.data.tables import as_number, read_file
from penex.compare.errors import CompareError, did_you_mean
from penex.compare.files import open_arrays, read_bytes
from penex.compare.models.saved_model import Model

Rows = pd.DataFrame | npt.NDArray[Any] | Sequence[str] | Images
"""What a classifier takes."""


def as_features(rows: Any, model: Model) -> Any:
    """Rows as features of the kind that the model was trained on.

    Raises:
        CompareError: They are of another kind or shape, a column is missing, or a value is not what
            its column held in training.
    """
    if hasattr(rows, "detach"):
        rows = rows.detach().cpu().numpy()
    if model.kind == "text":
        return _as_texts(rows, model)
    if model.kind == "images":
        return _as_images(rows, model)
    if isinstance(model.preparation, Table):
        return _as_table(rows, model.preparation)
    return _as_array(rows, model)


def _as_texts(rows: Any, model: Model) -> list[str]:
    if isinstance(rows, pd.DataFrame):
        if model.text not in rows:
            raise CompareError(
                f"rows: expected a column {model.text!r} of texts; got {quoted(rows.columns)}"
            )
        rows = rows[model.text]
    if isinstance(rows, str) or not all(isinstance(text, str) for text in rows):
        raise CompareError(f"rows: expected a list of texts, got {_described(rows)}")
    return list(rows)


def _as_images(rows: Any, model: Model) -> Images:
    if isinstance(rows, Images):
        return rows
    channels, height, width = model.shape
    pixels = channels_first(np.asarray(rows), (height, width) if model.resize else None)
    if pixels.shape[1:] != model.shape:
        raise CompareError(
            f"rows: expected images of {channels} channel(s) and {height} x {width} pixels, got "
            f"{pixels.shape[1]} and {pixels.shape[2]} x {pixels.shape[3]}"
        )
    return Images(pixels)


def channels_first(
    images: npt.NDArray[Any], size: tuple[int, int] | int | None
) -> npt.NDArray[np.uint8]:
    """Images as uint8 of shape (N, C, H, W).

    Args:
        images: uint8 of shape (N, H, W), (N, H, W, C) or (N, C, H, W), C being 1 or 3.
        size: (height, width) to resize to, or both; None: as they are.

    Raises:
        CompareError: They are not such images.
    """
    pixels = images[..., None] if images.ndim == 3 else images
    if pixels.ndim == 4 and pixels.shape[-1] not in (1, 3) and pixels.shape[1] in (1, 3):
        pixels = pixels.transpose(0, 2, 3, 1)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] not in (1, 3):
        raise CompareError(
            f"images: expected uint8 of shape (N, H, W) or (N, H, W, 3), got {_described(images)}"
        )
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        pixels = resized(np.ascontiguousarray(pixels), (width, height))
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def _as_array(rows: Any, model: Model) -> npt.NDArray[np.float32]:
    array = np.asarray(rows)
    if array.dtype.kind not in "biuf" or array.shape[1:] != model.shape:
        shape = ", ".join(["N", *map(str, model.shape)])
        raise CompareError(f"rows: expected numbers of shape ({shape}), got {_described(rows)}")
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(values).all():
        raise CompareError("rows: expected finite numbers, of at most 3.4e38; got others")
    return values


def _as_table(rows: Any, table: Table) -> pd.DataFrame:
    if not isinstance(rows, pd.DataFrame):
        raise CompareError(f"rows: expected a DataFrame, got {_described(rows)}")
    given = {str(name): name for name in rows.columns}
    missing = [str(column.name) for column in table.columns if str(column.name) not in given]
    if missing:
        raise CompareError(
            f"rows: expected also the columns {quoted(missing)}; got {quoted(given)}."
            f"{did_you_mean(missing[0], given)}"
        )
    typed = {each.name: _typed(rows[given[str(each.name)]], each) for each in table.columns}
    return pd.DataFrame(typed, index=rows.index)


def _typed(values: pd.Series, column: Any) -> pd.Series:
    """The values of a column in the type that it had in training."""
    kind = pd.api.types.infer_dtype(values, skipna=True)
    if kind == "timedelta64":
        values = values.dt.total_seconds()
    elif kind in ("boolean", "decimal", "empty"):
        values = values.astype(object).map(lambda value: np.nan if pd.isna(value) else float(value))
    elif kind in ("string", "mixed-integer", "categorical"):
        values = values.astype(object).map(_stripped).where(~_blank(values))
    try:
        if isinstance(column, Number):
            numbers = pd.to_numeric(values).astype(np.float64)
            if np.isinf(numbers.to_numpy().astype(np.float32)).any():
                raise ValueError("an infinite number")
            return numbers
        if isinstance(column, Date):
            return _dates(values, column)
    except (ValueError, TypeError) as error:
        what = "numbers" if isinstance(column, Number) else "dates"
        raise CompareError(
            f"rows: column {str(column.name)!r} held {what} in training; {error}"
        ) from None
    return values.astype(object)


def _stripped(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


def _blank(values: pd.Series) -> "pd.Series[bool]":
    """Which values are missing, those included that training takes for words for it ("NA")."""
    from skrub import Cleaner

    texts = values.astype(object).where(values.notna()).map(str, na_action="ignore")
    cleaned = Cleaner(drop_null_fraction=None).fit_transform(pd.DataFrame({"values": texts}))
    blank: pd.Series[bool] = cleaned["values"].isna()
    return blank


def _dates(values: pd.Series, column: Date) -> pd.Series:
    if pd.api.types.is_datetime64_any_dtype(values):
        dates: Any = values
    else:
        dates = pd.to_datetime(values, format=column.format)
    if column.zone is None:
        return pd.Series(dates)
    naive = dates.dt.tz is None
    in_zone: pd.Series = (
        dates.dt.tz_localize(column.zone) if naive else dates.dt.tz_convert(column.zone)
    )
    return in_zone


def _described(rows: Any) -> str:
    shape = getattr(rows, "shape", None)
    if shape is None:
        return type(rows).__name__
    return (
        f"{type(rows).__name__} of shape {tuple(shape)} and type {getattr(rows, 'dtype', 'mixed')}"
    )


# From files


def read_rows(path: Path, model: Model) -> tuple[list[str], Any]:
    """Rows of a file or folder, each with what to call it.

    Args:
        path: A table (.csv, .tsv, .parquet) of the feature columns or of the texts; a file of one
            text a line (.txt); an array (.npy, or X of an .npz); or an image or a folder of them.
        model: For which kind of data.

    Raises:
        CompareError: The file cannot be read, or is of another kind.
    """
    if model.kind == "images" and path.suffix.lower() not in (".npy", ".npz"):
        return _read_images(path, model)
    require_file(path)
    ending = path.name.lower().removesuffix(".gz")
    if ending.endswith((".npy", ".npz")):
        rows: Any = _read_array(path)
    elif ending.endswith(".txt"):
        try:
            rows = read_bytes(path).decode().splitlines()
        except UnicodeDecodeError as error:
            raise unreadable_file(path, "texts in UTF-8, one a line", error) from error
    else:
        rows = _read_table(path, model)
        if model.kind == "numbers" and not isinstance(model.preparation, Table):
            rows = rows.to_numpy()
    return [str(number) for number in range(len(rows))], rows


def _read_array(path: Path) -> npt.NDArray[Any]:
    try:
        with open_arrays(path) as content:
            if isinstance(content, np.ndarray):
                return content
            array: npt.NDArray[Any] = content["X"]
            return array
    except (*UNREADABLE, KeyError) as error:
        if isinstance(error, CompareError):
            raise
        raise unreadable_file(path, "an array, or an NPZ archive with X", error) from error


def _read_table(path: Path, model: Model) -> pd.DataFrame:
    as_text: set[str] = set()
    if isinstance(model.preparation, Table):
        columns = model.preparation.columns
        as_text = {str(column.name) for column in columns if not isinstance(column, Number)}
    _, table = read_file(path, model.text, as_text)
    if isinstance(model.preparation, Table) and table.decimal_comma:
        for each in model.preparation.columns:
            if isinstance(each, Number) and each.name in table.frame:
                column = table.frame[each.name]
                table.frame[each.name] = as_number(column, decimal_comma=True)
    return table.frame


def _read_images(path: Path, model: Model) -> tuple[list[str], Images]:
    folder = path if path.is_dir() else path.parent
    names = [path.name]
    if path.is_dir():
        found = (file for file in path.rglob("*") if file.name.lower().endswith(ENDINGS))
        names = sorted(file.relative_to(path).as_posix() for file in found if file.is_file())
    if not names:
        raise CompareError(f"{path} holds no images ({', '.join(ENDINGS)})")
    channels, height, width = model.shape
    files = Files(folder.resolve(), tuple(names), identity="", stamp="")
    return names, Images(Encoded(files, (channels, height, width), resize=model.resize))
