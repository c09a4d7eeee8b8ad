"""From the source a user names to features and class codes, checked, before any split.

What the comparison cannot use is refused here. The readers of the different kinds of source are
in :mod:`penex.compare.sources`.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from penex.compare.config import Config
from penex.compare.data.arrays import BUNDLED, read_bundled, read_npz, two_gaussians
from penex.compare.data.dataset import Content, Dataset, Texts, quoted
from penex.compare.data.downloads import DOWNLOADS, read_pathmnist, read_sonar
from penex.compare.data.folders import read_folder
from penex.compare.data.hub import PREFIX, read_hub
from penex.compare.data.images import Images
from penex.compare.data.tables import ENDINGS as TABLES
from penex.compare.data.tables import holds_part_tables, read_table, read_tables
from penex.compare.errors import CompareError, did_you_mean, named

__all__ = ["Dataset", "load"]

ENDINGS = (*TABLES, ".npz")
COLUMNS = ("target", "text", "group", "time", "drop", "keep")
"""Settings that name columns of a table."""
NAMED_HUB = {
    "bbc-news": {"data": "hub:SetFit/bbc-news", "target": "label_text", "text": "text"},
    "imagenet": {"data": "hub:ILSVRC/imagenet-1k", "target": "label"},
}
NAMES = (*BUNDLED, "two-gaussians", *DOWNLOADS, *NAMED_HUB)


def load(config: Config) -> Dataset:
    """Read `config.data` and check that classifiers can be compared on it.

    It is one of:

    - a name: ``digits``, ``wine``, ``breast_cancer``, ``iris`` (bundled with scikit-learn),
      ``two-gaussians`` (made on the spot), ``sonar``, ``pathmnist`` (downloaded once and checked,
      or in `data_dir`), ``bbc-news``, ``imagenet`` (from the hub);
    - ``hub:owner/name`` or ``hub:owner/name:configuration``, a data set of the Hugging Face hub
      with images or texts; with `data_dir`, the same Parquet files in that folder;
    - a folder of Parquet files, named after their parts as on the hub; or of class sub-folders with
      images, or of train, validation and test with such sub-folders;
    - a table: delimited text (.csv, .tsv, .txt, .tab; also compressed, .gz, .bz2, .xz or .zip, to
      at most 4 GiB when decompressed), whose separator, decimal sign and encoding are found, Excel
      (.xlsx, .xlsm: the first sheet) or .parquet. The column `target` is predicted, from the column
      `text` if that is given, else from all others, or all but `drop`, or `keep` alone; rows of one
      value of `group` stay in one part, and the newest rows by `time` are the test. Blanks around
      names and values do not count. Text that stands for a missing value ("", "NA", "?", ...)
      becomes missing; text columns whose values are all numbers or all dates become such columns.
      Rows without a target, and row numbers (a first column without a name, of distinct integers)
      are left out. `validation_file` and `test_file` may name tables of these parts;
    - a folder of such tables, named after their parts (``train.csv``, ``val.csv``, ``test.csv``),
      with the same columns; Parquet files there are tables unless they hold images, or one column
      of text beside `target`;
    - an NPZ file with ``X`` of shape (N, ...), real numbers, and ``y`` of shape (N,) or (N, 1),
      integers or strings; or, as MedMNIST has it, with ``train_images``, ``train_labels``,
      ``val_images``, ...

    Of what was read, `classes` are kept, or all, and of these the ones of `min_class_rows` rows.

    Raises:
        CompareError: The source cannot be found, read or used; the message says what to change.
        ImportError: The source needs packages that are missing; the message names the extra.
    """
    named = NAMED_HUB.get(config.data, {})
    chosen = {"target": config.target, "text": config.text}
    config = config.model_copy(update=named | {k: v for k, v in chosen.items() if v is not None})
    try:
        name, content = _read(config)
    except OSError as error:  # what no reader expects: no permission, a file that has just gone
        raise CompareError(f"cannot read {config.data}: {error}.") from error
    return to_dataset(name, content, config)


def to_dataset(name: str, content: Content, config: Config) -> Dataset:
    """The data set of what a source holds, of its classes those that `config` keeps.

    Raises:
        CompareError: They are too few, or have too few rows.
    """
    if config.classes is not None:
        content = _of_classes(content, config.classes, config.data)
    if config.min_class_rows is not None:
        content = _without_rare(content, config.min_class_rows, config.data)
    _check_classes(content, config.data)
    return Dataset(
        name,
        content.features,
        content.target,
        content.classes,
        _fingerprint(content),
        content.official,
        content.groups,
        content.time,
        content.left_out,
        content.notes,
    )


def _read(config: Config) -> tuple[str, Content]:
    """Name and content of the source, by the reader for its kind."""
    source = config.data
    path = Path(source).expanduser()
    ending, stem = _ending(path), short_name(source)
    if source in BUNDLED:
        _allow_settings(config)
        return source, read_bundled(source)
    if source == "two-gaussians":
        _allow_settings(config, "parts")
        return source, two_gaussians()
    if source == "sonar":
        _allow_settings(config, "data_dir")
        return source, read_sonar(config.data_dir)
    if source == "pathmnist":
        _allow_settings(config, "data_dir", "parts", "image_size")
        return source, read_pathmnist(config)
    if source.startswith(PREFIX):
        _allow_settings(config, "data_dir", "parts", "target", "text", "image_size")
        return stem, read_hub(source, config)
    if path.is_dir() and holds_part_tables(path, config):
        _allow_settings(config, "parts", *COLUMNS)
        return stem, read_tables(path, config)
    if path.is_dir() and any(path.rglob("*.parquet")):
        _allow_settings(config, "parts", "target", "text", "image_size")
        return stem, read_hub(source, config)
    if path.is_dir():
        _allow_settings(config, "parts", "image_size")
        return stem, read_folder(path, config)
    if ending == ".npz":
        _allow_settings(config, "parts", "image_size")
        return stem, read_npz(path, config)
    if ending:
        _allow_settings(config, "parts", *COLUMNS, "validation_file", "test_file")
        return stem, read_table(path, config)
    raise CompareError(
        f"unknown data {source!r}: expected one of {', '.join(NAMES)}, hub:OWNER/NAME, a folder, "
        "or a file ending in .csv, .tsv, .txt (also .gz, .bz2, .xz or .zip), .xlsx, .parquet or "
        f".npz.{did_you_mean(source, NAMES)}"
    )


def short_name(source: str) -> str:
    """The name of the data set `source` (``Config.data``), without folders and endings."""
    if source.startswith(PREFIX):
        return source.removeprefix(PREFIX).split("/")[-1].split(":")[0]
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve().name
    return path.name[: len(path.name) - len(_ending(path))]


def _ending(path: Path) -> str:
    return next((each for each in ENDINGS if path.name.lower().endswith(each)), "")


def _allow_settings(config: Config, *options: str) -> None:
    """Refuse settings of other kinds of source."""
    for option in ("data_dir", "parts", "image_size", *COLUMNS, "validation_file", "test_file"):
        value = getattr(config, option)
        if option not in options and value != Config.model_fields[option].default:
            raise CompareError(
                f"{named(option)}: {config.data} has no use for it, but {value!r} was "
                "given; leave it out."
            )


def _of_classes(content: Content, classes: tuple[str, ...], source: str) -> Content:
    """The rows of `classes` alone, whose order stays that of the source."""
    for name in classes:
        if name not in content.classes:
            raise CompareError(
                f"classes: {source} has no class {name!r}; it has {quoted(content.classes)}."
                f"{did_you_mean(name, content.classes)}"
            )
    return _kept(content, [k for k, name in enumerate(content.classes) if name in classes])


def _without_rare(content: Content, least: int, source: str) -> Content:
    """The rows of the classes that have at least `least` of them."""
    counts = np.bincount(content.target, minlength=len(content.classes))
    kept = np.flatnonzero(counts >= least)
    if kept.size == counts.size:
        return content
    if kept.size < 2:
        raise CompareError(
            f"{named('min_class_rows')}: {kept.size} of {counts.size} classes of {source} have at "
            f"least {least} rows; expected 2 or more."
        )
    rare = np.flatnonzero(counts < least)
    note = (
        f"{int(counts[rare].sum()):,} rows of {rare.size} classes of {source} are left out, which "
        f"have fewer than {least} rows each: {quoted(content.classes[k] for k in rare)}."
    )
    return replace(_kept(content, kept.tolist()), notes=(*content.notes, note))


def _kept(content: Content, kept: list[int]) -> Content:
    """The rows of the classes of these codes."""
    code = np.full(len(content.classes), -1)
    code[kept] = np.arange(len(kept))
    rows = np.flatnonzero(np.isin(content.target, kept))
    features = content.features
    if isinstance(features, pd.DataFrame):
        features = features.iloc[rows].reset_index(drop=True)
    elif isinstance(features, Texts):
        features = Texts(features.take(rows))
    else:
        features = features[rows]
    official = {
        part: np.flatnonzero(np.isin(rows, given)) for part, given in content.official.items()
    }
    return replace(
        content,
        features=features,
        target=code[content.target[rows]],
        classes=tuple(content.classes[k] for k in kept),
        official=official,
        groups=None if content.groups is None else content.groups[rows],
        time=None if content.time is None else content.time[rows],
    )


def _check_classes(content: Content, source: str) -> None:
    """Refuse classes that are too few, or have too few rows for every part to have one."""
    classes, k = content.classes, len(content.classes)
    if k < 2:
        raise CompareError(f"{source}: expected at least 2 classes; every label is {classes[0]!r}.")
    given = {
        part: np.bincount(content.target[rows], minlength=k)
        for part, rows in content.official.items()
    }
    counts = np.bincount(content.target, minlength=k) - sum(given.values())
    for part, present in given.items():
        if not present.any():
            raise CompareError(f"{source}: the {part} part has no rows of these classes.")
        if (unknown := np.flatnonzero((present > 0) & (counts == 0))).size:
            raise CompareError(
                f"{source}: no training rows of {quoted(classes[c] for c in unknown)}, which the "
                f"{part} part has. Add some, or name the classes to keep (--classes)."
            )
    drawn = ["training", *(part for part in ("validation", "test") if part not in given)]
    if (rare := np.flatnonzero(counts < len(drawn))).size:
        listing = ", ".join(f"{classes[c]!r} ({counts[c]})" for c in rare[:10])
        raise CompareError(
            f"{source}: every class needs at least {len(drawn)} rows, one each for "
            f"{', '.join(drawn)}; too few in {rare.size} of {k} classes: {listing}"
            f"{', ...' if rare.size > 10 else ''}. Add rows or merge classes, or leave out rare "
            f"ones with {named('min_class_rows')} or all others with classes."
        )


def _fingerprint(content: Content) -> str:
    """SHA-256 of a form that depends on values alone, each piece preceded by what and how long."""
    features, target = content.features, content.target
    digest = hashlib.sha256(json.dumps([len(target), content.classes]).encode())
    digest.update(target.astype("<i8").tobytes())
    for what, ranks in (("groups", content.groups), ("time", content.time)):
        if ranks is not None:
            digest.update(json.dumps([what, len(ranks)]).encode())
            digest.update(ranks.astype("<i8").tobytes())
    for part, rows in sorted(content.official.items()):
        digest.update(json.dumps([part, len(rows)]).encode())
        digest.update(rows.astype("<i8").tobytes())
    if isinstance(features, Images):
        digest.update(json.dumps(["images", features.shape, features.digest]).encode())
        digest.update(features.rows.astype("<i8").tobytes())
        return digest.hexdigest()
    if isinstance(features, Texts):
        digest.update(json.dumps(["texts", features.texts]).encode())
        return digest.hexdigest()
    if isinstance(features, np.ndarray):
        digest.update(json.dumps(["array", features.shape]).encode())
        digest.update(features.astype("<f4").tobytes())
        return digest.hexdigest()
    for name, column in features.items():
        number = column.dtype == np.float64
        date = pd.api.types.is_datetime64_any_dtype(column)
        kind = "number" if number else "date" if date else "text"
        digest.update(json.dumps([kind, str(name)]).encode())
        if number:
            values = column.to_numpy(dtype="<f8")
            # NaN has many bit patterns; one stands for all.
            digest.update(np.where(np.isnan(values), np.nan, values).tobytes())
        else:
            gaps = column.isna()
            texts = [None if gap else str(value) for gap, value in zip(gaps, column, strict=True)]
            digest.update(json.dumps(texts).encode())
    return digest.hexdigest()
