"""The trained network of a comparison as a classifier of new rows."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from penex._terminal import printable
from penex.compare.data.batches import Batches, evaluation_rows, loader
from penex.compare.data.images import Images
from penex.compare.data.new_rows import Rows, as_features
from penex.compare.data.preprocessing import Arrays, Columns
from penex.compare.errors import CompareError
from penex.compare.files import reading, write_bytes
from penex.compare.models.choose import Architecture
from penex.compare.models.networks import Normalise, Vocabulary
from penex.compare.models.saved_model import (
    DESCRIPTION,
    WEIGHTS,
    Model,
    read_model,
    read_network,
    write_model,
)
from penex.compare.registry import parse_loss
from penex.compare.training.determinism import deterministic
from penex.compare.user_objects import OBJECT_NAME, require_object

if TYPE_CHECKING:
    from penex.compare.data.split import Inputs

CLASS_TYPES: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": lambda name: name == "True",
}


class Classifier:
    """A trained network with what prepares its input, and the link of its loss.

    Of :attr:`penex.compare.result.Result.best`, or of a folder that :meth:`save` wrote:
    ``penex.load(folder).best``.

    Attributes:
        classes_: The K classes, in the order of the columns of probabilities.
        loss: With which it was trained, as in the configuration.
        temperature: By which calibrated logits are divided; 1 without temperature scaling.
        network: The module, in evaluation mode, from prepared rows to logits.
        description: All about it but its weights.
    """

    def __init__(self, model: Model, weights: Path) -> None:
        self.description, self._weights = model, weights
        who = parse_loss(model.loss)
        if OBJECT_NAME.fullmatch(model.network):
            require_object(model.network, "model")
        if model.kind == "text" and model.network.startswith("transformers:"):
            raise CompareError(
                f"model: {model.network} cannot predict new texts, because its tokenizer is not "
                "saved with it; its results are in the report"
            )
        self.loss = model.loss
        self.label: str = who.label
        self.temperature = model.temperature
        self._constrain = who.loss.constrain or (lambda logits: logits)
        self._described = weights.parent / DESCRIPTION
        with reading(self._described):
            knob = math.nan if model.knob is None else model.knob
            self._link = who.loss.link(knob, len(model.classes))
            self._encoder = _encoder(model)
            convert = CLASS_TYPES[model.class_type]
            self.classes_ = np.array([convert(name) for name in model.classes])
            with torch.random.fork_rng():  # fresh weights are drawn, and then replaced
                network = _architecture(model).network(model.shape, len(model.classes))
        state = read_network(weights)["network"]
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            raise CompareError(f"{weights} is of another network: {error}") from None
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network: nn.Module = network.eval().to(self.device)

    def __repr__(self) -> str:
        about, classes = self.description, self.description.classes
        names = ", ".join(classes[:5]) + ", ..." * (len(classes) > 5)
        return printable(f"<{about.network} trained with {self.label} on {about.data}: {names}>")

    def predict(self, X: Rows) -> NDArray[Any]:  # noqa: N803
        """The most probable class of each row, shape (N,).

        Args:
            X: Rows like those of the comparison: a DataFrame with its feature columns (others are
                left out); an array of shape (N, ...); images as uint8 of shape (N, H, W) or
                (N, H, W, 3); or texts.

        Raises:
            CompareError: The rows are not like those that the network was trained on.
        """
        classes: NDArray[Any] = self.classes_[self.predict_log_proba(X).argmax(axis=1)]
        return classes

    def predict_proba(self, X: Rows) -> NDArray[np.float64]:  # noqa: N803
        """Probabilities of the classes, shape (N, K), by the link of the loss.

        They are after temperature scaling where the recommendation is.
        """
        return np.exp(self.predict_log_proba(X))

    def predict_log_proba(self, X: Rows) -> NDArray[np.float64]:  # noqa: N803
        """The logarithm of :meth:`predict_proba`."""
        return np.asarray(self.log_proba(torch.from_numpy(self.logits(X)).double()))

    def log_proba(self, logits: Tensor) -> Tensor:
        """Log-probabilities of logits, shape (N, K)."""
        return (self._link(logits) / self.temperature).log_softmax(1)

    def logits(self, X: Rows) -> NDArray[np.float32]:  # noqa: N803
        """What the network says, shape (N, K)."""
        if not len(X):
            return np.empty((0, len(self.classes_)), np.float32)
        inputs = self._prepare(X)
        part = inputs, np.zeros(len(inputs), np.int64)
        batches = loader(
            part,
            Batches(len(inputs), evaluation_rows(inputs)),
            self._encoder,
            workers=0,
            device=self.device,
        )
        with deterministic(), torch.no_grad():
            found = [self._logits(_checked(rows)) for rows in batches]
        return np.concatenate(found)

    def frame(self, X: Rows, names: Sequence[str]) -> pd.DataFrame:  # noqa: N803
        """Class and probabilities of each row, under its name."""
        proba = self.predict_proba(X)
        columns = {f"p({name})": proba[:, k] for k, name in enumerate(self.description.classes)}
        classes = self.classes_[proba.argmax(axis=1)]
        return pd.DataFrame({"row": list(names), "class": classes} | columns)

    def encode(self, X: Rows) -> NDArray[Any]:  # noqa: N803
        """Rows as the file of :meth:`export` takes them.

        Tables as numbers, texts as tokens with 0 at the end of shorter ones, images as bytes; other
        arrays as they are.
        """
        if isinstance(self.description.preparation, Columns | Arrays):
            features: NDArray[Any] = as_features(X, self.description)
            return features
        inputs = self._prepare(X)
        if isinstance(inputs, Images):
            return inputs.pixels(np.arange(len(inputs)))
        if isinstance(inputs, list):
            assert self._encoder is not None  # noqa: S101  # of texts
            tokens = self._encoder(inputs)
            longest = max(map(len, tokens), default=0)
            return np.stack([np.pad(text, (0, longest - len(text))) for text in tokens])
        return inputs

    def export(self, path: str | Path) -> str:
        """Write an ONNX file that gives probabilities, checked with onnxruntime.

        Args:
            path: Of the file.

        Returns:
            What its input is; see :meth:`encode`.

        Raises:
            CompareError: The network cannot be exported.
            ImportError: The extra `onnx` is missing.
        """
        from penex.compare.models.onnx import export

        return export(self, Path(path))

    def _prepare(self, X: Rows) -> "Inputs":  # noqa: N803
        """Rows as the network takes them, except that images are bytes and texts no tokens yet."""
        features, model = as_features(X, self.description), self.description
        if model.preparation is None:
            return cast("Inputs", features)
        with reading(self._described):
            inputs = model.preparation(features)
            if inputs.shape[1:] != model.shape or np.isnan(inputs).any():
                raise ValueError(f"it does not prepare rows of shape {model.shape}")
        return inputs

    def save(self, folder: str | Path) -> Path:
        """Write a folder that :func:`penex.load` opens anywhere, without the data.

        Args:
            folder: Made if missing.

        Returns:
            `folder`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_model(folder, self.description)
        write_bytes(folder / WEIGHTS, self._weights.read_bytes())
        return folder

    def _logits(self, inputs: Tensor) -> NDArray[np.float32]:
        inputs = inputs.to(self.device)
        if inputs.dtype == torch.uint8:
            inputs = Normalise()(inputs.float() / 255)
        with autocast(self.description.precision, self.device):
            output = self.network(inputs)
        return np.asarray(self._constrain(_last(output).float()).cpu())


def _last(output: Tensor | tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    return output[-1] if isinstance(output, tuple | list) else output


def _checked(batch: Any) -> Tensor:
    if isinstance(batch, CompareError):
        raise batch
    inputs: Tensor = batch[0]
    return inputs


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The arithmetic that a network was trained in."""
    dtype = torch.float16 if precision == "16-mixed" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "32-true")


def _architecture(model: Model) -> Architecture:
    options = model.options
    if model.network.partition(":")[0] in ("timm", "transformers"):
        options = options | {"pretrained": False}  # its weights are those of the file
    return Architecture(model.network, model.kind, options)


def _encoder(model: Model) -> Callable[..., Any] | None:
    if model.words is None:
        return None
    return Vocabulary(model.words, max_length=_architecture(model).max_length)


def read_bundle(folder: Path) -> Classifier:
    """The classifier that :meth:`Classifier.save` wrote.

    Raises:
        CompareError: `folder` holds none, or a damaged one.
    """
    return Classifier(read_model(folder), folder / WEIGHTS)


def of_run(run: Path, weights: Path, epoch: int, temperature: float) -> Classifier:
    """The network of a finished run after an epoch."""
    model = read_model(run)
    return Classifier(dataclasses.replace(model, temperature=temperature, epoch=epoch), weights)
