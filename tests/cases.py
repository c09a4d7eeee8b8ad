"""Inputs that several test modules share: logits and targets of every kind and shape."""

from typing import Any

import torch
from torch import Tensor

KINDS = ("indices", "one_hot", "probabilities")
SHAPES = ((5,), (2,), (1,), (7, 5), (5, 2), (3, 1), (3, 5, 4), (2, 3, 5, 3))
OPTIONS = ("plain", "weight", "ignore", "smoothing", "all")


def make_logits(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return (2.5 * torch.randn(shape, dtype=torch.float64)).to(dtype)


def make_target(kind: str, shape: tuple[int, ...]) -> Tensor:
    """A target of the given kind for logits of this shape; rows of class 0 among them."""
    classes = shape[min(1, len(shape) - 1)]
    labels = torch.randint(classes, shape[:1] + shape[2:] if len(shape) > 1 else ())
    if kind == "indices":
        return labels
    if kind == "one_hot":
        return torch.nn.functional.one_hot(labels, classes).movedim(-1, min(1, len(shape) - 1))
    return torch.rand(shape, dtype=torch.float64).softmax(min(1, len(shape) - 1))


def make_call(
    kind: str, shape: tuple[int, ...], options: str, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Logits, target and the keywords of cross_entropy."""
    classes = shape[min(1, len(shape) - 1)]
    logits, target = make_logits(shape, dtype), make_target(kind, shape)
    if kind == "probabilities":
        target = target.to(dtype)
    keywords: dict[str, Any] = {}
    if options in ("weight", "all"):
        keywords["weight"] = torch.linspace(0.3, 2.1, classes, dtype=dtype)
    if options in ("smoothing", "all"):
        keywords["label_smoothing"] = 0.15
    if options in ("ignore", "all") and kind == "one_hot":
        keywords["ignore_index"] = 0
    if options in ("ignore", "all") and kind == "indices":
        keywords["ignore_index"] = -7
        if target.ndim:
            target[::2] = -7
    return logits, target, keywords
