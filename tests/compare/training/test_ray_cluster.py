"""Comparisons on a Ray cluster: equal to local ones, also after the loss of a worker."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from waiting import GUARD, wait_until

pytest.importorskip("ray", reason="needs the extra ray")

from penex.compare.files import read_json
from penex.compare.finished_runs import read_logits

PROGRAM = "from penex.cli import main; main()"
COMMAND = ("compare", "iris", "--losses=cross-entropy,penex", "--seeds=2", "--hidden=32")
Make = Callable[..., Path]


def processes(tree: int) -> dict[int, str]:
    """Command lines of the living processes below `tree`, and of those in its session (Linux)."""
    parents, commands, session = {}, {}, set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent, _, own_session = (
                (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            )
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if state != "Z":
            number = int(folder.name)
            parents[number], commands[number] = int(parent), command
            if int(own_session) == tree:
                session.add(number)

    def below(number: int) -> bool:
        return number == tree or (number in parents and below(parents[number]))

    return {n: c for n, c in commands.items() if below(n) or n in session}


class OnRay:
    """The command on a Ray cluster of two workers that it starts for itself."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        arguments = [*COMMAND, *options, "--backend=ray", "--jobs=2", f"--out={folder}"]
        self.popen = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def until_mid_run(self) -> None:
        """Wait until a run has some of its epochs behind it."""

        def training() -> bool:
            with contextlib.suppress(FileNotFoundError):
                curves = self.folder.glob("runs/*/.partial-*/curve.csv")
                return any(len(curve.read_bytes().splitlines()) > 5 for curve in curves)
            return False

        wait_until(training, self.popen)

    def workers(self) -> list[int]:
        """Processes in which Ray trains just now."""
        return [n for n, c in processes(self.popen.pid).items() if c.startswith("ray::_here")]


@pytest.fixture
def on_ray() -> Iterator[Callable[..., OnRay]]:
    started: list[OnRay] = []

    def begin(folder: Path, *options: str) -> OnRay:
        started.append(OnRay(folder, *options))
        return started[-1]

    yield begin
    for run in started:  # only if a test failed half-way
        if run.popen.poll() is None:
            os.killpg(run.popen.pid, signal.SIGKILL)
            run.popen.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_killed_worker_is_replaced_and_results_equal_a_local_run(
    on_ray: Callable[..., OnRay], make: Make, tmp_path: Path
) -> None:
    run = on_ray(tmp_path / "ray", "--epochs=100")
    run.until_mid_run()
    victims = run.workers()
    assert len(victims) == 2
    os.kill(victims[0], signal.SIGKILL)
    out, err = run.popen.communicate(timeout=GUARD)
    assert run.popen.returncode == 0, err
    assert err == ""
    lines = out.splitlines()
    assert lines[1] == "Training: 0 of 400 epochs done"
    # Nothing of Ray's own between our lines, nor about the lost worker.
    expected = [f"{name}, seed {seed}" for seed in (0, 1) for name in ("Cross-entropy", "PENEX")]
    assert sorted(line.partition(":")[0] for line in lines[2:6]) == sorted(expected)
    assert lines[6].startswith("No recommendation yet: ")
    assert list((tmp_path / "ray").rglob(".shared-*")) == []
    assert list((tmp_path / "ray").rglob(".partial-*")) == []
    make(tmp_path / "local", epochs=100, hidden=(32,))
    for loss in ("cross-entropy", "penex"):
        for seed in (0, 1):
            a, b = (
                read_logits(tmp_path / f / "runs" / loss / f"seed-{seed}") for f in ("ray", "local")
            )
            assert a.keys() == b.keys()
            assert all((a[name] == b[name]).all() for name in a), (loss, seed)
    assert processes(run.popen.pid) == {}


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("how", ["Ctrl-C", "kill"])
def test_stopping_leaves_no_process(on_ray: Callable[..., OnRay], how: str, tmp_path: Path) -> None:
    run = on_ray(tmp_path / "out", "--epochs=10000")
    run.until_mid_run()
    before = processes(run.popen.pid)
    assert len(before) > 4
    if how == "Ctrl-C":
        os.killpg(run.popen.pid, signal.SIGINT)
        out, err = run.popen.communicate(timeout=GUARD)
        assert run.popen.returncode == 130
        assert out.splitlines()[-1].startswith("Stopped.")
        assert err == ""
    else:
        run.popen.kill()
        run.popen.communicate(timeout=GUARD)
        # Two idle ones of Ray's look a minute or so for the head they have lost, then end.
        before = {n: c for n, c in before.items() if not re.match(r"ray::\w+Agent", c)}
        assert any(command.startswith("ray::_here") for command in before.values())
    wait_until(lambda: not any(Path(f"/proc/{number}/exe").exists() for number in before))


def test_errors_are_those_of_local_processes(tmp_path: Path) -> None:
    """Of a worker (a precision that this machine does not have), and of a missing cluster."""

    def refused(*options: str) -> str:
        out = f"--out={tmp_path / str(len(options[0]))}"
        own = ("--epochs=2", "--jobs=1", "--backend=ray", out)
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM, *COMMAND, *own, *options],
            capture_output=True,
            text=True,
            timeout=GUARD,
        )
        assert result.returncode == 2, result
        assert result.stderr.count("\n") == 1, result.stderr
        return result.stderr

    import torch

    if not torch.cuda.is_available():
        assert "precision: 16-mixed needs a CUDA device" in refused("--precision=16-mixed")
    for address in ("127.0.0.1:9", "ray://127.0.0.1:9"):
        assert f"address: nothing answers at {address}" in refused(f"--address={address}")


def test_a_host_without_the_folder_is_refused(tmp_path: Path) -> None:
    """What a worker says that does not see the driver's probe file."""
    from penex.compare.errors import CompareError
    from penex.compare.training.ray_cluster import _here

    with pytest.raises(CompareError, match="does not see .*; choose a folder .* share"):
        _here(tmp_path / "absent" / ".shared-0", [], read_json, None)
