"""Runs on several processes: torchrun ... train_worker.py FOLDER; and what they are compared with.

The cases, on data made here. Batches of 32 leave a last one of a single row, of which the second of
two processes gets nothing.
"""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from penex.compare.config import Config, Execution, Task
from penex.compare.data.dataset import Dataset, Texts
from penex.compare.data.images import Images
from penex.compare.training.distributed import default_process_group
from penex.compare.training.run import run

ROWS = 65


def numbers(rows: int = 150) -> Dataset:
    rng = np.random.default_rng(0)
    target = rng.integers(3, size=rows)
    features = rng.normal(size=(rows, 6)) + np.eye(6)[target]
    return Dataset("numbers", features.astype(np.float32), target, ("a", "b", "c"), "numbers")


def pictures(rows: int = 150, shape: tuple[int, int, int] = (3, 8, 8)) -> Dataset:
    rng = np.random.default_rng(0)
    target = rng.integers(3, size=rows)
    pixels = rng.integers(0, 200, (rows, *shape), dtype=np.uint8)
    pixels += (20 * target).astype(np.uint8)[:, None, None, None]
    return Dataset("pictures", Images(pixels), target, ("a", "b", "c"), "pictures")


def sentences(rows: int = 150) -> Dataset:
    rng = np.random.default_rng(0)
    target = rng.integers(3, size=rows)
    words = np.array([f"word{number}" for number in range(30)])
    texts = [
        " ".join(words[rng.integers(30, size=rng.integers(1, 12))]) + f" topic{label}!"
        for label in target
    ]
    return Dataset("sentences", Texts(texts), target, ("a", "b", "c"), "sentences")


# Adam would make steps of the rounding error of a key's bias, whose gradient is zero.
SGD_VIT = {
    "optimizer": "sgd",
    "model": "vit",
    "model_options": {"dropout": 0.0, "dim": 16, "depth": 2, "heads": 2, "mlp": 32},
}
CASES: dict[str, tuple[Dataset, str, float, dict[str, Any]]] = {
    "cross-entropy": (numbers(), "cross-entropy", math.nan, {}),
    "penex": (numbers(), "penex", 0.1, {"optimizer": "sgd", "gradient_clip": 0.1}),
    "accumulated": (numbers(), "cross-entropy", math.nan, {"accumulate": 2, "batch_size": 16}),
    "penex accumulated": (
        numbers(),
        "penex",
        0.1,
        {"accumulate": 2, "batch_size": 16, "optimizer": "sgd"},
    ),
    "pictures": (pictures(), "penex", 0.1, SGD_VIT),
}


def train(folder: Path, name: str, execution: Execution) -> None:
    dataset, spec, knob, options = CASES[name]
    config = Config(
        **(
            {"data": "made", "train_size": ROWS, "epochs": 3, "batch_size": 32, "lr": 0.01}
            | options
        )
    )
    run(Task(folder / name, spec, 0, config.lr, knob), config, dataset, execution)


def main(folder: str) -> None:
    with default_process_group():
        for name in CASES:
            train(Path(folder), name, Execution(devices=2, strategy="ddp"))
        train(Path(folder) / "sharded", "pictures", Execution(devices=2, strategy="fsdp"))


if __name__ == "__main__":
    main(*sys.argv[1:])
