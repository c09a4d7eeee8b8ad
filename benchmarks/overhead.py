"""Times an epoch of a run of the comparison against the same epoch in a bare PyTorch loop.

Both train and then take the NLL of the validation rows; the run also writes its curve, keeps the
best weights, and takes the norm of the gradient now and then. Sizes are such that an epoch takes
about a second on one core. The smaller the network, the more of the time is Python's.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from benchmarks import harness
from benchmarks.harness import Results, Strict, Timing
from penex.compare.config import Config, Execution, Task
from penex.compare.data.dataset import Dataset
from penex.compare.data.split import Part, split
from penex.compare.models.choose import resolve
from penex.compare.training import run as train
from penex.compare.training.determinism import deterministic

BATCH = 64
SIZES = {"mlp": ((30,), 1500 * BATCH), "convnet": ((3, 32, 32), 40 * BATCH)}
"""By network: the shape of a row, and training rows."""


class OverheadRow(Strict):
    model: str
    rows: int
    bare: Timing
    run: Timing
    ratio: float
    """Of medians; 1 means none."""


def made(shape: tuple[int, ...], rows: int) -> Dataset:
    """Noise of ten classes, of which `rows` are for training and a quarter more for validation."""
    rng = np.random.default_rng(0)
    total = rows * 2
    features = rng.normal(size=(total, *shape)).astype(np.float32)
    target = rng.integers(10, size=total)
    return Dataset("noise", features, target, tuple("0123456789"), "noise")


def bare(model: nn.Module, config: Config, part: Part, held: Part) -> Callable[[], object]:
    """An epoch as one would write it."""
    rows, validation = (TensorDataset(*map(torch.from_numpy, p)) for p in (part, held))
    batches, held_batches = (
        DataLoader(data, sampler=BatchSampler(order, size, False), batch_size=None)
        for data, order, size in (
            (rows, RandomSampler(rows), BATCH),
            (validation, range(len(validation)), 4096 if part[0].ndim == 2 else 256),
        )
    )
    optimizer = torch.optim.Adam(model.parameters(), config.lr)
    criterion = nn.CrossEntropyLoss()

    def epoch() -> float:
        torch.use_deterministic_algorithms(False)
        model.train()
        for features, target in batches:
            optimizer.zero_grad()
            criterion(model(features), target).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            nll = [F.cross_entropy(model(x), y, reduction="sum").item() for x, y in held_batches]
        return sum(nll)

    return epoch


def run(config: Config, dataset: Dataset, folder: Path) -> Callable[[], object]:
    """An epoch of the comparison, between its start and its end."""
    task = Task(folder, "cross-entropy", 0, config.lr, float("nan"))
    ready = train._set_up(task, config, dataset, Execution())
    progress = train._Progress(folder)
    progress.resume(ready.learner)

    def epoch() -> None:
        torch.use_deterministic_algorithms(True)
        training = ready.learner.fit(ready.training, 0).means()
        validation = ready.learner.scores(ready.validation, ready.parts.validation[1])
        progress.add(ready.learner, training, validation, 1.0)

    return epoch


def main() -> None:
    parser = harness.parser(__doc__)
    parser.set_defaults(threads=1)
    options = parser.parse_args()
    machine = harness.start(options)
    found = []
    for name, (shape, rows) in SIZES.items():
        rows //= 20 if options.quick else 1
        # So slow that the network stays what it is, however long this goes on.
        config = Config(model=name, train_size=rows, batch_size=BATCH, lr=1e-7)
        dataset = made(shape, rows)
        parts = split(dataset, seed=0, config=config)
        model, _ = resolve(name, dataset).build(parts.train[0], 10)
        with tempfile.TemporaryDirectory() as folder, deterministic():
            times = harness.compare(
                {
                    "bare": bare(model, config, parts.train, parts.validation),
                    "run": run(config, dataset, Path(folder)),
                },
                options.device,
                seconds=1.0 if options.quick else 60.0,
                calls=1,
            )
        ratio = times["run"].median / times["bare"].median
        found.append(OverheadRow(model=name, rows=rows, ratio=ratio, **times))
        print(f"{name}: {times['bare'].median:.3f} s bare, {times['run'].median:.3f} s in a run")
    Results[OverheadRow](name="overhead", machine=machine, quick=options.quick, rows=found).save(
        options.out
    )


if __name__ == "__main__":
    main()
