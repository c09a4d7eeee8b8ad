"""The description of a table's columns, and warnings about them, before training."""

import numpy as np
import pandas as pd
import pytest

from penex.compare.data.columns import (
    LEAK_ACCURACY,
    describe_columns,
    is_identifier,
    single_accuracy,
    warnings,
)
from penex.compare.data.dataset import Dataset

N = 300
RNG = np.random.default_rng(5)
TARGET = np.arange(N) % 3


def table(**columns: object) -> Dataset:
    frame = pd.DataFrame(columns)
    for name in frame:
        if frame[name].dtype.kind in "iu":
            frame[name] = frame[name].astype(np.float64)
    return Dataset("t", frame, TARGET, ("a", "b", "c"), "", left_out={"who": "group", "z": "drop"})


def test_kinds_of_columns() -> None:
    data = table(
        x=RNG.normal(size=N),
        n=np.arange(N) % 7,
        kind=np.array(["p", "q"])[np.arange(N) % 2],
        free=[f"text {i}" for i in range(N)],
        day=pd.date_range("2024-01-01", periods=N),
    )
    assert describe_columns(data) == [
        "Used as numbers: 'x', 'n'",
        "Used as date: 'day'",
        "Used as category: 'kind'",
        "Used as text: 'free'",
        "No feature (group): 'who'",
        "No feature (drop): 'z'",
    ]


def test_only_tables_have_columns() -> None:
    data = Dataset("t", np.zeros((N, 2), np.float32), TARGET, ("a", "b", "c"), "")
    assert describe_columns(data) == warnings(data) == []


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (RNG.permutation(N) + 1000.0, True),
        (RNG.normal(size=N), False),  # distinct, but no whole numbers
        (np.arange(N) // 2 * 1.0, False),
        (np.where(np.arange(N) == 3, np.nan, np.arange(N)), False),
        (np.arange(10.0), False),  # distinct by accident
        ([f"A{i}" for i in range(N)], True),
        ([f"Smith, Mrs. Jane the {i}th" for i in range(N)], True),
        (["long text " * 20 + str(i) for i in range(N)], False),
        (["x"] * N, False),
        (pd.date_range("2024-01-01", periods=N), False),
    ],
)
def test_identifiers(column: object, expected: bool) -> None:
    assert is_identifier(pd.Series(column)) is expected


@pytest.mark.parametrize(
    ("column", "telling"),
    [
        (TARGET * 2.0 + RNG.normal(size=N) * 0.1, True),
        (np.where(TARGET == 1, np.nan, TARGET), True),  # missing in one class alone
        (np.array(["z", "u", "k"])[TARGET], True),
        (pd.Timestamp("2024-01-01") + pd.to_timedelta(TARGET * 100 + np.arange(N) % 50, "D"), True),
        (TARGET + RNG.normal(size=N) * 0.5, False),
        (RNG.normal(size=N), False),
        ([f"A{i}" for i in range(N)], False),  # an identifier says nothing of other rows
        (np.zeros(N), False),
    ],
)
def test_columns_that_reveal_the_class(column: object, telling: bool) -> None:
    series = pd.Series(column)
    assert (single_accuracy(series, TARGET) >= LEAK_ACCURACY) is telling


def test_a_frequent_class_is_no_leak() -> None:
    """Accuracy would be 0.99 for any column."""
    target = (np.arange(1000) % 100 == 0).astype(np.int64)
    column = pd.Series(np.random.default_rng(0).normal(size=1000))
    assert single_accuracy(column, target) < 0.7


def test_single_accuracy_with_classes_of_one_row() -> None:
    assert single_accuracy(pd.Series(np.arange(40.0)), np.arange(40)) == 0


def test_warnings_name_the_option() -> None:
    lines = warnings(table(x=RNG.normal(size=N), id=np.arange(N), leak=TARGET, name="k"))
    assert len(lines) == 2
    assert "identifiers" in lines[0]
    assert lines[0].endswith("--drop 'id'")
    assert "'leak'" in lines[1]
    assert lines[1].endswith("--drop 'leak'")
