"""PENEX in the log domain: each row shifted by its maximum, so that no finite logit overflows.

The exponentials of the gradient are computed anew in the backward, from the logits and a number for
each row. Nothing here synchronises with a device. What is asked for is checked already, and targets
are class indices.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from penex._inputs import Batch, prepare
from penex._penalty import Penalty, PenaltySums, Settled

LOG2E = 1 / math.log(2)
"""e^x is taken as 2^(x LOG2E): torch's exp2 is the faster one on the CPU, see benchmarks."""
PIECE = 1 << 22
"""Bytes of logits worked on at a time, few enough to stay in the cache."""

_DENSE = torch._C.DispatchKey.Dense  # what a tensor that stands for a batch of them lacks


@dataclass(slots=True, kw_only=True)
class Asked:
    """What is asked of a batch, in the form that :func:`penex._inputs.validate` lets through."""

    target: Tensor
    """Class indices, (N, d1, ...), or one-hot labels or class probabilities, (N, K, d1, ...)."""
    weight: Tensor | None
    ignore_index: int
    reduction: str
    label_smoothing: float

    def batch(self, logits: Tensor) -> Batch:
        """Logits and target as the definitions want them."""
        return prepare(
            logits,
            self.target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )

    def all_kept(self) -> bool:
        """Whether no row is ignored. To be asked on the CPU, where looking costs little."""
        if self.ignore_index < 0:
            return self.target.min().item() >= 0
        return not (self.target == self.ignore_index).any().item()

    def rows(self, dtype: torch.dtype, all_kept: bool = False) -> tuple[Tensor, Tensor | None]:
        """Labels to gather with, and w_y, zero for ignored rows; both (N, 1, d1, ...).

        If all rows are known to be kept, None stands for weights that are all one.
        """
        labels = self.target.unsqueeze(1)
        weight = None if self.weight is None else self.weight.to(dtype)
        if all_kept:
            return labels, None if weight is None else weight.take(labels)
        keep = labels != self.ignore_index
        labels = labels.where(keep, 0)
        return labels, keep.to(dtype) if weight is None else weight.take(labels).mul_(keep)


@dataclass(slots=True, kw_only=True)
class Call(Asked):
    """What is asked of PENEX."""

    alpha: float
    penalty: Penalty
    log_threshold: float | None
    """Where huberization sets in, as a logarithm."""
    definition: Callable[[Tensor, "Call", Settled], Tensor]
    """The loss of logits with what was settled, differentiable any number of times."""

    def given(self, settled: Settled) -> Callable[[Tensor], Tensor]:
        """The loss as a function of the logits alone."""
        return lambda logits: self.definition(logits, self, settled)


def computed_in(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def robust_loss(input: Tensor, call: Call) -> Tensor:
    """The loss of any batch with class indices, in eager mode, on any device, in any dtype."""
    rows, settled = _rows(input, call)
    result: Tensor = _Robust.apply(  # type: ignore[no-untyped-call]
        input, rows.value, rows.labels, rows.log_rows, rows.slope, call, settled
    )
    return result


def compiled_loss(input: Tensor, call: Call) -> Tensor:
    """The same for compilers, which fuse whole expressions and need no pieces."""
    rows, _ = _rows(input, call)
    result: Tensor = _Compiled.apply(  # type: ignore[no-untyped-call]
        input, rows.value, rows.labels, rows.log_rows, rows.slope
    )
    return result


class _Rows(NamedTuple):
    value: Tensor
    """The loss, reduced as asked."""
    labels: Tensor
    """Safe to gather with; this and what follows (N, 1, d1, ...)."""
    log_rows: Tensor
    """log(rho omega_i / divisor): what the gradient's e^f is multiplied with, as a logarithm."""
    slope: Tensor
    """The gradient of the exponential part, at the label."""


@torch.no_grad()
def _rows(input: Tensor, call: Call) -> tuple[_Rows, Settled]:
    """What value and gradient are made of, in the log domain."""
    dtype = computed_in(input)
    labels, mass = call.rows(dtype)
    assert mass is not None  # noqa: S101
    true = input.gather(1, labels).to(dtype)
    log_partition = (_log_partition(input, dtype) + mass.log()).masked_fill(mass <= 0, -math.inf)
    value, log_rows, slope, settled = settle_rows(
        true,
        mass,
        log_partition,
        input.shape[1],
        call.alpha,
        call.penalty,
        call.reduction,
        call.log_threshold,
    )
    return _Rows(value, labels, log_rows, slope), settled


def settle_rows(
    true: Tensor,
    mass: Tensor,
    log_partition: Tensor,
    num_classes: int,
    alpha: float,
    penalty: Penalty,
    reduction: str,
    log_threshold: float | None,
) -> tuple[Tensor, Tensor, Tensor, Settled]:
    """What :class:`_Rows` has, labels apart, from little more than a number for each row.

    `true` are the logits of the labels, `log_partition` is log omega_i S_i, both in the shape of
    `mass`; where no value for each row is asked for, log sum_i omega_i S_i will do.
    """
    live, log_mass = mass > 0, mass.log()
    u = -alpha * true
    log_slope = u if log_threshold is None else u.clamp(max=log_threshold)
    log_exponential = log_slope + log_mass
    if log_threshold is not None:
        log_exponential = log_exponential + torch.log1p(F.relu(u - log_threshold))
    log_exponential = log_exponential.masked_fill(~live, -math.inf)
    sums = PenaltySums.of(log_exponential, log_partition, num_classes)
    settled = penalty.settle(sums, mass.sum())
    log_penalty = settled.log_penalty
    if reduction == "none":
        value = (log_exponential.exp() + (log_partition + log_penalty).exp()).squeeze(1)
        log_divisor = torch.zeros_like(sums.partition)
    else:
        mean = reduction == "mean"
        log_divisor = settled.divisor().log() if mean else torch.zeros_like(sums.partition)
        value = (sums.exponential - log_divisor).exp()
        value = value + (sums.partition + (log_penalty - log_divisor)).exp()
    log_rows = log_mass + (log_penalty - log_divisor)
    log_slope = (log_slope + log_mass - log_divisor).masked_fill(~live, -math.inf)
    return value, log_rows, -alpha * log_slope.exp(), settled


class _Robust(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        value: Tensor,
        labels: Tensor,
        log_rows: Tensor,
        slope: Tensor,
        call: Call,
        settled: Settled,
    ) -> Tensor:
        ctx.save_for_backward(input, labels, log_rows, slope)
        ctx.call, ctx.settled = call, settled
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, labels, log_rows, slope = ctx.saved_tensors
        if looked_into(grad):
            return differentiable(ctx.call.given(ctx.settled), input, grad), *[None] * 6
        if grad.ndim:
            grad = grad.unsqueeze(1)
        return gradient(input, labels, log_rows, grad, slope * grad), *[None] * 6


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, value: Tensor, labels: Tensor, log_rows: Tensor, slope: Tensor
    ) -> Tensor:
        ctx.save_for_backward(input, labels, log_rows, slope)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, labels, log_rows, slope = ctx.saved_tensors
        if grad.ndim:
            grad = grad.unsqueeze(1)
        # The label's share by comparison: a scatter would be a pass over the memory of its own.
        classes = torch.arange(input.shape[1], device=input.device)
        mine = classes.view(-1, *[1] * (input.ndim - 2)) == labels
        powers = torch.exp(input.to(log_rows.dtype) + log_rows) * grad
        gradient = powers.where(log_rows > -math.inf, 0) + (slope * grad).where(mine, 0)
        return gradient.to(input.dtype), None, None, None, None


def _log_partition(input: Tensor, dtype: torch.dtype) -> Tensor:
    """log sum_j e^{f_ij}, (N, 1, d1, ...)."""
    if torch.compiler.is_compiling():
        return input.to(dtype).logsumexp(1, keepdim=True)
    parts = []
    limits = torch.finfo(dtype)
    for piece in pieces(input):
        logits = input[piece].to(dtype)
        largest = logits.amax(1, keepdim=True).clamp_(limits.min, limits.max)
        powers = torch.sub(logits, largest).mul_(LOG2E).exp2_()
        parts.append(powers.sum(1, keepdim=True).log_().add_(largest))
    return torch.cat(parts)


def gradient(
    input: Tensor, labels: Tensor, log_rows: Tensor, factor: Tensor, at_label: Tensor
) -> Tensor:
    """factor * exp(f + log_rows), plus `at_label` at the labels, rounded to the input's dtype once.

    `factor` is 0-d or has the shape of `log_rows`. Where log_rows is -inf the row is zero.
    """
    result = torch.empty_like(input)
    log2_rows, dead = log_rows * LOG2E, log_rows == -math.inf
    # Passes that would change nothing. On other devices to find out would synchronise.
    plain = input.is_cpu and factor.ndim == 0 and factor.item() == 1
    alive = input.is_cpu and not dead.any().item()
    for piece in pieces(input):
        exact = input.dtype == log_rows.dtype
        logits = input[piece].to(log_rows.dtype)
        out = result[piece] if exact else logits
        torch.add(log2_rows[piece], logits, alpha=LOG2E, out=out).exp2_()
        if not plain:
            out.mul_(factor[piece] if factor.ndim else factor)
        out.scatter_add_(1, labels[piece], at_label[piece])
        if not alive:
            out.masked_fill_(dead[piece], 0)
        if not exact:
            result[piece] = out
    return result


def pieces(input: Tensor) -> Iterator[slice]:
    """The rows of `input` in pieces of about PIECE bytes."""
    step = max(PIECE * len(input) // input.nbytes, 1)
    for start in range(0, len(input), step):
        yield slice(start, start + step)


def looked_into(grad: Tensor) -> bool:
    """Whether this backward is itself to be differentiated, or runs for a batch of gradients."""
    return torch.is_grad_enabled() or not torch._C._dispatch_keys(grad).has(_DENSE)


def differentiable(definition: Callable[[Tensor], Tensor], input: Tensor, grad: Tensor) -> Tensor:
    """The gradient by differentiating `definition`; with a graph of its own if that is wanted."""
    wanted = torch.is_grad_enabled()
    with torch.enable_grad():
        logits = input if wanted else input.detach().requires_grad_()
        value = definition(logits)
        (gradient,) = torch.autograd.grad(value, logits, grad, create_graph=wanted)
    return gradient
