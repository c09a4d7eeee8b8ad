"""Attacks by a folder from someone else: what is in it is data, and runs no code."""

import io
import json
import os
import platform
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import penex
from penex.cli import app
from penex.compare import files
from penex.compare.config import configure
from penex.compare.errors import CompareError
from penex.compare.files import read_json, write_json
from penex.compare.output_folder import run_folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A finished comparison, as it may have been received."""
    return Path(shutil.copytree(finished, tmp_path / "received"))


@pytest.fixture(scope="session")
def bundle(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved classifier of it."""
    return penex.load(finished).model("penex").save(tmp_path_factory.mktemp("bundle") / "saved")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.npy"
    np.save(path, np.ones((2, 4), np.float32))
    return path


def penex_command(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def edited(path: Path, change: Callable[[Any], None]) -> None:
    value = read_json(path)
    change(value)
    write_json(path, value)


# Links and special files


def test_a_file_is_not_written_through_a_link_planted_under_a_temporary_name(
    folder: Path, tmp_path: Path
) -> None:
    victim = tmp_path / ".bashrc"
    victim.write_text("mine")
    (folder / ".partial-table.tex").symlink_to(victim)
    status, output = penex_command("report", folder)
    assert status == 2
    assert "is a symbolic link" in output
    assert victim.read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "is_folder"),
    [
        ("table.tex", False),
        ("report.html", False),
        ("figures", True),
        ("runs/penex/seed-0", True),
        ("refit", True),
        (".lock", False),
        ("wandb/latest-run", True),
    ],
)
@pytest.mark.parametrize("command", ["report", "figures", "attack", "predict", "compare"])
def test_links_in_a_folder_are_refused(
    folder: Path, tmp_path: Path, rows: Path, command: str, name: str, is_folder: bool
) -> None:
    victim = tmp_path / "victim"
    if is_folder:
        victim.mkdir()
    else:
        victim.write_text("mine")
    link = folder / name
    if link.exists():
        shutil.rmtree(link) if link.is_dir() else link.unlink()
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(victim, target_is_directory=is_folder)
    words = {
        "report": [folder],
        "figures": [folder, "--only", "curves"],
        "attack": [folder],
        "predict": [folder, rows],
        "compare": ["iris", "--out", folder],
    }[command]
    status, output = penex_command(command, *words)
    assert status == 2
    assert f"{link} is a symbolic link" in output.replace("\n", "")
    assert list(victim.iterdir()) == [] if is_folder else victim.read_text() == "mine"


def test_a_link_of_the_logger_within_the_folder_stays(folder: Path) -> None:
    latest = folder / "runs" / "penex" / "seed-0" / "wandb" / "latest-run"
    latest.parent.mkdir()
    latest.symlink_to(".", target_is_directory=True)
    assert penex_command("report", folder)[0] == 0


def test_a_bundle_with_links_is_refused(bundle: Path, tmp_path: Path) -> None:
    received = Path(shutil.copytree(bundle, tmp_path / "received"))
    (received / "weights.safetensors").unlink()
    (received / "weights.safetensors").symlink_to(bundle / "weights.safetensors")
    with pytest.raises(CompareError, match="is a symbolic link"):
        penex.load(received)


@pytest.mark.parametrize("name", ["runs/penex/seed-0/run.json", "comparison.json", "more.json"])
def test_a_pipe_is_refused(folder: Path, name: str) -> None:
    path = folder / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    status, output = penex_command("report", folder)
    assert status == 2
    expected = "holds no comparison" if name == "comparison.json" else "not a regular file"
    assert expected in output


# Code


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module in the working directory that leaves a file when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    ran = tmp_path / "ran"
    (tmp_path / "trap_module.py").write_text(
        f"import pathlib, torch\npathlib.Path({str(ran)!r}).touch()\n"
        "def loss(): return torch.nn.CrossEntropyLoss()\n"
        "def network(shape, k): return torch.nn.Linear(shape[0], k)\n"
    )
    yield ran
    sys.modules.pop("trap_module", None)
    from penex.compare import user_objects

    for name in ("trap_module:loss", "trap_module:network"):
        user_objects._objects.pop(name, None)


def plant(folder: Path, where: str) -> None:
    """Name the module in comparison.json and model.json."""

    def change(value: dict[str, Any]) -> None:
        settings = value.get("config", value)
        if where == "loss":
            if "config" in value:
                settings["losses"][1] = "trap_module:loss"
            else:
                settings["loss"] = "trap_module:loss"
        else:
            settings["model" if "config" in value else "network"] = "trap_module:network"

    for path in (*folder.rglob("comparison.json"), *folder.rglob("model.json")):
        edited(path, change)


@pytest.mark.parametrize("where", ["loss", "model"])
@pytest.mark.parametrize(
    "words",
    [
        ["report", "FOLDER"],
        ["figures", "FOLDER"],
        ["attack", "FOLDER", "--rows", "2"],
        ["predict", "FOLDER", "ROWS"],
        ["predict", "FOLDER", "ROWS", "--refit"],
        ["export", "FOLDER", "TARGET.onnx"],
        ["predict", "BUNDLE", "ROWS"],
        ["export", "BUNDLE", "TARGET"],
    ],
    ids=" ".join,
)
def test_no_command_imports_what_a_folder_names(
    folder: Path, bundle: Path, rows: Path, tmp_path: Path, trap: Path, words: list[str], where: str
) -> None:
    received = Path(shutil.copytree(bundle, tmp_path / "received-bundle"))
    for each in (folder, received):
        plant(each, where)
    places = {"FOLDER": folder, "BUNDLE": received, "ROWS": rows}
    status, output = penex_command(*(places.get(word, word) for word in words))
    assert not trap.exists()
    # Tables and pictures are made from logits, for which no network is needed.
    if where == "model" and words[0] in ("report", "figures"):
        assert status == 0
    else:
        assert status == 2
        assert "--trust" in output


def test_loading_imports_nothing(folder: Path, trap: Path) -> None:
    plant(folder, "loss")
    with pytest.raises(CompareError, match="--trust"):
        penex.load(folder)
    assert not trap.exists()


@pytest.mark.parametrize("command", ["report", "figures", "attack", "predict", "export"])
def test_with_trust_it_is_imported(folder: Path, rows: Path, trap: Path, command: str) -> None:
    plant(folder, "loss")
    more = {
        "predict": [rows],
        "export": ["saved"],
        "attack": ["--rows=1", "--linf=0.1", "--l2="],
    }.get(command, [])
    penex_command(command, folder, *more, "--trust")
    assert trap.exists()


# Damaged files


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def not_json(path: Path) -> None:
    path.write_bytes(b"\x80\x04not json")


def deep(path: Path) -> None:
    path.write_text("[" * 100_000 + "]" * 100_000)


def of_a_number(path: Path) -> None:
    path.write_text("7")


def of_another_type(path: Path) -> None:
    """Every number becomes text."""

    def change(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: change(each) for key, each in value.items()}
        if isinstance(value, list):
            return [change(each) for each in value]
        return "x" if isinstance(value, int | float) else value

    write_json(path, change(json.loads(path.read_text())))


def not_a_number(path: Path) -> None:
    path.write_text(path.read_text().replace(": 0", ": NaN", 1).replace(": 1", ": NaN"))


def without_half_its_keys(path: Path) -> None:
    value = json.loads(path.read_text())
    write_json(path, dict(list(value.items())[::2]))


def with_other_arrays(path: Path) -> None:
    with np.load(path) as arrays:
        found = {name: array[:-1] if "target" in name else array for name, array in arrays.items()}
    np.savez(path, **found)


def with_huge_labels(path: Path) -> None:
    with np.load(path) as arrays:
        found = {name: array + 50 if "target" in name else array for name, array in arrays.items()}
    np.savez(path, **found)


ANY = [truncated, emptied, not_json]
JSON = [*ANY, deep, of_a_number, of_another_type, not_a_number, without_half_its_keys]
RUN = "runs/penex/seed-0"
DAMAGED = [
    *(("comparison.json", damage) for damage in JSON),
    *((f"{RUN}/run.json", damage) for damage in JSON),
    *((f"{RUN}/model.json", damage) for damage in JSON),
    *(("robustness.json", damage) for damage in [*ANY, deep, of_a_number]),
    *(("published.json", damage) for damage in [*ANY, deep, of_a_number]),
    *((f"{RUN}/logits.npz", damage) for damage in [*ANY, with_other_arrays, with_huge_labels]),
    *((f"{RUN}/curve.csv", damage) for damage in ANY),
    *((f"{RUN}/model.safetensors", damage) for damage in ANY),
    *((f"{RUN}/epoch-*.safetensors", damage) for damage in ANY),
]


@pytest.mark.parametrize(
    ("name", "damage"), DAMAGED, ids=[f"{name}-{damage.__name__}" for name, damage in DAMAGED]
)
def test_a_damaged_file_is_named(
    folder: Path, rows: Path, name: str, damage: Callable[[Path], None]
) -> None:
    if name == "robustness.json":
        write_json(folder / name, [{"loss": "penex", "seed": 0}])
    if name == "published.json":
        write_json(folder / name, [{"loss": "penex", "metric": "nll"}])
    paths = list(folder.glob(name))
    for path in paths:
        damage(path)
    refusals = []

    def attempt(what: Callable[[], Any]) -> None:
        """A refusal or success; anything else is a traceback for the user."""
        try:
            what()
        except CompareError as error:
            refusals.append(str(error))

    def run(*words: object) -> None:
        status, output = penex_command(*words)
        if status:
            raise CompareError(output.replace("\n", ""))

    attempt(lambda: run("report", folder))
    attempt(lambda: run("figures", folder, "--only", "curves"))
    attempt(lambda: run("predict", folder, rows))
    attempt(lambda: penex.load(folder).model("penex", 0).predict(np.ones((1, 4))))
    assert refusals
    for refusal in refusals:
        assert any(str(path) in refusal for path in paths)


@pytest.mark.parametrize("damage", [*ANY, deep, of_another_type, not_a_number])
@pytest.mark.parametrize("name", ["timing.json", "results.json"])
def test_what_can_be_made_again_is(
    folder: Path, make: Callable[..., Path], name: str, damage: Callable[[Path], None]
) -> None:
    assert penex_command("report", folder)[0] == 0
    whole = read_json(folder / name)
    damage(folder / name)
    assert penex_command("report", folder)[0] == 0
    make(folder)
    assert penex_command("report", folder)[0] == 0
    assert read_json(folder / name).keys() == whole.keys()


@pytest.mark.parametrize("damage", [Path.unlink, *ANY])
@pytest.mark.parametrize("name", ["run.json", "logits.npz", "curve.csv"])
def test_a_run_that_is_not_whole_is_done_again(
    finished: Path, folder: Path, make: Callable[..., Path], name: str, damage: Any
) -> None:
    run = run_folder(folder, "penex", 1)
    damage(run / name)
    make(folder)
    for part in ("validation", "test"):
        arrays = [
            np.load(run_folder(each, "penex", 1) / "logits.npz") for each in (finished, folder)
        ]
        before, after = (array[f"{part}_3"] for array in arrays)
        np.testing.assert_array_equal(before, after)
    assert penex_command("report", folder)[0] == 0


def test_the_report_says_which_runs_are_missing(folder: Path) -> None:
    shutil.rmtree(run_folder(folder, "penex", 1))
    (run_folder(folder, "cross-entropy", 0) / "run.json").unlink()
    status, output = penex_command("report", folder)
    assert status == 0
    assert "2 of 4 runs have finished" in output.replace("\n", " ")
    assert "Missing: Cross-entropy (seed 0), PENEX (seed 1)." in " ".join(output.split())


# Names with control characters

HOSTILE = "\x1b]0;owned\x07\x1b[2J\u202egnp\nWarning: all is well"


def test_control_characters_are_printed_as_text(folder: Path, tmp_path: Path, rows: Path) -> None:
    def name(value: dict[str, Any]) -> None:
        value["data"]["name"] = HOSTILE
        value["data"]["classes"] = [f"{HOSTILE}{k}" for k in range(3)]

    edited(folder / "comparison.json", name)
    for path in folder.rglob("model.json"):
        edited(path, lambda value: value.update(data=HOSTILE, classes=[HOSTILE, "b", "c"]))
    outputs = [
        penex_command("report", folder)[1],
        penex_command("report", folder, folder, "--out", tmp_path / "merged")[1],
        penex_command("predict", folder, rows, "--out", tmp_path / "predictions.csv")[1],
        penex_command("predict", folder, rows, "--loss", HOSTILE)[1],
        repr(penex.load(folder)),
        repr(penex.load(folder).model("penex")),
    ]
    table = tmp_path / "table.csv"
    table.write_text(f'"{HOSTILE}",b\n1,2\n')
    outputs.append(penex_command("compare", table, "--target", "c")[1])
    outputs.append(penex_command("compare", tmp_path / f"{HOSTILE}.csv", "--target", "c")[1])
    for output in outputs:
        assert not set("\x1b\x07\u202e") & set(output)
        assert not any(line.startswith("Warning: all is well") for line in output.splitlines())
    assert "\\x1b]0;owned\\x07" in outputs[1]


# Whose machine it was


def test_nothing_says_whose_machine_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here = tmp_path / "home", tmp_path / "home" / "somebody"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(platform, "node", lambda: "the-host")
    rng = np.random.default_rng(0)
    lines = "".join(f"{x:.3f},{'b' if x > 0 else 'a'}\n" for x in rng.normal(size=200))
    out = here / "out"
    for place in (here / "data", home / "data", tmp_path / "elsewhere"):
        place.mkdir()
        table = place / "rows.csv"
        table.write_text(f"x,label\n{lines}")
        small = {"losses": ["cross-entropy", "penex"], "seeds": 2, "epochs": 2, "tune": 1}
        penex.compare_losses(table, target="label", out=out, quiet=True, jobs=1, **small)
        assert penex_command("report", out)[0] == 0
        for path in out.rglob("*"):
            if path.is_file():
                content = path.read_bytes()
                assert str(tmp_path).encode() not in content, path
                assert b"the-host" not in content, path
        found = penex.load(out)
        if place.is_relative_to(home):
            found.refit()
        else:
            with pytest.raises(CompareError, match="name the place with --data"):
                found.refit()
            found.refit(table)
        shutil.rmtree(out)


# Bounds of what is read


def yaml_bomb() -> str:
    lines = ['a0: &a0 ["x", "x"]']
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 12)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (yaml_bomb(), "anchors and aliases"),
        ("a: &a [*a]", "anchors and aliases"),
        ("epochs: " + "[" * 100_000, "nested more than 20 deep"),
        ("epochs:\n" + "".join(" " * k + "a:\n" for k in range(1, 300)), "nested more than 20"),
        ("# " + "x" * 2**20, "is larger than"),
        ("epochs: " + "9" * 10_000, "is not valid YAML"),
        ("epochs: 2020-13-41", "is not valid YAML"),
        ("!!python/object/apply:os.system ['true']", "is not valid YAML"),
    ],
    ids=lambda value: value[:12],
)
def test_settings_are_bounded(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(CompareError, match=message):
        configure(path)


@pytest.mark.parametrize("name", ["x.csv", "x.npz", "x.parquet", "x.xlsx", "settings.yaml"])
def test_a_pipe_as_input_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    os.mkfifo(path)
    words = {"settings.yaml": ["--config", path], "x.npz": [path]}
    status, output = penex_command("compare", *words.get(name, [path, "--target", "y"]))
    assert status == 2
    assert "is a pipe, socket or device" in output


@pytest.mark.parametrize("name", ["x.png", "x.parquet"])
def test_a_pipe_among_files_is_refused(tmp_path: Path, name: str) -> None:
    for label in "ab":
        (tmp_path / "data" / label).mkdir(parents=True)
        os.mkfifo(tmp_path / "data" / label / name)
    status, output = penex_command("compare", tmp_path / "data")
    assert status == 2
    assert "is a pipe, socket or device" in output


def test_a_pipe_among_new_rows_is_refused(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    os.mkfifo(path)
    status, output = penex_command("predict", bundle, path)
    assert status == 2
    assert "is a pipe, socket or device" in output


def header(shape: tuple[int, ...]) -> bytes:
    """The start of an array of that shape, without its values."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": "<f8", "fortran_order": False, "shape": shape}
    )
    return stream.getvalue()


@pytest.mark.parametrize("shape", [(10**6, 10**6), (10**30,), (2**62, 4)])
@pytest.mark.parametrize("name", ["x.npz", "x.npy"])
def test_an_array_that_declares_more_than_it_has(
    bundle: Path, tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    path = tmp_path / name
    if name == "x.npz":
        with zipfile.ZipFile(path, "w") as archive:
            for array in ("X", "y"):
                archive.writestr(f"{array}.npy", header(shape))
        status, output = penex_command("compare", path)
        assert (status, "cannot read" in output) == (2, True)
    else:
        path.write_bytes(header(shape))
    status, output = penex_command("predict", bundle, path)
    assert (status, "cannot read" in output) == (2, True)


def test_an_archive_that_decompresses_to_more_than_is_read(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.open_arrays.__wrapped__, "__defaults__", (2**20,))
    path = tmp_path / "x.npz"
    np.savez_compressed(path, X=np.zeros((2**15, 8)), y=np.zeros(2**15))
    for words in (["compare", path], ["predict", bundle, path]):
        status, output = penex_command(*words)
        assert (status, "decompresses to more than" in output) == (2, True)
