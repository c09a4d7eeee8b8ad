"""The output folder: what is in it is whole, and belongs to one configuration.

    comparison.json                    configuration, data and its fingerprint
    tuning/<loss>/trial-000/           as a run, for each trial
    runs/<loss>/seed-0/                run.json, curve.csv, logits.npz, model.json, ...
    timing.json                        seconds of a training epoch, each loss measured alone
    results.json  table.tex  report.html

A file appears under its name only when all of it is on disk, and a run's folder only when all its
files are; what is being written has a name that starts with ``.partial-``. An unfinished run that
has written a checkpoint keeps its folder under such a name, and goes on in it the next time.
"""

import contextlib
import errno
import glob
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from penex.compare.config import PATHS, Config
from penex.compare.data.load import NAMES, Dataset, load
from penex.compare.errors import CompareError, named
from penex.compare.files import PARTIAL, read_json, reading, refuse_links, write_json
from penex.compare.registry import parse_loss

CHECKPOINT = "resume.ckpt"
"""In the folder of an unfinished run: all that it needs to go on."""

_STARTED = "started.json"
_ID = "????????"
"""Ends the name of an unfinished run's folder, as a glob pattern."""


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Lock `folder`, created if missing, until the context ends or the process dies.

    Raises:
        CompareError: It cannot be made, holds links, or another process is working in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        refuse_links(folder)
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise CompareError(f"out: another comparison is running in {folder}") from None
    except (FileExistsError, NotADirectoryError):
        raise CompareError(f"out: expected a folder, {folder} is a file") from None
    except OSError as error:
        raise CompareError(f"out: cannot work in {folder}: {error.strerror}") from None


@contextlib.contextmanager
def report_full_disk(folder: Path) -> Iterator[None]:
    """Report a full disk as a CompareError while `folder` is written to.

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


def start_or_resume(folder: Path, config: Config, dataset: Dataset) -> None:
    """Create the comparison in `folder`, or check that it is the same, and remove unfinished files.

    A folder in which nothing was trained yet is taken over. Finished runs of other losses or
    further seeds are kept, and the configuration becomes the union.

    Raises:
        CompareError: `folder` belongs to another configuration or other data, or contains other
            files.
    """
    data = {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "rows": len(dataset.target),
        "classes": list(dataset.classes),
        "parts": sorted(dataset.official),
    }
    path = folder / "comparison.json"
    if path.exists() and not _holds_work(folder):
        for made in ("runs", "tuning"):
            shutil.rmtree(folder / made, ignore_errors=True)
        path.unlink()
    if path.exists():
        config_before, data_before = read_comparison(folder)
        before, now = config_before.fixed(), config.fixed()
        changed = [
            f"{named(name)} was {before[name]!r}, is {now[name]!r}"
            for name in now
            if name in before and before[name] != now[name]
        ]
        if data_before["fingerprint"] != dataset.fingerprint:
            changed.append(f"data was {_data(data_before)}, is {_data(data)}")
        shared = [spec for spec in config.losses if spec in config_before.losses]
        changed += [
            f"learning rate of {spec} was {lr_before!r}, is {lr!r}"
            for spec in shared
            if (lr_before := config_before.lr_for(spec)) != (lr := config.lr_for(spec))
        ]
        if changed:
            raise CompareError(
                f"out: {folder} belongs to another configuration ({'; '.join(changed)}); "
                "choose another folder with --out, or remove that one"
            )
        config = _union(folder, config_before, config)
    elif any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise CompareError(
            f"out: {folder} is not empty and holds no comparison; choose another --out"
        )
    clear_partial(folder)
    write_json(path, {"config": config.settings(), "data": data})


def _union(folder: Path, before: Config, now: Config) -> Config:
    """`now` with the losses and seeds of `before` that have finished runs, in their order."""
    runs = [
        (spec, seed)
        for spec in before.losses
        for seed in range(before.seeds)
        if (run_folder(folder, spec, seed) / "run.json").exists()
    ]
    finished = {spec for spec, _ in runs}
    kept = [spec for spec in before.losses if spec in finished or spec in now.losses]
    spelled = {parse_loss(spec).label: spec for spec in kept}
    for spec in now.losses:
        earlier = spelled.get(parse_loss(spec).label, spec)
        if earlier != spec:
            raise CompareError(
                f"losses: {folder} has this loss as {earlier}; use that name for {spec}"
            )
    losses = (*kept, *(spec for spec in now.losses if spec not in kept))
    rates = before.lr_of | now.lr_of
    return now.model_copy(
        update={
            "losses": losses,
            "seeds": max(now.seeds, *(seed + 1 for _, seed in runs), 1),
            "lr_of": {spec: rates[spec] for spec in losses if spec in rates},
        }
    )


def _holds_work(folder: Path) -> bool:
    """Whether a run is finished there, or got as far as a checkpoint.

    Until then the folder can be taken over by another comparison.
    """
    return any(any(folder.rglob(name)) for name in ("run.json", CHECKPOINT))


def _data(data: dict[str, Any]) -> str:
    return f"{data['name']} with {data['rows']} rows, content {data['fingerprint'][:8]}"


def clear_partial(folder: Path) -> None:
    """Remove what was being written when a process stopped, except runs that can go on."""
    for partial in list(folder.rglob(f"{PARTIAL}*")):
        if partial.parent.name.startswith(PARTIAL):
            continue  # a part of a run, which is judged as a whole
        if partial.suffix == ".lock":
            with _locked(partial.with_suffix("")):
                pass
        elif partial.is_file():
            partial.unlink(missing_ok=True)
        else:
            run = partial.name.removeprefix(PARTIAL)[: -len(_ID) - 1]
            with _locked(partial) as ours:
                finished = partial.with_name(run).exists()
                if ours and (finished or not (partial / CHECKPOINT).exists()):
                    shutil.rmtree(partial, ignore_errors=True)


class _Data(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    name: str
    fingerprint: str
    rows: Annotated[int, Field(ge=1)]
    classes: Annotated[list[str], Field(min_length=2)]
    parts: list[str]


def read_comparison(folder: Path) -> tuple[Config, dict[str, Any]]:
    """The configuration and the description of the data that `folder` belongs to.

    Raises:
        CompareError: `folder` holds none, a damaged one, or links.
    """
    path = comparison_file(folder)
    described = read_json(path)
    try:
        for spec in described["config"]["losses"]:
            parse_loss(str(spec))
        config, data = Config(**described["config"]), described["data"]
        _Data.model_validate(data)
    except CompareError:  # of a loss, which says what to do
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise CompareError(f"{path} was not written by this version of penex: {error}") from None
    return config, data


def load_data(
    folder: Path, data: str | None = None, data_dir: str | None = None
) -> tuple[Config, Dataset]:
    """The configuration of a comparison, and its data loaded again.

    Paths in it are relative to the working directory, or to a folder above the output folder.

    Args:
        folder: The output folder.
        data: Where the data are now, if not where `folder` says.
        data_dir: As the setting of that name, likewise.

    Raises:
        CompareError: They cannot be read, or have changed.
    """
    config, described = read_comparison(folder)
    given = {"data": data, "data_dir": data_dir}
    values = {name: given.get(name) or getattr(config, name) for name in PATHS}
    config = config.model_copy(
        update={name: value and _found(value, folder) for name, value in values.items()}
    )
    try:
        dataset = load(config)
    except CompareError as error:
        raise CompareError(
            f"cannot read the data of {folder}: {error} If they are elsewhere, name the place with "
            "--data, or start the command in the folder where they are."
        ) from None
    if dataset.fingerprint != described["fingerprint"]:
        raise CompareError(
            f"{config.data} has changed since {folder} was made: the content is "
            f"{dataset.fingerprint[:8]}, was {described['fingerprint'][:8]}"
        )
    return config, dataset


def _found(path: str, folder: Path) -> str:
    """The path from the first folder that has it; else, and for names of data sets, as it is."""
    if path in NAMES:
        return path
    bases = (Path(), *folder.absolute().parents)
    return next((str(b / path) for b in bases if (b / path).expanduser().exists()), path)


def comparison_file(folder: Path) -> Path:
    """The file that describes a comparison.

    Raises:
        CompareError: `folder` holds none.
    """
    path = folder / "comparison.json"
    if not path.is_file():
        raise CompareError(f"{folder} holds no comparison: expected {path} in it")
    refuse_links(folder)
    return path


_TIMING = TypeAdapter(dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]])


def read_timing(folder: Path) -> dict[str, float]:
    """Seconds of a training epoch of each loss; none where they were not measured, or are lost."""
    path = folder / "timing.json"
    if not path.exists():
        return {}
    try:
        with reading(path):
            return _TIMING.validate_python(read_json(path))
    except CompareError:
        return {}


def run_folder(folder: Path, spec: str, seed: int) -> Path:
    """Where the run of a loss at a seed is kept."""
    return folder / "runs" / spec / f"seed-{seed}"


def trial_folder(folder: Path, spec: str, trial: int) -> Path:
    """Where a tuning trial of a loss is kept."""
    return folder / "tuning" / spec / f"trial-{trial:03d}"


def checkpoint_file(run: Path, epoch: int) -> Path:
    """Where a run keeps the network of a selected epoch."""
    return run / f"epoch-{epoch}.safetensors"


@contextlib.contextmanager
def new_run(folder: Path, started: object = None) -> Iterator[Path]:
    """A folder to write a run into, which becomes `folder` at the end unless something raises.

    It is the folder of an earlier process that wrote :data:`CHECKPOINT` before it stopped, if there
    is one of the same `started`; else it is new and empty. If something raises after a checkpoint
    was written, it stays for a later process. No two processes get the same one: each is locked,
    and the system lets go of the lock if its holder dies.

    If `folder` has appeared meanwhile (by a process that outlived its parent, or where locks do
    not hold), that run stays: it is finished, and its numbers are the same.

    Args:
        folder: Of the finished run.
        started: All that decides the run's numbers, in values that JSON has.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    started = json.loads(json.dumps(started))
    with contextlib.ExitStack() as stack:
        partial = _resumable(folder, started, stack) or _new_partial(folder, started, stack)
        try:
            yield partial
            for file in partial.rglob("*"):
                if file.is_file():
                    with file.open("rb") as stream:
                        os.fsync(stream.fileno())
            (partial / CHECKPOINT).unlink(missing_ok=True)
            (partial / _STARTED).unlink(missing_ok=True)
            try:
                partial.rename(folder)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
        finally:
            if not (partial / CHECKPOINT).exists():
                shutil.rmtree(partial, ignore_errors=True)


def _resumable(folder: Path, started: object, stack: contextlib.ExitStack) -> Path | None:
    """The folder of an unfinished run that can go on, held by `stack`; others are removed."""
    for partial in folder.parent.glob(f"{PARTIAL}{glob.escape(folder.name)}-{_ID}"):
        with contextlib.ExitStack() as held:
            if not held.enter_context(_locked(partial)):
                continue  # in use by another process
            with contextlib.suppress(OSError, ValueError):
                same = json.loads((partial / _STARTED).read_text(encoding="utf-8")) == started
                if same and (partial / CHECKPOINT).exists():
                    for unfinished in partial.glob(f"{PARTIAL}*"):  # killed while it was written
                        unfinished.unlink()
                    stack.push(held.pop_all())
                    return partial
            shutil.rmtree(partial, ignore_errors=True)
    return None


def _new_partial(folder: Path, started: object, stack: contextlib.ExitStack) -> Path:
    partial = folder.with_name(f"{PARTIAL}{folder.name}-{uuid.uuid4().hex[:8]}")
    stack.enter_context(_locked(partial))
    partial.mkdir()
    write_json(partial / _STARTED, started)
    return partial


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[bool]:
    """Hold an unfinished run's folder, or one to be made; False if another process does.

    The lock file is removed together with the folder.
    """
    path = partial.with_name(f"{partial.name}.lock")
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        if not partial.exists():
            path.unlink(missing_ok=True)
        lock.release()


def unfinished_curves(folder: Path) -> list[Path]:
    """The curve.csv of a run that is to become `folder`; several if it was begun several times."""
    return list(folder.parent.glob(f"{PARTIAL}{glob.escape(folder.name)}-{_ID}/curve.csv"))


def epochs_done(folders: Iterable[Path], epochs_per_run: int) -> int:
    """How many epochs the runs of these `folders` have behind them, finished or not."""
    epochs = 0
    for folder in folders:
        if folder.exists():
            epochs += epochs_per_run
            continue
        for curve in unfinished_curves(folder):
            with contextlib.suppress(FileNotFoundError):  # finished between look and reading
                epochs += max(curve.read_bytes().count(b"\n") - 1, 0)
    return epochs
