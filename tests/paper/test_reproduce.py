"""Every preset runs from the command to its figures, on a small set of random data."""

import functools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from penex import cli
from penex.compare.config import Config
from penex.compare.files import read_json
from penex.compare.output_folder import read_comparison, run_folder, trial_folder
from penex.paper.presets import NAMES, preset
from penex.paper.synthetic_data import sample

FEWER_LOSSES = {
    **dict.fromkeys(
        ("cifar10-noisy", "cifar10-vit", "cifar100-vit", "pathmnist", "imagenet", "bbc-news"),
        ("cross-entropy", "penex"),
    ),
    "calibration": ("cross-entropy", "label-smoothing=0.1", "label-smoothing=0.3"),
}
"""What is trained in place of a preset's own losses, to save time."""
SMOKED = [name for name in NAMES if name not in ("cifar10", "cifar100-long", "sensitivity")]
"""The others differ from one of these in settings or losses alone."""


class Smoke(NamedTuple):
    """A preset's smoke run."""

    result: Result
    folder: Path
    configs: dict[str, Config]


def reproduce(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, ["reproduce", *map(str, arguments)])


@pytest.fixture(autouse=True)
def _caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENEX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Smoke]:
    """The smoke run of a preset, made once. For reading: copy it before changing it."""

    @functools.cache
    def once(name: str) -> Smoke:
        folder = tmp_path_factory.mktemp(name) / "out"
        losses = FEWER_LOSSES.get(name)
        only = () if losses is None else ("--losses", ",".join(losses))
        result = reproduce(name, "--smoke", *only, "--jobs", "1", "--out", folder)
        return Smoke(result, folder, preset(name).configs(smoke=True, losses=losses))

    return once


@pytest.mark.parametrize("name", SMOKED)
def test_smoke(name: str, smoke: Callable[[str], Smoke]) -> None:
    result, out, configs = smoke(name)
    assert result.exit_code == 0, result.output
    facts = preset(name)
    record = read_json(out / "reproduction.json")
    assert record["experiments"] == list(configs)
    assert record["deviations"] == list(facts.deviations)
    # Every figure is there, or says what it lacks on so small a slice.
    assert list(record["figures"]) == list(facts.figures)
    for drawn in record["figures"].values():
        assert (out / drawn).stat().st_size > 5_000, drawn
    for experiment, config in configs.items():
        folder = out / experiment
        assert read_comparison(folder)[0].losses == config.losses
        runs = read_json(folder / "results.json")["runs"]
        assert [run["loss"] for run in runs] == list(config.losses)
        assert (folder / "report.html").stat().st_size > 10_000
    if len(configs) > 1:
        page = (out / "report.html").read_text()
        assert all(read_comparison(out / each)[1]["name"] in page for each in configs)
    for deviation in facts.deviations:
        assert deviation.split()[0] in result.stdout
    assert "A smoke run" in result.stdout


def test_published_numbers_are_shown_with_ours(tmp_path: Path) -> None:
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
    arguments = ("two-gaussians", "--smoke", "--losses", "penex", "--epochs", "3", "--tune", "2")
    result = reproduce(*arguments, "--jobs", "1", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "out" / "two-gaussians"
    run = read_json(run_folder(folder, "penex=0.5", 0) / "run.json")
    assert run["knob"] == 0.5  # the published one stays
    assert trial_folder(folder, "penex=0.5", 1).is_dir()


def test_given_data_is_used(tmp_path: Path, smoke: Callable[[str], Smoke]) -> None:
    """In a folder by the data set's name, or in the folder itself; and what is not is made up."""
    named = tmp_path / "all" / "pathmnist"
    sample("pathmnist", named)
    with np.load(named / "pathmnist_64.npz") as arrays:
        darker = {name: array // (2 if "images" in name else 1) for name, array in arrays.items()}
    np.savez(named / "pathmnist_64.npz", **darker)
    arguments = ("pathmnist", "--smoke", "--losses", "penex", "--epochs", "1", "--jobs", "1")

    def fingerprint(out: Path) -> str:
        return str(read_comparison(out / "pathmnist")[1]["fingerprint"])

    made_up = smoke("pathmnist").folder
    assert (made_up / "data").is_dir()
    found = []
    for number, given in enumerate((tmp_path / "all", named)):
        out = tmp_path / f"out{number}"
        result = reproduce(*arguments, "--data-dir", given, "--out", out)
        assert result.exit_code == 0, result.output
        found.append(fingerprint(out))
        assert not (out / "data").exists()
    assert found[0] == found[1] != fingerprint(made_up)


def test_repeating_the_command_trains_nothing(
    tmp_path: Path, smoke: Callable[[str], Smoke]
) -> None:
    shutil.copytree(smoke("two-gaussians").folder, tmp_path / "out")
    arguments = ("two-gaussians", "--smoke", "--jobs", "1", "--out", tmp_path / "out")
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
