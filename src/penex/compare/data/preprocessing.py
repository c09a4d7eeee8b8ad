"""The transform from features to the numerical input of a network, fitted to training rows.

A fitted preparation consists of plain parameters, so that it can be saved and applied to new rows
elsewhere with bit-identical results. Images and texts need none: the network's own layers and
vocabulary process them.
"""

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfVectorizer
from threadpoolctl import threadpool_limits

from penex.compare.data.scaling import ColumnScale, CommonScale
from penex.compare.errors import CompareError

Doubles = npt.NDArray[np.float64]
Inputs = npt.NDArray[np.float32]
State = dict[str, Any]
"""Nested dictionaries and lists of plain values and arrays."""

T = TypeVar("T")

CATEGORIES = 40
"""A text column with fewer distinct values in training is a column of categories."""
NEGLIGIBLE = 1e-4
"""Spread relative to that of the widest text component below which a component is set to zero: the
accuracy of a randomised truncated SVD in float32."""


@dataclass(frozen=True)
class Number:
    """A column of numbers, unchanged."""

    kind: ClassVar[str] = "number"
    name: str

    def __call__(self, column: pd.Series) -> Doubles:
        return column.to_numpy(dtype=np.float64)[:, None]


@dataclass(frozen=True)
class Date:
    """A column of dates: year, month, day, hour unless it is always midnight, and seconds."""

    kind: ClassVar[str] = "date"
    name: str
    format: str | None
    """The format in which the dates were written; None: they were read as dates."""
    zone: str | None
    hours: bool

    @classmethod
    def fit(cls, name: str, train: pd.Series, format: str | None) -> "Date":
        """Find the time zone of training rows, and whether they have hours."""
        zone = None if train.dt.tz is None else str(train.dt.tz)
        dates = train.dropna()
        return cls(name, format, zone, bool((dates != dates.dt.normalize()).any()))

    def __call__(self, column: pd.Series) -> Doubles:
        parts = [column.dt.year, column.dt.month, column.dt.day]
        parts += [column.dt.hour] if self.hours else []
        epoch = pd.Timestamp(0, tz=column.dt.tz)
        parts.append((column - epoch).dt.total_seconds())
        return np.stack([part.to_numpy(dtype=np.float64, na_value=np.nan) for part in parts], 1)


@dataclass(frozen=True)
class Category:
    """A column of categories, one-hot encoded; all zeros for an unknown category."""

    kind: ClassVar[str] = "category"
    name: str
    categories: list[str | None]
    """None stands for a missing value."""

    @classmethod
    def fit(cls, name: str, train: pd.Series) -> "Category":
        """Collect the categories of training rows, sorted."""
        found = set(_texts(train))
        return cls(name, [*sorted(found - {None}), *({None} & found)])  # type: ignore[type-var]

    def __call__(self, column: pd.Series) -> Doubles:
        place = {category: number for number, category in enumerate(self.categories)}
        codes = np.array([place.get(text, -1) for text in _texts(column)], dtype=np.int64)
        flags: Doubles = (codes[:, None] == np.arange(len(place))).astype(np.float64)
        return flags


@dataclass(frozen=True)
class Text:
    """A column of other texts, encoded as components of the TF-IDF of their character fragments.

    If texts have fewer independent fragments than requested components, the directions of the last
    components are arbitrary: training rows hardly vary along them, but other rows might. These
    components are set to zero.
    """

    kind: ClassVar[str] = "text"
    name: str
    fragments: list[str]
    idf: Doubles
    components: npt.NDArray[np.float32]
    """Shape (components, fragments)."""

    @classmethod
    def fit(cls, name: str, train: pd.Series, random_state: int) -> "Text":
        """Fit fragments and components to training rows with skrub."""
        from skrub import StringEncoder  # half a second and 50 MB, for texts in tables only

        encoder = StringEncoder(random_state=random_state)
        texts = pd.Series([text or "" for text in _texts(train)], name=name, dtype="str")
        with warnings.catch_warnings():
            # A column with few distinct fragments gets fewer than 30 components.
            warnings.filterwarnings("ignore", message="The matrix shape is", category=UserWarning)
            spread = encoder.fit_transform(texts).to_numpy().std(axis=0)
        vectorizer = encoder.vectorizer_
        number_of = vectorizer.vocabulary_
        if hasattr(encoder, "tsvd_"):
            components = encoder.tsvd_.components_
        else:  # with so few fragments, skrub uses the first ones directly
            components = np.eye(len(spread), len(number_of))
        components = components * (spread > NEGLIGIBLE * spread.max())[:, None]
        fragments = sorted(number_of, key=number_of.__getitem__)
        return cls(name, fragments, vectorizer.idf_, components.astype(np.float32))

    @cached_property
    def _vectorizer(self) -> TfidfVectorizer:
        vectorizer = TfidfVectorizer(
            analyzer="char_wb", ngram_range=(3, 4), vocabulary=self.fragments
        )
        vectorizer.idf_ = self.idf
        return vectorizer

    def __call__(self, column: pd.Series) -> Doubles:
        frequencies: csr_matrix = self._vectorizer.transform(
            [text or "" for text in _texts(column)]
        )
        product = frequencies.astype(np.float32) @ self.components.T
        return np.asarray(product, dtype=np.float64)


Column = Number | Date | Category | Text
_COLUMNS: dict[str, type[Column]] = {each.kind: each for each in (Number, Date, Category, Text)}


def _texts(column: pd.Series) -> list[str | None]:
    """The values as text; None where missing."""
    return [None if gap else str(text) for gap, text in zip(column.isna(), column, strict=True)]


@dataclass(frozen=True)
class Table:
    """The columns of a table as scaled numbers.

    Missing numbers are replaced by the median and, if training rows have any, marked in an
    additional column.

    Attributes:
        columns: The columns that vary in training.
        median: Medians of the numerical columns that `columns` produce.
        missing: Indices of the numerical columns with missing values in training.
        scale: The scale of all numerical columns, those that mark missing values included.
    """

    kind: ClassVar[str] = "table"
    columns: list[Column]
    median: Doubles
    missing: npt.NDArray[np.int64]
    scale: ColumnScale

    @classmethod
    def fit(cls, train: pd.DataFrame, random_state: int) -> "Table":
        """Fit everything to training rows.

        Args:
            train: Columns are float64, dates or text. Its ``attrs["date_formats"]`` gives the
                format in which the dates of a column were written, if they were text.
            random_state: Seed of the text components.

        Raises:
            CompareError: Every column is constant or empty.
        """
        varies = train.nunique(dropna=False) > 1
        if not varies.any():
            raise CompareError(
                f"every feature column is constant or empty in the {len(train)} training rows; "
                "nothing to learn from. Use more training rows."
            )
        formats = train.attrs.get("date_formats", {})
        columns: list[Column] = []
        with threadpool_limits(limits=1):  # with other threads, sums differ in their last bits
            for name in train.columns[varies]:
                column = train[name]
                if pd.api.types.is_numeric_dtype(column):
                    columns.append(Number(name))
                elif pd.api.types.is_datetime64_any_dtype(column):
                    columns.append(Date.fit(name, column, formats.get(name)))
                elif column.nunique() < CATEGORIES:
                    columns.append(Category.fit(name, column))
                else:
                    columns.append(Text.fit(name, column, random_state))
            columns.sort(key=lambda column: column.kind != Number.kind)
            values = _side_by_side(columns, train)
        missing = np.flatnonzero(np.isnan(values).any(axis=0))
        median = np.nanmedian(values, axis=0)
        return cls(columns, median, missing, ColumnScale.fit(_filled(values, median, missing)))

    def __call__(self, rows: pd.DataFrame) -> Inputs:
        with threadpool_limits(limits=1):
            values = _side_by_side(self.columns, rows)
        return self.scale(_filled(values, self.median, self.missing))


def _side_by_side(columns: list[Column], rows: pd.DataFrame) -> Doubles:
    return np.concatenate([column(rows[column.name]) for column in columns], axis=1)


def _filled(values: Doubles, median: Doubles, missing: npt.NDArray[np.int64]) -> Doubles:
    gaps = np.isnan(values)
    return np.concatenate([np.where(gaps, median, values), gaps[:, missing]], axis=1)


@dataclass(frozen=True)
class Columns:
    """Rows of numbers, each column scaled on its own."""

    kind: ClassVar[str] = "columns"
    scale: ColumnScale

    def __call__(self, rows: npt.NDArray[np.float32]) -> Inputs:
        return self.scale(rows)


@dataclass(frozen=True)
class Arrays:
    """Arrays of more than two dimensions, all values scaled alike."""

    kind: ClassVar[str] = "arrays"
    scale: CommonScale

    def __call__(self, rows: npt.NDArray[np.float32]) -> Inputs:
        return self.scale(rows)


Preparation = Table | Columns | Arrays


def fit(train: pd.DataFrame | npt.NDArray[np.float32], random_state: int) -> Preparation:
    """Fit a preparation to training rows; for the arguments see :meth:`Table.fit`."""
    if isinstance(train, pd.DataFrame):
        return Table.fit(train, random_state)
    if train.ndim == 2:
        return Columns(ColumnScale.fit(train))
    return Arrays(CommonScale.fit(train))


def state(preparation: Preparation) -> State:
    """All parameters, for :func:`restore`."""
    found = {"kind": preparation.kind} | asdict(preparation)
    if isinstance(preparation, Table):
        found["columns"] = [
            {"kind": column.kind} | asdict(column) | {"name": str(column.name)}
            for column in preparation.columns
        ]
    return found


def restore(state: Mapping[str, Any]) -> Preparation:
    """Restore a preparation from its :func:`state`.

    Raises:
        KeyError, TypeError: `state` does not describe a preparation.
    """
    values = {name: value for name, value in state.items() if name != "kind"}
    match state["kind"]:
        case Columns.kind:
            return Columns(_restored(ColumnScale, values["scale"]))
        case Arrays.kind:
            return Arrays(_restored(CommonScale, values["scale"]))
        case Table.kind:
            values["scale"] = _restored(ColumnScale, values["scale"])
            values["columns"] = [
                _restored(_COLUMNS[each["kind"]], {k: v for k, v in each.items() if k != "kind"})
                for each in values["columns"]
            ]
            return _restored(Table, values)
        case kind:
            raise KeyError(f"no preparation is called {kind!r}")


def _restored(cls: type[T], values: Mapping[str, Any]) -> T:
    expected = {each.name for each in fields(cls)}  # type: ignore[arg-type]
    if set(values) != expected:
        raise KeyError(f"{cls.__name__}: expected {sorted(expected)}, got {sorted(values)}")
    return cls(**values)
