"""The networks that the comparison trains."""

from collections.abc import Sequence
from itertools import pairwise
from math import prod

from torch import nn


def mlp(shape: Sequence[int], hidden: Sequence[int], num_classes: int) -> nn.Sequential:
    """A multilayer perceptron with ReLU: input of `shape` per row, logits out."""
    widths = [prod(shape), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for width, following in pairwise(widths):
        layers += [nn.Linear(width, following), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))
