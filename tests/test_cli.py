"""The command ``penex``, as a person or a script meets it."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import disk
import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_iris
from typer.testing import CliRunner, Result
from waiting import GUARD

from penex import cli
from penex.compare.analysis.tables import legend
from penex.compare.analysis.verdict import recommendation, warnings
from penex.compare.config import Config, Execution
from penex.compare.files import read_json
from penex.compare.output_folder import read_comparison, run_folder
from penex.compare.registry import DEFAULT_LOSSES

OPTIONS = (
    *("--data", "--target", "--losses", "--seeds", "--train-size", "--label-noise", "--epochs"),
    *("--lr", "--batch-size", "--tune", "--jobs", "--out", "--config", "--text", "--classes"),
    *("--data-dir", "--parts", "--validation-size", "--test-size", "--image-size", "--augment"),
    *("--noise-parts", "--noise-classes", "--test-split"),
    *("--drop", "--keep", "--group", "--time", "--min-class-rows"),
    *("--validation-file", "--test-file"),
    *("--model", "--hidden", "--optimizer", "--weight-decay", "--schedule"),
    *("--warmup-epochs", "--gradient-clip", "--accumulate", "--precision", "--compile"),
    *("--gradient-scale", "--select", "--metric", "--min-difference"),
    *("--tune-lr", "--tune-jobs", "--storage", "--backend", "--address", "--devices"),
    *("--nodes", "--strategy", "--workers", "--logger"),
)
SMALL = ("--losses=cross-entropy,penex", "--seeds=2", "--epochs=3", "--jobs=1")


def penex(*arguments: str | Path) -> Result:
    """The command in this process, without a terminal."""
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def process(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", "from penex.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=GUARD,
    )


def assert_refused(result: Result | subprocess.CompletedProcess[str], message: str) -> None:
    """Status 2, one line that says what is wrong on stderr, and no traceback."""
    status = result.exit_code if isinstance(result, Result) else result.returncode
    assert status == 2, result
    assert re.fullmatch(f"penex: .*{message}.*\n", result.stderr), result.stderr
    assert "Traceback" not in result.stderr + result.stdout


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A comparison as the command leaves it, in a folder whose name looks like Rich's markup."""
    folder = tmp_path_factory.mktemp("cli") / "with [bold] name, long enough to be wrapped" / "out"
    result = penex("compare", "iris", *SMALL, "--out", folder)
    assert result.exit_code == 0, result.output
    return folder, result


def test_help_names_both_commands_and_loads_nothing_heavy() -> None:
    program = (
        "import sys, penex.cli\n"
        "try: penex.cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = 'torch pandas lightning numpy sklearn scipy matplotlib optuna pydantic joblib'\n"
        "print('loaded:', [name for name in heavy.split() if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, "--help"], capture_output=True, text=True, check=True
    )
    assert "loaded: []" in result.stdout
    assert re.search(r"\bcompare\b", result.stdout)
    assert re.search(r"\breport\b", result.stdout)
    assert result.stderr == ""


def test_help_of_compare_explains_every_option() -> None:
    result = CliRunner(env={"COLUMNS": "120"}).invoke(cli.app, ["compare", "--help"])
    assert result.exit_code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", result.stdout)
    lines = [line.strip(" │") for line in text.splitlines()]
    for option in OPTIONS:
        described = [line for line in lines if re.match(rf"{option}(?![\w-])", line)]
        assert len(described) == 1, option
        assert len(described[0].split()) > 2, option
    for word in (
        "[OPTIONS] [DATA]",
        ".csv",
        ".parquet",
        ".npz",
        "digits",
        "penex=0.3",
        *DEFAULT_LOSSES,
    ):
        assert word in text


def test_every_setting_has_an_option_or_is_meant_for_the_file() -> None:
    fields = {f"--{name.replace('_', '-')}" for name in Config.model_fields}
    fields |= {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(Execution)}
    fields -= {"--loggers"}  # is --logger
    in_files = {"--lr-of", "--model-options"}
    assert fields - set(OPTIONS) == in_files
    assert set(OPTIONS) - fields == {"--out", "--config", "--logger"}


def test_options_reach_the_configuration(tmp_path: Path) -> None:
    options = (
        *("--hidden= 8,4", "--optimizer=sgd", "--weight-decay=0.01", "--schedule=cosine"),
        *("--warmup-epochs=1", "--gradient-clip=0.5", "--accumulate=2", "--precision=bf16-mixed"),
        *(
            "--no-tune-lr",
            "--select=last",
            "--gradient-scale=own",
            "--metric=brier",
            "--validation-size=0.3",
        ),
        *("--test-size=0.2", "--classes=setosa, virginica", "--no-compile"),
        *("--test-split=once", "--min-difference=0.01"),
        *("--noise-classes=uniform", "--noise-parts=training+validation"),
    )
    arguments = ("compare", "iris", *options, "--losses=penex", "--seeds=1", "--epochs=2")
    result = penex(*arguments, "--jobs=1", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    config, data = read_comparison(tmp_path / "out")
    assert data["classes"] == ["setosa", "virginica"]
    assert config == Config(
        data="iris",
        classes=("setosa", "virginica"),
        validation_size=0.3,
        test_size=0.2,
        test_split="once",
        noise_parts="training+validation",
        noise_classes="uniform",
        hidden=(8, 4),
        losses=("penex",),
        seeds=1,
        epochs=2,
        accumulate=2,
        optimizer="sgd",
        weight_decay=0.01,
        schedule="cosine",
        warmup_epochs=1,
        gradient_clip=0.5,
        precision="bf16-mixed",
        tune_lr=False,
        select="last",
        gradient_scale="own",
        metric="brier",
        min_difference=0.01,
    )


def test_without_a_command_there_is_help() -> None:
    result = penex()
    assert "compare" in result.output
    assert "Traceback" not in result.output


def test_output_without_a_terminal(out: tuple[Path, Result]) -> None:
    folder, result = out
    lines = result.stdout.splitlines()
    announced = "Comparing 2 losses × 2 seeds on iris (3 epochs); results in "
    assert lines[0] == f"{announced}{folder}"
    assert lines[1] == "Training: 0 of 12 epochs done"
    for line, (label, seed) in zip(
        lines[2:6],
        [("Cross-entropy", 0), ("PENEX", 0), ("Cross-entropy", 1), ("PENEX", 1)],
        strict=True,
    ):
        run = read_json(run_folder(folder, label.lower(), seed) / "run.json")
        nll, epoch = run["validation"]["refined"]["refined_nll"], run["epochs"]["refined"]
        assert line == (
            f"{label}, seed {seed}: validation NLL {nll:.4f} after temperature scaling "
            f"at epoch {epoch}"
        )
    assert lines[-1] == f"Report: {folder / 'report.html'}"
    rest = " ".join(" ".join(lines[6:]).split())
    results = read_json(folder / "results.json")
    assert rest.startswith(recommendation(results))
    assert all(f"Warning: {warning}" in rest for warning in warnings(results))
    assert legend(results) in rest
    # Neither colours, nor a bar that moves, nor text cut off.
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f…]", result.stdout)
    assert result.stderr == ""


def test_what_it_leaves(out: tuple[Path, Result]) -> None:
    folder, _ = out
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
        "comparison.json",
        "report.html",
        "results.json",
        "runs",
        "table.tex",
        "timing.json",
    }
    assert len(read_json(folder / "results.json")["runs"]) == 4


def test_the_same_command_again_has_nothing_to_do(out: tuple[Path, Result]) -> None:
    folder, first = out
    again = penex("compare", "--data", "iris", *SMALL, "--out", folder)
    assert again.exit_code == 0
    lines = again.stdout.splitlines()
    assert lines[1] == "Training: 12 of 12 epochs done"
    assert lines[2:] == first.stdout.splitlines()[6:]


def test_report_rebuilds_what_was_removed(out: tuple[Path, Result], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(out[0], tmp_path / "copy"))
    files = [folder / name for name in ("results.json", "table.tex", "report.html")]
    before = [path.read_bytes() for path in files]
    for path in files:
        path.unlink()
    result = penex("report", folder)
    assert result.exit_code == 0
    assert [path.read_bytes() for path in files] == before
    assert result.stdout.splitlines()[:-1] == out[1].stdout.splitlines()[6:-1]


def test_report_where_the_encoding_lacks_characters(out: tuple[Path, Result]) -> None:
    result = process("report", out[0], PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert result.returncode == 0, result.stderr
    assert "Cross-entropy" in result.stdout
    assert "?" in result.stdout


def test_a_table_from_start_to_end(tmp_path: Path) -> None:
    iris = load_iris()
    frame = pd.DataFrame(iris.data, columns=["a", "b", "c", "d"])
    frame.loc[::7, "a"] = np.nan
    frame["colour"] = np.where(iris.target == 1, "red", "blue")
    frame["the label"] = iris.target_names[iris.target]
    path = tmp_path / "my table.csv"
    frame.to_csv(path, index=False)
    config = tmp_path / "settings.yaml"
    config.write_text("target: nothing\nepochs: 50\nhidden: [16]\nseeds: 1\nbatch_size: 16\n")
    arguments = ("compare", path, "--config", config, "--epochs=4", "--lr=0.01", "--jobs=1")
    options = ("--label-noise=0.25", "--train-size=60", "--losses= penex=0.3 ,cross-entropy")
    folder = tmp_path / "out"
    result = penex(*arguments, *options, "--target", "the label", "--out", folder)
    assert result.exit_code == 0, result.output
    settings, data = read_comparison(folder)
    assert data["name"] == "my table"
    assert data["classes"] == ["setosa", "versicolor", "virginica"]
    assert settings.hidden == (16,)
    assert (settings.epochs, settings.lr, settings.batch_size) == (4, 0.01, 16)
    results = read_json(folder / "results.json")
    assert [loss["spec"] for loss in results["losses"]] == ["penex=0.3", "cross-entropy"]
    assert results["runs"][0]["rows"] == {"train": 60, "validation": 15, "test": 38}
    assert "25 % label noise in training rows" in " ".join(result.stdout.split())


def test_what_is_said_of_a_table_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    i = np.arange(120)
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"id": i + 100, "x": rng.normal(size=120), "fur": "black"})
    frame["animal"] = i // 4
    frame["result"] = np.array(["home", "stays"])[i % 2]
    frame.loc[2:3, "result"] = None
    frame.to_csv("cats.csv.gz", index=False, sep=";")
    options = ("--target=result", "--drop= fur", "--group=animal", "--seeds=1", "--epochs=2")
    result = penex("compare", "cats.csv.gz", *options, "--losses=penex", "--jobs=1")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    start = next(n for n, line in enumerate(lines) if "2 of 120 rows" in line)
    assert lines[start + 1 : start + 5] == [
        "Used as numbers: 'id', 'x'",
        "No feature (group): 'animal'",
        "No feature (drop): 'fur'",
        "Warning: possible identifiers, with a different value in every row: 'id'. To leave them "
        "out: --drop 'id'",
    ]
    assert (tmp_path / "penex-results" / "cats" / "report.html").exists()


def test_tuning_is_reported(tmp_path: Path) -> None:
    arguments = ("compare", "iris", "--losses=penex", "--seeds=1", "--epochs=2", "--tune=2")
    result = penex(*arguments, "--jobs=1", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[1] == "Tuning: 0 of 4 epochs done"
    assert re.fullmatch(r"PENEX: tuned to learning rate \S+, sensitivity \S+", lines[2])
    assert lines[3] == "Training: 0 of 2 epochs done"
    assert "Tuned with 2 trials per loss" in " ".join(result.stdout.split())


def test_a_refusal_of_the_real_command(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": range(30), "species": list("xyz") * 10})
    frame.to_csv(tmp_path / "table.csv", index=False)
    result = process("compare", tmp_path / "table.csv", "--target=specie", "--out", tmp_path / "o")
    assert_refused(result, "has no column 'specie'; .* Did you mean 'species'")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["iris", "--data=wine"], "data: given twice, as 'iris' and as --data 'wine'"),
        (["absent.csv", "--target=y"], "no such file: absent.csv"),
        (["irs"], "unknown data 'irs': .*Did you mean 'iris'"),
        (["iris", "--target=y"], "target: iris has no use for it, but 'y' was given"),
        (["iris", "--losses=penx"], r"losses: no loss is called 'penx'; did you mean penex\?"),
        (["iris", "--losses=penex,penex"], "losses: a loss is named twice"),
        (["iris", "--losses=label-smoothing=2"], "losses: expected label-smoothing=NUMBER"),
        (["iris", "--seeds=0"], "seeds: Input should be greater than or equal to 1, got 0"),
        (
            ["iris", "--train-size=0"],
            r"train_size \(--train-size\): Input should be greater than 0, got 0",
        ),
        (["iris", "--train-size=140"], r"train_size \(--train-size\) must be at most 90; got 140"),
        (
            ["iris", "--label-noise=1"],
            r"label_noise \(--label-noise\): Input should be less than 1, got 1.0",
        ),
        (["iris", "--lr=-1"], "lr: Input should be greater than 0, got -1.0"),
        (["iris", "--config=absent.yaml"], "config: cannot read absent.yaml: No such file"),
    ],
)
def test_refusals(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(penex("compare", *arguments, "--jobs=1", "--out=out"), message)


@pytest.mark.parametrize("arguments", [["--jobs=0"], ["--seeds=two"], ["--epoch=3"], ["a", "b"]])
def test_misspelt_commands_have_usage_and_status_2(arguments: list[str]) -> None:
    result = penex("compare", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage: ")
    assert "Traceback" not in result.output


def test_refused_folders(out: tuple[Path, Result], tmp_path: Path) -> None:
    changed = penex("compare", "iris", *SMALL, "--epochs=4", "--out", out[0])
    assert_refused(changed, r"belongs to another configuration \(epochs was 3, is 4\); choose ")
    (tmp_path / "thesis.tex").write_text("years of work")
    assert_refused(penex("compare", "iris", "--out", tmp_path), "is not empty and holds no compar")
    file = tmp_path / "thesis.tex"
    assert_refused(penex("compare", "iris", "--out", file), "expected a folder, .* is a file")
    assert file.read_text() == "years of work"


def test_a_full_disk(out: tuple[Path, Result], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(out[0], tmp_path / "copy"))
    contents = {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
    arguments = ("compare", "iris", *SMALL, "--seeds=3", "--out", folder)
    with disk.full(60_000):  # less than a checkpoint
        refused = penex(*arguments)
    kept = "no space left for .*. Finished runs are kept; make room and the same command continues"
    assert_refused(refused, kept)
    del contents[folder / "comparison.json"]  # which says three seeds now
    assert all(path.read_bytes() == content for path, content in contents.items())
    assert list(folder.rglob(".partial-*")) == []
    assert penex(*arguments).exit_code == 0
    assert len(read_json(folder / "results.json")["runs"]) == 6
    runs = {path: content for path, content in contents.items() if "runs" in path.parts}
    assert all(path.read_bytes() == content for path, content in runs.items())


@pytest.mark.parametrize("most", [100, 60_000])
def test_no_room_for_the_report(out: tuple[Path, Result], tmp_path: Path, most: int) -> None:
    folder = Path(shutil.copytree(out[0], tmp_path / "copy"))
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with disk.full(most):
        assert_refused(penex("report", folder), "no space left for ")
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert after["report.html"] == before["report.html"]
    assert after.keys() == before.keys()


@pytest.mark.parametrize("name", ["absent", "empty", "file"])
def test_report_of_what_is_no_comparison(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    assert_refused(penex("report", tmp_path / name), "holds no comparison: expected .*")


def test_a_damaged_run_is_refused_with_the_way_out(
    out: tuple[Path, Result], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(out[0], tmp_path / "copy"))
    run = folder / "runs" / "penex" / "seed-1"
    (run / "run.json").write_bytes((run / "run.json").read_bytes()[:100])
    refused = penex("report", folder)
    assert_refused(refused, f"run.json is damaged .*; remove {re.escape(str(run))} and run")
    shutil.rmtree(run)  # as told
    assert penex("compare", "iris", *SMALL, "--out", folder).exit_code == 0
    assert len(read_json(folder / "results.json")["runs"]) == 4
