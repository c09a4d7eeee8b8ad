"""What the tests of PENEXTrainer have in common."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

import penex


def make_args(folder: Path, batch: int = 4, steps: int = 1, **options: Any) -> TrainingArguments:
    options = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "lr_scheduler_type": "constant",
        "num_train_epochs": 2,
        "train_sampling_strategy": "sequential",
    } | options
    return TrainingArguments(
        str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=steps,
        **options,
    )


PLAIN: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 0.0}
"""What a loop of three lines does too."""


def parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@contextmanager
def two_ranks(script: str, folder: Path) -> Iterator[None]:
    """Two processes that run `script` with `folder` and their rank, until they are done."""
    paths = [str(Path(penex.__file__).parents[1]), str(Path(__file__).parent)]
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(folder), str(rank)],
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
                "OMP_NUM_THREADS": "1",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": "0",
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        yield
        errors = [process.communicate(timeout=120)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(errors)
