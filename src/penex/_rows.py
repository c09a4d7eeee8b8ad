r"""From logits to the numbers of the rows, and from the slopes in them to the gradient.

All that touches the N x K logits is here; what a loss is, :mod:`penex._row_losses` says. There are
three ways, with one result:

- The definition, by plain operations: for function transforms, forward mode, higher derivatives,
  export, and gradients of targets and weights.
- One pass forward and one backward, with the slopes by hand. On the CPU, in pieces that stay in the
  cache, by one exponential of the logits as they are if the loss can do with Z and nothing over- or
  underflows, and else by one softmax; either is kept and turned into the gradient in place. On
  other devices by the device's own log-softmax, and nothing waits for the device.
- The same for a compiler: expressions that fuse, without a scatter.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.autograd.function import once_differentiable

from penex import _passes
from penex._inputs import LossArguments, can_inspect, computed_in, prepare, refuse_labels
from penex._log_mean import row_dtype
from penex._passes import (
    WHOLE,
    Pass,
    in_pieces,
    log_softmax,
    part,
    pieces,
    powers,
    powers_from,
    row_log_sums,
    softmax,
)
from penex._row_losses import Outcome, RowLoss, Rows, log_partition
from penex._targets import Labels, SoftTargets

SMALL_BATCH = 1 << 15
"""So few logits that memory does not matter."""
_DENSE = torch._C.DispatchKey.Dense  # what a tensor that stands for a batch of them lacks
MIN_PROBABILITY = 1e-30
"""A probability from here on has all its digits, and so has its logarithm."""


def loss_of(input: Tensor, arguments: LossArguments, loss: RowLoss) -> Tensor:
    """The loss of logits (N, K, d1, ...) of any dtype, in float32 or float64.

    Raises:
        IndexError: A label is out of range, on the CPU.
    """
    try:
        if not _differentiated_once(input, arguments, loss):
            return defined(input, arguments, loss)
        if torch.compiler.is_compiling():
            return _traced(input, arguments, loss)
        try:
            value: Tensor = _ByRows.apply(input, arguments, loss)  # type: ignore[no-untyped-call]
            return value
        except _InexactError:
            return defined(input, arguments, loss)
    except (IndexError, RuntimeError) as error:  # the range check of the indexing kernels
        if not arguments.target.is_floating_point():
            refuse_labels(arguments.target, input.shape[1], arguments.ignore_index, error)
        raise


def _differentiated_once(input: Tensor, arguments: LossArguments, loss: RowLoss) -> bool:
    """Whether autograd's backward, for the logits alone, is all that will look into this call."""
    if (
        type(input) not in (Tensor, torch.nn.Parameter)
        or input.is_meta
        or input.numel() == 0
        or torch._C._are_functorch_transforms_active()
        or not loss.by_rows(arguments.soft)
        or arguments.target.requires_grad
        or (arguments.weight is not None and arguments.weight.requires_grad)
    ):
        return False
    if torch.compiler.is_compiling():
        return not (arguments.soft or loss.slopes_by_autograd or _exporting())
    return forward_ad._current_level < 0 and (can_inspect(input) or not arguments.soft)


def _exporting() -> bool:
    """Whether this is traced by torch.export, which wants plain operations.

    Before torch 2.7 that cannot be told from compilation.
    """
    return not hasattr(torch.compiler, "is_exporting") or torch.compiler.is_exporting()


# The definition.


def defined(input: Tensor, arguments: LossArguments, loss: RowLoss, coupling: Any = None) -> Tensor:
    """The loss by plain operations; with `coupling`, for these constants."""
    if input.shape[1] == 0:
        nothing = input.to(computed_in(input)).sum(1)
        return nothing if arguments.reduction == "none" else nothing.sum()
    value = loss.defined(prepare(input, arguments), arguments.reduction, coupling)
    return value.to(computed_in(input))


def _differentiable(
    input: Tensor, grad: Tensor, arguments: LossArguments, loss: RowLoss, coupling: Any
) -> Tensor:
    """The gradient by differentiating the definition; with a graph if that is wanted."""
    wanted = torch.is_grad_enabled()
    with torch.enable_grad():
        logits = input if wanted else input.detach().requires_grad_()
        value = defined(logits, arguments, loss, coupling)
        (gradient,) = torch.autograd.grad(value, logits, grad, create_graph=wanted)
    return gradient


# One pass forward, one backward.


class _Evaluation(NamedTuple):
    """A loss at a batch, and what its gradient is made of."""

    outcome: Outcome
    make: Pass | None
    """The pass whose result becomes the gradient; None: the exponentials of Outcome.log_dz."""
    kept: Tensor | None
    """That result, if there is room for it."""


class _InexactError(ArithmeticError):
    """Soft targets whose numbers cannot be had exactly by sums of exponentials."""


class _ByRows(Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, arguments: LossArguments, loss: RowLoss) -> Tensor:
        keep = ctx.needs_input_grad[0] and (
            input.dtype.itemsize >= 4 or input.numel() <= SMALL_BATCH
        )
        target: Labels | SoftTargets
        if arguments.soft:
            target = SoftTargets(input, arguments, loss.alpha)
            found = _evaluate_soft(input, target, arguments, loss, keep)
        else:
            target = Labels(input, arguments)
            found = _evaluate_labels(input, target, arguments, loss, keep)
        ctx.arguments, ctx.loss, ctx.target, ctx.found = arguments, loss, target, found
        # The target and the class weights, so that changes before the backward are noticed.
        ctx.save_for_backward(input, arguments.target, arguments.weight if arguments.soft else None)
        value, dtype = found.outcome.value, computed_in(input)
        return value if value.dtype == dtype else value.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, *_ = ctx.saved_tensors
        found: _Evaluation = ctx.found
        factor: Tensor | float = grad.unsqueeze(1) if grad.ndim else grad
        dense, exact = torch._C._dispatch_keys(grad).has(_DENSE), True
        if dense and grad.ndim == 0 and can_inspect(input):
            factor = grad.item()
            # So large a factor would bring up what underflow has taken from the exponentials.
            exact = found.make is not powers or 1e-15 < abs(factor) < 1e15
        if torch.is_grad_enabled() or not dense or not exact:
            coupling = found.outcome.coupling
            return _differentiable(input, grad, ctx.arguments, ctx.loss, coupling), None, None
        if found.kept is not None:  # it becomes the gradient, once
            ctx.found = _Evaluation(found.outcome, found.make, None)
        return _gradient(input, found, ctx.target, factor), None, None


def _evaluate_labels(
    input: Tensor, target: Labels, arguments: LossArguments, loss: RowLoss, keep: bool
) -> _Evaluation:
    t, inspect = target.select(input), can_inspect(input)
    if inspect and loss.can_use_partition(arguments.reduction):
        kept, (partition,) = in_pieces(powers, input, keep, _sum)
        outcome = _from_partition(t, partition, target, arguments, loss)
        if outcome is not None:
            return _Evaluation(outcome, powers, kept)
    make: Pass | None
    if inspect:
        make, kept, s, log_p = _numbers_on_cpu(input, t, target, loss, keep)
        t = t.to(s.dtype)
    else:
        make, kept = log_softmax, torch.log_softmax(input, 1, dtype=t.dtype)
        t, log_p = t.to(row_dtype(t)), kept.gather(1, target.index).to(row_dtype(t))
        s = (t - log_p).masked_fill(t == -math.inf, 0)
    outcome = loss.on_rows(_rows(t, s, log_p, target, arguments, input.shape[1]))
    if outcome.log_dz is not None:
        make, kept = None, None
    return _Evaluation(outcome, make, kept if keep else None)


def _numbers_on_cpu(
    input: Tensor, t: Tensor, target: Labels, loss: RowLoss, keep: bool
) -> tuple[Pass, Tensor | None, Tensor, Tensor]:
    """How the softmax is made, the softmax if it may be kept, s, and log p."""
    kept = None
    if not loss.overflows:
        kept, (p,) = in_pieces(softmax, input, keep, target.select)
        if target.skipped is not None:
            p = p.masked_fill(target.skipped, 1)
        if p.amin().item() > MIN_PROBABILITY:
            log_p = p.log_()
            if loss.uses_t_and_s_apart:
                t, log_p = t.to(row_dtype(t)), log_p.to(row_dtype(t))
            return softmax, kept, t - log_p, log_p
    _, (sums,) = in_pieces(row_log_sums, input, False, lambda made, _: made)
    largest, log_sum = sums.to(row_dtype(t)).tensor_split(2, 1)
    return softmax, kept, largest + log_sum, t - largest - log_sum


def _evaluate_soft(
    input: Tensor, target: SoftTargets, arguments: LossArguments, loss: RowLoss, keep: bool
) -> _Evaluation:
    if loss.can_use_partition(arguments.reduction):
        t = target.logit(input)
        if t is None:
            raise _InexactError
        kept, (partition,) = in_pieces(powers, input, keep, _sum)
        outcome = _from_partition(t, partition, target, arguments, loss)
        if outcome is None:
            raise _InexactError
        return _Evaluation(outcome, powers, kept)
    kept, (log_p, top) = in_pieces(
        log_softmax, input, keep, target.mean, lambda made, _: made.amax(1, True)
    )
    if loss.overflows or not loss.sums_rows or not log_p.isfinite().all():
        raise _InexactError
    s = input.amax(1, True) - top
    outcome = loss.on_rows(_rows(s + log_p, s, log_p, target, arguments, input.shape[1]))
    return _Evaluation(outcome, log_softmax, kept)


def _sum(made: Tensor, piece: slice) -> Tensor:
    return made.sum(1, True)


def _from_partition(
    t: Tensor,
    partition: Tensor,
    target: Labels | SoftTargets,
    arguments: LossArguments,
    loss: RowLoss,
) -> Outcome | None:
    if target.skipped is not None:
        t, partition = t.masked_fill(target.skipped, 0), partition.masked_fill(target.skipped, 1)
    return loss.from_partition(
        t, partition, target.weights, target.denominator, arguments.reduction
    )


def _rows(
    t: Tensor,
    s: Tensor,
    log_p: Tensor,
    target: Labels | SoftTargets,
    arguments: LossArguments,
    num_classes: int,
) -> Rows:
    """The numbers of the rows, zero where nothing counts."""
    if target.skipped is not None:
        t, s, log_p = (x.masked_fill(target.skipped, 0) for x in (t, s, log_p))
    return Rows(t, s, log_p, target.weights, target.denominator, arguments.reduction, num_classes)


def _gradient(
    input: Tensor, found: _Evaluation, target: Labels | SoftTargets, factor: Tensor | float
) -> Tensor:
    """factor * (ds p + dt v), rounded to the input's dtype once."""
    outcome, make, kept = found
    dtype, skipped = computed_in(input), target.skipped
    dt = _times(outcome.dt, factor, dtype)
    if not isinstance(dt, Tensor) or dt.ndim == 0:
        dt = torch.as_tensor(dt, dtype=dtype, device=input.device).expand(input[:, :1].shape)
    exponents: Tensor | None = None
    scale: Tensor | float | None
    if make is None:
        assert outcome.log_dz is not None  # noqa: S101
        exponents, scale = _times_log(outcome.log_dz, factor)
    else:
        scale = _times(outcome.ds, factor, dtype)

    def rows(piece: slice) -> Tensor:
        x = part(input, piece)
        if make is None:
            made = powers_from(x, _of(exponents, piece))
        else:
            made = make(x, None) if kept is None else part(kept, piece)
        if make is log_softmax:
            made.exp_()
        if scale is not None:
            made.mul_(_of(scale, piece))
        target.add_to(made, x, piece, dt)
        return made if skipped is None else made.masked_fill_(part(skipped, piece), 0)

    # In pieces where something would be made that is not kept, on the CPU.
    whole = input.nbytes <= _passes.PIECE_BYTES or (kept is not None and isinstance(target, Labels))
    if whole or not can_inspect(input):
        made = rows(WHOLE)
        return made if made.dtype == input.dtype else made.to(input.dtype)
    result = torch.empty_like(input) if kept is None else kept
    for piece in pieces(input):
        made = rows(piece)
        if kept is None:
            result[piece] = made
    return result.to(input.dtype)


def _times(slope: Tensor | float, factor: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    if isinstance(factor, Tensor) or factor != 1:
        slope = slope * factor
    return slope.to(dtype) if isinstance(slope, Tensor) and slope.dtype != dtype else slope


def _times_log(log_slope: Tensor, factor: Tensor | float) -> tuple[Tensor, Tensor | float | None]:
    """log |factor slope|, and the factor's sign; None: it is positive."""
    if isinstance(factor, Tensor):
        return log_slope + factor.abs().log(), factor.sign()
    if factor == 1:
        return log_slope, None
    return log_slope + (math.log(abs(factor)) if factor else -math.inf), math.copysign(1.0, factor)


def _of(x: Any, piece: slice) -> Any:
    """The rows `piece` of one number for each row, or the one number for all."""
    return part(x, piece) if isinstance(x, Tensor) and x.ndim else x


# The same for a compiler.


def _traced(input: Tensor, arguments: LossArguments, loss: RowLoss) -> Tensor:
    with torch.no_grad():
        target = Labels(input, arguments)
        t = target.select(input).to(row_dtype(input))
        largest, log_sum = log_partition(input.to(computed_in(input)))
        s, log_p = largest + log_sum, t - largest - log_sum
        outcome = loss.on_rows(_rows(t, s, log_p, target, arguments, input.shape[1]))
        # The gradient's class part is scale * exp(f + exponents).
        exponents, scale = -s, outcome.ds
        if outcome.log_dz is not None:
            exponents, scale = outcome.log_dz, 1.0
        dtype = computed_in(input)
        rows = (torch.as_tensor(x, dtype=dtype, device=input.device).expand(t.shape)
                for x in (exponents, scale, outcome.dt))  # fmt: skip
    value: Tensor = _Traced.apply(  # type: ignore[no-untyped-call]
        input, outcome.value.to(dtype), target.index, target.skipped, *rows
    )
    return value


class _Traced(Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        value: Tensor,
        index: Tensor,
        skipped: Tensor | None,
        exponents: Tensor,
        scale: Tensor,
        dt: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(input, index, skipped, exponents, scale, dt)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, index, skipped, exponents, scale, dt = ctx.saved_tensors
        grad = grad.unsqueeze(1) if grad.ndim else grad
        # The label's part by comparison: a scatter would be a pass over the memory of its own.
        classes = torch.arange(input.shape[1], device=input.device)
        is_label = classes.view(-1, *[1] * (input.ndim - 2)) == index
        made = torch.exp(input.to(dt.dtype) + exponents) * (scale * grad)
        if skipped is not None:
            made = made.masked_fill(skipped, 0)
        gradient = made + (dt * grad).where(is_label, 0)
        return gradient.to(input.dtype), *[None] * 6
