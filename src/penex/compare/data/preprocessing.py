"""From features to the numbers that a network takes, by what was fitted to training rows.

A fitted preparation is plain parameters, so that it can be written down and applied elsewhere, to
new rows, with the same bits. Images and texts need none: the network's own layers and vocabulary
take them as they are.
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
"""Nested dictionaries and lists of plain values and of arrays."""

T = TypeVar("T")

FEW = 40
"""A text column with fewer distinct values in training is one of categories."""
NEGLIGIBLE = 1e-4
"""Of the widest text component: the accuracy of a truncated SVD in float32 and randomised."""


@dataclass(frozen=True)
class Number:
    """A column of numbers, as they are."""

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
    """In which the dates were written; None: they came as dates."""
    zone: str | None
    hours: bool

    @classmethod
    def fit(cls, name: str, train: pd.Series, format: str | None) -> "Date":
        """What training rows have of a time zone and of hours."""
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
    """A column of categories: 1 in the place of its own, 0 elsewhere; 0 everywhere if unknown."""

    kind: ClassVar[str] = "category"
    name: str
    categories: list[str | None]
    """None: missing."""

    @classmethod
    def fit(cls, name: str, train: pd.Series) -> "Category":
        """The categories of training rows, sorted."""
        found = set(_texts(train))
        return cls(name, [*sorted(found - {None}), *({None} & found)])  # type: ignore[type-var]

    def __call__(self, column: pd.Series) -> Doubles:
        place = {category: number for number, category in enumerate(self.categories)}
        codes = np.array([place.get(text, -1) for text in _texts(column)], dtype=np.int64)
        flags: Doubles = (codes[:, None] == np.arange(len(place))).astype(np.float64)
        return flags


@dataclass(frozen=True)
class Text:
    """A column of other texts: components of their TF-IDF of character fragments.

    If texts have fewer independent fragments than components are asked for, the directions of the
    last ones are arbitrary: hardly anything lies along them in training, and anything elsewhere.
    These components are zero.
    """

    kind: ClassVar[str] = "text"
    name: str
    fragments: list[str]
    idf: Doubles
    components: npt.NDArray[np.float32]
    """Shape (components, fragments)."""

    @classmethod
    def fit(cls, name: str, train: pd.Series, random_state: int) -> "Text":
        """The fragments of training rows, and their components by skrub."""
        from skrub import StringEncoder  # half a second and 50 MB that only texts in tables need

        encoder = StringEncoder(random_state=random_state)
        texts = pd.Series([text or "" for text in _texts(train)], name=name, dtype="str")
        with warnings.catch_warnings():
            # A column of few distinct fragments gets fewer than 30 components.
            warnings.filterwarnings("ignore", message="The matrix shape is", category=UserWarning)
            spread = encoder.fit_transform(texts).to_numpy().std(axis=0)
        vectorizer = encoder.vectorizer_
        number_of = vectorizer.vocabulary_
        if hasattr(encoder, "tsvd_"):
            components = encoder.tsvd_.components_
        else:  # so few fragments that the first of them stand for themselves
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
    """The columns of a table as numbers on one scale.

    Missing numbers become the median, with a column that says so where training rows have any.

    Attributes:
        columns: Those that vary in training.
        median: Of each column of numbers that these become.
        missing: Which of them have gaps in training, as numbers.
        scale: Of all together.
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
            train: Columns are float64, dates or text. Its ``attrs["date_formats"]`` says in which
                format the dates of a column were written, if they were text.
            random_state: Of the components of texts.

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
        with threadpool_limits(limits=1):  # sums in another order differ in their last bits
            for name in train.columns[varies]:
                column = train[name]
                if pd.api.types.is_numeric_dtype(column):
                    columns.append(Number(name))
                elif pd.api.types.is_datetime64_any_dtype(column):
                    columns.append(Date.fit(name, column, formats.get(name)))
                elif column.nunique() < FEW:
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
    """Rows of numbers, each column on its own scale."""

    kind: ClassVar[str] = "columns"
    scale: ColumnScale

    def __call__(self, rows: npt.NDArray[np.float32]) -> Inputs:
        return self.scale(rows)


@dataclass(frozen=True)
class Arrays:
    """Arrays of more than two dimensions, all values on one scale."""

    kind: ClassVar[str] = "arrays"
    scale: CommonScale

    def __call__(self, rows: npt.NDArray[np.float32]) -> Inputs:
        return self.scale(rows)


Preparation = Table | Columns | Arrays


def fit(train: pd.DataFrame | npt.NDArray[np.float32], random_state: int) -> Preparation:
    """The preparation of rows like `train`; see :meth:`Table.fit`."""
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
    """The preparation that :func:`state` describes.

    Raises:
        KeyError, TypeError: It describes none.
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
