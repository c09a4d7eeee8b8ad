"""The ablations against formulas in 40 digits, closed-form minimisers and hand-computed steps."""

import copy
import math
import pickle
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import lambertw
from torch import Tensor, nn

from penex import PENEX
from penex.compare.finished_runs import read_logits
from penex.compare.models.saved_model import read_network
from penex.compare.output_folder import checkpoint_file, run_folder
from penex.paper import ablations
from penex.paper.ablations import (
    AugmentedLagrangianLoss,
    ExponentialLoss,
    LinearPenaltyLoss,
    LogSumExpPenaltyLoss,
    ScheduledPENEX,
    SquaredPenaltyLoss,
    scheduled_sensitivity,
    sum_to_zero,
)

LOGITS = 2 * torch.randn(7, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
TARGET = torch.randint(5, (7,), generator=torch.Generator().manual_seed(4))
P = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64)
LABELS = torch.arange(4).repeat_interleave((20 * P).round().long())
"""Twenty rows whose classes are distributed as P."""
ALPHAS = (0.03, 1 / 3, 1.0)


def decimals(matrix: Tensor) -> list[list[Decimal]]:
    return [[Decimal(value) for value in row] for row in matrix.tolist()]


def exponential(alpha: float) -> float:
    """mean exp(-alpha f_y)"""
    rows = zip(decimals(LOGITS), TARGET.tolist(), strict=True)
    return float(sum((-Decimal(alpha) * row[y]).exp() for row, y in rows) / 7)


def mean(of: object) -> float:
    """The mean over the rows of a function of a row's logits."""
    return float(sum(of(row) for row in decimals(LOGITS)) / 7)  # type: ignore[operator]


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(
    ("build", "penalty"),
    [
        (lambda alpha: ExponentialLoss(alpha), lambda row: 0),
        (lambda alpha: SquaredPenaltyLoss(alpha, 7.5), lambda row: Decimal("3.75") * sum(row) ** 2),
        (lambda alpha: LogSumExpPenaltyLoss(alpha), lambda row: sum(f.exp() for f in row).ln()),
        (lambda alpha: LinearPenaltyLoss(alpha, 2.0), lambda row: 2 * sum(row) / 5),
    ],
    ids=["EX", "squared", "LogSumExp", "linear"],
)
def test_value_and_gradient(build: object, penalty: object, alpha: float) -> None:
    criterion = build(alpha)  # type: ignore[operator]
    value = criterion(LOGITS, TARGET)
    assert value.item() == pytest.approx(exponential(alpha) + mean(penalty), rel=1e-12)
    assert torch.autograd.gradcheck(lambda f: criterion(f, TARGET), LOGITS.clone().requires_grad_())
    # In half precision the same numbers, computed in float32.
    half = LOGITS.to(torch.bfloat16)
    assert criterion(half, TARGET).dtype == torch.float32
    torch.testing.assert_close(criterion(half, TARGET), criterion(half.float(), TARGET))


def test_the_augmented_lagrangian_is_the_squared_penalty_and_a_multiple_of_the_constraint() -> None:
    criterion = AugmentedLagrangianLoss(0.2, 7.5).double()
    squared = SquaredPenaltyLoss(0.2, 7.5)(LOGITS, TARGET)
    torch.testing.assert_close(criterion(LOGITS, TARGET), squared)
    criterion.multiplier.fill_(-3.0)
    torch.testing.assert_close(criterion(LOGITS, TARGET), squared - 3 * LOGITS.sum(1).mean())
    assert torch.autograd.gradcheck(
        lambda f: criterion.eval()(f, TARGET), LOGITS.clone().requires_grad_()
    )


# Minimisers


def minimiser(name: str, alpha: float, penalty: float, multiplier: float = 0.0) -> Tensor:
    """Derived in the docstrings; the constant of the squared penalty with Lambert's W."""
    log_p = P.log()
    if name == "logsumexp":
        power = P ** (1 / (1 + alpha))
        return log_p / (1 + alpha) + math.log(alpha * power.sum() / penalty) / alpha
    if name == "linear":
        return (math.log(alpha * 4 / penalty) + log_p) / alpha
    # alpha p_j exp(-alpha f_j) = m and K log(alpha / m) + sum log p = alpha (m - nu) / rho
    constant = math.log(alpha) + log_p.mean() + alpha * multiplier / (4 * penalty)
    rate = alpha / (4 * penalty)
    m = float(lambertw(rate * math.exp(constant)).real) / rate
    return (log_p + math.log(alpha / m)) / alpha


def gradient(criterion: nn.Module, logits: Tensor) -> Tensor:
    logits = logits.clone().requires_grad_()
    criterion(logits.expand(20, 4), LABELS).backward()
    assert logits.grad is not None
    return logits.grad


@pytest.mark.parametrize("penalty", [0.02, 1.0, 773.46])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(
    ("name", "criterion", "scale"),
    [
        ("squared", SquaredPenaltyLoss, lambda alpha: alpha),
        ("linear", LinearPenaltyLoss, lambda alpha: alpha),
        ("logsumexp", LogSumExpPenaltyLoss, lambda alpha: 1 + alpha),
    ],
)
def test_the_minimiser_gives_the_probabilities(
    name: str, criterion: type[SquaredPenaltyLoss], scale: object, alpha: float, penalty: float
) -> None:
    logits = minimiser(name, alpha, penalty)
    slope = gradient(criterion(alpha, penalty), logits)
    size = alpha * (P * torch.exp(-alpha * logits)).max().item()
    torch.testing.assert_close(slope, torch.zeros(4).double(), atol=1e-8 * (size + 1e-3), rtol=0)
    torch.testing.assert_close((scale(alpha) * logits).softmax(0), P)  # type: ignore[operator]


@pytest.mark.parametrize("multiplier", [-0.4, 0.0, 0.05, 3.0])
def test_any_multiplier_gives_the_probabilities(multiplier: float) -> None:
    criterion = AugmentedLagrangianLoss(1 / 3, 5.0).double()
    criterion.multiplier.fill_(multiplier)
    logits = minimiser("squared", 1 / 3, 5.0, multiplier)
    torch.testing.assert_close(
        gradient(criterion, logits), torch.zeros(4).double(), atol=1e-9, rtol=0
    )
    torch.testing.assert_close((logits / 3).softmax(0), P)


def test_under_the_hard_constraint_the_minimiser_is_the_centred_log_probability() -> None:
    alpha = 1 / 3
    free = ((P.log() - P.log().mean()) / alpha)[:3].clone().requires_grad_()
    logits = sum_to_zero(torch.cat([free, torch.full((1,), 9.0).double()]))
    ExponentialLoss(alpha)(logits.expand(20, 4), LABELS).backward()
    assert free.grad is not None
    torch.testing.assert_close(free.grad, torch.zeros(3).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close((alpha * logits).softmax(0), P)


def test_the_exponential_loss_has_no_minimum_but_its_gradient_flow_has_the_derived_limit() -> None:
    alpha, rate, steps = 0.5, 0.5, 40_000
    logits = torch.zeros(4, dtype=torch.float64)
    for step in range(steps):
        logits -= rate * -alpha * P * torch.exp(-alpha * logits)
        if step == 2:  # the step is the gradient of the loss
            ours = gradient(ExponentialLoss(alpha), logits)
            torch.testing.assert_close(ours, -alpha * P * torch.exp(-alpha * logits))
    time = rate * steps
    torch.testing.assert_close(
        torch.exp(alpha * logits), 1 + alpha**2 * P * time, rtol=1e-2, atol=0
    )
    torch.testing.assert_close((alpha * logits).softmax(0), P, atol=2e-3, rtol=0)
    assert logits.min() > 10  # and on it goes


def test_extreme_logits() -> None:
    """Confident and right: 0, not NaN. Confident and wrong beyond float32: infinite."""
    value = ExponentialLoss(1.0)(torch.tensor([[1e4, 0.0]]), torch.tensor([0]))
    assert value == 0
    assert ExponentialLoss(1.0)(torch.tensor([[-1e4, 0.0]]), torch.tensor([0])) == math.inf
    assert LogSumExpPenaltyLoss(1.0)(torch.tensor([[1e4, 0.0]]), torch.tensor([0])) == 1e4


# The constraint


@given(st.integers(2, 6), st.integers(0, 2**31))
def test_constrained_logits_sum_to_zero_and_ignore_the_last(classes: int, seed: int) -> None:
    logits = torch.randn(3, 2, classes, generator=torch.Generator().manual_seed(seed)).double()
    logits.requires_grad_()
    constrained = sum_to_zero(logits)
    assert constrained.shape == logits.shape
    torch.testing.assert_close(constrained.sum(-1), torch.zeros(3, 2).double())
    torch.testing.assert_close(constrained[..., :-1], logits[..., :-1])
    weights = torch.arange(classes).double()
    (constrained * weights).sum().backward()
    assert logits.grad is not None
    expected = (weights - weights[-1]).expand(3, 2, classes)  # 0 for the last
    torch.testing.assert_close(logits.grad, expected)


# The multiplier


def test_the_dual_step_by_hand() -> None:
    criterion = AugmentedLagrangianLoss(0.5, 10.0)
    batches = [torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[-4.0, 1.0]])]
    for batch in batches:
        criterion(batch.requires_grad_(), torch.zeros(len(batch), dtype=torch.int64)).backward()
    # Constraints 3, 2 and -3: their mean is 2/3.
    assert criterion.multiplier == 0
    criterion.after_epoch()
    assert criterion.multiplier.item() == pytest.approx(20 / 3)
    criterion(batches[0], torch.tensor([0, 1]))
    criterion.after_epoch()
    assert criterion.multiplier.item() == pytest.approx(20 / 3 + 25)


def test_only_training_rows_count_for_the_dual_step() -> None:
    criterion = AugmentedLagrangianLoss(0.5, 10.0)
    logits, target = torch.ones(2, 3), torch.tensor([0, 1])
    criterion.eval()(logits, target)
    with torch.no_grad():
        criterion.train()(logits, target)
    criterion.after_epoch()
    assert criterion.multiplier == 0


def test_dual_ascent_finds_the_multiplier_of_the_constraint() -> None:
    """At the solution the multiplier is alpha times the geometric mean of p, and the sum is 0."""
    alpha = 0.5
    criterion = AugmentedLagrangianLoss(alpha, 0.2).double()
    logits = torch.zeros(4, dtype=torch.float64)

    def loss(logits: Tensor) -> Tensor:
        value: Tensor = criterion(logits.expand(20, 4), LABELS)
        return value

    for _ in range(12):
        criterion.eval()  # the search for the minimum does not count
        for _ in range(8):
            curvature = torch.autograd.functional.hessian(loss, logits)
            logits = logits - torch.linalg.solve(curvature, gradient(criterion, logits))
        criterion.train()(logits.expand(20, 4), LABELS)
        criterion.after_epoch()
    assert abs(logits.sum().item()) < 1e-9
    expected = alpha * P.log().mean().exp().item()
    assert criterion.multiplier.item() == pytest.approx(expected, rel=1e-9)


def test_checkpoints_within_an_epoch_contain_the_multiplier() -> None:
    first = AugmentedLagrangianLoss(0.5, 10.0)
    first(LOGITS.float(), TARGET)
    first.after_epoch()
    first(LOGITS.float()[:3], TARGET[:3])
    second = AugmentedLagrangianLoss(0.5, 10.0)
    second.load_state_dict(first.state_dict())
    for criterion in (first, second):
        criterion(LOGITS.float()[3:], TARGET[3:])
        criterion.after_epoch()
    assert second.multiplier == first.multiplier != 0


# The schedule


@given(
    st.integers(1, 500),
    st.floats(1e-6, 5),
    st.floats(1e-6, 5),
    st.sampled_from(["linear", "cosine"]),
)
def test_a_schedule_goes_from_start_to_target_and_stays_there(
    steps: int, start: float, target: float, shape: str
) -> None:
    values = [
        scheduled_sensitivity(step, steps=steps, start=start, target=target, shape=shape)
        for step in range(steps + 3)
    ]
    assert values[0] == (start if steps > 1 else target)
    assert values[steps - 1 :] == [target] * 4
    assert values == sorted(values, reverse=start > target)
    if steps % 2 and steps > 1:
        assert values[steps // 2] == pytest.approx((start + target) / 2)


def test_the_shapes_of_the_schedules() -> None:
    def at(step: int, shape: str) -> float:
        return scheduled_sensitivity(step, steps=9, start=0.1, target=0.9, shape=shape)

    assert at(2, "linear") == pytest.approx(0.3)
    assert at(2, "cosine") == pytest.approx(0.1 + 0.8 * math.sin(math.pi / 8) ** 2)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_scheduled_penex_is_penex_at_the_scheduled_sensitivity(shape: str) -> None:
    criterion = ScheduledPENEX(0.3, steps=5, start=0.1, shape=shape)
    used = []
    for _ in range(5):
        used.append(criterion.sensitivity)
        logits = LOGITS.clone().requires_grad_()
        plain = PENEX(sensitivity=criterion.sensitivity, penalty_mode="running")
        plain.load_state_dict({"penalty": criterion.penalty})
        torch.testing.assert_close(
            criterion(logits, TARGET), plain(LOGITS.clone().requires_grad_(), TARGET)
        )
        criterion.after_step()
    assert (used[0], used[-1]) == (0.1, 0.3)
    assert used == sorted(used)
    assert criterion.step == 5
    assert criterion.sensitivity == 0.3


def test_a_resumed_schedule_continues() -> None:
    first = ScheduledPENEX(0.3, steps=10)
    for _ in range(4):
        first.after_step()
    second = ScheduledPENEX(0.3, steps=10)
    second.load_state_dict(first.state_dict())
    assert second.sensitivity == first.sensitivity != 0.3
    for criterion in (first, second):
        criterion.after_step()
    assert (second.sensitivity, second.step) == (first.sensitivity, first.step)
    for twin in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        twin.after_step()
        assert (first.step, twin.step, twin.done) == (5, 6, 6)
        assert twin.sensitivity > first.sensitivity


# In a training


def test_a_run_takes_the_steps_and_keeps_the_constraint(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    """Iris: 90 rows are two batches; three epochs are six steps."""
    losses = ("conex-hard", "conex-lagrangian", "penex-linear-schedule=0.3", "penex=0.3")
    folder = make(tmp_path / "out", losses=losses, seeds=1)
    paths = {spec: checkpoint_file(run_folder(folder, spec, 0), 3) for spec in losses}
    states = {spec: read_network(path)["criterion"] for spec, path in paths.items()}
    assert states["penex-linear-schedule=0.3"]["step"] == 6
    assert states["conex-lagrangian"]["multiplier"] != 0
    assert states["conex-lagrangian"]["rows"] == 0
    for spec in losses:
        logits = read_logits(run_folder(folder, spec, 0))
        for name in {name for name in logits if not name.endswith("target")}:
            sums = np.abs(logits[name].sum(1))
            assert sums.max() < 1e-5 if spec == "conex-hard" else sums.max() > 1e-4


# What is refused


@pytest.mark.parametrize(
    ("logits", "target", "error", "message"),
    [
        (torch.zeros(3), torch.tensor(1), ValueError, r"shape \(N, K\)"),
        (torch.zeros(2, 3), torch.zeros(2, 3), ValueError, "torch.float32"),
        (torch.zeros(2, 3), torch.eye(3)[:2].long(), ValueError, "torch.int64"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2).long(), TypeError, "floating-point"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), IndexError, r"got 3"),
        (torch.zeros(2, 3), torch.tensor([0, -100]), IndexError, r"got -100"),
    ],
)
def test_refused_tensors(
    logits: Tensor, target: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ablations.exponential_loss(logits, target, sensitivity=0.1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ExponentialLoss(0.0), "sensitivity"),
        (lambda: SquaredPenaltyLoss(0.1, -1.0), "penalty"),
        (lambda: ScheduledPENEX(0.1, steps=0), "steps"),
        (lambda: ScheduledPENEX(0.1, steps=2, start=0.0), "start"),
        (lambda: ScheduledPENEX(0.1, steps=2, shape="exponential"), "shape"),
    ],
)
def test_refused_arguments(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()  # type: ignore[operator]
