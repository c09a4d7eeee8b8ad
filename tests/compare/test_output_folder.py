"""The output folder is never left half-written, whatever happens while it is written."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from penex.compare import output_folder as store
from penex.compare.config import Config
from penex.compare.data.load import load
from penex.compare.errors import CompareError

IRIS = load(Config(data="iris"))
CONFIG = Config(data="iris")


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_run_appears_only_when_complete(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "penex" / "seed-1"
    with store.new_run(folder) as partial:
        (partial / "run.json").write_text("{}")
        (partial / "curve.csv").write_text("epoch\n1\n")
        assert not folder.exists()
    assert names(folder) == {"run.json", "curve.csv"}
    assert names(tmp_path) == {f"runs/penex/seed-1/{name}" for name in names(folder)}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_run_that_fails_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with store.new_run(tmp_path / "runs" / "seed-0") as partial:
            (partial / "run.json").write_text("{}")
            raise error

    with pytest.raises(error):
        fail()
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_run_finished_meanwhile_by_another_process_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "seed-0"
    with store.new_run(folder) as ours:
        (ours / "run.json").write_text("ours")
        with store.new_run(folder) as theirs:
            (theirs / "run.json").write_text("theirs")
    assert (folder / "run.json").read_text() == "theirs"
    assert names(tmp_path) == {"seed-0/run.json"}


def test_a_run_that_cannot_be_moved_into_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "seed-0").write_text("a file is in the way")
    with pytest.raises(NotADirectoryError), store.new_run(tmp_path / "seed-0") as partial:
        (partial / "run.json").write_text("{}")
    assert names(tmp_path) == {"seed-0"}


def unfinished(folder: Path, started: object, *, checkpoint: bool = True) -> Path:
    """What a process that was stopped has left of a run."""

    def stop() -> None:
        with store.new_run(folder, started) as partial:
            left.append(partial)
            (partial / "curve.csv").write_text("epoch\n1\n")
            if checkpoint:
                (partial / store.CHECKPOINT).write_bytes(b"everything")
            raise KeyboardInterrupt

    left: list[Path] = []
    with pytest.raises(KeyboardInterrupt):
        stop()
    return left[0]


def test_a_run_with_a_checkpoint_is_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "seed-1"
    left = unfinished(folder, {"lr": 0.1, "hidden": (3, 4)})
    assert not folder.exists()
    # Nor is it taken for rubbish, or by a run of a similar name.
    store.clear_partial(tmp_path)
    with store.new_run(tmp_path / "runs" / "seed-11", {"lr": 0.1, "hidden": (3, 4)}) as other:
        assert names(other) == {"started.json"}
    with store.new_run(folder, {"lr": 0.1, "hidden": (3, 4)}) as partial:
        assert partial == left
        assert (partial / store.CHECKPOINT).read_bytes() == b"everything"
        assert store.epochs_done([folder], 7) == 1
    assert names(tmp_path) == {"runs/seed-1/curve.csv"}


def test_a_run_without_checkpoint_restarts(tmp_path: Path) -> None:
    left = unfinished(tmp_path / "seed-1", None, checkpoint=False)
    assert not left.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [None, "", "{", "[1]"])
def test_a_checkpoint_of_something_else_is_removed(tmp_path: Path, damage: str | None) -> None:
    left = unfinished(tmp_path / "seed-1", {"lr": 0.1})
    if damage is not None:
        (left / "started.json").write_text(damage)
    started = {"lr": 0.2 if damage is None else 0.1}
    with store.new_run(tmp_path / "seed-1", started) as partial:
        assert names(partial) == {"started.json"}
        assert not left.exists()
    assert list(tmp_path.iterdir()) == [tmp_path / "seed-1"]


HOLDER = """
import sys, time
from pathlib import Path
from penex.compare import output_folder as store
with store.new_run(Path(sys.argv[1]), 1) as partial:
    (partial / store.CHECKPOINT).write_bytes(b"everything")
    print(partial.name, flush=True)
    time.sleep(60)
"""


def test_two_processes_never_share_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "seed-1"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    theirs = tmp_path / holder.stdout.readline().strip()
    with store.new_run(folder, 1) as ours:
        assert ours != theirs
        store.clear_partial(tmp_path)
        assert theirs.exists()
        assert ours.exists()
        (ours / "run.json").write_text("{}")
    assert (theirs / store.CHECKPOINT).exists()
    holder.kill()
    holder.communicate()
    # The run is finished, so nobody goes on with theirs.
    store.clear_partial(tmp_path)
    assert list(tmp_path.iterdir()) == [folder]


def test_a_partial_run_of_a_killed_process_can_be_taken_over(tmp_path: Path) -> None:
    folder = tmp_path / "seed-1"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    theirs = tmp_path / holder.stdout.readline().strip()
    holder.kill()
    holder.communicate()
    store.clear_partial(tmp_path)
    with store.new_run(folder, 1) as ours:
        assert ours == theirs


def test_epochs_done(tmp_path: Path) -> None:
    folders = [store.run_folder(tmp_path, "penex", seed) for seed in (0, 1, 10)]
    assert store.epochs_done(folders, 7) == 0
    for folder in (folders[0], store.run_folder(tmp_path, "focal", 0)):
        folder.mkdir(parents=True)
    with store.new_run(folders[2]) as partial:
        assert store.epochs_done(folders, 7) == 7
        (partial / "curve.csv").write_text("epoch,loss\n1,0.5\n2,0.4\n")
        # Neither the finished run of another loss, nor seed 10's lines for seed 1.
        assert store.epochs_done(folders, 7) == 9
        assert store.epochs_done(folders[:2], 7) == 7


def test_one_process_at_a_time(tmp_path: Path) -> None:
    """Refused while another process holds the folder; free when that one is killed."""
    program = (
        "import sys, time; from pathlib import Path; from filelock import FileLock\n"
        "with FileLock(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / ".lock")], stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(CompareError, match="^out: another comparison is running in "):
        store.lock(tmp_path).__enter__()
    holder.kill()
    holder.communicate()
    with store.lock(tmp_path):
        pass


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_in_place_of_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CompareError, match="^out: expected a folder, .* is a file$"),
        store.lock(tmp_path / name),
    ):
        pass


def test_a_folder_the_system_refuses(tmp_path: Path) -> None:
    with (
        pytest.raises(CompareError, match="^out: cannot work in .*: File name too long$"),
        store.lock(tmp_path / ("x" * 300)),
    ):
        pass


def test_a_folder_is_created_with_its_parents(tmp_path: Path) -> None:
    with store.lock(tmp_path / "a" / "b"):
        store.start_or_resume(tmp_path / "a" / "b", CONFIG, IRIS)
    config, data = store.read_comparison(tmp_path / "a" / "b")
    assert config == CONFIG
    assert data == {
        "name": "iris",
        "fingerprint": IRIS.fingerprint,
        "rows": 150,
        "classes": ["setosa", "versicolor", "virginica"],
        "parts": [],
    }


def test_a_folder_with_something_else_in_it(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CompareError, match=r"is not empty and holds no comparison; .* --out$"):
        store.start_or_resume(tmp_path, CONFIG, IRIS)
    assert names(tmp_path) == {"thesis.tex"}


def test_starting_removes_unfinished_files(tmp_path: Path) -> None:
    store.start_or_resume(tmp_path, CONFIG, IRIS)
    kept = store.run_folder(tmp_path, "penex", 0)
    kept.mkdir(parents=True)
    (kept / "run.json").write_text("{}")
    dead = kept.parent / ".partial-seed-1-0123abcd"
    dead.mkdir()
    (dead / "run.json").write_text("{")
    (tmp_path / ".partial-results.json").write_text("{")
    store.start_or_resume(tmp_path, CONFIG, IRIS)
    assert names(tmp_path) == {"comparison.json", "runs/penex/seed-0/run.json"}
    assert not dead.exists()


@pytest.mark.parametrize("work", [None, "run.json", store.CHECKPOINT])
def test_only_a_folder_without_runs_accepts_another_configuration(
    tmp_path: Path, work: str | None
) -> None:
    def start_or_resume(epochs: int) -> None:
        config = Config(data="iris", epochs=epochs)
        store.start_or_resume(tmp_path, config, load(config))

    start_or_resume(3)
    (tmp_path / "tuning").mkdir()
    (tmp_path / "tuning" / "study.journal").write_text("trials of three epochs")
    if work is not None:
        left = unfinished(tmp_path / "runs" / "penex" / "seed-0", {"epochs": 3})
        (left / store.CHECKPOINT).rename(left / work)
        with pytest.raises(CompareError, match=r"epochs was 3, is 4"):
            start_or_resume(4)
        assert (left / work).exists()
        start_or_resume(3)
    else:
        start_or_resume(4)
        assert not (tmp_path / "tuning").exists()
        assert store.read_comparison(tmp_path)[0].epochs == 4


def finish(folder: Path, *runs: tuple[str, int]) -> None:
    for spec, seed in runs:
        with store.new_run(store.run_folder(folder, spec, seed)) as partial:
            (partial / "run.json").write_text("{}")


def claimed(folder: Path, losses: tuple[str, ...], seeds: int, **options: Any) -> Config:
    config = Config(data="iris", losses=losses, seeds=seeds, **options)
    store.start_or_resume(folder, config, IRIS)
    return store.read_comparison(folder)[0]


def test_losses_and_seeds_with_finished_runs_stay(tmp_path: Path) -> None:
    claimed(tmp_path, ("penex", "focal", "cross-entropy"), 9)
    finish(tmp_path, ("penex", 0), ("cross-entropy", 0), ("penex", 4))
    # Neither focal nor seeds 5 to 8 ever finished: nobody waits for them.
    config = claimed(tmp_path, ("z-loss", "cross-entropy"), 2)
    assert (config.losses, config.seeds) == (("penex", "cross-entropy", "z-loss"), 5)
    config = claimed(tmp_path, ("focal", "penex"), 7)
    assert (config.losses, config.seeds) == (("penex", "cross-entropy", "focal"), 7)


def test_learning_rates_of_single_losses_join(tmp_path: Path) -> None:
    claimed(tmp_path, ("penex",), 1, lr_of={"penex": 0.1})
    finish(tmp_path, ("penex", 0))
    config = claimed(tmp_path, ("focal",), 1, lr_of={"focal": 0.2})
    assert config.lr_of == {"penex": 0.1, "focal": 0.2}
    with pytest.raises(CompareError, match=r"learning rate of penex was 0.1, is 0.001"):
        claimed(tmp_path, ("penex",), 1)


def test_a_loss_keeps_one_spelling(tmp_path: Path) -> None:
    claimed(tmp_path, ("penex=0.3",), 1)
    finish(tmp_path, ("penex=0.3", 0))
    with pytest.raises(
        CompareError, match=r"^losses: .* has this loss as penex=0.3; use that name for penex=0.30"
    ):
        claimed(tmp_path, ("penex=0.30",), 1)


def test_reading_a_folder_without_comparison(tmp_path: Path) -> None:
    with pytest.raises(CompareError, match="holds no comparison: expected .*comparison.json"):
        store.read_comparison(tmp_path)


@pytest.mark.parametrize("text", ["{}", "[]", '{"config": {"epochs": 0}, "data": {}}'])
def test_a_comparison_of_another_version(tmp_path: Path, text: str) -> None:
    (tmp_path / "comparison.json").write_text(text)
    with pytest.raises(CompareError, match="comparison.json was not written by this version"):
        store.read_comparison(tmp_path)
