"""One test for each fault of the public implementation that ours must not have.

Most are covered at length elsewhere; here each stands alone, under its own name.
"""

import io
import math

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penex import PENEX, penex_loss
from penex.functional import estimate_penalty
from penex.losses import FocalLoss

TARGET = torch.tensor([0, 2, 1])


def batch(seed: int = 0, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (3, 4)), generator=generator).requires_grad_()


@pytest.mark.parametrize(("size", "dtype"), [(200.0, torch.float32), (12.0, torch.float16)])
def test_large_logits_do_not_give_nan(size: float, dtype: torch.dtype) -> None:
    """True class at `size`: ours is finite where the loss is, and never NaN."""
    logits = (size * F.one_hot(TARGET, 4)).to(dtype).requires_grad_()
    for criterion in (PENEX(), PENEX(penalty_mode="auto"), PENEX(penalty=1e-30)):
        loss = criterion(logits, TARGET)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert not loss.isnan()
        assert not gradient.isnan().any()
        assert criterion.penalty.isfinite()
        exact = oracles.penex(logits, TARGET, penalty=criterion.penalty.item()).value.to(dtype)
        torch.testing.assert_close(loss, exact, rtol=1e-3, atol=0)


def test_huberization_does_not_take_the_log_of_an_overflowed_exp() -> None:
    logits = torch.tensor([[-5000.0, 0.0]], requires_grad=True)
    loss = penex_loss(logits, torch.tensor([0]), penalty=0.1, huberization=2.0)
    expected = 2 * (1 + 500 - math.log(2)) + 0.1
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, torch.tensor([[-0.2, 0.1]]))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", ["nan", "inf", "-inf", "ignored", "empty"])
def test_one_bad_batch_does_not_spoil_the_running_penalty(kind: str, first: bool) -> None:
    criterion = PENEX()
    if not first:
        criterion(batch(1), TARGET)
    before = criterion.penalty.clone()
    logits, target = batch(2).detach().clone(), TARGET
    if kind == "ignored":
        target = torch.full_like(TARGET, -100)
    elif kind == "empty":
        logits, target = logits[:0], target[:0]
    else:
        logits[0, 0] = float(kind)  # the logit of that row's class
    criterion(logits.requires_grad_(), target)
    assert torch.equal(criterion.penalty.nan_to_num(), before.nan_to_num())
    loss = criterion(batch(3), TARGET)
    assert loss.isfinite()
    assert criterion.penalty.isfinite()


def test_state_loads_strictly_in_both_directions() -> None:
    trained = PENEX()
    trained(batch(), TARGET)
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    resumed = PENEX()
    resumed.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(resumed.penalty, trained.penalty)
    trained.load_state_dict(PENEX().state_dict(), strict=True)
    assert trained.penalty == 0


def test_evaluation_does_not_move_the_running_penalty() -> None:
    criterion = PENEX()
    criterion(batch(1), TARGET)
    before = criterion.penalty.clone()
    criterion.eval()(batch(2), TARGET)
    with torch.no_grad():
        criterion.train()(batch(2), TARGET)
    with torch.inference_mode():
        criterion(batch(2), TARGET)
    assert torch.equal(criterion.penalty, before)
    criterion(batch(2), TARGET)
    assert not torch.equal(criterion.penalty, before)


def test_a_given_penalty_is_fixed() -> None:
    criterion = PENEX(penalty=0.5)
    for seed in range(3):
        logits = batch(seed)
        torch.testing.assert_close(
            criterion(logits, TARGET), penex_loss(logits, TARGET, penalty=0.5)
        )
    assert criterion.penalty.item() == 0.5
    assert criterion.penalty_mode == "fixed"


def test_misspelt_modes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"penalty_mode: .* got 'runnning'"):
        PENEX(penalty_mode="runnning")
    with pytest.raises(ValueError, match=r"reduction: .* got 'avg'"):
        PENEX(reduction="avg")


def test_soft_labels_are_not_argmaxed() -> None:
    logits = batch()
    soft = torch.tensor([[0.6, 0.4, 0, 0], [0, 0.1, 0.9, 0], [0.25, 0.75, 0, 0]])
    for function in (lambda t: penex_loss(logits, t, penalty=0.1), lambda t: PENEX()(logits, t)):
        assert not torch.isclose(function(soft), function(soft.argmax(1)))
    exact = oracles.penex(logits, soft, penalty=0.1).value
    torch.testing.assert_close(penex_loss(logits, soft, penalty=0.1), exact.float())


@pytest.mark.parametrize("shape", [(2, 4, 5), (2, 4, 5, 3), (2, 4, 2, 3, 2)], ids=str)
def test_dense_predictions_are_accepted(shape: tuple[int, ...]) -> None:
    logits = batch(0, *shape)
    target = torch.randint(4, shape[:1] + shape[2:])
    rows = penex_loss(logits, target, penalty=0.1, reduction="none")
    assert rows.shape == target.shape
    expected = oracles.penex(logits, target, penalty=0.1, reduction="none").value
    torch.testing.assert_close(rows, expected.float())
    assert PENEX()(logits, target).shape == ()


def test_none_keeps_ignored_rows_as_zeros() -> None:
    rows = PENEX(reduction="none")(batch(), torch.tensor([0, -100, 1]))
    assert rows.shape == (3,)
    assert rows[1] == 0
    assert (rows[[0, 2]] > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_penalty_does_not_take_the_dtype_of_the_first_batch(dtype: torch.dtype) -> None:
    criterion = PENEX()
    criterion(batch().detach().to(dtype).requires_grad_(), TARGET)
    assert criterion.penalty.dtype == torch.float32
    assert criterion.half().penalty.dtype == torch.float32


@pytest.mark.parametrize(
    "options",
    [
        {"sensitivity": -1.0},
        {"sensitivity": math.nan},
        {"penalty": 0.0},
        {"penalty_min": 1.0, "penalty_max": 0.1},
        {"ema": 2.0},
        {"huberization": 0.0},
        {"label_smoothing": 2.0},
    ],
    ids=str,
)
def test_arguments_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        PENEX(**options)  # type: ignore[arg-type]


def test_micro_batches_add_up_given_one_penalty() -> None:
    """Accumulation with a fixed penalty is the whole batch; so is evaluation in "running" mode."""
    logits = batch(0, 6, 4)
    target = torch.tensor([0, 1, 2, 3, -100, 1])
    rho = estimate_penalty(logits, target).item()
    for criterion in (
        PENEX(penalty=rho, reduction="sum"),
        PENEX(penalty=rho, penalty_mode="running", reduction="sum").eval(),
    ):
        whole = torch.autograd.grad(criterion(logits, target), logits)[0]
        parts = sum(
            torch.autograd.grad(criterion(logits[rows], target[rows]), logits)[0]
            for rows in (slice(0, 1), slice(1, 4), slice(4, 6))
        )
        torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("train", [True, False])
def test_compiles_into_one_graph_before_and_after_the_first_batch(train: bool) -> None:
    torch.compiler.reset()
    criterion = PENEX().train(train)
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(criterion, fullgraph=True, backend=count)
    for target in (TARGET, torch.tensor([-100, 0, 1]), torch.full((3,), -100)):
        compiled(batch(), target)
    assert graphs == 1


def test_class_weights_and_label_smoothing_exist() -> None:
    logits, weight = batch(), torch.tensor([0.5, 1.0, 2.0, 3.0])
    options = {"weight": weight, "label_smoothing": 0.1}
    exact = oracles.penex(logits, TARGET, penalty=0.1, **options).value  # type: ignore[arg-type]
    loss = PENEX(penalty=0.1, **options)(logits, TARGET)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, exact.float())


def test_probabilities_have_the_temperature() -> None:
    logits = batch().detach()
    probabilities = PENEX(sensitivity=0.5).predict_proba(logits)
    torch.testing.assert_close(probabilities, (1.5 * logits).softmax(1))
    assert not torch.allclose(probabilities, logits.softmax(1))


def test_function_and_module_are_one_implementation() -> None:
    """With the same clamps, and what the module clamps is in its checkpoint."""
    for shift in (-60.0, 0.0, 60.0):
        logits = (batch().detach() + shift).requires_grad_()
        criterion = PENEX(penalty_mode="auto")
        torch.testing.assert_close(criterion(logits, TARGET), penex_loss(logits, TARGET))
        torch.testing.assert_close(criterion.penalty, estimate_penalty(logits, TARGET))
        assert torch.equal(criterion.state_dict()["penalty"], criterion.penalty)


def test_focal_loss_has_its_true_gradient() -> None:
    logits = batch().detach().double().requires_grad_()
    criterion = FocalLoss(gamma=2.0)
    assert torch.autograd.gradcheck(lambda f: criterion(f, TARGET), logits)
    p = logits.softmax(1)[torch.arange(3), TARGET]
    (detached,) = torch.autograd.grad(-((1 - p.detach()) ** 2 * p.log()).mean(), logits)
    (ours,) = torch.autograd.grad(criterion(logits, TARGET), logits)
    assert not torch.allclose(ours, detached, rtol=0.05)


def test_integer_one_hot_is_a_label_and_nothing_softer() -> None:
    logits = batch()
    one_hot = F.one_hot(TARGET, 4)
    assert torch.equal(
        penex_loss(logits, one_hot, penalty=0.1), penex_loss(logits, TARGET, penalty=0.1)
    )
    with pytest.raises(ValueError, match=r"one-hot"):
        penex_loss(logits, one_hot + 1, penalty=0.1)


def test_a_swap_in_a_program_changes_one_line() -> None:
    for criterion in (nn.CrossEntropyLoss(), PENEX()):
        model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        x, y = torch.randn(9, 5), torch.arange(9) % 3
        for _ in range(3):
            optimiser.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimiser.step()
        assert loss.item() > 0
