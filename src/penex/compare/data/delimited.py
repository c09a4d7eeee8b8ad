"""Delimited text (CSV, TSV): compression, encoding and separator are found from the content.

The separator is found by clevercsv, an encoding other than Unicode by chardet.
"""

import bz2
import codecs
import contextlib
import gzip
import lzma
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pandas as pd

from penex.compare.errors import CompareError
from penex.compare.files import MAX_BYTES, MAX_ROWS

SEPARATORS = {".csv": ",", ".txt": ",", ".tsv": "\t", ".tab": "\t"}
"""Endings, and the separator where the content does not show it (a single column, say)."""
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zip")
ENDINGS = tuple(f"{ending}{more}" for ending in SEPARATORS for more in ("", *COMPRESSIONS))

_CANDIDATES = (",", ";", "\t", "|")
_SAMPLE = 2**16
"""Bytes at the start in which the separator is looked for."""
_BLOCK = 2**20
_BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it starts with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_CONFIDENT = 0.05
"""chardet's confidence from which its answer is more often right than Windows-1252."""


@dataclass(frozen=True)
class Delimited:
    """What a file of delimited text holds.

    Attributes:
        names: The header, without blanks around names; "" where there is none.
        frame: The rows below it, its columns in the same order.
        separator: Of its fields.
        encoding: As Python names it.
    """

    names: list[str]
    frame: pd.DataFrame
    separator: str
    encoding: str


def read_delimited(path: Path, text: str | None, as_text: Collection[str] = ()) -> Delimited:
    """Read a table of delimited text.

    Args:
        path: The file, perhaps compressed by gzip, bzip2, xz or zip.
        text: A column whose values are to be read as they are written: "None", "NA" and "12" are
            texts too. None: no such column.
        as_text: Columns whose numbers are texts ("007").

    Raises:
        CompareError: It is larger than :data:`MAX_BYTES` or :data:`MAX_ROWS`.
        ValueError, OSError, EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile: It is damaged
            or no table.
    """
    with _opened(path) as (stream, compressed):
        encoding = _encoding(stream, path, MAX_BYTES if compressed else None)
        stream.seek(0)
        head = codecs.getincrementaldecoder(encoding)(errors="replace").decode(stream.read(_SAMPLE))
        separator = _separator(head, path)
        line = head.partition("\n")[0]
        fields = line.count(separator)
        options: dict[str, Any] = {
            "sep": separator,
            "encoding": encoding,
            # Only where the header shows it: elsewhere, blanks belong to the texts.
            "skipinitialspace": fields > 0 and line.count(f"{separator} ") == fields,
            "index_col": False,
        }

        def read(**more: Any) -> pd.DataFrame:
            stream.seek(0)
            frame: pd.DataFrame = pd.read_csv(stream, **options, **more)
            return frame

        with warnings.catch_warnings():
            # Rows longer than the header would lose their last fields with no more than this.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            # The header apart, because pandas renames what comes twice ("a", "a.1").
            header = read(header=None, nrows=1, dtype=str, na_filter=False)
            names = [str(name).strip() for name in header.iloc[0]]
            frame = read(low_memory=False)
            for column in [k for k, name in enumerate(names) if name in as_text]:
                frame[frame.columns[column]] = read(usecols=[column], dtype=str).iloc[:, 0]
            if text in names:
                column = names.index(text)
                frame[frame.columns[column]] = read(
                    usecols=[column], dtype=str, na_filter=False
                ).iloc[:, 0]
    return Delimited(names, frame, separator, encoding)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], bool]]:
    """The decompressed content, and whether it is compressed at all; whatever the ending says."""
    with path.open("rb") as file:
        start = file.read(6)
        file.seek(0)
        openers: dict[bytes, Callable[[IO[bytes]], Any]] = {
            b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
            b"BZh": bz2.BZ2File,
            b"\xfd7zXZ\0": lzma.LZMAFile,
            b"PK\x03\x04": _unzipped,
        }
        opener = next((openers[magic] for magic in openers if start.startswith(magic)), None)
        if opener is not None:
            with opener(file) as stream:
                yield stream, True
        elif path.name.lower().endswith(COMPRESSIONS):
            raise ValueError("it is not compressed as its ending says")
        else:
            yield file, False


def _unzipped(file: IO[bytes]) -> IO[bytes]:
    archive = zipfile.ZipFile(file)
    members = [member for member in archive.infolist() if not member.is_dir()]
    if len(members) != 1:
        raise ValueError(f"expected one file in the archive, it has {len(members)}")
    return archive.open(members[0])


def _encoding(stream: IO[bytes], path: Path, most: int | None) -> str:
    """The encoding of all of `stream`, which must not be longer than `most` bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    unicode, size, lines = True, 0, 0
    head, foreign = b"", b""
    while block := stream.read(_BLOCK):
        head = head or block
        size += len(block)
        lines += block.count(b"\n")
        if most is not None and size > most:
            raise CompareError(
                f"{path} decompresses to more than {most / 2**30:.3g} GiB. If you know where it is "
                "from, decompress it and name the result."
            )
        if lines > MAX_ROWS:
            raise CompareError(f"{path} has more than {MAX_ROWS:,} rows; use a sample of them.")
        try:
            decoder.decode(block)
        except UnicodeDecodeError:
            unicode = False
        if len(foreign) < _SAMPLE and not block.isascii():
            foreign += b"\n".join(line for line in block.split(b"\n") if not line.isascii())
    for mark, encoding in _BOMS.items():
        if head.startswith(mark):
            return encoding
    if unicode and b"\0" not in head:
        return "utf-8"
    import chardet

    # Of an 8-bit encoding, ASCII lines say nothing, and many of them lower the confidence.
    found = chardet.detect(
        head[:_SAMPLE] if b"\0" in head else foreign[:_SAMPLE],
        encoding_era=chardet.EncodingEra.MODERN_WEB,
        prefer_superset=True,
    )
    if found["encoding"] is None or found["confidence"] < _CONFIDENT:
        with contextlib.suppress(UnicodeDecodeError):
            foreign.decode("cp1252")
            return "cp1252"
    return codecs.lookup(found["encoding"] or "cp1252").name


def _separator(head: str, path: Path) -> str:
    """What separates the fields of `head`; what the ending says if each line is one field."""
    import clevercsv

    ending = next(each for each in SEPARATORS if each in path.name.lower())
    complete = head[: head.rfind("\n") + 1] or head
    try:
        dialect = clevercsv.Sniffer().sniff(complete, delimiters=_CANDIDATES)
    except clevercsv.Error:
        dialect = None
    return (dialect and dialect.delimiter) or SEPARATORS[ending]
