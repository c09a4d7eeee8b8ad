"""The training, validation and test rows of one seed, ready for a model.

Everything random depends on the seed alone, so all losses see the same rows, the same features and
the same wrong labels; everything fitted (vocabularies, means, scales) sees training rows only.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold, StratifiedShuffleSplit

from penex.compare.config import Config
from penex.compare.data.dataset import Dataset, Texts
from penex.compare.data.images import Images
from penex.compare.data.preprocessing import Preparation, fit
from penex.compare.errors import CompareError, named

Rows = npt.NDArray[np.int64]
Inputs = npt.NDArray[np.float32] | Images | list[str]
Part = tuple[Inputs, npt.NDArray[np.int64]]

# An independent random stream for each decision, so that none affects another.
_TEST, _TRAIN, _NOISE, _ENCODER, _VALIDATION_NOISE = range(5)
_FOLDS = 20
"""The most sets of groups into which rows are divided; a part consists of whole sets."""


@dataclass(frozen=True)
class Split:
    """Rows of one seed, ready for a model.

    Attributes:
        train: X and y. y is int64 of shape (n,), with label noise if any. X is scaled float32 of
            shape (n, ...) for numbers, a view of the images for images, and a list for texts.
        validation: The same for validation rows, with label noise if config.noise_parts says so.
        test: The same for test rows, with the labels as given.
        preparation: The fitted transform from features to X; None for images and texts.
    """

    train: Part
    validation: Part
    test: Part
    preparation: Preparation | None


def split(dataset: Dataset, *, seed: int, config: Config, refit: bool = False) -> Split:
    """Take or draw the parts, and prepare features with the statistics of the training rows.

    Parts that the data set comes with are used as they are; missing parts are drawn, stratified by
    class. Test rows are drawn first and depend on seed and test_size only; if all seeds share them
    (``Config.shares_test_rows``), they are those of seed 0.

    If rows have groups, whole groups are drawn, stratified and in the requested sizes as far as the
    groups allow. If rows have a time, the newest rows are the test part and the newest of the
    others the validation part; rows of the same time stay together, and only the training rows are
    drawn, if train_size is given.

    Columns are standardised robustly and bounded
    (:class:`~penex.compare.data.scaling.ColumnScale`); arrays of more than two dimensions are
    scaled as a whole. In tables, categories become one-hot columns (or 30 text components if there
    are 40 categories or more), and dates become year, month, day, hour and seconds. Missing numbers
    are replaced by the median and marked in an additional column. Categories that do not occur in
    training become zeros. Images and texts are left to the model.

    Args:
        dataset: N rows of K classes.
        seed: Non-negative.
        config: Its train_size is the number n of training rows; None: all rows that are not in the
            other parts. Its validation_size is the share v of validation rows among training and
            validation rows; with train_size given these are round(n v / (1 - v)) rows, and the rest
            stays unused. Its test_size is the share of test rows among the rows they are drawn
            from. In each part of its noise_parts, of m rows, round(label_noise m) labels are
            replaced: by one of the other K - 1 classes (noise_classes "other") or of all K
            ("uniform"), each equally likely.
        refit: Whether to add the validation rows to the training rows, once they have been used to
            select an epoch.

    Returns:
        C-contiguous, finite arrays. Every drawn part contains every class (before label noise);
        with groups or a time, this is guaranteed for the training part only.

    Raises:
        CompareError: There are too few rows for such parts, or the seed is negative.
    """
    if seed < 0:
        raise CompareError(f"seed must not be negative; got {seed}.")
    rows = draw_rows(dataset, seed, config)
    labels = [dataset.target[part] for part in rows]
    k = len(dataset.classes)
    labels[0] = _with_noise(labels[0], config, k, (seed, _NOISE))
    if config.noise_parts == "training+validation":
        labels[1] = _with_noise(labels[1], config, k, (seed, _VALIDATION_NOISE))
    if refit:
        rows[0], labels[0] = (np.concatenate(each[:2]) for each in (rows, labels))
    preparation, features = _prepare(dataset, rows, seed)
    train, validation, test = zip(features, labels, strict=True)
    return Split(train, validation, test, preparation)


def draw_rows(dataset: Dataset, seed: int, config: Config) -> list[Rows]:
    """Row numbers of the training, validation and test part; see `split`."""
    k = len(dataset.classes)
    given = dataset.official
    pool = np.setdiff1d(np.arange(len(dataset.target)), np.concatenate([[], *given.values()]))
    n_test = 0 if "test" in given else round(config.test_size * len(pool))
    rest = len(pool) - n_test
    share = 0.0 if "validation" in given else config.validation_size
    if config.train_size is None:
        n_validation = round(share * rest)
        n_train = rest - n_validation
    else:
        ratio = share / (1 - share)
        n_train, n_validation = config.train_size, round(config.train_size * ratio)
        if n_train + n_validation > rest:
            most = next(n for n in range(rest, -1, -1) if n + round(n * ratio) <= rest)
            raise CompareError(
                f"{named('train_size')} must be at most {most}; got {n_train}. Of {len(pool)} "
                f"rows of {dataset.name} to draw from, {n_test} are for test, and {n_train} "
                f"training rows need {n_validation} for validation (a share of {share}, "
                f"{named('validation_size')})."
            )
    drawn = {"training": n_train}
    if "validation" not in given:
        drawn["validation"] = n_validation
    if "test" not in given:
        drawn["test"] = n_test
    for name, size in drawn.items():
        if size < k:
            listing = ", ".join(f"{name} {size}" for name, size in drawn.items())
            raise CompareError(
                f"{dataset.name} has {k} classes, so each part needs at least {k} rows; the {name} "
                f"part would have {size} ({listing}). Change "
                f"{named('train_size')}, {named('validation_size')} or {named('test_size')}."
            )

    parts = {}
    if "test" not in given:
        test_seed = 0 if config.shares_test_rows(given) else seed
        pool, parts["test"] = _divided(dataset, pool, (rest, n_test), (test_seed, _TEST))
    exact = config.train_size is not None
    if not exact:  # with whole groups or times, the number of rows left may differ from `rest`
        n_validation = round(share * len(pool))
        n_train = len(pool) - n_validation
    if "validation" not in given:
        sizes = (n_train, n_validation)
        parts["training"], parts["validation"] = _divided(
            dataset, pool, sizes, (seed, _TRAIN), exact=exact
        )
    else:
        parts["training"] = _subset(dataset, pool, n_train, (seed, _TRAIN))
    must_have_all = parts if dataset.groups is None and dataset.time is None else {"training"}
    for name in must_have_all:
        part = parts[name]
        absent = np.setdiff1d(np.arange(k), dataset.target[part])
        if absent.size:
            raise _too_rare(dataset, absent, f"the {name} part ({len(part)} rows)")
    parts |= given
    return [parts["training"], parts["validation"], parts["test"]]


def _divided(
    dataset: Dataset,
    rows: Rows,
    sizes: tuple[int, int],
    stream: tuple[int, int],
    *,
    exact: bool = False,
) -> tuple[Rows, Rows]:
    """Two disjoint subsets of `rows`: for training, and for validation or test.

    If whole groups or times are taken, the subsets have the ratio of `sizes` as far as possible.
    With `exact`, rows are then left out so that the first subset has exactly its size and the
    second at most its size.
    """
    if dataset.groups is not None:
        folds = _group_folds(dataset.groups[rows], dataset.target[rows], rows, stream)
    elif dataset.time is not None:
        order = rows[np.argsort(-dataset.time[rows], kind="stable")]
        folds = np.split(order, np.flatnonzero(np.diff(dataset.time[order])) + 1)
    else:
        return _stratified(dataset, rows, sizes, stream)
    if len(folds) < 2:
        what = "group" if dataset.time is None else "time"
        raise CompareError(
            f"{what}: all {len(rows)} rows of {dataset.name} to draw from are of one {what}, so "
            "they cannot be divided."
        )
    # The second subset is the first folds, as many as bring it closest to its share of the rows.
    wanted = len(rows) * sizes[1] / sum(sizes)
    taken = int(np.argmin(np.abs(np.cumsum(list(map(len, folds[:-1]))) - wanted))) + 1
    first, second = np.concatenate(folds[taken:]), np.concatenate(folds[:taken])
    if exact:
        second = _subset(dataset, second, min(sizes[1], len(second)), stream)
        if len(first) < sizes[0]:
            raise CompareError(
                f"{named('train_size')} must be at most {len(first)}; got {sizes[0]}. The other "
                f"rows of {dataset.name} are of groups or times of validation and test."
            )
        first = _subset(dataset, first, sizes[0], stream)
    return first, second


def _group_folds(groups: Rows, labels: Rows, rows: Rows, stream: tuple[int, int]) -> list[Rows]:
    """Divide `rows` into sets of whole groups, each with the overall class shares if possible."""
    number = min(_FOLDS, len(np.unique(groups)), int(np.bincount(labels).max()))
    if number < 2:
        return [rows]
    folds = StratifiedGroupKFold(
        number, shuffle=True, random_state=int(np.random.default_rng(stream).integers(2**31))
    )
    with warnings.catch_warnings():
        # A class with fewer rows than folds cannot be in every fold, which groups permit anyway.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        return [rows[fold] for _, fold in folds.split(labels, labels, groups) if len(fold)]


def _subset(dataset: Dataset, rows: Rows, size: int, stream: tuple[int, int]) -> Rows:
    """`size` of the rows, in random order, with their class shares (largest remainders)."""
    rng = np.random.default_rng(stream)
    rows = rng.permutation(rows)
    labels = dataset.target[rows]
    exact = np.bincount(labels, minlength=len(dataset.classes)) * (size / len(rows))
    count = np.floor(exact).astype(np.int64)
    most = np.argsort(count - exact, kind="stable")[: size - count.sum()]
    count[most] += 1
    # For each row, how many rows of its class precede it.
    order = np.argsort(labels, kind="stable")
    first = np.searchsorted(labels[order], labels[order])
    before = np.empty(len(rows), np.int64)
    before[order] = np.arange(len(rows)) - first
    chosen: Rows = rows[before < count[labels]]
    return chosen


def _stratified(
    dataset: Dataset, rows: Rows, sizes: tuple[int, int], stream: tuple[int, int]
) -> tuple[Rows, Rows]:
    """Two disjoint subsets of `rows` of the given sizes, with the class shares of `rows`."""
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


def _too_rare(dataset: Dataset, codes: Rows, where: str) -> CompareError:
    counts = np.bincount(dataset.target)
    listed = ", ".join(f"{dataset.classes[k]!r} ({counts[k]} rows)" for k in codes[:10])
    return CompareError(
        f"{dataset.name}: too few rows of {listed}{', ...' if codes.size > 10 else ''} to have one "
        f"in {where}. Add rows, merge classes, leave out rare ones ({named('min_class_rows')}), or "
        "enlarge the part."
    )


def _with_noise(
    y: npt.NDArray[np.int64], config: Config, k: int, stream: tuple[int, int]
) -> npt.NDArray[np.int64]:
    """Replace round(label_noise n) of the labels by one of the other classes, or of all k."""
    rng = np.random.default_rng(stream)
    # Drawn for all rows, so that the noisy rows at a lower rate are a subset of those at a higher.
    least = 1 if config.noise_classes == "other" else 0
    order, shift = rng.permutation(len(y)), rng.integers(least, k, size=len(y))
    noisy = order[: round(config.label_noise * len(y))]
    y = y.copy()
    y[noisy] = (y[noisy] + shift[noisy]) % k
    return y


def _prepare(
    dataset: Dataset, rows: Sequence[Rows], seed: int
) -> tuple[Preparation | None, Sequence[Inputs]]:
    """Fit a preparation to the first part, if one is needed; return it with all parts' features."""
    features = dataset.features
    if isinstance(features, Images):
        return None, [features[part] for part in rows]
    if isinstance(features, Texts):
        return None, [features.take(part) for part in rows]
    parts: list[Any] = [
        features.iloc[part] if isinstance(features, pd.DataFrame) else features[part]
        for part in rows
    ]
    random_state = np.random.default_rng((seed, _ENCODER)).integers(2**31).item()
    try:
        preparation = fit(parts[0], random_state)
    except CompareError as error:
        raise CompareError(f"{dataset.name}, seed {seed}: {error}") from None
    return preparation, [preparation(part) for part in parts]
