"""Every script of examples/integrations runs and finds what it asserts."""

import logging
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[1] / "examples" / "integrations").glob("*.py"))
NEEDS_MORE = ("timm_model",)
"""Those that may end at once, saying what is not installed."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    # torchvision, of a build for another torch, on its way to fail.
    pytest.mark.filterwarnings("ignore:Failed to load image Python extension"),
]


@pytest.fixture(autouse=True)
def _own_folder_and_loggers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def test_there_are_scripts() -> None:
    assert {"plain_loop", "onnx_export"} <= {script.stem for script in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_script(script: Path, tmp_path: Path) -> None:
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        if script.stem not in NEEDS_MORE:
            raise
        pytest.skip(str(end))
    assert not list(tmp_path.iterdir())  # nothing is left lying about
