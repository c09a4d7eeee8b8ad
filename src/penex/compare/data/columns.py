"""The types of the columns of a table, and warnings about suspicious ones."""

import warnings as python_warnings

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.tree import DecisionTreeClassifier

from penex.compare.data.dataset import Dataset, quoted

CATEGORIES = 40
"""A text column with at least this many distinct values is encoded by its character fragments."""
SHOWN = 12
"""The most columns of one kind that are listed by name."""

IDENTIFIER_LENGTH = 64
"""The largest median length, in characters, of texts that look like identifiers."""
IDENTIFIER_ROWS = 20
"""The fewest rows in which distinct values are not taken for a coincidence."""

LEAK_ACCURACY = 0.98
"""The balanced accuracy of a single column from which on it is reported as a possible leak."""
LEAK_ROWS = 2000
"""The most rows on which this accuracy is measured."""
FOLDS = 3


def kind(column: pd.Series) -> str:
    """How a column of :attr:`Dataset.features` is used: as number, date, category or text."""
    if column.dtype == np.float64:
        return "number"
    if pd.api.types.is_datetime64_any_dtype(column):
        return "date"
    return "category" if column.nunique() < CATEGORIES else "text"


def describe_columns(dataset: Dataset) -> list[str]:
    """One line for each kind of column and one for each reason to leave columns out.

    Kinds are listed only if the features are a table.
    """
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
    """Warnings about columns that look like identifiers or reveal the class.

    The columns are used all the same: only the user knows what they are.
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
    if found := [name for name in names if scores[name] >= LEAK_ACCURACY]:
        lines.append(
            "columns that predict the class almost perfectly on their own: "
            f"{quoted(found, SHOWN)}. Are they known before the class is? If not, leave them "
            "out: --drop "
            f"{','.join(found)!r}"
        )
    return lines


def is_identifier(column: pd.Series) -> bool:
    """Whether every row has a different integer or a different short text."""
    if len(column) < IDENTIFIER_ROWS or column.isna().any() or not column.is_unique:
        return False
    if column.dtype == np.float64:
        return bool((column == column.round()).all())
    if pd.api.types.is_datetime64_any_dtype(column):
        return False
    return bool(column.astype(str).str.len().median() <= IDENTIFIER_LENGTH)


def single_accuracy(column: pd.Series, target: npt.NDArray[np.int64]) -> float:
    """Cross-validated balanced accuracy of a decision tree that sees one column only.

    Args:
        column: The column, N rows.
        target: Class codes of shape (N,).

    Returns:
        The accuracy in [0, 1]; 0 if fewer than two classes have enough rows.
    """
    rows = np.random.default_rng(0).permutation(len(target))[:LEAK_ROWS]
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
