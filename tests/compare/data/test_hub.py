"""Data sets in the format of the hub, read from disk by the code that reads the hub."""

import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from disk import full

from penex.compare.config import Config
from penex.compare.data.dataset import Texts
from penex.compare.data.images import Images
from penex.compare.data.load import Dataset, load
from penex.compare.data.split import split
from penex.compare.errors import CompareError

datasets = pytest.importorskip("datasets")
from PIL import Image  # noqa: E402

DATA = Path(os.environ.get("PENEX_DATA", Path(__file__).parents[4] / "shared" / "data"))


@pytest.fixture(autouse=True)
def _folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read from or left in the user's own caches, or asked from the network."""
    folder = tmp_path_factory.mktemp("caches")
    monkeypatch.setenv("PENEX_CACHE", str(folder / "penex"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "hf")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def read(source: Path | str, **options: Any) -> Dataset:
    return load(Config(data=str(source), **options))


def write(folder: Path, features: Any, **parts: dict[str, list[Any]]) -> Path:
    """Parquet files as the hub has them."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, columns in parts.items():
        rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        rows.to_parquet(folder / f"{part}-00000-of-00001.parquet")
    return folder


def label(*names: str) -> Any:
    return datasets.ClassLabel(names=list(names))


TEXT = {"text": datasets.Value("string"), "label": label("no", "yes", "perhaps")}


def rows(n: int, **changes: Any) -> dict[str, list[Any]]:
    return {"text": [f"text {i}" for i in range(n)], "label": [i % 3 for i in range(n)]} | changes


def test_texts(tmp_path: Path) -> None:
    folder = write(tmp_path / "talk", TEXT, train=rows(30), test=rows(6), unsupervised=rows(9))
    data = read(folder)
    assert isinstance(data.features, Texts)
    # The order of the data set's own classes, and its own parts alone.
    assert (data.name, data.classes, len(data.target)) == ("talk", ("no", "yes", "perhaps"), 36)
    s = split(data, seed=0, config=Config())
    assert s.test[0] == [f"text {i}" for i in range(6)]
    assert s.test[1].tolist() == [0, 1, 2, 0, 1, 2]
    numbers = [int(text.split()[1]) for text in (*s.train[0], *s.validation[0])]
    assert sorted(numbers) == list(range(30))
    assert [n % 3 for n in numbers] == [*s.train[1], *s.validation[1]]
    assert read("hub:me/talk", data_dir=str(folder)).fingerprint == data.fingerprint


def test_columns_are_chosen(tmp_path: Path) -> None:
    features = {
        "question": datasets.Value("string"),
        "answer": datasets.Value("string"),
        "fine": label("a", "b", "c", "d"),
        "coarse": label("x", "y"),
        "plain": datasets.Value("string"),
    }
    columns = {
        "question": [f"q{i}" for i in range(24)],
        "answer": [f"a{i}" for i in range(24)],
        "fine": [i % 4 for i in range(24)],
        "coarse": [i % 2 for i in range(24)],
        "plain": [("ja", "nein", "doch")[i % 3] for i in range(24)],
    }
    folder = write(tmp_path, features, train=columns)
    with pytest.raises(
        CompareError, match=r"\(--target\); its columns 'fine', 'coarse' hold classes"
    ):
        read(folder, text="question")
    with pytest.raises(CompareError, match=r"\(--text\), one of 'question', 'answer', 'plain'"):
        read(folder, target="fine")
    with pytest.raises(CompareError, match=r"no column 'coarce'.*mean 'coarse'"):
        read(folder, target="coarce")
    with pytest.raises(CompareError, match=r"no column 'questions'.*mean 'question'"):
        read(folder, target="coarse", text="questions")
    with pytest.raises(CompareError, match=r"the same column, 'plain'"):
        read(folder, target="plain", text="plain")
    coarse = read(folder, target="coarse", text="answer")
    assert coarse.classes == ("x", "y")
    assert isinstance(coarse.features, Texts)
    assert coarse.features.take([3]) == ["a3"]
    assert read(folder, target="plain", text="answer").classes == ("doch", "ja", "nein")


def picture(pixels: np.ndarray) -> Any:
    return Image.fromarray(pixels)


IMAGE = {"img": datasets.Image(), "label": label("a", "b")}


def pictures(n: int, shape: tuple[int, ...] = (4, 5, 3)) -> tuple[np.ndarray, dict[str, list[Any]]]:
    pixels = np.random.default_rng(n).integers(0, 256, (n, *shape), dtype=np.uint8)
    return pixels, {"img": list(map(picture, pixels)), "label": [i % 2 for i in range(n)]}


def test_images(tmp_path: Path) -> None:
    (train, columns), (test, test_columns) = pictures(12), pictures(6)
    folder = write(tmp_path / "p", IMAGE, train=columns, test=test_columns)
    data = read(folder)
    assert isinstance(data.features, Images)
    assert data.features.shape == (3, 4, 5)
    both = np.concatenate([train, test]).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(data.features.pixels(range(18)), both)
    assert data.official["test"].tolist() == list(range(12, 18))
    # The same files elsewhere are the same data.
    folder.rename(tmp_path / "q")
    assert read(tmp_path / "q").fingerprint == data.fingerprint
    one = read(tmp_path / "q", classes=("b", "a"), parts="drawn")
    assert one.official == {}


def test_changed_files_are_read_again(tmp_path: Path) -> None:
    """Although their names, and even their sizes, are the same."""
    (before, columns), (after, other) = pictures(12), pictures(12)
    other["img"] = [picture(255 - pixels) for pixels in after]
    folder = write(tmp_path, IMAGE, train=columns)
    first = read(folder)
    write(folder, IMAGE, train=other)
    second = read(folder)
    assert isinstance(second.features, Images)
    pixels = second.features.pixels(range(12))
    np.testing.assert_array_equal(pixels, 255 - before.transpose(0, 3, 1, 2))
    assert first.fingerprint != second.fingerprint


def test_missing_image(tmp_path: Path) -> None:
    _, columns = pictures(12)
    columns["img"][3] = None
    with pytest.raises(CompareError, match="1 of 12 images are not in its files"):
        read(write(tmp_path, IMAGE, train=columns))


def test_images_that_stay_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from penex.compare.data import images

    (pixels, columns), (test, test_columns) = pictures(12), pictures(6)
    columns["img"][4] = picture(pixels[4, ..., 0])  # a grey one among them
    folder = write(tmp_path / "p", IMAGE, train=columns, test=test_columns)
    monkeypatch.setattr(images, "BUDGET", 100)
    data = read(folder)
    fingerprint = data.fingerprint
    data = pickle.loads(pickle.dumps(data))
    assert isinstance(data.features, Images)
    assert len(pickle.dumps(data.features)) < 10_000
    np.testing.assert_array_equal(data.features.pixels([17, 0]), [
        test[5].transpose(2, 0, 1), pixels[0].transpose(2, 0, 1)])  # fmt: skip
    np.testing.assert_array_equal(data.features.pixels([4])[0], [pixels[4, ..., 0]] * 3)
    folder.rename(tmp_path / "q")
    assert read(tmp_path / "q").fingerprint == fingerprint


def test_corrupt_image_is_named(tmp_path: Path) -> None:
    _, columns = pictures(6)
    stream = io.BytesIO()
    columns["img"][2].save(stream, "PNG")
    columns["img"][2] = {"bytes": stream.getvalue()[:60], "path": None}
    folder = write(tmp_path, IMAGE, train=pictures(8)[1], test=columns)
    with pytest.raises(CompareError, match=r"cannot decode the image in row 2 .* 'test' of "):
        read(folder)


def test_held_back_labels_are_refused(tmp_path: Path) -> None:
    """As imagenet-1k and GLUE have them: refused, and left out where that is asked for."""
    hidden = rows(9, label=[-1] * 9)
    folder = write(tmp_path / "a", TEXT, train=rows(30), validation=rows(6), test=hidden)
    with pytest.raises(
        CompareError, match=r"9 of 9 rows of the part 'test' have no label.*as-test"
    ):
        read(folder)
    data = read(folder, parts="validation-as-test")
    assert {part: len(given) for part, given in data.official.items()} == {"test": 6}
    folder = write(tmp_path / "b", TEXT, train=rows(30, label=[-1, *[0, 1, 2] * 9, 0, 1]))
    with pytest.raises(CompareError, match=r"1 of 30 rows of the part 'train' have no label"):
        read(folder)
    numbers = TEXT | {"label": datasets.Value("int64")}
    folder = write(tmp_path / "c", numbers, train=rows(30), test=hidden)
    with pytest.raises(CompareError, match=r"9 of 9 rows of the part 'test'"):
        read(folder)
    # -1 and 1 as the names of two classes.
    folder = write(tmp_path / "d", numbers, train=rows(30, label=[-1, 1] * 15))
    assert read(folder).classes == ("-1", "1")
    folder = write(tmp_path / "e", TEXT, train=rows(30, label=[None, *[0, 1, 2] * 9, 0, 1]))
    with pytest.raises(CompareError, match=r"1 of 30 rows of the part 'train'"):
        read(folder)


def test_refusals(tmp_path: Path) -> None:
    def fails(match: str, source: Path | str, **options: Any) -> None:
        with pytest.raises(CompareError, match=match) as caught:
            read(source, **options)
        assert "\n" not in str(caught.value)

    folder = write(tmp_path / "a", TEXT, train=rows(30), test=rows(6))
    fails(
        r"should have the parts train and validation.*'train', 'test'",
        folder,
        parts="validation-as-test",
    )
    fails(r"data_dir \(--data-dir\): .* has no use", folder, data_dir="x")
    one = write(tmp_path / "one", TEXT, train=rows(30))
    fails(r"parts: .* has no part test; it has 'train'", one, parts="test")
    zero = write(tmp_path / "zero", IMAGE, train={"img": [], "label": []})
    fails(r"cannot read .*zero: .*no data", zero)
    fails(r"holds no Parquet files .* for hub:me/a", "hub:me/a", data_dir=str(tmp_path / "none"))
    fails(r"expected hub:OWNER/NAME", "hub:")
    fails(r"expected hub:OWNER/NAME", "hub:../a")
    gap = write(tmp_path / "b", TEXT, train=rows(30, text=[None, " ", *["t"] * 28]))
    fails(r"text in column 'text' is missing in 2 of 30 rows", gap)
    new = write(tmp_path / "c", TEXT, train=rows(30, label=[0, 1] * 15), test=rows(6))
    fails(r"no training rows of 'perhaps', which the test part has", new)
    absent = write(tmp_path / "d", TEXT, train=rows(30, label=[0, 1] * 15))
    fails(r"every class needs at least 3 rows.*'perhaps' \(0\)", absent)
    assert read(absent, classes=("no", "yes")).classes == ("no", "yes")
    only = write(tmp_path / "e", TEXT, validation=rows(6), test=rows(6))
    fails(r"has no part train; it has 'validation', 'test'", only)
    numbers = {"x": datasets.Value("float64"), "label": label("a", "b")}
    plain = write(tmp_path / "f", numbers, train={"x": [0.5] * 8, "label": [0, 1] * 4})
    fails(r"no column of images or of text; its columns are 'x', 'label'", plain)
    broken = tmp_path / "g"
    broken.mkdir()
    (broken / "train-0.parquet").write_bytes(b"PAR1 this is not one")
    fails(r"cannot read .*g: .*[Pp]arquet", broken)
    other = write(tmp_path / "h", TEXT, train=rows(30))
    pq.write_table(pa.table({"z": [1]}), other / "test-0.parquet")
    fails(r"cannot read .*h: ", other)


def test_no_space(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", TEXT, train=rows(30), test=rows(6))
    with full(100), pytest.raises(CompareError, match="no space left to read .*HF_HOME"):
        read(folder)
    read(folder)


@pytest.mark.parametrize("name", ["hub:SetFit/bbc-news", "bbc-news", "imagenet"])
def test_unreachable_hub(name: str) -> None:
    with pytest.raises(
        CompareError, match=r"cannot read hub:\w+/[\w-]+: Couldn't reach.*--data-dir"
    ):
        read(name)


# Real data


def there(name: str) -> Path:
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"no {name} data set here")
    return folder


@pytest.mark.parametrize(
    ("name", "files", "sizes", "classes", "shape"),
    [
        ("fashion_mnist", ["test"], [10_000], ("T-shirt/top", "Trouser", "Pullover"), (1, 28, 28)),
        (
            "cifar100",
            ["train-00000", "test"],
            [16_667, 10_000],
            ("apple", "aquarium_fish", "baby"),
            (3, 32, 32),
        ),
    ],
)
def test_real_images(
    tmp_path: Path,
    name: str,
    files: list[str],
    sizes: list[int],
    classes: tuple[str, ...],
    shape: tuple[int, ...],
) -> None:
    """Some of the files, to be quick."""
    folder = there(name)
    for file in files:
        path = next(folder.glob(f"{file}-*"))
        (tmp_path / path.name).symlink_to(path)
    data = read("hub:someone/" + name, data_dir=str(tmp_path))
    assert (data.name, data.classes[:3], len(data.target)) == (name, classes, sum(sizes))
    assert isinstance(data.features, Images)
    assert data.features.shape == shape
    # Some rows as Pillow decodes them from the file itself.
    table = pq.read_table(folder / "test-00000-of-00001.parquet").slice(0, 50).to_pydict()
    column = "img" if name == "cifar100" else "image"
    expected = [np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in table[column]]
    test = data.official.get("test", np.arange(10_000))
    pixels = data.features.pixels(test[:50])
    np.testing.assert_array_equal(
        pixels.transpose(0, 2, 3, 1), np.reshape(expected, (50, *shape[1:], shape[0]))
    )
    labels = table["fine_label" if name == "cifar100" else "label"]
    assert data.target[test[:50]].tolist() == labels
    assert len(pickle.dumps(data)) < 2e6
    s = split(data, seed=0, config=Config(train_size=1000))
    test_rows = 10_000 if data.official else 2500
    assert [len(y) for _, y in (s.train, s.validation, s.test)] == [1000, 250, test_rows]


@pytest.mark.parametrize(
    ("name", "sizes", "k"), [("banking77", (10_003, 3_080), 77), ("trec", (5_452, 500), 6)]
)
def test_real_texts(name: str, sizes: tuple[int, int], k: int) -> None:
    data = read(there(name))
    assert (len(data.target) - sizes[1], len(data.official["test"])) == sizes
    assert (len(data.classes), data.target.max()) == (k, k - 1)
    table = pq.read_table(DATA / name / "test-00000-of-00001.parquet").to_pydict()
    x, y = split(data, seed=0, config=Config()).test
    assert x == table["text"]
    assert y.tolist() == table["coarse_label" if name == "trec" else "label"]
