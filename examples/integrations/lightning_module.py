"""
A Lightning module
==================

The criterion is a submodule. Lightning then moves it to the device, switches it to ``eval()`` for
validation, and saves its penalty in checkpoints. Under DDP ``process_group="world"`` makes all
ranks estimate one penalty from the joined batch; in a single process it has no effect.

:class:`penex.integrations.lightning.PENEXMonitor` logs the penalty, sample weights and margins.
"""

# %%
import logging
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import penex
from penex.integrations.lightning import PENEXMonitor

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*does not have many workers")
warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec")  # of torch, by Lightning


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        self.criterion = penex.PENEX(process_group="world")

    def forward(self, x: Tensor) -> Tensor:
        return self.criterion.predict_proba(self.model(x))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        x, target = batch
        return self.criterion(self.model(x), target)

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        x, target = batch
        logits = self.model(x)
        nll = nn.functional.nll_loss(self.criterion.predict_log_proba(logits), target)
        self.log("val_nll", nll)
        self.log("val_accuracy", (logits.argmax(1) == target).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


# %%
# Synthetic data: four classes, a tenth of the training labels wrong.
torch.manual_seed(0)
centres = 1.5 * torch.randn(4, 8)
target = torch.randint(4, (1200,))
x = centres[target] + torch.randn(1200, 8)
noisy = torch.where(torch.rand(1200) < 0.1, torch.randint(4, (1200,)), target)
training = DataLoader(TensorDataset(x[:800], noisy[:800]), batch_size=50, shuffle=True)
validation = DataLoader(TensorDataset(x[800:], target[800:]), batch_size=200)

# %%
# Training, with the monitor among the callbacks.
with TemporaryDirectory() as folder:
    checkpoint = ModelCheckpoint(monitor="val_nll")
    logger = CSVLogger(folder)
    trainer = L.Trainer(
        max_epochs=5,
        accelerator="cpu",
        callbacks=[PENEXMonitor(), checkpoint],
        logger=logger,
        log_every_n_steps=5,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Classifier()
    trainer.fit(module, training, validation)
    best = Classifier.load_from_checkpoint(checkpoint.best_model_path)
    content = torch.load(checkpoint.best_model_path, weights_only=True)
    log = (Path(logger.log_dir) / "metrics.csv").read_text()

accuracy = trainer.callback_metrics["val_accuracy"].item()
assert accuracy > 0.9

# %%
# The penalty is restored with the weights.
assert best.criterion.penalty == content["state_dict"]["criterion.penalty"]
assert torch.allclose(best.eval()(x).sum(1), torch.ones(len(x)))

# %%
# Values logged by the monitor for the last batch. Mislabelled samples have negative margins and the
# largest weights; an effective sample size near 1 means that they do not dominate.
assert "penex/weight_ess" in log
for name, value in sorted(trainer.callback_metrics.items()):
    if name.startswith("penex/"):
        print(f"{name:24} {value:.3f}")
