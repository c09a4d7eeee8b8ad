"""Data sets of the Hugging Face hub, or the same Parquet files in a folder.

The data set's own description of its columns tells which contain images, text and classes. No code
of a data set is ever run.
"""

import errno
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.compute as pc

from penex._extras import need
from penex.compare.config import Config
from penex.compare.data.dataset import Content, encode_labels, official_rows, quoted, roles
from penex.compare.data.images import digest_of, load_images
from penex.compare.data.tables import parquet_metadata, texts
from penex.compare.errors import CompareError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset as HubDataset

PREFIX = "hub:"


@dataclass(frozen=True)
class HubImages:
    """The images of consecutive parts; pickled by the names of the files that contain them."""

    images: "HubDataset"
    column: str
    parts: tuple[tuple[str, int], ...]
    source: str
    identity: str
    stamp: str

    def __len__(self) -> int:
        return len(self.images)

    def read(self, rows: Sequence[int]) -> list[bytes]:
        # A range is read as a slice, without a lookup for each row.
        values = self.images[rows if isinstance(rows, range) else list(rows)][self.column]
        return [value["bytes"] for value in values]

    def name(self, row: int) -> str:
        first = 0
        for part, size in self.parts:
            if row < first + size:
                return f"in row {row - first} (the first is 0) of {part!r} of {self.source}"
            first += size
        raise IndexError(row)


def read_hub(source: str, config: Config) -> Content:
    """Read images or texts with their classes.

    Args:
        source: ``hub:owner/name`` or ``hub:owner/name:configuration``; or a folder of Parquet
            files, whose names start with the names of their parts.
        config: If it has a data_dir, the files of a hub data set are read from there.

    Raises:
        CompareError: The data set cannot be read, or lacks the configured columns or parts.
    """
    need("reading data sets of the Hugging Face hub", "data", "datasets", "PIL", "pooch")
    from datasets import ClassLabel

    available = _load(source, config.data_dir)
    role = roles(available, config.parts, source)
    parts = {part: available[part] for part in role}
    features = next(iter(parts.values())).features
    target = _target(features, config.target, source)
    labels = {part: rows.data.column(target).to_pandas() for part, rows in parts.items()}
    _refuse_unlabelled(labels, isinstance(features[target], ClassLabel), source)
    together = pd.concat(labels.values(), ignore_index=True)
    if isinstance(features[target], ClassLabel):
        codes = together.to_numpy(dtype=np.int64)
        classes = tuple(map(str, features[target].names))
    else:
        codes, classes = encode_labels(together, source)
    sizes = [(role[part], len(rows)) for part, rows in parts.items()]
    column, kind = _input(features, target, config.text, source)
    if kind == "text":
        columns = [rows.data.column(column).to_pandas() for rows in parts.values()]
        inputs = texts(pd.concat(columns, ignore_index=True).rename(column), source)
        return Content(inputs, codes, classes, official_rows(sizes))
    images = load_images(_images(parts, column, source), config.image_size)
    return Content(images, codes, classes, official_rows(sizes))


def _load(source: str, data_dir: str | None) -> "dict[str, HubDataset]":
    """Load the parts, by name."""
    import datasets

    hub = source.startswith(PREFIX)
    name, _, configuration = source.removeprefix(PREFIX).partition(":")
    if hub and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        raise CompareError(
            f"expected hub:OWNER/NAME or hub:OWNER/NAME:CONFIGURATION, got {source!r}."
        )
    folder = Path(data_dir if hub and data_dir else name).expanduser()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are raised as well
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        if hub and not data_dir:
            return dict(datasets.load_dataset(name, configuration or None))
        files = list(folder.rglob("*.parquet"))
        if not files:
            raise CompareError(f"{folder} holds no Parquet files (*.parquet) for {source}.")
        for file in files:
            parquet_metadata(file)
        return dict(datasets.load_dataset("parquet", data_dir=str(folder)))
    except CompareError:
        raise
    except Exception as error:  # from any library between the hub, its cache and Parquet
        cause: BaseException | None = error
        while cause is not None:
            if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise CompareError(
                    f"no space left to read {source} ({cause}). Make room, or name another folder "
                    "in HF_HOME."
                ) from error
            cause = cause.__cause__ or cause.__context__
        reason = shorten(str(error), 250)
        hint = (
            " If the hub cannot be reached from here, name a folder with the data set's Parquet "
            "files (--data-dir)."
            if hub and not data_dir
            else ""
        )
        where = f"{source} in {folder}" if hub and data_dir else source
        raise CompareError(f"cannot read {where}: {reason}.{hint}") from error


def _target(features: Any, target: str | None, source: str) -> str:
    """The column with the classes: the named one, the only ClassLabel column, or "label"."""
    from datasets import ClassLabel

    if target is not None:
        if target not in features:
            raise CompareError(
                f"{source} has no column {target!r}; its columns are {quoted(features)}."
                f"{did_you_mean(target, features)}"
            )
        return target
    found = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    found = found or [name for name in ("label", "labels") if name in features]
    if len(found) != 1:
        many = f"its columns {quoted(found)} hold classes" if found else "no column holds classes"
        raise CompareError(
            f"{source}: name the column to predict (--target); {many} among {quoted(features)}."
        )
    return str(found[0])


def _input(features: Any, target: str, text: str | None, source: str) -> tuple[str, str]:
    """The column to classify and its kind, "image" or "text"."""
    from datasets import Image, Value

    if text is not None:
        if text == target:
            raise CompareError(f"{source}: target and text are the same column, {text!r}.")
        if text not in features:
            raise CompareError(
                f"{source} has no column {text!r}; its columns are {quoted(features)}."
                f"{did_you_mean(text, features)}"
            )
        return text, "text"
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    strings = [
        name
        for name, feature in features.items()
        if isinstance(feature, Value)
        and feature.dtype in ("string", "large_string")
        and name != target
    ]
    if len(images) == 1:
        return images[0], "image"
    if not images and len(strings) == 1:
        return strings[0], "text"
    if len(images) > 1:
        raise CompareError(f"{source}: expected one column of images; it has {quoted(images)}.")
    raise CompareError(
        f"{source}: name the column with the text to classify (--text), one of {quoted(strings)}."
        if strings
        else f"{source} has no column of images or of text; its columns are {quoted(features)}."
    )


def _refuse_unlabelled(labels: dict[str, pd.Series], coded: bool, source: str) -> None:
    """Refuse parts whose labels are held back, which the hub writes as -1."""
    for part, values in labels.items():
        if not coded and not pd.api.types.is_integer_dtype(values):
            continue
        held_back = values < 0 if coded else values == -1
        missing = int((values.isna() | held_back).sum())
        # Without a ClassLabel, -1 may be a class if there are other labels as well.
        if missing and (coded or missing == len(values)):
            raise CompareError(
                f"{source}: {missing} of {len(values)} rows of the part {part!r} have "
                "no label (-1 or none). If the test labels are held back, "
                "--parts validation-as-test does without them."
            )


def _images(parts: "dict[str, HubDataset]", column: str, source: str) -> HubImages:
    from datasets import Image, concatenate_datasets

    images = concatenate_datasets([part.select_columns(column) for part in parts.values()])
    values = images.data.column(column)
    lengths: npt.NDArray[np.int64] = (
        pc.binary_length(pc.struct_field(values, "bytes")).fill_null(-1).to_numpy()
    )
    paths = pc.struct_field(values, "path").to_pylist()
    if outside := int((lengths < 0).sum()):
        raise CompareError(f"{source}: {outside} of {len(lengths)} images are not in its files.")
    return HubImages(
        images.cast_column(column, Image(decode=False)),
        column,
        tuple((name, len(part)) for name, part in parts.items()),
        source,
        digest_of(lengths.tolist(), [path and Path(path).name for path in paths]),
        digest_of([part._fingerprint for part in parts.values()]),
    )
