r"""The target of each row, in the two forms in which a loss meets it outside of its definition.

Either form has what :mod:`penex._row_losses` calls the target's logit :math:`t_i` and the weights
:math:`\omega_i` of the rows, and adds :math:`\frac{\partial L}{\partial t_i} v_{ij}` to the
gradient.
"""

import torch
from torch import Tensor

from penex._inputs import LossArguments, can_inspect, computed_in, smooth
from penex._log_mean import row_dtype
from penex._passes import EXACT_RANGE, WHOLE, in_pieces, part, powers, powers_from

EXACT_POWER_IN_FLOAT32 = 0.05
"""Below this power a log mean loses digits, when the logarithm is divided by it."""


class Labels:
    """Class indices."""

    denominator = None

    def __init__(self, input: Tensor, arguments: LossArguments) -> None:
        inspect, dtype = can_inspect(input), computed_in(input)
        self.index = arguments.target.unsqueeze(1)
        """(N, 1, d1, ...), valid to gather with, like all that follows."""
        self.ignored: Tensor | None = None
        """A mask; None: no row is."""
        self.weights: Tensor | None = None
        """omega; None: one everywhere."""
        if not (inspect and _all_kept(arguments)):
            self.ignored = self.index == arguments.ignore_index
            self.index = self.index.masked_fill(self.ignored, 0)
        if arguments.weight is not None:
            self.weights = arguments.weight.to(dtype).take(self.index)
            if self.ignored is not None:
                self.weights = self.weights.masked_fill(self.ignored, 0)
        elif self.ignored is not None:
            self.weights = (~self.ignored).to(dtype)
        self.skipped = self.ignored if arguments.weight is None else _zeros(self.weights, inspect)
        """Where omega is zero, a mask; None: nowhere."""

    def select(self, values: Tensor, piece: slice = WHOLE) -> Tensor:
        """`values` (N, K, d1, ...) at the labels, in float32 or float64."""
        selected = values.gather(1, part(self.index, piece))
        return selected.float() if selected.dtype.itemsize < 4 else selected

    def add_to(self, gradient: Tensor, x: Tensor, piece: slice, dt: Tensor) -> None:
        """Add dt v of the rows `piece`, whose logits are `x`, to their gradient."""
        gradient.scatter_add_(1, part(self.index, piece), part(dt, piece))


def _all_kept(arguments: LossArguments) -> bool:
    """Whether no row is ignored."""
    target = arguments.target
    if arguments.ignore_index < 0:
        return target.amin().item() >= 0
    return not (target == arguments.ignore_index).any().item()


def _zeros(weights: Tensor | None, inspect: bool) -> Tensor | None:
    """A mask of the rows without weight; None: there is none."""
    if weights is None:
        return None
    zeros = weights == 0
    return None if inspect and not zeros.any() else zeros


class SoftTargets:
    """Class probabilities, or labels with smoothing, on the CPU.

    The target weights m_ij = w_j q_ij are never held for all rows.
    """

    def __init__(self, input: Tensor, arguments: LossArguments, alpha: float) -> None:
        self.alpha, self.smoothing = alpha, arguments.label_smoothing
        self.share = arguments.label_smoothing / input.shape[1]
        self.probabilities: Tensor | None = None
        self.class_weights: Tensor | None = None
        self.weights: Tensor | None = None
        self.t: Tensor | None = None
        dtype, mean_weight = computed_in(input), 1.0
        if arguments.weight is not None:
            weight = arguments.weight.to(dtype)
            self.class_weights = weight.view(-1, *[1] * (input.ndim - 2))
            mean_weight = weight.mean().item()
        if arguments.target.is_floating_point():
            self.probabilities = arguments.target
            _, (self.weights,) = in_pieces(
                lambda q, _: self._weighted(q.to(dtype)),
                self.probabilities,
                False,
                lambda weighted, _: weighted.sum(1, True),
            )
            self.denominator = float(self.weights.numel())
        else:
            self.labels = Labels(input, arguments)
            own = self.labels.weights
            rows = self.labels.index.numel()
            self.denominator = float(rows) if own is None else own.sum().item()
            if own is not None:  # omega = (1 - eps) w_y + eps mean(w)
                others = torch.full_like(own, self.smoothing * mean_weight)
                if self.labels.ignored is not None:
                    others.masked_fill_(self.labels.ignored, 0)
                self.weights = others.add_(own, alpha=1 - self.smoothing)
        self.skipped = _zeros(self.weights, True)

    def _weighted(self, probabilities: Tensor) -> Tensor:
        """m of some rows of class probabilities."""
        smoothed = smooth(probabilities, self.smoothing)
        return smoothed if self.class_weights is None else smoothed * self.class_weights

    def mean(self, values: Tensor, piece: slice = WHOLE) -> Tensor:
        """sum_j m_ij values_ij / omega_i of the rows `piece`; 0 where omega is 0."""
        if self.probabilities is not None:
            q = part(self.probabilities, piece).to(values.dtype)
            result = (self._weighted(q) * values).sum(1, True)
        else:
            at_label = values.gather(1, part(self.labels.index, piece))
            if self.labels.weights is not None:
                at_label = at_label * part(self.labels.weights, piece)
            others = values if self.class_weights is None else values * self.class_weights
            result = others.sum(1, True).mul_(self.share)
            result.add_(at_label, alpha=1 - self.smoothing)
        if self.weights is not None:
            result = result / part(self.weights, piece)
        return result if self.skipped is None else result.masked_fill(part(self.skipped, piece), 0)

    def logit(self, input: Tensor) -> Tensor | None:
        """t, in :func:`row_dtype`; None: by sums of exponentials it cannot be had exactly."""
        if self.alpha == 0:
            _, (t,) = in_pieces(lambda x, _: x.to(computed_in(x)), input, False, self.mean)
            return t.to(row_dtype(t)) if t.isfinite().all() else None
        tiny = self.alpha < EXACT_POWER_IN_FLOAT32  # then the mean of e^{-alpha f} - 1

        def exponentials(x: Tensor, out: Tensor | None) -> Tensor:
            if tiny:
                return (x.to(computed_in(x)) * -self.alpha).expm1_()
            return powers(x, None, -self.alpha)

        _, (mean,) = in_pieces(exponentials, input, False, self.mean)
        if self.skipped is not None:
            mean.masked_fill_(self.skipped, 0 if tiny else 1)
        least = -0.5 if tiny else 1 / EXACT_RANGE
        if not least < mean.amin().item() <= mean.amax().item() < EXACT_RANGE:
            return None
        mean = mean.to(row_dtype(mean))
        self.t = (mean.log1p_() if tiny else mean.log_()).div_(-self.alpha)
        return self.t

    def add_to(self, gradient: Tensor, x: Tensor, piece: slice, dt: Tensor) -> None:
        """Add dt v of the rows `piece`, whose logits are `x`, to their gradient."""
        slope = part(dt, piece)
        if self.weights is not None:
            slope = slope / part(self.weights, piece)
        if self.skipped is not None:
            slope = slope.masked_fill(part(self.skipped, piece), 0)
        values = None
        if self.t is not None:
            values = powers_from(x, self.alpha * part(self.t, piece), -self.alpha)
        if self.probabilities is not None:
            weighted = self._weighted(part(self.probabilities, piece).to(gradient.dtype))
            gradient.addcmul_(weighted if values is None else values.mul_(weighted), slope)
            return
        index = part(self.labels.index, piece)
        at_label = (
            slope if self.labels.weights is None else slope * part(self.labels.weights, piece)
        )
        if values is not None:
            at_label = at_label * values.gather(1, index)
        others = self.class_weights
        if values is not None:
            others = values if others is None else values.mul_(others)
        if others is None:
            gradient.add_(slope, alpha=self.share)
        else:
            gradient.addcmul_(others, slope, value=self.share)
        gradient.scatter_add_(1, index, at_label * (1 - self.smoothing))
