"""Passes over the N x K logits on the CPU: their exponentials and softmax, in pieces."""

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from penex._inputs import computed_in

PIECE_BYTES = 1 << 22
"""Bytes of logits worked on at a time, few enough to stay in the cache."""
EXACT_RANGE = 1e30
"""From 1 / EXACT_RANGE to EXACT_RANGE sums of exponentials have all digits of float32."""
LOG2E = 1 / math.log(2)
"""e^x is taken as 2^(x LOG2E): torch's exp2 is the faster one on the CPU."""

WHOLE = slice(None)

Pass = Callable[[Tensor, Tensor | None], Tensor]
Reduce = Callable[[Tensor, slice], Tensor]


def pieces(input: Tensor) -> Iterator[slice]:
    """The rows of `input` in pieces of about PIECE_BYTES bytes."""
    step = max(PIECE_BYTES * len(input) // input.nbytes, 1)
    for start in range(0, len(input), step):
        yield slice(start, start + step)


def part(x: Tensor, piece: slice) -> Tensor:
    """The rows `piece`; without the time of a view where these are all."""
    return x if piece is WHOLE else x[piece]


def in_pieces(
    make: Pass, input: Tensor, keep: bool, *reduce: Reduce
) -> tuple[Tensor | None, list[Tensor]]:
    """What `make` does of the rows, if it is to be kept, and its reductions to the rows."""
    if input.nbytes <= PIECE_BYTES:
        whole = make(input, None)
        return whole if keep else None, [function(whole, WHOLE) for function in reduce]
    kept = torch.empty_like(input, dtype=computed_in(input)) if keep else None
    parts = []
    for piece in pieces(input):
        made = make(input[piece], None if kept is None else kept[piece])
        parts.append([function(made, piece) for function in reduce])
    return kept, [torch.cat(part) for part in zip(*parts, strict=True)]


@functools.lru_cache(64)
def constant(value: float, dtype: torch.dtype) -> Tensor:
    """A number on the CPU as a tensor, which small tensors are multiplied with in half the time."""
    return torch.tensor(value, dtype=dtype, device="cpu")


def powers(x: Tensor, out: Tensor | None = None, factor: float = 1.0) -> Tensor:
    """e^{factor x}, in float32 or float64."""
    if x.dtype.itemsize < 4:
        x = out = x.float()
    return torch.mul(x, constant(factor * LOG2E, x.dtype), out=out).exp2_()


def powers_from(x: Tensor, start: Tensor, factor: float = 1.0, out: Tensor | None = None) -> Tensor:
    """e^{start + factor x}, in float32 or float64, with one `start` for each row."""
    if x.dtype.itemsize < 4:
        x = out = x.float()
    return torch.add((start * LOG2E).to(x.dtype), x, alpha=factor * LOG2E, out=out).exp2_()


def softmax(x: Tensor, out: Tensor | None = None) -> Tensor:
    """In float32 or float64, over dimension 1."""
    if x.dtype.itemsize < 4:
        x = out = x.float()
    if x.ndim == 2:
        return torch._softmax(x, 1, False) if out is None else torch._softmax(x, 1, False, out=out)
    made = torch.sub(x, x.amax(1, True), out=out).mul_(LOG2E).exp2_()
    return made.div_(made.sum(1, True))  # torch's own of an inner dimension is slow


def log_softmax(x: Tensor, out: Tensor | None = None) -> Tensor:
    """In float32 or float64, over dimension 1."""
    if x.dtype.itemsize < 4:
        x = out = x.float()
    if out is None:
        return torch._log_softmax(x, 1, False)
    return torch._log_softmax(x, 1, False, out=out)


def row_log_sums(x: Tensor, out: Tensor | None = None) -> Tensor:
    """The largest logit of each row, and log sum_j e^f from there, (N, 2, d1, ...)."""
    x = x.to(computed_in(x))
    limits = torch.finfo(x.dtype)
    largest = x.amax(1, keepdim=True).clamp_(limits.min, limits.max)
    sums = torch.sub(x, largest).mul_(LOG2E).exp2_().sum(1, keepdim=True)
    return torch.cat([largest, sums.log_()], 1)
