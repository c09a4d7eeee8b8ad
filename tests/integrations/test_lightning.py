"""PENEX in Lightning: nothing is needed to train, one argument for DDP, and a callback to watch."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import oracles
import pandas as pd
import pytest
import torch
from cases import KINDS, OPTIONS, make_call
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import penex
from penex.integrations.lightning import PENEXMonitor, measured

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]

CLASSES, FEATURES = 3, 5


class Module(L.LightningModule):
    """Remembers what its criteria saw."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.net = nn.Linear(FEATURES, CLASSES)
        self.criterion = penex.PENEX(**options)
        self.batches: list[tuple[Tensor, Tensor, Tensor]] = []
        self.forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        return self.net(x)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        logits = self(batch[0])
        loss = self.criterion(target=batch[1], input=logits)
        self.batches.append((logits.detach(), batch[1], self.criterion.penalty.clone()))
        return loss

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.criterion(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.net.parameters(), lr=0.1)


def make_loader(rows: int = 28, batch_size: int = 4) -> DataLoader[Any]:
    target = torch.arange(rows) % CLASSES
    target[1::5] = -100
    return DataLoader(TensorDataset(torch.randn(rows, FEATURES), target), batch_size=batch_size)


def make_trainer(folder: Path, **options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": CSVLogger(folder),
        "log_every_n_steps": 3,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(**(defaults | options))


def logged(trainer: L.Trainer) -> pd.DataFrame:
    """What the logger wrote, by step."""
    assert isinstance(trainer.logger, CSVLogger)
    trainer.logger.save()
    return pd.read_csv(trainer.logger.experiment.metrics_file_path).set_index("step")


# 1. The numbers.


def definitions(logits: Tensor, target: Tensor, options: dict[str, Any]) -> dict[str, float]:
    """The table of the docstring, row by row; weights as the 1-norms of exact gradients."""
    alpha = options["sensitivity"]
    almost_none = 1e-60  # with this penalty the gradient is that of the exponential part
    gradient = oracles.penex(logits, target, penalty=almost_none, reduction="sum", **options)
    classes = logits.shape[min(1, logits.ndim - 1)]
    as_rows = [
        tensor.movedim(min(1, logits.ndim - 1), -1).reshape(-1, classes).numpy()
        for tensor in (logits, gradient.gradient)
    ]
    if target.shape == logits.shape:
        labels = target.movedim(min(1, logits.ndim - 1), -1).reshape(-1, classes).argmax(1).tolist()
    else:
        labels = target.reshape(-1).tolist()
    weights, margins = [], []
    for f, slope, y in zip(*as_rows, labels, strict=True):
        if abs(slope).sum() > 1e-40:
            weights.append(abs(slope).sum() / alpha)
            margins.append(f[y] - max(value for j, value in enumerate(f) if j != y))
    if not weights:
        return {}
    v, m, n = np.array(weights), np.sort(margins), len(weights)
    return {
        "weight_mean": v.mean(),
        "weight_max_share": v.max() / v.sum(),
        "weight_ess": v.sum() ** 2 / (n * (v**2).sum()),
        "margin_mean": m.mean(),
        "margin_median": m[(n + 1) // 2 - 1],
        "margin_q05": m[int(np.ceil(n / 20)) - 1],
        "margin_negative": np.mean(m < 0),
    }


@pytest.mark.parametrize("huberization", [None, 0.9])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5,), (7, 5), (45, 2), (2, 3, 5, 3)])
def test_numbers_are_their_definitions(
    shape: tuple[int, ...], kind: str, options: str, huberization: float | None
) -> None:
    logits, target, keywords = make_call(kind, shape, options)
    keywords |= {"sensitivity": 0.4, "huberization": huberization}
    criterion = penex.PENEX(**keywords)
    criterion(logits.clone().requires_grad_(), target)
    got = measured(criterion, logits, target)
    assert got.pop("penalty") == criterion.penalty
    variances = {got.pop(key, None) for key in ("label_variance", "partition_variance")}
    assert (variances == {None}) == (not got)
    assert {key: value.item() for key, value in got.items()} == pytest.approx(
        definitions(logits, target, keywords), rel=1e-6, abs=1e-12
    )


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_variances_are_the_second_order_of_the_log_domain(kind: str, options: str) -> None:
    logits, target, keywords = make_call(kind, (7, 5), options)
    logits = logits.double()
    if keywords.get("weight") is not None:
        keywords["weight"] = keywords["weight"].double()
    keywords["reduction"] = "sum"
    got = measured(penex.LogPENEX(**keywords), logits, target)
    assert "penalty" not in got
    zeros = penex.penex_loss(torch.zeros_like(logits), target, penalty=1.0, **keywords)
    total = zeros / (1 + logits.shape[1])  # the sum of all masses
    small = 1e-5
    for key, alpha, beta in (("label", small, 0.0), ("partition", 0.0, small)):
        loss, limit = (
            penex.functional.log_penex_loss(logits, target, sensitivity=a, power=b, **keywords)
            for a, b in ((alpha, beta), (0.0, 0.0))
        )
        expected = 2 * (loss - limit) / (small * total)
        torch.testing.assert_close(got[f"{key}_variance"], expected, rtol=1e-3, atol=1e-6)


def test_weights_that_overflow_have_shares_all_the_same() -> None:
    logits = torch.tensor([[-900.0, 0.0], [-900.0, 0.0], [5.0, 0.0]])
    got = measured(penex.PENEX(sensitivity=1.0), logits, torch.tensor([0, 0, 0]))
    assert got["weight_mean"] == torch.inf
    torch.testing.assert_close(got["weight_max_share"], torch.tensor(0.5))
    torch.testing.assert_close(got["weight_ess"], torch.tensor(2 / 3))


def test_nothing_to_learn_from_leaves_the_penalty_alone_to_report() -> None:
    got = measured(penex.PENEX(penalty=0.25), torch.randn(2, 3), torch.tensor([-100, -100]))
    assert got == {"penalty": torch.tensor(0.25)}


# 2. The callback.


def test_logged_are_the_batches_of_the_steps_that_are_logged(tmp_path: Path) -> None:
    module = Module()
    trainer = make_trainer(tmp_path, callbacks=[PENEXMonitor()], max_epochs=2)
    trainer.fit(module, make_loader(), make_loader(8))
    table = logged(trainer)
    assert list(table.index) == [2, 5, 8, 11]  # the third of every three
    for step, row in table.iterrows():
        logits, target, penalty = module.batches[int(str(step))]
        expected = measured(module.criterion, logits, target) | {"penalty": penalty}
        assert len(expected) == 10
        for key, value in expected.items():
            assert row[f"penex/{key}"] == pytest.approx(value.item(), rel=1e-6)
    assert module.forwards == 14  # one for each batch
    assert trainer.callback_metrics["penex/penalty"] == module.batches[11][2]
    assert not module.criterion._forward_hooks


def test_the_last_micro_batch_of_a_step_is_logged(tmp_path: Path) -> None:
    module = Module()
    trainer = make_trainer(
        tmp_path, callbacks=[PENEXMonitor()], accumulate_grad_batches=2, log_every_n_steps=2
    )
    trainer.fit(module, make_loader(24))
    assert logged(trainer)["penex/penalty"].tolist() == pytest.approx([module.batches[3][2].item()])


class Heads(Module):
    """Two criteria that see different logits, the second one twice."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"aux": penex.PENEX(sensitivity=0.3)})

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = super().training_step(batch, index)
        logits = self.net(batch[0])
        return loss + self.heads["aux"](logits, batch[1]) + self.heads["aux"](3 * logits, batch[1])


def test_several_criteria_have_names_and_one_may_be_chosen(tmp_path: Path) -> None:
    module = Heads()
    trainer = make_trainer(tmp_path, callbacks=[PENEXMonitor()], log_every_n_steps=1)
    trainer.fit(module, make_loader(4))
    row = logged(trainer).iloc[0]
    assert len([name for name in row.index if name.startswith("penex/")]) == 20
    logits, target, _ = module.batches[0]
    for name, criterion, seen in (
        ("criterion", module.criterion, logits),
        ("heads.aux", module.heads["aux"], 3 * logits),
    ):
        for key, value in measured(criterion, seen, target).items():
            assert row[f"penex/{name}/{key}"] == pytest.approx(value.item(), rel=1e-5)

    chosen = make_trainer(
        tmp_path, callbacks=[PENEXMonitor(module.heads["aux"])], log_every_n_steps=1
    )
    chosen.fit(module, make_loader(4))
    assert logged(chosen).iloc[0]["penex/penalty"] == pytest.approx(
        module.heads["aux"].penalty.item()
    )


def test_training_is_what_it_is_without_the_monitor(tmp_path: Path) -> None:
    watched = Module()
    plain, loader = copy.deepcopy(watched), make_loader()
    make_trainer(tmp_path, callbacks=[PENEXMonitor()]).fit(watched, loader)
    make_trainer(tmp_path).fit(plain, loader)
    for key, value in plain.state_dict().items():
        assert torch.equal(watched.state_dict()[key], value)


def test_hooks_are_gone_after_an_exception(tmp_path: Path) -> None:
    class Failing(Module):
        def on_after_backward(self) -> None:
            assert self.criterion._forward_hooks
            raise RuntimeError("no further")

    module = Failing()
    with pytest.raises(RuntimeError, match="no further"):
        make_trainer(tmp_path, callbacks=[PENEXMonitor()]).fit(module, make_loader())
    assert not module.criterion._forward_hooks


def test_a_module_without_the_criterion_is_refused(tmp_path: Path) -> None:
    module = Module()
    module.criterion = nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match=r"expected a penex.PENEX among .* of Module, found none"):
        make_trainer(tmp_path, callbacks=[PENEXMonitor()]).fit(module, make_loader())
    with pytest.raises(
        TypeError,
        match=r"criterion: expected a penex.PENEX or penex.LogPENEX, got CrossEntropyLoss",
    ):
        PENEXMonitor(nn.CrossEntropyLoss())


# 3. Checkpoints and DDP, without the callback's help.


def test_the_penalty_is_in_the_checkpoint(tmp_path: Path) -> None:
    """Two epochs are one and another one after loading; a fresh penalty would be another."""
    loader, module = make_loader(), Module()
    whole = copy.deepcopy(module)
    make_trainer(tmp_path, max_epochs=2).fit(whole, loader)
    trainer, file = make_trainer(tmp_path, max_epochs=1), tmp_path / "one.ckpt"
    trainer.fit(module, loader)
    trainer.save_checkpoint(file)
    assert Module.load_from_checkpoint(file).criterion.penalty == module.criterion.penalty
    resumed = Module()
    make_trainer(tmp_path, max_epochs=2).fit(resumed, loader, ckpt_path=file)
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[Any]]:
    """The case, and what two ranks made of it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("lightning")
    target = torch.arange(24) % CLASSES
    target[0:12:2] = -100  # rank 0 gets the even rows: all ignored in its first steps
    case = {
        "net": nn.Linear(FEATURES, CLASSES).double().state_dict(),
        "x": torch.randn(24, FEATURES, dtype=torch.float64),
        "target": target,
        "rows": 3,
        "epochs": 2,
    }
    torch.save(case, folder / "case")
    worker = Path(__file__).with_name("lightning_worker.py")
    source = Path(penex.__file__).parents[1]
    path = os.pathsep.join(filter(None, [str(source), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(worker), str(folder)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return case, [torch.load(folder / f"result{rank}", weights_only=True) for rank in range(2)]


def test_ddp_with_one_argument_is_one_process_with_the_joined_batch(
    ranks: tuple[dict[str, Any], list[Any]],
) -> None:
    case, results = ranks
    net = nn.Linear(FEATURES, CLASSES).double()
    net.load_state_dict(case["net"])
    criterion = penex.PENEX()
    optimiser = torch.optim.SGD(net.parameters(), lr=2.0)
    joined = 2 * case["rows"]  # the sampler deals rows out to the ranks in turn
    for _ in range(case["epochs"]):
        for x, target in zip(case["x"].split(joined), case["target"].split(joined), strict=True):
            optimiser.zero_grad()
            criterion(net(x), target).backward()
            optimiser.step()
    assert torch.equal(results[0]["penalty"], results[1]["penalty"])
    for rank in results:
        torch.testing.assert_close(rank["penalty"], criterion.penalty, rtol=1e-6, atol=0)
        torch.testing.assert_close(rank["logged"], rank["penalty"], rtol=0, atol=0)
        for key, value in net.state_dict().items():
            torch.testing.assert_close(rank["net"][key], value, rtol=1e-6, atol=1e-7)


def test_ddp_without_it_has_a_penalty_for_each_rank(
    ranks: tuple[dict[str, Any], list[Any]],
) -> None:
    _, results = ranks
    assert not torch.isclose(results[0]["alone"], results[1]["alone"], rtol=1e-3)
