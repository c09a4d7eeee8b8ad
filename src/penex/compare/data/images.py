"""Images: decoded once into one array that all processes share, or one by one when asked for.

Where all images together fit :data:`BUDGET`, their pixels are kept in the user's cache folder as
one file, which every process on the machine maps into its memory; the next start decodes nothing.
"""

import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from penex._extras import need
from penex.compare.errors import CompareError, named

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

BUDGET = 4 * 2**30
"""Most bytes of pixels that are decoded at once."""

BATCH = 1000
# Formats that Pillow decodes itself; EPS, say, would run another program.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N")


class Pictures(Protocol):
    """Images in their files' formats, wherever these are; cheap to pickle."""

    @property
    def identity(self) -> str:
        """Digest of names and sizes, the same on every machine."""

    @property
    def stamp(self) -> str:
        """Changes whenever a file on this machine does."""

    def __len__(self) -> int: ...

    def read(self, rows: Sequence[int]) -> list[bytes]:
        """The files of `rows`, in their order."""

    def name(self, row: int) -> str:
        """What to call an image in a message."""


class Images:
    """N images of one size, or a view of some of them.

    Attributes:
        shape: (C, H, W), C being 1 (grey) or 3 (RGB).
        digest: SHA-256 of all pixels; of names and file sizes for images not decoded at once.
    """

    def __init__(
        self,
        source: "npt.NDArray[np.uint8] | Encoded",
        digest: str = "",
        rows: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Images of `source`: pixels of shape (N, C, H, W), or files; all, or `rows` of them."""
        self.source = source
        self.digest = digest
        self.rows = np.arange(len(source)) if rows is None else rows
        self.shape: tuple[int, int, int] = source.shape[-3:]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: npt.NDArray[np.int64]) -> "Images":
        """A view of `rows`; nothing is copied or decoded."""
        return Images(self.source, self.digest, self.rows[rows])

    def pixels(self, rows: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        """The images of `rows`, uint8 of shape (n, C, H, W), in their order, as a copy.

        Raises:
            CompareError: A file cannot be decoded.
        """
        chosen = self.rows[np.asarray(rows, dtype=np.int64)]
        if isinstance(self.source, Encoded):
            return self.source.decode(chosen)
        return np.asarray(self.source[chosen])

    def take(self, rows: npt.ArrayLike) -> "Tensor":
        """As :meth:`pixels`, as a tensor."""
        import torch  # only the processes that train

        return torch.from_numpy(self.pixels(rows))

    def __getstate__(self) -> dict[str, object]:
        # A mapped file goes to other processes by its name: its bytes are on the disk already.
        if isinstance(self.source, np.memmap):
            return self.__dict__ | {"source": Path(str(self.source.filename))}
        return self.__dict__

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        if isinstance(state["source"], Path):
            self.source = _mapped(state["source"])


@dataclass(frozen=True)
class Encoded:
    """Images that are decoded, and resized to `shape` (C, H, W), each time they are asked for."""

    pictures: Pictures
    shape: tuple[int, int, int]
    resize: bool

    def __len__(self) -> int:
        return len(self.pictures)

    def decode(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """The images of `rows`, of shape (n, C, H, W)."""
        files = self.pictures.read([int(row) for row in rows])
        pixels = np.empty((len(files), *self.shape), np.uint8)
        for i, (row, file) in enumerate(zip(rows, files, strict=True)):
            try:
                pixels[i] = self._decoded(file)
            except _UNDECODABLE as error:
                raise _corrupt(self.pictures.name(int(row)), error) from error
        return pixels

    def _decoded(self, file: bytes) -> npt.NDArray[np.uint8]:
        channels, height, width = self.shape
        image = _opened(file)
        if image.mode.startswith("I"):  # 16 bits of grey
            from PIL.Image import fromarray

            image = fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
        if image.mode in ("P", "PA"):  # its colours first: their transparency would warn
            image = image.convert("RGBA")
        image = image.convert("L" if channels == 1 else "RGB")
        if self.resize:
            image = image.resize((width, height), resample=2)  # bilinear, over all source pixels
        if image.size != (width, height):
            raise ValueError(
                f"it is {image.width} x {image.height}, others are {width} x {height} (width x "
                f"height): set {named('image_size')} to resize all"
            )
        return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


def load_images(pictures: Pictures, image_size: int | None) -> Images:
    """Images of one size, decoded at once if they fit :data:`BUDGET`.

    Args:
        pictures: At least one.
        image_size: Height and width to resize to; None: all must be alike already. Where the size
            is given and images in colour would not fit the budget, they are taken to be in colour
            without a look at each.

    Raises:
        CompareError: An image cannot be decoded, or differs in size; the cache cannot be written.
    """
    need("comparing on images", "data", "PIL", "pooch")
    if image_size and len(pictures) * 3 * image_size**2 > BUDGET:
        in_colour = Encoded(pictures, (3, image_size, image_size), resize=True)
        return Images(in_colour, pictures.identity)
    key = digest_of(pictures.identity, pictures.stamp, image_size)
    found = cached(key)
    if found is not None:
        return found
    encoded = _surveyed(pictures, image_size)
    if len(pictures) * int(np.prod(encoded.shape)) > BUDGET:
        return Images(encoded, pictures.identity)
    batches = (range(i, min(i + BATCH, len(pictures))) for i in range(0, len(pictures), BATCH))
    shape = (len(pictures), *encoded.shape)
    return write_cached(key, shape, (encoded.decode(batch) for batch in batches))


def _surveyed(pictures: Pictures, image_size: int | None) -> Encoded:
    """The common shape of all images, by a look at the header of each."""
    first: tuple[int, int] | None = None
    grey = True
    for start in range(0, len(pictures), BATCH):
        rows = range(start, min(start + BATCH, len(pictures)))
        for row, file in zip(rows, pictures.read(rows), strict=True):
            try:
                image = _opened(file)
            except _UNDECODABLE as error:
                raise _corrupt(pictures.name(row), error) from error
            grey = grey and image.mode in GREY
            first = first or image.size
            if image_size is None and image.size != first:
                raise CompareError(
                    f"images differ in size: {pictures.name(0)} is {first[0]} x {first[1]}, "
                    f"{pictures.name(row)} is {image.width} x {image.height} (width x height); "
                    f"set {named('image_size')} to resize all."
                )
    width, height = (image_size, image_size) if image_size else first or (0, 0)
    return Encoded(pictures, (1 if grey else 3, height, width), resize=image_size is not None)


def resized(images: npt.NDArray[np.uint8], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Images of shape (n, H, W, C) at another (width, height), as files are resized."""
    from PIL import Image

    width, height = size
    if images.shape[1:3] == (height, width):
        return images
    result = np.empty((len(images), height, width, images.shape[-1]), np.uint8)
    for i, pixels in enumerate(images):
        image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
        image = image.resize(size, Image.Resampling.BILINEAR)
        result[i] = np.asarray(image).reshape(result.shape[1:])
    return result


# What Pillow raises on a file that is damaged or no image: SyntaxError is for broken PNG files.
_UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, OverflowError, MemoryError)


def _opened(file: bytes) -> "Image":
    """An image with its header read, upright."""
    from PIL import Image, ImageOps

    with warnings.catch_warnings():
        # A decompression bomb: refused instead of warned about.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(file), formats=FORMATS)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ValueError(str(error)) from error
    if image.mode == "F":
        raise ValueError("its pixels are fractions")
    # PNG files have no use for a camera's orientation, and looking for it would decode them.
    return image if image.format == "PNG" else ImageOps.exif_transpose(image)


def _corrupt(name: str, error: BaseException) -> CompareError:
    reason = str(error).splitlines() or [type(error).__name__]
    if "cannot identify image file" in reason[0]:
        reason = [f"none of {', '.join(FORMATS)}"]
    return CompareError(f"cannot decode the image {name}: {reason[0]}. Replace or remove it.")


# The cache


def cache_folder() -> Path:
    """Where decoded images and downloads are kept: $PENEX_CACHE, or the user's cache folder."""
    import pooch

    return Path(os.environ.get("PENEX_CACHE") or pooch.os_cache("penex"))


def cached(key: str) -> Images | None:
    """The images that were written under `key`, if any."""
    found = next((cache_folder() / "images").glob(f"{key}-*.npy"), None)
    return None if found is None else Images(_mapped(found), found.stem.partition("-")[2])


def write_cached(
    key: str, shape: tuple[int, ...], blocks: Iterator[npt.NDArray[np.uint8]]
) -> Images:
    """Write pixels of `shape` (N, C, H, W), given in `blocks` of rows, for `cached` to find.

    Raises:
        CompareError: The cache folder cannot be written to, or has no space left.
    """
    folder = cache_folder() / "images"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{key}.lock"):
            found = cached(key)  # another process was faster
            if found is None:
                _write(folder, key, shape, blocks)
                found = cached(key)
    except OSError as error:
        megabytes = int(np.prod(shape)) / 1e6
        raise CompareError(
            f"cannot keep {megabytes:.0f} MB of decoded images in {folder}: {error.strerror}. "
            "Make room there, or name another folder in PENEX_CACHE."
        ) from error
    assert found is not None  # noqa: S101
    return found


def _write(
    folder: Path, key: str, shape: tuple[int, ...], blocks: Iterator[npt.NDArray[np.uint8]]
) -> None:
    # Not through a memory map, where a full disk kills the process.
    partial = folder / f".partial-{key}"
    digest = hashlib.sha256(json.dumps(shape).encode())
    try:
        with partial.open("wb") as stream:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(stream, header)
            for block in blocks:
                content = np.ascontiguousarray(block).data
                digest.update(content)
                stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.rename(folder / f"{key}-{digest.hexdigest()}.npy")
    finally:
        partial.unlink(missing_ok=True)


def _mapped(path: Path) -> npt.NDArray[np.uint8]:
    try:
        pixels: npt.NDArray[np.uint8] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise CompareError(
            f"cannot read the decoded images in {path}: {error}. Remove that file, if it is "
            "there, and start again. Several machines need a folder they share in PENEX_CACHE."
        ) from error
    return pixels


def digest_of(*parts: object) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
