"""Several processes that work together, for tests of process groups."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import penex


@contextmanager
def run_ranks(
    script: str | Path,
    size: int,
    folder: Path,
    environment: Callable[[int], dict[str, str]] = lambda rank: {},
) -> Iterator[list[str]]:
    """Runs ``script RANK SIZE FOLDER`` for each rank; at the end all have succeeded.

    What they wrote to the standard error is then in the list.
    """
    path = [str(Path(penex.__file__).parents[1]), str(Path(__file__).parent)]
    path.append(os.environ.get("PYTHONPATH", ""))
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(size), str(folder)],
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
            | environment(rank),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    errors: list[str] = []
    try:
        yield errors
        errors += [process.communicate(timeout=180)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * size, "\n".join(errors)
