"""What the columns of a table are used as, and which of them are suspicious."""

import warnings as python_warnings

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.tree import DecisionTreeClassifier

from penex.compare.data.dataset import Dataset, quoted

CATEGORIES = 40
"""From so many distinct values on, skrub encodes a column of text by its fragments."""
SHOWN = 12
"""Columns of one kind that are named."""

SHORT = 64
"""Characters up to which a text that is different in every row looks like an identifier."""
LEAST = 20
"""Rows from which on distinct values in all of them are no accident."""

TELLING = 0.98
"""Balanced accuracy of one column alone from which it is said to give the class away."""
LOOKED_AT = 2000
"""Rows that this is measured on at most."""
FOLDS = 3


def kind(column: pd.Series) -> str:
    """What a column of :attr:`Dataset.features` is used as: number, date, category or text."""
    if column.dtype == np.float64:
        return "number"
    if pd.api.types.is_datetime64_any_dtype(column):
        return "date"
    return "category" if column.nunique() < CATEGORIES else "text"


def describe_columns(dataset: Dataset) -> list[str]:
    """A line for each kind of column, and for those that are left out; none if it is no table."""
    features = dataset.features
    lines = []
    if isinstance(features, pd.DataFrame):
        of_kind: dict[str, list[str]] = {}
        for name in features.columns:
            of_kind.setdefault(kind(features[name]), []).append(str(name))
        plural = {"number": "numbers", "date": "dates", "category": "categories", "text": "texts"}
        for each, title in plural.items():
            if names := of_kind.get(each):
                title = each if len(names) == 1 else title
                lines.append(f"Used as {title}: {quoted(names, SHOWN)}")
    reasons: dict[str, list[str]] = {}
    for name, reason in dataset.left_out.items():
        reasons.setdefault(reason, []).append(name)
    lines += [f"No feature ({reason}): {quoted(names, SHOWN)}" for reason, names in reasons.items()]
    return lines


def warnings(dataset: Dataset) -> list[str]:
    """Sentences on columns that look like identifiers, or give the class away.

    They are left in all the same: what they are, only the user knows.
    """
    features = dataset.features
    if not isinstance(features, pd.DataFrame):
        return []
    lines = []
    names = [str(name) for name in features.columns]
    if found := [name for name in names if is_identifier(features[name])]:
        lines.append(
            f"possible identifiers, with a different value in every row: {quoted(found, SHOWN)}. "
            f"To leave them out: --drop {','.join(found)!r}"
        )
    scores = {name: single_accuracy(features[name], dataset.target) for name in names}
    if found := [name for name in names if scores[name] >= TELLING]:
        lines.append(
            "columns that predict the class almost perfectly on their own: "
            f"{quoted(found, SHOWN)}. Are they known before the class is? If not, leave them "
            "out: --drop "
            f"{','.join(found)!r}"
        )
    return lines


def is_identifier(column: pd.Series) -> bool:
    """Whether each row has its own whole number, or its own short text."""
    if len(column) < LEAST or column.isna().any() or not column.is_unique:
        return False
    if column.dtype == np.float64:
        return bool((column == column.round()).all())
    if pd.api.types.is_datetime64_any_dtype(column):
        return False
    return bool(column.astype(str).str.len().median() <= SHORT)


def single_accuracy(column: pd.Series, target: npt.NDArray[np.int64]) -> float:
    """Balanced accuracy of a decision tree that sees one column alone, in cross-validation.

    Args:
        column: Of N rows.
        target: Class codes of shape (N,).

    Returns:
        In [0, 1]; 0 if no class has rows enough.
    """
    rows = np.random.default_rng(0).permutation(len(target))[:LOOKED_AT]
    y = target[rows]
    frequent = np.isin(y, np.flatnonzero(np.bincount(y) >= FOLDS))
    rows, y = rows[frequent], y[frequent]
    if len(np.unique(y)) < 2:
        return 0.0
    values = column.iloc[rows]
    if pd.api.types.is_datetime64_any_dtype(values):
        numbers = values.astype("int64").to_numpy(np.float64)
    elif values.dtype == np.float64:
        numbers = values.to_numpy()
    else:
        numbers = pd.factorize(values, sort=True)[0].astype(np.float64)
    tree = DecisionTreeClassifier(min_samples_leaf=2, class_weight="balanced", random_state=0)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    with python_warnings.catch_warnings():
        python_warnings.simplefilter("ignore")
        scores = cross_val_score(tree, numbers[:, None], y, cv=folds, scoring="balanced_accuracy")
    return float(scores.mean())
