"""The output folder: what is in it is whole, and belongs to one configuration.

    comparison.json                    configuration, data and its fingerprint
    tuning/<loss>/trial-000/           as a run, for each trial
    runs/<loss>/seed-0/                run.json, curve.csv, logits.npz, last.ckpt, best.ckpt
    results.json  table.tex  report.html

A file appears under its name only when all of it is on disk, and a run's folder only when all its
files are; what is being written has a name that starts with ``.partial-``.
"""

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from penex.compare.config import Config
from penex.compare.data import Dataset
from penex.compare.errors import CompareError

_PARTIAL = ".partial-"


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold `folder` (made if missing) for this process; the system lets go if the process dies.

    Raises:
        CompareError: It cannot be made, or another process is working in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise CompareError(f"out: another comparison is running in {folder}") from None
    except (FileExistsError, NotADirectoryError):
        raise CompareError(f"out: expected a folder, {folder} is a file") from None
    except OSError as error:
        raise CompareError(f"out: cannot work in {folder}: {error.strerror}") from None


@contextlib.contextmanager
def room(folder: Path) -> Iterator[None]:
    """Say plainly that the disk is full if it becomes so while `folder` is written to.

    Raises:
        CompareError: In place of the system's error.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise CompareError(
            f"out: no space left for {folder} ({error.strerror}). Finished runs are kept; make "
            "room and the same command continues."
        ) from error


def claim(folder: Path, config: Config, dataset: Dataset) -> None:
    """Make `folder` this comparison's, or check that it is, and clear what was never finished.

    Raises:
        CompareError: It belongs to another configuration or other data, or holds something else.
    """
    described: dict[str, Any] = {
        "config": config.settings(),
        "data": {
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "rows": len(dataset.target),
            "classes": list(dataset.classes),
        },
    }
    path = folder / "comparison.json"
    if path.exists():
        config_before, data_before = read_comparison(folder)
        before, now = config_before.fixed(), config.fixed()
        changed = [
            f"{name} was {before[name]!r}, is {now[name]!r}"
            for name in now
            if before[name] != now[name]
        ]
        if data_before["fingerprint"] != dataset.fingerprint:
            changed.append(f"data was {_data(data_before)}, is {_data(described['data'])}")
        if changed:
            raise CompareError(
                f"out: {folder} belongs to another configuration ({'; '.join(changed)}); "
                "choose another folder with --out, or remove that one"
            )
    elif any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise CompareError(
            f"out: {folder} is not empty and holds no comparison; choose another --out"
        )
    clear_partial(folder)
    write_json(path, described)


def _data(data: dict[str, Any]) -> str:
    return f"{data['name']} with {data['rows']} rows, content {data['fingerprint'][:8]}"


def clear_partial(folder: Path) -> None:
    """Remove what was being written when a process stopped."""
    for partial in folder.rglob(f"{_PARTIAL}*"):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def read_comparison(folder: Path) -> tuple[Config, dict[str, Any]]:
    """The configuration and the description of the data that `folder` belongs to."""
    path = folder / "comparison.json"
    if not path.exists():
        raise CompareError(f"{folder} holds no comparison: expected {path} in it")
    described = read_json(path)
    try:
        return Config(**described["config"]), described["data"]
    except (KeyError, TypeError, ValueError) as error:
        raise CompareError(f"{path} was not written by this version of penex: {error}") from None


def run_folder(folder: Path, spec: str, seed: int) -> Path:
    """Where the run of a loss at a seed is kept."""
    return folder / "runs" / spec / f"seed-{seed}"


def trial_folder(folder: Path, spec: str, trial: int) -> Path:
    """Where a tuning trial of a loss is kept."""
    return folder / "tuning" / spec / f"trial-{trial:03d}"


@contextlib.contextmanager
def new_run(folder: Path) -> Iterator[Path]:
    """A folder to write a run into, which becomes `folder` at the end unless something raises.

    If `folder` has appeared meanwhile (by a process that outlived its parent, or where locks do
    not hold), that run stays: it is finished, and its numbers are the same.
    """
    partial = folder.parent / f"{_PARTIAL}{folder.name}-{uuid.uuid4().hex[:8]}"
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        try:
            partial.rename(folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def epochs_done(folders: Iterable[Path], epochs_per_run: int) -> int:
    """How many epochs the runs of these `folders` have behind them, finished or not."""
    epochs = 0
    for folder in folders:
        if folder.exists():
            epochs += epochs_per_run
            continue
        for curve in folder.parent.glob(f"{_PARTIAL}{folder.name}-*/curve.csv"):
            with contextlib.suppress(FileNotFoundError):  # finished between look and reading
                epochs += max(curve.read_bytes().count(b"\n") - 1, 0)
    return epochs


def write_text(path: Path, text: str) -> None:
    """Write `path` so that it holds either its old content or all of the new one."""
    partial = path.with_name(f"{_PARTIAL}{path.name}")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value`; NaN and infinity are refused, as JSON has none."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """What :func:`write_json` wrote."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CompareError(
            f"{path} is damaged ({error}); remove {path.parent} and run the comparison again"
        ) from None


def read_logits(folder: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a run's logits.npz."""
    path = folder / "logits.npz"
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # a damaged archive raises anything from zipfile, zlib and numpy
        raise CompareError(
            f"{path} is damaged ({error}); remove {folder} and run the comparison again"
        ) from None
