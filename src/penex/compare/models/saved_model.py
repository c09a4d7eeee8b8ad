"""A trained network with all that it needs to predict, in files that hold no code.

    model.json             data, classes, architecture, loss, and what prepares new rows
    model.safetensors      the arrays of that preparation
    weights.safetensors    of the network; in the folder of a run, those of each selected epoch

Nothing is pickled, and reading runs no code, except for losses and networks of the user's own:
their module is imported, if the reader trusts the folder.
"""

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import numpy as np
from pydantic import ConfigDict, create_model
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from penex.compare.data import preprocessing as preparation
from penex.compare.data.dataset import ClassType
from penex.compare.data.preprocessing import Preparation
from penex.compare.errors import CompareError
from penex.compare.files import (
    read_bytes,
    read_json,
    reading,
    refuse_links,
    replacing,
    write_json,
)
from penex.compare.models.choose import Kind

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
DESCRIPTION, ARRAYS, WEIGHTS = "model.json", "model.safetensors", "weights.safetensors"
_ARRAY = "array"
"""In JSON: the only key of what stands for an array, with its name in :data:`ARRAYS`."""


@dataclass(frozen=True)
class Model:
    """All about a trained network but its weights.

    Attributes:
        data: The name of the data set.
        target: The column of a table that holds the class.
        text: The column of a table that holds the text to classify.
        classes: Their names, in the order of the logits.
        class_type: What predictions are to be, in place of these names.
        kind: Of the data.
        shape: Of a row as the network takes it; of texts, (numbers of the vocabulary,).
        resize: Whether images of any size are resized to `shape`.
        network: Its name, as in the configuration.
        options: Its options.
        words: The vocabulary of texts.
        precision: Of the arithmetic.
        loss: As in the configuration.
        knob: The value of its hyperparameter.
        preparation: Of numbers.
        temperature: By which calibrated logits are divided.
        epoch: After which the weights were taken; None: of a run, where there are several.
    """

    data: str
    target: str | None
    text: str | None
    classes: tuple[str, ...]
    class_type: ClassType
    kind: Kind
    shape: tuple[int, ...]
    resize: bool
    network: str
    options: dict[str, Any]
    words: list[str] | None
    precision: str
    loss: str
    knob: float | None
    preparation: Preparation | None
    temperature: float = 1.0
    epoch: int | None = None


_Plain = create_model(  # type: ignore[call-overload]
    "_Plain",
    __config__=ConfigDict(strict=True, extra="forbid"),
    **{name: (kind, ...) for name, kind in get_type_hints(Model).items() if name != "preparation"},
)
"""The fields of :class:`Model` that JSON has, with their types."""


def write_model(folder: Path, model: Model) -> None:
    """Write :data:`DESCRIPTION` and :data:`ARRAYS` into a folder."""
    values = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
    if model.preparation is not None:
        values["preparation"] = preparation.state(model.preparation)
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    plain = _without_arrays(values, "", arrays)
    with replacing(folder / ARRAYS) as stream:
        stream.write(save_arrays(arrays))
    write_json(folder / DESCRIPTION, {"format": FORMAT, **plain})


def read_model(folder: Path) -> Model:
    """What :func:`write_model` wrote.

    Raises:
        CompareError: `folder` holds no model, a damaged one, or one of another version.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise CompareError(f"{folder} holds no model: expected {path}")
    refuse_links(folder)
    values: dict[str, Any] = read_json(path)
    with reading(path):
        written = values.pop("format", None)
        if written != FORMAT:
            raise CompareError(
                f"{path} has format {written}, and this version of penex reads {FORMAT}"
            )
        with reading(folder / ARRAYS):
            arrays = load_arrays(read_bytes(folder / ARRAYS))
        values = _with_arrays(values, arrays)
        for name in ("classes", "shape"):
            values[name] = tuple(values[name])
        prepared = values.pop("preparation")
        _Plain.model_validate(values)
        if prepared is not None:
            prepared = preparation.restore(prepared)
        return Model(**values, preparation=prepared)


def _without_arrays(value: Any, name: str, arrays: dict[str, np.ndarray[Any, Any]]) -> Any:
    """The value with names in the place of arrays, which go into `arrays`."""
    if isinstance(value, np.ndarray):
        arrays[name] = np.ascontiguousarray(value)
        return {_ARRAY: name}
    if isinstance(value, Mapping):
        return {key: _without_arrays(each, f"{name}.{key}", arrays) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_arrays(each, f"{name}.{i}", arrays) for i, each in enumerate(value)]
    return value


def _with_arrays(value: Any, arrays: Mapping[str, np.ndarray[Any, Any]]) -> Any:
    """The inverse of :func:`_without_arrays`."""
    if isinstance(value, dict):
        if set(value) == {_ARRAY}:
            return arrays[value[_ARRAY]]
        return {key: _with_arrays(each, arrays) for key, each in value.items()}
    return [_with_arrays(each, arrays) for each in value] if isinstance(value, list) else value


def write_network(path: Path, snapshot: Mapping[str, Any]) -> None:
    """Write the weights of a network, and the state of its criterion.

    Args:
        path: Of the file.
        snapshot: Its "state_dict", its "criterion"'s, and the "epoch" after which they were taken.
    """
    from safetensors.torch import save

    tensors = {
        f"{part}.{name}": tensor.contiguous()
        for part, state in (("network", "state_dict"), ("criterion", "criterion"))
        for name, tensor in snapshot[state].items()
    }
    with replacing(path) as stream:
        stream.write(save(tensors, {"epoch": str(snapshot["epoch"])}))


def read_network(path: Path) -> dict[str, dict[str, "Tensor"]]:
    """The states of "network" and "criterion" that :func:`write_network` wrote.

    Raises:
        CompareError: The file is damaged.
    """
    from safetensors.torch import load

    with reading(path):
        tensors = load(read_bytes(path, most=sys.maxsize))
        if any(tensor.isnan().any() for tensor in tensors.values()):
            raise ValueError("a weight is NaN")
    found: dict[str, dict[str, Tensor]] = {"network": {}, "criterion": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        found.setdefault(part, {})[rest] = tensor
    return found
