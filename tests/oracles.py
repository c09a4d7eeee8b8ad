"""Slow definitions of the losses, written from their formulas with loops, in 40-digit arithmetic.

Decimal neither overflows nor underflows for any logit used here, so one definition serves both
ordinary and extreme values. Results are rounded once, to float64; what float64 cannot hold becomes
infinite or zero, as it would in the tested code.
"""

import decimal
from decimal import Decimal
from typing import NamedTuple

import torch
from torch import Tensor

_CONTEXT = decimal.Context(prec=40, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN)
_ZERO, _ONE = Decimal(0), Decimal(1)


class Row(NamedTuple):
    """One sample (or one position of a dense target)."""

    logits: list[Decimal]
    mass: list[Decimal]  # w_k q_k, smoothed; all zero if the row is ignored
    kept: bool


class Result(NamedTuple):
    value: Tensor  # float64, reduced as asked
    gradient: Tensor  # float64, of the sum of `value`, in the shape of the logits
    penalty: Tensor  # float64, 0-d: the rho that was used


def _decimals(tensor: Tensor) -> list[Decimal]:
    return [Decimal(value) for value in tensor.detach().double().reshape(-1).tolist()]


def _class_last(tensor: Tensor) -> Tensor:
    """(K) or (N, K, d1, ...) as a matrix with one row per sample and position."""
    return tensor.detach().movedim(min(1, tensor.ndim - 1), -1).reshape(-1, _classes(tensor))


def _classes(logits: Tensor) -> int:
    return logits.shape[min(1, logits.ndim - 1)]


def rows(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[list[Row], Decimal]:
    """The samples, and what ``reduction="mean"`` divides by (1 if there is nothing)."""
    num_classes = _classes(logits)
    weights = [_ONE] * num_classes if weight is None else _decimals(weight)
    smoothing = Decimal(label_smoothing)
    dense = target.is_floating_point()
    targets = _class_last(target) if dense or target.shape == logits.shape else target.reshape(-1)
    result, denominator = [], _ZERO
    for row, entry in zip(_class_last(logits), targets, strict=True):
        if dense:
            q, kept = _decimals(entry), True
            denominator += 1
        else:
            label = int(entry) if entry.ndim == 0 else entry.tolist().index(1)
            kept = label != ignore_index
            q = [_ONE if k == label else _ZERO for k in range(num_classes)]
            denominator += weights[label] if kept else 0
        smooth = [(1 - smoothing) * value + smoothing / num_classes for value in q]
        mass = [w * value if kept else _ZERO for w, value in zip(weights, smooth, strict=True)]
        result.append(Row(_decimals(row) if kept else [_ZERO] * num_classes, mass, kept))
    return result, denominator or _ONE


def _huber(u: Decimal, threshold: Decimal | None) -> tuple[Decimal, Decimal]:
    """e^u, continued linearly above `threshold`, and its slope."""
    if threshold is None or u < threshold.ln():
        return u.exp(), u.exp()
    return threshold * (1 + u - threshold.ln()), threshold


def _exponential(row: Row, alpha: Decimal, threshold: Decimal | None) -> Decimal:
    """A_i = sum_k w_k q_k h(-alpha f_k)"""
    return sum(
        (
            m * _huber(-alpha * f, threshold)[0]
            for f, m in zip(row.logits, row.mass, strict=True)
            if m
        ),
        _ZERO,
    )


def _partition(row: Row) -> Decimal:
    """omega_i S_i"""
    total = sum(row.mass, _ZERO)
    return total * sum((f.exp() for f in row.logits), _ZERO) if total else _ZERO


def _estimate(
    samples: list[Row], alpha: Decimal, threshold: Decimal | None, low: float, high: float
) -> Decimal:
    denominator = sum((_partition(row) for row in samples), _ZERO)
    if not denominator:
        return Decimal("NaN")
    numerator = sum((_exponential(row, alpha, threshold) for row in samples), _ZERO)
    return min(max(alpha * numerator / denominator, Decimal(low)), Decimal(high))


def estimate_penalty(
    logits: Tensor,
    target: Tensor,
    *,
    sensitivity: float = 0.1,
    huberization: float | None = None,
    penalty_min: float = 1e-10,
    penalty_max: float = 100.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> float:
    """alpha sum_i A_i / sum_i omega_i S_i over kept rows, clamped; NaN if there are none."""
    with decimal.localcontext(_CONTEXT):
        samples, _ = rows(logits, target, weight, ignore_index, label_smoothing)
        threshold = None if huberization is None else Decimal(huberization)
        return float(_estimate(samples, Decimal(sensitivity), threshold, penalty_min, penalty_max))


def penex(
    logits: Tensor,
    target: Tensor,
    *,
    sensitivity: float = 0.1,
    penalty: float | None = None,
    huberization: float | None = None,
    reduction: str = "mean",
    penalty_min: float = 1e-10,
    penalty_max: float = 100.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Result:
    """sum_k w_k q_k h(-alpha f_k) + rho omega_i sum_j e^{f_j}; its gradient with rho fixed."""
    with decimal.localcontext(_CONTEXT):
        samples, denominator = rows(logits, target, weight, ignore_index, label_smoothing)
        alpha = Decimal(sensitivity)
        threshold = None if huberization is None else Decimal(huberization)
        if penalty is None:
            rho = _estimate(samples, alpha, threshold, penalty_min, penalty_max)
        else:
            rho = Decimal(penalty)
        scale = 1 / denominator if reduction == "mean" else _ONE
        values, gradient = [], []
        for row in samples:
            if not any(row.mass):
                values.append(_ZERO)
                gradient.append([0.0] * len(row.logits))
                continue
            values.append(_exponential(row, alpha, threshold) + rho * _partition(row))
            total = sum(row.mass, _ZERO)
            gradient.append(
                [
                    float(
                        scale
                        * (
                            rho * total * f.exp()
                            - (alpha * m * _huber(-alpha * f, threshold)[1] if m else 0)
                        )
                    )
                    for f, m in zip(row.logits, row.mass, strict=True)
                ]
            )
        return Result(
            _reduce(values, logits, scale, reduction),
            _like_logits(gradient, logits),
            torch.tensor(float(rho), dtype=torch.float64),
        )


def log_penex(
    logits: Tensor,
    target: Tensor,
    *,
    sensitivity: float = 0.1,
    power: float = 1.0,
    reduction: str = "mean",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Result:
    """W J over the denominator, or the rows of its tangent; the penalty is not used (NaN).

    With more digits for a tiny power, which takes as many of them as its exponent has.
    """
    with decimal.localcontext(_CONTEXT) as context:
        if 0 < sensitivity < 1e-6 or 0 < power < 1e-6:
            context.prec = 100
        samples, denominator = rows(logits, target, weight, ignore_index, label_smoothing)
        alpha, beta = Decimal(sensitivity), Decimal(power)
        scale = 1 / denominator if reduction == "mean" else _ONE
        totals = [sum(row.mass, _ZERO) for row in samples]
        weight_sum = sum(totals, _ZERO)
        if not weight_sum:
            zero = torch.zeros_like(logits, dtype=torch.float64).nan_to_num()
            return Result(
                _reduce([_ZERO] * len(samples), logits, scale, reduction), zero, _NO_PENALTY
            )
        label = [(m, -f) for row in samples for f, m in zip(row.logits, row.mass, strict=True)]
        partitions = [sum((f.exp() for f in row.logits), _ZERO) for row in samples]
        partition = [(m, z.ln()) for m, z in zip(totals, partitions, strict=True)]
        a, b = _level(label, alpha), _level(partition, beta)
        values, gradient = [], []
        for row, total, z in zip(samples, totals, partitions, strict=True):
            value = total * (a + b + _excess(z.ln() - b, beta))
            slopes = []
            for f, m in zip(row.logits, row.mass, strict=True):
                value += m * _excess(-f - a, alpha) if m else 0
                slope = total * (beta * (z.ln() - b)).exp() * f.exp() / z
                slopes.append(float(scale * (slope - (m * (alpha * (-f - a)).exp() if m else 0))))
            values.append(value)
            gradient.append(slopes)
        return Result(
            _reduce(values, logits, scale, reduction), _like_logits(gradient, logits), _NO_PENALTY
        )


_NO_PENALTY = torch.tensor(float("nan"))


def _level(terms: list[tuple[Decimal, Decimal]], power: Decimal) -> Decimal:
    """(1/p) log of the mean of e^{p v}, for masses m and values v; of v itself for p = 0"""
    terms = [(m, v) for m, v in terms if m]
    total = sum((m for m, _ in terms), _ZERO)
    if not power:
        return sum((m * v for m, v in terms), _ZERO) / total
    return (sum((m * (power * v).exp() for m, v in terms), _ZERO) / total).ln() / power


def _excess(gap: Decimal, power: Decimal) -> Decimal:
    """(e^{p v} - 1) / p"""
    return ((power * gap).exp() - 1) / power if power else gap


def log_softmax(row: list[Decimal]) -> list[Decimal]:
    """log softmax of finite or -inf logits."""
    log_partition = sum((f.exp() for f in row), _ZERO).ln()
    return [f - log_partition for f in row]


def focal(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: float,
    reduction: str = "mean",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-sum_k w_k q_k (1 - p_k)^gamma log p_k"""
    with decimal.localcontext(_CONTEXT):
        samples, denominator = rows(logits, target, weight, ignore_index, label_smoothing)
        scale = 1 / denominator if reduction == "mean" else _ONE
        values = []
        for row in samples:
            value = _ZERO
            for log_p, m in zip(log_softmax(row.logits), row.mass, strict=True):
                if m:
                    focus = (1 - log_p.exp()) ** Decimal(gamma) if gamma else _ONE
                    value -= m * focus * log_p
            values.append(value)
        return _reduce(values, logits, scale, reduction)


def confidence_penalty(
    logits: Tensor,
    target: Tensor,
    *,
    strength: float,
    reduction: str = "mean",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-sum_k w_k q_k log p_k - strength omega_i H(p)"""
    with decimal.localcontext(_CONTEXT):
        samples, denominator = rows(logits, target, weight, ignore_index, label_smoothing)
        scale = 1 / denominator if reduction == "mean" else _ONE
        values = []
        for row in samples:
            value = _ZERO
            for log_p, m in zip(log_softmax(row.logits), row.mass, strict=True):
                if m:
                    value -= m * log_p
                if log_p.is_finite():
                    value += Decimal(strength) * sum(row.mass, _ZERO) * log_p.exp() * log_p
            values.append(value)
        return _reduce(values, logits, scale, reduction)


def predict_proba(logits: Tensor, sensitivity: float, dim: int) -> Tensor:
    """softmax((1 + alpha) f), float64, shape of `logits`."""
    moved = logits.movedim(dim, -1)
    with decimal.localcontext(_CONTEXT):
        probabilities = []
        for row in moved.reshape(-1, moved.shape[-1]):
            powers = [((1 + Decimal(sensitivity)) * f).exp() for f in _decimals(row)]
            probabilities += [float(power / sum(powers)) for power in powers]
    return torch.tensor(probabilities, dtype=torch.float64).reshape(moved.shape).movedim(-1, dim)


def _reduce(values: list[Decimal], logits: Tensor, scale: Decimal, reduction: str) -> Tensor:
    if reduction == "none":
        shape = logits.shape[:1] + logits.shape[2:] if logits.ndim > 1 else ()
        return torch.tensor([float(v) for v in values], dtype=torch.float64).reshape(shape)
    return torch.tensor(float(scale * sum(values, _ZERO)), dtype=torch.float64)


def _like_logits(matrix: list[list[float]], logits: Tensor) -> Tensor:
    flat = torch.tensor(matrix, dtype=torch.float64)
    if logits.ndim == 1:
        return flat.reshape(-1)
    last = logits.movedim(1, -1).shape
    return flat.reshape(last).movedim(-1, 1)
