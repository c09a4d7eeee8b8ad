r"""PENEX in eager mode: value and gradient in few passes over the logits.

:func:`penex.functional.penex_rows` is the definition, and what compilers, function transforms and
higher derivatives get; the tests hold this module to it. Here every operation on all N x K numbers
counts: there are few, they work on pieces that stay in the cache, and no more memory is taken than
the gradient needs. The gradient is separable over classes,

.. math:: \partial \ell_i / \partial f_{ij} = \rho\,\omega_i e^{f_{ij}}
   - \alpha\,\omega_i e^{-\alpha f_{ij}} 1[j = y_i],

so the exponentials of the value are, up to a factor for each row, the gradient.

:class:`_Plain` makes use of that on the CPU: it sums :math:`e^f` as it is and keeps it, and
:class:`_Dense` does the same for soft targets. What could overflow or lose digits that way is
left to :func:`robust_loss`, which shifts each row by its maximum, computes the exponentials of the
gradient anew, and never synchronises; or, for soft targets, to the definition.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from penex._inputs import smooth, weighted
from penex._penalty import Penalty, PenaltySums, Settled

LOG2E = 1 / math.log(2)
"""e^x is taken as 2^(x LOG2E): torch's exp2 is the faster one on the CPU, see benchmarks."""
PIECE = 1 << 20
"""Logits worked on at a time, few enough to stay in the cache."""
SAFE = 1e30
"""Between 1 / SAFE and SAFE nothing was lost to overflow or underflow that float32 could show."""

_DENSE = torch._C.DispatchKey.Dense  # what a tensor that stands for a batch of them lacks


def applies(input: Tensor) -> bool:
    """Whether this is a plain call in eager mode, which only autograd's backward looks into."""
    return (
        not torch.compiler.is_compiling()
        and type(input) in (Tensor, torch.nn.Parameter)
        and not input.is_meta
        and input.numel() > 0
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
    )


@dataclass(slots=True)
class Call:
    """A batch, and what is asked of it."""

    target: Tensor
    """Class indices, int64, (N, d1, ...), or class probabilities, (N, K, d1, ...)."""
    alpha: float
    weight: Tensor | None
    ignore_index: int
    label_smoothing: float
    log_threshold: float | None
    """Where huberization sets in, as a logarithm."""
    reduction: str
    penalty: Penalty
    definition: Callable[[Tensor, Settled], Tensor]
    """The loss of logits with what was settled, differentiable any number of times."""

    def rows(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Labels to gather with, and w_y, zero for ignored rows; both (N, 1, d1, ...)."""
        labels = self.target.unsqueeze(1)
        keep = labels != self.ignore_index
        labels = labels.where(keep, 0)
        if self.weight is None:
            return labels, keep.to(dtype)
        return labels, self.weight.to(dtype)[labels] * keep

    def weigh(self, values: Tensor, piece: slice) -> Tensor:
        """Turn `values`, v_ik of the rows `piece`, into w_k q_ik v_ik; returns omega_i."""
        dtype, smoothing = values.dtype, self.label_smoothing
        weight = None if self.weight is None else self.weight.to(dtype)
        if self.target.is_floating_point():
            mass = weighted(smooth(self.target[piece].to(dtype), smoothing), weight)
            values.mul_(mass)
            return mass.sum(1, keepdim=True)
        labels = self.target[piece].unsqueeze(1)
        kept = labels != self.ignore_index
        labels, keep = labels.where(kept, 0), kept.to(dtype)
        own = (1 - smoothing) * (keep if weight is None else weight[labels] * keep)
        at_label = own * values.gather(1, labels)
        others = smoothing / values.shape[1]
        if weight is not None:
            values.mul_(weight.view(-1, *[1] * (values.ndim - 2)))
        values.mul_(others)
        values.scatter_add_(1, labels, at_label).mul_(keep)
        all_classes = float(values.shape[1]) if weight is None else weight.sum()
        return own + others * all_classes * keep


def loss(input: Tensor, call: Call) -> Tensor | None:
    """The loss of `input`, (N, K, d1, ...), in float32 or float64; None: only by the definition.

    Raises:
        IndexError, RuntimeError: A label is out of range, on the CPU.
    """
    if call.target.requires_grad or (call.weight is not None and call.weight.requires_grad):
        return None  # here gradients are for the logits alone
    soft = call.target.is_floating_point() or call.label_smoothing > 0
    value = None
    if (
        input.is_cpu
        and call.reduction != "none"
        and call.log_threshold is None
        and call.penalty.local
    ):
        exact = input if input.dtype == torch.float64 else input.float()
        value = _unless_unsafe(_Dense if soft else _Plain, exact, call)
    return value if soft or value is not None else robust_loss(input, call)


# The plain way, on the CPU: e^f as it is.


@dataclass(slots=True)
class _Outcome:
    safe: bool = False


def _unless_unsafe(
    function: type[torch.autograd.Function], input: Tensor, call: Call
) -> Tensor | None:
    outcome = _Outcome()
    value: Tensor = function.apply(input, call, outcome)  # type: ignore[no-untyped-call]
    return value if outcome.safe else None


def _safe(*values: float) -> bool:
    return all(1 / SAFE < value < SAFE for value in values)


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, call: Call, outcome: _Outcome) -> Tensor:
        labels, mass = call.target.unsqueeze(1), None
        try:  # gather checks the range, which finds ignored rows without another look
            if call.weight is not None or 0 <= call.ignore_index < input.shape[1]:
                raise IndexError
            true = input.gather(1, labels)
        except (IndexError, RuntimeError):
            labels, mass = call.rows(input.dtype)
            true = input.gather(1, labels)
        exponential = true.mul_(-call.alpha).exp_()
        if mass is not None:
            exponential.mul_(mass)
        powers = torch.empty_like(input) if ctx.needs_input_grad[0] else None
        sum_a, sum_s = exponential.sum().item(), _sum_powers(input, mass, powers)
        outcome.safe = _safe(sum_a, sum_s)
        if not outcome.safe:
            return input.new_empty(())
        rho = call.penalty.value(sum_a, sum_s)
        divisor = 1.0
        if call.reduction == "mean":
            divisor = float(labels.numel()) if mass is None else mass.sum().item()
        ctx.save_for_backward(input, labels, mass, exponential)
        ctx.powers, ctx.call, ctx.rho, ctx.divisor = powers, call, rho, divisor
        return torch.scalar_tensor((sum_a + rho * sum_s) / divisor, dtype=input.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        input, labels, mass, exponential = ctx.saved_tensors
        if _looked_into(grad):
            return _differentiable(ctx.call, _settled(ctx, input), input, grad), None, None
        # The kept exponentials become the gradient. A second backward computes them again.
        powers, ctx.powers = ctx.powers, None
        share = grad.item() / ctx.divisor
        at_label, factor = exponential * (-ctx.call.alpha * share), ctx.rho * share
        largest = abs(factor) if mass is None else abs(factor) * mass.max().item()
        if not (largest == 0 or 1 / SAFE < largest <= 1):
            # So large a factor would bring up what underflow has taken from the exponentials.
            log_rows = torch.zeros_like(exponential) if mass is None else mass.log()
            log_rows += math.log(abs(factor)) if factor else -math.inf
            sign = torch.full_like(grad, math.copysign(1.0, factor))
            return _gradient(input, labels, log_rows, sign, at_label), None, None
        if powers is None:
            powers = torch.empty_like(input)
            _sum_powers(input, mass, powers)
        powers.mul_(factor if mass is None else mass * factor)
        return powers.scatter_add_(1, labels, at_label), None, None


def _sum_powers(input: Tensor, mass: Tensor | None, out: Tensor | None) -> float:
    """sum_i omega_i sum_j e^{f_ij}; the powers themselves go to `out`, if given."""
    if input.numel() <= PIECE or len(input) == 1:
        powers = torch.mul(input, LOG2E, out=out).exp2_()
        return (powers.sum() if mass is None else (powers.sum(1, True) * mass).sum()).item()
    total = 0.0
    for piece in pieces(input):
        part, place = (None if rows is None else rows[piece] for rows in (mass, out))
        total += _sum_powers(input[piece], part, place)
    return total


class _Dense(torch.autograd.Function):
    """Soft targets: class probabilities, or class indices with label smoothing."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, call: Call, outcome: _Outcome) -> Tensor:
        powers = torch.empty_like(input)
        total = input.new_empty(input.shape[0], 1, *input.shape[2:])
        sum_a = 0.0
        for piece in pieces(input):
            part = _exponentials(input[piece], call.alpha)
            total[piece] = call.weigh(part, piece)
            sum_a += part.sum().item()
        sum_s = _sum_powers(input, total, powers)
        outcome.safe = _safe(sum_a, sum_s)
        if not outcome.safe:
            return input.new_empty(())
        rho = call.penalty.value(sum_a, sum_s)
        divisor = 1.0
        if call.reduction == "mean":
            rows = None if call.target.is_floating_point() else call.rows(input.dtype)[1]
            divisor = float(total.numel()) if rows is None else rows.sum().item()
        ctx.save_for_backward(input, total, call.target)
        ctx.powers = powers if ctx.needs_input_grad[0] else None
        ctx.call, ctx.rho, ctx.divisor = call, rho, divisor
        return torch.scalar_tensor((sum_a + rho * sum_s) / divisor, dtype=input.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        input, total, _ = ctx.saved_tensors
        if _looked_into(grad) or not 1 / SAFE < abs(grad.item()) * ctx.rho / ctx.divisor <= 1:
            return _differentiable(ctx.call, _settled(ctx, input), input, grad), None, None
        powers, ctx.powers = ctx.powers, None
        if powers is None:
            powers = torch.empty_like(input)
            _sum_powers(input, total, powers)
        share = grad.item() / ctx.divisor
        powers.mul_(total * (ctx.rho * share))
        for piece in pieces(input):
            part = _exponentials(input[piece], ctx.call.alpha)
            ctx.call.weigh(part, piece)
            powers[piece].sub_(part, alpha=ctx.call.alpha * share)
        return powers, None, None


def _settled(ctx: Any, input: Tensor) -> Settled:
    return Settled(math.log(ctx.rho), input.new_tensor(ctx.divisor))


def _exponentials(logits: Tensor, alpha: float) -> Tensor:
    """e^{-alpha f}."""
    return torch.mul(logits, -alpha * LOG2E).exp2_()


# The robust way, on every device: each row shifted by its maximum.


def robust_loss(input: Tensor, call: Call) -> Tensor:
    """The loss of any batch, on any device, in any dtype, with any reduction."""
    alpha, log_threshold = call.alpha, call.log_threshold
    with torch.no_grad():
        dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        labels, mass = call.rows(dtype)
        live, log_mass = mass > 0, mass.log()
        u = -alpha * input.gather(1, labels).to(dtype)
        log_slope = u if log_threshold is None else u.clamp(max=log_threshold)
        log_exponential = log_slope + log_mass
        if log_threshold is not None:
            log_exponential = log_exponential + torch.log1p(F.relu(u - log_threshold))
        log_exponential = log_exponential.masked_fill(~live, -math.inf)
        log_partition = (_log_partition(input, dtype) + log_mass).masked_fill(~live, -math.inf)
        sums = PenaltySums.of(log_exponential, log_partition, input.shape[1])
        settled = call.penalty.settle(sums, mass.sum())
        log_penalty = settled.log_penalty
        if call.reduction == "none":
            value = (log_exponential.exp() + (log_partition + log_penalty).exp()).squeeze(1)
            log_divisor = torch.zeros((), dtype=dtype, device=input.device)
        else:
            mean = call.reduction == "mean"
            log_divisor = settled.divisor().log() if mean else torch.zeros_like(sums.partition)
            value = (sums.exponential - log_divisor).exp()
            value = value + (sums.partition + (log_penalty - log_divisor)).exp()
        log_rows = log_mass + (log_penalty - log_divisor)
        log_slope = (log_slope + log_mass - log_divisor).masked_fill(~live, -math.inf)
    slope = -alpha * log_slope.exp()
    result: Tensor = _Robust.apply(  # type: ignore[no-untyped-call]
        input, value, labels, log_rows, slope, call, settled
    )
    return result


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
        if _looked_into(grad):
            return _differentiable(ctx.call, ctx.settled, input, grad), *[None] * 6
        if grad.ndim:
            grad = grad.unsqueeze(1)
        return _gradient(input, labels, log_rows, grad, slope * grad), *[None] * 6


def _log_partition(input: Tensor, dtype: torch.dtype) -> Tensor:
    """log sum_j e^{f_ij}, (N, 1, d1, ...)."""
    parts = []
    limits = torch.finfo(dtype)
    for piece in pieces(input):
        logits = input[piece].to(dtype)
        largest = logits.amax(1, keepdim=True).clamp_(limits.min, limits.max)
        powers = torch.sub(logits, largest).mul_(LOG2E).exp2_()
        parts.append(powers.sum(1, keepdim=True).log_().add_(largest))
    return torch.cat(parts)


def _gradient(
    input: Tensor, labels: Tensor, log_rows: Tensor, factor: Tensor, at_label: Tensor
) -> Tensor:
    """factor * exp(f + log_rows), plus `at_label` at the labels, rounded to the input's dtype once.

    `factor` is 0-d or has the shape of `log_rows`. Where log_rows is -inf the row is zero.
    """
    gradient = torch.empty_like(input)
    log2_rows, dead = log_rows * LOG2E, log_rows == -math.inf
    for piece in pieces(input):
        exact = input.dtype == log_rows.dtype
        logits = input[piece].to(log_rows.dtype)
        out = gradient[piece] if exact else torch.empty_like(logits)
        torch.add(log2_rows[piece], logits, alpha=LOG2E, out=out).exp2_()
        out.mul_(factor[piece] if factor.ndim else factor)
        out.scatter_add_(1, labels[piece], at_label[piece]).masked_fill_(dead[piece], 0)
        if not exact:
            gradient[piece] = out
    return gradient


def pieces(input: Tensor) -> Iterator[slice]:
    """The rows of `input` in pieces of about PIECE logits."""
    step = max(PIECE * len(input) // input.numel(), 1)
    for start in range(0, len(input), step):
        yield slice(start, start + step)


def _looked_into(grad: Tensor) -> bool:
    """Whether this backward is itself to be differentiated, or runs for a batch of gradients."""
    return torch.is_grad_enabled() or not torch._C._dispatch_keys(grad).has(_DENSE)


def _differentiable(call: Call, settled: Settled, input: Tensor, grad: Tensor) -> Tensor:
    """The gradient by differentiating the definition; with a graph of its own if that is wanted."""
    wanted = torch.is_grad_enabled()
    with torch.enable_grad():
        logits = input if wanted else input.detach().requires_grad_()
        value = call.definition(logits, settled)
        (gradient,) = torch.autograd.grad(value, logits, grad, create_graph=wanted)
    return gradient
