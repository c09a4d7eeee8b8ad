"""Scaling of numerical features for neural networks, fitted on the training part alone.

Standardisation alone is not safe: a column that hardly varies in training may take huge values
elsewhere, and one outlier in training compresses all other values. Here, columns are standardised
robustly and then bounded, so that no input of the network exceeds :data:`BOUND`, whatever the other
parts contain.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.preprocessing import StandardScaler

Floats = npt.NDArray[np.floating]

BOUND = 5.0
"""The largest absolute value of a scaled column, in standard deviations."""
PIXEL_BOUND = 100.0
"""The same for arrays of more than two dimensions, whose values share one scale."""
OUTLIER = 10.0
"""The distance from the median, in interquartile ranges, to which values are clipped to fit the
scale."""
_BLOCK = 256
"""Columns scaled at a time: a float64 copy of all would be twice as large as a float32 array."""


@dataclass(frozen=True)
class ColumnScale:
    """Scale columns to mean 0 and standard deviation 1 in training, except for outliers; bounded.

    A column is centred and scaled by mean and standard deviation after values beyond
    :data:`OUTLIER` are clipped; then z becomes z / sqrt(1 + (z / BOUND)²), which keeps the order
    (a smooth clipping, as in RealMLP, arXiv 2407.04491). A column that is constant in the training
    part, up to rounding, is 0 everywhere, because its scale is unknown.

    Attributes:
        median: Medians of the D columns, float64.
        width: Interquartile ranges; infinite where a column is constant.
        mean: Means of the clipped columns, in widths from the median.
        std: Standard deviations of the clipped columns, in widths.
    """

    median: Floats
    width: Floats
    mean: Floats
    std: Floats

    @classmethod
    def fit(cls, train: Floats) -> "ColumnScale":
        """Fit the scale to training rows, an array of shape (n, D), finite and within ±3.4e38."""
        blocks = [_column_statistics(train[:, block]) for block in _blocks(train.shape[1])]
        return cls(*map(np.concatenate, zip(*blocks, strict=True)))

    def __call__(self, rows: Floats) -> npt.NDArray[np.float32]:
        """Scale rows of shape (n, D); all values are then within ±:data:`BOUND`."""
        scaled = np.empty(rows.shape, np.float32)
        with np.errstate(over="ignore"):  # infinity is mapped to the bound
            for block in _blocks(rows.shape[1]):
                z = (rows[:, block].astype(np.float64) - self.median[block]) / self.width[block]
                z = (z - self.mean[block]) / self.std[block]
                # z / sqrt(1 + (z / BOUND)²), in a form that is also right for infinity.
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
    """Median and interquartile range of each column; the range of a constant column is infinite.

    If the interquartile range is 0, because at least half of the values are equal, it is replaced
    by the median distance of the other values from the median.
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
    """Scale all values of arrays of any shape by one mean and one standard deviation; bounded.

    This suits images: a pixel that hardly varies in training could take huge values elsewhere if it
    had its own scale.

    Attributes:
        mean: Mean of all training values.
        std: Their standard deviation; 0 if they are constant, and then all scaled values are 0.
    """

    mean: float
    std: float

    @classmethod
    def fit(cls, train: Floats) -> "CommonScale":
        """Fit the scale to finite training rows."""
        if np.ptp(train) == 0:
            return cls(0.0, 0.0)
        scaler = StandardScaler().fit(train.reshape(-1, 1))
        return cls(float(scaler.mean_[0]), float(scaler.scale_[0]))

    def __call__(self, rows: Floats) -> npt.NDArray[np.float32]:
        """Scale rows; all values are then within ±:data:`PIXEL_BOUND`."""
        if self.std == 0:
            return np.zeros(rows.shape, np.float32)
        scaled = rows.copy()
        with np.errstate(over="ignore"):  # in place: computed in float64 without a float64 copy
            scaled -= np.float64(self.mean)
            scaled /= np.float64(self.std)
        bounded: npt.NDArray[np.float32] = np.clip(
            scaled, -PIXEL_BOUND, PIXEL_BOUND, dtype=np.float32
        )
        return bounded
