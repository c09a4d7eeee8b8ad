"""Every preset runs from the command to its figures, on a slice of made-up data."""

import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from penex import cli
from penex.compare.presets import NAMES, preset
from penex.compare.samples import sample
from penex.compare.store import read_comparison, read_json, run_folder

# A worker each, where there are several: most of the time is theirs.
EVERY = NAMES


def reproduce(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, ["reproduce", *map(str, arguments)])


@pytest.fixture(autouse=True)
def _caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENEX_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", EVERY)
def test_smoke(name: str, tmp_path: Path) -> None:
    result = reproduce(name, "--smoke", "--jobs", "1", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    facts, configs = preset(name), preset(name).configs(smoke=True)
    record = read_json(tmp_path / "out" / "reproduction.json")
    assert record["experiments"] == list(configs)
    assert record["deviations"] == list(facts.deviations)
    # Every figure is there, or says what it lacks on so small a slice.
    assert list(record["figures"]) == list(facts.figures)
    for drawn in record["figures"].values():
        assert (tmp_path / "out" / drawn).stat().st_size > 5_000, drawn
    for experiment, config in configs.items():
        folder = tmp_path / "out" / experiment
        assert read_comparison(folder)[0].losses == config.losses
        runs = read_json(folder / "results.json")["runs"]
        assert [run["loss"] for run in runs] == list(config.losses)
        assert (folder / "report.html").stat().st_size > 10_000
    if len(configs) > 1:
        page = (tmp_path / "out" / "report.html").read_text()
        assert all(read_comparison(tmp_path / "out" / each)[1]["name"] in page for each in configs)
    for deviation in facts.deviations:
        assert deviation.split()[0] in result.stdout
    assert "A smoke run" in result.stdout


def test_published_numbers_stand_beside_ours(tmp_path: Path) -> None:
    losses = "cross-entropy,penex"
    arguments = ("cifar100", "--smoke", "--losses", losses, "--seeds", "2", "--jobs", "1")
    result = reproduce(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "out" / "cifar100"
    rows = read_json(folder / "results.json")["published"]
    assert [(row["loss"], row["value"]) for row in rows] == [
        ("cross-entropy", 2.296),
        ("penex=0.085", 2.067),
    ]
    for row in rows:
        runs = [run_folder(folder, row["loss"], seed) / "run.json" for seed in range(2)]
        name = "nll" if row["loss"].startswith("penex") else "softmax_nll"
        mean = sum(read_json(run)["validation"]["nll"][name] for run in runs) / 2
        assert row["ours"]["mean"] == pytest.approx(mean, rel=1e-4)
        text = " ".join(result.stdout.split())
        assert re.search(rf"{row['label']}, .*: {mean:.3f}.*published: {row['value']}", text)
        assert f"{row['value']:g}" in (folder / "report.html").read_text()


def test_tuning_is_a_variant(tmp_path: Path) -> None:
    arguments = ("tabular", "--smoke", "--losses", "penex", "--epochs", "3", "--tune", "2")
    result = reproduce(*arguments, "--jobs", "1", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    for experiment in preset("tabular").experiments:
        run = read_json(run_folder(tmp_path / "out" / experiment, "penex=0.3", 0) / "run.json")
        assert run["knob"] == 0.3  # the published one stays
        assert (tmp_path / "out" / experiment / "tuning").is_dir()


def test_data_at_hand_is_used(tmp_path: Path) -> None:
    """In a folder by the data set's name, or in the folder itself; and what is not is made up."""
    named = tmp_path / "all" / "pathmnist"
    sample("pathmnist", named)
    with np.load(named / "pathmnist_64.npz") as arrays:
        darker = {name: array // (2 if "images" in name else 1) for name, array in arrays.items()}
    np.savez(named / "pathmnist_64.npz", **darker)
    arguments = ("pathmnist", "--smoke", "--losses", "penex", "--epochs", "1", "--jobs", "1")
    found = []
    for number, given in enumerate((tmp_path / "all", named, None)):
        out = tmp_path / f"out{number}"
        where = ("--data-dir", given) if given else ()
        result = reproduce(*arguments, *where, "--out", out)
        assert result.exit_code == 0, result.output
        found.append(read_json(out / "pathmnist" / "comparison.json")["data"]["fingerprint"])
        assert (out / "data").exists() == (given is None)
    assert found[0] == found[1] != found[2]


def test_the_same_command_again_trains_nothing(tmp_path: Path) -> None:
    arguments = ("two-gaussians", "--smoke", "--jobs", "1", "--out", tmp_path / "out")
    assert reproduce(*arguments).exit_code == 0
    runs = list((tmp_path / "out").rglob("run.json"))
    before = {run: run.stat().st_mtime_ns for run in runs}
    result = reproduce(*arguments)
    assert result.exit_code == 0, result.output
    assert {run: run.stat().st_mtime_ns for run in runs} == before
    assert len(before) == 2
    # Nor does one with fewer losses hide the others.
    results = tmp_path / "out" / "two-gaussians" / "results.json"
    losses = [loss["spec"] for loss in read_json(results)["losses"]]
    assert reproduce(*arguments, "--losses", "penex").exit_code == 0
    assert [loss["spec"] for loss in read_json(results)["losses"]] == losses
    # Another size is another comparison.
    result = reproduce("two-gaussians", "--jobs", "1", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "belongs to another configuration" in result.stderr


def test_the_list() -> None:
    result = reproduce("--list")
    assert result.exit_code == 0
    for name in NAMES:
        (line,) = [line for line in result.stdout.splitlines() if line.split()[:1] == [name]]
        facts = preset(name)
        assert facts.title in line
    line = next(line for line in result.stdout.splitlines() if line.split()[:1] == ["cifar100"])
    # 6 losses at 3 seeds, 200 epochs of 625 steps.
    assert line.split()[-3:] == ["18", "200", "2.250"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name a preset, one of cifar10, "),
        (("cifar01",), "no preset is called 'cifar01'. Did you mean 'cifar"),
        (("cifar10", "--smoke", "--losses", "hinge"), "there is no 'hinge' in this preset"),
        (("cifar10", "--data-dir", "."), "holds no Parquet files"),
    ],
)
def test_refusals(arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = reproduce(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert list(tmp_path.glob("penex-reproduce/*/*")) == []
