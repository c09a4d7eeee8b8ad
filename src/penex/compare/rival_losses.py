r"""Further losses that the comparison knows, for mean losses of class indices.

Below, :math:`f` are the logits of a row (N, K), :math:`y` its label, :math:`p =
\operatorname{softmax}(f)`, and :math:`q` the class probabilities.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penex._inputs import number
from penex._links import MIN_FACTOR, ProbabilityMixin


class MaxSupLoss(ProbabilityMixin, nn.Module):
    r"""Max suppression: cross-entropy :math:`+ \beta (\max_j f_j - \tfrac1K \sum_j f_j)`.

    Label smoothing penalises the logit of the label in this way, right or wrong; this loss
    penalises the largest one (Zhou et al., "MaxSup: Overcoming Representation Collapse in Label
    Smoothing", NeurIPS 2025, arXiv 2502.15798).

    The expected loss is minimal at :math:`p = q - \beta (e_{\max} - 1/K)`, so that the link is
    :math:`q = p + \beta (e_{\max} - 1/K)` (derived). Where the two largest probabilities differ by
    less than :math:`\beta`, their logits are equal at the minimum, and the link gives neither.

    Args:
        strength: :math:`\beta \ge 0`.
    """

    def __init__(self, strength: float = 0.1) -> None:
        super().__init__()
        self.strength = number("strength", strength, 0.0, math.inf)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The mean loss of logits (N, K) and labels (N,)."""
        penalty = (input.amax(1) - input.mean(1)).mean()
        return F.cross_entropy(input, target) + self.strength * penalty

    def _calibrated_logits(self, logits: Tensor, dim: int) -> Tensor:
        p = logits.softmax(dim)
        top = torch.zeros_like(p).scatter(dim, p.argmax(dim, keepdim=True), 1.0)
        shifted = p + self.strength * (top - 1 / p.shape[dim])
        return torch.maximum(shifted, MIN_FACTOR * p).log()

    def extra_repr(self) -> str:
        return f"strength={self.strength:g}"


class MarginLabelSmoothingLoss(ProbabilityMixin, nn.Module):
    r"""Margin-based label smoothing.

    Cross-entropy :math:`+ \lambda \sum_j \max(0, \max_k f_k - f_j - m)`, which bounds the distance
    of a logit from the largest by about :math:`m` (Liu et al., "The Devil is in the Margin:
    Margin-based Label Smoothing for Network Calibration", CVPR 2022, arXiv 2111.15430). The
    probabilities are :math:`p`; a class less probable than :math:`e^{-m}` times the most probable
    one keeps a logit at the margin, and is given too high a probability.

    Args:
        margin: :math:`m \ge 0`.
        strength: :math:`\lambda \ge 0`. The default is the paper's.
    """

    def __init__(self, margin: float = 10.0, strength: float = 0.1) -> None:
        super().__init__()
        self.margin = number("margin", margin, 0.0, math.inf)
        self.strength = number("strength", strength, 0.0, math.inf)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The mean loss of logits (N, K) and labels (N,)."""
        excess = F.relu(input.amax(1, keepdim=True) - input - self.margin).sum(1).mean()
        return F.cross_entropy(input, target) + self.strength * excess

    def _calibrated_logits(self, logits: Tensor, dim: int) -> Tensor:
        return logits

    def extra_repr(self) -> str:
        return f"margin={self.margin:g}, strength={self.strength:g}"


class OneVsRestLoss(ProbabilityMixin, nn.Module):
    r"""A sigmoid for each class: the binary cross-entropies of all classes, summed.

    It is minimal where :math:`\sigma(f_j) = q_j`, so the probabilities are :math:`\sigma(f)`,
    normalised.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The mean loss of logits (N, K) and labels (N,)."""
        labels = F.one_hot(target, input.shape[1]).to(input.dtype)
        total = F.binary_cross_entropy_with_logits(input, labels, reduction="sum")
        return total / len(target)

    def _calibrated_logits(self, logits: Tensor, dim: int) -> Tensor:
        return F.logsigmoid(logits)
