"""What training programs do to a criterion: devices, states, checkpointing, extreme arguments."""

import copy
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import penex
from penex.functional import (
    cross_entropy,
    estimate_penalty,
    linear_penex_loss,
    log_penex_loss,
    penex_loss,
    z_loss,
)
from penex.losses import PENEX, CrossEntropyLoss, FocalLoss, LogPENEX, ZLoss

CRITERIA = (PENEX, LogPENEX, CrossEntropyLoss, FocalLoss, ZLoss)
FUNCTIONS = (penex_loss, log_penex_loss, cross_entropy, z_loss)
each_function = pytest.mark.parametrize("loss", FUNCTIONS)


def batch(rows: int = 6, classes: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, classes).requires_grad_(), torch.arange(rows) % classes


# 1. Devices.


@pytest.mark.parametrize("build", CRITERIA)
def test_the_loss_is_where_the_logits_are(build: Any) -> None:
    logits, target = batch()
    head = penex.LinearLoss(4, 5, criterion=build())
    for criterion, input in ((build(), logits), (head, torch.randn(6, 4))):
        with torch.device("meta"):  # torch's default device, not the logits'
            loss = criterion(input, target)
        assert loss.device.type == "cpu"
        loss.backward()


def test_tensors_on_different_devices_are_refused() -> None:
    logits, target = batch()
    meta = logits.detach().to("meta")
    for call, message in (
        (lambda: PENEX()(meta, target), "target: .* device meta, got cpu"),
        (lambda: PENEX(torch.ones(4))(meta, target.to("meta")), "weight: .* meta, got cpu"),
        (lambda: PENEX()(meta, target.to("meta")), r"penalty: .* meta, got cpu; .*\.to\('meta'\)"),
        (
            lambda: linear_penex_loss(meta, torch.zeros(5, 4), target),
            "weight: expected a tensor on the input's device meta, got cpu",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# 2. Arguments.


@each_function
def test_negative_weights_and_probabilities_are_refused(loss: Any) -> None:
    logits, target = batch()
    with pytest.raises(ValueError, match="weight: expected class weights of at least 0, got -1"):
        loss(logits, target, weight=torch.tensor([1.0, -1, 1, 1]))
    with pytest.raises(ValueError, match="probabilities of at least 0, got -0.5"):
        loss(logits, torch.full((6, 4), 0.5) - torch.eye(6, 4))


def test_a_penalty_tensor_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="penalty: expected a finite number"):
        penex_loss(*batch(), penalty=torch.tensor(-0.1))


@each_function
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16])
def test_an_ignored_index_may_be_beyond_the_target_s_dtype(loss: Any, dtype: torch.dtype) -> None:
    logits, target = batch()
    expected = loss(logits, target)
    for ignored in (300, -300, np.int64(-1)):
        assert torch.equal(loss(logits, target.to(dtype), ignore_index=ignored), expected)


@each_function
@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("options", [{}, {"weight": True}, {"label_smoothing": 0.1}])
@pytest.mark.parametrize("ignore_index", [-100, 0, 1, 3])
def test_rows_that_are_not_one_hot_are_refused(
    loss: Any, classes: int, options: dict[str, Any], ignore_index: int
) -> None:
    if "weight" in options:
        options = {"weight": torch.ones(classes)}
    target = torch.zeros(2, classes, dtype=torch.int64)
    with pytest.raises(ValueError, match="one-hot"):
        loss(torch.zeros(2, classes), target, ignore_index=ignore_index, **options)


@pytest.mark.parametrize("build", CRITERIA)
def test_attributes_are_checked_when_they_are_set(build: Any) -> None:
    criterion = build()
    for name, value, error in (
        ("reduction", "avg", ValueError),
        ("ignore_index", 0.5, TypeError),
        ("label_smoothing", 1.5, ValueError),
    ):
        before = getattr(criterion, name)
        with pytest.raises(error, match=f"{name}: expected"):
            setattr(criterion, name, value)
        assert getattr(criterion, name) == before


def test_attributes_of_penex_are_checked_when_they_are_set() -> None:
    criterion = PENEX()
    for name, value in (("sensitivity", -1.0), ("penalty_mode", "runing"), ("ema", 2.0)):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            setattr(criterion, name, value)
    criterion.penalty_mode = "fixed"
    with pytest.raises(ValueError, match="made without one"):
        criterion(*batch())
    criterion.initial_penalty = 0.3
    logits, target = batch()
    torch.testing.assert_close(criterion(logits, target), penex_loss(logits, target, penalty=0.3))


def test_repr_has_all_arguments() -> None:
    text = repr(PENEX(torch.ones(3), huberization=2.0, ema=0.5, process_group="world"))
    for part in ("weight=<shape (3,)>", "huberization=2.0", "ema=0.5", "process_group='world'"):
        assert part in text


# 3. Numbers.


@pytest.mark.parametrize("size", [1e35, 1e-37])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["labels", "smoothed", "probabilities"])
@each_function
def test_class_weights_near_the_end_of_float32(
    loss: Any, name: str, reduction: str, size: float
) -> None:
    logits, target = batch()
    options: dict[str, Any] = {"reduction": reduction}
    if name == "smoothed":
        options["label_smoothing"] = 0.1
    if name == "probabilities":
        target = torch.rand(6, 4).softmax(1)
    weight = size * torch.tensor([1.0, 0.5, 0.0, 0.25])
    loss(logits, target, weight=weight, **options).backward()
    exact = logits.detach().double().requires_grad_()
    loss(exact, target.double() if name == "probabilities" else target, weight=weight.double(),
         **options).backward()  # fmt: skip
    largest = exact.grad.abs().max().item()
    torch.testing.assert_close(logits.grad, exact.grad.float(), rtol=1e-4, atol=largest * 1e-5)


@each_function
def test_a_row_without_weight_may_hold_minus_infinity(loss: Any) -> None:
    logits, target = batch()
    logits = logits.detach()
    logits[1] = -math.inf
    leaf = logits.requires_grad_()
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0])
    value = loss(leaf, target, weight=weight)
    value.backward()
    assert value.isfinite()
    assert leaf.grad.isfinite().all()
    assert not leaf.grad[1].any()


def test_digits_at_large_logits() -> None:
    logits = (6e4 + torch.randn(6, 4)).requires_grad_()
    target = torch.arange(6) % 4
    exact = logits.detach().double().requires_grad_()
    # Both sums are e^6000, times the square of e.
    ratio = estimate_penalty(torch.tensor([[-6e4, 5998.0]]), torch.tensor([0]))
    assert ratio.item() == pytest.approx(0.1 * math.exp(2), rel=1e-5)
    for leaf in (logits, exact):
        z_loss(leaf, target).backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_large_gradients_of_the_linear_head_are_right_or_infinite() -> None:
    """What overflows must be seen by an overflow check, and nothing else may change."""
    weight = torch.tensor([[80.0], [0.0]], requires_grad=True)
    hidden = torch.ones(1, 1, requires_grad=True)
    for penalty, finite in ((0.1, True), (1e10, False)):
        loss = linear_penex_loss(hidden, weight, torch.tensor([1]), penalty=penalty)
        found = torch.autograd.grad(loss, (hidden, weight))
        exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
        value = penex_loss(F.linear(*exact), torch.tensor([1]), penalty=penalty)
        for got, true in zip(found, torch.autograd.grad(value, exact), strict=True):
            torch.testing.assert_close(got, true.float(), rtol=1e-4, atol=1.0)
        assert bool(found[0].isfinite()) is finite


# 4. State.


@pytest.mark.parametrize("mode", [{}, {"penalty_mode": "auto"}, {"penalty": 0.3}])
def test_memory_without_values_is_no_penalty(mode: dict[str, Any]) -> None:
    logits, target = batch()
    expected = PENEX(**mode)(logits, target)
    for garbage in (math.nan, math.inf, -3.0, 1e30, 0.0):
        criterion = PENEX(**mode)
        criterion.penalty.fill_(garbage)  # as of a model that was made on the meta device
        torch.testing.assert_close(criterion(logits, target), expected)
    criterion = PENEX(**mode).to_empty(device="cpu")
    criterion.reset_parameters()
    assert torch.equal(criterion.penalty, PENEX(**mode).penalty)


def test_an_old_state_with_nan_for_none_seen_still_loads() -> None:
    criterion = PENEX()
    criterion.load_state_dict({"penalty": torch.tensor(math.nan)})
    logits, target = batch()
    criterion(logits, target)
    torch.testing.assert_close(criterion.penalty, estimate_penalty(logits, target))


def test_the_average_of_weights_is_a_penalty() -> None:
    model = nn.Sequential(nn.Linear(4, 4), PENEX())
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for _ in range(3):
        averaged.update_parameters(model)
        model[1](*batch())
    averaged.update_parameters(model)
    assert 0 < averaged.module[1].penalty <= model[1].penalty_max


def test_a_fixed_penalty_is_configuration_whatever_is_loaded() -> None:
    running = PENEX()
    running(*batch())
    for state in (running.state_dict(), PENEX().state_dict()):
        fixed = PENEX(penalty=0.3)
        fixed.load_state_dict(state)
        assert fixed.penalty.item() == pytest.approx(0.3)
        logits, target = batch()
        torch.testing.assert_close(fixed(logits, target), penex_loss(logits, target, penalty=0.3))


def test_a_state_of_another_sensitivity_is_said() -> None:
    trained = nn.ModuleDict({"criterion": PENEX(sensitivity=0.5)})
    trained["criterion"](*batch())
    other = nn.ModuleDict({"criterion": PENEX(sensitivity=0.1)})
    with pytest.warns(UserWarning, match=r"sensitivity 0.5, and this criterion has 0.1"):
        other.load_state_dict(trained.state_dict())
    assert other["criterion"].penalty == 0
    same = nn.ModuleDict({"criterion": PENEX(sensitivity=0.5)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same.load_state_dict(trained.state_dict())
    assert same["criterion"].penalty == trained["criterion"].penalty


@pytest.mark.parametrize("mode", [{}, {"penalty_mode": "auto"}, {"penalty": 0.3}])
def test_checkpointing_updates_the_penalty_once(mode: dict[str, Any]) -> None:
    plain, recomputed = PENEX(**mode), PENEX(**mode)
    for _ in range(3):
        logits, target = batch()
        expected = plain(logits, target)
        (gradient,) = torch.autograd.grad(expected, logits)
        leaf = logits.detach().clone().requires_grad_()
        loss = checkpoint(lambda x, y: recomputed(x * 1.0, y), leaf, target, use_reentrant=False)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(leaf.grad, gradient)
        torch.testing.assert_close(recomputed.penalty, plain.penalty)


def test_a_second_pass_of_a_step_in_evaluation_leaves_the_penalty() -> None:
    """The recipe for SAM, and for several heads: one pass updates, the others evaluate."""
    criterion = PENEX()
    first, second = batch(), batch()
    criterion(*first).backward()
    rho = criterion.penalty.clone()
    loss = criterion.eval()(*second)
    criterion.train()
    assert torch.equal(criterion.penalty, rho)
    torch.testing.assert_close(loss, penex_loss(*second, penalty=rho))


# 5. Clients.


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("build", CRITERIA)
def test_a_model_that_holds_a_criterion_can_be_scripted(build: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.criterion = nn.Linear(4, 3), build()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    model = Model()
    x = torch.randn(2, 4)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def test_skorch_s_probabilities_are_the_criterion_s() -> None:
    skorch = pytest.importorskip("skorch")
    criterion = PENEX(sensitivity=0.5)
    net = skorch.NeuralNetClassifier(
        nn.Linear(4, 3),
        criterion=criterion,
        predict_nonlinearity=criterion.predict_proba,
        max_epochs=2,
        train_split=None,
        verbose=0,
    )
    x, y = torch.randn(12, 4), torch.arange(12) % 3
    net.fit(x, y)
    expected = criterion.predict_proba(net.module_(x)).detach().numpy()
    np.testing.assert_allclose(net.predict_proba(x), expected, rtol=1e-5)


# 6. The scale of cross-entropy.


@pytest.mark.parametrize("mode", [{}, {"penalty_mode": "auto"}, {"penalty": 0.3}])
def test_normalised_it_is_divided_by_the_sensitivity(mode: dict[str, Any]) -> None:
    plain, normalised = PENEX(**mode), PENEX(normalize=True, **mode)
    for options in ({}, {"label_smoothing": 0.1}, {"reduction": "none"}, {"huberization": 0.8}):
        for criterion in (plain, normalised):
            for name, value in options.items():
                setattr(criterion, name, value)
        logits, target = batch()
        first, second = plain(logits, target), normalised(logits, target)
        torch.testing.assert_close(second, first / 0.1)
        torch.testing.assert_close(
            torch.autograd.grad(second.sum(), logits)[0],
            torch.autograd.grad(first.sum(), logits)[0] / 0.1,
        )
        assert torch.equal(plain.penalty, normalised.penalty)
    probabilities = normalised.predict_proba(logits)
    assert torch.equal(probabilities, plain.predict_proba(logits))
    with pytest.raises(TypeError, match="normalize: expected True or False, got int"):
        PENEX(normalize=1)  # type: ignore[arg-type]


def test_normalised_its_gradient_at_zero_is_that_of_cross_entropy() -> None:
    for alpha in (0.1, 0.5):
        logits = torch.zeros(6, 4, requires_grad=True)
        target = torch.arange(6) % 4
        loss = PENEX(sensitivity=alpha, normalize=True)(logits, target)
        (expected,) = torch.autograd.grad(F.cross_entropy(logits, target), logits)
        torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected)


# 7. The linear head of every criterion.


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("build", [*CRITERIA, penex.losses.GeneralizedCrossEntropyLoss])
def test_the_linear_head_is_the_criterion_of_its_logits(build: Any, reduction: str) -> None:
    weight = torch.linspace(0.0, 2.0, 11)
    criterion = build(weight=weight, reduction=reduction, ignore_index=3)
    head = penex.LinearLoss(5, 11, criterion=criterion, chunk_size=7)
    other = copy.deepcopy(head)
    hidden = torch.randn(2, 12, 5, requires_grad=True)
    target = torch.randint(11, (2, 12))
    loss = head(hidden, target)
    expected = other.criterion(other.logits(hidden).movedim(-1, 1), target)
    torch.testing.assert_close(loss, expected)
    parameters = (hidden, head.weight, head.bias)
    found = torch.autograd.grad(loss.sum(), parameters)
    exact = torch.autograd.grad(expected.sum(), (hidden, other.weight, other.bias))
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        probabilities = head.predict_proba(hidden)
        torch.testing.assert_close(
            probabilities, criterion.predict_proba(head.logits(hidden), dim=-1)
        )


def test_the_linear_head_takes_a_rule_and_refuses_what_is_no_function_of_two_numbers() -> None:
    hidden, weight, target = torch.randn(6, 4), torch.randn(5, 4), torch.arange(6) % 5
    loss = penex.functional.linear_loss(
        hidden, weight, target, criterion=lambda t, s: (s - t).square()
    )
    rows = F.cross_entropy(F.linear(hidden, weight), target, reduction="none")
    torch.testing.assert_close(loss, rows.square().mean())
    for criterion, error, message in (
        (penex.losses.ConfidencePenaltyLoss(), TypeError, "two numbers a row, .* got Confidence"),
        (nn.CrossEntropyLoss(), TypeError, "criterion: expected a criterion of penex.losses"),
        (PENEX(label_smoothing=0.1), ValueError, "no label smoothing, got label_smoothing=0.1"),
    ):
        with pytest.raises(error, match=message):
            penex.functional.linear_loss(hidden, weight, target, criterion=criterion)
        with pytest.raises(error, match=message):
            penex.LinearLoss(4, 5, criterion=criterion)
