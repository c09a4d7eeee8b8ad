"""Trained networks again, from their checkpoints, with the rows they were tested on."""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.svm import SVC
from torch import Tensor, nn

from penex.compare.config import Config
from penex.compare.data.dataset import Dataset
from penex.compare.data.images import Images
from penex.compare.data.split import Split, split
from penex.compare.errors import CompareError
from penex.compare.finished_runs import read_record
from penex.compare.models.choose import resolve
from penex.compare.models.networks import Normalise
from penex.compare.models.saved_model import read_network
from penex.compare.output_folder import checkpoint_file, load_data, run_folder
from penex.compare.registry import parse_loss
from penex.paper.attacks import Target

Floats = NDArray[np.float64]

SVM = "Support vector machine"


class Source:
    """The data and the networks of a finished comparison.

    Args:
        folder: An output folder, whose data are read again.
        data: Where they are; None: where the folder says.
        data_dir: As the setting of that name; None: as the folder says.

    Raises:
        CompareError: They are not there any more, or have changed.
    """

    def __init__(self, folder: Path, data: str | None = None, data_dir: str | None = None) -> None:
        self.folder = folder
        self.config: Config
        self.dataset: Dataset
        self.config, self.dataset = load_data(folder, data, data_dir)
        self._split: tuple[int, Split] | None = None

    @cached_property
    def images(self) -> bool:
        """Whether the inputs are pictures."""
        return isinstance(self.dataset.features, Images)

    def split(self, seed: int) -> Split:
        """The parts of a seed; those of the last one are kept."""
        if self._split is None or self._split[0] != seed:
            self._split = seed, split(self.dataset, seed=seed, config=self.config)
        return self._split[1]

    def test_rows(self, seed: int, rows: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """At most `rows` test rows drawn by `seed`: pixels in [0, 1], or features; and labels."""
        inputs, target = self.split(seed).test
        chosen = np.random.default_rng(seed).permutation(len(target))[:rows]
        if isinstance(inputs, Images):
            return inputs.pixels(chosen).astype(np.float32) / np.float32(255), target[chosen]
        if isinstance(inputs, list):
            raise CompareError(
                f"{self.dataset.name} holds texts; expected pictures or numbers, which can be "
                "changed a little"
            )
        return inputs[chosen].astype(np.float32), target[chosen]

    def target(self, spec: str, seed: int, epoch: str) -> Target:
        """The network of a run as an adversary meets it."""
        attacked = _Attacked(*load_model(self, spec, seed, epoch), pixels=self.images)
        return Target(attacked, len(self.dataset.classes), (0.0, 1.0) if self.images else None)


def load_model(
    source: Source, spec: str, seed: int, epoch: str
) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The network of a run, in evaluation mode, and the link of its loss.

    Args:
        source: The comparison.
        spec: The loss, as in the configuration.
        seed: Of the run.
        epoch: A selection; see :data:`penex.compare.training.selection.SELECTIONS`.

    Returns:
        The network, from inputs as in training to logits as saved in logits.npz, on the GPU if
        there is one; and the function from these logits to log-probabilities.

    Raises:
        CompareError: There is no such run, or its checkpoint is damaged.
    """
    folder = run_folder(source.folder, spec, seed)
    if not (folder / "run.json").exists():
        raise CompareError(f"{folder} holds no finished run")
    config = source.config
    architecture = resolve(
        config.model, source.dataset, hidden=config.hidden, options=config.model_options
    )
    with torch.random.fork_rng():  # fresh weights are drawn, and then replaced
        model, _ = architecture.build(source.split(seed).train[0], len(source.dataset.classes))
    record = read_record(folder)
    selected = record["epochs"].get(epoch)
    if selected is None:
        raise CompareError(f"{folder} has no network for the selection {epoch!r}: the run diverged")
    path = checkpoint_file(folder, selected)
    try:
        model.load_state_dict(read_network(path)["network"])
    except RuntimeError as error:
        raise CompareError(
            f"{path} is of another network; remove {folder} and run the comparison again"
        ) from error
    loss = parse_loss(spec).loss
    constrain = loss.constrain
    if constrain is not None:
        model = nn.Sequential(model, _Function(constrain))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    knob = math.nan if record["knob"] is None else record["knob"]
    return model.eval().to(device), loss.link(knob, len(source.dataset.classes))


def test_pictures(folder: Path, seed: int, rows: NDArray[np.intp]) -> list[NDArray[np.uint8]]:
    """(H, W, C) pictures of some test rows of a seed; none if the data are not pictures.

    Raises:
        CompareError: As :class:`Source`.
    """
    source = Source(folder)
    inputs, _ = source.split(seed).test
    if not isinstance(inputs, Images):
        return []
    return list(inputs.pixels(rows).transpose(0, 2, 3, 1))


class Plane(NamedTuple):
    """Classifiers of two features, on a grid.

    Attributes:
        features: (N, 2) training rows.
        target: (N,) their labels.
        x: (X,) grid of the first feature.
        y: (Y,) grid of the second.
        scores: By classifier, (Y, X, K); the class of the largest is predicted.
        wrong: By classifier, (N,) whether a training row is classified wrongly.
    """

    features: Floats
    target: NDArray[np.int64]
    x: Floats
    y: Floats
    scores: dict[str, Floats]
    wrong: dict[str, NDArray[np.bool_]]


def plane(folder: Path, specs: Sequence[str], *, points: int = 400) -> Plane | None:
    """Networks at seed 0 and the last epoch, and a support vector machine, on a plane of features.

    The machine is scikit-learn's SVC as it comes, with a radial kernel, on the same training rows.

    Args:
        folder: An output folder.
        specs: The losses, all with a finished run at seed 0.
        points: Of the grid, along each feature. It covers the rows and a quarter more on each side.

    Returns:
        None if the data do not have two features.

    Raises:
        CompareError: As :class:`Source` and :func:`load_model`.
    """
    source = Source(folder)
    features, target = source.split(0).train
    if not isinstance(features, np.ndarray) or features.shape[1:] != (2,):
        return None
    low, high = features.min(0), features.max(0)
    x, y = np.linspace(low - (high - low) / 4, high + (high - low) / 4, points).T
    grid = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2).astype(np.float32)
    found: dict[str, Callable[[NDArray[np.float32]], Floats]] = {}
    for spec in specs:
        model, _ = load_model(source, spec, 0, "last")
        device = next(model.parameters()).device

        @torch.no_grad()
        def logits(rows: NDArray[np.float32], model: Any = model, device: Any = device) -> Floats:
            return np.asarray(model(torch.from_numpy(rows).to(device)).double().cpu())

        found[parse_loss(spec).label] = logits
    machine = SVC(decision_function_shape="ovr").fit(features, target)

    def decision(rows: NDArray[np.float32]) -> Floats:
        values = np.asarray(machine.decision_function(rows))
        return values if values.ndim == 2 else np.stack([-values, values], -1)

    found[SVM] = decision
    k = len(source.dataset.classes)
    return Plane(
        features.astype(np.float64),
        target,
        x,
        y,
        {name: score(grid).reshape(points, points, k) for name, score in found.items()},
        {name: score(features).argmax(1) != target for name, score in found.items()},
    )


class _Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, input: Tensor) -> Tensor:
        return self.function(input)


class _Attacked(nn.Module):
    """From pixels in [0, 1], or features, to log-probabilities."""

    def __init__(self, model: nn.Module, link: Callable[[Tensor], Tensor], *, pixels: bool) -> None:
        super().__init__()
        self.first = Normalise() if pixels else nn.Identity()
        self.model = model
        self.link = link

    def forward(self, input: Tensor) -> Tensor:
        return self.link(self.model(self.first(input)))
