"""A folder with a sub-folder of images for each class, perhaps in train, validation and test."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from penex.compare.config import Config
from penex.compare.data.dataset import PART_NAMES, Content, official_rows, quoted, roles
from penex.compare.data.images import digest_of, load_images
from penex.compare.errors import CompareError
from penex.compare.files import MAX_IMAGE_BYTES, read_bytes

ENDINGS = (
    ".bmp",
    ".gif",
    ".jpeg",
    ".jpg",
    ".pbm",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)


@dataclass(frozen=True)
class Files:
    """Images in files below a folder."""

    root: Path
    names: tuple[str, ...] = field(repr=False)
    identity: str
    stamp: str

    def __len__(self) -> int:
        return len(self.names)

    def read(self, rows: Sequence[int]) -> list[bytes]:
        try:
            return [read_bytes(self.root / self.names[row], MAX_IMAGE_BYTES) for row in rows]
        except OSError as error:
            raise CompareError(f"cannot read {error.filename}: {error.strerror}.") from error

    def name(self, row: int) -> str:
        return str(self.root / self.names[row])


def read_folder(root: Path, config: Config) -> Content:
    """Images and the names of the folders they are in.

    Raises:
        CompareError: A class folder is empty, images lie outside of class folders, or an image is
            refused.
    """
    below = _folders(root)
    if not below:
        raise CompareError(
            f"{root} holds no data: expected Parquet files; or tables named after their parts, "
            "such as train.csv and test.csv; or a sub-folder with images for each class; or train "
            "and test with such sub-folders in them."
        )
    if all(folder.name in PART_NAMES for folder in below):
        part_of = {PART_NAMES[folder.name]: folder for folder in below}
        if len(part_of) < len(below):
            raise CompareError(f"{root} has the same part twice: {quoted(p.name for p in below)}.")
        used_as = roles(part_of, config.parts, str(root))
        parts = [(used_as[part], part_of[part]) for part in used_as]
    else:
        parts = [("train", root)]
    found = [(role, _images(folder)) for role, folder in parts]
    classes = sorted({name for _, images in found for name in images})
    names, codes, sizes = [], [], []
    for role, images in found:
        for name, paths in images.items():
            names += paths
            codes += [classes.index(name)] * len(paths)
        sizes.append((role, sum(map(len, images.values()))))
    relative = tuple(Path(name).relative_to(root).as_posix() for name in names)
    stats = [Path(name).stat() for name in names]
    files = Files(
        root.resolve(),
        relative,
        digest_of(relative, [stat.st_size for stat in stats]),
        digest_of([stat.st_mtime_ns for stat in stats]),
    )
    pictures = load_images(files, config.image_size)
    target = np.array(codes, dtype=np.int64)
    return Content(pictures, target, tuple(classes), official_rows(sizes))


def _folders(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )


def _images(folder: Path) -> dict[str, list[str]]:
    """Paths of the images of each class, sorted; those in deeper folders belong to the class."""
    stray = [path.name for path in folder.iterdir() if path.name.lower().endswith(ENDINGS)]
    if stray:
        raise CompareError(
            f"{folder}: {quoted(sorted(stray), 3)} must be in a sub-folder, named as its class."
        )
    images = {}
    for path in _folders(folder):
        files = sorted(
            os.path.join(where, name)  # noqa: PTH118  # a Path for each of a million is slow
            for where, _, names in os.walk(path)
            for name in names
            if name.lower().endswith(ENDINGS) and not name.startswith(".")
        )
        if not files:
            raise CompareError(
                f"{path} holds no images ({', '.join(ENDINGS)}): a class needs some. Add them, or "
                "remove the folder."
            )
        images[path.name] = files
    if not images:
        raise CompareError(f"{folder} has no sub-folders of images, one for each class.")
    return images
