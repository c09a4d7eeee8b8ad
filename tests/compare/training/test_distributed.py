"""The command on two processes that share every run, of which only one prints."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from waiting import GUARD, wait_until

from penex.compare.files import read_json
from penex.compare.finished_runs import read_logits
from penex.compare.output_folder import run_folder, trial_folder

PROGRAM = "from penex.cli import main; main()"
COMMAND = ("compare", "iris", "--losses=cross-entropy,penex", "--devices=2", "--strategy=ddp")
Make = Callable[..., Path]

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or sys.platform != "linux",
    reason="two processes on one CPU, as Linux starts them",
)


def start(*options: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *COMMAND, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_results_equal_those_of_one_device(make: Make, tmp_path: Path) -> None:
    options = ("--seeds=1", "--epochs=3", "--tune=2", f"--out={tmp_path / 'two'}")
    process = start(*options)
    out, err = process.communicate(timeout=GUARD)
    assert process.returncode == 0, err
    lines = out.splitlines()
    assert lines[1] == "Tuning: 0 of 12 epochs done"
    assert [line.split(" ")[0] for line in lines[2:4]] == ["Cross-entropy:", "PENEX:"]
    assert lines[4] == "Training: 0 of 6 epochs done"
    assert len([line for line in lines if line.startswith("Report: ")]) == 1
    make(tmp_path / "one", seeds=1, tune=2)
    for loss in ("cross-entropy", "penex"):
        folders = [
            trial_folder(tmp_path / name, loss, n) for n in (0, 1) for name in ("two", "one")
        ]
        folders += [run_folder(tmp_path / name, loss, 0) for name in ("two", "one")]
        for two, one in zip(folders[::2], folders[1::2], strict=True):
            a, b = (read_json(folder / "run.json") for folder in (two, one))
            assert [a[name] for name in ("lr", "knob", "seed")] == [
                b[name] for name in ("lr", "knob", "seed")
            ]
            a, b = (read_logits(folder) for folder in (two, one))
            for name in a:
                np.testing.assert_allclose(a[name], b[name], atol=1e-5, err_msg=name)
    # A refusal that one process alone has met ends both, and is told once.
    process = start("--seeds=1", "--epochs=4", "--tune=2", f"--out={tmp_path / 'two'}")
    _, err = process.communicate(timeout=GUARD)
    assert process.returncode == 2
    assert err.startswith("penex: out: ")
    assert "belongs to another configuration (epochs was 3, is 4)" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_stopping_leaves_no_process(how: signal.Signals, tmp_path: Path) -> None:
    process = start("--epochs=20000", f"--out={tmp_path}")
    curves = functools.partial(tmp_path.glob, "runs/*/.*/curve.csv")
    wait_until(lambda: any(curve.read_bytes().count(b"\n") > 5 for curve in curves()), process)
    os.kill(process.pid, how)
    out, err = process.communicate(timeout=GUARD)
    if how != signal.SIGKILL:
        assert process.returncode == 130
        assert out.splitlines()[-1].startswith("Stopped.")
        assert err == ""
    wait_until(lambda: not alive(process.pid))


def alive(session: int) -> list[int]:
    """Processes of a session that run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, own = stat.read_text().rpartition(")")[2].split()[:4]
            if int(own) == session and state != "Z":
                found.append(int(stat.parent.name))
    return found


def test_several_machines_need_a_manual_start(tmp_path: Path) -> None:
    process = start("--nodes=2", f"--out={tmp_path}")
    _, err = process.communicate(timeout=GUARD)
    assert process.returncode == 2
    assert err.startswith("penex: nodes: to share runs between 2 machines, start on each of them: ")
    assert "torchrun --nnodes 2 --nproc-per-node 2 " in err
