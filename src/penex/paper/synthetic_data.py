"""Random data in the format of the real data sets, to try a preset without them."""

import shutil
import uuid
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from penex._extras import need

if TYPE_CHECKING:
    from datasets import Features

SEED = 0
PARTIAL = ".partial-"


def sample(data: str, folder: Path) -> None:
    """Write random data in the format of the data set `data` into `folder`.

    Args:
        data: A key of :data:`SAMPLES`.
        folder: The folder to use as `data_dir`; an existing folder is left unchanged.
    """
    if folder.exists():
        return
    partial = folder.with_name(f"{PARTIAL}{folder.name}-{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    SAMPLES[data](partial)
    try:
        partial.rename(folder)
    except OSError:  # another process was quicker
        shutil.rmtree(partial)


def _cifar10(folder: Path) -> None:
    _images(folder, "img", "label", 10, 32, {"train": 600, "test": 60})


def _cifar100(folder: Path) -> None:
    _images(folder, "img", "fine_label", 100, 32, {"train": 600, "test": 200})


def _imagenet(folder: Path) -> None:
    _images(folder, "image", "label", 4, 40, {"train": 60, "validation": 20, "test": 4})


def _images(
    folder: Path, column: str, target: str, classes: int, size: int, parts: dict[str, int]
) -> None:
    """Write noise whose brightness depends on the class, as PNG in Parquet, as on the hub."""
    need("--smoke on images", "data", "datasets", "PIL")
    from datasets import ClassLabel, Features, Image

    names = [f"class {k}" for k in range(classes)]
    features = Features({column: Image(), target: ClassLabel(names=names)})
    for number, (part, rows) in enumerate(parts.items()):
        pixels, labels = _noise(rows, classes, size, number)
        images = [{"bytes": _png(each), "path": None} for each in pixels]
        _parquet(folder / part, {column: images, target: labels.tolist()}, features)


def _bbc_news(folder: Path) -> None:
    need("--smoke on texts", "data", "datasets")
    from datasets import Features, Value

    names = ("tech", "business", "sport", "entertainment", "politics")
    rng = np.random.default_rng(SEED)
    features = Features(
        {"text": Value("string"), "label": Value("int64"), "label_text": Value("string")}
    )
    for part, rows in {"train": 60, "test": 20}.items():
        labels = np.arange(rows) % len(names)
        words = rng.integers(30, size=(rows, 12))
        texts = [
            " ".join(f"word{w if w > 5 else 100 + label}" for w in row)
            for row, label in zip(words, labels, strict=True)
        ]
        rows_of = {"text": texts, "label": labels, "label_text": [names[k] for k in labels]}
        _parquet(folder / part, rows_of, features)


def _pathmnist(folder: Path) -> None:
    arrays: dict[str, NDArray[Any]] = {}
    for number, (part, rows) in enumerate({"train": 100, "val": 50, "test": 40}.items()):
        pixels, labels = _noise(rows, 9, 64, number)
        arrays |= {f"{part}_images": pixels, f"{part}_labels": labels[:, None].astype(np.uint8)}
    np.savez(folder / "pathmnist_64.npz", allow_pickle=False, **arrays)


def _sonar(folder: Path) -> None:
    values = np.random.default_rng(SEED).random((208, 60))
    rows = [
        ",".join([*(f"{value:.4f}" for value in row), "MR"[number % 2]])
        for number, row in enumerate(values)
    ]
    (folder / "sonar.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")


def _noise(
    rows: int, classes: int, size: int, number: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (rows, size, size, 3) and labels, all classes equally often."""
    rng = np.random.default_rng([SEED, number])
    labels = np.arange(rows) % classes
    noise = rng.integers(128, size=(rows, size, size, 3))
    return (noise + (127 * labels // classes)[:, None, None, None]).astype(np.uint8), labels


def _png(pixels: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    stream = BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def _parquet(path: Path, rows: dict[str, Any], features: "Features") -> None:
    from datasets import Dataset

    table = Dataset.from_dict(rows, features=features).data.table
    pq.write_table(table, path.with_name(f"{path.name}-00000-of-00001.parquet"))


SAMPLES: dict[str, Callable[[Path], None]] = {
    "hub:uoft-cs/cifar10": _cifar10,
    "hub:uoft-cs/cifar100": _cifar100,
    "hub:ILSVRC/imagenet-1k": _imagenet,
    "hub:SetFit/bbc-news": _bbc_news,
    "pathmnist": _pathmnist,
    "sonar": _sonar,
}
"""Functions that write random data, by the name of the data set in configurations."""
