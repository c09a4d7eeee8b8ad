"""Finished runs: run.json, logits.npz and curve.csv, checked when they are read."""

import csv
import io
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from penex.compare.errors import CompareError
from penex.compare.files import open_arrays, read_bytes, read_json, reading
from penex.compare.training.selection import LAST

Count = Annotated[int, Field(ge=0)]
Number = Annotated[float, Field(allow_inf_nan=False)]
PARTS = ("validation", "test")


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _Rows(_Strict):
    train: Count
    validation: Count
    test: Count


class _Scores(_Strict):
    nll: Number
    refined_nll: Number
    softmax_nll: Number
    accuracy: Number


class _Record(_Strict):
    loss: str
    seed: Count
    lr: Number
    knob: Number | None
    rows: _Rows
    class_counts: Annotated[list[Count], Field(min_length=2)]
    model: str
    parameters: Count
    epochs: dict[str, Annotated[int, Field(ge=1)]]
    validation: dict[str, _Scores | None]
    seconds_per_epoch: Number
    versions: dict[str, str]


def read_record(folder: Path) -> dict[str, Any]:
    """The content of a run's run.json.

    Raises:
        CompareError: The file is missing or damaged.
    """
    path = folder / "run.json"
    record: dict[str, Any] = read_json(path)
    with reading(path):
        found = _Record.model_validate(record)
        scored = {name for name, scores in found.validation.items() if scores is not None}
        if LAST not in found.epochs or not scored <= set(found.epochs):
            raise ValueError("an epoch is missing")
    return record


def read_logits(folder: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a run's logits.npz: of each part, the labels (N,) and logits (N, K).

    Raises:
        CompareError: The file is missing or damaged.
    """
    path = folder / "logits.npz"
    with reading(path):
        with open_arrays(path) as content:
            arrays = dict(content)
        widths = set()
        for part in PARTS:
            target = arrays[f"{part}_target"]
            for name, logits in arrays.items():
                if name.startswith(f"{part}_") and name != f"{part}_target":
                    if logits.dtype.kind != "f" or logits.shape[:1] != target.shape:
                        raise ValueError(f"{name} has type {logits.dtype}, shape {logits.shape}")
                    widths.add(logits.shape[1:])
            if target.dtype.kind not in "iu" or target.ndim != 1 or not target.size:
                raise ValueError(f"{part}_target has type {target.dtype}, shape {target.shape}")
        ((classes,),) = widths
        labels = np.concatenate([arrays[f"{part}_target"] for part in PARTS])
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"expected labels from 0 to {classes - 1}")
    return arrays


def read_curve(folder: Path) -> dict[str, NDArray[np.float64]]:
    """The columns of a run's curve.csv.

    Raises:
        CompareError: The file is missing or damaged.
    """
    path = folder / "curve.csv"
    with reading(path):
        text = read_bytes(path).decode()
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def read_run(folder: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The record and the logits of a run, checked against each other.

    Raises:
        CompareError: A file is missing or damaged.
    """
    record, logits = read_record(folder), read_logits(folder)
    with reading(folder / "logits.npz"):
        epochs, classes = set(record["epochs"].values()), len(record["class_counts"])
        found = {logits[f"{part}_{epoch}"].shape[1] for part in PARTS for epoch in epochs}
        if found != {classes}:
            raise ValueError(f"expected logits of {classes} classes")
    return record, logits


def discard_damaged(folders: Iterable[Path]) -> list[str]:
    """Remove incomplete and damaged runs, so that they are repeated.

    Args:
        folders: The folders of runs; some may not exist.

    Returns:
        The reason for each removal.
    """
    reasons = []
    for folder in folders:
        if folder.exists():
            try:
                read_run(folder)
                read_curve(folder)
            except CompareError as error:
                reasons.append(str(error).rpartition("; remove ")[0] or str(error))
                shutil.rmtree(folder)
    return reasons
