"""Scaling: the input of a network is bounded, whatever a column contains."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.preprocessing import StandardScaler

from penex.compare.config import Config
from penex.compare.data.dataset import Dataset
from penex.compare.data.scaling import BOUND, PIXEL_BOUND, ColumnScale, CommonScale
from penex.compare.data.split import draw_rows, split

LARGEST = float(np.finfo(np.float32).max)
Column = NDArray[Any]


def scaled(train: Column, held_out: Column) -> tuple[Column, Column]:
    """The two parts of one column."""
    scale = ColumnScale.fit(train[:, None])
    return scale(train[:, None])[:, 0], scale(held_out[:, None])[:, 0]


def normal(n: int = 400) -> Column:
    return np.random.default_rng(0).normal(size=n)


values = st.floats(-LARGEST, LARGEST) | st.sampled_from([0.0, 1.0, 1e-300, 5e-324, 1e30])


@given(st.lists(values, min_size=1, max_size=30), st.lists(values, min_size=2, max_size=30))
def test_every_value_is_finite_and_bounded_and_order_is_kept(
    train: list[float], held_out: list[float]
) -> None:
    first, second = scaled(np.array(train), np.array(held_out))
    together = np.concatenate([first, second])
    assert together.dtype == np.float32
    assert np.isfinite(together).all()
    assert (np.abs(together) <= BOUND).all()
    order = np.argsort(np.concatenate([train, held_out]), kind="stable")
    assert (np.diff(together[order]) >= 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_without_outliers_it_is_standardisation_softly_clipped(dtype: type) -> None:
    rng = np.random.default_rng(1)
    # More columns than are done at a time; rare and frequent flags among them.
    train, held_out = (
        np.concatenate(
            [rng.normal(3, 7, (n, 300)), rng.random((n, 40)) < np.linspace(0.05, 0.95, 40)], axis=1
        ).astype(dtype)
        for n in (200, 31)
    )
    scaler = StandardScaler().fit(train.astype(np.float64))
    scale = ColumnScale.fit(train)
    for part in (train, held_out):
        ours = scale(part)
        z = scaler.transform(part.astype(np.float64))
        np.testing.assert_allclose(ours, z / np.sqrt(1 + (z / BOUND) ** 2), rtol=1e-4, atol=1e-5)


@given(st.sampled_from([1e-30, 1e-9, 1e-3, 1e20, 1e37]), st.sampled_from([-1.0, 1.0]))
def test_units_do_not_matter(unit: float, sign: float) -> None:
    train, held_out = normal(50), normal(80)[50:]
    for one, other in zip(
        scaled(train, held_out), scaled(sign * unit * train, sign * unit * held_out), strict=True
    ):
        np.testing.assert_allclose(sign * other, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("outlier", [1e3, 1e30, LARGEST])
def test_an_outlier_in_training_does_not_compress_the_rest(outlier: float) -> None:
    clean, _ = scaled(normal(), normal())
    train = np.append(normal(), outlier)
    first, _ = scaled(train, train)
    assert first[-1] > 4
    np.testing.assert_allclose(np.std(first[:-1]), np.std(clean), rtol=0.25)


def test_heavy_tails_do_not_compress_the_bulk() -> None:
    train = np.random.default_rng(0).standard_cauchy(2000)
    first, _ = scaled(train, train)
    middle = first[np.abs(train) < 1]  # half of the values
    assert middle.max() - middle.min() > 0.3


@pytest.mark.parametrize("constant", [0.0, 0.1, -1e30, 1e-300])
def test_constant_in_training_is_zero_everywhere(constant: float) -> None:
    train = np.full(101, constant)
    first, second = scaled(train, np.array([constant, 1.0, -LARGEST]))
    assert not first.any()
    assert not second.any()
    # Rounding is no variation.
    train[::3] = np.nextafter(constant, 1)
    assert constant == 0 or not scaled(train, train)[1].any()


@pytest.mark.parametrize("odd", [1, 3])
def test_nearly_constant_in_training(odd: int) -> None:
    train = 5.0 + 1e-8 * normal(100)
    assert np.abs(scaled(train, np.array([6.0, -1e6]))[1]).max() <= BOUND
    # Flags that hardly any training row has stay apart from the others, and bounded.
    train = np.zeros(1000)
    train[:odd] = 1.0
    off, on = scaled(train, np.array([0.0, 1.0]))[1]
    assert abs(off) < 0.1
    assert 4 < on <= BOUND


def test_a_large_offset_loses_no_precision() -> None:
    train = 1e9 + np.arange(90.0)
    assert len(np.unique(scaled(train, train)[0])) == 90


@pytest.mark.parametrize("shape", [(4, 4), (3, 5, 5)])
def test_arrays_as_a_whole(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    train, held_out = (rng.normal(3, 2, (n, *shape)).astype(np.float32) for n in (50, 7))
    held_out[0] = LARGEST
    scale = CommonScale.fit(train)
    first, second = scale(train), scale(held_out)
    assert (first.dtype, first.shape, second.shape) == (np.float32, train.shape, held_out.shape)
    np.testing.assert_allclose(first, (train - train.mean()) / train.std(), rtol=1e-4, atol=1e-5)
    assert (second[0] == PIXEL_BOUND).all()
    constant = CommonScale.fit(np.full_like(train, 3))
    assert not constant(train).any()
    assert not constant(held_out).any()


def test_texts_of_few_fragments_in_training() -> None:
    """Components of their truncated SVD beyond its rank are rounding errors in training."""
    words, n = [letter * 5 for letter in "abcdefgh"], 400
    texts = np.array([f"{words[i % 8]} {words[i // 8 % 8]}" for i in range(n)], dtype=object)
    table = pd.DataFrame({"text": texts})
    data = Dataset("pairs", table, np.arange(n) % 2, ("0", "1"), "")
    test = draw_rows(data, 0, Config())[2]
    # The same fragments in words that training does not have.
    texts[test] = [words[i % 8][:3] + words[(i + 3) % 8][:4] for i in range(len(test))]
    x = split(data, seed=0, config=Config())
    significant = x.train[0].any(axis=0)
    assert x.train[0].shape[1] == 30
    assert 5 < significant.sum() < 30
    assert not x.test[0][:, ~significant].any()
    assert x.test[0].any()
    assert np.abs(x.test[0]).max() <= BOUND
