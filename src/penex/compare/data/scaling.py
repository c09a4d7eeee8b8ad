"""Numbers on a scale that a network can learn from, fitted on the training part alone.

Standardisation alone is not safe: a column that hardly varies in training is blown up elsewhere,
and one wild value in training flattens all others. Here, columns are standardised robustly and then
bounded, so whatever stands in the other parts, a network sees at most :data:`BOUND`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.preprocessing import StandardScaler

Floats = npt.NDArray[np.floating]

BOUND = 5.0
"""No value of a column lies farther from 0, in standard deviations."""
PIXEL_BOUND = 100.0
"""The same for arrays of more than two dimensions, whose values share one scale."""
OUTLIER = 10.0
"""Values farther from the median, in widths of the middle half, count as this far for the scale."""
_BLOCK = 256
"""Columns at a time: float64 copies of all would be twice a large float32 array."""


@dataclass(frozen=True)
class ColumnScale:
    """Columns with mean 0 and standard deviation 1 in training, but for outliers, and bounded.

    A column is centred and scaled by mean and standard deviation after values beyond
    :data:`OUTLIER` are clipped; then z becomes z / sqrt(1 + (z / BOUND)²), which keeps the order
    (a smooth clipping, as in RealMLP, arXiv 2407.04491). A column that is constant in the training
    part, up to rounding, is 0 everywhere, because its scale is unknown.

    Attributes:
        median: Of each of the D columns, float64.
        width: Interquartile ranges; infinite where a column is constant.
        mean: Of the clipped columns, in widths from the median.
        std: Their standard deviations.
    """

    median: Floats
    width: Floats
    mean: Floats
    std: Floats

    @classmethod
    def fit(cls, train: Floats) -> "ColumnScale":
        """The scale of training rows, an array of shape (n, D), finite and within ±3.4e38."""
        blocks = [_column_statistics(train[:, block]) for block in _blocks(train.shape[1])]
        return cls(*map(np.concatenate, zip(*blocks, strict=True)))

    def __call__(self, rows: Floats) -> npt.NDArray[np.float32]:
        """Rows of shape (n, D) on this scale, all values within ±:data:`BOUND`."""
        scaled = np.empty(rows.shape, np.float32)
        with np.errstate(over="ignore"):  # infinity ends at the bound
            for block in _blocks(rows.shape[1]):
                z = (rows[:, block].astype(np.float64) - self.median[block]) / self.width[block]
                z = (z - self.mean[block]) / self.std[block]
                # The formula, for infinity too.
                scaled[:, block] = BOUND * np.sin(np.arctan(z / BOUND))
        return scaled


def _blocks(columns: int) -> Iterator[slice]:
    return (slice(first, first + _BLOCK) for first in range(0, columns, _BLOCK))


def _column_statistics(train: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    columns = train.astype(np.float64)
    median, width = _centre_and_width(columns)
    with np.errstate(over="ignore"):
        core = np.clip((columns - median) / width, -OUTLIER, OUTLIER)
    mean, std = core.mean(axis=0), core.std(axis=0)
    std[np.isinf(width)] = 1
    return median, width, mean, std


def _centre_and_width(train: npt.NDArray[np.float64]) -> tuple[Floats, Floats]:
    """Median and interquartile range of each column, the range being infinite if it is constant.

    Where more than half of the values are equal, so that the interquartile range may be 0, the
    median distance of the others from the median stands in its place.
    """
    low, median, high = np.quantile(train, (0.25, 0.5, 0.75), axis=0)
    width = high - low
    for column in np.flatnonzero(width == 0):
        distances = np.abs(train[:, column] - median[column])
        if distances.any():
            width[column] = np.median(distances[distances > 0])
    rounding = 8 * np.finfo(np.float64).eps * np.abs(train).max(axis=0)
    width[np.ptp(train, axis=0) <= rounding] = np.inf
    return median, width


@dataclass(frozen=True)
class CommonScale:
    """One mean and one scale for all values of arrays of any shape, and a bound.

    So are images: a pixel that hardly varies in training would otherwise be blown up elsewhere.

    Attributes:
        mean: Of all training values.
        std: Their standard deviation; 0 where they are constant, which makes 0 of every value.
    """

    mean: float
    std: float

    @classmethod
    def fit(cls, train: Floats) -> "CommonScale":
        """The scale of finite training rows."""
        if np.ptp(train) == 0:
            return cls(0.0, 0.0)
        scaler = StandardScaler().fit(train.reshape(-1, 1))
        return cls(float(scaler.mean_[0]), float(scaler.scale_[0]))

    def __call__(self, rows: Floats) -> npt.NDArray[np.float32]:
        """Rows of the same shape, all values within ±:data:`PIXEL_BOUND`."""
        if self.std == 0:
            return np.zeros(rows.shape, np.float32)
        scaled = rows.copy()
        with np.errstate(over="ignore"):  # in place: computed in float64 without a copy in it
            scaled -= np.float64(self.mean)
            scaled /= np.float64(self.std)
        bounded: npt.NDArray[np.float32] = np.clip(
            scaled, -PIXEL_BOUND, PIXEL_BOUND, dtype=np.float32
        )
        return bounded
