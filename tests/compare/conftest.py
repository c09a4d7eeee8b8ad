"""One small comparison, made once."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from penex.compare.config import Execution, configure
from penex.compare.display import Display
from penex.compare.runner import compare


def made(folder: Path, execution: Execution = Execution(), **options: Any) -> Path:  # noqa: B008
    """`folder`, with a comparison of two losses in it: two seeds of three epochs on iris."""
    config = configure(
        **(
            {"data": "iris", "losses": ("cross-entropy", "penex"), "seeds": 2, "epochs": 3}
            | options
        )
    )
    display = Display(Console(file=io.StringIO()))
    compare(config, folder, execution=execution, display=display)
    return folder


@pytest.fixture(scope="session")
def make() -> Callable[..., Path]:
    """The function above, for comparisons of other settings."""
    return made


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison without its report. For reading: copy it before changing it."""
    return made(tmp_path_factory.mktemp("finished") / "out")
