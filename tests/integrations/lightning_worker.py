"""A script that trains under Lightning's DDP: lightning_worker.py FOLDER.

FOLDER has the parameters and the data, and receives what each rank ended with.
"""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import penex
from penex.integrations.lightning import PENEXMonitor


class Module(L.LightningModule):
    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__()
        classes, features = case["net"]["weight"].shape
        self.net = nn.Linear(features, classes).double()
        self.net.load_state_dict(case["net"])
        self.rows, self.batch_size = TensorDataset(case["x"], case["target"]), case["rows"]
        self.criterion = penex.PENEX(process_group="world")  # before there is any
        self.alone = penex.PENEX()

    def train_dataloader(self) -> DataLoader[Any]:
        in_turn = DistributedSampler(self.rows, shuffle=False)  # Lightning's own would shuffle
        return DataLoader(self.rows, batch_size=self.batch_size, sampler=in_turn)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        x, target = batch
        logits = self.net(x)
        self.alone(logits.detach().requires_grad_(), target)
        return self.criterion(logits, target)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=2.0)


def main(folder: Path) -> None:
    case = torch.load(folder / "case", weights_only=True)
    module = Module(case)
    trainer = L.Trainer(
        strategy="ddp",
        devices=2,
        accelerator="cpu",
        max_epochs=case["epochs"],
        callbacks=[PENEXMonitor(module.criterion)],
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    result = {
        "net": module.net.state_dict(),
        "penalty": module.criterion.penalty,
        "alone": module.alone.penalty,
        "logged": trainer.callback_metrics["penex/penalty"],
    }
    torch.save(result, folder / f"result{trainer.global_rank}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
