"""What tests share: a seed, a Hypothesis profile, the `gpu` marker and a small comparison."""

import io
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

# A shell's background jobs ignore Ctrl-C, and so would the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("penex", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("penex")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def compared(folder: Path, execution: Any = None, **options: Any) -> Path:
    """`folder`, with a comparison of two losses in it: two seeds of three epochs on iris."""
    # Not at the top: the tests of the core run without what the comparison needs.
    from rich.console import Console

    from penex.compare.config import Execution, configure
    from penex.compare.display import Display
    from penex.compare.runner import compare

    small = {"data": "iris", "losses": ("cross-entropy", "penex"), "seeds": 2, "epochs": 3}
    display = Display(Console(file=io.StringIO()))
    execution = Execution() if execution is None else execution
    compare(configure(**(small | options)), folder, execution=execution, display=display)
    return folder


@pytest.fixture(scope="session")
def make() -> Callable[..., Path]:
    """The function above, for comparisons of other settings."""
    return compared


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison without its report. For reading: copy it before changing it."""
    return compared(tmp_path_factory.mktemp("finished") / "out")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
