"""One run: its results, resuming from any interruption, and equal results on several processes."""

import dataclasses
import functools
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, SequentialLR
from train_worker import CASES, numbers, pictures, sentences, train
from waiting import GUARD, wait_until

from penex import PENEX
from penex.compare.config import Config, Execution, Task
from penex.compare.data.batches import Batches
from penex.compare.data.dataset import Dataset
from penex.compare.data.images import Images
from penex.compare.data.load import load
from penex.compare.data.split import split
from penex.compare.errors import CompareError
from penex.compare.files import read_json
from penex.compare.finished_runs import read_logits
from penex.compare.models.choose import resolve
from penex.compare.models.saved_model import read_network
from penex.compare.output_folder import CHECKPOINT, checkpoint_file
from penex.compare.registry import LOSSES, Context, Loss, parse_loss
from penex.compare.training import run as training

ALONE = Execution()
SMALL = {"dim": 16, "depth": 1, "heads": 2, "mlp": 16}
"""A transformer for what does not depend on its size."""


def configured(**options: Any) -> Config:
    return Config(**({"data": "made", "train_size": 50, "epochs": 4, "batch_size": 16} | options))


def run(
    folder: Path,
    dataset: Dataset,
    spec: str = "cross-entropy",
    execution: Execution = ALONE,
    **options: Any,
) -> Path:
    """`folder`, with a run of seed 0 in it."""
    config = configured(**options)
    task = Task(folder, spec, 0, config.lr, parse_loss(spec).untuned)
    training.run(task, config, dataset, execution)
    return folder


def last_epoch(folder: Path) -> int:
    return int(read_json(folder / "run.json")["epochs"]["last"])


def checkpoint(folder: Path) -> dict[str, Any]:
    """The one of the last epoch."""
    path = checkpoint_file(folder, last_epoch(folder))
    return read_network(path)


def weights(folder: Path) -> dict[str, Tensor]:
    content: dict[str, Tensor] = checkpoint(folder)["network"]
    return content


def logits(folder: Path, part: str) -> NDArray[np.float32]:
    """After the last epoch."""
    return read_logits(folder)[f"{part}_{last_epoch(folder)}"]


def curve(folder: Path) -> NDArray[Any]:
    found: NDArray[Any] = np.genfromtxt(folder / "curve.csv", delimiter=",", names=True)
    return found


def assert_same(one: Path, other: Path) -> None:
    """Every file holds the same, bit for bit, but for the clock."""
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    for name in [path.name for path in one.glob("*.safetensors")]:  # also what prepares new rows
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert (one / "model.json").read_bytes() == (other / "model.json").read_bytes()
    a, b = read_logits(one), read_logits(other)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    for column in set(curve(one).dtype.names) - {"seconds"}:
        np.testing.assert_array_equal(curve(one)[column], curve(other)[column])
    records = [read_json(folder / "run.json") for folder in (one, other)]
    for record in records:
        del record["seconds_per_epoch"]
    assert records[0] == records[1]


# What is computed, against a loop written by hand


def by_hand(config: Config, dataset: Dataset, criterion: nn.Module) -> dict[str, Tensor]:
    """Weights after the training that `config` describes, in plain PyTorch.

    Accumulated batches are one batch here, which has the same mean.
    """
    features, target = map(torch.from_numpy, split(dataset, seed=0, config=config).train)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3))
    optimizer = {
        "adam": functools.partial(torch.optim.Adam, fused=True),
        "adamw": functools.partial(torch.optim.AdamW, fused=True),
        "sgd": functools.partial(torch.optim.SGD, momentum=0.9),
    }[config.optimizer](model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    size = config.batch_size * config.accumulate
    steps = math.ceil(len(target) / size)
    warm, rest = config.warmup_epochs * steps, (config.epochs - config.warmup_epochs) * steps
    schedule = (
        CosineAnnealingLR(optimizer, rest)
        if config.schedule == "cosine"
        else ConstantLR(optimizer, 1.0)
    )
    if warm:
        ramp = LinearLR(optimizer, 1 / warm, total_iters=warm - 1)
        schedule = SequentialLR(optimizer, [ramp, schedule], [warm])
    for epoch in range(config.epochs):
        order = torch.from_numpy(np.random.default_rng((0, epoch)).permutation(len(target)))
        for rows in order.split(size):
            optimizer.zero_grad()
            criterion(model(features[rows]), target[rows]).backward()
            if config.gradient_clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
            optimizer.step()
            schedule.step()
    return model.state_dict()


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": "adamw", "weight_decay": 0.3},
        {"optimizer": "adam", "weight_decay": 0.3},
        {"optimizer": "sgd", "weight_decay": 0.01},
        {"optimizer": "sgd", "gradient_clip": 0.2},
        {"schedule": "cosine"},
        {"warmup_epochs": 2},
        {"schedule": "cosine", "warmup_epochs": 2, "optimizer": "sgd"},
        {"accumulate": 2},
        {"accumulate": 3, "optimizer": "sgd", "schedule": "cosine", "gradient_clip": 0.2},
        {"accumulate": 9},
    ],
    ids=str,
)
def test_the_weights_equal_those_of_a_plain_training_loop(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    options = {"lr": 0.03, "hidden": (7,), "batch_size": 12} | options
    got = weights(run(tmp_path / "run", numbers(), **options))
    expected = by_hand(configured(**options), numbers(), nn.CrossEntropyLoss())
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-6)


class Divided(nn.Module):
    def __init__(self, criterion: nn.Module, by: float) -> None:
        super().__init__()
        self.criterion, self.by = criterion, by

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        value: Tensor = self.criterion(logits, target) / self.by
        return value


@pytest.mark.parametrize("scale", ["common", "own"])
@pytest.mark.parametrize("spec", ["penex", "focal", "confidence-penalty"])
def test_the_loss_of_the_run_is_what_is_minimised(tmp_path: Path, spec: str, scale: str) -> None:
    options: dict[str, Any] = {"hidden": (7,), "optimizer": "sgd", "lr": 0.1}
    options |= {"epochs": 2, "gradient_scale": scale}
    folder = run(tmp_path / "run", numbers(), spec, **options)
    loss = parse_loss(spec).loss
    criterion = loss.build(parse_loss(spec).untuned, Context(3, 16, 4))
    by = loss.gradient_scale(criterion, 3) if scale == "common" else 1.0
    expected = by_hand(configured(**options), numbers(), Divided(criterion, by))
    for name, weight in weights(folder).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0)
    if isinstance(criterion, PENEX):
        assert torch.equal(checkpoint(folder)["criterion"]["penalty"], criterion.penalty)


class SevenPENEX(PENEX):
    """Seven times PENEX."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return 7 * super().forward(input, target)


def test_a_constant_factor_changes_nothing_unless_losses_keep_their_own_scale(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Under SGD, weight decay and clipping, for which a factor is another learning rate."""
    seven = dataclasses.replace(
        LOSSES["penex"],
        name="seven-penex",
        build=lambda knob, context: SevenPENEX(sensitivity=knob),
        gradient_scale=lambda criterion, num_classes: 7 * criterion.sensitivity,
    )
    monkeypatch.setitem(LOSSES, "seven-penex", seven)
    options: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1, "hidden": (7,)}
    options |= {"weight_decay": 0.1, "gradient_clip": 0.3}

    def difference(scale: str) -> float:
        one, other = (
            weights(run(tmp_path / scale / spec, numbers(), spec, gradient_scale=scale, **options))
            for spec in ("penex", "seven-penex")
        )
        return max((one[name] - other[name]).abs().max().item() for name in one)

    assert difference("common") < 1e-5
    assert difference("own") > 0.05


def test_weight_decay_means_the_same_for_penex_and_cross_entropy(tmp_path: Path) -> None:
    """Adam's decay is added to the gradient, so that of a small sensitivity would drown in it."""
    digits = load(Config(data="digits"))
    options: dict[str, Any] = {"train_size": 300, "epochs": 20, "lr": 3e-3, "weight_decay": 0.01}

    def accuracy(spec: str, **scale: str) -> float:
        folder = run(tmp_path / f"{spec} {scale}", digits, spec, **options, **scale)
        return float(curve(folder)["validation_accuracy"][-1])

    reference = accuracy("cross-entropy")
    assert reference > 0.85
    assert accuracy("penex=0.03") > reference - 0.05
    assert accuracy("penex=0.03", gradient_scale="own") < reference - 0.3


def test_deep_supervision_adds_the_losses_and_predicts_with_the_last(tmp_path: Path) -> None:
    dataset = pictures()
    options: dict[str, Any] = {
        "model_options": {"deep_supervision": True, "dropout": 0.0},
        "batch_size": 50,
        "epochs": 1,
        "optimizer": "sgd",
        "lr": 0.1,
    }
    folder = run(tmp_path / "run", dataset, "penex", **options)
    config = configured(**options)
    images, target = split(dataset, seed=0, config=config).train
    assert isinstance(images, Images)
    order = np.random.default_rng((0, 0)).permutation(50)
    pixels = (images.take(order).float() / 255 - 0.5) / 0.5
    torch.manual_seed(0)
    model, _ = resolve(None, dataset, options=config.model_options).build(images, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    heads = model(pixels)
    assert len(heads) == 3
    losses = [PENEX()(head, torch.from_numpy(target[order])) for head in heads]
    (torch.stack(losses).sum() / 0.1).backward()
    optimizer.step()
    for name, weight in weights(folder).items():
        torch.testing.assert_close(weight, model.state_dict()[name], rtol=1e-5, atol=1e-7)
    test = split(dataset, seed=0, config=config).test[0]
    assert isinstance(test, Images)
    with torch.no_grad():
        expected = model.eval()((test.take(np.arange(len(test))).float() / 255 - 0.5) / 0.5)
    np.testing.assert_allclose(logits(folder, "test"), expected.numpy(), atol=1e-5)


def test_half_precision_is_used_and_logits_are_not_half(tmp_path: Path) -> None:
    exact = run(tmp_path / "exact", numbers())
    mixed = run(tmp_path / "mixed", numbers(), precision="bf16-mixed")
    assert logits(mixed, "test").dtype == np.float32
    difference = np.abs(logits(mixed, "test") - logits(exact, "test")).max()
    assert 1e-5 < difference < 0.1
    target = torch.from_numpy(read_logits(mixed)["validation_target"])
    nll = F.cross_entropy(torch.from_numpy(logits(mixed, "validation")), target)
    assert nll.item() == pytest.approx(curve(mixed)["validation_nll"][-1], rel=1e-4)
    if not torch.cuda.is_available():
        with pytest.raises(CompareError, match="^precision: 16-mixed needs a CUDA device"):
            run(tmp_path / "none", numbers(), precision="16-mixed")


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled(tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 1, "hidden": (4,)}
    plain = weights(run(tmp_path / "plain", numbers(), **options))
    compiled = weights(run(tmp_path / "compiled", numbers(), compile=True, **options))
    assert plain.keys() == compiled.keys()
    for name in plain:
        torch.testing.assert_close(compiled[name], plain[name], rtol=1e-4, atol=1e-5)


class Inputs:
    """What networks see, in training and in evaluation."""

    def __init__(self) -> None:
        self.training: list[Tensor] = []
        self.evaluation: list[Tensor] = []

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if type(module).__name__ == "ConvNet":
            (self.training if module.training else self.evaluation).append(inputs[0].clone())


@pytest.fixture
def seen() -> Iterator[Inputs]:
    inputs = Inputs()
    hook = register_module_forward_pre_hook(inputs)
    yield inputs
    hook.remove()


def test_images_are_normalised_and_only_training_is_augmented(seen: Inputs, tmp_path: Path) -> None:
    dataset = pictures()
    options: dict[str, Any] = {"epochs": 2, "batch_size": 50, "augment": ("flip",)}
    run(tmp_path / "one", dataset, **options)
    first = [tensor.clone() for tensor in seen.training]
    parts = split(dataset, seed=0, config=configured(**options))
    assert isinstance(parts.train[0], Images)
    assert isinstance(parts.validation[0], Images)
    validation = parts.validation[0].take(np.arange(len(parts.validation[1]))).float()
    torch.testing.assert_close(seen.evaluation[0], (validation / 255 - 0.5) / 0.5)
    flips = []
    for epoch, images in enumerate(first):
        order = np.random.default_rng((0, epoch)).permutation(50)
        pixels = (parts.train[0].take(order).float() / 255 - 0.5) / 0.5
        kept = torch.isclose(images, pixels, atol=1e-5).all((1, 2, 3))
        flipped = torch.isclose(images, pixels.flip(3), atol=1e-5).all((1, 2, 3))
        assert (kept ^ flipped).all()
        flips.append(flipped[torch.from_numpy(order).argsort()])
    assert 10 < flips[0].sum() < 40  # each picture for itself
    assert not torch.equal(flips[0], flips[1])
    # Every loss gets the same pictures.
    seen.training.clear()
    run(tmp_path / "other", dataset, "penex", **options)
    assert all(torch.equal(a, b) for a, b in zip(seen.training, first, strict=True))


@pytest.mark.parametrize("change", ["flip", "crop", "resized-crop", "rotate"])
def test_augmented_images_keep_shape_and_range(seen: Inputs, tmp_path: Path, change: str) -> None:
    run(tmp_path / "run", pictures(shape=(1, 16, 12)), augment=(change,), epochs=1)
    changed = torch.cat(seen.training)
    assert changed.shape == (50, 1, 16, 12)
    assert changed.min() >= -1
    assert changed.max() <= 1
    plain = torch.cat(seen.evaluation)
    assert abs(changed.mean() - plain.mean()) < 0.5


def test_numbers_are_not_augmented(tmp_path: Path) -> None:
    with pytest.raises(CompareError, match="^augment: expected images to change"):
        run(tmp_path / "run", numbers(), augment=("flip",))
    assert list(tmp_path.iterdir()) == []


def test_criteria_are_notified_of_steps_and_epochs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = []

    class Told(nn.CrossEntropyLoss):
        def after_step(self) -> None:
            told.append("step")

        def after_epoch(self) -> None:
            told.append("epoch")

        def predict_log_proba(self, logits: Tensor) -> Tensor:
            return logits.log_softmax(1)

    loss = Loss("told", "Told", lambda knob, context: Told())
    monkeypatch.setitem(LOSSES, "told", loss)
    run(tmp_path / "run", numbers(), "told", epochs=2, accumulate=2)  # 4 batches, 2 steps
    assert told == ["step", "step", "epoch"] * 2


def test_a_diverged_run_is_finished_and_recorded_as_such(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", numbers(), optimizer="sgd", lr=1e30)
    record = read_json(folder / "run.json")
    assert record["epochs"] == {"last": 4}  # no other epoch is selected
    assert record["validation"] == {"last": None}
    assert np.isnan(curve(folder)["validation_nll"][-1])
    assert [path.name for path in folder.glob("epoch-*")] == ["epoch-4.safetensors"]
    assert not np.isfinite(logits(folder, "test")).any()


# Loggers


def test_tensorboard_logs_the_curve(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged = Execution(loggers=("tensorboard",))
    folder = run(tmp_path / "run", numbers(), execution=logged)
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    for name in ("train_nll", "validation_accuracy"):
        scalars = events.Scalars(name)
        assert [scalar.step for scalar in scalars] == [1, 2, 3, 4]
        np.testing.assert_allclose([s.value for s in scalars], curve(folder)[name], rtol=1e-5)


def test_a_missing_logger_is_named(tmp_path: Path) -> None:
    if find_spec("wandb") is not None:
        pytest.skip("wandb is installed")
    with pytest.raises(CompareError, match="^loggers: wandb needs the package wandb"):
        run(tmp_path / "run", numbers(), execution=Execution(loggers=("wandb",)))
    assert list(tmp_path.iterdir()) == []


# Loading


@pytest.mark.parametrize(
    ("dataset", "options"),
    [
        (pictures(), {"augment": ("crop", "flip")}),
        (sentences(), {"model_options": SMALL}),
        (numbers(), {}),
    ],
    ids=["pictures", "sentences", "numbers"],
)
def test_worker_processes_change_nothing(
    tmp_path: Path, dataset: Dataset, options: dict[str, Any]
) -> None:
    here = run(tmp_path / "here", dataset, "penex", epochs=2, **options)
    there = run(tmp_path / "there", dataset, "penex", Execution(workers=2), epochs=2, **options)
    assert_same(here, there)


def test_an_unreadable_image_gives_one_message(tmp_path: Path) -> None:
    class Torn(Images):
        def __getitem__(self, rows: Any) -> Images:
            return Torn(self.source, self.digest, self.rows[rows])

        def take(self, rows: Any) -> Tensor:
            raise CompareError("cannot decode the image x.png: torn. Replace or remove it.")

    good = pictures()
    assert isinstance(good.features, Images)
    torn = Dataset("torn", Torn(good.features.source), good.target, good.classes, "torn")
    with pytest.raises(CompareError, match="^cannot decode the image x.png: torn.*it.$"):
        run(tmp_path / "run", torn, execution=Execution(workers=1))


@pytest.mark.parametrize("rows", [1, 5, 16, 17, 33])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_share_the_batches_of_one_process(rows: int, world: int) -> None:
    whole = [list(batch) for batch in Batches(rows, 16, seed=3)]
    assert sorted(chain(*whole)) == list(range(rows))
    shares = [Batches(rows, 16, seed=3, rank=rank, world=world) for rank in range(world)]
    assert {len(list(share)) for share in shares} == {len(whole)}
    for index, (batch, *own) in enumerate(zip(whole, *shares, strict=True)):
        kept = [list(part)[: share.own(index)] for part, share in zip(own, shares, strict=True)]
        assert list(chain(*kept)) == batch
    for every in (1, 2):
        for index in range(len(whole)):
            first = index - index % every
            step = sum(len(batch) for batch in whole[first : first + every])
            for share in shares:
                # A mean over own rows, averaged over ranks, becomes one over the step's rows.
                weight = share.weights(every, synchronised=False)[index]
                assert weight == pytest.approx(share.own(index) * world / step)
                assert share.weights(every, True)[index] == pytest.approx(len(whole[index]) / step)


# Interruptions

RESUMED: dict[str, tuple[Callable[[], Dataset], str, dict[str, Any]]] = {
    "penex": (numbers, "penex", {}),
    "scheduled penex": (numbers, "penex-cosine-schedule", {"schedule": "cosine"}),
    "lagrangian": (numbers, "conex-lagrangian", {"optimizer": "sgd", "lr": 1e-4}),
    "dropout, augmentation, heads": (
        pictures,
        "penex",
        {
            "augment": ("flip", "crop"),
            "model_options": {"deep_supervision": True},
            "optimizer": "adamw",
            "warmup_epochs": 2,
            "accumulate": 2,
        },
    ),
    "text": (sentences, "cross-entropy", {"gradient_clip": 0.5, "model_options": SMALL}),
    "half precision": (numbers, "penex", {"precision": "bf16-mixed"}),
}


class StoppedError(Exception):
    pass


def stopped(epoch: int, saves: int, *arguments: Any, **options: Any) -> None:
    """A run that stops before an epoch; the epochs from `saves` on were not saved."""
    seeded = training._seed

    def seed(seed: int, now: int, rank: int) -> None:
        if now == epoch:
            raise StoppedError
        training.CHECKPOINT_SECONDS = 0.0 if now < saves else math.inf
        seeded(seed, now, rank)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_seed", seed)
        patch.setattr(training, "CHECKPOINT_SHARE", math.inf)
        patch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
        with pytest.raises(StoppedError):
            run(*arguments, **options)


@pytest.mark.parametrize("case", RESUMED)
def test_a_run_resumes_where_it_was_saved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: str
) -> None:
    make, spec, options = RESUMED[case]
    whole = run(tmp_path / "whole", make(), spec, epochs=6, **options)
    stopped(4, 3, tmp_path / "runs" / "half", make(), spec, epochs=6, **options)
    (left,) = (path for path in (tmp_path / "runs").iterdir() if path.is_dir())
    assert len(curve(left)) == 4  # of which one is not in the checkpoint
    assert len(torch.load(left / CHECKPOINT, weights_only=True)["lines"]) == 3
    trained = []
    with monkeypatch.context() as patch:
        seeded = training._seed
        patch.setattr(training, "_seed", lambda *args: (trained.append(args[1]), seeded(*args)))
        half = run(tmp_path / "runs" / "half", make(), spec, epochs=6, **options)
    assert trained == [3, 4, 5]
    assert_same(whole, half)
    assert list((tmp_path / "runs").iterdir()) == [half]


@pytest.mark.parametrize("other", [{"lr": 0.5}, {"batch_size": 5}, {"optimizer": "sgd"}], ids=str)
def test_a_checkpoint_of_another_run_is_ignored(tmp_path: Path, other: dict[str, Any]) -> None:
    stopped(2, 2, tmp_path / "runs" / "run", numbers())
    assert_same(
        run(tmp_path / "whole", numbers(), **other),
        run(tmp_path / "runs" / "run", numbers(), **other),
    )
    assert len(list((tmp_path / "runs").iterdir())) == 1


PROGRAM = """
import signal, sys
from pathlib import Path
from train_worker import numbers
from penex.compare.training import run as train
from penex.compare.models.saved_model import read_network
from penex.compare.config import Config, Execution, Task
seeded, wait = train._seed, int(sys.argv[2])
def seed(seed, epoch, rank):
    if epoch == wait:
        signal.pause()
    seeded(seed, epoch, rank)
train._seed = seed
train.CHECKPOINT_SECONDS, train.CHECKPOINT_SHARE = 0.0, float("inf")
config = Config(data="made", train_size=50, epochs=150, batch_size=16)
train.run(Task(Path(sys.argv[1]), "penex", 0, config.lr, 0.1), config, numbers(), Execution())
"""
"""Saves after every epoch, and waits before one to be killed, should that not have happened yet."""


def test_killed_at_any_moment_a_run_gives_the_same_results(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", numbers(), "penex", epochs=150)
    (tmp_path / "system").mkdir()
    folder = tmp_path / "runs" / "run"
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    kept = 0
    for enough in (20, 60):
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder), str(enough + 40)],
            env=os.environ | {"PYTHONPATH": paths, "TMPDIR": str(tmp_path / "system")},
            stderr=subprocess.PIPE,
            text=True,
        )

        def done() -> bool:
            lines = [len(c.read_bytes().splitlines()) for c in folder.parent.glob(".*/curve.csv")]
            return bool(lines) and lines[0] > enough  # noqa: B023

        wait_until(done, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not folder.exists()
        assert list((tmp_path / "system").iterdir()) == []  # nothing of a checkpoint, or all of it
        (left,) = (path for path in folder.parent.iterdir() if path.is_dir())
        saved = len(torch.load(left / CHECKPOINT, weights_only=True)["lines"])
        assert saved > kept
        assert saved >= enough - 2
        kept = saved
    assert_same(whole, run(folder, numbers(), "penex", epochs=150))
    assert list(folder.parent.iterdir()) == [folder]


def test_saving_takes_a_small_share_of_the_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By a clock of its own: an epoch takes a second, and saving what `cost` says."""
    clock, cost, saved = 0.0, 0.125, []
    seeded, save = training._seed, training._Progress.save

    def epoch(*arguments: int) -> None:
        nonlocal clock
        clock += 1.0
        seeded(*arguments)

    def slow(self: Any, learner: Any) -> None:
        nonlocal clock
        save(self, learner)
        clock += cost
        saved.append(self.epoch)

    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 3.0)
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: clock))
    monkeypatch.setattr(training, "_seed", epoch)
    monkeypatch.setattr(training._Progress, "save", slow)
    run(tmp_path / "short", numbers(), epochs=2)
    assert saved == []  # not worth it
    run(tmp_path / "cheap", numbers(), epochs=11)
    assert saved == [3, 6, 9]
    saved.clear()
    cost = 0.25  # a twentieth of 5
    run(tmp_path / "costly", numbers(), epochs=11)
    assert saved == [3, 8]


# Several processes


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case, trained by two processes that torchrun started."""
    folder = tmp_path_factory.mktemp("shared")
    tests = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(tests / "train_worker.py"), str(folder)),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=GUARD,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


@pytest.mark.parametrize("case", [*CASES, "sharded/pictures"])
def test_two_processes_give_the_results_of_one(shared: Path, tmp_path: Path, case: str) -> None:
    name = case.rpartition("/")[2]
    train(tmp_path, name, ALONE)
    one, two = tmp_path / name, shared / case
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    for name in [path.name for path in one.glob("epoch-*")]:
        a, b = (read_network(folder / name) for folder in (one, two))
        for part in ("network", "criterion"):
            assert a[part].keys() == b[part].keys()
            for key in a[part]:
                torch.testing.assert_close(b[part][key], a[part][key], rtol=1e-5, atol=1e-5)
    a, b = read_logits(one), read_logits(two)
    for key in a:
        np.testing.assert_allclose(b[key], a[key], rtol=1e-5, atol=1e-5, err_msg=key)
    for column in set(curve(one).dtype.names) - {"seconds"}:
        np.testing.assert_allclose(curve(two)[column], curve(one)[column], rtol=2e-5)
    assert not list(shared.rglob(".partial-*"))
