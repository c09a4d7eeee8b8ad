r"""The penalty :math:`\rho`: where it comes from, in tensors and, on the CPU, in plain numbers."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from penex._inputs import can_inspect, check_device, positive

if TYPE_CHECKING:
    from penex.losses import PENEX

PENALTY_MIN, PENALTY_MAX = 1e-10, 100.0


class Bounds(NamedTuple):
    """What turns two sums into an estimate."""

    sensitivity: float
    penalty_min: float
    penalty_max: float

    @classmethod
    def checked(cls, sensitivity: float, penalty_min: float, penalty_max: float) -> "Bounds":
        """The same, refused unless they are positive numbers in order."""
        low, high = positive("penalty_min", penalty_min), positive("penalty_max", penalty_max)
        if low > high:
            raise ValueError(f"penalty_min: expected at most penalty_max = {high:g}, got {low:g}")
        return cls(positive("sensitivity", sensitivity), low, high)

    def estimate(self, exponential: float, partition: float) -> float:
        """The clamped estimate from sum_i A_i and sum_i omega_i S_i."""
        estimate = self.sensitivity * exponential / partition
        return min(max(estimate, self.penalty_min), self.penalty_max)


class LogSums(NamedTuple):
    """The two sums that the estimate is made of, as logarithms of 0-d tensors."""

    exponential: Tensor
    """log sum_i A_i"""
    partition: Tensor
    """log sum_i omega_i S_i"""
    num_classes: int

    def log_estimate(self, bounds: Bounds) -> tuple[Tensor, Tensor]:
        """Log of the clamped estimate, and whether it means something.

        It does not where no row was kept or a sum is NaN or infinite: then it is that of alpha / K,
        the estimate at f = 0.
        """
        ratio = self.exponential - self.partition
        neutral = -math.log(self.num_classes)
        estimate = ratio.nan_to_num(nan=neutral, posinf=math.inf, neginf=-math.inf)
        low, high = (math.log(x / bounds.sensitivity) for x in bounds[1:])
        return estimate.clamp(low, high) + math.log(bounds.sensitivity), ratio.abs() < math.inf


def gather_over_ranks(numbers: Sequence[Tensor], group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """Each of some 0-d tensors, from all ranks of `group`, by one collective."""
    local = torch.stack([number.to(numbers[0].dtype) for number in numbers]).detach()
    ranks = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(ranks, local, group=group)
    return torch.stack(ranks).unbind(1)


class Resolved(NamedTuple):
    """What a row of PENEX has to know of the batch."""

    log_penalty: float | Tensor
    denominator: float | Tensor
    """What ``mean`` divides by; zero where there is nothing to learn from."""


class PenaltyRule(Protocol):
    """A rule for the penalty of a batch."""

    local: bool
    """Whether the batch at hand decides it, without other processes."""

    needs_sums: bool
    """Whether :meth:`resolve` uses the sums."""

    def resolve(self, sums: LogSums | None, denominator: Tensor) -> Resolved:
        """What holds for a batch with these sums, whose own mean has this denominator."""
        ...

    def value(self, exponential: float, partition: float) -> float:
        """rho itself for a batch with these sums, which are neither zero nor infinite."""
        ...


class GivenPenalty:
    """A number, or a 0-d tensor."""

    local, needs_sums = True, False

    def __init__(self, penalty: float | Tensor) -> None:
        self.penalty: float | Tensor
        if not isinstance(penalty, Tensor):
            self.penalty = positive("penalty", penalty)
            return
        if penalty.numel() != 1:
            raise ValueError(f"penalty: expected a 0-d tensor, got shape {tuple(penalty.shape)}")
        penalty = penalty.detach().reshape(())
        if can_inspect(penalty):
            positive("penalty", penalty.item())
        self.penalty = penalty if penalty.dtype == torch.float64 else penalty.float()

    def resolve(self, sums: LogSums | None, denominator: Tensor) -> Resolved:
        value = self.penalty
        return Resolved(value.log() if isinstance(value, Tensor) else math.log(value), denominator)

    def value(self, exponential: float, partition: float) -> float:
        return float(self.penalty)


class EstimatedPenalty:
    """The batch's own estimate."""

    local, needs_sums = True, True

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds

    def resolve(self, sums: LogSums | None, denominator: Tensor) -> Resolved:
        assert sums is not None  # noqa: S101  # needs_sums says so
        return Resolved(sums.log_estimate(self.bounds)[0], denominator)

    def value(self, exponential: float, partition: float) -> float:
        return self.bounds.estimate(exponential, partition)


def rule_of(penalty: float | Tensor | None, sensitivity: float) -> PenaltyRule:
    """A given penalty, or for None the batch's own estimate."""
    if penalty is None:
        return EstimatedPenalty(Bounds(sensitivity, PENALTY_MIN, PENALTY_MAX))
    return GivenPenalty(penalty)


def world(group: dist.ProcessGroup | str | None) -> dist.ProcessGroup | None:
    """`group`, or what "world" stands for by now."""
    if isinstance(group, str):
        return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    return group


def in_backward() -> bool:
    """Whether this forward pass recomputes one, as activation checkpointing does."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class RunningPenalty:
    """The penalty of a criterion for one batch, in any mode; training updates it first.

    A recomputation in the backward pass finds the penalty already updated, and uses it as it is.
    """

    def __init__(self, criterion: "PENEX") -> None:
        self.state, self.ema = criterion.penalty, criterion.ema
        self.mode, self.fixed = criterion.penalty_mode, criterion.initial_penalty
        training = criterion.training and torch.is_grad_enabled()
        self.updates = training and self.mode != "fixed" and not in_backward()
        self.group = world(criterion.process_group) if training else None
        self.local = self.group is None
        self.needs_sums = self.mode != "fixed" or not self.local
        self.bounds = Bounds(criterion.sensitivity, criterion.penalty_min, criterion.penalty_max)

    def resolve(self, sums: LogSums | None, denominator: Tensor) -> Resolved:
        if sums is not None and self.group is not None:
            sums, denominator = self._over_ranks(sums, denominator, self.group)
        if self.mode == "fixed":
            assert self.fixed is not None  # noqa: S101  # the criterion refuses that
            return Resolved(math.log(self.fixed), denominator)
        assert sums is not None  # noqa: S101  # needs_sums says so
        check_device("penalty", self.state, sums.partition)
        log_estimate, valid = sums.log_estimate(self.bounds)
        seen = None
        if self.mode == "running":  # a state out of bounds stands for none
            seen = self.state == self.state.clamp(*self.bounds[1:])
        if self.updates:
            new = log_estimate.exp().clamp(*self.bounds[1:]).to(self.state.dtype)
            if seen is not None:
                new = self.state.lerp(new, self.ema).where(seen, new)
                seen = seen | valid
            self.state.copy_(new.where(valid, self.state))
        if seen is None:
            return Resolved(log_estimate, denominator)
        log_penalty = self.state.log().to(log_estimate.dtype)
        return Resolved(log_penalty.where(seen, log_estimate), denominator)

    def _over_ranks(
        self, sums: LogSums, denominator: Tensor, group: dist.ProcessGroup
    ) -> tuple[LogSums, Tensor]:
        """The sums over the batches of all ranks, and the mean of their denominators.

        Divided by that mean, the ranks' losses and gradients average, as
        DistributedDataParallel does it, to those of the joined batch.
        """
        numbers = gather_over_ranks([sums.exponential, sums.partition, denominator], group)
        exponential, partition = (logs.logsumexp(0) for logs in numbers[:2])
        return LogSums(exponential, partition, sums.num_classes), numbers[2].mean()

    def value(self, exponential: float, partition: float) -> float:
        if self.mode == "fixed":
            assert self.fixed is not None  # noqa: S101  # the criterion refuses that
            return self.fixed
        value = self.bounds.estimate(exponential, partition)
        if self.mode == "running":
            before = self.state.item()
            seen = self.bounds.penalty_min <= before <= self.bounds.penalty_max
            if not self.updates:
                return before if seen else value
            if seen:
                value = before + self.ema * (value - before)
        if self.updates:
            self.state.fill_(value)
        return value


class CollectedPenalty(RunningPenalty):
    """The penalty of a criterion in evaluation, which adds the sums of the batch to a list.

    So several batches, which share one penalty, can update it together: :func:`update_penalty`.
    """

    def __init__(self, criterion: "PENEX", collected: list[LogSums]) -> None:
        super().__init__(criterion)
        self.collected = collected

    def resolve(self, sums: LogSums | None, denominator: Tensor) -> Resolved:
        if sums is not None:
            self.collected.append(sums)
        return super().resolve(sums, denominator)

    def value(self, exponential: float, partition: float) -> float:
        logs = torch.tensor([exponential, partition], dtype=torch.float64, device="cpu").log()
        self.collected.append(LogSums(logs[0], logs[1], 1))
        return super().value(exponential, partition)


def update_penalty(criterion: "PENEX", collected: list[LogSums]) -> None:
    """Update the penalty of a criterion in evaluation once, for batches that are one in training.

    The criterion stays in evaluation.
    """
    exponentials, partitions, classes = zip(*collected, strict=True)
    sums = LogSums(
        torch.stack(exponentials).logsumexp(0), torch.stack(partitions).logsumexp(0), classes[0]
    )
    RunningPenalty(criterion.train()).resolve(sums, torch.zeros_like(sums.partition))
    criterion.eval()
