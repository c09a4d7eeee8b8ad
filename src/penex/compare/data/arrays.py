"""Arrays: bundled with scikit-learn, made on the spot, or in an NPZ file."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn import datasets as bundled

from penex.compare.config import Config
from penex.compare.data.dataset import (
    UNREADABLE,
    Content,
    encode_labels,
    official_rows,
    quoted,
    require_file,
    roles,
    unreadable_file,
)
from penex.compare.data.images import BATCH, Images, cached, digest_of, resized, write_cached
from penex.compare.errors import CompareError
from penex.compare.files import open_arrays

BUNDLED = ("breast_cancer", "digits", "iris", "wine")
# MedMNIST's names for the parts.
NPZ_PARTS = {"train": "train", "val": "validation", "test": "test"}


def read_bundled(name: str) -> Content:
    """One of scikit-learn's own data sets; nothing is downloaded."""
    content = getattr(bundled, f"load_{name}")()
    features = content.get("images", content.data).astype(np.float32)
    return Content(features, *encode_labels(pd.Series(content.target_names[content.target]), name))


def two_gaussians() -> Content:
    """The paper's example in two dimensions: 10,000 rows to draw from, 20,000 for test.

    Class "0" is N((3, 3), I) but for one row in ten, an outlier of N((-4, -4), 0.1 I) on the other
    side of class "1", N((-2, -2), I). Each class has half the rows of each part. With a small
    `train_size` (the paper: 100), every seed draws its own training set of the distribution.
    """
    rng = np.random.default_rng(0)
    sizes = (("train", 10_000), ("test", 20_000))
    features, target = [], []
    for _, size in sizes:
        y = np.arange(size) % 2
        outlier = (y == 0) & (rng.random(size) < 0.1)
        mean = np.where(outlier, -4.0, np.where(y == 0, 3.0, -2.0))[:, None]
        spread = np.where(outlier, np.sqrt(0.1), 1.0)[:, None]
        features.append(mean + spread * rng.standard_normal((size, 2)))
        target.append(y)
    x = np.concatenate(features).astype(np.float32)
    return Content(x, np.concatenate(target), ("0", "1"), official_rows(sizes))


def read_npz(path: Path, config: Config) -> Content:
    """`X` and `y`, or images and labels of given parts, of an NPZ file, none of them pickled.

    Raises:
        CompareError: The file cannot be read, or holds other arrays than these.
    """
    require_file(path)
    try:
        with open_arrays(path) as content:
            if "train_images" in content:
                return _given_parts(path, content, config)
            arrays = dict(content)
    except (*UNREADABLE, TypeError) as error:  # TypeError: a bare .npy array under this name
        if isinstance(error, CompareError):
            raise
        raise unreadable_file(path, "an NPZ archive without pickled objects", error) from error
    if set(arrays) != {"X", "y"}:
        raise CompareError(
            f"{path}: expected exactly the arrays X, y; found {quoted(arrays)}. (Or train_images, "
            "train_labels, val_images, ..., as MedMNIST has them.)"
        )
    x, y = arrays["X"], arrays["y"]
    if x.ndim < 2 or y.shape not in ((len(x),), (len(x), 1)):
        raise CompareError(
            f"{path}: expected X of shape (N, ...) with features and y of shape (N,) or (N, 1); "
            f"got X of shape {x.shape} and y of shape {y.shape}."
        )
    y = y.reshape(-1)
    if x.dtype.kind not in "biuf" or y.dtype.kind not in "biufSU":
        raise CompareError(
            f"{path}: expected X to hold real numbers and y integers or strings; "
            f"got X of dtype {x.dtype} and y of dtype {y.dtype}."
        )
    if x.size == 0:
        raise CompareError(f"{path}: X of shape {x.shape} holds no values; nothing to learn from.")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf and is refused
        features = np.ascontiguousarray(x, dtype=np.float32)
    if bad := int(features.size - np.isfinite(features).sum()):
        raise CompareError(
            f"{path}: X must be finite in float32; {bad} of {features.size} values are NaN, "
            "infinite or beyond 3.4e38. Replace them or remove their rows."
        )
    labels = pd.Series(np.char.decode(y, "utf-8") if y.dtype.kind == "S" else y)
    return Content(features, *encode_labels(labels, str(path)))


def _given_parts(path: Path, arrays: "np.lib.npyio.NpzFile", config: Config) -> Content:
    """Images of parts, in MedMNIST's layout."""
    part_of = {NPZ_PARTS[key]: key for key in NPZ_PARTS if f"{key}_images" in arrays}
    role = roles(part_of, config.parts, str(path))
    labels = []
    for part in role:
        name = f"{part_of[part]}_labels"
        if name not in arrays:
            raise CompareError(f"{path} has no array {name}; it has {quoted(arrays)}.")
        y = arrays[name]
        if y.size != len(y) or y.dtype.kind not in "iuSU":
            raise CompareError(
                f"{path}: expected one label per image, integers or strings of shape (N,) or "
                f"(N, 1); {name} is of shape {y.shape} and dtype {y.dtype}."
            )
        labels.append(y.reshape(-1))
    names = [f"{part_of[part]}_images" for part in role]
    file = path.stat()
    key = digest_of(path.name, file.st_size, file.st_mtime_ns, names, config.image_size)
    images = cached(key) or _pixels(path, arrays, names, key, config.image_size)
    sizes = [len(y) for y in labels]
    if len(images) != sum(sizes):
        raise CompareError(f"{path}: {len(images)} images have {sum(sizes)} labels.")
    codes, classes = encode_labels(pd.Series(np.concatenate(labels)), str(path))
    rows = official_rows(zip(role.values(), sizes, strict=True))
    return Content(images, codes, classes, rows)


def _pixels(
    path: Path, arrays: "np.lib.npyio.NpzFile", names: list[str], key: str, image_size: int | None
) -> Images:
    """The arrays of `names` one after another, as (N, C, H, W)."""
    parts: list[npt.NDArray[np.uint8]] = []
    for name in names:
        x = arrays[name]
        if x.ndim == 3:
            x = x[..., None]
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] not in (1, 3) or 0 in x.shape:
            raise CompareError(
                f"{path}: expected images as uint8 of shape (N, H, W) or (N, H, W, 3); {name} is "
                f"of shape {arrays[name].shape} and dtype {x.dtype}."
            )
        if parts and x.shape[1:] != parts[0].shape[1:]:
            raise CompareError(
                f"{path}: images differ in shape: {parts[0].shape[1:]} in {names[0]}, "
                f"{x.shape[1:]} in {name}."
            )
        parts.append(x)
    height, width, channels = parts[0].shape[1:]
    if image_size:
        height = width = image_size
    blocks = (
        resized(x[i : i + BATCH], (width, height)).transpose(0, 3, 1, 2)
        for x in parts
        for i in range(0, len(x), BATCH)
    )
    return write_cached(key, (sum(map(len, parts)), channels, height, width), blocks)
