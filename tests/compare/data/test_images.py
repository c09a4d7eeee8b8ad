"""Images from folders and NPZ files: decoded as Pillow does, once, and shared between processes."""

import io
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from disk import full
from hypothesis import given
from hypothesis import strategies as st

from penex.compare.config import Config
from penex.compare.data import images
from penex.compare.data.images import Images, write_cached
from penex.compare.data.load import Dataset, load
from penex.compare.data.split import split
from penex.compare.errors import CompareError

Image = pytest.importorskip("PIL.Image")

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "penex"
    monkeypatch.setenv("PENEX_CACHE", str(folder))
    return folder


def read(source: Path, **options: Any) -> Dataset:
    return load(Config(data=str(source), **options))


def picture(path: Path, pixels: np.ndarray, **options: Any) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def colours(n: int, height: int = 6, width: int = 5) -> np.ndarray:
    return RNG.integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def folder(root: Path, n: int = 4, **sizes: Any) -> np.ndarray:
    """`n` images of each of the classes cat and dog, as (2 n, H, W, 3)."""
    pixels = colours(2 * n, **sizes)
    for i, image in enumerate(pixels):
        picture(root / ("cat", "dog")[i // n] / f"{i:03d}.png", image)
    return pixels


def features(dataset: Dataset) -> Images:
    assert isinstance(dataset.features, Images)
    return dataset.features


def chw(pixels: np.ndarray) -> np.ndarray:
    return pixels.transpose(0, 3, 1, 2)


# Folders


def test_folder(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    pixels = folder(root)
    (root / ".git").mkdir()
    (root / "cat").rename(root / "_cat")
    (root / "_cat" / "notes.txt").write_text("no image")
    picture(root / "dog" / "deeper" / "z.BMP", pixels[0])
    data = read(root)
    assert (data.name, data.classes, data.official) == ("pets", ("_cat", "dog"), {})
    np.testing.assert_array_equal(data.target, [0] * 4 + [1] * 5)
    assert features(data).shape == (3, 6, 5)
    tensor = features(data).take(range(9))
    assert str(tensor.dtype) == "torch.uint8"
    np.testing.assert_array_equal(tensor, chw(np.concatenate([pixels, pixels[:1]])))


@pytest.mark.parametrize("validation", ["val", "valid", "validation", None])
def test_folder_with_parts(tmp_path: Path, validation: str | None) -> None:
    train, test = folder(tmp_path / "train", 6), folder(tmp_path / "test", 2)
    if validation:
        held_out = folder(tmp_path / validation, 3)
    data = read(tmp_path)
    s = split(data, seed=0, config=Config())
    x, y = s.test
    assert isinstance(x, Images)
    np.testing.assert_array_equal(x.pixels(range(4)), chw(test))
    np.testing.assert_array_equal(y, [0, 0, 1, 1])
    x, y = s.validation
    assert isinstance(x, Images)
    if validation:
        np.testing.assert_array_equal(x.pixels(range(6)), chw(held_out))
    else:
        assert len(x) == 2
        assert set(map(bytes, x.pixels(range(2)))) < set(map(bytes, chw(train)))
    x, y = s.train
    assert isinstance(x, Images)
    assert len(x) == (12 if validation else 10)
    dogs = set(map(bytes, chw(train[6:])))
    assert [bytes(image) in dogs for image in x.pixels(range(len(x)))] == list(y == 1)


@given(
    rows=st.lists(st.integers(0, 7), max_size=12),
    view=st.lists(st.integers(0, 7), min_size=8, max_size=8),
    lazy=st.booleans(),
)
def test_views(rows: list[int], view: list[int], lazy: bool) -> None:
    """A view of a view is what NumPy makes of it, decoded at once or not."""
    pixels = chw(colours(8))

    class Memory:
        identity, stamp = "", ""

        def __len__(self) -> int:
            return 8

        def read(self, rows: Any) -> list[bytes]:
            return [encoded(pixels[row]) for row in rows]

        def name(self, row: int) -> str:
            return str(row)

    source = images.Encoded(Memory(), (3, 6, 5), resize=False) if lazy else pixels
    some = Images(source)[np.array(view)]
    np.testing.assert_array_equal(some.take(rows), pixels[view][rows])
    np.testing.assert_array_equal(
        some[np.array(rows, int)].pixels(range(len(rows))), pixels[view][rows]
    )


def encoded(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(stream, "PNG")
    return stream.getvalue()


def test_modes(tmp_path: Path) -> None:
    """All grey: one channel. Any in colour: three, grey ones repeated, transparency left out."""
    grey = RNG.integers(0, 256, (6, 5), dtype=np.uint8)
    picture(tmp_path / "a" / "l.png", grey)
    Image.fromarray(grey).convert("LA").save(tmp_path / "a" / "la.png")
    picture(tmp_path / "a" / "deep.png", grey.astype(np.uint16) * 257)
    for i in range(3):
        picture(tmp_path / "b" / f"{i}.png", 255 - grey)
    data = features(read(tmp_path))
    assert data.shape == (1, 6, 5)
    np.testing.assert_array_equal(data.pixels(range(6))[:3, 0], [grey] * 3)  # deep, l, la
    np.testing.assert_array_equal(data.pixels([5])[0, 0], 255 - grey)

    colour = colours(1)[0]
    rgba = np.dstack([colour, grey])
    picture(tmp_path / "b" / "rgba.png", rgba)
    Image.fromarray(colour).quantize(8).save(tmp_path / "b" / "palette.gif", transparency=0)
    data = features(read(tmp_path))
    assert data.shape == (3, 6, 5)
    pixels = data.pixels(range(8))
    np.testing.assert_array_equal(pixels[:3], np.broadcast_to(grey, (3, 3, 6, 5)))
    np.testing.assert_array_equal(pixels[7], chw(colour[None])[0])
    with Image.open(tmp_path / "b" / "palette.gif") as image:
        palette = np.asarray(image.convert("RGBA"))[..., :3]
    np.testing.assert_array_equal(pixels[6], chw(palette[None])[0])


def test_cameras_orientation(tmp_path: Path) -> None:
    wide = np.zeros((16, 32, 3), np.uint8)
    wide[:, 16:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter
    for name in ("a/1", "a/2", "a/3", "b/1", "b/2", "b/3"):
        picture(tmp_path / f"{name}.jpg", wide, exif=exif)
    data = features(read(tmp_path))
    assert data.shape == (3, 32, 16)
    assert data.pixels([0])[0, :, 24, 8].min() > 200 > 50 > data.pixels([0])[0, :, 8, 8].max()


@pytest.mark.parametrize("lazy", [True, False])
def test_image_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lazy: bool) -> None:
    pixels = folder(tmp_path, 4)
    large = picture(tmp_path / "dog" / "zz.png", colours(1, 30, 40)[0])
    with pytest.raises(CompareError, match=r"dog/zz\.png is 40 x 30 .*image_size"):
        read(tmp_path)
    if lazy:
        monkeypatch.setattr(images, "BUDGET", 9 * 3 * 8 * 8 - 1)
    data = features(read(tmp_path, image_size=8))
    assert isinstance(data.source, images.Encoded) == lazy
    assert data.shape == (3, 8, 8)
    for row, source in ((0, pixels[0]), (8, large)):
        expected = np.asarray(Image.fromarray(source).resize((8, 8), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(data.pixels([row])[0], expected.transpose(2, 0, 1))


def test_beyond_the_budget_nothing_is_kept(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "pets"
    pixels = folder(root)
    decoded = read(root)
    for path in cache.rglob("*.npy"):
        path.unlink()
    monkeypatch.setattr(images, "BUDGET", pixels.size - 1)
    lazy = read(root)
    assert not list(cache.rglob("*.npy"))
    assert features(lazy).shape == features(decoded).shape
    again: Dataset = pickle.loads(pickle.dumps(lazy))
    np.testing.assert_array_equal(features(again).pixels(range(8)), chw(pixels))
    # Known by names and sizes, wherever the folder is.
    root.rename(tmp_path / "moved")
    assert read(tmp_path / "moved").fingerprint == lazy.fingerprint
    (tmp_path / "moved" / "cat" / "000.png").rename(tmp_path / "moved" / "cat" / "00.png")
    assert read(tmp_path / "moved").fingerprint != lazy.fingerprint


# The cache


def test_second_start_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "pets"
    pixels = folder(root)
    first = read(root)
    monkeypatch.setattr(images, "_opened", None)
    second = read(root)
    assert first.fingerprint == second.fingerprint
    np.testing.assert_array_equal(features(second).pixels(range(8)), chw(pixels))
    assert isinstance(features(second).source, np.memmap)


def test_a_changed_file_is_decoded_again(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    pixels = folder(root)
    first = read(root)
    path = root / "cat" / "000.png"
    before = path.stat()
    # Of the same size in bytes, as an uncompressed file would be.
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert read(root).fingerprint == first.fingerprint  # the pixels are the same
    picture(path, 255 - pixels[0])
    assert read(root).fingerprint != first.fingerprint


def test_workers_get_a_name_instead_of_pixels(tmp_path: Path, cache: Path) -> None:
    pixels = chw(colours(1000, 20, 20))
    shared = write_cached("key", pixels.shape, iter([pixels[:300], pixels[300:]]))
    view = shared[np.array([5, 3])]
    content = pickle.dumps(view)
    assert len(content) < 1000
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).pixels([0, 1]).sum())"
    answer = subprocess.run(
        [sys.executable, "-c", code], input=content, capture_output=True, check=True
    )
    assert int(answer.stdout) == pixels[[5, 3]].sum()
    for path in (cache / "images").glob("key-*"):
        path.unlink()
    with pytest.raises(CompareError, match="cannot read the decoded images in .*PENEX_CACHE"):
        pickle.loads(content)


def test_no_space_for_the_cache(tmp_path: Path, cache: Path) -> None:
    folder(tmp_path / "pets", 40)
    with full(2000), pytest.raises(CompareError, match=r"cannot keep 0 MB .*PENEX_CACHE"):
        read(tmp_path / "pets")
    assert not [path for path in cache.rglob("*") if path.suffix != ".lock" and path.is_file()]
    read(tmp_path / "pets")


def test_cache_that_cannot_be_written(tmp_path: Path, cache: Path) -> None:
    folder(tmp_path / "pets")
    cache.write_text("a file")
    with pytest.raises(CompareError, match=r"cannot keep .* in .*penex"):
        read(tmp_path / "pets")


def test_stopped_while_decoding(tmp_path: Path, cache: Path) -> None:
    """What an interrupted start leaves behind is neither used nor kept."""
    pixels = chw(colours(4))
    path = cache / "images" / ".partial-key"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half")
    np.testing.assert_array_equal(
        write_cached("key", pixels.shape, iter([pixels])).pixels(range(4)), pixels
    )
    assert not path.exists()


# Refusals


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_corrupt_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lazy: bool, damage: str
) -> None:
    folder(tmp_path / "pets", height=30, width=30)
    path = tmp_path / "pets" / "dog" / "005.png"
    content = path.read_bytes()
    path.write_bytes({"cut": content[:500], "text": b"<html>", "empty": b""}[damage])
    if lazy:
        monkeypatch.setattr(images, "BUDGET", 1)
    with pytest.raises(CompareError, match=r"cannot decode the image .*dog/005\.png: ") as caught:
        features(read(tmp_path / "pets")).pixels(range(8))
    assert "\n" not in str(caught.value)


def test_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "pets")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(CompareError, match=r"cannot decode .*pixels"):
        read(tmp_path / "pets")


def test_folder_refusals(tmp_path: Path) -> None:
    def fails(match: str, root: Path, **options: Any) -> None:
        with pytest.raises(CompareError, match=match):
            read(root, **options)

    empty = tmp_path / "empty"
    empty.mkdir()
    fails("holds no data: expected Parquet files; or tables named after", empty)
    pets = tmp_path / "pets"
    folder(pets)
    fails(r"target: .* has no use for it, but 'x' was given", pets, target="x")
    (pets / "bird").mkdir()
    fails(r"pets/bird holds no images", pets)
    (pets / "bird").rmdir()
    picture(pets / "stray.png", colours(1)[0])
    fails(r"'stray\.png' must be in a sub-folder", pets)
    (pets / "stray.png").unlink()
    picture(pets / "bird" / "0.png", colours(1)[0])
    fails(r"at least 3 rows.*'bird' \(1\)", pets)

    parted = tmp_path / "parted"
    folder(parted / "test")
    folder(parted / "val")
    fails(r"has no part train; it has 'test', 'validation'", parted)
    folder(parted / "valid")
    fails(r"the same part twice: 'test', 'val', 'valid'", parted)
    shutil.rmtree(parted / "valid")
    folder(parted / "train")
    for i in range(3):
        picture(parted / "test" / "bird" / f"{i}.png", colours(1)[0])
    fails(r"no training rows of 'bird', which the test part has", parted)
    assert read(parted, classes=("dog", "cat")).classes == ("cat", "dog")
    fails(r"no class 'brid'; it has .* mean 'bird'", parted, classes=("cat", "brid"))


def test_only_formats_of_images_are_opened(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "cat" / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 6\n")
    with pytest.raises(CompareError, match=r"x\.png: none of BMP, GIF"):
        read(tmp_path)


# NPZ files as of MedMNIST


def npz(path: Path, channels: tuple[int, ...] = (3,), **changes: Any) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for part, n in (("train", 30), ("val", 6), ("test", 9)):
        arrays[f"{part}_images"] = RNG.integers(0, 256, (n, 7, 5, *channels), dtype=np.uint8)
        arrays[f"{part}_labels"] = (np.arange(n) % 3).astype(np.uint8)[:, None]
    arrays |= changes
    np.savez_compressed(path, **{k: v for k, v in arrays.items() if v is not None})
    return arrays


@pytest.mark.parametrize("channels", [(), (3,)])
def test_medmnist_layout(tmp_path: Path, channels: tuple[int, ...]) -> None:
    path = tmp_path / "m.npz"
    arrays = npz(path, channels)
    for _ in range(2):  # the second time from the cache
        data = read(path)
        assert (data.name, data.classes) == ("m", ("0", "1", "2"))
        assert features(data).shape == (len(channels) * 2 + 1, 7, 5)
        s = split(data, seed=0, config=Config())
        for name, (x, y) in (("train", s.train), ("val", s.validation), ("test", s.test)):
            assert isinstance(x, Images)
            pixels = arrays[f"{name}_images"].reshape(len(y), 7, 5, -1)
            order = np.argsort(x.rows)
            np.testing.assert_array_equal(x.pixels(order), chw(pixels))
            np.testing.assert_array_equal(y[order], arrays[f"{name}_labels"][:, 0])
    assert features(read(path, image_size=9)).shape[1:] == (9, 9)


def test_parts_that_are_used(tmp_path: Path) -> None:
    npz(tmp_path / "m.npz")
    config = Config(data=str(tmp_path / "m.npz"), validation_size=0.25)
    sizes = {}
    for parts in ("given", "test", "validation-as-test", "drawn"):
        chosen = config.model_copy(update={"parts": parts})
        s = split(load(chosen), seed=0, config=chosen)
        sizes[parts] = [len(part[1]) for part in (s.train, s.validation, s.test)]
    assert sizes == {
        "given": [30, 6, 9],
        "test": [27, 9, 9],  # 36 rows of train and validation
        "validation-as-test": [22, 8, 6],
        "drawn": [26, 8, 11],  # 45 rows
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_labels": None}, r"no array val_labels; it has 'train_images'"),
        ({"train_images": None}, r"exactly the arrays X, y"),
        ({"test_labels": np.eye(9, dtype=int)}, r"one label per image.*test_labels.*\(9, 9\)"),
        (
            {"val_images": np.zeros((6, 7, 5, 2), np.uint8)},
            r"val_images is of shape \(6, 7, 5, 2\)",
        ),
        ({"val_images": np.zeros((6, 7, 5))}, r"expected images as uint8"),
        ({"val_images": np.zeros((6, 8, 5, 3), np.uint8)}, r"differ in shape: \(7, 5, 3\) .*val"),
        ({"val_labels": np.zeros(5, int)}, r"45 images have 44 labels"),
        ({"test_labels": np.full(9, 7)}, r"no training rows of '7', which the test part has"),
        ({"train_images": np.zeros((0, 7, 5, 3), np.uint8)}, r"train_images is of shape \(0"),
    ],
)
def test_medmnist_refusals(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    npz(tmp_path / "m.npz", **changes)
    with pytest.raises(CompareError, match=message):
        read(tmp_path / "m.npz")
