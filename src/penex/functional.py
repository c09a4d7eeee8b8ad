r"""The mathematics of PENEX: pure functions, tensors in, tensors out, no state.

Logits :math:`f`, label :math:`y`, sensitivity :math:`\alpha`, penalty :math:`\rho`:

.. math:: \ell = \exp(-\alpha f_y) + \rho \sum_j \exp f_j

Source: Kladny, Schölkopf, Muehlebach, "PENEX: AdaBoost-Inspired Neural Network Regularization",
arXiv 2510.02107. What the docstrings mark "(derived)" is not in the paper.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from penex._fast import fast_loss, fastest
from penex._inputs import (
    Batch,
    check_options,
    check_tensors,
    number,
    positive,
    prepare,
    validate,
)
from penex._linear import linear_penex_loss, sampled_linear_penex_loss
from penex._log_domain import LogCall, fast_log_loss, log_defined
from penex._penalty import (
    PENALTY_MAX,
    PENALTY_MIN,
    Estimated,
    Given,
    Penalty,
    PenaltySums,
    Settled,
    check_penalty_bounds,
)
from penex._robust import Call

__all__ = [
    "confidence_penalty_loss",
    "estimate_penalty",
    "focal_loss",
    "linear_penex_loss",
    "log_penex_loss",
    "margin",
    "penex_loss",
    "sampled_linear_penex_loss",
    "z_loss",
]

# Beyond this exponent float32 overflows. A class without target mass takes the exponential of no
# more than this, so that its contribution is 0 and not 0 * inf.
_LARGEST_EXPONENT = 80.0


def penex_loss(
    input: Tensor,
    target: Tensor,
    *,
    sensitivity: float = 0.1,
    penalty: float | Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    huberization: float | None = None,
) -> Tensor:
    r"""Penalized exponential loss, in the place of :func:`torch.nn.functional.cross_entropy`.

    .. math::
        \ell_i = \sum_k w_k q_{ik} \exp(-\alpha f_{ik}) + \rho\,\omega_i \sum_j \exp f_{ij},
        \qquad \omega_i = \sum_k w_k q_{ik}

    with :math:`q_i` the one-hot label or the given class probabilities. The model it trains
    predicts :math:`p(y|x) = \operatorname{softmax}((1+\alpha) f(x))`: see
    :func:`penex.inference.predict_proba`.

    Shapes, keywords, reductions, denominators and the dtype of the result are those of
    ``cross_entropy``, with two differences: integer one-hot targets of the input's shape are
    accepted as labels, and a batch with nothing to learn from (empty, or every row ignored) has
    mean 0 with zero gradient, where torch gives NaN.

    Args:
        input: Logits, floating point, shape (K), (N, K) or (N, K, d1, ...). Computed in float32,
            or float64 if that is the input's dtype; the gradient has the input's dtype.
        target: Class indices, integer, shape (), (N) or (N, d1, ...); or integer one-hot labels,
            or floating-point class probabilities, of the input's shape.
        sensitivity: :math:`\alpha > 0`. Larger values weigh badly classified samples more.
        penalty: :math:`\rho > 0`, a number or a 0-d tensor. None estimates it from this batch with
            :func:`estimate_penalty`. It is never differentiated.
        weight: Class weights :math:`w`, shape (K).
        ignore_index: Rows with this class index contribute nothing.
        reduction: ``"mean"`` (over the class weights of the kept rows for class indices, over the
            rows for probabilities), ``"sum"``, or ``"none"`` (the target's shape, zeros at ignored
            rows).
        label_smoothing: :math:`\varepsilon` in [0, 1]; :math:`q` becomes
            :math:`(1-\varepsilon) q + \varepsilon / K`.
        huberization: Threshold :math:`t > 0` on :math:`e^u`, :math:`u = -\alpha f_y`, beyond which
            it continues linearly, as :math:`t (1 + u - \log t)`. None: never.

    Returns:
        The loss: 0-d, or of the index target's shape for ``reduction="none"``.

    Raises:
        TypeError: `input` is not floating point, `target` is neither integer nor floating point,
            or an option is not a number.
        ValueError: An option is out of its range, or shapes do not match.
        IndexError: A class index is out of range (on the CPU; a CUDA device asserts by itself).

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> penex_loss(logits, torch.tensor([0, 1]), sensitivity=0.5, penalty=0.25)
        tensor(2.0006)
    """
    check_options(ignore_index, reduction, label_smoothing)
    alpha = positive("sensitivity", sensitivity)
    rule = Estimated(alpha, PENALTY_MIN, PENALTY_MAX) if penalty is None else Given(penalty)
    return penalized(
        input,
        target,
        alpha=alpha,
        penalty=rule,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        huberization=huberization,
    )


def log_penex_loss(
    input: Tensor,
    target: Tensor,
    *,
    sensitivity: float = 0.1,
    power: float = 1.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""PENEX in the log domain, with a power for the partition: a family from cross-entropy on.

    .. math::
        J = \frac1\alpha \log \frac1W \sum_{i,k} w_k q_{ik}\, e^{-\alpha f_{ik}}
        + \frac1\beta \log \frac1W \sum_i \omega_i Z_i^\beta,
        \qquad Z_i = \sum_j e^{f_{ij}}

    with :math:`\omega_i = \sum_k w_k q_{ik}` and :math:`W = \sum_i \omega_i` (derived). For
    :math:`\alpha = \beta = 0` this is cross-entropy; for :math:`\beta = 1` its gradient has the
    direction of :func:`penex_loss` with the penalty of the batch. The model it trains predicts
    :math:`p(y|x) = \operatorname{softmax}((1+\alpha) f(x))` for every :math:`\beta`: see
    :func:`penex.inference.predict_proba`.

    J is convex in the logits, is unchanged when one constant is added to all of them, and no
    logits overflow it. Its gradient is :math:`w_i \operatorname{softmax}(f_i)_j - v_{ij}`: the
    :math:`v_{ij} \propto w_j q_{ij} e^{-\alpha f_{ij}}` are AdaBoost's weights of the samples, the
    :math:`w_i \propto \omega_i Z_i^\beta` weigh the rows by their partition, and both sum to one.
    For small powers it is cross-entropy plus :math:`\alpha/2` times the variance of :math:`f_y`
    and :math:`\beta/2` times that of :math:`\log Z` over the batch; so it depends on the batch,
    and the loss of one row with one label is its cross-entropy.

    Shapes, keywords, denominators, dtypes and the handling of one-hot and of empty batches are
    those of :func:`penex_loss`. The sum is :math:`W J`, and so the mean is J times W over the
    denominator of ``cross_entropy``; they differ with class weights in soft targets alone.

    Args:
        input: Logits, floating point, shape (K), (N, K) or (N, K, d1, ...). Computed in float32,
            or float64 if that is the input's dtype; the gradient has the input's dtype.
        target: As in :func:`penex_loss`, like the arguments not listed here.
        sensitivity: :math:`\alpha \ge 0`. Larger values weigh badly classified samples more.
        power: :math:`\beta \ge 0`. Larger values hold the partitions of the samples together.
        weight: As in :func:`penex_loss`.
        ignore_index: As in :func:`penex_loss`.
        reduction: ``"mean"``, ``"sum"``, or ``"none"``: the rows of the tangent of the sum, which
            are those of cross-entropy at :math:`\alpha = \beta = 0`. The two logarithms of the
            batch, a and b, are constants in them; the rows add up to the sum, and their gradients
            to its gradient:
            :math:`\omega_i(a+b) + \sum_k w_k q_{ik} (e^{-\alpha (f_{ik} + a)} - 1)/\alpha
            + \omega_i (Z_i^\beta e^{-\beta b} - 1)/\beta`.
        label_smoothing: As in :func:`penex_loss`.

    Returns:
        The loss: 0-d, or of the index target's shape for ``reduction="none"``.

    Raises:
        TypeError, ValueError, IndexError: As :func:`penex_loss`, except that `sensitivity` may be
            zero; also if `power` is not a finite number >= 0.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> log_penex_loss(logits, torch.tensor([0, 1]), sensitivity=0.5, power=1.0)
        tensor(0.3625)
    """
    check_options(ignore_index, reduction, label_smoothing)
    return log_domain(
        input,
        target,
        alpha=number("sensitivity", sensitivity, 0.0, math.inf),
        beta=number("power", power, 0.0, math.inf),
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        group=None,
    )


def estimate_penalty(
    input: Tensor,
    target: Tensor,
    *,
    sensitivity: float = 0.1,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    huberization: float | None = None,
    penalty_min: float = 1e-10,
    penalty_max: float = 100.0,
) -> Tensor:
    r"""The penalty :math:`\hat\rho` that this batch suggests, without gradient.

    .. math::
        \hat\rho = \alpha\, \frac{\sum_i \sum_k w_k q_{ik} \exp(-\alpha f_{ik})}
        {\sum_i \omega_i \sum_j \exp f_{ij}}

    clamped to [`penalty_min`, `penalty_max`]. It is the :math:`\rho` at which adding one constant
    to all logits leaves the loss stationary, as long as nothing is huberized (derived).

    Args:
        input: As in :func:`penex_loss`, like the arguments not listed here.
        target: As in :func:`penex_loss`.
        sensitivity: As in :func:`penex_loss`.
        weight: As in :func:`penex_loss`.
        ignore_index: As in :func:`penex_loss`.
        label_smoothing: As in :func:`penex_loss`.
        huberization: As in :func:`penex_loss`; the exponential part is huberized before it is
            summed.
        penalty_min: Smallest value returned, > 0.
        penalty_max: Largest value returned, at least `penalty_min`.

    Returns:
        0-d tensor, float32, or float64 for float64 input; NaN if no row was kept.

    Raises:
        TypeError, ValueError, IndexError: As :func:`penex_loss`; also if
            `penalty_min` > `penalty_max`.

    Example:
        >>> estimate_penalty(torch.zeros(3, 4), torch.tensor([0, 1, 2]), sensitivity=0.5)
        tensor(0.1250)
    """
    alpha = positive("sensitivity", sensitivity)
    check_penalty_bounds(penalty_min, penalty_max)
    batch = _checked(input, target, weight, ignore_index, "mean", label_smoothing)
    sums = penalty_sums(batch, alpha, _log_threshold(huberization))
    return sums.penalty(alpha, penalty_min, penalty_max).where(~sums.empty(), math.nan)


def margin(input: Tensor, target: Tensor) -> Tensor:
    r"""How far the true class leads: :math:`f_y - \max_{j \ne y} f_j`.

    Positive where the prediction is right. The scale is that of the logits; to compare models
    trained with different losses, give the logits of their probabilities, :math:`(1+\alpha) f` for
    PENEX.

    Args:
        input: Logits, floating point, shape (K), (N, K) or (N, K, d1, ...), K >= 2.
        target: Class indices, integer, shape (), (N) or (N, d1, ...).

    Returns:
        Margins, shape of `target`, dtype of `input`.

    Raises:
        TypeError, ValueError, IndexError: As :func:`penex_loss`.

    Example:
        >>> margin(torch.tensor([[3.0, 1.0, 0.5]]), torch.tensor([1]))
        tensor([-2.])
    """
    check_tensors(input, target)
    if target.is_floating_point() or (target.ndim == input.ndim):
        raise ValueError(
            f"target: expected class indices, got {target.dtype} of shape {tuple(target.shape)}"
        )
    logits, labels = (input, target) if input.ndim > 1 else (input[None], target[None])
    if logits.shape[1] < 2:
        raise ValueError(f"input: a margin needs two classes or more, got {logits.shape[1]}")
    # No index is ignored: every label must be a class.
    nothing = torch.iinfo(torch.int64).min
    batch = prepare(logits, labels, weight=None, ignore_index=nothing, label_smoothing=0.0)
    true = batch.select(logits)
    mine = torch.zeros_like(logits, dtype=torch.bool).scatter(1, labels.unsqueeze(1).long(), True)
    result = true.squeeze(1) - logits.masked_fill(mine, -math.inf).amax(1)
    return result if input.ndim > 1 else result.squeeze(0)


def focal_loss(
    input: Tensor,
    target: Tensor,
    *,
    gamma: float = 2.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Focal loss, :math:`-\sum_k w_k q_k (1 - p_k)^\gamma \log p_k`, with its true gradient.

    Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, arXiv 1708.02002;
    the sum over classes is its usual extension to soft targets. ``gamma=0`` is cross-entropy.

    Args:
        input: As in :func:`penex_loss`, like the arguments not listed here.
        target: As in :func:`penex_loss`.
        gamma: Focusing parameter, >= 0.
        weight: As in :func:`penex_loss`.
        ignore_index: As in :func:`penex_loss`.
        reduction: As in :func:`penex_loss`.
        label_smoothing: As in :func:`penex_loss`.

    Returns:
        The loss: 0-d, or of the index target's shape for ``reduction="none"``.

    Raises:
        TypeError, ValueError, IndexError: As :func:`penex_loss`; also if `gamma` < 0.

    Example:
        >>> focal_loss(torch.zeros(1, 2), torch.tensor([0]), gamma=1.0)  # log(2) / 2
        tensor(0.3466)
    """
    gamma = number("gamma", gamma, 0.0, math.inf)
    batch = _checked(input, target, weight, ignore_index, reduction, label_smoothing)
    log_p = batch.select(F.log_softmax(batch.logits, 1))
    # Where p rounds to 1, or is 0 in a class without mass, the term is 0; a stand-in keeps the
    # derivative of the power, and of 0 * inf, from becoming NaN there.
    live = (log_p != 0) & ((batch.mass != 0) | (log_p > -math.inf))
    safe = log_p.where(live, -1.0)
    focus = (-torch.expm1(safe)) ** gamma
    rows = (batch.mass * focus * -safe).where(live, 0.0).sum(1)
    return _as_asked(_reduced(rows, batch, reduction), input, reduction)


def confidence_penalty_loss(
    input: Tensor,
    target: Tensor,
    *,
    strength: float = 0.1,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Cross-entropy less `strength` times the entropy of the prediction.

    .. math:: \ell_i = -\sum_k w_k q_{ik} \log p_{ik} - \beta\, \omega_i H(p_i)

    Source: Pereyra et al., "Regularizing Neural Networks by Penalizing Confident Output
    Distributions", 2017, arXiv 1701.06548. ``strength=0`` is cross-entropy; the loss may be
    negative.

    Args:
        input: As in :func:`penex_loss`, like the arguments not listed here.
        target: As in :func:`penex_loss`.
        strength: :math:`\beta \ge 0`.
        weight: As in :func:`penex_loss`; a row's entropy has the weight :math:`\omega_i` of its
            target, as in the penalty of PENEX.
        ignore_index: As in :func:`penex_loss`.
        reduction: As in :func:`penex_loss`.
        label_smoothing: As in :func:`penex_loss`.

    Returns:
        The loss: 0-d, or of the index target's shape for ``reduction="none"``.

    Raises:
        TypeError, ValueError, IndexError: As :func:`penex_loss`; also if `strength` < 0.

    Example:
        >>> confidence_penalty_loss(torch.zeros(1, 2), torch.tensor([0]), strength=0.5)
        tensor(0.3466)
    """
    strength = number("strength", strength, 0.0, math.inf)
    batch = _checked(input, target, weight, ignore_index, reduction, label_smoothing)
    log_p = F.log_softmax(batch.logits, 1)
    finite = log_p.where(log_p > -math.inf, 0.0)  # p log p is 0 at p = 0
    entropy = -(log_p.exp() * finite).sum(1)
    rows = _nll(batch, log_p) - strength * batch.total * entropy
    return _as_asked(_reduced(rows, batch, reduction), input, reduction)


def z_loss(
    input: Tensor,
    target: Tensor,
    *,
    strength: float = 1e-4,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Cross-entropy plus `strength` times the squared logarithm of the partition.

    .. math:: \ell_i = -\sum_k w_k q_{ik} \log p_{ik} + \lambda\, \omega_i \log^2 \sum_j e^{f_{ij}}

    Source: Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", 2022, arXiv
    2204.02311, section 5, with :math:`\lambda = 10^{-4}`. ``strength=0`` is cross-entropy.

    Args:
        input: As in :func:`penex_loss`, like the arguments not listed here.
        target: As in :func:`penex_loss`.
        strength: :math:`\lambda \ge 0`.
        weight: As in :func:`penex_loss`; a row's partition has the weight :math:`\omega_i` of its
            target, as in the penalty of PENEX.
        ignore_index: As in :func:`penex_loss`.
        reduction: As in :func:`penex_loss`.
        label_smoothing: As in :func:`penex_loss`.

    Returns:
        The loss: 0-d, or of the index target's shape for ``reduction="none"``.

    Raises:
        TypeError, ValueError, IndexError: As :func:`penex_loss`; also if `strength` < 0.

    Example:
        >>> z_loss(torch.zeros(1, 2), torch.tensor([0]), strength=0.5)  # log(2) + log(2)^2 / 2
        tensor(0.9334)
    """
    strength = number("strength", strength, 0.0, math.inf)
    batch = _checked(input, target, weight, ignore_index, reduction, label_smoothing)
    rows = (
        _nll(batch, F.log_softmax(batch.logits, 1))
        + strength * batch.total * batch.logits.logsumexp(1).square()
    )
    return _as_asked(_reduced(rows, batch, reduction), input, reduction)


def _checked(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Batch:
    check_options(ignore_index, reduction, label_smoothing)
    batched = validate(input, target, weight, ignore_index)
    return prepare(
        *batched, weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing
    )


def _nll(batch: Batch, log_p: Tensor) -> Tensor:
    """Cross-entropy of the rows."""
    log_q = batch.select(log_p)
    live = (batch.mass != 0) | (log_q > -math.inf)  # the rest is 0 * inf
    return -(batch.mass * log_q.where(live, 0.0)).sum(1)


def log_domain(
    input: Tensor,
    target: Tensor,
    *,
    alpha: float,
    beta: float,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """:func:`log_penex_loss` over the ranks of a group; :class:`penex.LogPENEX` calls it too."""
    shape = input, reduction
    input, target = validate(input, target, weight, ignore_index)
    call = LogCall(
        target=target,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        alpha=alpha,
        beta=beta,
        group=group,
    )
    return _as_asked(fastest(input, call, fast_log_loss, log_defined), *shape)


def penalized(
    input: Tensor,
    target: Tensor,
    *,
    alpha: float,
    penalty: Penalty,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    huberization: float | None,
) -> Tensor:
    """:func:`penex_loss` with any rule for the penalty; :class:`penex.PENEX` calls it too."""
    shape = input, reduction
    input, target = validate(input, target, weight, ignore_index)
    threshold = _log_threshold(huberization)
    call = Call(
        target=target,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        alpha=alpha,
        penalty=penalty,
        log_threshold=threshold,
        definition=_defined,
    )
    return _as_asked(fastest(input, call, fast_loss, _defined), *shape)


def _defined(logits: Tensor, call: Call, settled: Settled | None = None) -> Tensor:
    """The loss of `logits` by the definition, with what was settled before or by the rule."""
    batch = call.batch(logits)
    if settled is None:
        needed = call.penalty.needs_sums
        sums = penalty_sums(batch, call.alpha, call.log_threshold) if needed else None
        settled = call.penalty.settle(sums, batch.denominator)
    divisor = settled.divisor() if call.reduction == "mean" else 1.0
    rows = penex_rows(batch, call.alpha, settled.log_penalty, call.log_threshold, divisor)
    return rows if call.reduction == "none" else rows.sum()


def penalty_sums(batch: Batch, alpha: float, log_threshold: float | None) -> PenaltySums:
    """Both sums of the estimate, in the log domain, where no finite logit overflows."""
    # Detached, as no_grad would leave the derivatives of forward mode in place.
    logits, mass, total = batch.logits.detach(), batch.mass.detach(), batch.total.detach()
    u = -alpha * batch.select(logits)
    if log_threshold is not None:
        u = u.clamp(max=log_threshold) + torch.log1p(F.relu(u - log_threshold))
    exponential = (u + mass.log()).where(mass > 0, -math.inf)
    partition = (logits.logsumexp(1) + total.log()).where(total > 0, -math.inf)
    return PenaltySums.of(exponential, partition, logits.shape[1])


def penex_rows(
    batch: Batch,
    alpha: float,
    log_penalty: float | Tensor,
    log_threshold: float | None,
    divisor: float | Tensor,
) -> Tensor:
    """The loss of each row, (N, d1, ...), over `divisor`.

    Every factor enters the exponent, so that a product is finite wherever it can be represented,
    even where a factor of it cannot.
    """
    log_mass, rest, live = _log_factor(batch.mass / divisor)
    u = -alpha * batch.select(batch.logits)
    u = u.where(live, u.clamp(max=_LARGEST_EXPONENT))
    if log_threshold is None:
        exponential = torch.exp(u + log_mass)
    else:  # relu has slope 0 at 0: at the threshold the slope is counted once
        tail = 1 + F.relu(u - log_threshold)
        exponential = torch.exp(u.clamp(max=log_threshold) + log_mass) * tail
    log_total, total_rest, kept = (part.unsqueeze(1) for part in _log_factor(batch.total / divisor))
    f = batch.logits + (log_total + log_penalty)
    partition = torch.exp(f.where(kept, f.clamp(max=_LARGEST_EXPONENT)))
    return (exponential * rest).sum(1) + (partition * total_rest).sum(1)


def _log_factor(factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log m, r, m > 0) with m = exp(log m) * r, differentiable in m at zero too."""
    live = factor > 0
    return factor.where(live, 1.0).log(), factor.where(~live, 1.0), live


def _log_threshold(huberization: float | None) -> float | None:
    return None if huberization is None else math.log(positive("huberization", huberization))


def _reduced(rows: Tensor, batch: Batch, reduction: str) -> Tensor:
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    return rows.sum() / batch.denominator.where(batch.denominator != 0, 1)


def _as_asked(value: Tensor, input: Tensor, reduction: str) -> Tensor:
    """`value` in the shape and dtype that cross_entropy would give for `input`."""
    if reduction == "none" and input.ndim == 1:
        value = value.squeeze(0)
    if value.dtype == input.dtype:
        return value
    # Under autocast cross_entropy runs in, and returns, float32: a float16 loss would overflow
    # as soon as a gradient scaler multiplies it.
    device = input.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    return value if autocast else value.to(input.dtype)
