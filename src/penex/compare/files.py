"""Reading and writing files in folders that may have come from someone else.

A file is written under a new name that follows no link, and then renamed. What is read is an
ordinary file of bounded size: no pipe that blocks, no archive or header that declares more than
memory holds.
"""

import contextlib
import json
import os
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from penex.compare.errors import CompareError

PARTIAL = ".partial-"
"""Prefix of the names of unfinished files and folders."""
MAX_BYTES = 4 * 2**30
"""Largest size of a data file after decompression, and of the arrays in it (4 GiB)."""
MAX_ROWS = 100_000_000
"""Largest number of rows of a table."""
MAX_IMAGE_BYTES = 2**28
"""Largest size of an image file (256 MiB)."""
MAX_JSON_BYTES = 64 * 2**20
"""Largest size of a JSON file (64 MiB)."""
MAX_DEPTH = 20
"""Deepest nesting of values in JSON and YAML."""
_LOGGER = "wandb"
"""The folder in which the logger of that name links its latest files."""


def write_bytes(path: Path, content: bytes) -> None:
    """Write `path` so that it holds either its old content or all of the new one."""
    with replacing(path) as stream:
        stream.write(content)


def write_text(path: Path, text: str) -> None:
    """As :func:`write_bytes`, of text in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """As :func:`write_bytes`, of plain values. NaN and infinity are refused, as JSON has none."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A stream whose content becomes that of `path` at the end, unless something raises.

    An existing file is never written to, neither directly nor through a link.
    """
    partial = path.with_name(f"{PARTIAL}{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        with partial.open("xb") as stream:  # exclusive creation follows no link
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def refuse_links(folder: Path) -> None:
    """Refuse an output folder that contains anything but regular files and folders.

    A link could lead what is written or read to another place, a pipe would block. `folder` itself
    may be a link.

    Raises:
        CompareError: It contains a link or a special file; the message names the first.
    """
    for where, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(where, name)
            if path.is_symlink():
                own = _LOGGER in path.relative_to(folder).parts[:-1]
                if own and path.resolve().is_relative_to(folder.resolve()):
                    continue
                what = "a symbolic link"
            elif name in names and path.exists() and not path.is_file():
                what = "not a regular file"
            else:
                continue
            raise CompareError(
                f"{path} is {what}, which penex does not follow; remove it or replace it by "
                "the files themselves"
            )


def read_bytes(path: Path, most: int = MAX_BYTES) -> bytes:
    """The content of a regular file.

    Raises:
        CompareError: It is a pipe or a device, or longer than `most` bytes.
        OSError: It cannot be read.
    """
    require_regular(path)
    if path.stat().st_size > most:
        raise CompareError(f"{path} is larger than {most / 2**20:g} MiB")
    return path.read_bytes()


def require_regular(path: Path) -> None:
    """Refuse a pipe or a device, which would block or never end.

    Raises:
        CompareError: It is one of these, or a folder.
    """
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "a pipe, socket or device"
        raise CompareError(f"cannot read {path}: it is {what}, expected a regular file")


@contextlib.contextmanager
def reading(path: Path, remedy: str = "") -> Iterator[None]:
    """Report any error while `path` is read as a CompareError that names the file.

    Args:
        path: Of the file.
        remedy: What to do, in place of running the comparison again.

    Raises:
        CompareError: In place of any other error but that of a missing extra.
    """
    try:
        yield
    except (CompareError, ImportError):
        raise
    except Exception as error:  # damaged content raises anything from zipfile, json, numpy, torch
        reason = shorten(f"{type(error).__name__}: {error}", 200)
        remedy = remedy or f"remove {path.parent} and run the comparison again"
        raise CompareError(f"{path} is damaged ({reason}); {remedy}") from None


def read_json(path: Path, remedy: str = "") -> Any:
    """What :func:`write_json` wrote.

    Raises:
        CompareError: The file is missing, too large, nested too deeply, or damaged.
    """
    with reading(path, remedy):
        value = json.loads(read_bytes(path, MAX_JSON_BYTES), parse_constant=_no_number)
        level = [value]
        for _ in range(MAX_DEPTH):
            level = [
                each
                for outer in level
                if isinstance(outer, dict | list)
                for each in (outer.values() if isinstance(outer, dict) else outer)
            ]
        if level:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        return value


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def check_archive(path: Path, most: int = MAX_BYTES) -> None:
    """Refuse a zip archive whose members are larger than `most` bytes together.

    The declared sizes are checked; zipfile never decompresses more than these.

    Raises:
        CompareError: They are larger.
        zipfile.BadZipFile: It is not a zip archive.
    """
    with zipfile.ZipFile(path) as archive:
        _refuse_large(path, sum(member.file_size for member in archive.infolist()), most)


def _refuse_large(path: Path, size: int, most: int) -> None:
    if size > most:
        raise CompareError(f"{path} decompresses to more than {most / 2**30:.3g} GiB.")


@contextlib.contextmanager
def open_arrays(path: Path, most: int = MAX_BYTES) -> Iterator[Any]:
    """An NPZ archive as :func:`numpy.load` opens it, or the array of an NPY file.

    Sizes are checked before anything is allocated; nothing is unpickled.

    Raises:
        CompareError: It is a pipe or a device, or holds more than `most` bytes.
        ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error: It is no such file.
    """
    require_regular(path)
    if zipfile.is_zipfile(path):
        check_archive(path, most)
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.filename.endswith(".npy"):
                    with archive.open(member) as stream:
                        _check_header(path, stream, member.file_size)
    else:
        size = path.stat().st_size
        _refuse_large(path, size, most)
        with path.open("rb") as stream:
            _check_header(path, stream, size)
    with path.open("rb") as stream:
        found = np.load(stream, allow_pickle=False)
        with found if hasattr(found, "files") else contextlib.nullcontext():
            yield found


def _check_header(path: Path, stream: IO[bytes], size: int) -> None:
    """Refuse an array whose header declares more values than its file has bytes for."""
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    version = npy.read_magic(stream)
    if version not in readers:
        raise ValueError(f"an array in format {version}")
    shape, _, dtype = readers[version](stream)
    count = 1
    for length in shape:
        count *= length
    if not dtype.hasobject and (count < 0 or count * max(dtype.itemsize, 1) > size):
        raise ValueError(f"an array of shape {shape} and type {dtype} in {size} bytes")
