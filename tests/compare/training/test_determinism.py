"""A run is reproducible and restores the settings of its process."""

import logging
import math
import os
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_worker import numbers

from penex.compare.config import Config, Execution, Task
from penex.compare.training.determinism import deterministic
from penex.compare.training.run import measure, run

CONFIG = Config(data="made", train_size=50, epochs=1)


def process() -> dict[str, Any]:
    """Every setting of this process that a run might change."""
    return {
        "threads": torch.get_num_threads(),
        "mode": torch.get_deterministic_debug_mode(),
        "environment": dict(os.environ),
        "level": logging.getLogger("lightning.fabric").level,
        "warnings": list(warnings.filters),
        "torch": torch.get_rng_state().tolist(),
        "numpy": [str(part) for part in np.random.get_state()],  # noqa: NPY002
        "python": random.getstate(),
    }


@deterministic()
def stopped() -> None:
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    raise KeyboardInterrupt


@pytest.mark.parametrize("workspace", [None, ":16:8"])
@pytest.mark.parametrize("work", ["run", "measure", "error"])
def test_the_settings_of_the_process_are_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str, workspace: str | None
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if workspace is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", workspace)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        torch.set_deterministic_debug_mode("warn")
        before = process()
        if work == "run":
            task = Task(tmp_path / "run", "cross-entropy", 0, CONFIG.lr, float("nan"))
            run(task, CONFIG, numbers(), Execution())
        elif work == "measure":
            assert measure("cross-entropy", math.nan, CONFIG, numbers(), Execution()) > 0
        else:
            with pytest.raises(KeyboardInterrupt):
                stopped()
        assert process() == before
    finally:
        torch.set_num_threads(threads)
        torch.set_deterministic_debug_mode("default")


def test_one_thread_and_deterministic_algorithms_inside() -> None:
    with deterministic():
        assert torch.get_num_threads() == 1
        assert torch.get_deterministic_debug_mode() == 2
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")
