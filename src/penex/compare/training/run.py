"""One run: a network trained with one loss at one seed, its logits and checkpoints saved.

The loop does not know which loss it has: it gets a criterion, the scale of its gradient, and the
link from logits to probabilities. Everything random depends on the seed and the number of the epoch
alone, so a run that was stopped continues from the end of an epoch with the numbers it would have
had.
"""

import contextlib
import io
import itertools
import math
import platform
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from lightning.fabric.loggers.logger import Logger
from lightning.fabric.loggers.tensorboard import TensorBoardLogger
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from lightning.pytorch.loggers.wandb import WandbLogger
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from penex._extras import need
from penex.compare.config import Config, Execution, Task
from penex.compare.data.batches import Batches, evaluation_rows, loader
from penex.compare.data.dataset import Dataset
from penex.compare.data.images import Images
from penex.compare.data.split import Inputs, Split, split
from penex.compare.errors import CompareError
from penex.compare.files import replacing, write_json, write_text
from penex.compare.models.choose import Architecture, resolve, row_shape
from penex.compare.models.networks import Normalise, Vocabulary
from penex.compare.models.saved_model import WEIGHTS, Model, write_model, write_network
from penex.compare.output_folder import CHECKPOINT, checkpoint_file, new_run
from penex.compare.registry import Context, Loss, parse_loss
from penex.compare.training.determinism import deterministic
from penex.compare.training.distributed import is_rank_zero, on_rank_zero
from penex.compare.training.selection import LAST, Scores, Selected, validation_scores

CHECKPOINT_SECONDS = 30.0
"""An unfinished run is saved at the end of an epoch, but not more often than this ..."""
CHECKPOINT_SHARE = 0.05
"""... nor so often that saving takes more than this share of the time."""
MEASURING = 1.0
"""Seconds of training, about, from which the time of an epoch is estimated."""
MOMENTUM = 0.9
"""Of SGD."""
NORM_EVERY = 16
"""So often, in steps from the start of an epoch, the norm of the gradient is taken for the curve.
With clipping, which needs it, at every step."""


@deterministic()
def run(task: Task, config: Config, dataset: Dataset, execution: Execution) -> None:
    """Train, and leave a finished run in `task.folder`.

    At one seed every loss gets the same split, initial weights, order of batches, augmentation and
    dropout, so that runs of different losses are paired. One thread per run: the sums, and so the
    numbers, do not depend on how many runs share the machine.

    The process has one thread and deterministic algorithms while it runs, and its own settings and
    random states again afterwards.

    Where several devices share the run, every process calls this. A batch is then divided among
    them, and the mean of its loss is still that over all of its rows.

    Raises:
        CompareError: The model, the precision or a logger cannot be had here.
    """
    ready = _set_up(task, config, dataset, execution)
    learner = ready.learner
    with contextlib.ExitStack() as stack:
        started = _started(task, config, dataset)
        folder = on_rank_zero(lambda: stack.enter_context(new_run(task.folder, started)))
        progress = _Progress(folder)
        progress.resume(learner)
        loggers = _loggers(execution, task, folder, progress.epoch) if is_rank_zero() else []
        for epoch in range(progress.epoch, config.epochs):
            _seed(task.seed, epoch, learner.fabric.global_rank)
            begin = time.perf_counter()
            training = learner.fit(ready.training, epoch).means()
            seconds = time.perf_counter() - begin
            validation = learner.scores(ready.validation, ready.parts.validation[1])
            progress.add(learner, training, validation, seconds)
            for logger in loggers:
                logger.log_metrics(progress.latest, epoch + 1)
        for logger in loggers:
            logger.finalize("success")
            if isinstance(logger, WandbLogger):
                logger.experiment.finish()  # or the next run of this process would go on in it
        logits = {}
        last = {config.epochs: learner.snapshot(config.epochs)}
        for epoch, snapshot in sorted((progress.selected.snapshots | last).items()):
            learner.restore(snapshot)
            for part, batches in (("validation", ready.validation), ("test", ready.test)):
                logits[f"{part}_{epoch}"] = learner.logits(batches)
            if is_rank_zero():
                write_network(checkpoint_file(folder, epoch), snapshot)
        if is_rank_zero():
            write_model(folder, _described(task, config, dataset, ready))
            with replacing(folder / "logits.npz") as stream:
                np.savez(
                    stream,
                    allow_pickle=False,
                    validation_target=ready.parts.validation[1],
                    test_target=ready.parts.test[1],
                    **logits,
                )
            write_json(folder / "run.json", _record(task, ready, progress))
        on_rank_zero(stack.close)


@deterministic()
def refit(task: Task, config: Config, dataset: Dataset, *, epochs: int, temperature: float) -> None:
    """Train on training and validation rows, and leave a classifier in `task.folder`.

    Args:
        task: What is trained.
        config: Of the comparison; its schedule is kept, and left after `epochs`.
        dataset: The data.
        epochs: As many as validation rows have found to be best.
        temperature: As they have found it, too.
    """
    ready = _set_up(task, config, dataset, Execution(), refit=True)
    for epoch in range(epochs):
        _seed(task.seed, epoch, 0)
        ready.learner.fit(ready.training, epoch)
    task.folder.mkdir(parents=True, exist_ok=True)
    write_network(task.folder / WEIGHTS, ready.learner.snapshot(epochs))
    model = _described(task, config, dataset, ready)
    write_model(task.folder, replace(model, temperature=temperature, epoch=epochs))


@deterministic()
def measure(
    spec: str, knob: float, config: Config, dataset: Dataset, execution: Execution
) -> float:
    """Seconds that the training part of an epoch takes, from a few of its steps."""
    task = Task(Path(), spec, 0, config.lr_for(spec), knob)
    ready = _set_up(task, config, dataset, execution)
    count = len(ready.training.sampler)
    batches = min(3, count)
    for _ in range(2):  # the first time is longer: caches, compilation
        begin = time.perf_counter()
        ready.learner.fit(_FirstBatches(ready.training, batches), 0)
        if ready.learner.fabric.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = _from_rank_zero((time.perf_counter() - begin) / batches)
        batches = min(count, max(3, math.ceil(MEASURING / seconds)))
    return seconds * count


def _from_rank_zero(value: float) -> float:
    return on_rank_zero(lambda: value)


class _FirstBatches:
    """The first batches of a loader."""

    def __init__(self, batches: Any, count: int) -> None:
        self.sampler, self.batches, self.count = batches.sampler, batches, count

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.batches, self.count)


@dataclass(frozen=True)
class _Setup:
    """All that a run needs to start."""

    learner: "_Learner"
    architecture: Architecture
    parts: Split
    encoder: Any
    training: Any
    validation: Any
    test: Any


def _set_up(
    task: Task, config: Config, dataset: Dataset, execution: Execution, *, refit: bool = False
) -> _Setup:
    fabric = _fabric(config, execution)
    fabric.launch()
    parts = split(dataset, seed=task.seed, config=config, refit=refit)
    architecture = resolve(
        config.model, dataset, hidden=config.hidden, options=config.model_options
    )
    torch.manual_seed(task.seed)
    network, encoder = architecture.build(parts.train[0], len(dataset.classes))
    order = Batches(
        len(parts.train[1]),
        config.batch_size,
        rank=fabric.global_rank,
        world=fabric.world_size,
        seed=task.seed,
    )
    training = loader(parts.train, order, encoder, execution.workers, fabric.device)
    rows = evaluation_rows(parts.train[0])
    validation, test = (
        loader(
            part,
            Batches(
                len(part[1]),
                rows,
                rank=fabric.global_rank,
                world=fabric.world_size,
            ),
            encoder,
            execution.workers,
            fabric.device,
        )
        for part in (parts.validation, parts.test)
    )
    steps = math.ceil(len(order) / config.accumulate)
    context = Context(len(dataset.classes), steps * config.epochs, steps)
    learner = _Learner(fabric, network, task, config, context, _augment(config, parts.train[0]))
    return _Setup(learner, architecture, parts, encoder, training, validation, test)


class _Learner:
    """A network with what trains it."""

    def __init__(
        self,
        fabric: Fabric,
        network: nn.Module,
        task: Task,
        config: Config,
        context: Context,
        augment: nn.Module | None,
    ) -> None:
        self.fabric, self.config, self.context, self.task = fabric, config, context, task
        self.loss: Loss = parse_loss(task.spec).loss
        self.link = self.loss.link(task.knob, context.num_classes)
        self.constrain = self.loss.constrain or (lambda logits: logits)
        self.augment = augment
        self.normalise = Normalise()
        self.criteria = [self._criterion()]
        self.norms: list[Tensor] = []
        if fabric.world_size > 1 and fabric.device.type == "cuda":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        self.parameters = sum(p.numel() for p in network.parameters())
        if config.compile:
            network.compile()
        self.network = network
        # Not by fabric.setup: its wrapper's hooks cost a small network a tenth of its time.
        self.model = fabric.strategy.setup_module(fabric.to_device(network))
        # Sharded parameters exist from here on only.
        self.optimizer = _optimizer(config, network, task.lr)

    def _criterion(self) -> nn.Module:
        criterion = self.loss.build(self.task.knob, self.context).to(self.fabric.device)
        if self.fabric.world_size > 1:
            for module in criterion.modules():
                if hasattr(module, "process_group"):
                    setattr(module, "process_group", torch.distributed.group.WORLD)  # noqa: B010
        return criterion

    def fit(self, batches: Any, epoch: int) -> "_TrainingMetrics":
        """An epoch of training; what the network said of its rows on the way."""
        order: Batches = batches.sampler
        order.epoch = epoch
        every, last = self.config.accumulate, len(order) - 1
        synchronised = any(hasattr(m, "process_group") for m in self.criteria[0].modules())
        weights = order.weights(every, synchronised)
        first = step = epoch * self.context.steps_per_epoch
        tally = _TrainingMetrics(self.link)
        self.norms = []
        self.model.train()
        for index, (inputs, target) in enumerate(self._batches(batches, train=True)):
            stepping = index % every == every - 1 or index == last
            with self._unsynchronised(not stepping):
                heads = self._heads(inputs)
                own = order.own(index)
                loss = self._loss(heads, target, own, synchronised)
                if weights[index] != 1:
                    loss = loss * weights[index]
                self.fabric.backward(loss)
            tally.add(heads[-1].detach(), target, own)
            if stepping:
                self._step(step, measured=(step - first) % NORM_EVERY == 0)
                step += 1
        self._call_criteria("after_epoch")
        return tally

    def _heads(self, inputs: Tensor) -> list[Tensor]:
        """The network's logits, those that count last."""
        with self.fabric.autocast():
            outputs = self.model(inputs)
        heads = outputs if isinstance(outputs, tuple | list) else (outputs,)
        return [self.constrain(head.float()) for head in heads]

    def _unsynchronised(self, enabled: bool) -> contextlib.AbstractContextManager[object]:
        """Between optimiser steps, devices need not know each other's gradients."""
        if enabled and isinstance(self.model, nn.parallel.DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()

    def _loss(self, heads: list[Tensor], target: Tensor, own: int, synchronised: bool) -> Tensor:
        """The mean over this device's rows, summed over heads, each with a criterion of its own."""
        while len(self.criteria) < len(heads):
            self.criteria.insert(0, self._criterion())
        if own == 0:  # another device's row stands in, so that all devices do the same
            if not synchronised:
                return torch.stack([head.sum() for head in heads]).sum() * 0
            target = torch.full_like(target, -100)
        losses = [c(head, target) for c, head in zip(self.criteria, heads, strict=True)]
        if self.config.gradient_scale == "common":
            k = self.context.num_classes
            scales = [self.loss.scale(c, k) for c in self.criteria]
            losses = [loss / scale for loss, scale in zip(losses, scales, strict=True)]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def gradient_norm(self) -> float:
        """Mean over steps of the last epoch, of all parameters together, before clipping."""
        norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in self.norms]
        return float(torch.stack(norms).mean())

    def _step(self, step: int, *, measured: bool) -> None:
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = self.task.lr * _factor(config, step, self.context)
        if config.gradient_clip is not None:
            norm = self.fabric.clip_gradients(
                self.model,
                self.optimizer,
                max_norm=config.gradient_clip,
                error_if_nonfinite=False,  # a run may diverge; the curve says so
            )
            self.norms.append(cast("Tensor", norm))
        elif measured:
            self.fabric.strategy.precision.unscale_gradients(self.optimizer)
            gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
            self.norms.append(nn.utils.get_total_norm(gradients))
        self.fabric.strategy.optimizer_step(self.optimizer)
        self.optimizer.zero_grad()
        self._call_criteria("after_step")

    def _call_criteria(self, event: str) -> None:
        for criterion in self.criteria:
            hook: Callable[[], None] | None = getattr(criterion, event, None)
            if hook is not None:
                hook()

    def _batches(self, batches: Any, *, train: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches on the device, as the network takes them."""
        device = self.fabric.device
        for batch in batches:
            if isinstance(batch, CompareError):
                raise batch
            inputs, target = (tensor.to(device, non_blocking=True) for tensor in batch)
            if inputs.dtype == torch.uint8:
                inputs = inputs.float() / 255
                if train and self.augment is not None:
                    inputs = self.augment(inputs)
                inputs = self.normalise(inputs)
            yield inputs, target

    @torch.no_grad()
    def _evaluated(self, batches: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits and targets of this device's rows, batch by batch."""
        self.model.eval()
        for index, (inputs, target) in enumerate(self._batches(batches)):
            own = batches.sampler.own(index)
            yield self._heads(inputs)[-1][:own], target[:own]
        for module in self.network.modules():  # or a sharded root would stay whole
            if isinstance(module, FSDPModule):
                module.reshard()

    def scores(self, batches: Any, target: NDArray[np.int64]) -> Scores:
        """Validation scores after an epoch, the same on every process."""
        logits = torch.from_numpy(self.logits(batches)).double()
        return on_rank_zero(
            lambda: validation_scores(logits.numpy(), self.link(logits).numpy(), target)
        )

    def logits(self, batches: Any) -> NDArray[np.float32]:
        """Logits of all rows, in their order; from the leading process only."""
        own = [logits.cpu().numpy() for logits, _ in self._evaluated(batches)]
        ranks = _gathered(own)
        return np.concatenate([part for batch in zip(*ranks, strict=True) for part in batch])

    def snapshot(self, epochs: int) -> dict[str, Any]:
        """The network and its criterion as they are, copied to the CPU, after so many epochs."""
        return {
            "epoch": epochs,
            "state_dict": _copied(get_model_state_dict(self.network, options=_WHOLE)),
            "criterion": _copied(self.criteria[-1].state_dict()),
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Load the network's weights, which the leading process has."""
        weights = on_rank_zero(lambda: snapshot["state_dict"])
        # A copy, as torch puts the live weights into the dictionary it is given.
        set_model_state_dict(self.network, dict(weights), options=_WHOLE)

    def state(self) -> dict[str, Any]:
        """All that training goes on from, besides the network's weights."""
        return {
            "optimizer": get_optimizer_state_dict(self.network, self.optimizer, options=_WHOLE),
            "precision": self.fabric.strategy.precision.state_dict(),
            "criteria": _gathered([criterion.state_dict() for criterion in self.criteria]),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """What :meth:`state` was."""
        set_optimizer_state_dict(self.network, self.optimizer, state["optimizer"], options=_WHOLE)
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        criteria = state["criteria"][self.fabric.global_rank % len(state["criteria"])]
        self.criteria = [self._criterion() for _ in criteria]
        for criterion, values in zip(self.criteria, criteria, strict=True):
            criterion.load_state_dict(values)


_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class _TrainingMetrics:
    """NLL and accuracy of the link's probabilities on training rows, summed over batches."""

    def __init__(self, link: Callable[[Tensor], Tensor]) -> None:
        self.link = link
        self.waiting: list[tuple[Tensor, Tensor]] = []
        self.waiting_rows = 0
        self.sums: list[Tensor] = []
        self.rows = 0

    def add(self, logits: Tensor, target: Tensor, rows: int) -> None:
        """Count the first `rows` of a batch."""
        if rows < len(target):
            logits, target = logits[:rows], target[:rows]
        self.waiting.append((logits, target))
        self.waiting_rows += rows
        if self.waiting_rows >= 4096:  # many batches at once: cheaper than each of them
            self._count()

    def _count(self) -> None:
        logits, target = (torch.cat(tensors) for tensors in zip(*self.waiting, strict=True))
        nll = F.nll_loss(self.link(logits), target, reduction="sum")
        right = (logits.argmax(1) == target).sum()
        self.sums.append(torch.stack([nll, right]))
        self.rows += self.waiting_rows
        self.waiting, self.waiting_rows = [], 0

    def means(self) -> dict[str, float]:
        """Over the rows of all devices."""
        if self.waiting:
            self._count()
        sums = torch.stack(self.sums).cpu().double().sum(0).tolist() if self.sums else [0.0, 0.0]
        nll, right, rows = np.sum(_gathered([*sums, self.rows]), axis=0).tolist()
        return {"nll": nll / rows, "accuracy": right / rows}


class _Progress:
    """The curve, the selected epochs, and the file from which an interrupted run continues."""

    columns = (
        *("train_nll", "train_accuracy"),
        *("validation_nll", "validation_refined_nll", "validation_softmax_nll"),
        *("validation_accuracy", "gradient_norm"),
    )

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[str] = []
        self.seconds: list[float] = []
        self.latest: dict[str, float] = {}
        self.validation: Scores = {}
        self.selected = Selected()
        self.saved, self.saving = time.perf_counter(), 0.0

    @property
    def epoch(self) -> int:
        """How many are done."""
        return len(self.lines)

    def add(self, learner: _Learner, train: Scores, validation: Scores, seconds: float) -> None:
        """Record an epoch, and save everything if it is time."""
        epoch = self.epoch + 1
        self.latest = {
            f"{part}_{name}": value
            for part, scores in (("train", train), ("validation", validation))
            for name, value in scores.items()
        }
        self.latest["gradient_norm"] = learner.gradient_norm()
        self.validation = validation
        self.selected.update(epoch, validation, lambda: learner.snapshot(epoch))
        values = [*(self.latest[name] for name in self.columns), seconds]
        self.lines.append(",".join([str(epoch), *(f"{value:.6g}" for value in values)]))
        self.seconds.append(seconds)
        if is_rank_zero():
            with (self.folder / "curve.csv").open("a", encoding="utf-8") as stream:
                stream.write(f"{self.lines[-1]}\n")
        now = time.perf_counter()
        pause = max(CHECKPOINT_SECONDS, self.saving / CHECKPOINT_SHARE)
        if self.epoch < learner.config.epochs and on_rank_zero(lambda: now - self.saved >= pause):
            self.save(learner)
            self.saved = time.perf_counter()
            self.saving = self.saved - now

    def scores(self) -> dict[str, Scores | None]:
        """The validation scores of every selected epoch; None for a last epoch that diverged."""
        selected = {name: self.selected.scores[n] for name, n in self.selected.epochs.items()}
        finite = all(math.isfinite(score) for score in self.validation.values())
        return selected | {LAST: self.validation if finite else None}

    def save(self, learner: _Learner) -> None:
        """Write down all that the run needs to go on."""
        state = {
            "lines": self.lines,
            "seconds": self.seconds,
            "selected": self.selected.state(),
            "network": learner.snapshot(self.epoch),
            "learner": learner.state(),
        }
        if is_rank_zero():
            with replacing(self.folder / CHECKPOINT) as stream:
                stream.write(_as_bytes(state))

    def resume(self, learner: _Learner) -> None:
        """Go on from the file, if there is one; begin the curve, as far as it got."""
        state = on_rank_zero(lambda: _saved(self.folder / CHECKPOINT))
        if state is not None:
            self.lines, self.seconds = state["lines"], state["seconds"]
            self.selected.load(state["selected"])
            learner.restore(state["network"])
            learner.load_state(state["learner"])
        if is_rank_zero():
            lines = [f"epoch,{','.join(self.columns)},seconds", *self.lines]
            write_text(self.folder / "curve.csv", "\n".join(lines) + "\n")


def _fabric(config: Config, execution: Execution) -> Fabric:
    """Lightning's hand on devices, precision and strategy."""
    several = execution.devices * execution.nodes > 1
    sharded = several and execution.strategy == "fsdp"
    if config.precision == "16-mixed" and not torch.cuda.is_available():
        raise CompareError(
            "precision: 16-mixed needs a CUDA device; expected 32-true or bf16-mixed"
        )
    if config.precision == "16-mixed" and sharded:
        raise CompareError("precision: strategy fsdp takes 32-true or bf16-mixed, got 16-mixed")
    if sharded:
        strategy: Any = ModelParallelStrategy(
            _shard,
            data_parallel_size=execution.devices * execution.nodes,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
        )
    else:
        strategy = "ddp" if several else "auto"
    return Fabric(
        devices=execution.devices,
        num_nodes=execution.nodes,
        strategy=strategy,
        precision=config.precision,
        # torchrun starts processes, never Lightning; and one process is no part of a SLURM job.
        plugins=[TorchElasticEnvironment() if several else LightningEnvironment()],
    )


def _shard(network: nn.Module, mesh: Any) -> nn.Module:
    """Divide the parameters among devices, those of each layer of a stack together."""
    for stack in [module for module in network.modules() if isinstance(module, nn.ModuleList)]:
        for layer in stack:
            fully_shard(layer, mesh=mesh["data_parallel"])
    fully_shard(network, mesh=mesh["data_parallel"])
    return network


def _optimizer(config: Config, network: nn.Module, lr: float) -> torch.optim.Optimizer:
    parameters, decay = network.parameters(), config.weight_decay
    if config.optimizer == "sgd":  # fused, it does not take sharded parameters
        return torch.optim.SGD(parameters, lr, momentum=MOMENTUM, weight_decay=decay)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    # A fused optimiser unscales gradients itself, where clipping needs them unscaled before.
    return kind(parameters, lr, weight_decay=decay, fused=config.precision != "16-mixed")


def _factor(config: Config, step: int, context: Context) -> float:
    """What the learning rate is multiplied by at an optimiser step, counted from 0."""
    warmup = config.warmup_epochs * context.steps_per_epoch
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    return (1 + math.cos(math.pi * (step - warmup) / (context.steps_total - warmup))) / 2


def _augment(config: Config, inputs: Inputs) -> nn.Module | None:
    """Random changes to a batch of pixels in [0, 1], each picture its own."""
    if not config.augment:
        return None
    if not isinstance(inputs, Images):
        raise CompareError("augment: expected images to change; these data are not")
    need("augment", "data", "kornia")
    import kornia.augmentation as K

    _, height, width = inputs.shape
    size = (height, width)
    changes: dict[str, Callable[[], nn.Module]] = {
        "flip": lambda: K.RandomHorizontalFlip(),
        "crop": lambda: K.RandomCrop(size, padding=(height // 8, width // 8)),
        "resized-crop": lambda: K.RandomResizedCrop(size, scale=(0.8, 1.0)),
        "rotate": lambda: K.RandomRotation(15.0),
    }
    return nn.Sequential(*(changes[name]() for name in config.augment))


def _loggers(execution: Execution, task: Task, folder: Path, epoch: int) -> list[Logger]:
    """Loggers besides curve.csv; a run that goes on does so at `epoch`."""
    loggers: list[Logger] = []
    for name in execution.loggers:
        if find_spec(name) is None:
            raise CompareError(f"loggers: {name} needs the package {name}: pip install {name}")
        if name == "tensorboard":
            loggers.append(TensorBoardLogger(folder, "tensorboard", "", purge_step=epoch + 1))
        else:
            about = f"{task.spec}, seed {task.seed}"
            own = folder.name[-8:]  # the same when the run goes on
            loggers.append(
                WandbLogger(about, folder, own, project="penex", group=task.spec, resume="allow")
            )
    return loggers


def _started(task: Task, config: Config, dataset: Dataset) -> dict[str, Any]:
    """All that decides the numbers of a run."""
    return {
        "config": config.fixed(),
        "data": dataset.fingerprint,
        "loss": task.spec,
        "seed": task.seed,
        "lr": task.lr,
        "knob": None if math.isnan(task.knob) else task.knob,
        "versions": {package: version(package) for package in ("penex", "torch")},
    }


def _described(task: Task, config: Config, dataset: Dataset, ready: _Setup) -> Model:
    """The network as model.json describes it, without its weights."""
    encoder, train = ready.encoder, ready.parts.train[0]
    words = list(encoder.words) if isinstance(encoder, Vocabulary) else None
    return Model(
        data=dataset.name,
        target=config.target,
        text=config.text,
        classes=dataset.classes,
        class_type=dataset.class_type,
        kind=ready.architecture.kind,
        shape=row_shape(train) if encoder is None else (len(words or ()) + 2,),
        resize=config.image_size is not None,
        network=ready.architecture.name,
        options=dict(ready.architecture.options),
        words=words,
        precision=config.precision,
        loss=task.spec,
        knob=None if math.isnan(task.knob) else task.knob,
        preparation=ready.parts.preparation,
    )


def _record(task: Task, ready: _Setup, progress: _Progress) -> dict[str, Any]:
    """What run.json says."""
    learner, parts = ready.learner, ready.parts
    return {
        "loss": task.spec,
        "seed": task.seed,
        "lr": task.lr,
        "knob": task.knob if learner.loss.knob else None,
        "rows": {
            "train": len(parts.train[1]),
            "validation": len(parts.validation[1]),
            "test": len(parts.test[1]),
        },
        "class_counts": np.bincount(parts.train[1], minlength=learner.context.num_classes).tolist(),
        "model": ready.architecture.name,
        "parameters": learner.parameters,
        "epochs": progress.selected.epochs | {LAST: progress.epoch},
        "validation": progress.scores(),
        "seconds_per_epoch": median(progress.seconds),
        "versions": _versions(),
    }


def _seed(seed: int, epoch: int, rank: int) -> None:
    """Set every global generator to what it is at the start of this epoch."""
    state = int(np.random.SeedSequence((seed, epoch, rank)).generate_state(1)[0])
    torch.manual_seed(state)
    np.random.seed(state)  # noqa: NPY002  # a user's network may draw from it
    random.seed(state)


def _copied(tensors: dict[str, Any]) -> dict[str, Any]:
    """On the CPU, in memory of their own."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _saved(path: Path) -> dict[str, Any] | None:
    """What :meth:`_Progress.save` wrote; None if it did not, or the disk has lost it."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except Exception:  # a damaged archive raises anything from zipfile, pickle and torch
        path.unlink()
        return None
    return state


def _as_bytes(state: dict[str, Any]) -> memoryview:
    """As torch saves it; its own writing to a full disk would not say what is wrong."""
    content = io.BytesIO()
    torch.save(state, content)
    return content.getbuffer()


def _gathered(value: Any) -> list[Any]:
    """What each process has."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _versions() -> dict[str, str]:
    packages = ("penex", "torch", "lightning", "numpy", "pandas", "scikit-learn", "skrub")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        **{package: version(package) for package in packages},
    }
