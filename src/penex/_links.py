r"""The link of each loss, which maps trained logits to class probabilities.

The logits that minimise an expected loss are a function of the class probabilities :math:`q` of the
input. Its inverse is the loss's link. For cross-entropy the link is :math:`p =
\operatorname{softmax}(f)`; for most other losses it is not.

The functions take logits, float32 or float64, and the class dimension, and return *calibrated
logits*, whose softmax over that dimension gives the probabilities. They stay in the log domain,
where no finite logit overflows, and branch only on Python numbers, so that they can be compiled and
exported.

With class weights :math:`w`, the probabilities are those of the weighted classes, :math:`\propto
w_k q_k`, as with cross-entropy.

Some links have the form :math:`p_k r_k`, where :math:`r_k` may be negative for logits that do not
minimise the expected loss. It is then replaced by :data:`MIN_FACTOR`, and the result is normalised.
Every link keeps the order of the classes in the logits, and so the argmax, except
:func:`remove_smoothing` with class weights.

To add a loss, write its link here and return it from the ``_link`` of its criterion.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_FACTOR = 1e-3
"""The smallest :math:`r_k`. On digits, values from 1e-3 to 1e-6 give the same NLL within 2 %."""


class ProbabilityMixin:
    """``predict_proba`` and ``predict_log_proba`` for a criterion that defines its link."""

    def _calibrated_logits(self, logits: Tensor, dim: int) -> Tensor:
        """Apply the link, a function of this module, to float32 or float64 logits."""
        raise NotImplementedError

    def predict_proba(self, input: Tensor, dim: int | None = None) -> Tensor:
        """Class probabilities of logits trained with this loss.

        They are the probabilities at which the expected loss is minimal: of the targets before
        label smoothing and, with class weights, of the weighted classes, as with cross-entropy.

        Args:
            input: Logits, floating point, any shape.
            dim: The class dimension. None: 1, or 0 for unbatched input.

        Returns:
            Probabilities, shape and dtype of `input`, computed in float32 or better.

        Raises:
            TypeError: `input` is not floating point.
        """
        dim = class_dim(input, dim)
        return F.softmax(self._calibrated_logits(precise(input), dim), dim).to(input.dtype)

    def predict_log_proba(self, input: Tensor, dim: int | None = None) -> Tensor:
        """Logarithm of :meth:`predict_proba`, computed in the log domain."""
        dim = class_dim(input, dim)
        return F.log_softmax(self._calibrated_logits(precise(input), dim), dim).to(input.dtype)


def precise(input: Tensor) -> Tensor:
    """Convert logits of lower precision to float32; float64 stays as it is."""
    if not input.is_floating_point():
        raise TypeError(f"input: expected floating-point logits, got {input.dtype}")
    return input if input.dtype == torch.float64 else input.float()


def class_dim(input: Tensor, dim: int | None) -> int:
    return min(1, input.ndim - 1) if dim is None else dim


def penex(logits: Tensor, sensitivity: float, huberization: float | None = None) -> Tensor:
    r"""PENEX, :math:`(1+\alpha) f`; the same for log-PENEX with any power.

    A huberized exponential has slope :math:`\alpha \min(e^{-\alpha f}, t)`, so the minimum of the
    loss is at :math:`\rho e^{f_k} = \alpha q_k \min(e^{-\alpha f_k}, t)` and the link is
    :math:`f + \max(\alpha f, -\log t)` (derived).
    """
    if huberization is None:
        return (1 + sensitivity) * logits
    return logits + (sensitivity * logits).clamp(min=-math.log(huberization))


def focal(logits: Tensor, gamma: float, dim: int) -> Tensor:
    r"""Focal loss, :math:`q \propto p / ((1-p)^\gamma - \gamma (1-p)^{\gamma-1} p \log p)`.

    Source: Charoenphakdee et al., "On Focal Loss for Class-Posterior Probability Estimation: A
    Theoretical Perspective", CVPR 2021, arXiv 2011.09172. The denominator is :math:`-p` times the
    derivative of the focal term :math:`-(1-p)^\gamma \log p`, which is convex in p for every
    :math:`\gamma \ge 0` (derived), so the link is increasing in p.
    """
    if gamma == 0:
        return logits
    log_p = F.log_softmax(logits, dim)
    # The factor is (1-p)^-gamma / (1 + gamma h) with h = -p log p / (1-p) = t / (e^t - 1) at
    # t = -log p. Near t = 0 the quotient is 0 / 0 and its series is exact to 1e-11.
    t = -log_p
    quotient = t.clamp(0.01, 80.0)
    quotient = torch.where(t < 0.01, 1 - t / 2 + t * t / 12, quotient / torch.expm1(quotient))
    # Finite, because -inf would later end in a difference of infinities.
    log_rest = _log_complement(log_p, dim).clamp(min=-1e30)
    return log_p - gamma * log_rest - torch.log1p(gamma * quotient)


def _log_complement(log_p: Tensor, dim: int) -> Tensor:
    """log(1 - p), computed from the other classes for the top class, whose p may round to 1."""
    top = log_p.argmax(dim, keepdim=True)
    is_top = torch.zeros_like(log_p, dtype=torch.bool).scatter(dim, top, True)
    others = log_p.masked_fill(is_top, -math.inf)
    return torch.where(is_top, others.logsumexp(dim, keepdim=True), torch.log1p(-others.exp()))


def confidence_penalty(logits: Tensor, strength: float, dim: int) -> Tensor:
    r"""Confidence penalty, :math:`q = p (1 + \beta (\log p + H(p)))` (derived).

    This is negative where :math:`\log p < -H(p) - 1/\beta`. It increases with p wherever it is
    positive, and the most probable class has :math:`\log p + H(p) \ge 0`.
    """
    if strength == 0:
        return logits
    log_p = F.log_softmax(logits, dim)
    finite = log_p.where(log_p > -math.inf, 0.0)  # p log p is 0 at p = 0
    entropy = -(log_p.exp() * finite).sum(dim, keepdim=True)
    return log_p + (1 + strength * (log_p + entropy)).clamp(min=MIN_FACTOR).log()


def generalized_cross_entropy(logits: Tensor, q: float, dim: int) -> Tensor:
    r"""Generalised cross-entropy, :math:`\propto p^{1-q}` (derived).

    The minimiser of the mean absolute error, q = 1, puts all probability on the most probable class
    whatever the true probabilities are, so the link returns the uniform distribution.
    """
    log_p = F.log_softmax(logits, dim)
    return (1 - q) * log_p.clamp(min=torch.finfo(log_p.dtype).min)  # avoids 0 * inf


def remove_smoothing(
    logits: Tensor, smoothing: float, dim: int, weight: Tensor | None = None
) -> Tensor:
    r"""Convert the probabilities of smoothed targets to those of the original targets.

    With label smoothing, the link of any loss gives the probabilities of the smoothed targets,
    :math:`p = (1-\varepsilon) q + \varepsilon/K`; so :math:`q \propto p - \varepsilon/K`, which is
    negative where :math:`p < \varepsilon/K`.

    With class weights, :math:`p_k \propto w_k s_k`, where :math:`s` are the probabilities of the
    smoothed targets, and the result is :math:`w_k q_k \propto p_k (1 - \varepsilon / (K s_k))`,
    whose order may differ from that of :math:`p`. For a class of weight zero :math:`s_k` cannot be
    recovered and is taken to be zero.

    Args:
        logits: Calibrated logits of the smoothed targets.
        smoothing: :math:`\varepsilon` in [0, 1]; at 1, only the order of the classes in the result
            has a meaning.
        dim: The class dimension.
        weight: :math:`w`, shape (K).

    Returns:
        Calibrated logits.
    """
    if smoothing == 0:
        return logits
    log_p = log_s = F.log_softmax(logits, dim)
    if weight is not None:
        shape = [1] * logits.ndim
        shape[dim] = -1
        log_weight = weight.to(logits.dtype).log().view(shape)
        unweighted = (log_p - log_weight).where(log_weight > -math.inf, -math.inf)
        log_s = F.log_softmax(unweighted, dim)
    log_share = math.log(smoothing / logits.shape[dim]) - log_s
    return log_p + torch.log1p(-log_share.clamp(max=math.log1p(-MIN_FACTOR)).exp())
