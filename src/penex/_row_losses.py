r"""The losses, as functions of two numbers for each row: the target's logit and the log-partition.

For class indices :math:`t_i = f_{i y_i}` and :math:`s_i = \log \sum_j e^{f_{ij}}`; every loss here
is a function of the vectors t and s, and whatever it is,

.. math:: \frac{\partial L}{\partial f_{ij}} = \frac{\partial L}{\partial s_i} p_{ij}
   + \frac{\partial L}{\partial t_i} v_{ij}, \qquad p_i = \operatorname{softmax}(f_i),
   \quad v_{ij} = 1[j = y_i].

For soft targets with weights :math:`m_{ij}` the target's logit is the log mean of the logits with
power :math:`-\alpha`, by which the same functions hold, and

.. math:: t_i = -\frac1\alpha \log \sum_j \frac{m_{ij}}{\omega_i} e^{-\alpha f_{ij}},
   \qquad v_{ij} = \frac{m_{ij}}{\omega_i} e^{-\alpha (f_{ij} - t_i)}.

That is exact for PENEX and log-PENEX with their own :math:`\alpha`, and with :math:`\alpha = 0`,
where t is the mean of the logits, for cross-entropy and the z-loss.

A new loss is a subclass of :class:`PerRow` with its value and slopes, a few lines.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from penex._inputs import Batch, Reduction, positive
from penex._log_mean import EXACT_POWER, LARGEST_EXPONENT, excess, log_mean, row_dtype, share
from penex._passes import EXACT_RANGE, constant, powers
from penex._penalty import LogSums, PenaltyRule, Resolved, gather_over_ranks

Rule = Callable[[Tensor, Tensor], Tensor]


class Rows(NamedTuple):
    """What a loss is a function of. Vectors are (N, 1, d1, ...), zero in rows without weight."""

    t: Tensor
    s: Tensor
    log_p: Tensor
    """t - s, with all digits where it is small."""
    weights: Tensor | None
    """omega; None: one everywhere."""
    denominator: Tensor | float | None
    """What ``mean`` divides by; None: the sum of the weights."""
    reduction: Reduction
    num_classes: int

    def divisor(self) -> Tensor | float:
        """The denominator of ``mean``, zero where there is nothing to learn from."""
        if self.denominator is not None:
            return self.denominator
        return float(self.t.numel()) if self.weights is None else self.weights.sum()


class Outcome(NamedTuple):
    """A loss at the rows, and its slopes."""

    value: Tensor
    """The loss, reduced."""
    dt: Tensor | float
    """The slopes of the sum of `value` in t,"""
    ds: Tensor | float
    """and in s. From :meth:`RowLoss.from_partition`: in Z."""
    log_dz: Tensor | None = None
    """The logarithm of the slopes in Z, from losses whose slopes may overflow,"""
    log_dt: Tensor | None = None
    """and of those in t, without their sign."""
    coupling: Any = None
    """What the rows had to know of each other: constants in the slopes."""


class RowLoss:
    """A loss, as a function of the rows' numbers."""

    alpha = 0.0
    """The power of the log mean that stands for a soft target's logit."""
    overflows = False
    """Whether slopes in s may overflow, so that the gradient is made of :attr:`Outcome.log_dz`."""
    sums_rows = True
    """Whether the loss adds up over the rows: none has to know of another."""
    uses_t_and_s_apart = True
    """Whether t and s are used beyond their difference, for which float32 may be too coarse."""
    labels_only = False
    """Whether class probabilities are refused."""
    slopes_by_autograd = False
    """Whether the slopes are made by autograd, which a compiler cannot trace."""

    def by_rows(self, soft: bool) -> bool:
        """Whether the loss is a function of t and s, for soft targets or for class indices.

        If not, :meth:`defined` is all there is.
        """
        return True

    def on_rows(self, rows: Rows, coupling: Any = None) -> Outcome:
        """The loss by operations that can be differentiated and traced.

        With `coupling`, that of an earlier outcome, for these constants.
        """
        raise NotImplementedError

    def defined(self, batch: Batch, reduction: Reduction, coupling: Any = None) -> Tensor:
        """The loss with all its derivatives, in targets and weights too."""
        if batch.labels is None:
            t = -log_mean(-batch.logits, batch.target_weights, self.alpha, 1).unsqueeze(1)
        else:
            t = batch.select(batch.logits).to(row_dtype(batch.logits))
        largest, log_sum = log_partition(batch.logits)
        weights, denominator = batch.row_weights.unsqueeze(1), batch.denominator
        rows = Rows(
            t,
            largest + log_sum,
            t - largest - log_sum,
            weights.to(t.dtype),
            denominator.to(t.dtype),
            reduction,
            batch.logits.shape[1],
        )
        return self.on_rows(rows, coupling).value

    def can_use_partition(self, reduction: Reduction) -> bool:
        """Whether to try :meth:`from_partition`."""
        return False

    def from_partition(
        self,
        t: Tensor,
        partition: Tensor,
        weights: Tensor | None,
        denominator: float | None,
        reduction: Reduction,
    ) -> Outcome | None:
        """The same from Z, on the CPU, where looking at numbers costs nothing; None: not precise.

        The arguments may be overwritten, and are as in :class:`Rows`.
        """
        raise NotImplementedError

    def relative_slopes(self, rows: Rows) -> tuple[Tensor, Tensor | float]:
        """ds up to one positive factor of the batch, from the rows at hand: logarithm and sign."""
        ds = torch.as_tensor(self.on_rows(rows).ds, device=rows.s.device)
        return ds.abs().log(), ds.sign()


def log_partition(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each row, and log sum_j e^f from there, in :func:`row_dtype`."""
    largest = logits.detach().amax(1, keepdim=True)
    largest = largest.masked_fill(largest == -math.inf, 0)
    log_sum = (logits - largest).exp().sum(1, keepdim=True).to(row_dtype(logits)).log()
    return largest.to(log_sum.dtype), log_sum


# Losses that add up over the rows.


class PerRow(RowLoss):
    """The weighted sum or mean of a function of log p and s."""

    uses_t_and_s_apart = False

    def of_row(self, log_p: Tensor, s: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """The value of a row, and its derivatives in log p and in s."""
        raise NotImplementedError

    def on_rows(self, rows: Rows, coupling: Any = None) -> Outcome:
        value, slope, slope_s = self.of_row(rows.log_p, rows.s)
        factor = row_factor(rows)
        value, slope, slope_s = value * factor, slope * factor, slope_s * factor
        ds = -slope if isinstance(slope_s, float) and slope_s == 0 else slope_s - slope
        return Outcome(value.squeeze(1) if rows.reduction == "none" else value.sum(), slope, ds)


class CrossEntropy(PerRow):
    """-log p."""

    def of_row(self, log_p: Tensor, s: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        return -log_p, -1.0, 0.0


class ZPenalty(PerRow):
    """-log p + strength s^2."""

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def of_row(self, log_p: Tensor, s: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        return self.strength * s * s - log_p, -1.0, 2 * self.strength * s


class Focal(PerRow):
    """-(1 - p)^gamma log p."""

    def __init__(self, gamma: float) -> None:
        self.gamma = gamma

    def by_rows(self, soft: bool) -> bool:
        return not soft

    def defined(self, batch: Batch, reduction: Reduction, coupling: Any = None) -> Tensor:
        if batch.labels is not None:
            return super().defined(batch, reduction, coupling)
        log_p = F.log_softmax(batch.logits, 1)
        # Where p rounds to 1, or is 0 in a class without weight, the term is 0; a stand-in keeps
        # the derivative of the power, and of 0 * inf, from becoming NaN there.
        counts = (log_p != 0) & ((batch.target_weights != 0) | (log_p > -math.inf))
        safe = log_p.where(counts, -1.0)
        focus = (-torch.expm1(safe)) ** self.gamma
        rows = (batch.target_weights * focus * -safe).where(counts, 0.0).sum(1)
        return _reduced(rows, batch, reduction)

    def of_row(self, log_p: Tensor, s: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        limits = torch.finfo(log_p.dtype)
        log_p = log_p.clamp(limits.min, -limits.tiny)  # no 0 * inf where p is 0 or rounds to 1
        miss = -log_p.expm1()
        power = miss**self.gamma
        slope = self.gamma * (power / miss) * (1 - miss) * log_p - power
        return -power * log_p, slope, 0.0


class ConfidencePenalty(RowLoss):
    """Cross-entropy less strength H(p): no function of the two numbers."""

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def by_rows(self, soft: bool) -> bool:
        return False

    def defined(self, batch: Batch, reduction: Reduction, coupling: Any = None) -> Tensor:
        log_p = F.log_softmax(batch.logits, 1)
        finite = log_p.where(log_p > -math.inf, 0.0)  # p log p is 0 at p = 0
        entropy = -(log_p.exp() * finite).sum(1)
        log_q = batch.select(log_p)
        counts = (batch.target_weights != 0) | (log_q > -math.inf)  # the rest is 0 * inf
        nll = -(batch.target_weights * log_q.where(counts, 0.0)).sum(1)
        return _reduced(nll - self.strength * batch.row_weights * entropy, batch, reduction)


class GeneralizedCrossEntropy(PerRow):
    """(1 - p^q) / q."""

    labels_only = True

    def __init__(self, q: float) -> None:
        self.q = q

    def of_row(self, log_p: Tensor, s: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        exponent = self.q * log_p
        return exponent.expm1() / -self.q, -exponent.exp(), 0.0


class RuleLoss(RowLoss):
    """The weighted sum or mean of a given function of t and s, with its slopes by autograd."""

    labels_only, slopes_by_autograd = True, True

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def on_rows(self, rows: Rows, coupling: Any = None) -> Outcome:
        if torch.is_grad_enabled():  # the definition
            return Outcome(self._value(rows), 0.0, 0.0)
        with torch.enable_grad():
            t, s = (x.detach().requires_grad_() for x in (rows.t, rows.s))
            value = self._value(rows._replace(t=t, s=s))
            slopes = torch.autograd.grad(value.sum(), (t, s), allow_unused=True)
        dt, ds = (torch.zeros_like(t) if slope is None else slope for slope in slopes)
        return Outcome(value.detach(), dt, ds)

    def _value(self, rows: Rows) -> Tensor:
        value = self.rule(rows.t, rows.s)
        if not isinstance(value, Tensor) or value.shape != rows.t.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                "rule: expected one value a row, of the arguments' shape "
                f"{tuple(rows.t.shape)}, got {got}"
            )
        value = value * row_factor(rows)
        if rows.weights is not None:
            value = value.masked_fill(rows.weights == 0, 0)  # a rule need not be finite there
        return value.squeeze(1) if rows.reduction == "none" else value.sum()


def _reduced(values: Tensor, batch: Batch, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return values
    return values.sum() / (nonzero(batch.denominator) if reduction == "mean" else 1.0)


def row_factor(rows: Rows) -> Tensor | float:
    """What the values of the rows are multiplied with in a sum or mean."""
    factor = 1.0 if rows.weights is None else rows.weights
    if rows.reduction != "mean":
        return factor
    return factor / nonzero(rows.divisor())


def nonzero(divisor: Tensor | float) -> Tensor | float:
    """One in place of zero, so that the mean of nothing is 0."""
    return divisor + (divisor == 0) if isinstance(divisor, Tensor) else divisor or 1.0


# PENEX.


class Penex(RowLoss):
    """exp(-alpha t) + rho exp(s), with a rule for rho; exp(-alpha t) may be huberized."""

    overflows, sums_rows = True, False

    def __init__(
        self,
        alpha: float,
        penalty: PenaltyRule,
        huberization: float | None = None,
        normalize: bool = False,
    ) -> None:
        self.alpha, self.penalty = alpha, penalty
        self.log_threshold = None
        if huberization is not None:
            self.log_threshold = math.log(positive("huberization", huberization))
        self.scale = alpha if normalize else 1.0

    def on_rows(self, rows: Rows, coupling: Any = None) -> Outcome:
        log_slope, log_tail, tail = self._exponents(-self.alpha * rows.t)
        log_weights: Tensor | float = 0.0
        if rows.weights is not None:
            log_weights = rows.weights.to(rows.t.dtype).log()
        sums = None
        if self.penalty.needs_sums and coupling is None:
            log_sums = (torch.stack([log_slope + log_tail, rows.s]) + log_weights).detach()
            exponential, partition = log_sums.flatten(1).logsumexp(1).unbind()
            sums = LogSums(exponential, partition, rows.num_classes)
        resolved: Resolved = coupling or self._resolved(sums, rows.divisor(), rows.t)
        # Every factor enters the exponent, so that a product is finite wherever it can be
        # represented, even where a factor of it cannot.
        log_factor = log_weights - self._log_divisor(resolved, rows.reduction)
        log_dz = torch.as_tensor(
            log_factor + resolved.log_penalty, dtype=rows.t.dtype, device=rows.t.device
        )
        log_dt = log_slope + (log_factor + math.log(self.alpha))
        slope, z = torch.exp(log_dt), torch.exp(rows.s + log_dz)
        value = slope * (tail / self.alpha) + z
        value = value.squeeze(1) if rows.reduction == "none" else value.sum()
        return Outcome(value, -slope, z, log_dz, log_dt, resolved)

    def defined(self, batch: Batch, reduction: Reduction, coupling: Any = None) -> Tensor:
        """The definition, class by class, as a gradient through s could overflow."""
        target_weights, row_weights = batch.target_weights, batch.row_weights.unsqueeze(1)
        resolved: Resolved = coupling or self._resolved(
            self.estimate_sums(batch) if self.penalty.needs_sums else None,
            batch.denominator,
            batch.logits.new_empty((), dtype=row_dtype(batch.logits)),
        )
        inverse = torch.as_tensor(
            -self._log_divisor(resolved, reduction), device=batch.logits.device
        ).exp()
        log_weights, rest = _log_weights(target_weights * inverse)
        row_log_weights, row_rest = _log_weights(row_weights * inverse)
        u, tail = self._exponents(-self.alpha * batch.select(batch.logits))[::2]
        # Without weight a class contributes 0, not 0 * inf.
        u, z = u + log_weights, batch.logits + (row_log_weights + resolved.log_penalty)
        u = u.where(target_weights > 0, u.clamp(max=LARGEST_EXPONENT))
        z = z.where(row_weights > 0, z.clamp(max=LARGEST_EXPONENT))
        value = (u.exp() * tail * rest).sum(1) + (z.exp() * row_rest).sum(1)
        return value if reduction == "none" else value.sum()

    def estimate_sums(self, batch: Batch) -> LogSums:
        """What the penalty is estimated from, without derivatives."""
        # Detached, as no_grad would leave the derivatives of forward mode in place.
        logits = batch.logits.detach().to(row_dtype(batch.logits))
        log_slope, log_tail, _ = self._exponents(-self.alpha * batch.select(logits))
        exponential, partition = (
            (log + weights.log()).where(weights > 0, -math.inf).flatten().logsumexp(0)
            for log, weights in (
                (log_slope + log_tail, batch.target_weights.detach()),
                (logits.logsumexp(1), batch.row_weights.detach()),
            )
        )
        return LogSums(exponential, partition, logits.shape[1])

    def _exponents(self, u: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """Of the exponential part: the logarithm of its slope, and how much larger it is itself."""
        if self.log_threshold is None:
            return u, 0.0, 1.0
        beyond = F.relu(u - self.log_threshold)  # slope 0 at 0: counted once
        return u.clamp(max=self.log_threshold), beyond.log1p(), 1 + beyond

    def _resolved(self, sums: LogSums | None, divisor: Tensor | float, like: Tensor) -> Resolved:
        divisor = torch.as_tensor(divisor, dtype=like.dtype, device=like.device)
        return self.penalty.resolve(sums, divisor.detach())

    def _log_divisor(self, resolved: Resolved, reduction: Reduction) -> Tensor | float:
        divisor = nonzero(resolved.denominator) if reduction == "mean" else 1.0
        log = divisor.log() if isinstance(divisor, Tensor) else math.log(divisor)
        return log + math.log(self.scale)

    def can_use_partition(self, reduction: Reduction) -> bool:
        return self.log_threshold is None and reduction != "none" and self.penalty.local

    def from_partition(
        self,
        t: Tensor,
        partition: Tensor,
        weights: Tensor | None,
        denominator: float | None,
        reduction: Reduction,
    ) -> Outcome | None:
        a = powers(t, None, -self.alpha)
        if weights is not None:
            a.mul_(weights)
            partition.mul_(weights)
        sum_a, sum_z = a.sum().item(), partition.sum().item()
        if denominator is None:
            denominator = float(t.numel()) if weights is None else weights.sum().item()
        least, most = min(sum_a, sum_z, denominator), max(sum_a, sum_z, denominator)
        if not 1 / EXACT_RANGE < least <= most < EXACT_RANGE or math.isnan(sum_a + sum_z):
            return None
        rho = self.penalty.value(sum_a, sum_z)
        divisor = self.scale * (denominator if reduction == "mean" else 1.0)
        value = torch.scalar_tensor((sum_a + rho * sum_z) / divisor, dtype=t.dtype, device="cpu")
        dz = rho / divisor
        return Outcome(
            value,
            a.mul_(constant(-self.alpha / divisor, t.dtype)),
            dz if weights is None else weights * dz,
            coupling=Resolved(math.log(rho), denominator),
        )

    def relative_slopes(self, rows: Rows) -> tuple[Tensor, Tensor | float]:
        return (rows.s if rows.weights is None else rows.s + rows.weights.log()), 1.0


def _log_weights(weights: Tensor) -> tuple[Tensor, Tensor]:
    """log m and r with m = r exp(log m), differentiable in m at zero too."""
    has_weight = weights > 0
    return weights.where(has_weight, 1).log(), weights.where(~has_weight, 1)


# Log-PENEX.

EXACT_FACTOR_RANGE = 1e15
"""The same for numbers of which two are multiplied."""
MIN_SUM = 1e-280
"""From here on sums in float64 have lost nothing to underflow."""


class LogMeans(NamedTuple):
    """What a row of log-PENEX has to know of the batch."""

    label: Tensor
    """a, the log mean of -t."""
    partition: Tensor
    """b, the log mean of s."""
    divisor: Tensor | float
    """What the sum over the rows is divided by."""


class LogPenex(RowLoss):
    r"""The sum of two log means over the rows, of -t with power alpha and of s with power beta.

    Next to its log means a, b at the batch, it is the sum over the rows of its tangent,

    .. math:: \ell_i = \omega_i (a + b) + \omega_i \frac{e^{\alpha(-t_i-a)} - 1}{\alpha}
       + \omega_i \frac{e^{\beta(s_i - b)} - 1}{\beta},

    in value and in gradient. These are the rows of ``reduction="none"``.
    """

    sums_rows = False

    def __init__(self, alpha: float, beta: float, group: dist.ProcessGroup | None = None) -> None:
        self.alpha, self.beta, self.group = alpha, beta, group

    def on_rows(self, rows: Rows, coupling: Any = None) -> Outcome:
        label = (-rows.t).clamp(max=torch.finfo(rows.t.dtype).max)
        s = rows.s
        weights = torch.ones_like(s) if rows.weights is None else rows.weights.to(s.dtype)
        by_rows = rows.reduction == "none" or self.group is not None
        means: LogMeans = coupling or self._means(label, s, weights, rows)
        value = means.label + means.partition
        if by_rows:
            has_weight = weights > 0
            value = value + excess(label - means.label, self.alpha, has_weight)
            value = weights * (value + excess(s - means.partition, self.beta, has_weight))
            value = value.squeeze(1) if rows.reduction == "none" else value.sum() / means.divisor
        else:
            value = weights.sum() * value / means.divisor
        dt = -share(label.detach(), means.label, self.alpha, weights) / means.divisor
        ds = share(s.detach(), means.partition, self.beta, weights) / means.divisor
        return Outcome(value, dt, ds, coupling=means if by_rows else None)

    def _means(self, label: Tensor, s: Tensor, weights: Tensor, rows: Rows) -> LogMeans:
        """The log means of a batch with these rows, or of the batches of all processes."""
        flat = weights.flatten()
        a = log_mean(label.flatten(), flat, self.alpha, 0)
        b = log_mean(s.flatten(), flat, self.beta, 0)
        denominator = torch.as_tensor(rows.divisor(), dtype=s.dtype, device=s.device)
        if self.group is not None:
            numbers = gather_over_ranks([a, b, flat.sum(), denominator], self.group)
            a = log_mean(numbers[0], numbers[2], self.alpha, 0)
            b = log_mean(numbers[1], numbers[2], self.beta, 0)
            denominator = numbers[3].mean()
        elif rows.reduction == "none":
            a, b = a.detach(), b.detach()  # no_grad would leave forward mode's derivatives in place
        return LogMeans(a, b, nonzero(denominator) if rows.reduction == "mean" else 1.0)

    def can_use_partition(self, reduction: Reduction) -> bool:
        exact = all(power == 0 or power >= EXACT_POWER for power in (self.alpha, self.beta))
        return exact and reduction != "none" and self.group is None

    def from_partition(
        self,
        t: Tensor,
        partition: Tensor,
        weights: Tensor | None,
        denominator: float | None,
        reduction: Reduction,
    ) -> Outcome | None:
        least, most = partition.aminmax()
        if not 1 / EXACT_FACTOR_RANGE < least.item() <= most.item() < EXACT_FACTOR_RANGE:
            return None
        z, t64 = partition.double(), t.double()
        a = powers(t64, None, -self.alpha)
        dz = z.pow(self.beta - 1)  # a row's part of sum_i w_i Z_i^beta, over Z_i
        if weights is not None:
            a.mul_(weights)
            dz.mul_(weights)
        sum_a, sum_z = a.sum().item(), (dz * z).sum().item()
        if not (min(sum_a, sum_z) > MIN_SUM and sum_a + sum_z < math.inf):
            return None
        total = float(t.numel()) if weights is None else weights.sum().item()
        label = math.log(sum_a / total) / self.alpha if self.alpha else -_mean(t64, weights, total)
        mean = math.log(sum_z / total) / self.beta if self.beta else _mean(z.log(), weights, total)
        scale = total
        if reduction == "mean":
            scale = 1.0 if denominator is None else total / denominator
        value = torch.scalar_tensor((label + mean) * scale, dtype=t.dtype, device="cpu")
        return Outcome(value, a.mul_(-scale / sum_a), dz.mul_(scale / sum_z))

    def relative_slopes(self, rows: Rows) -> tuple[Tensor, Tensor | float]:
        exponent = self.beta * rows.s
        return (exponent if rows.weights is None else exponent + rows.weights.log()), 1.0


def _mean(values: Tensor, weights: Tensor | None, total: float) -> float:
    return (values if weights is None else values * weights).sum().item() / total
