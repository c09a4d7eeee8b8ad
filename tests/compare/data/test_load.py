"""Reading and splitting of real files; each refusal with the helpful part of its message."""

import gzip
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

import penex.compare.data.load
from penex.compare.config import Config
from penex.compare.data.dataset import Texts
from penex.compare.data.load import Dataset
from penex.compare.data.scaling import ColumnScale
from penex.compare.data.split import Split, draw_rows, split
from penex.compare.errors import CompareError

ROOT = Path(__file__).parents[3]
DATA = Path(os.environ.get("PENEX_DATA", ROOT.parent / "shared" / "data"))


def load(source: str, target: str | None = None, **options: Any) -> Dataset:
    return penex.compare.data.load.load(Config(data=source, target=target, **options))


def cut(dataset: Dataset, seed: int = 0, **options: Any) -> Split:
    return split(dataset, seed=seed, config=Config(**({"test_size": 0.2} | options)))


def same(a: Split, b: Split) -> bool:
    return all(
        np.array_equal(x, y)
        for p, q in zip(parts(a), parts(b), strict=True)
        for x, y in zip(p, q, strict=True)
    )


def parts(s: Split) -> tuple[Any, Any, Any]:
    return s.train, s.validation, s.test


def table(n: int = 120) -> pd.DataFrame:
    """Every kind of column, with gaps, and a name that HTML and CSV must quote."""
    rng = np.random.default_rng(7)
    i = np.arange(n)
    frame = pd.DataFrame(
        {
            "number": rng.normal(1e6, 3.0, n),
            "gaps": np.where(i % 5 == 0, np.nan, rng.normal(size=n)),
            '<b>naïve, "quoted"</b>\n日本': np.array(["rot", "grün", "blåu", 'a,"b'])[i % 4],
            "day": [str(date(2023, 12, 1) + timedelta(days=int(k))) for k in i],
            "flag": i % 3 == 0,
            "flag with gaps": [None if k % 7 == 0 else bool(k % 2) for k in i],
            "mostly number": ["?" if k % 9 == 0 else str(k) for k in i],
            "free text": [f"Straße {k * 37 % n} – {'links' if k % 2 else 'rechts'}" for k in i],
            "constant": "k",
            "nothing": None,
            "label": np.array(["ja", "nein", "vielleicht"])[rng.permutation(i % 3)],
        }
    )
    frame["day"] = frame["day"].where(i % 11 != 0)
    return frame


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    path = tmp_path / "täble.csv"
    table().to_csv(path, index=False)
    return path


def written(tmp_path: Path, text: str, name: str = "t.csv") -> str:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def npz(tmp_path: Path, **arrays: Any) -> str:
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    return str(path)


# ---- reading ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        ("digits", (1797, 8, 8), tuple("0123456789")),
        ("wine", (178, 13), ("class_0", "class_1", "class_2")),
        ("breast_cancer", (569, 30), ("benign", "malignant")),
        ("iris", (150, 4), ("setosa", "versicolor", "virginica")),
    ],
)
def test_bundled(name: str, shape: tuple[int, ...], classes: tuple[str, ...]) -> None:
    from sklearn import datasets

    ours, theirs = load(name), getattr(datasets, f"load_{name}")()
    assert (ours.name, ours.classes, ours.features.shape) == (name, classes, shape)
    assert isinstance(ours.features, np.ndarray)
    assert (ours.features.dtype, ours.target.dtype) == (np.float32, np.int64)
    flat = ours.features.reshape(len(ours.target), -1)
    np.testing.assert_array_equal(flat, theirs.data.astype(np.float32))
    # The codes follow the sorted names, which is not scikit-learn's order for breast_cancer.
    assert [ours.classes[k] for k in ours.target] == [
        str(theirs.target_names[k]) for k in theirs.target
    ]


def test_column_kinds(csv: Path) -> None:
    data = load(str(csv), "label")
    frame = table()
    assert data.name == "täble"
    assert data.classes == ("ja", "nein", "vielleicht")
    assert isinstance(data.features, pd.DataFrame)
    assert list(data.features.columns) == [c for c in frame.columns if c != "label"]
    numbers = {"number", "gaps", "flag", "flag with gaps", "mostly number", "nothing"}
    assert set(data.features.columns[data.features.dtypes == np.float64]) == numbers
    assert pd.api.types.is_datetime64_any_dtype(data.features["day"])
    np.testing.assert_array_equal(data.features["gaps"], frame["gaps"])
    np.testing.assert_array_equal(data.features["flag with gaps"][:3], [np.nan, 1.0, 0.0])
    np.testing.assert_array_equal(data.features["mostly number"][:3], [np.nan, 1.0, 2.0])
    assert data.features["day"].isna().sum() == frame["day"].isna().sum() == 11
    assert [data.classes[k] for k in data.target] == list(frame["label"])


@pytest.mark.parametrize("name", ["t.csv.gz", "t.tsv", "t.tsv.gz", "T.CSV", "bom.csv"])
def test_equal_content_gives_equal_datasets(csv: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    separator = "\t" if "tsv" in name else ","
    compression = "gzip" if name.endswith(".gz") else None
    encoding = "utf-8-sig" if name == "bom.csv" else "utf-8"
    table().to_csv(path, index=False, sep=separator, compression=compression, encoding=encoding)
    other, data = load(str(path), "label"), load(str(csv), "label")
    assert other.fingerprint == data.fingerprint
    assert other.name == name.split(".")[0]


def test_parquet_and_csv_give_equal_datasets(csv: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    frame = table()
    frame["day"] = pd.to_datetime(frame["day"]).dt.date  # date32, not text
    frame["flag with gaps"] = frame["flag with gaps"].astype("boolean")
    frame["nothing"] = frame["nothing"].astype("float64")
    frame.to_parquet(path)
    assert load(str(path), "label").fingerprint == load(str(csv), "label").fingerprint


@pytest.mark.parametrize(
    ("train", "validation"),
    [("train.csv", "val.csv"), ("Train.TSV", "validation.csv.gz"), ("train.parquet", "dev.tsv.gz")],
)
def test_a_folder_of_tables(csv: Path, tmp_path: Path, train: str, validation: str) -> None:
    frame = pd.read_csv(csv)
    folder = tmp_path / "parts"
    folder.mkdir()
    pieces = {train: frame[:70], validation: frame[70:90], "test.csv": frame[90:]}
    for name, piece in pieces.items():
        if name.endswith("parquet"):
            piece.to_parquet(folder / name)
        else:
            separator = "\t" if "tsv" in name.lower() else ","
            # The order of columns may differ.
            piece[piece.columns[::-1]].to_csv(folder / name, index=False, sep=separator)
    (folder / "sample_submission.csv").write_text("id,label\n")
    whole, data = load(str(csv), "label"), load(str(folder), "label")
    assert (data.name, data.classes) == ("parts", whole.classes)
    assert {part: rows.tolist() for part, rows in data.official.items()} == {
        "validation": [*range(70, 90)],
        "test": [*range(90, 120)],
    }
    assert isinstance(whole.features, pd.DataFrame)
    assert isinstance(data.features, pd.DataFrame)
    pd.testing.assert_frame_equal(data.features[whole.features.columns], whole.features)
    assert np.array_equal(data.target, whole.target)
    assert load(str(folder), "label", parts="test").official.keys() == {"test"}
    assert load(str(folder), "label", parts="drawn").official == {}


def test_gaps_in_one_of_several_tables(tmp_path: Path) -> None:
    """A column is one kind of thing in all of them, and so are the labels."""
    written(tmp_path, "x,z,y\n" + "".join(f"{i / 4},{i},{i % 2}\n" for i in range(20)), "train.csv")
    written(tmp_path, "x,z,y\n?,1,0\n2.25,?,1\n", "test.csv")
    data = load(str(tmp_path), "y")
    assert isinstance(data.features, pd.DataFrame)
    assert (data.features.dtypes == np.float64).all()
    np.testing.assert_array_equal(data.features["x"][-3:], [19 / 4, np.nan, 2.25])
    np.testing.assert_array_equal(data.features["z"][-3:], [19, 1, np.nan])
    assert data.classes == ("0", "1")


def test_texts_in_a_folder_of_tables(tmp_path: Path) -> None:
    written(tmp_path, "t,y\n" + "ja,1\nNA,0\n" * 4, "train.csv")
    written(tmp_path, "t,y\n12,1\n", "test.csv")
    data = load(str(tmp_path), "y", text="t")
    assert isinstance(data.features, Texts)
    assert data.features.texts == ["ja", "NA"] * 4 + ["12"]


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        (
            {"test.csv": "x,w,y\n1,2,a\n"},
            {},
            r"test\.csv and .*train\.csv must have the same .* has 'w', 'z'\.",
        ),
        ({"test.csv": "x,z\n1,2\n"}, {}, r"test\.csv has no column 'y'; its columns are 'x', 'z'"),
        ({"train.tsv": "x\tz\ty\n"}, {}, r"the part train twice: 'train\.csv', 'train\.tsv'"),
        ({"val.csv": "", "dev.csv": ""}, {}, r"validation twice: 'dev\.csv', 'val\.csv'"),
        ({}, {"target": None}, r"train\.csv is a table: name the column to predict \(--target\)"),
        ({}, {"parts": "test"}, r"has no part test; it has 'train'"),
    ],
)
def test_folders_of_tables_that_are_refused(
    tmp_path: Path, files: dict[str, str], options: dict[str, Any], message: str
) -> None:
    for name, text in ({"train.csv": "x,z,y\n" + "1,2,a\n2,2,b\n" * 6} | files).items():
        written(tmp_path, text, name)
    with pytest.raises(CompareError, match=message):
        load(str(tmp_path), **({"target": "y"} | options))


def test_parquet_types(tmp_path: Path) -> None:
    from decimal import Decimal

    path, i = tmp_path / "t.parquet", np.arange(30)
    frame = pd.DataFrame(
        {
            "decimal": [Decimal(int(k)) / 4 for k in i],
            "nullable": pd.array([None if k % 4 == 0 else k for k in i], dtype="Int64"),
            "duration": pd.to_timedelta(i, unit="h"),
            "zoned": pd.date_range("2024-03-30", periods=30, freq="h", tz="Europe/Paris"),
            "category": pd.Categorical([("a", "b", None)[k % 3] for k in i]),
            "label": i % 2,
        },
        index=pd.Index(i * 2, name="kept index"),
    )
    frame.to_parquet(path)
    data = load(str(path), "label")
    assert data.classes == ("0", "1")
    assert isinstance(data.features, pd.DataFrame)
    np.testing.assert_array_equal(data.features["kept index"], i * 2)
    np.testing.assert_array_equal(data.features["duration"], i * 3600.0)
    np.testing.assert_array_equal(data.features["decimal"], i / 4)
    s = cut(data, validation_size=0.3)
    # 4 numbers and 1 gap indicator; year is constant but day, month, hour, seconds stay (5); 3
    # categories, missing among them.
    assert s.train[0].shape[1] == 5 + 5 + 3


def test_numeric_labels_are_sorted_by_value_and_whole(tmp_path: Path) -> None:
    rows = "".join(f"{i},{label}\n" for i, label in enumerate([10, 2, 1] * 4))
    assert load(written(tmp_path, "x,y\n" + rows), "y").classes == ("1", "2", "10")
    halves = "".join(f"{i},{label}\n" for i, label in enumerate([2.0, 1.5, 10.0] * 5))
    assert load(written(tmp_path, "x,y\n" + halves), "y").classes == ("1.5", "2.0", "10.0")
    x = np.zeros((6, 1))
    assert load(npz(tmp_path, X=x, y=np.array([3.0, 1, 3, 1, 3, 1]))).classes == ("1", "3")
    assert load(npz(tmp_path, X=x, y=np.array([True, False] * 3))).classes == ("False", "True")
    assert load(npz(tmp_path, X=x, y=np.array(["ü", "o"] * 3))).classes == ("o", "ü")
    assert load(npz(tmp_path, X=x, y=np.array([b"u", b"o"] * 3))).classes == ("o", "u")
    assert load(npz(tmp_path, X=x, y=np.array([[3], [1]] * 3))).classes == ("1", "3")


def test_row_numbers_are_no_feature(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    frame = pd.DataFrame({"x": np.arange(9) / 2, "y": [0, 1, 2] * 3})
    frame.iloc[::-1].to_csv(path)
    features = load(str(path), "y").features
    assert isinstance(features, pd.DataFrame)
    assert list(features.columns) == ["x"]
    # A nameless column that holds anything else stays.
    frame.set_index("x").to_csv(path, index_label="")
    features = load(str(path), "y").features
    assert isinstance(features, pd.DataFrame)
    assert list(features.iloc[:, 0]) == list(frame["x"])
    frame.assign(x=[1, 2, 3] * 3).set_index("x").assign(z=1).to_csv(path, index_label="")
    features = load(str(path), "y").features
    assert isinstance(features, pd.DataFrame)
    assert list(features.iloc[:, 0]) == [1, 2, 3] * 3


def test_repeated_row_labels_in_parquet(csv: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    frame = pd.read_csv(csv)
    frame.index = pd.Index(np.arange(120) // 2)
    frame.to_parquet(path)
    assert load(str(path), "label").fingerprint == load(str(csv), "label").fingerprint


def test_npz_keeps_shape(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 255, (50, 3, 5, 7), dtype=np.uint8)
    data = load(npz(tmp_path, X=x, y=np.arange(50) % 2))
    assert isinstance(data.features, np.ndarray)
    np.testing.assert_array_equal(data.features, x.astype(np.float32))
    s = cut(data)
    assert [p[0].shape for p in parts(s)] == [(32, 3, 5, 7), (8, 3, 5, 7), (10, 3, 5, 7)]


def test_text_column(tmp_path: Path) -> None:
    texts = ["NA", "12", "Wie, bitte?", "None", " padded ", 'a "quote"'] * 5
    frame = pd.DataFrame({"id": range(30), "body": texts, "label": ["x", "y"] * 15, "z": None})
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_parquet(tmp_path / "t.parquet")
    data = load(str(tmp_path / "t.csv"), "label", text="body")
    assert isinstance(data.features, Texts)
    assert data.features.take(range(30)) == texts
    assert load(str(tmp_path / "t.parquet"), "label", text="body").fingerprint == data.fingerprint
    s = cut(data)
    for x, y in parts(s):
        assert all(texts.index(text) % 2 == label for text, label in zip(x, y, strict=True))
    with pytest.raises(CompareError, match=r"no column 'Bodi'.*mean 'body'"):
        load(str(tmp_path / "t.csv"), "label", text="Bodi")
    with pytest.raises(CompareError, match="the same column, 'label'"):
        load(str(tmp_path / "t.csv"), "label", text="label")
    with pytest.raises(CompareError, match="'id' holds integer values, not texts"):
        load(str(tmp_path / "t.parquet"), "label", text="id")
    frame.assign(body=[" ", None, *texts[2:]]).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(CompareError, match=r"text in column 'body' is missing in 2 of 30 rows"):
        load(str(tmp_path / "t.csv"), "label", text="body")


# ---- fingerprint -----------------------------------------------------------------------------


def test_fingerprint_in_another_process(csv: Path) -> None:
    code = (
        "import sys; from penex.compare.data.load import load\n"
        "from penex.compare.data.split import split\n"
        "from penex.compare.config import Config; import hashlib\n"
        "c = Config(data=sys.argv[1], target='label', test_size=.2, train_size=60)\n"
        "d = load(c); s = split(d, seed=3, config=c)\n"
        "h = hashlib.sha256()\n"
        "for part in (s.train, s.validation, s.test):\n"
        "    for a in part: h.update(a.tobytes())\n"
        "print(d.fingerprint, h.hexdigest(), load(Config(data='iris')).fingerprint)"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", code, str(csv)],
            env=os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads,
                              "OPENBLAS_NUM_THREADS": threads},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed, threads in (("0", "1"), ("1234", "2"))
    }  # fmt: skip
    assert len(answers) == 1
    assert answers.pop().split()[0] == load(str(csv), "label").fingerprint


def changed(frame: pd.DataFrame, row: int, column: str, value: Any) -> pd.DataFrame:
    frame = frame.astype({column: object})
    frame.loc[row, column] = value
    return frame


@pytest.mark.parametrize(
    "change",
    [
        lambda f: changed(f, 1, "number", f["number"][1] + 1e-9),
        lambda f: changed(f, 1, "gaps", None),
        lambda f: changed(f, 0, "gaps", 0.0),
        lambda f: changed(f, 1, "free text", "other"),
        lambda f: changed(f, 1, "day", "2023-12-03"),
        lambda f: changed(f, 2, "label", "nein" if f["label"][2] == "ja" else "ja"),
        lambda f: f.rename(columns={"gaps": "Gaps"}),
        lambda f: f.assign(label=f["label"].replace("ja", "si")),
        lambda f: f.iloc[::-1],
        lambda f: f.iloc[:-1],
        lambda f: f.drop(columns="nothing"),
    ],
)
def test_fingerprint_differs(
    csv: Path, tmp_path: Path, change: Callable[[pd.DataFrame], pd.DataFrame]
) -> None:
    other = tmp_path / "other.csv"
    change(table()).to_csv(other, index=False)
    assert load(str(other), "label").fingerprint != load(str(csv), "label").fingerprint


def test_fingerprint_of_arrays_differs(tmp_path: Path) -> None:
    x, y = np.arange(24.0).reshape(6, 4), np.array([0, 1] * 3)
    variants = [
        {"X": x, "y": y},
        {"X": x.reshape(6, 2, 2), "y": y},
        {"X": x + 1, "y": y},
        {"X": x, "y": 1 - y},
        {"X": x, "y": y + 1},
    ]
    prints = [load(npz(tmp_path, **v)).fingerprint for v in variants]
    assert len(set(prints)) == len(prints)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("digits", "digits"),
        ("hub:SetFit/bbc-news", "bbc-news"),
        ("hub:owner/set.v2:english", "set.v2"),
        ("some/where/my table.CSV.gz", "my table"),
        ("t.2024.xlsx", "t.2024"),
        ("a.npz", "a"),
    ],
)
def test_short_name(source: str, name: str) -> None:
    assert penex.compare.data.load.short_name(source) == name


# ---- splitting -------------------------------------------------------------------------------


def numbered(dataset: Dataset) -> Dataset:
    """The same labels, each row's features being the binary digits of its number."""
    n = len(dataset.target)
    bits = (np.arange(n)[:, None] >> np.arange(n.bit_length())) & 1
    return replace(dataset, features=bits.astype(np.float32))


def row_numbers(dataset: Dataset, **changes: Any) -> list[list[int]]:
    """Row numbers of each part in order: standardisation keeps the sign of a digit's deviation."""
    s = cut(numbered(dataset), **changes)
    return [((x > 0) @ (1 << np.arange(x.shape[1]))).tolist() for x, _ in parts(s)]


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(20, 90), min_size=2, max_size=6),
    seed=st.integers(0, 2**31),
    v=st.sampled_from([0.1, 0.2, 0.5]),
    t=st.sampled_from([0.1, 0.2, 0.4]),
)
def test_parts_are_disjoint_complete_and_stratified(
    counts: list[int], seed: int, v: float, t: float
) -> None:
    y = np.repeat(np.arange(len(counts)), counts)
    data = Dataset("h", np.zeros((len(y), 1), np.float32), y, tuple(map(str, counts)), "")
    sets = list(map(set, row_numbers(data, seed=seed, validation_size=v, test_size=t)))
    total = len(y)
    assert sorted(set.union(*sets)) == list(range(total))
    assert len(sets[2]) == round(t * total)
    assert len(sets[1]) == round(v * (total - round(t * total)))
    for rows in sets:
        got = np.bincount(y[list(rows)], minlength=len(counts))
        share = np.array(counts) * len(rows) / total
        # One row from each of the two successive roundings.
        assert (np.abs(got - share) < 2.0).all()
        assert (got > 0).all()


def test_labels_stay_with_their_rows() -> None:
    digits = load("digits")
    for rows, (_, y) in zip(
        row_numbers(digits, train_size=300), parts(cut(digits, train_size=300)), strict=True
    ):
        assert len(set(rows)) == len(rows)
        assert np.array_equal(digits.target[rows], y)


def test_train_size_and_unused_rows() -> None:
    digits = load("digits")
    s = cut(digits, train_size=300)
    assert [len(p[1]) for p in parts(s)] == [300, 75, 359]
    assert [len(p[1]) for p in parts(cut(digits))] == [1150, 288, 359]
    assert len(cut(digits, train_size=302, validation_size=0.25).validation[1]) == 101  # 100.67


def test_test_rows_depend_on_seed_and_share_alone() -> None:
    digits = load("digits")
    test = row_numbers(digits)[2]
    for change in (
        {"train_size": 100},
        {"train_size": 301, "label_noise": 0.3},
        {"validation_size": 0.4},
    ):
        assert row_numbers(digits, **change)[2] == test
    assert set(row_numbers(digits, seed=1)[2]) != set(test)


@pytest.mark.parametrize("options", [{"tune": 1}, {"test_split": "once"}])
@pytest.mark.parametrize("train_size", [None, 200])
def test_no_seed_trains_on_test_rows_of_another(
    options: dict[str, Any], train_size: int | None
) -> None:
    data = load("digits")
    drawn = [row_numbers(data, seed=seed, train_size=train_size, **options) for seed in range(6)]
    tested = np.unique(np.concatenate([test for _, _, test in drawn]))
    for train, validation, test in drawn:
        assert np.array_equal(test, drawn[0][2])
        assert np.intersect1d(np.concatenate([train, validation]), tested).size == 0
    for part in (0, 1):
        assert len({tuple(rows[part]) for rows in drawn}) == 6
    # Those of seed 0 are the same with a draw for each seed.
    assert np.array_equal(drawn[0][2], row_numbers(data, train_size=train_size)[2])


def test_seeds_differ_and_repeat(csv: Path) -> None:
    for data in (load("wine"), load(str(csv), "label")):
        first = cut(data, seed=5, label_noise=0.2)
        assert same(first, cut(data, seed=5, label_noise=0.2))
        assert not same(first, cut(data, seed=6, label_noise=0.2))


@settings(max_examples=20, deadline=None)
@given(noise=st.floats(0, 0.99), seed=st.integers(0, 1000), name=st.sampled_from(["iris", "wine"]))
def test_noise_is_exact_and_on_training_only(noise: float, seed: int, name: str) -> None:
    data = load(name)
    clean, noisy = cut(data, seed=seed), cut(data, seed=seed, label_noise=noise)
    n = len(clean.train[1])
    assert (clean.train[1] != noisy.train[1]).sum() == round(noise * n)
    assert set(noisy.train[1]) <= set(range(3))
    assert np.array_equal(clean.train[0], noisy.train[0])
    for a, b in zip(parts(clean)[1:], parts(noisy)[1:], strict=True):
        assert np.array_equal(a[0], b[0])
        assert np.array_equal(a[1], b[1])


def test_noisy_rows_are_nested_over_noise_levels() -> None:
    digits = load("digits")
    little, much = (cut(digits, label_noise=r).train[1] for r in (0.1, 0.3))
    touched = little != cut(digits).train[1]
    assert np.array_equal(little[touched], much[touched])


@pytest.mark.parametrize("noise_parts", ["training", "training+validation"])
@pytest.mark.parametrize("noise_classes", ["other", "uniform"])
def test_whose_labels_are_noisy_and_which_they_get(noise_parts: str, noise_classes: str) -> None:
    digits = load("digits")
    options = {"noise_parts": noise_parts, "noise_classes": noise_classes, "label_noise": 0.5}
    moves = {part: np.zeros(10) for part in ("train", "validation", "test")}
    replaced = dict.fromkeys(moves, 0)
    for seed in range(30):
        clean, noisy = cut(digits, seed=seed), cut(digits, seed=seed, **options)
        for part, count in moves.items():
            before, after = getattr(clean, part)[1], getattr(noisy, part)[1]
            count += np.bincount((after - before) % 10, minlength=10)
            replaced[part] += round(len(before) / 2)
    noisy_parts = {"train", "validation"} if "validation" in noise_parts else {"train"}
    for part, count in moves.items():
        if part not in noisy_parts:
            assert count[0] == count.sum()
            continue
        count[0] -= count.sum() - replaced[part]  # those that were left as they were
        if noise_classes == "other":
            assert count[0] == 0
            count = count[1:]
        expected = count.mean()
        # Chi-square with 9 degrees of freedom, p = 0.001.
        assert ((count - expected) ** 2 / expected).sum() < 27.9


@given(
    counts=st.lists(st.integers(4, 40), min_size=2, max_size=6),
    share=st.floats(0.3, 1),
    seed=st.integers(0, 100),
    given_parts=st.sampled_from([("test",), ("validation",), ("validation", "test")]),
)
def test_official_parts(
    counts: list[int], share: float, seed: int, given_parts: tuple[str, ...]
) -> None:
    """They are used as they are; the rest is drawn from all other rows, stratified."""
    k, rng = len(counts), np.random.default_rng(seed)
    pool = rng.permutation(np.repeat(np.arange(k), counts))
    official, y = {}, pool
    for part in given_parts:
        official[part] = len(y) + np.arange(5)
        y = np.concatenate([y, rng.integers(0, k, 5)])
    data = Dataset(
        "h", np.zeros((len(y), 1), np.float32), y, tuple(map(str, range(k))), "", official
    )
    both = len(given_parts) == 2
    size = max(k, int(share * len(pool))) if both else None
    config = Config(train_size=size, validation_size=0.3)
    try:
        train, validation, test = draw_rows(data, seed, config)
    except CompareError:  # too few rows for every class to be in what is drawn
        assume(False)
    rows = {"train": train, "validation": validation, "test": test}
    for part in given_parts:
        assert np.array_equal(rows[part], official[part])
    drawn = np.concatenate([rows[part] for part in rows if part not in given_parts])
    assert len(np.unique(drawn)) == len(drawn) == (size if both else len(pool))
    assert drawn.max() < len(pool)
    if both:
        exact = np.array(counts) * len(drawn) / len(pool)
        assert (np.abs(np.bincount(y[drawn], minlength=k) - exact) < 1).all()
    for again, before in zip(draw_rows(data, seed, config), rows.values(), strict=True):
        assert np.array_equal(again, before)


def grouped(groups: Any, y: Any, **changes: Any) -> Dataset:
    y = np.asarray(y)
    names = tuple(map(str, range(y.max() + 1)))
    data = Dataset("g", np.zeros((len(y), 1), np.float32), y, names, "", groups=groups)
    return replace(data, **changes)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=12, max_size=80),
    seed=st.integers(0, 100),
    share=st.sampled_from([0.1, 0.25, 0.4]),
    constant=st.booleans(),
)
def test_groups_stay_together(sizes: list[int], seed: int, share: float, constant: bool) -> None:
    """Whether the class is one of the group (a patient's diagnosis) or of the row."""
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    y = groups % 2 if constant else rng.integers(0, 2, len(groups))
    data = grouped(groups, y)
    try:
        drawn = draw_rows(data, seed, Config(test_size=share, validation_size=share))
    except CompareError:  # a class of too few groups, or parts smaller than the classes
        assume(False)
    assert np.array_equal(np.sort(np.concatenate(drawn)), np.arange(len(y)))
    seen = [set(groups[rows]) for rows in drawn]
    assert sum(map(len, seen)) == len(set(groups))
    again = draw_rows(data, seed, Config(test_size=share, validation_size=share))
    assert all(np.array_equal(a, b) for a, b in zip(drawn, again, strict=True))


def test_groups_are_drawn_in_the_requested_shares() -> None:
    """With many small groups, sizes and class shares are nearly those of rows without groups."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(400), 5)
    y = (rng.random(2000) < np.repeat(rng.choice([0.05, 0.6], 400), 5)).astype(np.int64)
    data = grouped(groups, y)
    tests = []
    for seed in range(3):
        train, validation, test = draw_rows(data, seed, Config())
        tests.append(set(test))
        assert abs(len(test) - 500) <= 25
        assert abs(len(validation) - 300) <= 25
        for rows in (train, validation, test):
            assert abs(y[rows].mean() - y.mean()) < 0.02
    assert tests[0] != tests[1] != tests[2]
    once = [set(draw_rows(data, seed, Config(test_split="once"))[2]) for seed in (0, 2)]
    assert once[0] == once[1] == tests[0]


def test_train_size_with_groups() -> None:
    groups = np.repeat(np.arange(100), 10)
    data = grouped(groups, np.arange(1000) % 2)
    train, validation, test = draw_rows(data, 0, Config(train_size=200))
    assert (len(train), len(validation)) == (200, 50)
    seen = [set(groups[rows]) for rows in (train, validation, test)]
    assert not seen[0] & seen[1]
    assert not (seen[0] | seen[1]) & seen[2]


def test_the_newest_rows_are_the_test() -> None:
    rng = np.random.default_rng(1)
    time = rng.permutation(np.arange(400) // 4)  # four rows of each time
    data = grouped(None, np.arange(400) % 2, time=time)
    for seed in range(2):
        train, validation, test = draw_rows(data, seed, Config())
        assert (len(train), len(validation), len(test)) == (240, 60, 100)
        assert time[train].max() < time[validation].min()
        assert time[validation].max() < time[test].min()
    train, validation, test = draw_rows(data, 0, Config(train_size=100))
    assert (len(train), len(validation), len(test)) == (100, 25, 100)
    assert time[train].max() < time[validation].min()
    # The test part of the data set stays; what is drawn is validation.
    given_test = replace(data, official={"test": np.flatnonzero(time < 20)})
    train, validation, test = draw_rows(given_test, 0, Config())
    assert np.array_equal(test, np.flatnonzero(time < 20))
    assert time[train].max() < time[validation].min()


def test_rows_of_one_time_stay_together() -> None:
    time = np.repeat([0, 1, 2, 3], [50, 20, 10, 20])
    data = grouped(None, np.arange(100) % 2, time=time)
    train, validation, test = draw_rows(data, 0, Config(test_size=0.27, validation_size=0.3))
    assert [sorted(set(time[rows])) for rows in (train, validation, test)] == [[0], [1], [2, 3]]


def test_a_class_may_be_new_in_time_but_not_unknown_to_training() -> None:
    y = np.arange(100) % 2
    y[:2] = 2
    data = grouped(None, y, time=np.arange(100))
    _, _, test = draw_rows(data, 0, Config())
    assert set(y[test]) == {0, 1}
    y[-2:], y[:2] = 2, 0
    with pytest.raises(CompareError, match=r"'2' \(2 rows\).*the training part"):
        draw_rows(grouped(None, y, time=np.arange(100)), 0, Config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": np.zeros(60, np.int64)}, r"group: all 60 rows of g .* are of one group"),
        ({"time": np.zeros(60, np.int64)}, r"time: all 60 rows of g .* are of one time"),
    ],
)
def test_groups_that_cannot_be_divided(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CompareError, match=message):
        draw_rows(grouped(**({"groups": None, "y": np.arange(60) % 2} | changes)), 0, Config())


def test_train_size_that_groups_do_not_allow() -> None:
    data = grouped(np.repeat(np.arange(3), [200, 100, 100]), np.arange(400) % 2)
    with pytest.raises(CompareError, match=r"train_size \(--train-size\) must be at most \d+; got"):
        draw_rows(data, 0, Config(train_size=235))


def test_class_subset() -> None:
    iris = load("iris", classes=("virginica", "setosa"))
    assert iris.classes == ("setosa", "virginica")
    assert isinstance(iris.features, np.ndarray)
    whole = load("iris")
    assert isinstance(whole.features, np.ndarray)
    np.testing.assert_array_equal(iris.features, whole.features[[*range(50), *range(100, 150)]])
    np.testing.assert_array_equal(iris.target, [0] * 50 + [1] * 50)
    assert iris.fingerprint != whole.fingerprint
    with pytest.raises(CompareError, match=r"no class 'virginca'.*mean 'virginica'"):
        load("iris", classes=("virginca", "setosa"))
    with pytest.raises(CompareError, match=r"at least 2 classes.*'setosa'"):
        load("iris", classes=("setosa",))


def test_arrays_are_ready_for_training(csv: Path) -> None:
    for data in (load("digits"), load(str(csv), "label")):
        for x, y in parts(cut(data)):
            assert (x.dtype, y.dtype) == (np.float32, np.int64)
            assert x.flags.c_contiguous
            assert y.flags.c_contiguous
            assert np.isfinite(x).all()


def test_scaled_with_training_statistics(tmp_path: Path) -> None:
    x = np.random.default_rng(1).normal(5, 3, (101, 4)) * [1, 1e-6, 1e9, 1]
    x[:, 3] = 7
    y = np.arange(101) % 3
    for data in (
        load(npz(tmp_path, X=x, y=y)),
        Dataset("table", pd.DataFrame(x[:, :3]), y, ("0", "1", "2"), ""),
    ):
        rows = draw_rows(data, 0, Config(test_size=0.2))
        arrays = [np.asarray(data.features)[part] for part in rows]
        scale = ColumnScale.fit(arrays[0])
        for (ours, _), array in zip(parts(cut(data)), arrays, strict=True):
            np.testing.assert_allclose(ours, scale(array), rtol=1e-6)


def test_images_are_standardised_as_a_whole() -> None:
    # A pixel that is 0 in nearly every training image must not reach the model a hundredfold.
    train, *others = (x for x, _ in parts(cut(load("digits"), train_size=300)))
    assert train.shape == (300, 8, 8)
    assert abs(train.mean()) < 1e-5
    assert abs(train.std() - 1) < 1e-5
    assert all(np.abs(x).max() < 3 for x in others)


def test_constant_in_training_is_zero_everywhere(tmp_path: Path) -> None:
    """With a scale of 1 in its place, one odd test row would reach the model as 1e6."""
    x = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
    data = load(npz(tmp_path, X=x, y=np.arange(60) % 2))
    test_rows = row_numbers(data)[2]
    x[:, 1] = 1.0
    x[test_rows, 1] = 1e6
    s = cut(replace(data, features=x))
    assert (s.train[0][:, 1] == 0).all()
    assert (s.test[0][:, 1] == 0).all()
    frame = pd.DataFrame({"a": x[:, 0].astype(np.float64), "b": x[:, 1].astype(np.float64)})
    assert cut(replace(data, features=frame)).test[0].shape[1] == 1


@pytest.mark.parametrize("train_size", [None, 60])
def test_no_leakage(csv: Path, train_size: int | None) -> None:
    """Whatever stands in validation, test and unused rows, the training arrays stay the same."""
    data = load(str(csv), "label")
    assert isinstance(data.features, pd.DataFrame)
    before = cut(data, train_size=train_size)
    elsewhere = np.setdiff1d(np.arange(120), row_numbers(data, train_size=train_size)[0])
    frame = data.features.copy()
    frame.loc[elsewhere, "number"] = 1e7
    frame.loc[elsewhere, "gaps"] = np.nan
    frame.loc[elsewhere, "nothing"] = 3.0
    frame.loc[elsewhere, "constant"] = "new"
    frame.loc[elsewhere, "free text"] = "an unseen sentence"
    frame.loc[elsewhere, frame.columns[2]] = "unseen"
    frame.loc[elsewhere, "day"] = pd.Timestamp("1999-09-09 09:09")
    after = cut(replace(data, features=frame), train_size=train_size)
    assert np.array_equal(before.train[0], after.train[0])
    assert np.array_equal(before.train[1], after.train[1])
    assert not np.array_equal(before.test[0], after.test[0])
    assert np.isfinite(after.test[0]).all()


def test_unseen_categories_differ_from_known_ones(tmp_path: Path) -> None:
    n = 60
    frame = pd.DataFrame({"c": pd.Series(["a", "b"] * 30, dtype="str")})
    data = Dataset("h", frame, np.arange(n) // 30, ("0", "1"), "")
    test_rows = row_numbers(data)[2]
    frame = frame.copy()
    frame.loc[test_rows[:3], "c"] = "new"
    x = cut(replace(data, features=frame))
    assert len(np.unique(x.train[0], axis=0)) == 2
    assert len(np.unique(np.concatenate([x.train[0], x.test[0]]), axis=0)) == 3


def test_text_does_not_depend_on_threads() -> None:
    letters = np.random.default_rng(0).choice(list("abcdefghij "), (500, 30))
    frame = pd.DataFrame({"text": ["".join(row) for row in letters]})
    data = Dataset("h", frame, np.arange(500) % 2, ("0", "1"), "")
    splits = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            splits.append(cut(data))
    assert splits[0].train[0].shape == (320, 30)
    assert same(*splits)


def test_reading_and_splitting_are_silent(csv: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load(str(csv), "label")
        assert isinstance(data.features, pd.DataFrame)
        repeats = ["é" * (1 + i % 60) for i in range(120)]  # many categories, few fragments
        cut(replace(data, features=data.features.assign(repeats=repeats)), train_size=60)


def test_letter() -> None:
    path = DATA / "letter" / "letter-recognition.csv"
    if not path.is_file():
        pytest.skip("no letter data set here")
    data = load(str(path), "Letter")
    raw = pd.read_csv(path)
    assert data.classes == tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    assert [data.classes[k] for k in data.target] == list(raw["Letter"])
    s = cut(data, train_size=1000)
    assert [p[0].shape for p in parts(s)] == [(1000, 16), (250, 16), (4000, 16)]
    assert (np.bincount(s.validation[1]) > 0).all()
    share = np.bincount(data.target) / len(data.target)
    assert np.abs(np.bincount(s.test[1]) / 4000 - share).max() < 1e-3


# ---- refusals --------------------------------------------------------------------------------


def rows(labels: str, header: str = "x,y") -> str:
    return header + "\n" + "".join(f"{i},{label}\n" for i, label in enumerate(labels.split()))


GOOD = "a b " * 6


@pytest.mark.parametrize(
    ("text", "target", "message"),
    [
        (rows(GOOD), None, r"name the column to predict.*'x', 'y'"),
        (rows(GOOD, "Größe,Label"), "label", r"no column 'label'.*'Größe', 'Label'.*mean 'Label'"),
        ("x,y\n1,\n2,NA\n", "y", r"no row has a value of 'y'"),
        (rows("a " * 9), "y", r"at least 2 classes.*'a'"),
        (
            rows(GOOD + "c c d"),
            "y",
            r"too few in 2 of 4 classes: 'c' \(2\), 'd' \(1\).*--min-class-rows",
        ),
        (rows(GOOD) + "inf,a\n-inf,b\n", "y", r"'x' must be finite; 2 of its values"),
        (rows(GOOD) + "?,a\ninf,b\n", "y", r"'x' must be finite; 1 of its values"),
        (rows(GOOD) + "1e39,a\n", "y", r"'x' must be finite; 1 of"),
        ("x,y\n", "y", r"no rows below its header"),
        ("y\na\nb\n", "y", r"no feature columns beside 'y'"),
        ("x,x,y\n1,2,a\n", "y", r"must differ, but 'x' come"),
        ("", "y", r"cannot read .*No columns"),
        ('x,y\n1,"a\n2,b\n', "y", r"cannot read .*EOF inside string"),
        ("x,y\n1,a,3\n2,b,4\n", "y", r"cannot read .*[Ll]ength"),
        ("x,y\n1,a\n2,b,4\n", "y", r"cannot read .*Expected 2 fields in line 3"),
        (rows(" ".join(f"{k / 7}" for k in range(1, 40))), "y", r"39 different.*continuous"),
        (rows(" ".join(["0.5", "inf", "1"] * 9)), "y", r"labels must be finite"),
        (rows(" ".join(map(str, range(40)))), "y", r"too few in 40 of 40 classes: .*, \.\.\."),
    ],
)
def test_table_refusals(tmp_path: Path, text: str, target: str | None, message: str) -> None:
    with pytest.raises(CompareError, match=message) as caught:
        load(written(tmp_path, text), target)
    assert "\n" not in str(caught.value)


X, Y = np.arange(24.0).reshape(12, 2), np.arange(12) % 2


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"X": X, "labels": Y}, r"exactly the arrays X, y; found 'X', 'labels'"),
        ({"X": X, "y": Y, "z": Y}, r"found 'X', 'y', 'z'"),
        ({"X": X, "y": Y[:-1]}, r"X of shape \(12, 2\) and y of shape \(11,\)"),
        ({"X": X[:, 0], "y": Y}, r"X of shape \(12,\)"),
        ({"X": X, "y": np.stack([Y, Y], 1)}, r"y of shape \(12, 2\)"),
        ({"X": X[:, :0], "y": Y}, r"\(12, 0\) holds no values"),
        ({"X": X[:0], "y": Y[:0]}, r"\(0, 2\) holds no values"),
        ({"X": np.where(X < 3, np.nan, X), "y": Y}, r"3 of 24 values are NaN"),
        ({"X": np.where(X < 2, np.inf, X), "y": Y}, r"2 of 24 values"),
        ({"X": np.where(X < 2, 1e300, X), "y": Y}, r"2 of 24 values"),
        ({"X": X + 1j, "y": Y}, r"real numbers.*complex128"),
        ({"X": X.astype(str), "y": Y}, r"real numbers.*<U"),
        ({"X": X.astype(object), "y": Y}, r"cannot read .*Object arrays"),
        ({"X": X, "y": np.where(Y, np.nan, 1.0)}, r"missing in 6 of 12"),
        ({"X": X, "y": Y + X[:, 0] / 7}, r"continuous"),
        ({"X": X, "y": np.array([" ", "a"] * 6)}, r"missing in 6 of 12"),
    ],
)
def test_npz_refusals(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(CompareError, match=message):
        load(npz(tmp_path, **arrays))


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("digit", None, r"breast_cancer, digits, iris, wine, .*or .*\.csv.*mean 'digits'"),
        ("data.xls", "y", r"unknown data 'data.xls'.*\.xlsx, \.parquet"),
        ("nowhere.xlsx", "y", r"no such file: .*nowhere\.xlsx"),
        ("nowhere.csv", "y", r"no such file: .*nowhere\.csv"),
        ("nowhere.npz", None, r"no such file: .*nowhere\.npz"),
        ("https://example.org/t.csv", "y", r"no such file"),
        ("iris", "species", r"'species' was given"),
    ],
)
def test_source_refusals(name: str, target: str | None, message: str) -> None:
    with pytest.raises(CompareError, match=message):
        load(name, target)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.parquet", b"PAR1 this is not one"),
        ("t.parquet", b""),
        ("t.npz", b"PK\x03\x04 neither is this"),
        ("t.npz", b""),
        ("t.csv.gz", b"not compressed"),
        ("t.csv.gz", gzip.compress(b"x,y\n" * 1000, mtime=0)[:20]),
        ("t.xlsx", b"PK\x03\x04 neither is this"),
        ("t.csv.xz", b"\xfd7zXZ\0 neither is this"),
    ],
)
def test_corrupt_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CompareError, match=r"cannot read .*t\.") as caught:
        load(str(tmp_path / name), None if name.endswith("npz") else "y")
    assert "\n" not in str(caught.value)


def test_truncated_real_files(csv: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    table().to_parquet(path)
    archive = Path(npz(tmp_path, X=np.random.default_rng(0).normal(size=(500, 9)), y=np.ones(500)))
    for file, target in ((path, "label"), (archive, None)):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with pytest.raises(CompareError, match="cannot read"):
            load(str(file), target)


def test_bare_npy_under_npz_name(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", X)
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    with pytest.raises(CompareError, match=r"cannot read .*a\.npz"):
        load(str(tmp_path / "a.npz"))


def test_parquet_refusals(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "t.parquet"
    pq.write_table(pa.table([pa.array([1]), pa.array([2])], names=["x", "x"]), path)
    with pytest.raises(CompareError, match="must differ, but 'x'"):
        load(str(path), "x")
    for values, kind in (
        ([[1, 2]] * 6, "ndarray"),
        ([{"a": 1}] * 6, "dict"),
        ([b"x"] * 6, "bytes"),
    ):
        pq.write_table(pa.table({"img": values, "y": ["a", "b"] * 3}), path)
        with pytest.raises(CompareError, match=f"'img' holds values such as {kind}"):
            load(str(path), "y")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, r"seed must not be negative"),
        ({"train_size": 97}, r"at most 96; got 97"),
        ({"train_size": 2}, r"3 classes.*training part would have 2"),
        ({"train_size": 4}, r"3 classes.*validation part would have 1"),
        ({"test_size": 0.01}, r"test part would have 2"),
    ],
)
def test_split_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CompareError, match=message):
        cut(load("iris"), **changes)


def test_largest_train_size_is_accepted() -> None:
    for v in (0.1, 0.2, 0.3, 0.45):
        with pytest.raises(CompareError, match="at most") as caught:
            cut(load("iris"), train_size=1000, validation_size=v)
        most = int(str(caught.value).split("at most ")[1].split(";")[0])
        assert len(cut(load("iris"), train_size=most, validation_size=v).train[1]) == most
        with pytest.raises(CompareError, match="at most"):
            cut(load("iris"), train_size=most + 1, validation_size=v)


def test_rare_class_is_refused_for_every_seed() -> None:
    y = np.repeat(np.arange(6), [500, 300, 4, 4, 4, 4])
    x = np.random.default_rng(0).normal(size=(len(y), 2)).astype(np.float32)
    data = Dataset("rare", x, y, tuple("abcdef"), "")
    for seed in range(5):
        with pytest.raises(CompareError, match=r"too few rows of '[cdef]' \(4 rows\)"):
            cut(data, seed=seed)


def test_table_without_information(tmp_path: Path) -> None:
    text = "x,z,w,y\n" + "".join(f"7,,?,{'ab'[i % 2]}\n" for i in range(20))
    with pytest.raises(CompareError, match="every feature column is constant or empty"):
        cut(load(written(tmp_path, text), "y"))
