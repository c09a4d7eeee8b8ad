"""Links: the minimiser of every loss gives back the class probabilities."""

import copy
import math
import pickle
from collections.abc import Callable
from itertools import pairwise

import mpmath
import pytest
import torch
import torch.nn.functional as F
from cases import make_logits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from penex import PENEX, LinearPENEX, LogPENEX
from penex.compare.registry import LOSSES, Context
from penex.compare.rival_losses import OneVsRestLoss
from penex.inference import link
from penex.losses import ConfidencePenaltyLoss, FocalLoss, GeneralizedCrossEntropyLoss, ZLoss
from penex.paper import ablations

Build = Callable[..., nn.Module]

BUILDS: dict[str, Build] = {
    "cross-entropy": nn.CrossEntropyLoss,
    "penex": lambda **options: PENEX(sensitivity=0.3, penalty=0.1, **options),
    "penex huberized": lambda **options: PENEX(
        sensitivity=0.8, penalty=0.5, huberization=1.2, **options
    ),
    "log-penex": lambda **options: LogPENEX(sensitivity=0.4, power=3.0, **options),
    "focal 0.4": lambda **options: FocalLoss(0.4, **options),
    "focal 3": lambda **options: FocalLoss(3.0, **options),
    "confidence penalty 0.2": lambda **options: ConfidencePenaltyLoss(0.2, **options),
    "confidence penalty 4": lambda **options: ConfidencePenaltyLoss(4.0, **options),
    "z-loss": lambda **options: ZLoss(0.5, **options),
}
ABLATIONS = {
    "squared penalty": lambda: ablations.SquaredPenaltyLoss(0.5, 2.0),
    "lagrangian": lambda: ablations.AugmentedLagrangianLoss(0.5, 2.0).eval(),
    "logsumexp": lambda: ablations.LogSumExpPenaltyLoss(0.3),
    "linear": lambda: ablations.LinearPenaltyLoss(0.3),
    "schedule": lambda: ablations.ScheduledPENEX(0.3, steps=1).eval(),
}
OF_LABELS = (ablations.ExponentialLoss, GeneralizedCrossEntropyLoss, OneVsRestLoss)
"""Those that take class indices alone."""
each_build = pytest.mark.parametrize("name", BUILDS)
each_size = pytest.mark.parametrize("classes", [2, 3, 5])


# 1. Fisher consistency.


def population(classes: int, rows: int = 4) -> Tensor:
    return (1.2 * torch.randn(rows, classes, dtype=torch.float64)).softmax(1)


def minimise(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    logits = logits.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [logits],
        max_iter=2000,
        tolerance_grad=1e-9,
        tolerance_change=1e-15,
        history_size=30,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss(logits)
        value.backward()
        return value

    optimiser.step(closure)
    return logits.detach()


def expected_loss(criterion: nn.Module, logits: Tensor, q: Tensor) -> Tensor:
    """Over labels drawn from q, of a criterion that takes class indices alone."""
    rows, classes = q.shape
    losses = [
        criterion(logits[row : row + 1], torch.tensor([label]))
        for row in range(rows)
        for label in range(classes)
    ]
    return (q.flatten() * torch.stack(losses)).sum()


def recovered(
    criterion: nn.Module, q: Tensor, constrain: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    def loss(logits: Tensor) -> Tensor:
        logits = constrain(logits) if constrain else logits
        if isinstance(criterion, OF_LABELS):
            return expected_loss(criterion, logits, q)
        value: Tensor = criterion(logits, q)
        return value

    logits = minimise(loss, torch.zeros_like(q))
    return link(criterion)(constrain(logits) if constrain else logits).exp()


@each_size
@each_build
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_minimiser_gives_back_the_probabilities(
    name: str, classes: int, smoothing: float
) -> None:
    q = population(classes)
    found = recovered(BUILDS[name](label_smoothing=smoothing), q)
    torch.testing.assert_close(found, q, rtol=0, atol=1e-3)


@each_build
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_with_class_weights_those_of_the_weighted_classes(name: str, smoothing: float) -> None:
    q, weight = population(3), torch.tensor([0.4, 1.0, 2.5], dtype=torch.float64)
    found = recovered(BUILDS[name](weight=weight, label_smoothing=smoothing), q)
    torch.testing.assert_close(found, F.normalize(q * weight, p=1, dim=1), rtol=0, atol=1e-3)


@each_size
@pytest.mark.parametrize("name", ABLATIONS)
def test_the_ablations_too(name: str, classes: int) -> None:
    criterion = ABLATIONS[name]()
    if isinstance(criterion, PENEX):
        criterion.penalty.fill_(0.1)
    q = population(classes)
    torch.testing.assert_close(recovered(criterion, q), q, rtol=0, atol=1e-3)


@each_size
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "exponential"])
def test_every_loss_that_is_compared(name: str, classes: int) -> None:
    """Except for the exponential loss alone, which has no minimiser."""
    entry, q = LOSSES[name], population(classes)
    if name == "max-suppression":  # which needs the largest to be larger by its strength
        top = torch.zeros_like(q).scatter(1, q.argmax(1, keepdim=True), 1.0)
        q = (q + 0.4 * top) / 1.4
    knob = entry.knob.default if entry.knob else math.nan
    context = Context(num_classes=classes, steps_total=1, steps_per_epoch=1)
    criterion = entry.build(knob, context).eval()
    if isinstance(criterion, PENEX):
        criterion.penalty.fill_(0.1)  # a number that does not depend on the batch
    found = recovered(criterion, q, entry.constrain)
    torch.testing.assert_close(found, q, rtol=0, atol=1e-3)


def test_the_exponential_loss_alone_predicts_where_gradient_flow_leads() -> None:
    q, alpha, time = population(4), 0.03, 1e9
    logits = torch.log1p(alpha**2 * q * time) / alpha
    found = link(ablations.ExponentialLoss(alpha))(logits).exp()
    torch.testing.assert_close(found, q, rtol=0, atol=1e-4)


def test_the_z_loss_moves_the_partition_alone() -> None:
    q = population(3)
    logits = minimise(lambda logits: ZLoss(0.5)(logits, q), torch.zeros_like(q))
    torch.testing.assert_close(logits, q.log(), rtol=0, atol=1e-5)


def test_a_schedule_predicts_with_its_target_from_the_start() -> None:
    criterion, logits = ablations.ScheduledPENEX(0.3, steps=9), make_logits((4, 3))
    expected = (1.3 * logits).log_softmax(1)
    torch.testing.assert_close(criterion.predict_log_proba(logits), expected)


# 2. The formulas, off the minimiser too.


def by_definition(name: str, strength: float, logits: list[float]) -> list[float]:
    """The link in 400 digits, with its factors of 1e-3 at least, not in the log domain."""
    with mpmath.workdps(400):
        exponentials = [mpmath.exp(value) for value in logits]
        p = [value / sum(exponentials) for value in exponentials]
        entropy = -sum(value * mpmath.log(value) for value in p)
        floor = mpmath.mpf("1e-3")
        q = {
            "focal": lambda p: (
                p / ((1 - p) ** strength - strength * (1 - p) ** (strength - 1) * p * mpmath.log(p))
            ),
            "confidence": lambda p: p * max(1 + strength * (mpmath.log(p) + entropy), floor),
            "smoothing": lambda p: p * max(1 - strength / len(logits) / p, floor),
        }[name]
        values = [q(value) for value in p]
        return [float(mpmath.log(value / sum(values))) for value in values]


OF_STRENGTH: dict[str, Callable[[float], nn.Module]] = {
    "focal": FocalLoss,
    "confidence": ConfidencePenaltyLoss,
    "smoothing": lambda strength: nn.CrossEntropyLoss(label_smoothing=strength),
}


@given(
    values=st.lists(st.floats(-150, 150), min_size=2, max_size=5),
    strength=st.floats(1e-3, 1.0),
    name=st.sampled_from(sorted(OF_STRENGTH)),
)
def test_log_probabilities_are_the_formula(values: list[float], strength: float, name: str) -> None:
    strength = strength if name == "smoothing" else 5 * strength
    expected = torch.tensor([by_definition(name, strength, values)], dtype=torch.float64)
    logits = torch.tensor([values], dtype=torch.float64)
    found = link(OF_STRENGTH[name](strength))(logits)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_focal_where_a_probability_rounds_to_one(gamma: float) -> None:
    values = [[gap, 0.0, -1.0] for gap in (5.0, 12.0, 16.5, 17.5, 60.0, 100.0)]
    expected = torch.tensor([by_definition("focal", gamma, row) for row in values])
    found = FocalLoss(gamma).predict_log_proba(torch.tensor(values))
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)


# 3. The order of the classes.


@given(
    values=st.lists(st.floats(-300, 300), min_size=2, max_size=6, unique=True),
    strength=st.floats(0.0, 1.0),
    name=st.sampled_from([*sorted(OF_STRENGTH), "penex"]),
)
def test_the_order_is_that_of_the_logits(values: list[float], strength: float, name: str) -> None:
    if name == "penex":
        criterion: nn.Module = PENEX(sensitivity=0.5, huberization=0.01 + strength)
    else:
        criterion = OF_STRENGTH[name](strength if name == "smoothing" else 100 * strength)
    logits = torch.tensor([sorted(values)], dtype=torch.float64)
    (log_proba,) = link(criterion)(logits).tolist()
    distinct = [low < high - 1e-6 for low, high in pairwise(sorted(values))]
    for (low, high), apart in zip(pairwise(log_proba), distinct, strict=True):
        assert low < high if apart and low > -1e3 else low <= high + 1e-9
    assert link(criterion)(logits).max() == log_proba[-1]


def test_class_weights_with_smoothing_may_change_the_order() -> None:
    """A heavy class owes its smoothed mass to the smoothing."""
    criterion = nn.CrossEntropyLoss(torch.tensor([1.0, 9.0]), label_smoothing=0.2)
    q = torch.tensor([[0.98, 0.02]])
    smoothed = F.normalize((0.8 * q + 0.1) * criterion.weight, p=1, dim=1)
    assert smoothed.argmax(1) == 1
    expected = F.normalize(q * criterion.weight, p=1, dim=1)
    torch.testing.assert_close(link(criterion)(smoothed.log()).exp(), expected)


# 4. Numerics.

EXTREME = [[1e4, -1e4, 0.0], [6e4, 6e4, -6e4], [0.0, 0.0, 0.0], [-6e4, -5.9e4, -6e4], [90, 0, 1]]
PRECISIONS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@each_build
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
def test_no_finite_logits_overflow(name: str, dtype: torch.dtype, smoothing: float) -> None:
    logits = torch.tensor(EXTREME, dtype=dtype, requires_grad=True)
    log_proba = link(BUILDS[name](label_smoothing=smoothing))(logits)
    assert log_proba.dtype == dtype
    assert (log_proba <= 0).all()
    sums = log_proba.detach().double().exp().sum(1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=8 * torch.finfo(dtype).eps)
    log_proba[log_proba.isfinite()].sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@each_build
def test_a_logit_of_minus_infinity_is_probability_zero(name: str) -> None:
    for smoothing in (0.0, 0.3):
        criterion = BUILDS[name](label_smoothing=smoothing)
        for row in ([1.0, -math.inf, 1.0], [-math.inf, 2.0, -math.inf]):
            found = link(criterion)(torch.tensor([row])).exp()
            expected = torch.tensor([row]).isfinite().float()
            torch.testing.assert_close(found, expected / expected.sum())


def test_a_class_of_weight_zero() -> None:
    criterion = nn.CrossEntropyLoss(torch.tensor([1.0, 0.0, 2.0]), label_smoothing=0.3)
    found = link(criterion)(torch.tensor([[0.3, -60.0, 0.5], [0.0, -math.inf, 1.0]])).exp()
    assert (found[:, 1] < 1e-20).all()
    torch.testing.assert_close(found.sum(1), torch.ones(2))


@each_build
def test_one_class_is_certain(name: str) -> None:
    for smoothing in (0.0, 0.3):
        found = link(BUILDS[name](label_smoothing=smoothing))(torch.tensor([[-3.0], [7.0]]))
        assert found.tolist() == [[0.0], [0.0]]


# 5. The interface.


@each_build
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_class_dimension(name: str, smoothing: float) -> None:
    weight = torch.tensor([0.5, 1.0, 2.0, 1.0], dtype=torch.float64)
    criterion = BUILDS[name](weight=weight, label_smoothing=smoothing)
    flat = make_logits((6, 4))
    log_proba = link(criterion)
    expected = log_proba(flat)
    torch.testing.assert_close(log_proba(flat[2]), expected[2])
    image = flat.view(2, 3, 4).movedim(2, 1).unsqueeze(3)
    torch.testing.assert_close(log_proba(image)[..., 0].movedim(1, 2).reshape(6, 4), expected)
    if name != "cross-entropy":
        found = criterion.predict_log_proba(flat.view(2, 3, 4), dim=-1)
        torch.testing.assert_close(found.view(6, 4), expected)
        torch.testing.assert_close(criterion.predict_proba(flat), expected.exp())


def test_the_linear_head_has_the_link_of_penex() -> None:
    options = {"sensitivity": 0.8, "huberization": 0.5}
    head, hidden = LinearPENEX(6, 4, **options), torch.randn(5, 6)
    expected = PENEX(**options).predict_proba(head.logits(hidden))
    torch.testing.assert_close(head.predict_proba(hidden), expected)


def test_a_criterion_of_ones_own_says_its_link() -> None:
    class Polynomial(nn.Module):
        def predict_log_proba(self, input: Tensor) -> Tensor:
            log_p = input.log_softmax(1)
            return (log_p - torch.log1p(log_p.exp())).log_softmax(1)

    criterion, logits = Polynomial(), make_logits((3, 4))
    assert torch.equal(link(criterion)(logits), criterion.predict_log_proba(logits))


@pytest.mark.parametrize(
    "criterion",
    [nn.NLLLoss(), nn.BCEWithLogitsLoss(), LinearPENEX(3, 2), F.cross_entropy],
)
def test_other_criteria_are_refused(criterion: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"criterion: expected .*; .* implement predict_log_proba"):
        link(criterion)


def test_a_subclass_of_cross_entropy_may_compute_another_loss() -> None:
    class Other(nn.CrossEntropyLoss):
        pass

    with pytest.raises(TypeError, match=r"got Other"):
        link(Other())


@each_build
def test_logits_are_floating_point(name: str) -> None:
    with pytest.raises(TypeError, match=r"input: expected floating-point logits, got torch\.int64"):
        link(BUILDS[name]())(torch.zeros(2, 3).long())


@each_build
def test_the_link_can_be_copied_and_pickled(name: str) -> None:
    log_proba, logits = link(BUILDS[name](label_smoothing=0.1)), make_logits((4, 3))
    for twin in (copy.deepcopy(log_proba), pickle.loads(pickle.dumps(log_proba))):
        assert torch.equal(twin(logits), log_proba(logits))


@each_build
def test_compiled_in_one_graph(name: str) -> None:
    log_proba = link(BUILDS[name](weight=torch.tensor([0.5, 1.0, 2.0]), label_smoothing=0.1))
    logits = make_logits((4, 3), torch.float32)
    compiled = torch.compile(log_proba, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (logits, logits.repeat(2, 1)):
        torch.testing.assert_close(compiled(rows), log_proba(rows))
