"""A classifier as an ONNX file that gives probabilities, checked with onnxruntime."""

import json
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from penex._extras import need
from penex.compare.data.preprocessing import Arrays, Columns, Table
from penex.compare.data.scaling import BOUND, PIXEL_BOUND
from penex.compare.errors import CompareError
from penex.compare.files import write_bytes
from penex.compare.models.networks import Normalise

if TYPE_CHECKING:
    from penex.compare.models.classifier import Classifier

TOLERANCE = 1e-4
"""Largest difference of a probability between onnxruntime and this package."""
CHECKED_ROWS = 7
TOKENS = 16
"""Length of the texts that are checked."""


def export(classifier: "Classifier", path: Path) -> str:
    """Write the network, what scales its input and the link of its loss.

    Args:
        classifier: To export.
        path: The file.

    Returns:
        What the file takes: a sentence, which its metadata holds as "input", beside "classes".

    Raises:
        CompareError: The network cannot be exported, or onnxruntime finds other probabilities.
        ImportError: The extra `onnx` is missing.
    """
    need("penex export", "onnx", "onnx", "onnxruntime", "onnxscript")
    import onnxruntime

    rows, what = _sample(classifier)
    served = Served(classifier).eval().cpu()
    batch = torch.export.Dim("batch")
    dynamic = {0: batch, 1: torch.export.Dim("tokens")} if rows.dtype == torch.int64 else {0: batch}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operation of torch's own, unknown to ONNX
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch's own tracing
            expected = served(rows)
            program = torch.onnx.export(
                served, (rows,), dynamic_shapes=(dynamic,), dynamo=True, verbose=False,
                input_names=["rows"], output_names=["probabilities"],
            )  # fmt: skip
    except Exception as error:  # tracing runs the network's forward, which may raise anything
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CompareError(f"cannot export {classifier!r}: {reason}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        classifier.network.to(classifier.device)
    assert program is not None  # noqa: S101  # it is with dynamo
    proto = program.model_proto
    for key, value in (("classes", json.dumps(classifier.classes_.tolist())), ("input", what)):
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value
    content = proto.SerializeToString()
    (found,) = onnxruntime.InferenceSession(content).run(None, {"rows": rows.numpy()})
    difference = float(np.abs(found - expected.numpy()).max())
    if not difference <= TOLERANCE:
        raise CompareError(
            f"cannot export {classifier!r}: onnxruntime's probabilities differ by {difference:.2g}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, content)
    return what


class Served(nn.Module):
    """From rows as an application has them to probabilities.

    Columns of a table and words of a text are made numbers outside; see :func:`export`.
    """

    def __init__(self, classifier: "Classifier") -> None:
        super().__init__()
        self.first = _first(classifier)
        self.network = classifier.network
        self.log_proba = classifier.log_proba

    def forward(self, rows: Tensor) -> Tensor:
        """Probabilities of the classes, float32 of shape (N, K)."""
        logits = self.network(self.first(rows))
        return self.log_proba(logits).exp().float()


def _first(classifier: "Classifier") -> nn.Module:
    preparation = classifier.description.preparation
    if isinstance(preparation, Columns):
        return _ColumnScale(preparation)
    if isinstance(preparation, Arrays):
        return _CommonScale(preparation)
    return _Pixels() if classifier.description.kind == "images" else nn.Identity()


class _ColumnScale(nn.Module):
    """:class:`penex.compare.data.scaling.ColumnScale`."""

    centre: Tensor
    factor: Tensor
    shift: Tensor

    def __init__(self, columns: Columns) -> None:
        super().__init__()
        scale = columns.scale
        factor = 1 / (scale.width * scale.std)
        self.register_buffer("centre", torch.from_numpy(scale.median.astype(np.float64)))
        self.register_buffer("factor", torch.from_numpy(factor))
        self.register_buffer("shift", torch.from_numpy(scale.mean / scale.std))

    def forward(self, rows: Tensor) -> Tensor:
        z = (rows.double() - self.centre) * self.factor - self.shift
        # As sine and arctangent of double numbers, which onnxruntime does not have everywhere.
        ratio = (z / BOUND).clamp(-1e30, 1e30)
        return (BOUND * ratio / (1 + ratio * ratio).sqrt()).float()


class _CommonScale(nn.Module):
    """:class:`penex.compare.data.scaling.CommonScale`."""

    def __init__(self, arrays: Arrays) -> None:
        super().__init__()
        self.mean, self.std = arrays.scale.mean, arrays.scale.std

    def forward(self, rows: Tensor) -> Tensor:
        if self.std == 0:
            return torch.zeros_like(rows)
        scaled = (rows.double() - self.mean) / self.std
        return scaled.clamp(-PIXEL_BOUND, PIXEL_BOUND).float()


class _Pixels(nn.Module):
    """Bytes to what the network takes."""

    def __init__(self) -> None:
        super().__init__()
        self.normalise = Normalise()

    def forward(self, pixels: Tensor) -> Tensor:
        normalised: Tensor = self.normalise(pixels.float() / 255)
        return normalised


def _sample(classifier: "Classifier") -> tuple[Tensor, str]:
    """Rows as the file takes them, and what they are."""
    description = classifier.description
    shape = (CHECKED_ROWS, *description.shape)
    size = ", ".join(["N", *map(str, description.shape)])
    rng = np.random.default_rng(0)
    if description.kind == "text":
        tokens = rng.integers(1, description.shape[0], (CHECKED_ROWS, TOKENS))
        return torch.from_numpy(tokens), "int64 (N, L): encode(texts) of the classifier"
    if description.kind == "images":
        pixels = rng.integers(256, size=shape, dtype=np.uint8)
        return torch.from_numpy(pixels), f"uint8 ({size}): pixels"
    values = torch.from_numpy(rng.normal(size=shape).astype(np.float32))
    if isinstance(description.preparation, Table):
        return values, f"float32 ({size}): encode(rows) of the classifier"
    scale: Any = description.preparation
    if isinstance(scale, Columns):
        width = np.where(np.isinf(scale.scale.width), 1, scale.scale.width)
        values = torch.from_numpy((scale.scale.median + width * values.numpy()).astype(np.float32))
    return values, f"float32 ({size}): features as in the data"
