r"""The penalty :math:`\rho`: where it comes from, in tensors and, on the CPU, in plain numbers."""

import math
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from penex._inputs import positive

PENALTY_MIN, PENALTY_MAX = 1e-10, 100.0


def check_penalty_bounds(penalty_min: float, penalty_max: float) -> None:
    """Refuse bounds that are not positive numbers in order."""
    low, high = positive("penalty_min", penalty_min), positive("penalty_max", penalty_max)
    if low > high:
        raise ValueError(f"penalty_min: expected at most penalty_max = {high:g}, got {low:g}")


class PenaltySums(NamedTuple):
    """The two sums that the estimate is made of, as logarithms of 0-d tensors."""

    exponential: Tensor
    """log sum_i A_i"""
    partition: Tensor
    """log sum_i omega_i S_i"""
    num_classes: int

    @classmethod
    def of(cls, exponential: Tensor, partition: Tensor, num_classes: int) -> "PenaltySums":
        """From log A and log omega S of the rows, or of the classes that make up A."""
        return cls(
            exponential.flatten().logsumexp(0), partition.flatten().logsumexp(0), num_classes
        )

    def empty(self) -> Tensor:
        """Whether there was nothing to sum."""
        return self.partition == -math.inf

    def finite(self) -> Tensor:
        """Whether the estimate means something: rows were kept, and no sum is NaN or infinite."""
        return self.exponential.isfinite() & self.partition.isfinite()

    def log_penalty(self, alpha: float, penalty_min: float, penalty_max: float) -> Tensor:
        """Log of the clamped estimate; of alpha / K, its value at f = 0, if there was no row."""
        estimate = math.log(alpha) + self.exponential - self.partition
        estimate = estimate.where(~self.empty(), math.log(alpha / self.num_classes))
        return estimate.clamp(math.log(penalty_min), math.log(penalty_max))

    def penalty(self, alpha: float, penalty_min: float, penalty_max: float) -> Tensor:
        """The clamped estimate itself."""
        estimate = self.log_penalty(alpha, penalty_min, penalty_max).exp()
        return estimate.clamp(penalty_min, penalty_max)  # exp(log 100) need not be 100

    def over_ranks(
        self, denominator: Tensor, group: dist.ProcessGroup
    ) -> tuple["PenaltySums", Tensor]:
        """The sums over the batches of all ranks of `group`, and the mean of their denominators.

        One collective of three numbers.
        """
        local = torch.stack([self.exponential, self.partition, denominator])
        ranks = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
        dist.all_gather(ranks, local, group=group)
        exponentials, partitions, denominators = torch.stack(ranks).unbind(1)
        sums = PenaltySums(exponentials.logsumexp(0), partitions.logsumexp(0), self.num_classes)
        return sums, denominators.mean()


class Settled(NamedTuple):
    """What a batch cannot tell by itself."""

    log_penalty: float | Tensor
    denominator: Tensor
    """What ``mean`` divides by, 0-d; zero where there is nothing to learn from."""

    def divisor(self) -> Tensor:
        """The denominator, or one in place of zero, so that the mean of nothing is 0."""
        return self.denominator.where(self.denominator != 0, 1)


class Penalty(Protocol):
    """A rule for the penalty of a batch."""

    local: bool
    """Whether the batch at hand decides it, without a word from other processes."""

    needs_sums: bool
    """Whether :meth:`settle` looks at the sums."""

    def settle(self, sums: PenaltySums | None, denominator: Tensor) -> Settled:
        """What holds for a batch with these sums, whose own mean has this denominator."""
        ...

    def value(self, exponential: float, partition: float) -> float:
        """rho itself for a batch with these sums, which are neither zero nor infinite."""
        ...


class Given:
    """A number, or a 0-d tensor."""

    local, needs_sums = True, False

    def __init__(self, penalty: float | Tensor) -> None:
        if isinstance(penalty, Tensor):
            if penalty.numel() != 1:
                raise ValueError(
                    f"penalty: expected a 0-d tensor, got shape {tuple(penalty.shape)}"
                )
            penalty = penalty.detach().reshape(())
            self.penalty: float | Tensor = (
                penalty if penalty.dtype == torch.float64 else penalty.float()
            )
        else:
            self.penalty = positive("penalty", penalty)

    def settle(self, sums: PenaltySums | None, denominator: Tensor) -> Settled:
        value = self.penalty
        return Settled(value.log() if isinstance(value, Tensor) else math.log(value), denominator)

    def value(self, exponential: float, partition: float) -> float:
        return float(self.penalty)


class Estimated:
    """The batch's own estimate."""

    local, needs_sums = True, True

    def __init__(self, alpha: float, penalty_min: float, penalty_max: float) -> None:
        self.bounds = alpha, penalty_min, penalty_max

    def settle(self, sums: PenaltySums | None, denominator: Tensor) -> Settled:
        assert sums is not None  # noqa: S101  # needs_sums says so
        return Settled(sums.log_penalty(*self.bounds), denominator)

    def value(self, exponential: float, partition: float) -> float:
        return estimate(exponential, partition, *self.bounds)


def estimate(
    exponential: float,
    partition: float,
    alpha: float,
    penalty_min: float,
    penalty_max: float,
) -> float:
    """:meth:`PenaltySums.penalty` in plain numbers."""
    return min(max(alpha * exponential / partition, penalty_min), penalty_max)
