"""penex.losses: the modules are their functions; what they hold, and when it changes."""

import copy
import inspect
import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from cases import KINDS, OPTIONS, make_call, make_logits
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from torch import Tensor, nn

import penex
from penex.functional import (
    confidence_penalty_loss,
    estimate_penalty,
    focal_loss,
    penex_loss,
)
from penex.losses import PENEX, ConfidencePenaltyLoss, FocalLoss

MODES: tuple[dict[str, Any], ...] = (
    {},
    {"penalty_mode": "auto"},
    {"penalty": 0.3},
    {"penalty": 0.3, "penalty_mode": "running"},
)
each_mode = pytest.mark.parametrize("mode", MODES, ids=["running", "auto", "fixed", "start"])
LABELS = torch.tensor([0, 2, 1, 2])


def logits_of(seed: int, rows: int = 4, classes: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, classes, generator=generator).requires_grad_()


# 1. The modules are the functions.


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_modules_are_the_functions(kind: str, options: str, reduction: str) -> None:
    logits, target, keywords = make_call(kind, (5, 3, 2), options, torch.float32)
    keywords["reduction"] = reduction
    own: dict[str, Any] = {"sensitivity": 0.4, "huberization": 1.5}
    pairs: tuple[tuple[nn.Module, Tensor], ...] = (
        (
            PENEX(penalty=0.3, **own, **keywords),
            penex_loss(logits, target, penalty=0.3, **own, **keywords),
        ),
        (
            PENEX(penalty_mode="auto", **own, **keywords),
            penex_loss(logits, target, **own, **keywords),
        ),
        (PENEX(**own, **keywords), penex_loss(logits, target, **own, **keywords)),
        (FocalLoss(1.5, **keywords), focal_loss(logits, target, gamma=1.5, **keywords)),
        (
            ConfidencePenaltyLoss(0.3, **keywords),
            confidence_penalty_loss(logits, target, strength=0.3, **keywords),
        ),
    )
    for criterion, expected in pairs:
        torch.testing.assert_close(criterion(logits, target), expected)


@pytest.mark.parametrize("build", [PENEX, FocalLoss, ConfidencePenaltyLoss])
def test_keywords_are_those_of_cross_entropy(build: type[nn.Module]) -> None:
    """All but the two that torch deprecates."""
    theirs = inspect.signature(nn.CrossEntropyLoss).parameters
    ours = inspect.signature(build).parameters
    for name in theirs.keys() - {"size_average", "reduce"}:
        assert ours[name].default == theirs[name].default
    criterion = build(weight=torch.ones(3), ignore_index=5, reduction="none", label_smoothing=0.1)
    peer = nn.CrossEntropyLoss(
        weight=torch.ones(3), ignore_index=5, reduction="none", label_smoothing=0.1
    )
    logits, target = torch.randn(2, 3), torch.tensor([5, 1])
    got = criterion(logits, target)
    assert got.shape == peer(logits, target).shape
    assert got[0] == 0 != got[1]
    assert "ignore_index=5, reduction='none', label_smoothing=0.1" in repr(criterion)


def test_first_positional_argument_is_the_weight() -> None:
    weight = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(PENEX(weight).weight, weight)


def test_is_found_where_the_package_says() -> None:
    assert penex.PENEX is penex.losses.PENEX is PENEX
    assert penex.penex_loss is penex.functional.penex_loss is penex_loss


def test_repr_names_what_was_chosen() -> None:
    text = repr(PENEX(sensitivity=0.3, penalty=0.25))
    assert "sensitivity=0.3, penalty_mode='fixed', penalty=0.25" in text
    assert "gamma=1.5" in repr(FocalLoss(1.5))
    assert "strength=0.2" in repr(ConfidencePenaltyLoss(0.2))


# 2. When the penalty changes, and to what.


def test_defaults() -> None:
    criterion = PENEX()
    assert criterion.sensitivity == 0.1
    assert isinstance(criterion.sensitivity, float)
    assert criterion.penalty_mode == "running"
    assert criterion.ema == 0.1
    assert (criterion.penalty_min, criterion.penalty_max) == (1e-10, 100.0)
    assert criterion.penalty.shape == ()
    assert criterion.penalty.dtype == torch.float32
    assert criterion.penalty == 0  # none seen
    assert PENEX(penalty=0.5).penalty_mode == "fixed"
    assert PENEX(penalty=0.5, penalty_mode="running").penalty_mode == "running"


Step = tuple[str, str, int]
steps = st.lists(
    st.tuples(
        st.sampled_from(["train", "eval", "no_grad"]),
        st.sampled_from(["good", "good", "good", "ignored", "nan", "inf", "empty"]),
        st.integers(0, 99),
    ),
    min_size=1,
    max_size=8,
)


@given(steps=steps, ema=st.sampled_from([0.0, 0.1, 0.5, 1.0]), start=st.none() | st.just(0.7))
def test_running_average_is_that_of_a_loop(
    steps: list[Step], ema: float, start: float | None
) -> None:
    """Only training steps with gradients and a meaningful batch count, the first among them too."""
    criterion = PENEX(ema=ema, penalty=start, penalty_mode="running", sensitivity=0.4)
    expected = start
    for mode, batch, seed in steps:
        logits, target = logits_of(seed), LABELS
        if batch == "ignored":
            target = torch.full_like(LABELS, -100)
        if batch in ("nan", "inf"):
            logits = logits.detach().index_fill(0, torch.tensor([1]), float(batch)).requires_grad_()
        if batch == "empty":
            logits, target = logits[:0], LABELS[:0]
        estimate = expected
        if batch == "good":
            estimate = oracles.estimate_penalty(logits, target, sensitivity=0.4)
        if mode == "train" and batch == "good":
            assert estimate is not None
            expected = estimate if expected is None else (1 - ema) * expected + ema * estimate
        criterion.train(mode != "eval")
        with torch.set_grad_enabled(mode != "no_grad"):
            loss = criterion(logits, target)
        assert criterion.penalty.item() == pytest.approx(expected or 0.0, rel=1e-5)
        if batch == "good":  # computed with the average that includes this batch
            used = estimate if expected is None else expected
            exact = oracles.penex(logits, target, sensitivity=0.4, penalty=used)
            torch.testing.assert_close(loss.detach(), exact.value.float(), rtol=1e-5, atol=0)
        if batch in ("ignored", "empty"):
            assert loss == 0


def test_auto_uses_this_batch_alone_and_shows_it() -> None:
    criterion = PENEX(penalty_mode="auto")
    for seed in (1, 2):
        logits = logits_of(seed)
        torch.testing.assert_close(criterion(logits, LABELS), penex_loss(logits, LABELS))
        torch.testing.assert_close(criterion.penalty, estimate_penalty(logits, LABELS))
    before = criterion.penalty.clone()
    criterion.eval()
    logits = logits_of(3)
    torch.testing.assert_close(criterion(logits, LABELS), penex_loss(logits, LABELS))
    assert torch.equal(criterion.penalty, before)


def test_fixed_stays() -> None:
    criterion = PENEX(penalty=0.5)
    for seed in (1, 2):
        logits = logits_of(seed)
        torch.testing.assert_close(
            criterion(logits, LABELS), penex_loss(logits, LABELS, penalty=0.5)
        )
    assert criterion.penalty.item() == 0.5


def test_estimates_are_clamped() -> None:
    for shift, expected in ((60.0, 1e-3), (-60.0, 0.2)):
        criterion = PENEX(penalty_min=1e-3, penalty_max=0.2)
        criterion((logits_of(1).detach() + shift).requires_grad_(), LABELS)
        assert criterion.penalty.item() == pytest.approx(expected)


def test_estimate_counts_weights_smoothing_and_huberization() -> None:
    options: dict[str, Any] = {
        "weight": torch.tensor([0.5, 1.0, 2.0]),
        "label_smoothing": 0.2,
        "huberization": 0.9,
        "sensitivity": 0.6,
        "ignore_index": 1,
    }
    criterion = PENEX(**options)
    logits = logits_of(3)
    criterion(logits, LABELS)
    expected = oracles.estimate_penalty(logits, LABELS, **options)
    assert criterion.penalty.item() == pytest.approx(expected, rel=1e-5)


def test_evaluation_uses_the_running_penalty() -> None:
    criterion = PENEX()
    criterion(logits_of(1), LABELS)
    rho = criterion.penalty.item()
    logits = logits_of(2)
    expected = penex_loss(logits, LABELS, penalty=rho)
    torch.testing.assert_close(criterion.eval()(logits, LABELS), expected)
    with torch.no_grad():
        torch.testing.assert_close(criterion.train()(logits, LABELS), expected)


@each_mode
def test_no_gradient_reaches_the_penalty(mode: dict[str, Any]) -> None:
    criterion = PENEX(**mode)
    assert list(criterion.parameters()) == []
    criterion(logits_of(1), LABELS).backward()
    assert not criterion.penalty.requires_grad
    assert criterion.penalty.grad is None


@each_mode
def test_two_forwards_before_one_backward(mode: dict[str, Any]) -> None:
    """The update in place must not spoil the graph of an earlier loss."""
    criterion = PENEX(**mode)
    first, second = logits_of(1), logits_of(2)
    penalties = []
    losses = []
    for logits in (first, second):
        losses.append(criterion(logits, LABELS))
        penalties.append(criterion.penalty.clone())
    torch.stack(losses).sum().backward()
    for logits, rho in zip((first, second), penalties, strict=True):
        exact = oracles.penex(logits, LABELS, penalty=rho.item())
        torch.testing.assert_close(logits.grad, exact.gradient.float(), rtol=1e-4, atol=1e-6)


@each_mode
def test_inference_mode(mode: dict[str, Any]) -> None:
    criterion = PENEX(**mode)
    before = criterion.penalty.clone()
    with torch.inference_mode():
        assert criterion(logits_of(1), LABELS).isfinite()
    assert torch.equal(criterion.penalty.nan_to_num(), before.nan_to_num())
    criterion(logits_of(1), LABELS).backward()  # the buffer is still an ordinary tensor


# 3. State.


@each_mode
def test_state_dict_is_strict_both_ways(mode: dict[str, Any]) -> None:
    trained, fresh = PENEX(**mode), PENEX(**mode)
    trained(logits_of(1), LABELS)
    empty = fresh.state_dict()
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    assert str(fresh.load_state_dict(torch.load(file, weights_only=True))) == (
        "<All keys matched successfully>"
    )
    assert torch.equal(fresh.penalty, trained.penalty)
    logits = logits_of(2)
    torch.testing.assert_close(fresh(logits, LABELS), trained(logits, LABELS))
    trained.load_state_dict(PENEX(**mode).state_dict())
    assert set(empty) == {"penalty"}
    assert trained.penalty == PENEX(**mode).penalty


def test_state_has_the_weight_like_cross_entropy() -> None:
    weight = torch.ones(3)
    assert set(PENEX(weight).state_dict()) == {"weight", "penalty"}
    assert set(FocalLoss(weight=weight).state_dict()) == {"weight"}


def test_resumed_training_is_the_uninterrupted_one() -> None:
    whole = PENEX()
    for seed in range(4):
        whole(logits_of(seed), LABELS)
    part = PENEX()
    for seed in range(2):
        part(logits_of(seed), LABELS)
    resumed = PENEX()
    resumed.load_state_dict(part.state_dict())
    for seed in range(2, 4):
        resumed(logits_of(seed), LABELS)
    assert torch.equal(whole.penalty, resumed.penalty)


@pytest.mark.parametrize(
    "cast",
    [
        nn.Module.half,
        nn.Module.bfloat16,
        nn.Module.double,
        nn.Module.float,
        lambda module: module.to(torch.float16),
        lambda module: nn.Sequential(module).half()[0],
    ],
)
def test_casting_keeps_the_penalty(cast: Callable[[nn.Module], nn.Module]) -> None:
    criterion = cast(PENEX(torch.ones(3), penalty=1e-10, penalty_mode="running"))
    assert isinstance(criterion, PENEX)
    assert criterion.penalty.dtype == torch.float32
    assert criterion.penalty.item() == pytest.approx(1e-10)
    assert "penalty" in dict(criterion.named_buffers())
    loss = criterion(logits_of(1), LABELS)
    assert loss.dtype == torch.float32
    assert loss.isfinite()


def test_moving_moves_the_penalty() -> None:
    assert PENEX().to("meta").penalty.is_meta
    assert PENEX().to("meta", torch.float16).penalty.dtype == torch.float32


def test_float64_logits_are_computed_in_float64() -> None:
    logits = make_logits((4, 3)).requires_grad_()
    loss = PENEX(penalty_mode="auto")(logits, LABELS)
    exact = oracles.penex(logits, LABELS)
    torch.testing.assert_close(loss.detach(), exact.value, rtol=1e-13, atol=0)


@each_mode
def test_copies_are_independent(mode: dict[str, Any]) -> None:
    criterion = PENEX(torch.tensor([1.0, 2.0, 3.0]), **mode)
    criterion(logits_of(1), LABELS)
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(twin.penalty, criterion.penalty)
        logits = logits_of(2)
        torch.testing.assert_close(
            twin.eval()(logits, LABELS), copy.deepcopy(criterion).eval()(logits, LABELS)
        )
        before = criterion.penalty.clone()
        twin.train()(logits, LABELS)
        assert torch.equal(criterion.penalty, before)


# 4. Fisher consistency: the minimiser of the loss gives back the probabilities.


def minimise(criterion: PENEX, logits: Tensor, target: Tensor, rows: int = 1) -> Tensor:
    # No line search: an estimated penalty changes from step to step, and the value with it.
    optimiser = torch.optim.LBFGS([logits], lr=0.5, max_iter=400, tolerance_change=0.0)

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss: Tensor = criterion(logits.expand(rows, -1) if rows > 1 else logits, target)
        loss.backward()
        return loss

    optimiser.step(closure)
    return logits.detach()


@pytest.mark.parametrize("weight", [None, torch.tensor([0.2, 1.0, 3.0, 0.7])])
@pytest.mark.parametrize("alpha", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("mode", MODES[:3], ids=["running", "auto", "fixed"])
def test_minimiser_recovers_probabilities(
    mode: dict[str, Any], alpha: float, weight: Tensor | None
) -> None:
    q = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.15, 0.05]], dtype=torch.float64)
    criterion = PENEX(weight, sensitivity=alpha, **mode)
    logits = minimise(criterion, torch.zeros(2, 4, dtype=torch.float64, requires_grad=True), q)
    expected = q if weight is None else F.normalize(q * weight, p=1, dim=1)
    torch.testing.assert_close(criterion.predict_proba(logits), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        criterion.predict_log_proba(logits), expected.log(), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("weight", [None, torch.tensor([0.2, 1.0, 3.0])])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_minimiser_recovers_the_frequencies_of_labels(
    weight: Tensor | None, smoothing: float
) -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 0, 1])
    frequencies = torch.tensor([[4, 3, 1]]).double() / 8
    criterion = PENEX(weight, sensitivity=0.2, penalty_mode="auto", label_smoothing=smoothing)
    logits = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    minimise(criterion, logits, labels, rows=8)
    expected = frequencies if weight is None else F.normalize(frequencies * weight, p=1, dim=1)
    got = criterion.predict_proba(logits.detach())
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_predict_proba_is_normalised_over_the_class_dimension() -> None:
    criterion = PENEX(sensitivity=0.5)
    for shape in ((3,), (4, 3), (2, 3, 5), (2, 3, 4, 5)):
        logits = make_logits(shape)
        dim = min(1, len(shape) - 1)
        exact = oracles.predict_proba(logits, 0.5, dim)
        torch.testing.assert_close(criterion.predict_proba(logits), exact)
        torch.testing.assert_close(criterion.predict_log_proba(logits), exact.log())
    logits = make_logits((2, 5, 3))
    exact = oracles.predict_proba(logits, 0.5, 2)
    torch.testing.assert_close(criterion.predict_proba(logits, dim=-1), exact)


# 5. Numerics in every mode.


@each_mode
@pytest.mark.parametrize("huberization", [None, 5.0])
@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (200.0, torch.float32),
        (-200.0, torch.float32),
        (1e4, torch.float32),
        (-1e4, torch.float32),
        (12.0, torch.float16),
        (-12.0, torch.float16),
        (6e4, torch.float16),
        (1e4, torch.bfloat16),
        (1e4, torch.float64),
    ],
)
def test_finite_logits_never_give_nan(
    size: float, dtype: torch.dtype, huberization: float | None, mode: dict[str, Any]
) -> None:
    criterion = PENEX(huberization=huberization, **mode)
    for pattern in ([[1.0, 0, 0], [1, 1, 1], [-1, 0, 1], [0, 0, -1]], [[1.0, 1, 1]] * 4):
        logits = (size * torch.tensor(pattern)).to(dtype).requires_grad_()
        loss = criterion(logits, LABELS)
        loss.backward()
        assert not loss.isnan()
        assert not logits.grad.isnan().any()
        assert 0 < criterion.penalty.item() <= 100
        exact = oracles.penex(
            logits, LABELS, penalty=criterion.penalty.item(), huberization=huberization
        )
        rtol = 1e-2 if dtype in (torch.float16, torch.bfloat16) else 2e-3
        torch.testing.assert_close(loss.detach(), exact.value.to(dtype), rtol=rtol, atol=1e-30)


def test_auto_is_exact_at_200_if_the_bounds_allow_it() -> None:
    """rho = alpha e^-20 / (K e^200): the clamp, not the arithmetic, decides what is finite."""
    logits = torch.full((4, 3), 200.0, requires_grad=True)
    for sensitivity, low in ((0.1, 1e-10), (0.1, 1e-37)):
        options: dict[str, Any] = {"sensitivity": sensitivity, "penalty_min": low}
        loss = PENEX(penalty_mode="auto", **options)(logits, LABELS)
        exact = oracles.penex(logits, LABELS, **options)
        torch.testing.assert_close(loss.detach(), exact.value.float(), rtol=1e-3, atol=0)
    lower = torch.full((4, 3), 75.0, requires_grad=True)
    loss = PENEX(penalty_mode="auto", penalty_min=1e-37)(lower, LABELS)
    (gradient,) = torch.autograd.grad(loss, lower)
    exact = oracles.penex(lower, LABELS, penalty_min=1e-37)
    torch.testing.assert_close(loss.detach(), exact.value.float(), rtol=1e-4, atol=0)
    torch.testing.assert_close(gradient, exact.gradient.float(), rtol=1e-3, atol=1e-10)


# 6. Refusals.

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sensitivity": 0}, ValueError, r"sensitivity: expected .* \(0, inf\), got 0"),
        ({"sensitivity": -0.1}, ValueError, "sensitivity: expected .*, got -0.1"),
        ({"sensitivity": NAN}, ValueError, "sensitivity: expected .* finite .*, got nan"),
        ({"sensitivity": INF}, ValueError, "sensitivity: expected .* finite .*, got inf"),
        ({"sensitivity": "a"}, TypeError, "sensitivity: expected a number, got str"),
        ({"ema": -0.1}, ValueError, r"ema: expected .* \[0, 1\], got -0.1"),
        ({"ema": 1.5}, ValueError, r"ema: expected .* \[0, 1\], got 1.5"),
        ({"ema": None}, TypeError, "ema: expected a number, got NoneType"),
        ({"penalty": 0.0}, ValueError, "penalty: expected .*, got 0"),
        ({"penalty": -1.0}, ValueError, "penalty: expected .*, got -1"),
        ({"penalty": INF}, ValueError, "penalty: expected .*, got inf"),
        ({"penalty": 1e-60}, ValueError, "penalty: expected .* float32 can hold.*, got 1e-60"),
        ({"penalty": "auto"}, TypeError, "penalty: expected a number, got str"),
        (
            {"penalty_mode": "fixed"},
            ValueError,
            "penalty: .*'fixed' needs a positive number, got None",
        ),
        (
            {"penalty_mode": "auto", "penalty": 0.5},
            ValueError,
            "penalty: .*'auto' estimates it, got 0.5",
        ),
        (
            {"penalty_mode": "runing"},
            ValueError,
            "penalty_mode: expected one of 'running', 'auto', 'fixed', got 'runing'",
        ),
        (
            {"penalty_min": 1.0, "penalty_max": 0.5},
            ValueError,
            "penalty_min: expected at most penalty_max = 0.5, got 1",
        ),
        ({"penalty_min": 0.0}, ValueError, "penalty_min: expected .*, got 0"),
        ({"penalty_max": -1.0}, ValueError, "penalty_max: expected .*, got -1"),
        ({"penalty_min": 1e-50}, ValueError, "penalty_min: expected .* float32 .*, got 1e-50"),
        ({"huberization": 0.0}, ValueError, "huberization: expected .*, got 0"),
        ({"huberization": -1}, ValueError, "huberization: expected .*, got -1"),
        ({"label_smoothing": 1.1}, ValueError, r"label_smoothing: .* \[0, 1\], got 1.1"),
        ({"label_smoothing": -0.1}, ValueError, r"label_smoothing: .* \[0, 1\], got -0.1"),
        ({"reduction": "avg"}, ValueError, "reduction: expected one of .*, got 'avg'"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index: expected an int, got float"),
        ({"weight": [1.0, 2.0]}, TypeError, "weight: expected a tensor, got list"),
        ({"weight": torch.ones(2, 2)}, ValueError, r"weight: expected .*, got \(2, 2\)"),
    ],
)
def test_refused_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PENEX(**options)
    if options.keys() <= {"weight", "ignore_index", "reduction", "label_smoothing"}:
        for build in (FocalLoss, ConfidencePenaltyLoss):
            with pytest.raises(error, match=message):
                build(**options)


def test_refused_arguments_of_the_baselines() -> None:
    with pytest.raises(ValueError, match=r"gamma: expected .* \[0, inf\), got -1"):
        FocalLoss(-1)
    with pytest.raises(ValueError, match=r"strength: expected .* \[0, inf\), got -0.5"):
        ConfidencePenaltyLoss(-0.5)
    with pytest.raises(TypeError, match=r"gamma: expected a number, got Tensor"):
        FocalLoss(torch.ones(3))  # type: ignore[arg-type]


@each_mode
def test_refused_calls_leave_the_penalty_alone(mode: dict[str, Any]) -> None:
    criterion = PENEX(torch.ones(3), **mode)
    before = criterion.penalty.clone()
    for logits, target, error, message in (
        (torch.zeros(2, 3).long(), LABELS[:2], TypeError, "input: .* torch.int64"),
        (logits_of(1), LABELS[:3], ValueError, r"target: .* \(4,\), .* got \(3,\)"),
        (logits_of(1), LABELS.float(), ValueError, r"target: floating-point .* got \(4,\)"),
        (logits_of(1), LABELS + 1, IndexError, r"target: .* \[0, 3\) .* got 3"),
        (logits_of(1), LABELS - 1, IndexError, r"target: .* \[0, 3\) .* got -1"),
        (logits_of(1, classes=4), LABELS, ValueError, r"weight: .* \(4,\), got \(3,\)"),
    ):
        with pytest.raises(error, match=message):
            criterion(logits, target)
    assert torch.equal(criterion.penalty.nan_to_num(), before.nan_to_num())


# 7. Compilation and transformations.


@each_mode
@pytest.mark.parametrize("train", [True, False])
def test_compiled_module_equals_eager(mode: dict[str, Any], train: bool) -> None:
    torch.compiler.reset()
    eager, other = (
        PENEX(torch.tensor([1.0, 2, 3]), **mode),
        PENEX(torch.tensor([1.0, 2, 3]), **mode),
    )
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for criterion in (eager, compiled):
        criterion.train(train)
    for seed in range(3):
        ours, theirs = logits_of(seed), logits_of(seed)
        got, expected = compiled(ours, LABELS), eager(theirs, LABELS)
        got.backward()
        expected.backward()
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(ours.grad, theirs.grad)
        torch.testing.assert_close(other.penalty, eager.penalty, equal_nan=True)


@pytest.mark.parametrize("build", [FocalLoss, ConfidencePenaltyLoss])
def test_compiled_baselines(build: type[nn.Module]) -> None:
    torch.compiler.reset()
    criterion = build()
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits_of(1), LABELS), criterion(logits_of(1), LABELS))


@each_mode
def test_torch_func_on_a_criterion(mode: dict[str, Any]) -> None:
    criterion = PENEX(**mode).eval()
    logits = logits_of(1).detach()
    got = torch.func.grad(lambda f: criterion(f, LABELS))(logits)
    leaf = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(criterion(leaf, LABELS), leaf)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("train", [True, False])
@each_mode
def test_under_autocast(mode: dict[str, Any], train: bool) -> None:
    criterion, peer = PENEX(**mode).train(train), nn.CrossEntropyLoss()
    layer = nn.Linear(5, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = layer(torch.randn(4, 5))
        assert logits.dtype == torch.bfloat16
        loss = criterion(logits, LABELS)
        assert loss.dtype == peer(logits, LABELS).dtype == torch.float32
    loss.backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.isfinite().all()


# 8. A criterion in training.


@pytest.mark.parametrize(
    "build",
    [
        PENEX,
        lambda: PENEX(penalty_mode="auto"),
        lambda: PENEX(penalty=0.01),
        FocalLoss,
        ConfidencePenaltyLoss,
    ],
)
def test_a_model_learns(build: Callable[[], nn.Module]) -> None:
    criterion = build()
    centres = 3 * torch.eye(3)
    target = torch.arange(60) % 3
    features = centres[target] + 0.5 * torch.randn(60, 3)
    model = nn.Linear(3, 3)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(60):
        optimiser.zero_grad()
        criterion(model(features), target).backward()
        optimiser.step()
    assert (model(features).argmax(1) == target).float().mean() > 0.95


# 9. Several processes.


def test_penalty_over_a_process_group_is_that_of_the_joined_batch(tmp_path: Path) -> None:
    """Two real processes, unequal batches and unequal kept rows, one step with an empty rank."""
    batches = []
    for step, (first, second) in enumerate(((4, 7), (3, 3), (5, 2), (4, 6))):
        pair = []
        for rank, rows in enumerate((first, second)):
            logits = 2 * logits_of(10 * step + rank, rows).detach()
            target = torch.arange(rows) % 3
            target[: 2 * rank] = -100
            if (step, rank) == (2, 1):
                target[:] = -100
            if (step, rank) == (3, 0):
                logits[1, 1] = math.nan  # not absorbed on either rank
            pair.append((logits, target))
        batches.append(pair)
    torch.save(batches, tmp_path / "batches")
    with run_ranks(Path(__file__).with_name("rank_worker.py"), 2, tmp_path) as errors:
        pass
    assert not any("Warning" in text for text in errors), errors
    results = [torch.load(tmp_path / f"result{rank}", weights_only=True) for rank in range(2)]

    single = PENEX()
    local = PENEX()
    for step, pair in enumerate(batches):
        joined = [torch.cat(parts) for parts in zip(*pair, strict=True)]
        single(joined[0].requires_grad_(), joined[1])
        local(pair[0][0].clone().requires_grad_(), pair[0][1])
        for rank, (logits, target) in enumerate(pair):
            penalty, loss = results[rank][step]
            torch.testing.assert_close(penalty, single.penalty)
            # The mean over ranks of these losses, which DDP makes, is the mean of the joined batch.
            total = penex_loss(logits, target, penalty=single.penalty, reduction="sum")
            expected = total / ((joined[1] != -100).sum() / 2)
            torch.testing.assert_close(loss, expected.detach(), equal_nan=True)
        assert not torch.allclose(single.penalty, local.penalty)


# 10. A CUDA device.


@pytest.mark.gpu
@each_mode
def test_training_on_cuda_waits_for_nothing(mode: dict[str, Any]) -> None:
    criterion, reference = PENEX(**mode).cuda(), PENEX(**mode)
    target = LABELS.cuda()
    for seed in range(2):
        logits = logits_of(seed).detach().cuda().requires_grad_()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss = criterion(logits, target)
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(loss.cpu(), reference(logits_of(seed), LABELS))
        torch.testing.assert_close(criterion.penalty.cpu(), reference.penalty)
    fresh = PENEX(**mode)
    fresh.load_state_dict(criterion.state_dict())
    assert fresh.penalty.device.type == "cpu"
