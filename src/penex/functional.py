r"""The losses as pure functions: tensors in, tensors out, no state.

======================  ============================================================================
:math:`f_{ij}`          logits of row i and class j, N x K
:math:`y_i, q_{ij}`     the label, or the class probabilities of the target
:math:`w_j`             class weights
:math:`\omega_i`        row weights, :math:`\sum_j w_j q_{ij}`; :math:`w_{y_i}` for labels
:math:`t_i`             the target's logit, :math:`f_{i y_i}` for labels
:math:`Z_i, s_i`        the partition :math:`\sum_j e^{f_{ij}}`, and its logarithm
:math:`p_{ij}`          :math:`e^{f_{ij} - s_i}`; :math:`\log p_i = t_i - s_i` for the label
:math:`\alpha, \rho`    sensitivity and penalty of PENEX; :math:`\beta` the power of log-PENEX
======================  ============================================================================

PENEX is :math:`\ell = \exp(-\alpha f_y) + \rho \sum_j \exp f_j`. Source: Kladny, Schölkopf,
Muehlebach, "PENEX: AdaBoost-Inspired Neural Network Regularization", arXiv 2510.02107. What the
docstrings mark "(derived)" is not in the paper.

What happens to a batch: :mod:`penex._inputs` checks it; :mod:`penex._rows` makes t and s from the
logits; :mod:`penex._row_losses` has the loss as a function of these two vectors, with its slopes,
for PENEX by a rule from :mod:`penex._penalty`; and :mod:`penex._rows` makes the gradient from them.
:mod:`penex._linear` does so without holding the logits.

The mathematics of a new loss goes into :mod:`penex._row_losses`, as a class of a few lines. Then it
gets its function here, and its module in :mod:`penex.losses` with the link of
:mod:`penex._links`.
"""

import math

import torch
from torch import Tensor

from penex import _row_losses as row_losses
from penex._inputs import (
    check_tensors,
    computed_in,
    nonnegative,
    number,
    positive,
    prepare,
    refuse_labels,
    validate,
)
from penex._linear import linear_loss, linear_penex_loss, sampled_linear_penex_loss
from penex._penalty import Bounds, EstimatedPenalty, rule_of
from penex._row_losses import RowLoss, Rule
from penex._rows import loss_of

__all__ = [
    "confidence_penalty_loss",
    "cross_entropy",
    "estimate_penalty",
    "focal_loss",
    "generalized_cross_entropy_loss",
    "linear_loss",
    "linear_penex_loss",
    "log_penex_loss",
    "margin",
    "penex_loss",
    "row_loss",
    "sampled_linear_penex_loss",
    "z_loss",
]


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
    normalize: bool = False,
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
        normalize: Divide the loss by :math:`\alpha`. Its gradient at f = 0 is then that of
            cross-entropy, so learning rates, weight decay and clipping thresholds chosen for
            cross-entropy carry over.

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
    alpha = positive("sensitivity", sensitivity)
    loss = row_losses.Penex(alpha, rule_of(penalty, alpha), huberization, normalize)
    return evaluate(input, target, loss, weight, ignore_index, reduction, label_smoothing)


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

    `sensitivity` is :math:`\alpha \ge 0`, larger values of which weigh badly classified samples
    more, and `power` is :math:`\beta \ge 0`, larger values of which hold the partitions of the
    samples together. The other arguments and the errors are those of :func:`penex_loss`.

    Returns:
        The loss, 0-d; for ``reduction="none"``, of the index target's shape, the rows of the
        tangent of the sum, which are those of cross-entropy at :math:`\alpha = \beta = 0`. The two
        logarithms of the batch, a and b, are constants in them; the rows add up to the sum, and
        their gradients to its gradient:
        :math:`\omega_i(a+b) + \sum_k w_k q_{ik} (e^{-\alpha (f_{ik} + a)} - 1)/\alpha
        + \omega_i (Z_i^\beta e^{-\beta b} - 1)/\beta`.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> log_penex_loss(logits, torch.tensor([0, 1]), sensitivity=0.5, power=1.0)
        tensor(0.3625)
    """
    alpha, beta = nonnegative("sensitivity", sensitivity), nonnegative("power", power)
    loss = row_losses.LogPenex(alpha, beta)
    return evaluate(input, target, loss, weight, ignore_index, reduction, label_smoothing)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Cross-entropy, :math:`-\sum_k w_k q_{ik} \log p_{ik}`, as computed by this package.

    Equal to :func:`torch.nn.functional.cross_entropy` in every option, with the two differences of
    :func:`penex_loss`; faster on the CPU from about a thousand classes on.

    Arguments, result and errors are those of :func:`penex_loss`.

    Example:
        >>> cross_entropy(torch.zeros(1, 2), torch.tensor([0]))  # log 2
        tensor(0.6931)
    """
    loss = row_losses.CrossEntropy()
    return evaluate(input, target, loss, weight, ignore_index, reduction, label_smoothing)


def row_loss(
    input: Tensor,
    target: Tensor,
    rule: Rule,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""The mean of any function of a row's true logit and log-partition.

    With :math:`t_i = f_{i y_i}` and :math:`s_i = \log \sum_j e^{f_{ij}}` most losses of class
    indices are functions of t and s alone, and :math:`\log p_{i y_i} = t_i - s_i`. The logits are
    passed over once forward and once backward, whatever the rule.

    `rule` is a differentiable function of (true_logit, log_partition) that returns one value a row.
    Both are float64 (float32 on MPS) and of one shape, and so must the values be. Each value must
    depend on its own row alone. The other arguments are those of :func:`penex_loss`, but `target`
    has class indices or integer one-hot labels.

    Raises:
        TypeError, ValueError, IndexError: As :func:`penex_loss`; also if `target` has class
            probabilities, or `rule` returns something else than one value a row.

    Example:
        Generalised cross-entropy, :math:`(1 - p^q) / q`:

        >>> def rule(true_logit, log_partition, q=0.7):
        ...     return -torch.expm1(q * (true_logit - log_partition)) / q
        >>> row_loss(torch.zeros(1, 2), torch.tensor([0]), rule)  # (1 - 0.5^0.7) / 0.7
        tensor(0.5492)
    """
    if not callable(rule):
        raise TypeError(f"rule: expected a function, got {type(rule).__name__}")
    return evaluate(input, target, row_losses.RuleLoss(rule), weight, ignore_index, reduction)


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

    A huberized exponential part is huberized before it is summed. The arguments not in the formula
    and the errors are those of :func:`penex_loss`; `penalty_min` must be above zero and at most
    `penalty_max`.

    Returns:
        0-d tensor, float32, or float64 for float64 input; NaN if no row was kept.

    Example:
        >>> estimate_penalty(torch.zeros(3, 4), torch.tensor([0, 1, 2]), sensitivity=0.5)
        tensor(0.1250)
    """
    bounds = Bounds.checked(sensitivity, penalty_min, penalty_max)
    loss = row_losses.Penex(bounds.sensitivity, EstimatedPenalty(bounds), huberization)
    input, arguments = validate(input, target, weight, ignore_index, "mean", label_smoothing)
    if input.numel() == 0:
        return input.new_full((), math.nan, dtype=computed_in(input))
    sums = loss.estimate_sums(prepare(input, arguments))
    estimate = sums.log_estimate(bounds)[0].exp().clamp(bounds.penalty_min, bounds.penalty_max)
    # An empty sum is no estimate; one that is NaN or infinite has none either.
    valid = sums.exponential - sums.partition
    return estimate.where(valid == valid, math.nan).to(computed_in(input))


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
    index = labels.long().unsqueeze(1)
    try:
        true = logits.gather(1, index)
    except (IndexError, RuntimeError) as error:
        refuse_labels(labels, logits.shape[1], nothing, error)
        raise
    is_label = torch.zeros_like(logits, dtype=torch.bool).scatter(1, index, True)
    result = true.squeeze(1) - logits.masked_fill(is_label, -math.inf).amax(1)
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

    `gamma` :math:`\ge 0` is the focusing parameter. The other arguments, the result and the errors
    are those of :func:`penex_loss`.

    Example:
        >>> focal_loss(torch.zeros(1, 2), torch.tensor([0]), gamma=1.0)  # log(2) / 2
        tensor(0.3466)
    """
    loss = row_losses.Focal(nonnegative("gamma", gamma))
    return evaluate(input, target, loss, weight, ignore_index, reduction, label_smoothing)


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

    `strength` is :math:`\beta \ge 0`. A row's entropy has the weight :math:`\omega_i` of its
    target, as in the penalty of PENEX. The other arguments, the result and the errors are those of
    :func:`penex_loss`.

    Example:
        >>> confidence_penalty_loss(torch.zeros(1, 2), torch.tensor([0]), strength=0.5)
        tensor(0.3466)
    """
    loss = row_losses.ConfidencePenalty(nonnegative("strength", strength))
    return evaluate(input, target, loss, weight, ignore_index, reduction, label_smoothing)


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

    `strength` is :math:`\lambda \ge 0`. A row's partition has the weight :math:`\omega_i` of its
    target, as in the penalty of PENEX. The other arguments, the result and the errors are those of
    :func:`penex_loss`.

    Example:
        >>> z_loss(torch.zeros(1, 2), torch.tensor([0]), strength=0.5)  # log(2) + log(2)^2 / 2
        tensor(0.9334)
    """
    loss = row_losses.ZPenalty(nonnegative("strength", strength))
    return evaluate(input, target, loss, weight, ignore_index, reduction, label_smoothing)


def generalized_cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    *,
    q: float = 0.7,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Generalised cross-entropy, :math:`w_y (1 - p_y^q) / q`, which is bounded.

    Source: Zhang, Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks with
    Noisy Labels", NeurIPS 2018, arXiv 1805.07836. q = 1 is the mean absolute error of the
    probability; q towards 0, cross-entropy.

    `target` has class indices or integer one-hot labels, not probabilities. The other arguments,
    the result and the errors are those of :func:`penex_loss`.

    Example:
        >>> generalized_cross_entropy_loss(torch.zeros(1, 2), torch.tensor([0]), q=1.0)
        tensor(0.5000)
    """
    loss = row_losses.GeneralizedCrossEntropy(number("q", q, 0.0, 1.0, open_low=True))
    return evaluate(input, target, loss, weight, ignore_index, reduction)


def evaluate(
    input: Tensor,
    target: Tensor,
    loss: RowLoss,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Any loss, with the options of cross-entropy."""
    if loss.labels_only and isinstance(target, Tensor) and target.is_floating_point():
        raise ValueError(
            "target: this loss takes class indices or integer one-hot labels, got class "
            f"probabilities, {target.dtype}"
        )
    logits, arguments = validate(input, target, weight, ignore_index, reduction, label_smoothing)
    return like_input(loss_of(logits, arguments, loss), input, reduction)


def like_input(value: Tensor, input: Tensor, reduction: str) -> Tensor:
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
