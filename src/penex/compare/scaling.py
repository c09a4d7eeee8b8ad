"""Numbers on a scale that a network can learn from, fitted on the training part alone.

Standardisation alone is not safe: a column that hardly varies in training is blown up elsewhere,
and one wild value in training flattens all others. Here, columns are standardised robustly and then
bounded, so whatever stands in the other parts, a network sees at most :data:`BOUND`.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.preprocessing import StandardScaler

Floats = npt.NDArray[np.floating]

BOUND = 5.0
"""No value of a column lies farther from 0, in standard deviations."""
PIXEL_BOUND = 100.0
"""The same for arrays of more than two dimensions, whose values share one scale."""
OUTLIER = 10.0
"""Values farther from the median, in widths of the middle half, count as this far for the scale."""
NEGLIGIBLE = 1e-4
"""Of the widest component: the accuracy of a truncated SVD in float32 and randomised."""
_BLOCK = 256
"""Columns at a time: float64 copies of all would be twice a large float32 array."""


def scale_columns(parts: Sequence[Floats]) -> list[npt.NDArray[np.float32]]:
    """Columns with mean 0 and standard deviation 1 in training, but for outliers, and bounded.

    A column is centred and scaled by mean and standard deviation after values beyond
    :data:`OUTLIER` are clipped; then z becomes z / sqrt(1 + (z / BOUND)²), which keeps the order
    (a smooth clipping, as in RealMLP, arXiv 2407.04491). A column that is constant in the training
    part, up to rounding, is 0 everywhere, because its scale is unknown.

    Args:
        parts: Arrays of shape (n, D), finite and within ±3.4e38, the training part first.

    Returns:
        Arrays of the same shapes, all values within ±:data:`BOUND`.
    """
    scaled = [np.empty(part.shape, np.float32) for part in parts]
    for first in range(0, parts[0].shape[1], _BLOCK):
        block = np.s_[:, first : first + _BLOCK]
        train = parts[0][block].astype(np.float64)
        median, width = _centre_and_width(train)
        with np.errstate(over="ignore"):  # infinity ends at the bound
            core = np.clip((train - median) / width, -OUTLIER, OUTLIER)
            mean, std = core.mean(axis=0), core.std(axis=0)
            std[np.isinf(width)] = 1
            for part, out in zip(parts, scaled, strict=True):
                z = ((part[block].astype(np.float64) - median) / width - mean) / std
                out[block] = BOUND * np.sin(np.arctan(z / BOUND))  # the formula, for infinity too
    return scaled


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


def scale_as_a_whole(parts: Sequence[Floats]) -> list[npt.NDArray[np.float32]]:
    """Arrays of any shape with one mean and one scale for all values, and bounded.

    So are images: a pixel that hardly varies in training would otherwise be blown up elsewhere.

    Args:
        parts: Finite arrays, the training part first.

    Returns:
        Arrays of the same shapes, all values within ±:data:`PIXEL_BOUND`; 0 everywhere if the
        training part is constant.
    """
    if np.ptp(parts[0]) == 0:
        return [np.zeros(part.shape, np.float32) for part in parts]
    scaler = StandardScaler().fit(parts[0].reshape(-1, 1))
    with np.errstate(over="ignore"):
        scaled = [scaler.transform(part.reshape(-1, 1)).reshape(part.shape) for part in parts]
    return [np.clip(part, -PIXEL_BOUND, PIXEL_BOUND, dtype=np.float32) for part in scaled]


class Components(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Sets components of a truncated SVD to zero that are no more than rounding errors in training.

    If texts have fewer independent fragments than components are asked for, the directions of the
    last ones are arbitrary: hardly anything lies along them in training, and anything elsewhere.
    """

    def fit(self, X: pd.DataFrame, y: object = None) -> "Components":  # noqa: N803
        """Find the components that vary."""
        spread = X.std()
        self.varies_ = spread > NEGLIGIBLE * spread.max()
        return self

    def transform(self, X: pd.DataFrame) -> pd.DataFrame:  # noqa: N803
        """Set the others to zero."""
        kept: pd.DataFrame = X * self.varies_
        return kept
