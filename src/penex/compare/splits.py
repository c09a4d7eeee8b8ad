"""One seed's view of a data set: training, validation and test rows as arrays for a model.

Whatever is random depends on the seed alone, so all losses see the same rows, the same features and
the same wrong labels; whatever is fitted (vocabularies, means, scales) sees training rows only.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.compose import ColumnTransformer, make_column_selector
from sklearn.impute import SimpleImputer
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from threadpoolctl import threadpool_limits

from penex.compare.data import Dataset
from penex.compare.errors import CompareError

Part = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]

# One independent random stream per decision, so that none shifts another.
_TEST, _TRAIN, _NOISE, _ENCODER = range(4)


@dataclass(frozen=True)
class Split:
    """Rows of one seed, ready for a model.

    Attributes:
        train: X, float32 of shape (n, ...), and y, int64 of shape (n,), with label noise if any.
        validation: The same for validation rows, labels as given.
        test: The same for test rows, labels as given.
    """

    train: Part
    validation: Part
    test: Part


def split(
    dataset: Dataset,
    *,
    seed: int,
    train_size: int | None,
    validation_size: float,
    test_size: float,
    label_noise: float,
) -> Split:
    """Draw stratified parts and prepare their features with the statistics of the training rows.

    Test rows are drawn first and depend on seed and test_size only. Columns are standardised,
    arrays of more than two dimensions (images) as a whole; a column that is constant in the
    training rows is 0 everywhere, because its scale is unknown. In
    tables, categories become one-hot columns (or 30 text components from 40 categories on), dates
    their year, month, day, hour and seconds; missing numbers become the mean, with a column that
    says so. Categories not met in training become zeros.

    Args:
        dataset: N rows of K classes.
        seed: Non-negative.
        train_size: Number n of training rows; None: all that test and validation leave.
        validation_size: Share v of validation rows among training and validation rows, in (0, 1).
            With train_size given that is round(n v / (1 - v)) rows, and the rest stays unused.
        test_size: Share of test rows among all rows, in (0, 1).
        label_noise: Share of training rows, in [0, 1): round(label_noise n) of them get another
            class, each of the K - 1 others being equally likely.

    Returns:
        C-contiguous, finite arrays. Every part holds every class (training: before the noise).

    Raises:
        CompareError: An argument is out of range, or the rows do not suffice for such parts.
    """
    for name, share in (("validation_size", validation_size), ("test_size", test_size)):
        if not 0 < share < 1:
            raise CompareError(f"{name} must be between 0 and 1, both excluded; got {share}.")
    if not 0 <= label_noise < 1:
        raise CompareError(f"label_noise must be at least 0 and below 1; got {label_noise}.")
    if seed < 0:
        raise CompareError(f"seed must not be negative; got {seed}.")

    rows = draw_rows(dataset, seed, train_size, validation_size, test_size)
    arrays = _prepare(dataset, rows, seed)
    train_y, validation_y, test_y = (dataset.target[part] for part in rows)
    train_y = _with_noise(train_y, label_noise, len(dataset.classes), seed)
    return Split((arrays[0], train_y), (arrays[1], validation_y), (arrays[2], test_y))


def draw_rows(
    dataset: Dataset, seed: int, train_size: int | None, validation_size: float, test_size: float
) -> list[npt.NDArray[np.int64]]:
    """Row numbers of the training, validation and test part, in shuffled order; see `split`."""
    total, k = len(dataset.target), len(dataset.classes)
    n_test = round(test_size * total)
    rest = total - n_test
    if train_size is None:
        n_validation = round(validation_size * rest)
        n_train = rest - n_validation
    else:
        ratio = validation_size / (1 - validation_size)
        n_train, n_validation = train_size, round(train_size * ratio)
        if n_train + n_validation > rest:
            most = next(n for n in range(rest, -1, -1) if n + round(n * ratio) <= rest)
            raise CompareError(
                f"train_size must be at most {most}; got {train_size}. Of {total} rows of "
                f"{dataset.name}, {n_test} are for test, and {train_size} training rows need "
                f"{n_validation} for validation (validation_size {validation_size})."
            )
    sizes = {"training": n_train, "validation": n_validation, "test": n_test}
    for name, size in sizes.items():
        if size < k:
            raise CompareError(
                f"{dataset.name} has {k} classes, so each part needs at least {k} rows; the {name} "
                f"part would have {size} (training {n_train}, validation {n_validation}, test "
                f"{n_test}). Change train_size, validation_size or test_size."
            )

    everything = np.arange(total)
    remaining, test = _stratified(dataset, everything, (rest, n_test), (seed, _TEST))
    train, validation = _stratified(dataset, remaining, (n_train, n_validation), (seed, _TRAIN))
    rows = [train, validation, test]
    for name, part in zip(sizes, rows, strict=True):
        absent = np.setdiff1d(dataset.target, dataset.target[part])
        if absent.size:
            raise _too_rare(dataset, absent, f"the {name} part ({len(part)} rows)")
    return rows


def _stratified(
    dataset: Dataset,
    rows: npt.NDArray[np.int64],
    sizes: tuple[int, int],
    stream: tuple[int, int],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Two disjoint subsets of rows, of the given sizes, with the class shares of rows."""
    labels = dataset.target[rows]
    counts = np.bincount(labels, minlength=len(dataset.classes))
    if (rare := np.flatnonzero(counts < 2)).size:
        raise _too_rare(dataset, rare, "both training and validation")
    shuffle = StratifiedShuffleSplit(
        n_splits=1,
        train_size=sizes[0],
        test_size=sizes[1],
        random_state=int(np.random.default_rng(stream).integers(2**31)),
    )
    first, second = next(shuffle.split(labels, labels))
    return rows[first], rows[second]


def _too_rare(dataset: Dataset, codes: npt.NDArray[np.int64], where: str) -> CompareError:
    counts = np.bincount(dataset.target)
    listed = ", ".join(f"{dataset.classes[k]!r} ({counts[k]} rows)" for k in codes[:10])
    return CompareError(
        f"{dataset.name}: too few rows of {listed}{', ...' if codes.size > 10 else ''} to have one "
        f"in {where}. Add rows, merge or remove the class, or enlarge the part."
    )


def _with_noise(
    y: npt.NDArray[np.int64], label_noise: float, k: int, seed: int
) -> npt.NDArray[np.int64]:
    """Labels of which round(label_noise n) have moved to another of the k classes."""
    rng = np.random.default_rng((seed, _NOISE))
    # Drawn for all rows first, so that the rows of a smaller noise are among those of a larger one.
    order, shift = rng.permutation(len(y)), rng.integers(1, k, size=len(y))
    noisy = order[: round(label_noise * len(y))]
    y = y.copy()
    y[noisy] = (y[noisy] + shift[noisy]) % k
    return y


def _prepare(
    dataset: Dataset, rows: Sequence[npt.NDArray[np.int64]], seed: int
) -> list[npt.NDArray[np.float32]]:
    """Standardised float32 features of each part, fitted on the first."""
    features = dataset.features
    parts: Sequence[npt.NDArray[np.floating]]
    if isinstance(features, pd.DataFrame):
        parts = _encode_table(dataset.name, [features.iloc[part] for part in rows], seed)
    else:
        # Columns have a scale each; the pixels of an image, more than two dimensions, share one,
        # as one that hardly varies in training would otherwise be blown up elsewhere.
        parts = [features[part] for part in rows]
        parts = [
            part.reshape(len(part), -1) if part.ndim == 2 else part.reshape(-1, 1) for part in parts
        ]

    scaler = StandardScaler().fit(parts[0])
    constant = np.ptp(parts[0], axis=0) == 0
    shape = parts[0].shape[1:] if isinstance(features, pd.DataFrame) else features.shape[1:]
    prepared = []
    for name, part in zip(("training", "validation", "test"), parts, strict=True):
        with np.errstate(over="ignore"):
            scaled = scaler.transform(part).astype(np.float32)
        scaled[:, constant] = 0
        if not np.isfinite(scaled).all():
            raise CompareError(
                f"{dataset.name}, seed {seed}: a feature of the {name} part lies too far from "
                "the training rows for float32 after standardisation. Look for wild values."
            )
        prepared.append(np.ascontiguousarray(scaled.reshape(-1, *shape)))
    return prepared


def _encode_table(
    name: str, parts: Sequence[pd.DataFrame], seed: int
) -> list[npt.NDArray[np.float64]]:
    """Columns of each part as numbers without gaps, not yet scaled, fitted on the first part."""
    varies = parts[0].nunique(dropna=False) > 1
    if not varies.any():
        raise CompareError(
            f"{name}, seed {seed}: every feature column is constant or empty in the "
            f"{len(parts[0])} training rows; nothing to learn from. Use more training rows."
        )
    kept = [part.loc[:, varies] for part in parts]
    encoder = _table_encoder(np.random.default_rng((seed, _ENCODER)).integers(2**31).item())
    with warnings.catch_warnings(), threadpool_limits(limits=1):
        # One thread: sums of the text components in another order differ in their last bits.
        # The warning: a text column of few distinct fragments gets fewer than 30 components.
        warnings.filterwarnings("ignore", message="The matrix shape is", category=UserWarning)
        return [encoder.fit_transform(kept[0]), *(encoder.transform(part) for part in kept[1:])]


def _table_encoder(random_state: int) -> Pipeline:
    """Numbers as they are, in float64; dates and text by skrub; gaps filled with the mean."""
    # Half a second and 50 MB that array data need not pay in every process.
    from skrub import StringEncoder, TableVectorizer

    dates_and_text = TableVectorizer(
        # Without skrub's drop="if_binary", which makes an unknown category look like a known one.
        low_cardinality=OneHotEncoder(
            sparse_output=False, dtype=np.float32, handle_unknown="ignore"
        ),
        high_cardinality=StringEncoder(random_state=random_state),
    )
    columns = ColumnTransformer([
        ("numbers", "passthrough", make_column_selector(dtype_include="number")),
        ("dates and text", dates_and_text, make_column_selector(dtype_exclude="number")),
    ])  # fmt: skip
    return make_pipeline(columns, SimpleImputer(add_indicator=True))
