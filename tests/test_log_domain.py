"""PENEX in the log domain, against 100-digit arithmetic, cross-entropy, PENEX and closed forms."""

import functools
import itertools
import math
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from cases import KINDS, OPTIONS, make_call, make_logits, make_target
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import penex
from penex import _inputs, _passes, _row_losses, _rows
from penex.functional import log_penex_loss, penex_loss, z_loss
from penex.losses import LogPENEX, ZLoss

POWERS = ((0.0, 0.0), (1e-8, 1e-8), (0.3, 1.0), (0.0, 16.0), (2.0, 0.25))
TINY_TO_LARGE = (0.0, 1e-30, 1e-24, 1e-8, 1e-3, 0.1, 1.0, 64.0)
REDUCTIONS = ("mean", "sum", "none")


def close(got: Tensor, expected: Tensor, rtol: float = 1e-11, atol: float = 1e-12) -> None:
    torch.testing.assert_close(got.double(), expected.double(), rtol=rtol, atol=atol)


def both(logits: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of its sum."""
    leaf = logits.detach().clone().requires_grad_()
    loss = log_penex_loss(leaf, target, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


PATHS = ("chosen", "pieces", "softmax", "softmax in pieces", "device", "definition")


def take(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make calls go one of the ways through the code."""
    if path == "definition":
        monkeypatch.setattr(_rows, "_differentiated_once", lambda *args: False)
    if path.startswith("softmax"):
        monkeypatch.setattr(_row_losses.LogPenex, "can_use_partition", lambda *args: False)
    if path == "device":
        monkeypatch.setattr(_inputs, "INSPECT_VALUES", False)
    if path.endswith("pieces"):
        monkeypatch.setattr(_passes, "PIECE_BYTES", 48)
        monkeypatch.setattr(_rows, "SMALL_BATCH", 0)


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the ways through the code calls take."""
    take(request.param, monkeypatch)
    return request.param


# 1. The definition.


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient(monkeypatch: pytest.MonkeyPatch, kind: str, options: str) -> None:
    shapes = ((5,), (7, 5), (3, 1), (2, 3, 5, 3))
    for shape, (alpha, beta), reduction in itertools.product(shapes, POWERS, REDUCTIONS):
        logits, target, keywords = make_call(kind, shape, options)
        asked = dict(keywords, sensitivity=alpha, power=beta, reduction=reduction)
        expected = oracles.log_penex(logits, target, **asked)
        for path in PATHS:
            with monkeypatch.context() as patch:
                take(path, patch)
                for got, exact in zip(both(logits, target, **asked), expected[:2], strict=True):
                    close(got, exact)


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [30.0, 6e4])
def test_no_power_and_no_logits_lose_precision(
    monkeypatch: pytest.MonkeyPatch, size: float, dtype: torch.dtype, kind: str
) -> None:
    """The value relative to the spread of the logits, the gradient relative to its largest."""
    logits = (size * (2 * torch.rand(6, 5, dtype=torch.float64) - 1)).to(dtype)
    target = make_target(kind, (6, 5))
    target = target if kind == "indices" else target.to(dtype)
    eps = torch.finfo(dtype).eps
    for alpha, beta in itertools.product(TINY_TO_LARGE, TINY_TO_LARGE):
        options = {"sensitivity": alpha, "power": beta}
        exact = oracles.log_penex(logits, target, **options)
        largest = exact.gradient.abs().max()
        # In float32 an exponential of u is right to u eps; float64 has nothing wider for log Z.
        error = 200 * eps if dtype == torch.float32 else eps * (64 + 2 * size * max(alpha, beta))
        for path in PATHS:
            with monkeypatch.context() as patch:
                take(path, patch)
                value, gradient = both(logits, target, **options)
            assert abs(value - exact.value) <= 8 * eps * (size + 1)
            assert ((gradient - exact.gradient).abs() <= error * largest).all()


@pytest.mark.parametrize("power", [0.0, 0.01, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("sensitivity", [0.0, 0.01, 1.0])
def test_a_row_at_the_end_of_the_range_of_floats(
    path: str, sensitivity: float, power: float
) -> None:
    """Of e^-740, float64 holds four bits; of e^-760, nothing."""
    logits = torch.randn(6, 5, dtype=torch.float64)
    logits[1] -= 740
    logits[2] -= 760
    options = {"sensitivity": sensitivity, "power": power}
    exact = oracles.log_penex(logits, torch.arange(6) % 5, **options)
    value, gradient = both(logits, torch.arange(6) % 5, **options)
    torch.testing.assert_close(value, exact.value, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, exact.gradient, rtol=1e-11, atol=1e-30)


@given(
    values=st.lists(st.floats(-40, 40, width=32), min_size=6, max_size=6),
    alpha=st.just(0.0) | st.floats(1e-20, 64),
    beta=st.just(0.0) | st.floats(1e-20, 64),
    smoothing=st.just(0.0) | st.floats(1e-3, 1),
)
def test_any_logits_in_float32(
    values: list[float], alpha: float, beta: float, smoothing: float
) -> None:
    logits, target = torch.tensor(values).reshape(2, 3), torch.tensor([2, 0])
    options = {"sensitivity": alpha, "power": beta, "label_smoothing": smoothing}
    value, gradient = both(logits, target, **options)
    exact = oracles.log_penex(logits, target, **options)
    close(value, exact.value, rtol=1e-5, atol=1e-5)
    close(gradient, exact.gradient, rtol=1e-4, atol=1e-4)


def test_docstring_example_by_hand() -> None:
    logits, target = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    exponential = (math.exp(-1) + math.exp(-0.5)) / 2
    partition = (math.exp(2) + 1 + 1 + math.e) / 2
    loss = log_penex_loss(logits, target, sensitivity=0.5, power=1.0)
    assert loss.item() == pytest.approx(2 * math.log(exponential) + math.log(partition), rel=1e-6)


# 2. What the loss is.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_without_powers_it_is_cross_entropy(
    path: str, kind: str, options: str, dtype: torch.dtype
) -> None:
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    for shape, reduction in itertools.product(((6, 5), (3, 5, 4)), REDUCTIONS):
        logits, target, keywords = make_call(kind, shape, options, dtype)
        keywords["reduction"] = reduction
        leaf = logits.clone().requires_grad_()
        peer = F.cross_entropy(leaf, target, **keywords)
        (expected,) = torch.autograd.grad(peer.sum(), leaf)
        for power in (0.0, 1e-30, 1e-16):
            value, gradient = both(logits, target, sensitivity=power, power=power, **keywords)
            assert (value.shape, value.dtype) == (peer.shape, peer.dtype)
            close(value, peer, rtol=4 * tolerance, atol=tolerance)
            close(gradient, expected, rtol=4 * tolerance, atol=tolerance)


@given(alpha=st.floats(0, 64), beta=st.floats(0, 64))
def test_one_labelled_row_is_its_cross_entropy(alpha: float, beta: float) -> None:
    logits, target = 3 * torch.randn(1, 5, dtype=torch.float64), torch.tensor([3])
    value, gradient = both(logits, target, sensitivity=alpha, power=beta)
    close(value, F.cross_entropy(logits, target))
    close(gradient, logits.softmax(1) - F.one_hot(target, 5))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [1e-3, 0.1, 0.6])
def test_at_power_one_the_direction_is_that_of_penex(kind: str, options: str, alpha: float) -> None:
    logits, target, keywords = make_call(kind, (7, 5), options)
    _, gradient = both(logits, target, sensitivity=alpha, power=1.0, **keywords)
    leaf = logits.requires_grad_()
    (other,) = torch.autograd.grad(penex_loss(leaf, target, sensitivity=alpha, **keywords), leaf)
    close(gradient / gradient.norm(), other / other.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_small_powers_add_half_the_variances(kind: str) -> None:
    logits, target, _ = make_call(kind, (40, 5), "plain")
    q = target.double() if target.ndim == 2 else F.one_hot(target, 5).double()
    mean = (q * logits).sum() / 40
    label = (q * (logits - mean) ** 2).sum() / 40  # over rows and, for soft targets, classes
    partition = logits.logsumexp(1).var(unbiased=False)
    plain = F.cross_entropy(logits, q)
    for alpha, beta in ((1e-5, 0.0), (0.0, 1e-5), (2e-5, 1e-5)):
        got = log_penex_loss(logits, target, sensitivity=alpha, power=beta) - plain
        second = alpha / 2 * label + beta / 2 * partition
        close(got, second, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_common_shift_changes_nothing_and_a_row_s_shift_does(kind: str) -> None:
    logits, target, keywords = make_call(kind, (7, 5), "all")
    for alpha, beta in POWERS:
        options = dict(keywords, sensitivity=alpha, power=beta)
        value, gradient = both(logits, target, **options)
        shifted, shifted_gradient = both(logits + 3.7, target, **options)
        close(shifted, value)
        close(shifted_gradient, gradient)
        close(gradient.sum(), torch.zeros(()))
        assert (gradient.sum(1).abs().max() > 1e-6) == (max(alpha, beta) > 1e-6)


@given(alpha=st.floats(0, 20), beta=st.floats(0, 20), share=st.floats(0, 1))
def test_it_is_convex(alpha: float, beta: float, share: float) -> None:
    first, second = make_logits((2, 6, 4)) * 3
    target = make_target("probabilities", (6, 4))
    loss = functools.partial(log_penex_loss, target=target, sensitivity=alpha, power=beta)
    between = share * loss(first) + (1 - share) * loss(second)
    assert loss(share * first + (1 - share) * second) <= between + 1e-10


@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 1.0), (0.0, 8.0), (0.5, 4.0), (0.7, 0.25)])
def test_fisher_consistency_and_self_normalisation(alpha: float, beta: float) -> None:
    """Free logits for five inputs with known probabilities, which occur with known frequencies.

    At the optimum softmax((1 + alpha) f) is proportional to w p, and Y Z^(beta - 1) is the same for
    every input, Y = sum_j exp((1 + alpha) f_j): Z itself for alpha = 0, Y for beta = 1.
    """
    weight = torch.tensor([0.3, 1.0, 2.0, 0.7], dtype=torch.float64)
    p = (2 * torch.randn(5, 4, dtype=torch.float64)).softmax(1)
    often = torch.tensor([0.1, 0.3, 0.2, 0.25, 0.15], dtype=torch.float64)
    logits = torch.zeros(5, 4, dtype=torch.float64, requires_grad=True)
    criterion = LogPENEX(weight, sensitivity=alpha, power=beta)
    optimiser = torch.optim.LBFGS(
        [logits],
        max_iter=2000,
        tolerance_grad=1e-10,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = criterion(logits, often[:, None] * p)  # the frequencies are part of the masses
        loss.backward()
        return loss

    optimiser.step(closure)
    f = logits.detach()
    close(criterion.predict_proba(f), weight * p / (weight * p).sum(1, True), rtol=1e-5)
    constant = ((1 + alpha) * f).exp().sum(1) * f.exp().sum(1) ** (beta - 1)
    close(constant / constant[0], torch.ones(5), rtol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_bounded_at_any_logits(
    path: str, kind: str, dtype: torch.dtype, reduction: str
) -> None:
    pattern = torch.tensor([[1.0, -1, 0], [-1, -1, -1], [-1, 1, 1], [0, 0, 0.01]])
    logits = (6e4 * pattern).to(dtype)
    target = torch.tensor([1, 0, 2, 0])
    if kind != "indices":
        target = F.one_hot(target, 3)
    target = target.to(dtype) if kind == "probabilities" else target
    rows = 1 if reduction == "mean" else 4
    for alpha, beta in ((0.0, 0.0), (1e-6, 1e-6), (0.1, 1.0), (0.1, 64.0), (64.0, 64.0)):
        options = {"sensitivity": alpha, "power": beta, "reduction": reduction}
        value, gradient = both(logits, target, **options)
        exact = oracles.log_penex(logits, target, **options)
        limits = torch.finfo(dtype)
        expected = exact.value.clamp(-2 * limits.max, 2 * limits.max).to(dtype)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
        assert gradient.float().abs().sum() <= 2 * rows * (1 + limits.eps)
        close(gradient, exact.gradient, rtol=2e-5 + 2 * limits.eps, atol=2e-5)


def test_masked_classes_and_an_impossible_label(path: str) -> None:
    logits = torch.tensor([[1.0, -math.inf, 0.5], [2.0, 1.0, -math.inf]])
    for target in (torch.tensor([0, 1]), F.one_hot(torch.tensor([0, 1]), 3).float()):
        value, gradient = both(logits, target)
        torch.testing.assert_close(value, log_penex_loss(logits.clamp(min=-200), target))
        assert (gradient[logits == -math.inf] == 0).all()
        assert gradient.isfinite().all()
    value, gradient = both(logits, torch.tensor([1, 1]))
    assert value == math.inf
    assert gradient.isfinite().all()


# 3. Reductions, and what a batch is.


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_sum_and_rows_have_the_mean_s_value_and_gradient(
    path: str, kind: str, options: str
) -> None:
    logits, target, keywords = make_call(kind, (7, 5), options)
    keywords |= {"sensitivity": 0.4, "power": 3.0}
    peer = {key: keywords[key] for key in keywords.keys() - {"sensitivity", "power"}}
    mean, mean_gradient = both(logits, target, **keywords)
    total, total_gradient = both(logits, target, reduction="sum", **keywords)
    rows, rows_gradient = both(logits, target, reduction="none", **keywords)
    soft = target if kind != "one_hot" else target.argmax(1)
    divided_by = F.cross_entropy(logits, soft, reduction="sum", **peer) / F.cross_entropy(
        logits, soft, **peer
    )
    close(total / mean, divided_by)
    close(rows.sum(), total)
    close(total_gradient / divided_by, mean_gradient)
    close(rows_gradient, total_gradient)


def test_a_row_s_gradient_stays_in_the_row(path: str) -> None:
    logits, target, _ = make_call("indices", (5, 4), "plain")
    leaf = logits.requires_grad_()
    rows = log_penex_loss(leaf, target, reduction="none", power=4.0)
    (gradient,) = torch.autograd.grad(rows[2], leaf)
    (whole,) = torch.autograd.grad(log_penex_loss(leaf, target, reduction="sum", power=4.0), leaf)
    close(gradient[2], whole[2])
    assert not gradient[[0, 1, 3, 4]].any()


@pytest.mark.parametrize("options", ["plain", "all"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2), (2, 3, 0)], ids=str)
def test_empty_batch(shape: tuple[int, ...], kind: str, options: str) -> None:
    logits, target, keywords = make_call(kind, shape, options)
    for reduction in REDUCTIONS:
        value, gradient = both(logits, target, reduction=reduction, **keywords)
        assert value.shape == (() if reduction != "none" else shape[:1] + shape[2:])
        assert value.sum() == 0
        assert gradient.shape == shape


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"weight": torch.rand(3)}])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30])
def test_ignored_rows_may_hold_anything(path: str, options: dict[str, Any], poison: float) -> None:
    logits, target = torch.randn(4, 3), torch.tensor([0, -100, 2, 1])
    for reduction in REDUCTIONS:
        asked = dict(options, reduction=reduction)
        expected = both(logits, target, **asked)
        poisoned = logits.clone()
        poisoned[1, 1:] = poison
        for got, exact in zip(both(poisoned, target, **asked), expected, strict=True):
            torch.testing.assert_close(got, exact)
        for part in both(poisoned, torch.full((4,), -100), **asked):
            assert torch.equal(part, torch.zeros_like(part))
    poisoned = logits.clone()
    poisoned[0, 1] = math.nan
    assert log_penex_loss(poisoned, target, **options).isnan()


def test_micro_batches_add_up_to_no_more_than_the_batch() -> None:
    """The mean of micro-batches' losses lacks the variance between them."""
    logits, target, _ = make_call("indices", (40, 5), "plain")
    for alpha, beta in ((0.0, 0.0), (0.3, 0.0), (0.0, 4.0), (0.3, 4.0)):
        loss = functools.partial(log_penex_loss, sensitivity=alpha, power=beta)
        parts = [loss(f, y) for f, y in zip(logits.split(8), target.split(8), strict=True)]
        lacking = (loss(logits, target) - torch.stack(parts).mean()).item()
        assert lacking > 1e-3 if max(alpha, beta) else abs(lacking) < 1e-12


# 4. Autograd, dtypes, layouts.


@pytest.mark.parametrize("options", ["plain", "all"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("alpha", "beta"), [(0.4, 3.0), (0.0, 2.0), (1e-6, 0.0)])
def test_gradients_numerically(kind: str, options: str, alpha: float, beta: float) -> None:
    logits, target, keywords = make_call(kind, (3, 4), options)
    inputs = [logits.requires_grad_()]
    if kind == "probabilities":
        inputs.append(target.requires_grad_())

    def function(logits: Tensor, target: Tensor = target) -> Tensor:
        return log_penex_loss(logits, target, sensitivity=alpha, power=beta, **keywords)

    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, inputs)


def test_weights_and_zero_masses_are_differentiated_too() -> None:
    logits, labels, _ = make_call("indices", (5, 3), "plain")
    weight = torch.rand(3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(
        lambda f, w: log_penex_loss(f, labels, weight=w, power=2.0),
        (logits.requires_grad_(), weight),
    )
    target = torch.tensor([[0.0, 1.0, 0.0], [0.25, 0.0, 0.75]], dtype=torch.float64)
    (slope,) = torch.autograd.grad(
        log_penex_loss(logits[:2].detach(), target.requires_grad_()), target
    )
    step = torch.zeros_like(target)
    step[0, 2] = 1e-6
    later = log_penex_loss(logits[:2].detach(), target.detach() + step)
    before = log_penex_loss(logits[:2].detach(), target.detach())
    assert slope[0, 2].item() == pytest.approx((later - before).item() / 1e-6, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_torch_func(kind: str) -> None:
    logits, target, keywords = make_call(kind, (4, 3), "weight")
    function = functools.partial(log_penex_loss, sensitivity=0.4, power=2.0, **keywords)
    batches, targets = torch.stack([logits, 2 * logits]), torch.stack([target, target])
    looped = [function(f, target) for f in batches]
    close(torch.func.vmap(function)(batches, targets), torch.stack(looped))
    gradients = torch.func.vmap(torch.func.grad(function))(batches, targets)
    for f, gradient in zip(batches, gradients, strict=True):
        leaf = f.clone().requires_grad_()
        close(gradient, torch.autograd.grad(function(leaf, target), leaf)[0])
    whole = functools.partial(function, target=target)
    expected = torch.autograd.functional.hessian(whole, logits)
    close(torch.func.hessian(whole)(logits), expected)
    rows = functools.partial(function, target=target, reduction="none")
    close(torch.func.jacrev(rows)(logits), torch.func.jacfwd(rows)(logits))
    with fwAD.dual_level():
        tangent = torch.randn_like(logits)
        slope = fwAD.unpack_dual(whole(fwAD.make_dual(logits, tangent))).tangent
    leaf = logits.clone().requires_grad_()
    close(slope, (torch.autograd.grad(whole(leaf), leaf)[0] * tangent).sum())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", ["plain", "all"])
def test_backward_again_and_any_upstream_gradient(path: str, options: str, reduction: str) -> None:
    logits, target, keywords = make_call("indices", (5, 4), options)
    leaf = logits.requires_grad_()
    before = leaf.detach().clone()
    loss = log_penex_loss(leaf, target, reduction=reduction, **keywords)
    _, expected = both(logits, target, reduction=reduction, **keywords)
    for factor in (1.0, -0.5, 1e7, 0.0):
        upstream = torch.full_like(loss, factor)
        (found,) = torch.autograd.grad(loss, leaf, upstream, retain_graph=True)
        close(found, factor * expected)
    assert torch.equal(leaf, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_result_dtype(dtype: torch.dtype, autocast: bool) -> None:
    logits = make_logits((4, 3), dtype).requires_grad_()
    target = torch.tensor([0, 2, 1, -100])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for soft in (target, logits.detach().softmax(1).to(dtype)):
            for reduction in ("mean", "none"):
                got = log_penex_loss(logits, soft, reduction=reduction)
                assert got.dtype == F.cross_entropy(logits, soft, reduction=reduction).dtype
                assert torch.autograd.grad(got.sum(), logits)[0].dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_rounded_once(path: str, dtype: torch.dtype, kind: str) -> None:
    logits = (9 * torch.randn(9, 4)).to(dtype)
    target = make_target(kind, (9, 4))
    value, gradient = both(logits, target, power=4.0)
    single, single_gradient = both(logits.float(), target, power=4.0)
    torch.testing.assert_close(value, single.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)
    torch.testing.assert_close(
        gradient, single_gradient.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7
    )


def test_layouts(path: str) -> None:
    logits, target, keywords = make_call("indices", (2, 3, 4, 5), "all")
    expected, gradient = both(logits, target, **keywords)
    wide = torch.zeros(2, 6, 4, 5, dtype=torch.float64)
    wide[:, ::2] = logits
    for variant in (
        logits.contiguous(memory_format=torch.channels_last),
        wide[:, ::2],
        logits.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    ):
        leaf = variant.detach().requires_grad_()
        loss = log_penex_loss(leaf, target, **keywords)
        close(loss.detach(), expected)
        close(torch.autograd.grad(loss, leaf)[0], gradient)


# 5. Compiled and exported.


@pytest.mark.parametrize(
    ("kind", "reduction", "options"),
    [("indices", "mean", "plain"), ("indices", "none", "all"), ("probabilities", "mean", "all")],
)
def test_compiled_it_is_the_same(kind: str, reduction: str, options: str) -> None:
    torch.compiler.reset()
    criterion = LogPENEX(reduction=reduction, power=3.0)
    keywords: dict[str, Any] = {}
    if options == "all":
        _, _, keywords = make_call(kind, (6, 5), "all", torch.float32)
        criterion = LogPENEX(reduction=reduction, power=3.0, **keywords)
    compiled = torch.compile(criterion, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (6, 9):
        logits, target, _ = make_call(kind, (rows, 5), options, torch.float32)
        found = []
        for loss in (compiled, criterion):
            leaf = logits.clone().requires_grad_()
            value = loss(leaf, target)
            found.append((value.detach(), *torch.autograd.grad(3.5 * value.sum(), leaf)))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_export() -> None:
    size = torch.export.Dim("batch", min=2)
    criterion = LogPENEX(torch.tensor([0.3, 1.0, 2.0]), power=3.0, label_smoothing=0.1)
    example = torch.randn(7, 3), torch.randint(3, (7,))
    program = torch.export.export(criterion, example, dynamic_shapes=({0: size}, {0: size}))
    for rows in (2, 11):
        logits, target = torch.randn(rows, 3), torch.randint(3, (rows,))
        target[0] = -100
        torch.testing.assert_close(program.module()(logits, target), criterion(logits, target))


# 6. Several processes.

CLASSES = 4
WEIGHT = torch.tensor([0.3, 1.0, 2.0, 0.7], dtype=torch.float64)
CASES: dict[str, dict[str, Any]] = {
    "mean": {"power": 4.0},
    "cross-entropy": {"sensitivity": 0.0, "power": 0.0},
    "sum": {"reduction": "sum"},
    "rows": {"reduction": "none", "power": 3.0},
    "weighted": {"weight": WEIGHT, "sensitivity": 0.4},
    "smoothed": {"weight": WEIGHT, "label_smoothing": 0.2, "sensitivity": 2.0},
    "probabilities": {"weight": WEIGHT, "label_smoothing": 0.1},
}


def make_steps(ranks: int, soft: bool) -> list[list[tuple[Tensor, Tensor]]]:
    """Ignored rows everywhere; in step 1 the last rank ignores all rows, in step 2 every rank."""
    steps = []
    for number, sizes in enumerate(((5, 2, 9), (6, 4, 2), (3, 3, 3))):
        step = []
        for rank, rows in enumerate(sizes[:ranks]):
            logits = 2 * torch.randn(rows, CLASSES, dtype=torch.float64) + rank
            target = torch.arange(rows) % CLASSES
            target[1::3] = -100
            if number == 2 or (number, rank) == (1, ranks - 1):
                target[:] = -100
            step.append((logits, make_target("probabilities", (rows, CLASSES)) if soft else target))
        steps.append(step)
    return steps


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, Any], list[Any]]:
    """The cases by the size of the group, and what each rank found; processes start once."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("ranks")
    cases = {
        size: {
            name: {"options": options, "steps": make_steps(size, name == "probabilities")}
            for name, options in CASES.items()
        }
        for size in (2, 3)
    }
    torch.save(cases, folder / "cases")
    with run_ranks(Path(__file__).with_name("log_domain_worker.py"), 3, folder):
        pass
    return cases, [torch.load(folder / f"result{rank}", weights_only=True) for rank in range(3)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_are_one_process(
    ranks: tuple[dict[int, Any], list[Any]], size: int, name: str
) -> None:
    """Means are averaged over ranks, as DistributedDataParallel does; sums are added."""
    cases, results = ranks
    case, found = cases[size][name], [results[rank][size][name] for rank in range(size)]
    reduction = case["options"].get("reduction", "mean")
    share = 1 / size if reduction == "mean" else 1.0
    for number, step in enumerate(case["steps"]):
        logits, target = (torch.cat(parts) for parts in zip(*step, strict=True))
        value, gradient = both(logits, target, **case["options"])
        losses = [rank["losses"][number] for rank in found]
        if reduction == "none":
            close(torch.cat(losses), value)
        else:
            close(share * torch.stack(losses).sum(), value)
        close(share * torch.cat([rank["gradients"][number] for rank in found]), gradient)
    for number, rank in enumerate(found):
        assert len(rank["collectives"]) == len(case["steps"])
        assert max(rank["collectives"]) <= 4 * size
        assert rank["later"] == []
        alone, _ = both(*case["steps"][0][number], **case["options"])
        close(rank["evaluated"], alone)


def test_ranks_compiled(ranks: tuple[dict[int, Any], list[Any]]) -> None:
    _, results = ranks
    for rank in results:
        for got, expected in zip(
            (*rank["compiled"]["losses"], *rank["compiled"]["gradients"]),
            (*rank[3]["weighted"]["losses"], *rank[3]["weighted"]["gradients"]),
            strict=True,
        ):
            close(got, expected)


# 7. The module, refusals, and the z-loss.


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_modules_are_the_functions(kind: str, options: str) -> None:
    logits, target, keywords = make_call(kind, (5, 3, 2), options, torch.float32)
    own = {"sensitivity": 0.4, "power": 3.0}
    for reduction in REDUCTIONS:
        asked = dict(keywords, reduction=reduction)
        criterion = LogPENEX(**own, **asked)
        assert torch.equal(
            criterion(logits, target), log_penex_loss(logits, target, **own, **asked)
        )
        got = ZLoss(0.3, **asked)(logits, target)
        assert torch.equal(got, z_loss(logits, target, strength=0.3, **asked))


def test_module() -> None:
    criterion = LogPENEX(sensitivity=0.5, power=2.0)
    assert penex.LogPENEX is penex.losses.LogPENEX
    assert not criterion.state_dict()
    assert "sensitivity=0.5, power=2.0, ignore_index=-100" in repr(criterion)
    assert "strength=0.3" in repr(ZLoss(0.3))
    logits = torch.randn(3, 4, 2)
    for alpha in (0.5, 0.0):
        criterion = LogPENEX(sensitivity=alpha)
        expected = oracles.predict_proba(logits, alpha, 1).float()
        torch.testing.assert_close(criterion.predict_proba(logits), expected)
        torch.testing.assert_close(criterion.predict_log_proba(logits).exp(), expected)
        torch.testing.assert_close(
            criterion.predict_proba(logits.bfloat16(), dim=1).float(), expected, atol=0.01, rtol=0
        )
    assert criterion.predict_proba(torch.zeros(5)).sum() == pytest.approx(1.0)
    # Where no process group exists "world" is one process.
    one = LogPENEX(process_group="world")
    batch = torch.randn(4, 3), torch.tensor([0, 2, 1, 0])
    assert torch.equal(one(*batch), LogPENEX()(*batch))


ROWS, LABELS = torch.zeros(2, 3), torch.tensor([0, 2])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sensitivity": -0.1}, ValueError, r"sensitivity: expected .* \[0, inf\), got -0.1"),
        ({"sensitivity": math.inf}, ValueError, r"sensitivity: expected a finite .*, got inf"),
        ({"power": -1}, ValueError, r"power: expected .* \[0, inf\), got -1"),
        ({"power": math.nan}, ValueError, r"power: expected .*, got nan"),
        ({"power": "1"}, TypeError, "power: expected a number, got str"),
        ({"power": True}, TypeError, "power: expected a number, got bool"),
        ({"label_smoothing": 1.1}, ValueError, "label_smoothing: expected"),
        ({"reduction": "avg"}, ValueError, "reduction: expected one of"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index: expected an int"),
    ],
)
def test_refused_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    for call in (lambda: log_penex_loss(ROWS, LABELS, **options), lambda: LogPENEX(**options)):
        with pytest.raises(error, match=message):
            call()
    shared = options.keys() & {"label_smoothing", "reduction", "ignore_index"}
    if shared:
        with pytest.raises(error, match=message):
            z_loss(ROWS, LABELS, **options)


@pytest.mark.parametrize(
    ("input", "target", "error", "message"),
    [
        (ROWS.long(), LABELS, TypeError, "input: expected floating-point logits"),
        (ROWS, [0, 2], TypeError, "target: expected a tensor, got list"),
        (ROWS, LABELS.float(), ValueError, r"target: floating-point .* \(2, 3\), got \(2,\)"),
        (ROWS, torch.tensor([0, 3]), IndexError, r"target: .* in \[0, 3\) or -100 .*, got 3"),
        (ROWS, torch.tensor([0, -1]), IndexError, r"target: .* in \[0, 3\) or -100 .*, got -1"),
        (ROWS, torch.tensor([[0, 1, 1], [1, 0, 0]]), ValueError, "target: .* one-hot .* single 1"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"weight": torch.ones(3)}, {"label_smoothing": 0.1}])
def test_refused_tensors(
    input: Tensor, target: Any, error: type[Exception], message: str, options: dict[str, Any]
) -> None:
    for loss in (log_penex_loss, z_loss):
        with pytest.raises(error, match=message):
            loss(input, target, **options)


def test_spread() -> None:
    pytest.importorskip("scipy")
    logits, target, _ = make_call("indices", (30, 5), "plain")
    found = penex.metrics.spread(logits, target)
    label = logits.gather(1, target[:, None])
    assert found.label == pytest.approx(label.var(unbiased=False).item())
    assert found.partition == pytest.approx(logits.logsumexp(1).var(unbiased=False).item())


def test_refused_arguments() -> None:
    with pytest.raises(ValueError, match="process_group: expected one of 'world', got 'all'"):
        LogPENEX(process_group="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="strength: expected .* got -1"):
        ZLoss(-1)
    with pytest.raises(ValueError, match="sensitivity: expected"):
        penex.inference.predict_proba(ROWS, 0.0)  # there it can only be a mistake


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_z_loss(kind: str, options: str, reduction: str) -> None:
    logits, target, keywords = make_call(kind, (6, 3, 2), options)
    keywords["reduction"] = reduction
    peer = functools.partial(F.cross_entropy, **keywords)
    close(z_loss(logits, target, strength=0, **keywords), peer(logits, target))
    log_z = logits.logsumexp(1)
    difference = z_loss(logits, target, strength=0.7, **keywords) - peer(logits, target)
    weight = keywords.get("weight", torch.ones(3, dtype=torch.float64))
    if kind == "indices":
        kept = target != keywords.get("ignore_index", -100)
        mass = F.one_hot(target.where(kept, 0), 3).double() * kept.unsqueeze(-1)
        denominator = (mass * weight).sum()
    else:
        mass, denominator = target.movedim(1, -1), torch.tensor(12.0)
        kept = torch.ones(6, 2, dtype=torch.bool)
    smoothing = keywords.get("label_smoothing", 0.0)
    mass = ((1 - smoothing) * mass + smoothing / 3) * weight * kept.unsqueeze(-1)
    expected = 0.7 * mass.sum(-1) * log_z.square()
    if reduction != "none":
        expected = expected.sum() / (denominator if reduction == "mean" else 1)
    close(difference, expected)
