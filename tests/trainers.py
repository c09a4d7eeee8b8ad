"""What the tests of PENEXTrainer have in common."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import oracles
import torch
from ranks import run_ranks
from torch import Tensor, nn
from transformers import TrainingArguments


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
    """The script as two ranks of torchrun."""

    def environment(rank: int) -> dict[str, str]:
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        return own | {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}

    with run_ranks(script, 2, folder, environment):
        yield


Pairs = Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Of a model, inputs and labels: logits (M, K) and what they should predict (M)."""


def by_hand(
    model: Any,
    data: Any,
    pairs: Pairs,
    batch: int,
    penalty: float,
    ema: float,
    epochs: int = 2,
    **options: Any,
) -> tuple[Tensor, float]:
    """Training on whole batches, each with the penalty of those before: parameters, penalty."""
    optimiser = torch.optim.SGD(model.parameters(), lr=PLAIN["learning_rate"])
    for _ in range(epochs):
        for x, y in zip(data.inputs.split(batch), data.labels.split(batch), strict=True):
            optimiser.zero_grad()
            logits, target = pairs(model, x, y)
            result = oracles.penex(logits, target, penalty=penalty, **options)
            logits.backward(result.gradient.to(logits.dtype))
            optimiser.step()
            estimate = oracles.estimate_penalty(logits, target, **options)
            penalty += ema * (float(estimate) - penalty)
    return parameters(model), penalty
