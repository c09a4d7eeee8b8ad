"""Waiting for what happens, however busy the machine is."""

import subprocess
import time
from collections.abc import Callable

GUARD = 600.0
"""Seconds after which what has not happened never will. No test passes or fails by this number
unless something hangs."""


def wait_until(
    happened: Callable[[], object], process: "subprocess.Popen[str] | None" = None
) -> None:
    """Return as soon as `happened()` is true; fail if `process`, which is to do it, ends before."""
    end = time.monotonic() + GUARD
    while not happened():
        if process is not None and process.poll() is not None:
            raise AssertionError(f"it ended before: {process.communicate()}")
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.01)
