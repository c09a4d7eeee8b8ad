r"""PENEX in the log domain: the mathematics, and the same numbers in few passes over the logits.

With masses :math:`m_{ik} = w_k q_{ik}`, :math:`\omega_i = \sum_k m_{ik}`,
:math:`W = \sum_i \omega_i` and partitions :math:`Z_i = \sum_j e^{f_{ij}}`

.. math:: J = \frac1\alpha \log \frac1W \sum_{ik} m_{ik} e^{-\alpha f_{ik}}
   + \frac1\beta \log \frac1W \sum_i \omega_i Z_i^\beta

is a sum of two levels, each a power mean taken in the log domain (:func:`log_mean`), of
:math:`-f_y` with power :math:`\alpha` and of :math:`\log Z` with power :math:`\beta`. A level of
levels is a level, which is how rows, classes and processes are put together.

Next to its levels :math:`a, b` at the batch J is the sum over the rows of its tangent,

.. math:: \ell_i = \omega_i (a + b) + \sum_k m_{ik} \frac{e^{\alpha(-f_{ik}-a)} - 1}{\alpha}
   + \omega_i \frac{e^{\beta(\log Z_i - b)} - 1}{\beta},

in value and in gradient. These are the rows of ``reduction="none"``.

The numbers of the rows, few as they are, are kept in float64, where a difference of logits of any
size, times any power, is felt.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from penex import _robust
from penex._fast import SAFE, Mass, constant, may_keep, powers_of
from penex._robust import LOG2E, Asked, computed_in, differentiable, looked_into, pieces

TINY = 1e-25
"""A power below this is zero: no logits that a float32 network has show the difference."""
_LEAST_POWER = 1e-2
"""From this power on a level in float64 is as exact by the plain formula."""
_LEAST_SUM = 1e-280
"""From here on sums in float64 have lost nothing to underflow."""
_SAFE = 1e15
"""Between 1 / SAFE and SAFE sums in float32, and products of three of them, are right."""
_FEW = 1 << 12
"""So few logits that float64 costs less than calls."""
_LARGEST_EXPONENT = 80.0
_HUGE = 1e30
"""Stands for an infinite distance between logits: times a mass of zero it is zero."""


class Levels(NamedTuple):
    """What a row has to know of the other rows."""

    label: float | Tensor
    """a, the level of -f_y."""
    partition: float | Tensor
    """b, the level of log Z."""
    divisor: float | Tensor
    """What the sum over the rows is divided by."""


@dataclass(slots=True, kw_only=True)
class LogCall(Asked):
    """What is asked of the loss in the log domain."""

    alpha: float
    beta: float
    group: dist.ProcessGroup | None
    """The processes whose batches are one."""

    @property
    def by_rows(self) -> bool:
        """Whether the value is made of the tangent's rows, with levels that are constants."""
        return self.reduction == "none" or self.group is not None


# The definition: any target, any derivative, any transform, any compiler.


def log_defined(input: Tensor, call: LogCall, levels: Levels | None = None) -> Tensor:
    """The loss by the definition; with these levels, constants, or with those of `input`."""
    batch = call.batch(input)
    if batch.logits.numel() == 0:
        rows = batch.logits.sum(1)
        return rows if call.reduction == "none" else rows.sum()
    negative = -batch.select(batch.logits)
    if batch.labels is None:
        label = log_mean(negative, batch.mass, call.alpha, 1)
    else:
        label = negative.squeeze(1).to(_wide(input))
    largest = batch.logits.detach().amax(1, keepdim=True)
    largest = largest.where(largest > -math.inf, 0)
    powers = (batch.logits - largest).exp().sum(1)
    partition = largest.squeeze(1).to(label.dtype) + powers.to(label.dtype).log()
    total = batch.total.to(label.dtype)
    if levels is None:
        levels = _levels(label, partition, total, batch.denominator, call)
    return _value(label, partition, total, levels, call).to(batch.logits.dtype)


def log_mean(values: Tensor, mass: Tensor, power: float, dim: int) -> Tensor:
    r"""The level :math:`\frac1p \log \frac{\sum m e^{p v}}{\sum m}` along `dim`, in wide numbers.

    The limit, the mean of the values, for p = 0; 0 where there is no mass. From the largest value
    on, all exponents are negative; those near zero are summed as :math:`e^{pv} - 1`, so that a tiny
    power loses no digit when the logarithm is divided by it.
    """
    live = mass > 0
    total = mass.sum(dim, keepdim=True)
    shares = mass / total.where(total != 0, 1)
    limits = torch.finfo(values.dtype)
    values = values.clamp(limits.min, limits.max)
    largest = values.detach().masked_fill(~live, -math.inf).amax(dim, keepdim=True)
    largest = largest.where(live.any(dim, keepdim=True), 0)
    gap = (values - largest).clamp(-_HUGE, _HUGE)
    largest = largest.squeeze(dim).to(_wide(values))
    if power < TINY:
        return largest + (shares * gap).sum(dim).to(largest.dtype)
    exponent = _exponent(gap, power, live)
    near, far = (shares * exponent.expm1()).sum(dim), (shares * exponent.exp()).sum(dim)
    close = near > -0.5
    logarithm = near.where(close, 0).log1p().where(close, far.where(~close, 1).log())
    return largest + logarithm.to(largest.dtype) / power


def _levels(
    label: Tensor, partition: Tensor, total: Tensor, denominator: Tensor, call: LogCall
) -> Levels:
    """The levels of a batch with these rows, or of the batches of all processes."""
    mass = total.flatten()
    a = log_mean(label.flatten(), mass, call.alpha, 0)
    b = log_mean(partition.flatten(), mass, call.beta, 0)
    if call.group is not None:
        a, b, denominator = _over_ranks(a, b, mass.sum(), denominator, call, call.group)
    elif call.by_rows:
        a, b = a.detach(), b.detach()  # as no_grad would leave forward mode's derivatives in place
    divisor = 1.0 if call.reduction != "mean" else denominator.where(denominator != 0, 1)
    return Levels(a, b, divisor)


def _over_ranks(
    a: Tensor,
    b: Tensor,
    mass: Tensor,
    denominator: Tensor,
    call: LogCall,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor]:
    """The levels of all ranks of `group`, and the mean of their denominators.

    One collective of four numbers. Divided by that mean, the ranks' losses and gradients average,
    as DistributedDataParallel does it, to those of the joined batch.
    """
    local = torch.stack([a, b, mass, denominator.to(a.dtype)]).detach()
    ranks = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(ranks, local, group=group)
    labels, partitions, masses, denominators = torch.stack(ranks).unbind(1)
    return (
        log_mean(labels, masses, call.alpha, 0),
        log_mean(partitions, masses, call.beta, 0),
        denominators.mean(),
    )


def _value(
    label: Tensor, partition: Tensor, total: Tensor, levels: Levels, call: LogCall
) -> Tensor:
    """The loss of these rows, by the levels alone or by the rows of the tangent."""
    value = levels.label + levels.partition
    if not call.by_rows:
        return total.sum() * value / levels.divisor
    excess = _excess(label - levels.label, call.alpha, total > 0)
    excess = excess + _excess(partition - levels.partition, call.beta, total > 0)
    rows = total * (value + excess)
    return rows if call.reduction == "none" else rows.sum() / levels.divisor


def _excess(gap: Tensor, power: float, live: Tensor) -> Tensor:
    """(e^{p gap} - 1) / p."""
    gap = gap.clamp(-_HUGE, _HUGE)
    return gap if power < TINY else _exponent(gap, power, live).expm1() / power


def _exponent(gap: Tensor, power: float, live: Tensor) -> Tensor:
    """Power times gap, and no infinite exponential where there is no mass."""
    exponent = power * gap
    return exponent.where(live, exponent.clamp(max=_LARGEST_EXPONENT))


def _wide(values: Tensor) -> torch.dtype:
    return torch.float32 if values.device.type == "mps" else torch.float64


# The fast way: one pass for the partitions, whose terms are kept and become the gradient.


def fast_log_loss(input: Tensor, call: LogCall) -> Tensor | None:
    """The loss in eager mode, differentiated in the logits alone; None: only by the definition."""
    if (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or call.target.requires_grad
        or (call.weight is not None and call.weight.requires_grad)
    ):
        return None
    if call.target.is_floating_point() or call.label_smoothing > 0:
        if not input.is_cpu or call.by_rows:
            return None
        try:
            dense: Tensor = _Dense.apply(input, call)  # type: ignore[no-untyped-call]
            return dense
        except ArithmeticError:
            return None
    if input.is_cpu and not call.by_rows and _exact(call.alpha) and _exact(call.beta):
        for kind in (_Small, _Plain) if _is_small(input, call) else (_Plain,):
            try:
                plain: Tensor = kind.apply(input, call)  # type: ignore[no-untyped-call]
                return plain
            except ArithmeticError:
                pass
    value: Tensor = _Labels.apply(input, call)  # type: ignore[no-untyped-call]
    return value


class _Labels(torch.autograd.Function):
    """Class indices, on any device."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, call: LogCall) -> Tensor:
        wide = _wide(input)
        labels, mass = call.rows(wide, input.is_cpu and call.all_kept())
        label = input.gather(1, labels).to(wide).neg_()
        largest, sums, powers = _partitions(input, ctx.needs_input_grad[0])
        partition = sums.to(wide).log().add_(largest)
        mass = torch.ones_like(label) if mass is None else mass
        label.masked_fill_(mass == 0, 0).clamp_(max=torch.finfo(wide).max)
        partition.masked_fill_(mass == 0, 0)
        levels = _levels(label, partition, mass, mass.sum(), call)
        result = _value(label.squeeze(1), partition.squeeze(1), mass.squeeze(1), levels, call)
        result = result.to(computed_in(input))
        ctx.save_for_backward(input, labels, mass)
        ctx.rows, ctx.powers = (label, partition, largest, sums), powers
        ctx.call, ctx.levels = call, levels
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        input, labels, mass = ctx.saved_tensors
        call, levels = ctx.call, ctx.levels
        if looked_into(grad):
            given = levels if call.by_rows else None
            return differentiable(
                lambda logits: log_defined(logits, call, given), input, grad
            ), None
        powers, ctx.powers = ctx.powers, None
        label, partition, largest, sums = ctx.rows
        share = grad.unsqueeze(1) if grad.ndim else grad / levels.divisor
        at_label = _slope(label, levels.label, call.alpha, mass).mul_(-share).to(sums.dtype)
        rows = _slope(partition, levels.partition, call.beta, mass).mul_(share).div_(sums)
        rows, dead = rows.to(sums.dtype), mass == 0
        if powers is not None:
            return _gradient(powers, rows, labels, at_label, dead).to(input.dtype), None
        result = torch.empty_like(input)
        for piece in pieces(input):
            result[piece] = _gradient(
                _shifted(input[piece], largest[piece]),
                rows[piece],
                labels[piece],
                at_label[piece],
                dead[piece],
            )
        return result, None


def _exact(power: float) -> bool:
    """Whether the plain formula gives the level of this power."""
    return power == 0 or power >= _LEAST_POWER


class _Plain(torch.autograd.Function):
    """Class indices, on the CPU: e^f as it is, where none is too large or too small for that."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, call: LogCall) -> Tensor:
        labels, mass = call.rows(torch.float64, call.all_kept())
        f_y = input.gather(1, labels).double()
        at_label = (f_y * constant(-call.alpha, torch.float64)).exp_()
        sums, powers = _sums(input, ctx.needs_input_grad[0])
        least, most = sums.aminmax()
        if not 1 / _SAFE < least.item() <= most.item() < _SAFE:
            raise ArithmeticError
        partition = sums.double()
        rows = partition.pow(call.beta - 1)  # its part of sum_i m_i Z_i^beta, over Z_i
        if mass is not None:
            at_label.mul_(mass)
            rows.mul_(mass)
        sum_a, sum_z = at_label.sum().item(), (rows * partition).sum().item()
        if not _in_range(sum_a, sum_z):
            raise ArithmeticError
        total = float(labels.numel()) if mass is None else mass.sum().item()
        a = math.log(sum_a / total) / call.alpha if call.alpha else -_sum(f_y, mass) / total
        b = (
            math.log(sum_z / total) / call.beta
            if call.beta
            else _sum(partition.log(), mass) / total
        )
        scale = 1.0 if call.reduction == "mean" else total
        ctx.save_for_backward(input, labels)
        ctx.call, ctx.powers = call, powers
        ctx.rows, ctx.at_label = rows.mul_(scale / sum_z), at_label.mul_(-scale / sum_a)
        return torch.scalar_tensor((a + b) * scale, dtype=computed_in(input))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        input, labels = ctx.saved_tensors
        share = 0.0 if looked_into(grad) else grad.item()
        if not 1 / _SAFE < abs(share) < _SAFE:
            return differentiable(lambda logits: log_defined(logits, ctx.call), input, grad), None
        powers, ctx.powers = ctx.powers, None
        dtype = computed_in(input)
        rows, at_label = (ctx.rows * share).to(dtype), (ctx.at_label * share).to(dtype)
        if powers is not None:
            return _gradient(powers, rows, labels, at_label, None).to(input.dtype), None
        result = torch.empty_like(input)
        for piece in pieces(input):
            part = powers_of(input[piece])
            result[piece] = _gradient(part, rows[piece], labels[piece], at_label[piece], None)
        return result, None


def _in_range(sum_a: float, sum_z: float) -> bool:
    """Whether what underflowed counts for nothing in both sums, in float64.

    Nor does it in the gradient, for all factors that it meets there are finite.
    """
    return min(sum_a, sum_z) > _LEAST_SUM and sum_a + sum_z < math.inf


def _is_small(input: Tensor, call: LogCall) -> bool:
    """Whether :class:`_Small` is to be tried."""
    return (
        input.ndim == 2
        and input.numel() <= _FEW
        and call.weight is None
        and not 0 <= call.ignore_index < input.shape[1]
    )


class _Small(torch.autograd.Function):
    """Class indices, in a batch so small that the calls take the time: as few as possible."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, call: LogCall) -> Tensor:
        labels, number = call.target.unsqueeze(1), input.shape[0]
        wide = input.double()
        try:
            f_y = wide.gather(1, labels)
        except RuntimeError as error:  # an ignored row's label is out of range, too
            raise ArithmeticError from error
        mean = 0.0 if call.alpha else f_y.mean().item()
        at_label = f_y.mul_(constant(-call.alpha, torch.float64)).exp_()
        powers = wide.exp() if input.dtype == wide.dtype else wide.exp_()
        partition = powers.sum(1)
        rows = partition.pow(call.beta - 1)  # its part of sum_i Z_i^beta, over Z_i
        total = torch.dot(rows, partition)
        sum_a, sum_z = at_label.sum().item(), total.item()
        if not _in_range(sum_a, sum_z):
            raise ArithmeticError
        a = math.log(sum_a / number) / call.alpha if call.alpha else -mean
        b = math.log(sum_z / number) / call.beta if call.beta else partition.log().mean().item()
        ctx.scale = 1 if call.reduction == "mean" else number
        if ctx.needs_input_grad[0]:
            gradient = powers.mul_(rows.div_(total).unsqueeze(1))
            ctx.gradient = gradient.scatter_add_(1, labels, at_label.mul_(-1 / sum_a))
        ctx.save_for_backward(input)
        ctx.call = call
        return torch.scalar_tensor((a + b) * ctx.scale, dtype=computed_in(input))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (input,) = ctx.saved_tensors
        if looked_into(grad):
            return differentiable(lambda logits: log_defined(logits, ctx.call), input, grad), None
        share = grad.item() * ctx.scale
        gradient = ctx.gradient if share == 1 else ctx.gradient * share
        return gradient.to(input.dtype, copy=True), None


class _Dense(torch.autograd.Function):
    """Soft targets, on the CPU: class probabilities, or class indices with label smoothing."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, call: LogCall) -> Tensor:
        mass = Mass(input, call)
        largest, sums, powers = _partitions(input, ctx.needs_input_grad[0])
        partition = sums.to(_wide(input)).log().add_(largest)
        total = torch.ones_like(partition) if mass.total is None else mass.total.to(partition.dtype)
        weight = total.sum().item()
        partition.masked_fill_(total == 0, 0)
        smallest = min(input[piece].min().item() for piece in pieces(input))
        spread = largest.max().item() - smallest
        if not math.isfinite(spread):
            raise ArithmeticError
        near = call.alpha * spread < 0.5
        summed = 0.0
        for piece in pieces(input):
            values = _distances(input[piece], smallest)
            if call.alpha >= TINY:
                values.mul_(call.alpha)
                values = values.expm1_() if near else values.exp_()
            factor, at_label = mass.times(values, piece)
            summed += factor * values.sum().item()
            summed += 0.0 if at_label is None else at_label.sum().item()
        mean = summed / weight if weight else math.nan
        if call.alpha < TINY:
            label, exponential = mean - smallest, 1.0
        else:
            exponential = 1 + mean if near else mean
            if not 1 / SAFE < exponential < SAFE:
                raise ArithmeticError
            label = (math.log1p(mean) if near else math.log(exponential)) / call.alpha - smallest
        level = log_mean(partition.flatten(), total.flatten(), call.beta, 0).item()
        if not math.isfinite(label + level):
            raise ArithmeticError
        divisor = mass.denominator if call.reduction == "mean" else 1.0
        ctx.save_for_backward(input, call.target)
        ctx.rows, ctx.powers = (partition, largest, sums, total), powers
        ctx.call, ctx.mass, ctx.smallest, ctx.exponential = call, mass, smallest, exponential
        ctx.levels = Levels(label, level, divisor)
        return torch.scalar_tensor(weight * (label + level) / divisor, dtype=computed_in(input))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        input, _ = ctx.saved_tensors
        call, mass, levels = ctx.call, ctx.mass, ctx.levels
        if looked_into(grad):
            return differentiable(lambda logits: log_defined(logits, call), input, grad), None
        powers, ctx.powers = ctx.powers, None
        partition, largest, sums, total = ctx.rows
        share = grad.item() / levels.divisor
        rows = _slope(partition, levels.partition, call.beta, total).mul_(share).div_(sums)
        rows = rows.to(sums.dtype)
        result = powers if powers is not None else torch.empty_like(input)
        for piece in pieces(input):
            part = _shifted(input[piece], largest[piece]) if powers is None else powers[piece]
            part.mul_(rows[piece])
            values = _distances(input[piece], ctx.smallest).mul_(call.alpha).exp_()
            factor, at_label = mass.times(values, piece)
            part.sub_(values, alpha=share / ctx.exponential * factor)
            if at_label is not None:
                part.scatter_add_(1, mass.labels[piece], at_label.mul_(-share / ctx.exponential))
            if powers is None:
                result[piece] = part
        return result.to(input.dtype), None


def _sum(values: Tensor, mass: Tensor | None) -> float:
    return (values.sum() if mass is None else (values * mass).sum()).item()


def _distances(logits: Tensor, smallest: float) -> Tensor:
    """How far below the largest -f is, in float32 or float64."""
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    return torch.rsub(logits, smallest)


def _gradient(
    powers: Tensor, rows: Tensor, labels: Tensor, at_label: Tensor, dead: Tensor | None
) -> Tensor:
    """Make e^f, shifted, into the gradient."""
    powers.mul_(rows).scatter_add_(1, labels, at_label)
    return powers if dead is None else powers.masked_fill_(dead, 0)


def _slope(values: Tensor, level: float | Tensor, power: float, mass: Tensor) -> Tensor:
    """m e^{p (v - level)}: what a row's value counts for in the sum of all."""
    if power < TINY:
        return mass.clone()
    return torch.sub(values, level).mul_(power).exp_().mul_(mass)


def _sums(logits: Tensor, keep: bool) -> tuple[Tensor, Tensor | None]:
    """sum_j e^{f_ij}, and the terms, as in :func:`_partitions`, with nothing taken off."""
    keep = keep and may_keep(logits)
    if logits.nbytes <= _robust.PIECE:
        powers = powers_of(logits)
        return powers.sum(1, keepdim=True), powers if keep else None
    kept = torch.empty_like(logits) if keep else None
    sums = [
        powers_of(logits[piece], out=None if kept is None else kept[piece]).sum(1, keepdim=True)
        for piece in pieces(logits)
    ]
    return torch.cat(sums), kept


def _partitions(input: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """The largest logit of each row; sum_j e^{f_ij} over its exponential; the terms, if asked."""
    keep = keep and may_keep(input)
    if input.nbytes <= _robust.PIECE:
        largest = input.amax(1, keepdim=True)
        powers = _shifted(input, largest)
        return largest, powers.sum(1, keepdim=True), powers if keep else None
    kept = torch.empty_like(input) if keep else None
    parts = []
    for piece in pieces(input):
        largest = input[piece].amax(1, keepdim=True)
        powers = _shifted(input[piece], largest, None if kept is None else kept[piece])
        parts.append((largest, powers.sum(1, keepdim=True)))
    largest, sums = (torch.cat(part) for part in zip(*parts, strict=True))
    return largest, sums, kept


def _shifted(logits: Tensor, largest: Tensor, out: Tensor | None = None) -> Tensor:
    """e^{f - largest}, in float32 or float64."""
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    return torch.sub(logits, largest, out=out).mul_(LOG2E).exp2_()
