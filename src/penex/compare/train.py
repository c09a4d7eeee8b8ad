"""One run: a model trained with one loss at one seed, its logits and checkpoints written down.

The trainer does not know which loss it has: it gets a criterion, and the factor that makes trained
logits those of the loss's probabilities.
"""

import logging
import platform
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from penex.compare.config import Config, Task
from penex.compare.data import Dataset
from penex.compare.model import mlp
from penex.compare.registry import contender
from penex.compare.splits import Part, split
from penex.compare.store import new_run, write_json


def run(task: Task, config: Config, dataset: Dataset) -> None:
    """Train, and leave a finished run in `task.folder`.

    At one seed every loss gets the same split, initial weights, order of batches and dropout, so
    that runs of different losses are paired. One thread per run: the sums, and so the numbers, do
    not depend on how many runs share the machine.
    """
    torch.set_num_threads(1)
    _quiet()
    parts = split(
        dataset,
        seed=task.seed,
        train_size=config.train_size,
        validation_size=config.validation_size,
        test_size=config.test_size,
        label_noise=config.label_noise,
    )
    loss = contender(task.spec).loss
    torch.manual_seed(task.seed)
    model = mlp(parts.train[0].shape[1:], config.hidden, len(dataset.classes))
    classifier = _Classifier(model, loss.build(task.knob), loss.scale(task.knob), task.lr)
    order = torch.Generator().manual_seed(task.seed)
    with new_run(task.folder) as folder:
        curve = _Curve(folder / "curve.csv")
        best = ModelCheckpoint(
            folder, filename="best", monitor="validation_nll", save_weights_only=True
        )
        trainer = L.Trainer(
            max_epochs=config.epochs,
            accelerator="auto",
            devices=1,
            callbacks=[curve, best],
            logger=False,
            deterministic=True,
            enable_model_summary=False,
            enable_progress_bar=False,
            num_sanity_val_steps=0,
            default_root_dir=folder,
        )
        train = _loader(parts.train, config.batch_size, order)
        try:
            trainer.fit(classifier, train, _loader(parts.validation, 4096))
        except SystemExit:  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from None
        trainer.save_checkpoint(folder / "last.ckpt", weights_only=True)
        logits = _logits(classifier, parts.validation, parts.test, "last")
        weights = torch.load(folder / "best.ckpt", weights_only=True)["state_dict"]
        classifier.load_state_dict(weights)
        logits |= _logits(classifier, parts.validation, parts.test, "best")
        np.savez(
            folder / "logits.npz",
            allow_pickle=False,
            validation_target=parts.validation[1],
            test_target=parts.test[1],
            **logits,
        )
        write_json(
            folder / "run.json",
            {
                "loss": task.spec,
                "seed": task.seed,
                "lr": task.lr,
                "knob": task.knob if loss.knob else None,
                "scale": loss.scale(task.knob),
                "rows": {
                    name: len(part[1])
                    for name, part in (
                        ("train", parts.train),
                        ("validation", parts.validation),
                        ("test", parts.test),
                    )
                },
                "parameters": sum(p.numel() for p in model.parameters()),
                "best_epoch": curve.best_epoch,
                "validation_nll": curve.best_nll,
                "seconds_per_epoch": median(curve.seconds),
                "versions": _versions(),
            },
        )


class _Classifier(L.LightningModule):
    def __init__(self, model: nn.Module, criterion: nn.Module, scale: float, lr: float) -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion
        self.scale = scale
        self.lr = lr

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.model(features)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        features, target = batch
        logits = self(features)
        loss: Tensor = self.criterion(logits, target)
        self._log("train", logits.detach(), target)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        features, target = batch
        self._log("validation", self(features), target)

    def _log(self, part: str, logits: Tensor, target: Tensor) -> None:
        """NLL and accuracy of the loss's own probabilities, averaged over the epoch's rows."""
        values = {
            f"{part}_nll": F.cross_entropy(self.scale * logits, target),
            f"{part}_accuracy": (logits.argmax(1) == target).float().mean(),
        }
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=len(target))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return torch.optim.Adam(self.model.parameters(), lr=self.lr)


class _Curve(Callback):
    """Writes a line per epoch, and times the training part of it."""

    columns = ("train_nll", "train_accuracy", "validation_nll", "validation_accuracy")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: list[float] = []
        self.best_epoch: int | None = None
        self.best_nll: float | None = None
        path.write_text(f"epoch,{','.join(self.columns)},seconds\n", encoding="utf-8")

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        self.end = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        values = {name: float(trainer.callback_metrics[name]) for name in self.columns}
        self.seconds.append(self.end - self.start)
        nll = values["validation_nll"]
        if np.isfinite(nll) and (self.best_nll is None or nll < self.best_nll):
            self.best_epoch, self.best_nll = trainer.current_epoch + 1, nll
        line = ",".join(f"{value:.6g}" for value in (*values.values(), self.seconds[-1]))
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(f"{trainer.current_epoch + 1},{line}\n")


def _loader(
    part: Part, batch_size: int, order: torch.Generator | None = None
) -> DataLoader[tuple[Tensor, ...]]:
    """Batches of `part`, shuffled by `order` if given, sliced from memory whole."""
    rows = TensorDataset(*map(torch.from_numpy, part))
    sampler = RandomSampler(rows, generator=order) if order is not None else range(len(rows))
    return DataLoader(rows, sampler=BatchSampler(sampler, batch_size, False), batch_size=None)


@torch.no_grad()
def _logits(
    classifier: _Classifier, validation: Part, test: Part, epoch: str
) -> dict[str, NDArray[np.float32]]:
    classifier.eval()
    result = {}
    for name, part in (("validation", validation), ("test", test)):
        batches = [classifier(x.to(classifier.device)).cpu() for x, _ in _loader(part, 4096)]
        result[f"{name}_{epoch}"] = torch.cat(batches).numpy()
    return result


def _versions() -> dict[str, str]:
    packages = ("penex", "torch", "lightning", "numpy", "pandas", "scikit-learn", "skrub")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        **{package: version(package) for package in packages},
    }


def _quiet() -> None:
    """Keep Lightning's hints, on loaders with worker processes, out of the one display."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
