r"""The losses of the paper's ablations, which show the purpose of each part of PENEX.

All of them use the exponential loss :math:`A = \exp(-\alpha f_y)` and differ in what keeps the
logits :math:`f \in \mathbb{R}^K` from growing without bound. Below, :math:`p` are the class
probabilities of one input and :math:`f` are the logits that minimise the expected loss there;
:math:`p` must be positive for every class, as an exponential loss has no finite minimiser
otherwise.

=======================  ==========================================  ===========================
loss                     minimiser                                   probabilities
=======================  ==========================================  ===========================
exponential alone (EX)   none                                        see `exponential_loss`
CONEX, hard              :math:`(\log p_j - \overline{\log p}) /     softmax(:math:`\alpha f`)
                         \alpha`
CONEX, squared penalty   as above, plus a constant                   softmax(:math:`\alpha f`)
CONEX, augmented         as above, plus a constant                   softmax(:math:`\alpha f`)
Lagrangian
LogSumExp penalty        :math:`\log p_j / (1+\alpha)` plus a        softmax(:math:`(1+\alpha) f`)
                         constant
linear penalty           :math:`\log(\alpha K p_j / \rho) / \alpha`  softmax(:math:`\alpha f`)
=======================  ==========================================  ===========================

CONEX is the multi-class exponential loss of Zhu, Zou, Rosset, Hastie, "Multi-class AdaBoost",
Statistics and Its Interface 2 (2009): :math:`\alpha = 1/(K-1)` under the constraint
:math:`\sum_j f_j = 0`.

Functions contain the mathematics, modules the state. They take logits of shape (N, K) and class
indices of shape (N); the result is the mean over the batch, 0-d, computed in float32, or in float64
if that is the dtype of the logits.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from penex import _links
from penex._inputs import check_tensors, choice, number, positive, refuse_labels
from penex._links import ProbabilityMixin
from penex.losses import PENEX

START_SENSITIVITY = 1e-6
"""The initial value of a schedule of the sensitivity, as in the authors' study."""
_NOTHING = torch.iinfo(torch.int64).min
"""An ignored class index that no target has."""


def exponential_loss(input: Tensor, target: Tensor, *, sensitivity: float) -> Tensor:
    r"""Exponential loss alone, the mean of :math:`\exp(-\alpha f_y)`.

    It decreases without end as all logits grow, so it has no minimiser and is not Fisher
    consistent. The limit of gradient descent is known for logits that start at 0 and are
    independent of each other (derived): gradient flow for a time t gives
    :math:`e^{\alpha f_j} = 1 + \alpha^2 p_j t`, so softmax(:math:`\alpha f`) tends to :math:`p`.

    Args:
        input: Logits, floating point, shape (N, K).
        target: Class indices, integer, shape (N).
        sensitivity: :math:`\alpha > 0`.

    Returns:
        The mean, 0-d; infinite if it overflows float32.

    Raises:
        TypeError: `input` is not floating point, or `target` not integer.
        ValueError: A shape is different.
        IndexError: A class index is out of range.
    """
    check_tensors(input, target)
    if input.ndim != 2 or target.ndim != 1 or target.is_floating_point():
        raise ValueError(
            "expected logits of shape (N, K) and class indices of shape (N), "
            f"got {tuple(input.shape)} and {target.dtype} {tuple(target.shape)}"
        )
    logits = _precise(input)
    try:
        true = logits.gather(1, target.long().unsqueeze(1))
    except RuntimeError as error:
        refuse_labels(target, logits.shape[1], _NOTHING, error)
        raise
    return torch.exp(-sensitivity * true).mean()


def sum_to_zero(input: Tensor) -> Tensor:
    """The hard constraint of CONEX: the last logit becomes minus the sum of the others.

    Args:
        input: Logits, shape (..., K), of which the last one is ignored.

    Returns:
        Logits of the same shape that sum to zero over the last dimension.
    """
    free = input[..., :-1]
    return torch.cat([free, -free.sum(-1, keepdim=True)], -1)


def constraint(input: Tensor) -> Tensor:
    """The violation of CONEX's constraint by logits (N, K): their sums, shape (N)."""
    return _precise(input).sum(1)


def squared_penalty(input: Tensor, *, penalty: float) -> Tensor:
    r"""The textbook penalty for the constraint :math:`c = \sum_j f_j = 0`.

    It is the mean of :math:`\tfrac{\rho}{2} c^2`, quadratic in the logits. (The authors' code
    squares the mean of squares, which is quartic.) At the minimum,
    :math:`\alpha p_j e^{-\alpha f_j} = \rho c` is the same for every class, so
    softmax(:math:`\alpha f`) is :math:`p` for every :math:`\rho > 0` (derived).

    Args:
        input: Logits, shape (N, K).
        penalty: :math:`\rho \ge 0`.

    Returns:
        The mean, 0-d.
    """
    return 0.5 * penalty * constraint(input).square().mean()


def augmented_lagrangian(input: Tensor, *, multiplier: float | Tensor, penalty: float) -> Tensor:
    r"""The augmented Lagrangian terms for the constraint :math:`c = \sum_j f_j = 0`.

    They are the mean of :math:`\nu c + \tfrac{\rho}{2} c^2`. At the minimum over the logits,
    :math:`\alpha p_j e^{-\alpha f_j} = \nu + \rho c` is the same for every class, so
    softmax(:math:`\alpha f`) is :math:`p` for every :math:`\nu` and :math:`\rho > 0` (derived).

    Args:
        input: Logits, shape (N, K).
        multiplier: :math:`\nu`, a number or a 0-d tensor, one for all inputs.
        penalty: :math:`\rho \ge 0`.

    Returns:
        The mean, 0-d.
    """
    return multiplier * constraint(input).mean() + squared_penalty(input, penalty=penalty)


def logsumexp_penalty(input: Tensor, *, penalty: float) -> Tensor:
    r"""The mean of :math:`\rho \log \sum_j \exp f_j`, which replaces PENEX's SumExp.

    With the exponential loss it is minimised by
    :math:`f_j = \frac{\log p_j}{1+\alpha} + \frac1\alpha \log \frac{\alpha T}{\rho}`, where
    :math:`T = \sum_k p_k^{1/(1+\alpha)}` (derived). So softmax(:math:`(1+\alpha) f`) is :math:`p`
    for every :math:`\rho`, as with SumExp, but the loss couples the classes, and the constant, of
    order :math:`\log(\alpha/\rho)/\alpha`, is large for a small :math:`\alpha`.

    Args:
        input: Logits, shape (N, K).
        penalty: :math:`\rho > 0`.

    Returns:
        The mean, 0-d.
    """
    return penalty * _precise(input).logsumexp(1).mean()


def linear_penalty(input: Tensor, *, penalty: float) -> Tensor:
    r"""The mean of :math:`\tfrac{\rho}{K} \sum_j f_j`: CONEX's Lagrangian with a fixed multiplier.

    With the exponential loss it is minimised by :math:`f_j = \log(\alpha K p_j / \rho) / \alpha`
    (derived), so softmax(:math:`\alpha f`) is :math:`p` for every :math:`\rho`. If a class has
    probability zero, and therefore on any finite sample with a large enough network, the loss is
    unbounded below.

    Args:
        input: Logits, shape (N, K).
        penalty: :math:`\rho > 0`.

    Returns:
        The mean, 0-d.
    """
    return penalty * _precise(input).mean()


def scheduled_sensitivity(
    step: int, *, steps: int, start: float, target: float, shape: str
) -> float:
    r"""The sensitivity of a training step: `start` at the first, exactly `target` at the last.

    Args:
        step: Number of steps done, >= 0; after the run, the sensitivity stays at `target`.
        steps: Number of steps of the run, >= 1. A run of one step uses `target` throughout.
        start: :math:`\alpha > 0` of the first step.
        target: :math:`\alpha > 0` of the last step.
        shape: ``"linear"``, or ``"cosine"``: half a period, flat at both ends.

    Returns:
        The sensitivity.
    """
    if step >= steps - 1:
        return target
    progress = step / (steps - 1)
    if shape == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return start + (target - start) * progress


class ExponentialLoss(ProbabilityMixin, nn.Module):
    r""":func:`exponential_loss` as a module: EX, or CONEX where the logits sum to zero.

    Its probabilities, and those of the penalised losses below unless they say otherwise, are
    softmax(:math:`\alpha f`).

    Args:
        sensitivity: As in :func:`exponential_loss`.
    """

    def __init__(self, sensitivity: float) -> None:
        super().__init__()
        self.sensitivity = positive("sensitivity", sensitivity)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return exponential_loss(input, target, sensitivity=self.sensitivity)

    def _calibrated_logits(self, logits: Tensor, dim: int) -> Tensor:
        return self.sensitivity * logits

    def extra_repr(self) -> str:
        return f"sensitivity={self.sensitivity:g}"


class _Penalized(ExponentialLoss):
    """The exponential loss with a penalty of constant strength."""

    def __init__(self, sensitivity: float, penalty: float) -> None:
        super().__init__(sensitivity)
        self.penalty = number("penalty", penalty, 0.0, math.inf)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, penalty={self.penalty:g}"


class SquaredPenaltyLoss(_Penalized):
    """CONEX with :func:`squared_penalty`.

    Args:
        sensitivity: As in :func:`exponential_loss`.
        penalty: As in :func:`squared_penalty`.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target) + squared_penalty(input, penalty=self.penalty)


class LogSumExpPenaltyLoss(_Penalized):
    r"""The exponential loss with :func:`logsumexp_penalty`.

    Its probabilities are softmax(:math:`(1+\alpha) f`).

    Args:
        sensitivity: As in :func:`exponential_loss`.
        penalty: As in :func:`logsumexp_penalty`. The default is that of the authors' code.
    """

    def __init__(self, sensitivity: float, penalty: float = 1.0) -> None:
        super().__init__(sensitivity, penalty)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target) + logsumexp_penalty(input, penalty=self.penalty)

    def _calibrated_logits(self, logits: Tensor, dim: int) -> Tensor:
        return _links.penex(logits, self.sensitivity)


class LinearPenaltyLoss(_Penalized):
    r"""The exponential loss with :func:`linear_penalty`.

    Args:
        sensitivity: As in :func:`exponential_loss`.
        penalty: As in :func:`linear_penalty`. None: :math:`\alpha`, for which the sum of the logits
            is stationary at logits of 0, the uniform prediction.
    """

    def __init__(self, sensitivity: float, penalty: float | None = None) -> None:
        super().__init__(sensitivity, sensitivity if penalty is None else penalty)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target) + linear_penalty(input, penalty=self.penalty)


class AugmentedLagrangianLoss(_Penalized):
    r"""CONEX with :func:`augmented_lagrangian`, including the updates of its multiplier.

    After every epoch it takes the textbook's dual step, :math:`\nu \leftarrow \nu + \rho\, \bar c`,
    where :math:`\bar c` is the mean of the constraint over the rows seen in training since the last
    step. (The authors' code takes the step after every batch and divides it by a second
    hyperparameter.) The multiplier starts at 0. It and the sums for the next step are buffers. With
    several ranks, each has its own multiplier; their averaged gradients correspond to the average
    of the multipliers.

    Args:
        sensitivity: As in :func:`exponential_loss`.
        penalty: :math:`\rho`, the strength of the penalty and the size of the dual step.
    """

    multiplier: Tensor
    total: Tensor
    rows: Tensor

    def __init__(self, sensitivity: float, penalty: float) -> None:
        super().__init__(sensitivity, penalty)
        for name in ("multiplier", "total", "rows"):
            self.register_buffer(name, torch.zeros(()))

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.total += constraint(input.detach()).sum()
            self.rows += len(input)
        return super().forward(input, target) + augmented_lagrangian(
            input, multiplier=self.multiplier, penalty=self.penalty
        )

    def after_epoch(self) -> None:
        """Take the dual step; it changes nothing if no row was seen."""
        self.multiplier += self.penalty * self.total / self.rows.clamp(min=1)
        self.total.zero_()
        self.rows.zero_()


class ScheduledPENEX(PENEX):
    r"""PENEX whose sensitivity grows during training, as in :func:`scheduled_sensitivity`.

    The last step uses the target, so the probabilities are softmax(:math:`(1+\alpha) f`) with
    :math:`\alpha` equal to the target. (In the authors' code, every step scales the result of the
    step before, which reaches 1e-6 after two steps.)

    The number of steps done is the buffer ``step``.

    Args:
        target: As in :func:`scheduled_sensitivity`.
        steps: As in :func:`scheduled_sensitivity`.
        start: As in :func:`scheduled_sensitivity`.
        shape: As in :func:`scheduled_sensitivity`.
    """

    step: Tensor

    def __init__(
        self, target: float, *, steps: int, start: float = START_SENSITIVITY, shape: str = "linear"
    ) -> None:
        super().__init__(sensitivity=target)
        self.target = self.sensitivity
        self.start = positive("start", start)
        self.steps = int(number("steps", steps, 1, math.inf))
        self.shape = choice("shape", shape, ("linear", "cosine"))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._set(0)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # The schedule is loaded first: the running penalty belongs to the sensitivity at that step.
        if prefix + "step" in state_dict:
            self._set(int(state_dict[prefix + "step"]))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def after_step(self) -> None:
        """Count an optimiser step and set the sensitivity of the next."""
        self._set(self.done + 1)

    def _link(self, logits: Tensor, dim: int) -> Tensor:
        return _links.penex(logits, self.target)

    def _set(self, done: int) -> None:
        self.done = done  # in addition to the buffer, as reading that from a GPU synchronises
        self.step.fill_(done)
        self.sensitivity = scheduled_sensitivity(
            done, steps=self.steps, start=self.start, target=self.target, shape=self.shape
        )

    def extra_repr(self) -> str:
        return f"target={self.target:g}, steps={self.steps}, shape={self.shape!r}"


def _precise(input: Tensor) -> Tensor:
    """Convert to float32, unless the dtype is float64."""
    return input if input.dtype == torch.float64 else input.float()
