"""Downloads from a local server, and generated data."""

import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from disk import full

from penex.compare.config import Config
from penex.compare.data import downloads as download
from penex.compare.data.downloads import DOWNLOADS, TISSUES, Download
from penex.compare.data.images import Images
from penex.compare.data.load import Dataset, load
from penex.compare.data.split import split
from penex.compare.errors import CompareError

pytest.importorskip("pooch")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Path]:
    """A folder on a server, which is named in the file `url`."""
    folder = tmp_path / "served"
    folder.mkdir()
    server = HTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    (folder / "url").write_text(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PENEX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def read(name: str, **options: Any) -> Dataset:
    return load(Config(data=name, **options))


def sonar() -> bytes:
    """Not the real numbers, but their form."""
    x = np.random.default_rng(0).random((208, 60)).round(4)
    rows = [",".join([*map(str, row), "RM"[i % 2]]) for i, row in enumerate(x)]
    return "\n".join(rows).encode()


def offer(monkeypatch: pytest.MonkeyPatch, name: str, url: str, checksum: str) -> None:
    monkeypatch.setitem(DOWNLOADS, name, Download(DOWNLOADS[name].file, url, checksum))


def test_sonar_is_downloaded_once(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = sonar()
    (served / "s.csv").write_bytes(content)
    url = (served / "url").read_text() + "/s.csv"
    offer(monkeypatch, "sonar", url, f"sha256:{hashlib.sha256(content).hexdigest()}")
    first = read("sonar")
    assert (first.name, first.classes) == ("sonar", ("mine", "rock"))
    assert isinstance(first.features, np.ndarray)
    assert first.features.shape == (208, 60)
    expected = np.array([line.split(",")[:-1] for line in content.decode().split()], np.float32)
    np.testing.assert_array_equal(first.features, expected)
    assert first.target.tolist() == [1, 0] * 104
    (served / "s.csv").unlink()
    assert read("sonar").fingerprint == first.fingerprint


# pooch leaves the connection of a failed download to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_download_refusals(served: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = sonar()
    (served / "s.csv").write_bytes(content)
    url = (served / "url").read_text()
    good = f"sha256:{hashlib.sha256(content).hexdigest()}"

    def fails(match: str) -> None:
        with pytest.raises(CompareError, match=match) as caught:
            read("sonar")
        assert "\n" not in str(caught.value)
        assert not [path for path in cache.rglob("*") if path.is_file()]

    offer(monkeypatch, "sonar", f"{url}/s.csv", "sha256:" + "0" * 64)
    fails(r"cannot use http.*does not match the known hash")
    offer(monkeypatch, "sonar", f"{url}/none.csv", good)
    fails(r"cannot download .*none.csv: 404 .*holds sonar.csv \(--data-dir\)")
    offer(monkeypatch, "sonar", "http://127.0.0.1:9/s.csv", good)
    fails(r"cannot download http://127\.0\.0\.1:9/s\.csv: .*--data-dir")
    offer(monkeypatch, "sonar", f"{url}/s.csv", good)
    with full(1000):
        fails(r"no space left in .*downloads for sonar\.csv .*PENEX_CACHE")
    read("sonar")


def test_sonar_from_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CompareError, match=r"no such file: .*sonar\.csv"):
        read("sonar", data_dir=str(tmp_path))
    (tmp_path / "sonar.csv").write_bytes(sonar())
    assert len(read("sonar", data_dir=str(tmp_path)).target) == 208
    (tmp_path / "sonar.csv").write_bytes(sonar() + b"\n" + sonar())
    with pytest.raises(CompareError, match=r"expected the sonar data set, .*got 416 rows of 60"):
        read("sonar", data_dir=str(tmp_path))


def test_pathmnist_from_a_folder(tmp_path: Path) -> None:
    arrays = {}
    for part, n in (("train", 30), ("val", 9), ("test", 12)):
        arrays[f"{part}_images"] = np.full((n, 64, 64, 3), n, np.uint8)
        arrays[f"{part}_labels"] = np.arange(n)[:, None] % 3 + 6
    np.savez(tmp_path / "pathmnist_64.npz", **arrays)
    data = read("pathmnist", data_dir=str(tmp_path), parts="test")
    assert data.classes == TISSUES[6:]
    assert isinstance(data.features, Images)
    assert data.features.shape == (3, 64, 64)
    assert list(data.official) == ["test"]
    arrays["train_labels"] = np.arange(30)[:, None] % 2 + 8
    np.savez(tmp_path / "pathmnist_64.npz", **arrays)
    with pytest.raises(CompareError, match="expected the labels 0 to 8; got 6, 7, 8, 9"):
        read("pathmnist", data_dir=str(tmp_path))


def test_registered_checksums_are_of_the_real_files() -> None:
    """Sources: the repository at that commit; MedMNIST 3.0.2's info.py."""
    assert {name: (d.url, d.checksum) for name, d in download.DOWNLOADS.items()} == {
        "sonar": (
            "https://raw.githubusercontent.com/jbrownlee/Datasets/"
            "a8229c90a131a53c58be9027e047e6a74f11a264/sonar.csv",
            "sha256:3079c09b5d2789a0f96aff82c28e5164fafe2495c5f8da96c6c256c1bd25763f",
        ),
        "pathmnist": (
            "https://zenodo.org/records/10519652/files/pathmnist_64.npz?download=1",
            "md5:55aa9c1e0525abe5a6b9d8343a507616",
        ),
    }


def test_two_gaussians() -> None:
    data = read("two-gaussians")
    config = Config(train_size=100)
    trains = []
    for seed in range(5):
        s = split(data, seed=seed, config=config)
        assert np.bincount(s.train[1]).tolist() == [50, 50]
        assert [len(s.validation[1]), len(s.test[1])] == [25, 20_000]
        trains.append(set(map(bytes, np.asarray(s.train[0]))))
    assert len(set.union(*trains)) > 480  # hardly any row twice
    assert isinstance(data.features, np.ndarray)
    x = data.features[data.official["test"]].astype(np.float64)
    y = data.target[data.official["test"]]
    outlier = (y == 0) & (x.sum(1) < -4)
    share = outlier[y == 0].mean()
    assert abs(share - 0.1) < 4 * np.sqrt(0.09 / 10_000)
    for rows, mean, variance in (
        (outlier, -4, 0.1),
        ((y == 0) & ~outlier, 3, 1),
        (y == 1, -2, 1),
    ):
        error = 4 * np.sqrt(variance / rows.sum())
        np.testing.assert_allclose(x[rows].mean(0), mean, atol=error)
        np.testing.assert_allclose(np.cov(x[rows].T), np.eye(2) * variance, atol=6 * error)
