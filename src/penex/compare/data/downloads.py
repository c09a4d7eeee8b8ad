"""Downloads of data sets that neither a library nor the hub provides in their published form."""

import errno
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten

import numpy as np
import pandas as pd

from penex._extras import need
from penex.compare.config import Config
from penex.compare.data.arrays import read_npz
from penex.compare.data.dataset import (
    UNREADABLE,
    Content,
    encode_labels,
    require_file,
    unreadable_file,
)
from penex.compare.data.images import cache_folder
from penex.compare.errors import CompareError


@dataclass(frozen=True)
class Download:
    """A file, its URL and its checksum."""

    file: str
    url: str
    checksum: str


DOWNLOADS = {
    # Gorman and Sejnowski, 1988, in the version of the UCI repository.
    "sonar": Download(
        "sonar.csv",
        "https://raw.githubusercontent.com/jbrownlee/Datasets/"
        "a8229c90a131a53c58be9027e047e6a74f11a264/sonar.csv",
        "sha256:3079c09b5d2789a0f96aff82c28e5164fafe2495c5f8da96c6c256c1bd25763f",
    ),
    # MedMNIST 3.0.2, 64 x 64.
    "pathmnist": Download(
        "pathmnist_64.npz",
        "https://zenodo.org/records/10519652/files/pathmnist_64.npz?download=1",
        "md5:55aa9c1e0525abe5a6b9d8343a507616",
    ),
}
TISSUES = (
    "adipose",
    "background",
    "debris",
    "lymphocytes",
    "mucus",
    "smooth muscle",
    "normal colon mucosa",
    "cancer-associated stroma",
    "colorectal adenocarcinoma epithelium",
)


def read_pathmnist(config: Config) -> Content:
    """Read images of nine kinds of tissue, 64 x 64, from `config.data_dir` if given.

    Raises:
        CompareError: The file cannot be obtained, or has different content.
    """
    path = _file("pathmnist", config.data_dir)
    content = read_npz(path, config)
    if not set(content.classes) <= set(map(str, range(len(TISSUES)))):
        raise CompareError(f"{path}: expected the labels 0 to 8; got {', '.join(content.classes)}.")
    return replace(content, classes=tuple(TISSUES[int(label)] for label in content.classes))


def read_sonar(data_dir: str | None) -> Content:
    """Read sonar echoes of mines and rocks, 208 rows of 60 numbers, from `data_dir` if given.

    Raises:
        CompareError: The file cannot be obtained, or has different content.
    """
    path = _file("sonar", data_dir)
    try:
        frame = pd.read_csv(path, header=None)
    except UNREADABLE as error:
        raise unreadable_file(path, "the sonar data set", error) from error
    labels = frame.pop(frame.columns[-1])
    x = frame.to_numpy()
    if x.shape != (208, 60) or x.dtype != np.float64 or set(labels) != {"M", "R"}:
        raise CompareError(
            f"{path}: expected the sonar data set, 208 rows of 60 numbers and M or R, no header; "
            f"got {len(frame)} rows of {frame.shape[1]} and a label."
        )
    codes, classes = encode_labels(labels.map({"M": "mine", "R": "rock"}), str(path))
    return Content(x.astype(np.float32), codes, classes)


def _file(name: str, data_dir: str | None) -> Path:
    if data_dir is None:
        return _fetched(DOWNLOADS[name])
    path = Path(data_dir).expanduser() / DOWNLOADS[name].file
    require_file(path)
    return path


def _fetched(download: Download) -> Path:
    """The file in the cache, downloaded if it is missing or incomplete."""
    need(f"downloading {download.file}", "data", "pooch")
    import pooch

    pooch.get_logger().setLevel("WARNING")
    folder = cache_folder() / "downloads"
    try:
        downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=60)
        file = pooch.retrieve(
            download.url, download.checksum, download.file, folder, downloader=downloader
        )
    except ValueError as error:
        reason = shorten(str(error), 300)
        raise CompareError(f"cannot use {download.url}: {reason}") from error
    except OSError as error:  # includes connection errors
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CompareError(
                f"no space left in {folder} for {download.file} ({error.strerror}). Make room, or "
                "name another folder in PENEX_CACHE."
            ) from error
        reason = shorten(str(error), 150)
        raise CompareError(
            f"cannot download {download.url}: {reason}. Without a connection, name a folder that "
            f"holds {download.file} (--data-dir)."
        ) from error
    return Path(file)
