r"""Power means in the log domain: what couples the rows of a batch, and what a soft target is.

The log mean of values :math:`v` with weights :math:`m` and power :math:`p`,

.. math:: \frac1p \log \frac{\sum m\, e^{p v}}{\sum m},

is their mean in the limit :math:`p = 0`. Log means of parts can be put together by a log mean.
"""

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

ZERO_POWER = 1e-25
"""A power below this is zero: no logits that a float32 network has show the difference."""
EXACT_POWER = 1e-2
"""From this power on a log mean in float64 is as exact by the plain formula."""
LARGEST_EXPONENT = 80.0
"""Beyond this float32 overflows."""
LARGEST_GAP = 1e30
"""Stands for an infinite distance between logits: times a weight of zero it is zero."""


def row_dtype(tensor: Tensor) -> torch.dtype:
    """For what is one number for each row, so that a difference of logits of any size is felt."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def log_mean(values: Tensor, weights: Tensor, power: float, dim: int) -> Tensor:
    """The log mean along `dim`, in :func:`row_dtype`; 0 where there is no weight.

    From the largest value on, all exponents are negative; those near zero are summed as
    :math:`e^{pv} - 1`, so that a tiny power loses no digit when the logarithm is divided by it.
    """
    if values.shape[dim] == 0:
        return values.sum(dim).to(row_dtype(values))
    total = weights.sum(dim, keepdim=True)
    if power >= EXACT_POWER and values.dtype == torch.float64 and not _differentiated():
        limits = torch.finfo(values.dtype)
        largest = values.amax(dim, keepdim=True).clamp(limits.min, limits.max)
        exponent = power * (values - largest) + weights.log()
        logarithm = exponent.logsumexp(dim, keepdim=True) - total.log()
        return (largest + logarithm / power).masked_fill(total == 0, 0).squeeze(dim)
    has_weight = weights > 0
    shares = weights / (total + (total == 0))
    limits = torch.finfo(values.dtype)
    values = values.clamp(limits.min, limits.max)
    largest = values.detach().masked_fill(~has_weight, -math.inf).amax(dim, keepdim=True)
    largest = largest.where(has_weight.any(dim, keepdim=True), 0)
    gap = (values - largest).clamp(-LARGEST_GAP, LARGEST_GAP)
    largest = largest.squeeze(dim).to(row_dtype(values))
    if power < ZERO_POWER:
        return largest + (shares * gap).sum(dim).to(largest.dtype)
    exponent = _exponent(gap, power, has_weight)
    near, far = (shares * exponent.expm1()).sum(dim), (shares * exponent.exp()).sum(dim)
    close = near > -0.5
    logarithm = near.where(close, 0).log1p().where(close, far.where(~close, 1).log())
    return largest + logarithm.to(largest.dtype) / power


def _differentiated() -> bool:
    """Whether derivatives may be wanted, which the logarithm of a zero weight would spoil."""
    functorch = torch._C._are_functorch_transforms_active()
    return torch.is_grad_enabled() or functorch or forward_ad._current_level >= 0


def excess(gap: Tensor, power: float, has_weight: Tensor) -> Tensor:
    """(e^{p gap} - 1) / p, of a distance from the log mean."""
    gap = gap.clamp(-LARGEST_GAP, LARGEST_GAP)
    return gap if power < ZERO_POWER else _exponent(gap, power, has_weight).expm1() / power


def share(values: Tensor, mean: float | Tensor, power: float, weights: Tensor) -> Tensor:
    """m e^{p (v - mean)}: the derivative of the log mean in a value, times the sum of weights."""
    if power < ZERO_POWER:
        return weights.clone()
    return torch.sub(values, mean).mul_(power).exp_().mul_(weights)


def _exponent(gap: Tensor, power: float, has_weight: Tensor) -> Tensor:
    """Power times gap, and no infinite exponential where there is no weight."""
    exponent = power * gap
    return exponent.where(has_weight, exponent.clamp(max=LARGEST_EXPONENT))
