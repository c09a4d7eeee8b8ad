"""The forecast of a comparison's duration."""

import io
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from waiting import GUARD

from penex.compare.config import Config, Execution
from penex.compare.display import Display
from penex.compare.files import read_json, write_json
from penex.compare.runner import compare
from penex.compare.training.duration import duration, forecast, recorded, seconds_per_epoch

Make = Callable[..., Path]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (31, "30 s"),
        (89, "90 s"),
        (121, "2 min"),
        (59 * 60, "59 min"),
        (3600 + 50, "1 h"),
        (2 * 3600 + 57 * 60, "3 h"),
        (3 * 3600 + 21 * 60, "3 h 20 min"),
        (23 * 3600, "23 h"),
        (49 * 3600, "2 d 1 h"),
    ],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_forecast_counts_whole_rounds_of_every_stage() -> None:
    assert forecast([(25, 2)], 200, 3.4) == (
        "about 2 h 30 min (25 runs × 200 epochs × 3.4 s, 2 at a time)"  # 13 rounds
    )
    # Fifty trials, five at a time, then three runs.
    assert forecast([(50, 5), (3, 3)], 10, 12.4) == (
        "about 23 min (53 runs × 10 epochs × 12 s, 5 at a time)"
    )
    assert forecast([(0, 1), (1, 1)], 1, 30) == "about 30 s (1 run × 1 epoch × 30 s, one at a time)"
    assert forecast([(0, 1), (1, 1)], 1, 29) is None
    assert forecast([(0, 1), (0, 1)], 100, 1000) is None


def test_validation_counts_a_third_of_training_row_by_row() -> None:
    assert seconds_per_epoch(9.0, [900, 300, 5000]) == pytest.approx(10.0)


def test_seconds_of_finished_runs(finished: Path) -> None:
    runs = sorted(path.parent for path in finished.glob("runs/*/*/run.json"))
    seconds = [read_json(run / "run.json")["seconds_per_epoch"] for run in runs]
    assert len(seconds) == 4
    assert recorded(runs) == pytest.approx(sum(seconds) / 4)
    assert recorded([]) is None


def test_a_resumed_comparison_uses_its_finished_runs(make: Make, tmp_path: Path) -> None:
    folder = make(tmp_path / "out")
    for path in folder.glob("runs/*/*/run.json"):
        write_json(path, read_json(path) | {"seconds_per_epoch": 1000.0})
    config = Config(data="iris", losses=("cross-entropy", "penex"), seeds=3, epochs=3)
    screen = io.StringIO()
    compare(config, folder, execution=Execution(), display=Display(Console(file=screen)))
    # 22 validation rows to 90 training rows.
    expected = "This will take about 1 h 50 min (2 runs × 3 epochs × 1081 s, one at a time)"
    assert screen.getvalue().splitlines()[0] == expected


@pytest.mark.parametrize("options", [[], ["--model=convnet", "--train-size=256"]])
def test_a_long_comparison_is_measured_before_it_starts(options: list[str], tmp_path: Path) -> None:
    program = "from penex.cli import main; main()"
    command = ["compare", "digits", *options, "--epochs=20000", "--jobs=1", f"--out={tmp_path}"]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *command], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    assert list(tmp_path.glob("runs/*/[!.]*")) == []
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=GUARD)
    assert lines[2] == "Training: 0 of 500000 epochs done\n"
    told = re.fullmatch(
        r"This will take about \d.* \(25 runs × 20000 epochs × (\S+) s, one at a time\)\n", lines[1]
    )
    assert told, lines
    assert float(told[1]) > 0.001
    # A signal in the middle of a line makes the console write that line again.
    assert rest.removeprefix(lines[2]).startswith("Stopped.")


def test_a_short_comparison_prints_no_forecast(finished: Path, tmp_path: Path) -> None:
    screen = io.StringIO()
    config = Config(data="iris", losses=("penex",), seeds=1, epochs=2)
    compare(config, tmp_path, execution=Execution(), display=Display(Console(file=screen)))
    assert screen.getvalue().splitlines()[0] == "Training: 0 of 2 epochs done"
