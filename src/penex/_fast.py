r"""PENEX in few passes over the logits.

:func:`penex.functional.penex_rows` is the definition, and what function transforms and higher
derivatives get; the tests hold everything else to it. Here each operation on all N x K numbers
counts: there are few, they work on pieces that stay in the cache, and no more memory is taken than
the gradient needs. The gradient is separable over classes,

.. math:: \partial \ell_i / \partial f_{ij} = \rho\,\omega_i e^{f_{ij}}
   - \alpha\,\omega_i e^{-\alpha f_{ij}} 1[j = y_i],

so the exponentials of the value are, up to a factor for each row, the gradient.

:class:`_Plain` makes use of that on the CPU: it sums :math:`e^f` as it is and keeps it, and
:class:`_Dense` does the same for soft targets. What could overflow or lose digits that way is left
to :mod:`penex._robust`, which also serves other devices and compilers; or, for soft targets, to the
definition.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from penex import _robust
from penex._inputs import labels_of, refuse_labels, smooth, weighted
from penex._penalty import Settled
from penex._robust import (
    LOG2E,
    Asked,
    Call,
    compiled_loss,
    computed_in,
    differentiable,
    gradient,
    looked_into,
    pieces,
    robust_loss,
)

SMALL = 1 << 15
"""So few logits that memory does not matter."""
SAFE = 1e30
"""Between 1 / SAFE and SAFE nothing was lost to overflow or underflow that float32 could show."""


C = TypeVar("C", bound=Asked)


def fastest(
    input: Tensor,
    call: C,
    fast: Callable[[Tensor, C], Tensor | None],
    definition: Callable[[Tensor, C], Tensor],
) -> Tensor:
    """The loss of `input`, (N, K, d1, ...), by the fast way, or where that cannot be asked or
    passes (None), by the definition.

    Raises:
        IndexError: A label is out of range, on the CPU.
    """
    value = None
    if _applies(input):
        target = call.target
        if not target.is_floating_point():
            call.target = labels_of(target, input, call.ignore_index)
        try:
            value = fast(input, call)
        except (IndexError, RuntimeError) as error:
            refuse_labels(target, input, call.ignore_index, error)
            raise
    return definition(input, call) if value is None else value


def _applies(input: Tensor) -> bool:
    """Whether autograd's backward is all that will look into this call."""
    return (
        type(input) in (Tensor, torch.nn.Parameter)
        and not input.is_meta
        and input.numel() > 0
        and not torch._C._are_functorch_transforms_active()
    )


def fast_loss(input: Tensor, call: Call) -> Tensor | None:
    """The loss of `input`, (N, K, d1, ...), of any dtype; None: only by the definition.

    Integer targets in `call` are class indices.

    Raises:
        IndexError, RuntimeError: A label is out of range, on the CPU.
    """
    if call.target.requires_grad or (call.weight is not None and call.weight.requires_grad):
        return None  # here gradients are for the logits alone
    soft = call.target.is_floating_point() or call.label_smoothing > 0
    if torch.compiler.is_compiling():
        return None if soft or _exporting() else compiled_loss(input, call)
    if forward_ad._current_level >= 0:
        return None
    if (
        input.is_cpu
        and call.reduction != "none"
        and call.log_threshold is None
        and call.penalty.local
    ):
        try:
            value: Tensor = (_Dense if soft else _Plain).apply(input, call)  # type: ignore[no-untyped-call]
            return value
        except _UnsafeError:
            pass
    return None if soft else robust_loss(input, call)


def _exporting() -> bool:
    """Whether this is traced by torch.export, which wants plain operations.

    Before torch 2.7 that cannot be told from compilation.
    """
    return not hasattr(torch.compiler, "is_exporting") or torch.compiler.is_exporting()


@functools.lru_cache(16)
def constant(value: float, dtype: torch.dtype) -> Tensor:
    """A number that many calls multiply with: by a tensor that takes half the time, if small."""
    return torch.tensor(value, dtype=dtype, device="cpu")


# The plain way, on the CPU: e^f as it is.


class _UnsafeError(ArithmeticError):
    """A sum over- or underflowed, or nearly."""


def _safe(sum_a: float, sum_s: float) -> bool:
    return 1 / SAFE < sum_a < SAFE and 1 / SAFE < sum_s < SAFE


class _Plain(torch.autograd.Function):
    """Class indices."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, call: Call) -> Tensor:
        labels, mass = call.rows(computed_in(input), call.all_kept())
        true = input.gather(1, labels)
        if true.dtype.itemsize < 4:
            true = true.float()
        dtype = true.dtype
        exponential = true.mul_(constant(-call.alpha, dtype)).exp_()
        if mass is not None:
            exponential.mul_(mass)
        sum_a = exponential.sum().item()
        sum_s, powers = _sum_powers(input, mass, ctx.needs_input_grad[0])
        if not _safe(sum_a, sum_s):
            raise _UnsafeError
        rho = call.penalty.value(sum_a, sum_s)
        divisor = 1.0
        if call.reduction == "mean":
            divisor = float(labels.numel()) if mass is None else mass.sum().item()
        ctx.save_for_backward(input, labels, mass)
        ctx.exponential, ctx.powers = exponential, powers
        ctx.call, ctx.rho, ctx.divisor = call, rho, divisor
        return torch.scalar_tensor((sum_a + rho * sum_s) / divisor, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        input, labels, mass = ctx.saved_tensors
        if looked_into(grad):
            return differentiable(ctx.call.given(_settled(ctx, input)), input, grad), None
        powers, ctx.powers = ctx.powers, None
        share = grad.item() / ctx.divisor
        exponential, factor = ctx.exponential, ctx.rho * share
        at_label = exponential * constant(-ctx.call.alpha * share, exponential.dtype)
        largest = abs(factor) if mass is None else abs(factor) * mass.max().item()
        if not (largest == 0 or 1 / SAFE < largest <= 1):
            # So large a factor would bring up what underflow has taken from the exponentials.
            log_rows = torch.zeros_like(exponential) if mass is None else mass.log()
            log_rows += math.log(abs(factor)) if factor else -math.inf
            sign = torch.full_like(grad, math.copysign(1.0, factor))
            return gradient(input, labels, log_rows, sign, at_label), None

        factor = factor if mass is None else mass * factor
        if powers is not None:  # they become the gradient
            return powers.mul_(factor).scatter_add_(1, labels, at_label).to(input.dtype), None
        result = torch.empty_like(input)
        for piece in pieces(input):
            part = powers_of(input[piece])
            part.mul_(factor if mass is None else factor[piece])
            result[piece] = part.scatter_add_(1, labels[piece], at_label[piece])
        return result, None


def _sum_powers(input: Tensor, mass: Tensor | None, keep: bool) -> tuple[float, Tensor | None]:
    """sum_i omega_i sum_j e^{f_ij}; and the e^{f_ij} where they are asked for."""
    keep = keep and may_keep(input)
    if input.nbytes <= _robust.PIECE:
        powers = powers_of(input)
        return _total(powers, mass), powers if keep else None
    kept = torch.empty_like(input) if keep else None
    total = 0.0
    for piece in pieces(input):
        powers = powers_of(input[piece], out=None if kept is None else kept[piece])
        total += _total(powers, None if mass is None else mass[piece])
    return total, kept


def may_keep(logits: Tensor) -> bool:
    """Whether to keep the exponentials: those of half precision, which are kept in float32 so that
    the gradient is rounded once, only in small batches.
    """
    return logits.dtype.itemsize >= 4 or logits.numel() <= SMALL


def powers_of(logits: Tensor, factor: float = 1.0, out: Tensor | None = None) -> Tensor:
    """e^{factor f}, in float32 or float64."""
    if logits.dtype.itemsize < 4:
        logits = out = logits.float()
    return torch.mul(logits, constant(factor * LOG2E, logits.dtype), out=out).exp2_()


def _total(powers: Tensor, mass: Tensor | None) -> float:
    return (powers.sum() if mass is None else (powers.sum(1, True) * mass).sum()).item()


class Mass:
    """m_ik = w_k q_ik, the masses of soft targets, never all of them at a time."""

    def __init__(self, input: Tensor, call: Asked) -> None:
        dtype = computed_in(input)
        self.target, self.smoothing = call.target, call.label_smoothing
        self.weight = self.keep = self.own = None
        classes, all_classes = input.shape[1], float(input.shape[1])
        if call.weight is not None:
            self.weight = call.weight.to(dtype).view(-1, *[1] * (input.ndim - 2))
            all_classes = self.weight.sum().item()
        self.total: Tensor | None
        """omega_i = sum_k m_ik, (N, 1, d1, ...); None: one everywhere."""
        if call.target.is_floating_point():
            self.total = torch.cat([
                weighted(call.target[piece].to(dtype), call.weight).sum(1, True)
                for piece in pieces(input)
            ])  # fmt: skip
            self.denominator = float(self.total.numel())
        else:
            all_kept = call.all_kept()
            self.labels, self.own = call.rows(dtype, all_kept)
            if not all_kept:
                self.keep = (call.target != call.ignore_index).unsqueeze(1).to(dtype)
            self.total = self.own
            rows = self.labels.numel() if self.own is None else self.own.sum().item()
            self.denominator = float(rows)
        if self.smoothing and self.total is not None:
            others = self.smoothing * all_classes / classes
            self.total = (1 - self.smoothing) * self.total + (
                others if self.keep is None else others * self.keep
            )

    def times(self, values: Tensor, piece: slice) -> tuple[float, Tensor | None]:
        """Make v_ik of the rows `piece` into m_ik v_ik = factor * values, plus more at the labels.

        Returns:
            The factor, and what to add at the labels; None: nothing.
        """
        if self.target.is_floating_point():
            weight = None if self.weight is None else self.weight.flatten()
            target = self.target[piece].to(values.dtype)
            values.mul_(weighted(smooth(target, self.smoothing), weight))
            return 1.0, None
        at_label = values.gather(1, self.labels[piece]).mul_(1 - self.smoothing)
        if self.own is not None:
            at_label.mul_(self.own[piece])
        for factor in (self.weight, None if self.keep is None else self.keep[piece]):
            if factor is not None:
                values.mul_(factor)
        return self.smoothing / values.shape[1], at_label


class _Dense(torch.autograd.Function):
    """Soft targets: class probabilities, or class indices with label smoothing."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, call: Call) -> Tensor:
        mass, sum_a = Mass(input, call), 0.0
        for piece in pieces(input):
            values = powers_of(input[piece], -call.alpha)
            factor, at_label = mass.times(values, piece)
            sum_a += factor * values.sum().item()
            sum_a += 0.0 if at_label is None else at_label.sum().item()
        sum_s, powers = _sum_powers(input, mass.total, ctx.needs_input_grad[0])
        if not _safe(sum_a, sum_s):
            raise _UnsafeError
        rho = call.penalty.value(sum_a, sum_s)
        ctx.save_for_backward(input, call.target)
        ctx.divisor = mass.denominator if call.reduction == "mean" else 1.0
        ctx.powers, ctx.call, ctx.mass, ctx.rho = powers, call, mass, rho
        return torch.scalar_tensor((sum_a + rho * sum_s) / ctx.divisor, dtype=computed_in(input))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        input, _ = ctx.saved_tensors
        call, mass = ctx.call, ctx.mass
        share = 0.0 if looked_into(grad) else grad.item() / ctx.divisor
        if not 1 / SAFE < abs(share) * ctx.rho <= 1:
            return differentiable(call.given(_settled(ctx, input)), input, grad), None
        powers, ctx.powers = ctx.powers, None
        result = powers if powers is not None else torch.empty_like(input)
        for piece in pieces(input):
            part = powers_of(input[piece]) if powers is None else powers[piece]
            total = 1.0 if mass.total is None else mass.total[piece]
            part.mul_(total * (ctx.rho * share))
            values = powers_of(input[piece], -call.alpha)
            factor, at_label = mass.times(values, piece)
            part.sub_(values, alpha=call.alpha * share * factor)
            if at_label is not None:
                part.scatter_add_(1, mass.labels[piece], at_label.mul_(-call.alpha * share))
            if powers is None:
                result[piece] = part
        return result.to(input.dtype), None


def _settled(ctx: Any, input: Tensor) -> Settled:
    divisor = torch.tensor(ctx.divisor, dtype=computed_in(input), device=input.device)
    return Settled(math.log(ctx.rho), divisor)
