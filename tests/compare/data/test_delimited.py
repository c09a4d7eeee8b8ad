"""Delimited tables: detection of separator, decimal sign, encoding and compression."""

import bz2
import csv
import gzip
import io
import lzma
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import penex.compare.data.load
from penex.compare.config import Config
from penex.compare.data import delimited
from penex.compare.data import tables as table
from penex.compare.data.dataset import Dataset, Texts
from penex.compare.errors import CompareError

DATA = Path(os.environ.get("PENEX_DATA", Path(__file__).parents[4] / "shared" / "data"))
ROWS = 60


def load(path: Path, target: str = "y", **options: Any) -> Dataset:
    return penex.compare.data.load.load(Config(data=str(path), target=target, **options))


def frame_of(data: Dataset) -> pd.DataFrame:
    assert isinstance(data.features, pd.DataFrame)
    return data.features


def rows() -> list[tuple[float, float, str, str]]:
    """A number, one with thousands, a text with every separator in it, and the label."""
    rng = np.random.default_rng(3)
    towns = ("Köln, am Rhein; Süd", "São | Paulo\tCidade", 'das "große" Haus', "Łódź")
    return [
        (round(rng.normal(5, 3), 2), round(rng.normal(3000, 900), 1), towns[i % 4], "ab"[i % 2])
        for i in range(ROWS)
    ]


def text_of(
    separator: str, decimal: str = ".", header: tuple[str, ...] = ("x", "Größe", "Stadt", "y")
) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=separator)
    writer.writerow(header)
    for x, size, town, label in rows():
        numbers = [str(number).replace(".", decimal) for number in (x, size)]
        writer.writerow([*numbers, town.replace("Łódź", "Ulm"), label])
    return stream.getvalue()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252"])
@pytest.mark.parametrize(
    ("separator", "decimal"), [(",", "."), (";", ","), (";", "."), ("\t", ","), ("|", ".")]
)
def test_separator_decimal_sign_and_encoding(
    tmp_path: Path, separator: str, decimal: str, encoding: str
) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(text_of(separator, decimal).encode(encoding))
    data = load(path)
    expected = pd.DataFrame(rows(), columns=["x", "Größe", "Stadt", "y"])
    pd.testing.assert_frame_equal(
        frame_of(data), expected.drop(columns="y").replace("Łódź", "Ulm"), check_dtype=False
    )
    assert [data.classes[k] for k in data.target] == list(expected["y"])
    assert (len(data.notes) == 1) == (encoding == "cp1252")


def zipped(content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("folder/t.csv", content)
    return stream.getvalue()


@pytest.mark.parametrize("name", ["t.csv.gz", "t.csv", "t.tsv", "T.TXT.XZ"])
@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, zipped])
def test_compression(tmp_path: Path, name: str, compress: Callable[[bytes], bytes]) -> None:
    path = tmp_path / name
    path.write_bytes(compress(text_of(";", ",").encode()))
    np.testing.assert_array_equal(frame_of(load(path))["x"], [x for x, *_ in rows()])


@pytest.mark.parametrize("encoding", ["cp1250", "cp1251", "koi8-r", "shift_jis", "gb18030"])
def test_other_alphabets(tmp_path: Path, encoding: str) -> None:
    words = {
        "cp1250": ("Źdźbło", "Łódź, wartość", "ność"),
        "shift_jis": ("名前", "東京都の人口", "ひらがな"),
        "gb18030": ("名字", "北京市人口统计", "年龄"),
    }.get(encoding, ("имя", "Москва, столица", "возраст"))
    path = tmp_path / "t.csv"
    lines = [f'"{words[i % 3]}",{i},{"ab"[i % 2]}' for i in range(ROWS)]
    path.write_bytes("\n".join([f"{words[0]},x,y", *lines]).encode(encoding))
    assert list(frame_of(load(path))[words[0]]) == [words[i % 3] for i in range(ROWS)]


def test_utf16_without_mark(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(text_of("\t").encode("utf-16-le"))
    assert list(frame_of(load(path)).columns) == ["x", "Größe", "Stadt"]


@pytest.mark.parametrize("numbers", [["1.234,5", "12,25", "-3", "1.000.000,0"], ["+1,5e3", "2,0"]])
def test_decimal_comma(tmp_path: Path, numbers: list[str]) -> None:
    path = tmp_path / "t.csv"
    lines = [f"{numbers[i % len(numbers)]};{'?' if i else '1,5'};{i % 2}" for i in range(ROWS)]
    path.write_text("\n".join(["x;z;y", *lines]))
    found = frame_of(load(path))
    wanted = [float(n.replace(".", "").replace(",", ".")) for n in numbers]
    np.testing.assert_array_equal(found["x"], np.resize(wanted, ROWS))
    np.testing.assert_array_equal(found["z"], [1.5, *[np.nan] * (ROWS - 1)])


def test_texts_without_decimal_commas_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    kinds = ('"1,234"', "1.2.2024x", "10,20,30")  # thousands perhaps; no number; several
    path.write_text("a,y\n" + "".join(f"{kinds[0]},{i % 2}\n" for i in range(ROWS)))
    assert set(frame_of(load(path))["a"]) == {"1,234"}
    for value in kinds[1:]:
        path.write_text("a;y\n" + "".join(f"{value};{i % 2}\n" for i in range(ROWS)))
        assert set(frame_of(load(path))["a"]) == {value}


def test_blanks_around_names_and_values(tmp_path: Path) -> None:
    path = tmp_path / "adult.csv"
    lines = [
        f'{i}, {"?" if i % 9 == 0 else "Private "}, "a, b",?, {("<=50K", ">50K")[i % 2]}'
        for i in range(ROWS)
    ]
    path.write_text("\n".join([" age , workclass, pair, empty, income ", *lines]))
    data = load(path, " income")
    assert data.classes == ("<=50K", ">50K")
    found = frame_of(data)
    assert list(found.columns) == ["age", "workclass", "pair", "empty"]
    assert found["workclass"].isna().sum() == len(range(0, ROWS, 9))
    assert set(found["workclass"].dropna()) == {"Private"}
    assert set(found["pair"]) == {"a, b"}
    assert found["empty"].isna().all()
    assert load(path, "income").fingerprint == data.fingerprint


def test_texts_keep_their_blanks(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("text,y\n" + "  NA ,1\n12 ,0\n" * 9)
    data = load(path, text="text")
    assert isinstance(data.features, Texts)
    assert data.features.texts == ["  NA ", "12 "] * 9


def test_rows_without_a_target_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    labels = ("a", "", "b", " ? ", "NA", "a", "b", "a", "b")
    path.write_text("x,y\n" + "".join(f"{i},{label}\n" for i, label in enumerate(labels)))
    data = load(path)
    np.testing.assert_array_equal(frame_of(data)["x"], [0, 2, 5, 6, 7, 8])
    assert data.classes == ("a", "b")
    (note,) = data.notes
    assert "3 of 9 rows" in note
    path.write_text("x,y\n" + "".join(f"{i},{('', 0, 1)[i % 3]}\n" for i in range(9)))
    assert load(path).classes == ("0", "1")


def test_parts_in_separate_files(tmp_path: Path) -> None:
    names = {"a.csv": (",", 40), "b.tsv": ("\t", 12), "c.csv": (";", 8)}
    for number, (name, (separator, size)) in enumerate(names.items()):
        lines = [separator.join((str(100 * number + i), "pq"[i % 2], "")) for i in range(size)]
        lines[1] = lines[1].replace("q", "?")  # a label that is missing
        header = separator.join(("x", "y", "z"))
        (tmp_path / name).write_text("\n".join([header, *lines]) + "\n")
    files = {"validation_file": str(tmp_path / "b.tsv"), "test_file": str(tmp_path / "c.csv")}
    data = load(tmp_path / "a.csv", **files)
    assert {part: (rows[0], len(rows)) for part, rows in data.official.items()} == {
        "validation": (39, 11),
        "test": (50, 7),
    }
    np.testing.assert_array_equal(frame_of(data)["x"][[39, 50]], [100, 200])
    assert load(tmp_path / "a.csv", test_file=files["test_file"]).official.keys() == {"test"}
    with pytest.raises(
        CompareError, match=r"test_file \(--test-file\): expected a table.*'c\.npz'"
    ):
        load(tmp_path / "a.csv", test_file="c.npz")


def test_columns_that_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    lines = [f"{i},{i % 3},{i % 5},{i % 7},{i % 2}" for i in range(ROWS)]
    path.write_text("\n".join(["id,a,b,c,y", *lines]))
    data = load(path, drop=("id", " c"), group="b")
    assert list(frame_of(data).columns) == ["a"]
    assert data.left_out == {"id": "drop", "c": "drop", "b": "group"}
    assert data.groups is not None
    np.testing.assert_array_equal(data.groups, np.arange(ROWS) % 5)
    assert list(frame_of(load(path, keep=("c", "a"))).columns) == ["a", "c"]
    kept = load(path, keep=("a",), time="id")
    assert kept.time is not None
    np.testing.assert_array_equal(kept.time, np.arange(ROWS))
    # What is drawn depends on it.
    prints = [load(path, keep=("a",), **more).fingerprint for more in ({}, {"group": "b"})]
    assert len({*prints, kept.fingerprint}) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": ("Id",)}, r"drop: .* has no column 'Id'.*mean 'id'"),
        ({"drop": ("y",)}, r"drop: 'y' is the target column"),
        ({"keep": ("a",), "group": "a"}, r"keep: 'a' is the group column"),
        ({"group": "y"}, r"target and group are the same column, 'y'"),
        ({"group": "gaps"}, r"group: column 'gaps' .* no value in 30 of 60 rows"),
        ({"time": "gaps"}, r"time: column 'gaps' .* no value in 30 of 60 rows"),
        ({"time": "word"}, r"time: column 'word' .* dates or numbers; .* such as 'w0'"),
        ({"drop": ("id", "a", "gaps", "word")}, r"no feature columns besides .* 'id'"),
        ({"min_class_rows": 31}, r"min_class_rows \(--min-class-rows\): 0 of 2 classes"),
    ],
)
def test_columns_that_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = tmp_path / "t.csv"
    lines = [f"{i},{i % 3},{i if i % 2 else '?'},w{i},{i % 2}" for i in range(ROWS)]
    path.write_text("\n".join(["id,a,gaps,word,y", *lines]))
    with pytest.raises(CompareError, match=message):
        load(path, **options)


def test_dates_order_rows(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    days = ["2023-12-31", "2024-01-01", "2023-02-01", "2024-01-01"] * 5
    path.write_text("day,x,y\n" + "".join(f"{d},{i},{i % 2}\n" for i, d in enumerate(days)))
    data = load(path, time="day")
    assert data.time is not None
    np.testing.assert_array_equal(data.time, [1, 2, 0, 2] * 5)


def test_rare_classes_are_left_out_on_demand(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    labels = ["a"] * 30 + ["b"] * 30 + ["rare"] * 2
    path.write_text("x,g,y\n" + "".join(f"{i},{i % 9},{y}\n" for i, y in enumerate(labels)))
    with pytest.raises(CompareError, match=r"'rare' \(2\).*--min-class-rows"):
        load(path)
    data = load(path, min_class_rows=3, group="g")
    assert data.classes == ("a", "b")
    assert data.groups is not None
    assert len(data.target) == len(frame_of(data)) == len(data.groups) == 60
    assert "2 rows of 1 classes" in data.notes[0]
    assert "'rare'" in data.notes[0]


def test_excel(tmp_path: Path) -> None:
    pytest.importorskip("openpyxl")
    path = tmp_path / "t.xlsx"
    days = pd.date_range("2024-01-01", periods=ROWS)
    frame = pd.DataFrame(rows(), columns=[" x", "Größe ", "Stadt", "y"]).assign(day=days)
    with pd.ExcelWriter(path) as book:
        frame.to_excel(book, index=False, sheet_name="rows")
        pd.DataFrame({"remark": [1]}).to_excel(book, sheet_name="remarks")
    data = load(path)
    expected = frame.drop(columns="y").rename(columns=str.strip)
    pd.testing.assert_frame_equal(frame_of(data), expected, check_dtype=False)
    assert "'rows'" in data.notes[0]
    texts = load(path, text="Stadt").features
    assert isinstance(texts, Texts)
    assert texts.texts == list(frame["Stadt"])


def test_excel_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.xlsx"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    monkeypatch.setattr("penex._extras.find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"pip install 'penex\[excel\]'"):
        load(path)


# ---- limits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, zipped])
def test_a_bomb_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setattr(delimited, "MAX_BYTES", 2**20)
    path = tmp_path / "t.csv"
    path.write_bytes(compress(b"x,y\n" + b"1,a\n" * 2**19))
    with pytest.raises(CompareError, match=r"decompresses to more than .* GiB"):
        load(path)


def test_too_many_rows_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delimited, "MAX_ROWS", 100)
    monkeypatch.setattr(table, "MAX_ROWS", 100)
    frame = pd.DataFrame({"x": range(200), "y": ["a", "b"] * 100})
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_parquet(tmp_path / "t.parquet")
    for name in ("t.csv", "t.parquet"):
        with pytest.raises(CompareError, match="100 rows"):
            load(tmp_path / name)


def test_large_parquet_and_excel_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "MAX_BYTES", 500)
    frame = pd.DataFrame({"x": np.random.default_rng(0).normal(size=200), "y": ["a", "b"] * 100})
    frame.to_parquet(tmp_path / "t.parquet")
    frame.to_excel(tmp_path / "t.xlsx", index=False)
    for name in ("t.parquet", "t.xlsx"):
        with pytest.raises(CompareError, match="GiB"):
            load(tmp_path / name)


def test_archives_of_several_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.csv", "x,y\n")
        archive.writestr("b.csv", "x,y\n")
    with pytest.raises(CompareError, match=r"cannot read .*one file in the archive, it has 2"):
        load(path)


# ---- tables of real kinds --------------------------------------------------------------------


def animals() -> str:
    """The shelter's kind: names with quotes and commas, gaps, dates, one rare class."""
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(["AnimalID", "Name", "DateTime", "OutcomeType", "AgeuponOutcome", "Breed"])
    for i in range(120):
        outcome = "Died" if i == 50 else ("Adoption", "Transfer", "Return_to_owner")[i % 3]
        name = "" if i % 4 == 0 else f'Rex, "the {i % 11}th"'
        day = f"2014-02-{i % 28 + 1:02d} 18:22:00"
        writer.writerow([f"A{671945 + i}", name, day, outcome, f"{i % 9} years", "Shih, Mix"])
    return stream.getvalue()


def test_the_kind_of_the_shelter(tmp_path: Path) -> None:
    path = tmp_path / "train.csv.gz"
    path.write_bytes(gzip.compress(animals().encode()))
    with pytest.raises(CompareError, match=r"'Died' \(1\).*--min-class-rows"):
        load(path, "OutcomeType")
    data = load(path, "OutcomeType", min_class_rows=5)
    assert data.classes == ("Adoption", "Return_to_owner", "Transfer")
    found = frame_of(data)
    assert pd.api.types.is_datetime64_any_dtype(found["DateTime"])
    assert found["Name"].isna().sum() == 30
    assert 'Rex, "the 1th"' in set(found["Name"])


@pytest.mark.parametrize("name", ["bbc.csv", "bbc.tsv"])
def test_the_kind_of_the_bbc(tmp_path: Path, name: str) -> None:
    """Long texts with every sign in them, quoted or not."""
    texts = [
        " ".join(['said "no"; so,', "it | went", "on: 12,5%\t."][(i + k) % 3] for k in range(9 * i))
        + f" end {i}"
        for i in range(1, 41)
    ]
    if name.endswith("tsv"):
        texts = [text.replace("\t", " ").replace('"', "'") for text in texts]
    path = tmp_path / name
    frame = pd.DataFrame({"category": ["sport", "tech"] * 20, "text": texts})
    frame.to_csv(path, index=False, sep="\t" if name.endswith("tsv") else ",")
    data = load(path, "category", text="text")
    assert isinstance(data.features, Texts)
    assert data.features.texts == texts


REAL = {
    "titanic/titanic.csv": ("Survived", 891, ("0", "1"), 6, 866),
    "adult/adult.csv": ("income", 32561, ("<=50K", ">50K"), 6, 4262),
    "bank/bank-additional.csv": ("y", 4119, ("no", "yes"), 10, 0),
}


@pytest.mark.parametrize("name", REAL)
def test_real_tables(name: str) -> None:
    """Rows, classes, columns of numbers and missing values are those that the data sets have."""
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"no {name} here")
    target, size, classes, numbers, gaps = REAL[name]
    data = load(path, target)
    found = frame_of(data)
    assert (len(data.target), data.classes, data.notes) == (size, classes, ())
    assert (found.dtypes == np.float64).sum() == numbers
    assert found.isna().sum().sum() == gaps
