r"""The link of each loss: what trained logits say about the class probabilities.

The logits that minimise an expected loss are a function of the class probabilities :math:`q` of the
input. Its inverse is the loss's link. For cross-entropy the link is :math:`p =
\operatorname{softmax}(f)`; for most other losses it is not.

The functions take logits, float32 or float64, and the class dimension, and return *calibrated
logits*, those whose softmax over that dimension are the probabilities. They stay in the log domain,
where no finite logit overflows, and branch on Python numbers alone, so that they can be compiled
and exported.

Under class weights :math:`w`, the probabilities are those of the weighted classes, :math:`\propto
w_k q_k`, as with cross-entropy.

Some links have the form :math:`p_k r_k`, and leave [0, 1] where the logits are no minimiser and
:math:`r_k` is negative. There :data:`MIN_FACTOR` takes its place, and the result is normalised.
Every link keeps the order of the classes in the logits, and so the argmax, except
:func:`remove_smoothing` with class weights.

To add a loss, write its link here and return it from the ``_link`` of its criterion.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_FACTOR = 1e-3
"""The least :math:`r_k`. On digits, values from 1e-3 to 1e-6 give the same NLL to 2 %."""


class ProbabilityMixin:
    """``predict_proba`` and ``predict_log_proba`` of a criterion that says what its link is."""

    def _calibrated_logits(self, logits: Tensor, dim: int) -> Tensor:
        """The link, a function of this module: float32 or float64 logits to calibrated logits."""
        raise NotImplementedError

    def predict_proba(self, input: Tensor, dim: int | None = None) -> Tensor:
        """Class probabilities of logits trained with this loss.

        Those at which the expected loss is minimal: of the targets before label smoothing, and,
        with class weights, of the weighted classes, as with cross-entropy.

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
        """Logarithm of :meth:`predict_proba`, computed without leaving the log domain."""
        dim = class_dim(input, dim)
        return F.log_softmax(self._calibrated_logits(precise(input), dim), dim).to(input.dtype)


def precise(input: Tensor) -> Tensor:
    """Logits in float32 at least."""
    if not input.is_floating_point():
        raise TypeError(f"input: expected floating-point logits, got {input.dtype}")
    return input if input.dtype == torch.float64 else input.float()


def class_dim(input: Tensor, dim: int | None) -> int:
    return min(1, input.ndim - 1) if dim is None else dim


def penex(logits: Tensor, sensitivity: float, huberization: float | None = None) -> Tensor:
    r"""PENEX, :math:`(1+\alpha) f`; log-PENEX, for every power.

    A huberized exponential has slope :math:`\alpha \min(e^{-\alpha f}, t)`, so that its minimum is
    at :math:`\rho e^{f_k} = \alpha q_k \min(e^{-\alpha f_k}, t)` and the link is
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
    # Not -inf, whose product with gamma would be lost in a difference of infinities.
    log_rest = _log_complement(log_p, dim).clamp(min=-1e30)
    return log_p - gamma * log_rest - torch.log1p(gamma * quotient)


def _log_complement(log_p: Tensor, dim: int) -> Tensor:
    """log(1 - p), for the most probable class from the others, as its own p may round to 1."""
    top = log_p.argmax(dim, keepdim=True)
    is_top = torch.zeros_like(log_p, dtype=torch.bool).scatter(dim, top, True)
    others = log_p.masked_fill(is_top, -math.inf)
    return torch.where(is_top, others.logsumexp(dim, keepdim=True), torch.log1p(-others.exp()))


def confidence_penalty(logits: Tensor, strength: float, dim: int) -> Tensor:
    r"""Confidence penalty, :math:`q = p (1 + \beta (\log p + H(p)))` (derived).

    Where :math:`\log p < -H(p) - 1/\beta` this is negative. It increases with p wherever it is
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

    The mean absolute error, q = 1, puts all probability on the most probable class, so its logits
    do not tell the others': this gives the uniform distribution.
    """
    log_p = F.log_softmax(logits, dim)
    return (1 - q) * log_p.clamp(min=torch.finfo(log_p.dtype).min)  # not 0 * inf


def remove_smoothing(
    logits: Tensor, smoothing: float, dim: int, weight: Tensor | None = None
) -> Tensor:
    r"""From the probabilities of smoothed targets to those of the targets.

    The link of any loss gives, with label smoothing, the probabilities of the targets that it saw,
    :math:`p = (1-\varepsilon) q + \varepsilon/K`; so :math:`q \propto p - \varepsilon/K`, negative
    where :math:`p < \varepsilon/K`.

    With class weights it saw :math:`p_k \propto w_k s_k`, where :math:`s` are the smoothed targets,
    and the result is :math:`w_k q_k \propto p_k (1 - \varepsilon / (K s_k))`, whose order may
    differ from that of :math:`p`. A class of weight zero does not tell its share of :math:`s`,
    which is taken to be nothing.

    Args:
        logits: Calibrated logits of the smoothed targets.
        smoothing: :math:`\varepsilon` in [0, 1]; at 1 the targets have left no trace, and what
            comes out has no meaning but the order of the classes.
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
