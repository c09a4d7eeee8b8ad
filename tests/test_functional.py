"""penex.functional against 40-digit arithmetic, torch's cross-entropy and closed forms."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from cases import KINDS, OPTIONS, SHAPES, make_call, make_logits, make_target
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from penex.functional import (
    confidence_penalty_loss,
    estimate_penalty,
    focal_loss,
    margin,
    penex_loss,
)

LOSSES = (
    functools.partial(penex_loss, sensitivity=0.4, penalty=0.3),
    functools.partial(penex_loss, sensitivity=0.4),
    functools.partial(focal_loss, gamma=1.7),
    functools.partial(confidence_penalty_loss, strength=0.3),
)
NAMES = ("fixed", "auto", "focal", "confidence")
each_loss = pytest.mark.parametrize("loss", LOSSES, ids=NAMES)


def close(got: Tensor, expected: Tensor, rtol: float = 1e-11) -> None:
    torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=1e-13)


# 1. The definition.


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient(kind: str, shape: tuple[int, ...], options: str) -> None:
    logits, target, keywords = make_call(kind, shape, options)
    logits.requires_grad_()
    for reduction, huberization, penalty in itertools.product(
        ("mean", "sum", "none"), (None, 0.6, 2.5), (0.3, None)
    ):
        asked = dict(keywords, reduction=reduction, huberization=huberization, penalty=penalty)
        loss = penex_loss(logits, target, sensitivity=0.7, **asked)
        expected = oracles.penex(logits, target, sensitivity=0.7, **asked)
        close(loss, expected.value)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        close(gradient, expected.gradient)


@pytest.mark.parametrize("huberization", [None, 1.5])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_estimate_penalty(
    kind: str, shape: tuple[int, ...], options: str, huberization: float | None
) -> None:
    logits, target, keywords = make_call(kind, shape, options)
    keywords.update(sensitivity=0.7, huberization=huberization)
    expected = oracles.estimate_penalty(logits, target, **keywords)
    got = estimate_penalty(logits.requires_grad_(), target, **keywords)
    assert got.shape == ()
    assert got.dtype == torch.float64
    assert not got.requires_grad
    assert got.item() == pytest.approx(expected, rel=1e-12, nan_ok=True)


@given(
    values=st.lists(st.floats(-30, 30, width=32), min_size=6, max_size=6),
    alpha=st.floats(1e-3, 3.0),
    penalty=st.none() | st.floats(1e-10, 100.0),
    huberization=st.none() | st.floats(1e-3, 1e3),
    smoothing=st.floats(0, 1),
)
def test_any_logits_in_float32(
    values: list[float],
    alpha: float,
    penalty: float | None,
    huberization: float | None,
    smoothing: float,
) -> None:
    logits = torch.tensor(values).reshape(2, 3).requires_grad_()
    target = torch.tensor([2, 0])
    options: dict[str, Any] = {
        "sensitivity": alpha,
        "penalty": penalty,
        "huberization": huberization,
        "label_smoothing": smoothing,
    }
    loss = penex_loss(logits, target, **options)
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = oracles.penex(logits, target, **options)
    torch.testing.assert_close(loss, expected.value.float(), rtol=1e-4, atol=1e-30)
    # Each entry is a difference of two terms, so its error is relative to the larger of them.
    exact = expected.gradient.float()
    scale = max(1.0, alpha) * expected.value.abs().item() + exact.abs().max().item()
    torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-4 * scale)


def test_docstring_example_by_hand() -> None:
    logits, target = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    first = math.exp(-1) + 0.25 * (math.exp(2) + 1)
    second = math.exp(-0.5) + 0.25 * (1 + math.e)
    loss = penex_loss(logits, target, sensitivity=0.5, penalty=0.25)
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-6)


def test_ignored_rows_change_nothing() -> None:
    logits = make_logits((6, 4))
    target = torch.tensor([0, 3, -100, 1, -100, 2])
    keep = target != -100
    for options in ({}, {"label_smoothing": 0.2, "weight": torch.tensor([1.0, 2, 3, 4])}):
        for loss in LOSSES:
            close(loss(logits, target, **options), loss(logits[keep], target[keep], **options))


@each_loss
@pytest.mark.parametrize("kind", KINDS)
def test_class_dimension_is_the_second(loss: Callable[..., Tensor], kind: str) -> None:
    logits, target, _ = make_call(kind, (3, 5, 4, 2), "plain")
    rows = loss(logits, target, reduction="none")
    flat_target = target.movedim(1, -1).reshape(-1, 5) if target.ndim == 4 else target.flatten()
    flat = loss(logits.movedim(1, -1).reshape(-1, 5), flat_target, reduction="none")
    close(rows.flatten(), flat)


# 2. Parity with cross_entropy.


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("shape", [s for s in SHAPES if min(s) > 1], ids=str)
@each_loss
def test_shape_dtype_and_denominator_are_those_of_cross_entropy(
    loss: Callable[..., Tensor], kind: str, shape: tuple[int, ...], options: str
) -> None:
    if len(shape) == 1 and options in ("ignore", "all"):
        shape = (1, *shape)
    logits, target, keywords = make_call(kind, shape, options)
    if kind == "indices" and shape[0] == 1 and options in ("ignore", "all"):
        target = torch.zeros_like(target)  # torch's mean over nothing is NaN; see the test below
    for reduction in ("mean", "sum", "none"):
        got = loss(logits, target, reduction=reduction, **keywords)
        peer = F.cross_entropy(logits, target, reduction=reduction, **keywords)
        assert got.shape == peer.shape
        assert got.dtype == peer.dtype
    divided_by = [
        f(logits, target, reduction="sum", **keywords) / f(logits, target, **keywords)
        for f in (loss, F.cross_entropy)
    ]
    close(*divided_by)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_result_dtype(loss: Callable[..., Tensor], dtype: torch.dtype, autocast: bool) -> None:
    logits = make_logits((4, 3), dtype).requires_grad_()
    target = torch.tensor([0, 2, 1, -100])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for soft in (target, logits.detach().softmax(1).to(dtype)):
            for reduction in ("mean", "none"):
                got = loss(logits, soft, reduction=reduction)
                assert got.dtype == F.cross_entropy(logits, soft, reduction=reduction).dtype
                (gradient,) = torch.autograd.grad(got.sum(), logits)
                assert gradient.dtype == dtype
                assert gradient.isfinite().all()


@each_loss
def test_meta_tensors_have_the_right_shape(loss: Callable[..., Tensor]) -> None:
    logits, target = (
        torch.empty(3, 5, 2, device="meta"),
        torch.zeros(3, 2, dtype=torch.int64, device="meta"),
    )
    assert loss(logits, target, reduction="none").shape == (3, 2)


@each_loss
def test_index_dtypes_are_one(loss: Callable[..., Tensor]) -> None:
    logits = make_logits((4, 3))
    target = torch.tensor([0, 2, 1, 2])
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        assert torch.equal(loss(logits, target.to(dtype)), loss(logits, target))
        one_hot = F.one_hot(target, 3).to(dtype)
        assert torch.equal(loss(logits, one_hot), loss(logits, target))


@each_loss
def test_ignore_index_may_be_any_integer(loss: Callable[..., Tensor]) -> None:
    logits = make_logits((4, 3))
    expected = loss(logits, torch.tensor([0, -100, 1, -100]))
    for ignored in (255, 3, 2, -1):
        target = torch.tensor([0, ignored, 1, ignored])
        assert torch.equal(loss(logits, target, ignore_index=ignored), expected)


# 3. The penalty and the closed forms.

alphas = st.floats(0.02, 2.0)
penalties = st.floats(1e-3, 10.0)
simplex = st.lists(st.floats(0.05, 1.0), min_size=3, max_size=5).map(
    lambda values: torch.tensor(values, dtype=torch.float64) / sum(values)
)


@given(alpha=alphas, rho=penalties, p=simplex)
def test_minimiser_and_minimum(alpha: float, rho: float, p: Tensor) -> None:
    f = (torch.log(alpha * p / rho) / (1 + alpha)).requires_grad_()
    loss = penex_loss(f, p, sensitivity=alpha, penalty=rho)
    (gradient,) = torch.autograd.grad(loss, f)
    assert gradient.abs().max() < 1e-12 * max(1.0, loss.item())
    minimum = (1 + alpha) * (alpha / rho) ** (-alpha / (1 + alpha)) * (p ** (1 / (1 + alpha))).sum()
    close(loss, minimum)
    close(((1 + alpha) * f).exp().sum(), torch.tensor(alpha / rho, dtype=torch.float64))
    close(((1 + alpha) * f).softmax(0), p)


@given(alpha=alphas, classes=st.integers(1, 9), value=st.sampled_from(KINDS))
def test_estimate_at_zero_logits_is_alpha_over_classes(
    alpha: float, classes: int, value: str
) -> None:
    target = make_target(value, (4, classes))
    got = estimate_penalty(torch.zeros(4, classes, dtype=torch.float64), target, sensitivity=alpha)
    assert got.item() == pytest.approx(alpha / classes, rel=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_estimate_makes_a_common_shift_stationary(kind: str, options: str) -> None:
    logits, target, keywords = make_call(kind, (9, 4), options)
    rho = estimate_penalty(logits, target, sensitivity=0.3, **keywords)
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss = penex_loss(logits + shift, target, sensitivity=0.3, penalty=rho, **keywords)
    (gradient,) = torch.autograd.grad(loss, shift)
    assert abs(gradient.item()) < 1e-13


def test_estimate_is_clamped() -> None:
    target = torch.tensor([0, 1])
    logits = torch.zeros(2, 4)
    assert estimate_penalty(logits, target, penalty_min=0.5).item() == 0.5
    assert estimate_penalty(logits, target, penalty_max=1e-3).item() == pytest.approx(1e-3)
    assert estimate_penalty(logits + 50, target).item() == pytest.approx(1e-10)
    assert estimate_penalty(logits - 50, target).item() == 100.0


def test_auto_is_the_estimate_given_as_penalty() -> None:
    logits, target, keywords = make_call("indices", (9, 4), "all", torch.float32)
    rho = estimate_penalty(logits, target, **keywords)
    torch.testing.assert_close(
        penex_loss(logits, target, **keywords), penex_loss(logits, target, penalty=rho, **keywords)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_auto_descends_the_log_domain_objective(kind: str) -> None:
    alpha, (logits, target, _) = 0.3, make_call(kind, (6, 4), "plain")
    q = F.one_hot(target, 4).double() if kind == "indices" else target.double()
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(penex_loss(logits, target, sensitivity=alpha), logits)
    exponential = (q * torch.exp(-alpha * logits)).sum() / 6
    objective = exponential.log() + alpha * logits.exp().sum(1).mean().log()
    (expected,) = torch.autograd.grad(objective, logits)
    close(gradient, expected * exponential.detach())


@given(alpha=alphas, rho=penalties, p=simplex)
def test_hessian_is_the_closed_form_and_positive(alpha: float, rho: float, p: Tensor) -> None:
    f = torch.linspace(-2, 2, len(p), dtype=torch.float64)
    hessian = torch.func.hessian(lambda x: penex_loss(x, p, sensitivity=alpha, penalty=rho))(f)
    close(hessian, torch.diag(rho * f.exp() + alpha**2 * p * torch.exp(-alpha * f)))
    assert (hessian.diagonal() > 0).all()


def test_penalty_is_never_differentiated() -> None:
    logits, target = make_logits((5, 3)).requires_grad_(), torch.tensor([0, 1, 2, 0, 1])
    penalty = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    loss = penex_loss(logits, target, penalty=penalty)
    assert torch.autograd.grad(loss, penalty, allow_unused=True) == (None,)
    auto = penex_loss(logits, target)
    constant = penex_loss(logits, target, penalty=estimate_penalty(logits, target))
    torch.testing.assert_close(
        torch.autograd.grad(auto, logits), torch.autograd.grad(constant, logits)
    )
    assert not estimate_penalty(logits, logits.softmax(1)).requires_grad


def test_penalty_is_not_differentiated_forwards_either() -> None:
    logits, target = make_logits((5, 3)), torch.tensor([0, 1, 2, 0, 1])
    tangent = torch.randn_like(logits)
    rho = estimate_penalty(logits, target)
    _, slope = torch.func.jvp(lambda f: penex_loss(f, target), (logits,), (tangent,))
    _, fixed = torch.func.jvp(lambda f: penex_loss(f, target, penalty=rho), (logits,), (tangent,))
    close(slope, fixed)
    _, slope = torch.func.jvp(lambda f: estimate_penalty(f, target), (logits,), (tangent,))
    assert slope == 0
    _, slope = torch.func.jvp(
        lambda r: penex_loss(logits, target, penalty=r), (rho,), (torch.ones_like(rho),)
    )
    assert slope == 0


@given(
    gamma=st.floats(-3, 3),
    alpha=alphas,
    rho=penalties,
    logits=st.lists(st.floats(-4, 4), min_size=15, max_size=15),
)
def test_margin_bound(gamma: float, alpha: float, rho: float, logits: list[float]) -> None:
    f = torch.tensor(logits, dtype=torch.float64).reshape(5, 3)
    y = torch.tensor([0, 1, 2, 1, 0])
    share = (margin(f, y) <= gamma).double().mean()
    loss = penex_loss(f, y, sensitivity=alpha, penalty=rho)
    scale = (1 + alpha) * (rho / alpha) ** (alpha / (1 + alpha))
    assert share <= loss * math.exp(alpha * gamma / (1 + alpha)) / scale * (1 + 1e-12)


def test_margin_bound_is_reached() -> None:
    """Two classes, the loss minimised at a given margin: what is lost is one known factor."""
    alpha, rho, gamma = 0.5, 0.2, 1.3
    # At margin gamma the loss e^{-a f} + rho e^f (1 + e^{-gamma}) is least where its slope is 0.
    f_y = math.log(alpha / (rho * (1 + math.exp(-gamma)))) / (1 + alpha)
    f = torch.tensor([[f_y, f_y - gamma]], dtype=torch.float64)
    loss = penex_loss(f, torch.tensor([0]), sensitivity=alpha, penalty=rho).item()
    scale = (1 + alpha) * (rho / alpha) ** (alpha / (1 + alpha))
    bound = loss * math.exp(alpha * gamma / (1 + alpha)) / scale
    exact = (math.exp(gamma) * (1 + math.exp(-gamma))) ** (alpha / (1 + alpha))
    assert bound == pytest.approx(exact, rel=1e-12)
    assert bound >= 1


@pytest.mark.parametrize("shape", [(5,), (6, 3), (2, 4, 3)], ids=str)
def test_margin(shape: tuple[int, ...]) -> None:
    logits, target = make_logits(shape), make_target("indices", shape)
    got = margin(logits, target)
    assert got.shape == target.shape
    rows = logits.movedim(min(1, len(shape) - 1), -1).reshape(-1, shape[min(1, len(shape) - 1)])
    for value, row, label in zip(got.flatten(), rows.tolist(), target.flatten(), strict=True):
        true = row.pop(int(label))
        assert value.item() == pytest.approx(true - max(row))


def test_margin_keeps_the_dtype_and_refuses() -> None:
    logits = torch.tensor([[1.0, 3.0]], dtype=torch.bfloat16)
    assert margin(logits, torch.tensor([0])).dtype == torch.bfloat16
    with pytest.raises(IndexError, match=r"target.*\[0, 2\).*got -100"):
        margin(logits, torch.tensor([-100]))
    with pytest.raises(ValueError, match=r"two classes or more, got 1"):
        margin(torch.zeros(3, 1), torch.tensor([0, 0, 0]))
    with pytest.raises(ValueError, match=r"target: expected class indices, got torch.float32"):
        margin(logits, logits.float())
    with pytest.raises(TypeError, match=r"target: expected a tensor, got list"):
        margin(logits, [0])  # type: ignore[arg-type]


# 4. Autograd.


@pytest.mark.parametrize("options", ["plain", "all"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("huberization", [None, 0.8])
def test_gradients_numerically(kind: str, options: str, huberization: float | None) -> None:
    logits, target, keywords = make_call(kind, (3, 4), options)
    inputs = [logits.requires_grad_()]
    if kind == "probabilities":
        inputs.append(target.requires_grad_())

    def function(logits: Tensor, target: Tensor = target) -> Tensor:
        return penex_loss(
            logits, target, sensitivity=0.4, penalty=0.3, huberization=huberization, **keywords
        )

    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("options", ["plain", "all"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", LOSSES[2:], ids=NAMES[2:])
def test_gradients_of_the_baselines_numerically(
    loss: Callable[..., Tensor], kind: str, options: str
) -> None:
    logits, target, keywords = make_call(kind, (2, 3), options)
    inputs = [logits.requires_grad_()]
    if kind == "probabilities":
        inputs.append(target.requires_grad_())
    function = functools.partial(loss, **keywords)
    if kind != "probabilities":
        function = functools.partial(lambda f, **k: loss(f, target, **k), **keywords)
    assert gradcheck(function, inputs, check_forward_ad=True)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("loss", LOSSES[:1] + LOSSES[2:], ids=NAMES[:1] + NAMES[2:])
def test_probability_targets_are_differentiated_at_zero_too(loss: Callable[..., Tensor]) -> None:
    """The loss is linear in the target (but for an estimated penalty), so a zero has a slope."""
    logits = make_logits((2, 3))
    target = torch.tensor([[0.0, 1.0, 0.0], [0.25, 0.0, 0.75]], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(loss(logits, target.requires_grad_()), target)
    step = torch.zeros_like(target)
    for index in range(target.numel()):
        step.zero_().view(-1)[index] = 0.1
        difference = loss(logits, target.detach() + step) - loss(logits, target.detach())
        close(gradient.flatten()[index] * 0.1, difference)


@each_loss
@pytest.mark.parametrize("kind", KINDS)
def test_torch_func_equals_loops(loss: Callable[..., Tensor], kind: str) -> None:
    logits, target, keywords = make_call(kind, (4, 3), "weight")
    function = functools.partial(loss, **keywords)

    def of_row(row: Tensor, label: Tensor) -> Tensor:
        return function(row, label)

    rows = torch.func.vmap(of_row)(logits, target)
    close(rows, torch.stack([of_row(f, y) for f, y in zip(logits, target, strict=True)]))
    gradients = torch.func.vmap(torch.func.grad(of_row))(logits, target)
    for row, label, gradient in zip(logits, target, gradients, strict=True):
        leaf = row.clone().requires_grad_()
        close(gradient, torch.autograd.grad(of_row(leaf, label), leaf)[0])

    def whole(f: Tensor) -> Tensor:
        return function(f, target, reduction="none")

    leaf = logits.clone().requires_grad_()
    jacobian = torch.stack(
        [torch.autograd.grad(v, leaf, retain_graph=True)[0] for v in whole(leaf)]
    )
    close(torch.func.jacrev(whole)(logits), jacobian)
    close(torch.func.jacfwd(whole)(logits), jacobian)


def test_hessian_through_the_whole_batch() -> None:
    logits, target = make_logits((2, 3)), torch.tensor([1, 2])
    function = functools.partial(penex_loss, target=target, penalty=0.2, reduction="sum")
    expected = torch.autograd.functional.hessian(function, logits)
    close(torch.func.hessian(function)(logits), expected)


def test_forward_mode() -> None:
    logits, target = make_logits((4, 3)), torch.tensor([1, 2, -100, 0])
    tangent = torch.randn_like(logits)
    gradient = oracles.penex(logits, target, penalty=0.2).gradient
    with fwAD.dual_level():
        loss = penex_loss(fwAD.make_dual(logits, tangent), target, penalty=0.2)
        close(fwAD.unpack_dual(loss).tangent, (gradient * tangent).sum())


# 5. dtypes and layouts.


@each_loss
@pytest.mark.parametrize("scale", [1.0, 6.0, 20.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_rounded_once(
    loss: Callable[..., Tensor], dtype: torch.dtype, kind: str, scale: float
) -> None:
    """Confident logits too: at scale 20 the true class's probability rounds to 1 in half."""
    logits = (scale * torch.randn(9, 4)).to(dtype)
    target = make_target(kind, (9, 4))
    if kind == "indices":
        logits[torch.arange(9), target] += scale
    half, single = logits.clone().requires_grad_(), logits.float().requires_grad_()
    got, exact = loss(half, target), loss(single, target)
    assert torch.equal(got, exact.to(dtype))
    (gradient,) = torch.autograd.grad(got, half)
    (expected,) = torch.autograd.grad(exact, single)
    assert torch.equal(gradient, expected.to(dtype))


@each_loss
def test_layouts(loss: Callable[..., Tensor]) -> None:
    logits, target, keywords = make_call("indices", (2, 3, 4, 5), "all")
    expected = loss(logits, target, **keywords)
    rows = loss(logits, target, reduction="none", **keywords)
    wide = torch.zeros(2, 6, 4, 5, dtype=torch.float64)
    wide[:, ::2] = logits
    variants = (
        logits.contiguous(memory_format=torch.channels_last),
        wide[:, ::2],
        logits.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        logits[:1].expand(2, 3, 4, 5),
    )
    for variant in variants[:3]:
        close(loss(variant, target, **keywords), expected)
        close(loss(variant, target.mT.contiguous().mT, reduction="none", **keywords), rows)
    both = torch.stack([target[0], target[0]])
    close(loss(variants[3], both, **keywords), loss(logits[:1], target[:1], **keywords))


@each_loss
def test_inputs_are_left_alone(loss: Callable[..., Tensor]) -> None:
    for kind in KINDS:
        logits, target, keywords = make_call(kind, (4, 3), "all")
        copies = [tensor.clone() for tensor in (logits, target, keywords["weight"])]
        result = loss(logits, target, **keywords)
        assert not result.requires_grad
        for tensor, copy in zip((logits, target, keywords["weight"]), copies, strict=True):
            assert torch.equal(tensor, copy)


@each_loss
@pytest.mark.parametrize("options", ["plain", "all"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2), (2, 3, 0)], ids=str)
def test_empty_batch(
    loss: Callable[..., Tensor], shape: tuple[int, ...], kind: str, options: str
) -> None:
    logits, target, keywords = make_call(kind, shape, options)
    logits.requires_grad_()
    value = loss(logits, target, **keywords)
    assert value == 0
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient.shape == shape
    rows = loss(logits, target, reduction="none", **keywords)
    assert rows.shape == shape[:1] + shape[2:]
    assert loss(logits, target, reduction="sum", **keywords) == 0


@each_loss
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"weight": torch.rand(3)}])
def test_all_ignored_is_zero_with_zero_gradient(
    loss: Callable[..., Tensor], options: dict[str, Any]
) -> None:
    logits = torch.tensor([[1.0, 2, 3], [math.nan, math.inf, -math.inf]], requires_grad=True)
    target = torch.tensor([-100, -100])
    for reduction in ("mean", "sum", "none"):
        value = loss(logits, target, reduction=reduction, **options)
        assert torch.equal(value, torch.zeros_like(value))
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert torch.equal(gradient, torch.zeros_like(gradient))
    assert loss(logits[0], torch.tensor(-100), **options) == 0
    assert estimate_penalty(logits, target, **options).isnan()


@each_loss
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"weight": torch.rand(3)}])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30])
def test_ignored_rows_may_hold_anything(
    loss: Callable[..., Tensor], options: dict[str, Any], poison: float
) -> None:
    logits = torch.randn(4, 3)
    target = torch.tensor([0, -100, 2, 1])
    expected = loss(logits, target, **options)
    poisoned = logits.clone()
    poisoned[1, 1:] = poison
    poisoned.requires_grad_()
    torch.testing.assert_close(loss(poisoned, target, **options), expected)
    (gradient,) = torch.autograd.grad(loss(poisoned, target, **options), poisoned)
    assert gradient.isfinite().all()
    assert (gradient[1] == 0).all()
    assert estimate_penalty(poisoned, target) == estimate_penalty(logits, target)


@each_loss
@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_logit_is_not_hidden(loss: Callable[..., Tensor], kind: str) -> None:
    logits, target, _ = make_call(kind, (4, 3), "plain")
    logits[2, 1] = math.nan
    assert loss(logits, target).isnan()


# 6. Numerics.


EXTREMES = (
    (200.0, torch.float32),
    (-200.0, torch.float32),
    (1e4, torch.float32),
    (-1e4, torch.float32),
    (12.0, torch.float16),
    (-12.0, torch.float16),
    (6e4, torch.float16),
    (1e4, torch.bfloat16),
    (-1e4, torch.float64),
)


@pytest.mark.parametrize("options", ["plain", "weight", "smoothing", "zero weight", "tiny weight"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "dtype"), EXTREMES, ids=str)
def test_extreme_logits_never_give_nan_and_are_exact_where_representable(
    size: float, dtype: torch.dtype, kind: str, options: str
) -> None:
    _, target, keywords = make_call(kind, (4, 3), options)
    if kind == "probabilities":
        target = F.one_hot(torch.tensor([0, 1, 2, 1]), 3).double()  # zeros where a 0 * inf could be
    if options == "zero weight":
        keywords["weight"] = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    if options == "tiny weight":
        keywords["weight"] = torch.tensor([0.0, 1e-5, 2e-5], dtype=torch.float64)
    # float32 takes exponentials of rounded arguments of this size.
    rtol = {torch.float64: 1e-9, torch.float32: 2e-4}.get(dtype, 1e-2)
    pattern = torch.tensor([[1.0, 0, 0], [1, 1, 1], [-1, 0, 1], [0, 0, -1]])
    logits = (size * pattern).to(dtype).requires_grad_()
    uniform = torch.full((4, 3), size, dtype=dtype, requires_grad=True)
    for leaf, huberization, penalty, reduction in itertools.product(
        (logits, uniform), (None, 5.0), (None, 1e-30, 0.1, 1e4), ("mean", "none")
    ):
        asked = dict(keywords, huberization=huberization, penalty=penalty, reduction=reduction)
        loss = penex_loss(leaf, target, **asked)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        assert not loss.isnan().any()
        assert not gradient.isnan().any()
        exact = oracles.penex(leaf, target, **asked)
        torch.testing.assert_close(loss, exact.value.to(dtype), rtol=rtol, atol=1e-30)
        largest = exact.gradient.abs().max().item()
        if largest < torch.finfo(dtype).max:
            torch.testing.assert_close(
                gradient, exact.gradient.to(dtype), rtol=rtol, atol=rtol * largest
            )
    for leaf in (logits, uniform):
        rho = estimate_penalty(leaf, target, **keywords)
        exact_rho = oracles.estimate_penalty(leaf, target, **keywords)
        assert rho.item() == pytest.approx(exact_rho, rel=2e-3)


@pytest.mark.parametrize("huberization", [None, 0.5, 1e30, 1e300])
@pytest.mark.parametrize("f_y", [-900.0, -2e3, -1e6])
def test_huberization_where_the_exponential_overflows(
    f_y: float, huberization: float | None
) -> None:
    logits = torch.tensor([[f_y, 0.0]], requires_grad=True)
    options: dict[str, Any] = {"penalty": 0.1, "huberization": huberization}
    loss = penex_loss(logits, torch.tensor([0]), **options)
    (gradient,) = torch.autograd.grad(loss, logits)
    exact = oracles.penex(logits, torch.tensor([0]), **options)
    torch.testing.assert_close(loss, exact.value.float(), rtol=1e-4, atol=0)
    torch.testing.assert_close(gradient, exact.gradient.float(), rtol=1e-4, atol=0)


def test_product_is_finite_where_its_factors_are_not() -> None:
    """e^100 overflows float32, 1e-30 e^100 does not."""
    logits = torch.full((1, 2), 100.0, requires_grad=True)
    loss = penex_loss(logits, torch.tensor([0]), penalty=1e-30)
    exact = oracles.penex(logits, torch.tensor([0]), penalty=1e-30)
    torch.testing.assert_close(loss, exact.value.float(), rtol=1e-4, atol=0)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, exact.gradient.float(), rtol=1e-4, atol=0)


@each_loss
@pytest.mark.parametrize("kind", KINDS)
def test_masked_classes_with_minus_infinity(loss: Callable[..., Tensor], kind: str) -> None:
    """A class that cannot occur has logit -inf: it counts for nothing."""
    logits = torch.tensor([[1.0, -math.inf, 0.5], [2.0, 1.0, -math.inf]]).requires_grad_()
    labels = torch.tensor([0, 1])
    target = {
        "indices": labels,
        "one_hot": F.one_hot(labels, 3),
        "probabilities": F.one_hot(labels, 3).float(),
    }[kind]
    value = loss(logits, target)
    (gradient,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(value, loss(logits.detach().clamp(min=-200), target))
    assert gradient.isfinite().all()
    assert (gradient[logits == -math.inf] == 0).all()


# 7. Refusals.

ROWS, LABELS = torch.zeros(2, 3), torch.tensor([0, 2])
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sensitivity": 0.0}, ValueError, r"sensitivity: expected .* \(0, inf\), got 0"),
        ({"sensitivity": -1}, ValueError, r"sensitivity: expected .*, got -1"),
        ({"sensitivity": INF}, ValueError, "sensitivity: expected a finite number .*, got inf"),
        ({"sensitivity": NAN}, ValueError, "sensitivity: expected a finite number .*, got nan"),
        ({"sensitivity": "0.1"}, TypeError, "sensitivity: expected a number, got str"),
        ({"sensitivity": True}, TypeError, "sensitivity: expected a number, got bool"),
        ({"sensitivity": None}, TypeError, "sensitivity: expected a number, got NoneType"),
        ({"penalty": 0.0}, ValueError, r"penalty: expected .* \(0, inf\), got 0"),
        ({"penalty": -0.1}, ValueError, r"penalty: expected .*, got -0.1"),
        ({"penalty": NAN}, ValueError, r"penalty: expected .*, got nan"),
        ({"penalty": "auto"}, TypeError, "penalty: expected a number, got str"),
        (
            {"penalty": torch.ones(2)},
            ValueError,
            r"penalty: expected a 0-d tensor, got shape \(2,\)",
        ),
        ({"huberization": 0.0}, ValueError, r"huberization: expected .* \(0, inf\), got 0"),
        ({"huberization": -2.0}, ValueError, r"huberization: expected .*, got -2"),
        ({"label_smoothing": -0.1}, ValueError, r"label_smoothing: expected .* \[0, 1\], got -0.1"),
        ({"label_smoothing": 1.1}, ValueError, r"label_smoothing: expected .* \[0, 1\], got 1.1"),
        ({"label_smoothing": NAN}, ValueError, r"label_smoothing: expected .*, got nan"),
        (
            {"reduction": "avg"},
            ValueError,
            "reduction: expected one of 'mean', 'sum', 'none', got 'avg'",
        ),
        ({"reduction": None}, ValueError, "reduction: expected one of .*, got None"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index: expected an int, got float"),
        ({"ignore_index": None}, TypeError, "ignore_index: expected an int, got NoneType"),
        (
            {"weight": torch.ones(2)},
            ValueError,
            r"weight: expected one weight per class, shape \(3,\), got \(2,\)",
        ),
        ({"weight": torch.ones(1, 3)}, ValueError, r"weight: expected .*, got \(1, 3\)"),
        ({"weight": [1.0, 1.0, 1.0]}, TypeError, "weight: expected a tensor, got list"),
    ],
)
def test_refused_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        penex_loss(ROWS, LABELS, **options)
    shared = {"reduction", "ignore_index", "weight", "label_smoothing"}
    if options.keys() <= shared:
        for loss in LOSSES:
            with pytest.raises(error, match=message):
                loss(ROWS, LABELS, **options)
    if options.keys() <= shared - {"reduction"} | {"sensitivity", "huberization"}:
        with pytest.raises(error, match=message):
            estimate_penalty(ROWS, LABELS, **options)


@pytest.mark.parametrize(
    ("input", "target", "error", "message"),
    [
        (ROWS.long(), LABELS, TypeError, "input: expected floating-point logits, got torch.int64"),
        (ROWS.bool(), LABELS, TypeError, "input: expected floating-point logits, got torch.bool"),
        (ROWS.cfloat(), LABELS, TypeError, "input: expected floating-point .* torch.complex64"),
        ([[0.0, 0.0]], LABELS, TypeError, "input: expected a tensor, got list"),
        (ROWS, [0, 2], TypeError, "target: expected a tensor, got list"),
        (ROWS, LABELS.bool(), TypeError, "target: expected class indices .* got torch.bool"),
        (torch.tensor(1.0), LABELS, ValueError, r"input: expected shape \(K\), .* 0-d"),
        (ROWS, LABELS.float(), ValueError, r"target: floating-point .* \(2, 3\), got \(2,\)"),
        (ROWS, torch.rand(2, 4), ValueError, r"target: floating-point .* \(2, 3\), got \(2, 4\)"),
        (ROWS, torch.tensor([0]), ValueError, r"target: .* shape \(2,\), .* got \(1,\)"),
        (ROWS, torch.tensor([[0], [1]]), ValueError, r"target: .* shape \(2,\), .* got \(2, 1\)"),
        (ROWS[0], LABELS, ValueError, r"target: .* shape \(\), .* got \(2,\)"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 5).long(), ValueError, r"\(2, 4\), .* got \(2, 5\)"),
        (ROWS, torch.tensor([0, 3]), IndexError, r"target: .* in \[0, 3\) or -100 .*, got 3"),
        (ROWS, torch.tensor([0, -1]), IndexError, r"target: .* in \[0, 3\) or -100 .*, got -1"),
        (ROWS[0], torch.tensor(7), IndexError, r"target: .* in \[0, 3\) or -100 .*, got 7"),
        (ROWS, torch.tensor([[0, 1, 1], [1, 0, 0]]), ValueError, "target: .* one-hot .* single 1"),
        (ROWS, torch.tensor([[0, 0, 0], [1, 0, 0]]), ValueError, "target: .* one-hot .* single 1"),
        (ROWS, torch.tensor([[0, 2, -1], [1, 0, 0]]), ValueError, "target: .* one-hot .* single 1"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"weight": torch.ones(3)}, {"label_smoothing": 0.1}])
def test_refused_tensors(
    input: Any, target: Any, error: type[Exception], message: str, options: dict[str, Any]
) -> None:
    for loss in (*LOSSES, estimate_penalty):
        with pytest.raises(error, match=message):
            loss(input, target, **options)


def test_refused_combinations() -> None:
    with pytest.raises(ValueError, match=r"ignore_index: class probabilities .* got 1"):
        penex_loss(ROWS, torch.full((2, 3), 1 / 3), ignore_index=1)
    with pytest.raises(ValueError, match=r"penalty_min: expected at most .* 0.1, got 0.2"):
        estimate_penalty(ROWS, LABELS, penalty_min=0.2, penalty_max=0.1)
    with pytest.raises(ValueError, match=r"penalty_min: expected .* \(0, inf\), got 0"):
        estimate_penalty(ROWS, LABELS, penalty_min=0)
    with pytest.raises(ValueError, match=r"penalty_max: expected a finite .* got inf"):
        estimate_penalty(ROWS, LABELS, penalty_max=INF)
    with pytest.raises(ValueError, match=r"gamma: expected .* got -1"):
        focal_loss(ROWS, LABELS, gamma=-1)
    with pytest.raises(ValueError, match=r"strength: expected .* got -1"):
        confidence_penalty_loss(ROWS, LABELS, strength=-1)


def test_label_out_of_range_is_refused_even_if_it_would_wrap() -> None:
    """weight[-1] is the last class's weight to Python."""
    with pytest.raises(IndexError, match=r"got -1"):
        penex_loss(ROWS, torch.tensor([0, -1]), weight=torch.ones(3))


# 8. The baselines.


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(4,), (6, 3), (2, 3, 4)], ids=str)
def test_baselines_against_their_formulas(
    kind: str, shape: tuple[int, ...], options: str, reduction: str
) -> None:
    logits, target, keywords = make_call(kind, shape, options)
    keywords["reduction"] = reduction
    for gamma in (0.0, 0.5, 2.0):
        got = focal_loss(logits, target, gamma=gamma, **keywords)
        close(got, oracles.focal(logits, target, gamma=gamma, **keywords))
    for strength in (0.0, 0.4):
        got = confidence_penalty_loss(logits, target, strength=strength, **keywords)
        close(got, oracles.confidence_penalty(logits, target, strength=strength, **keywords))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_baselines_switched_off_are_cross_entropy(
    kind: str, options: str, reduction: str, dtype: torch.dtype
) -> None:
    logits, target, keywords = make_call(kind, (6, 3, 2), options, dtype)
    keywords["reduction"] = reduction
    logits.requires_grad_()
    peer = F.cross_entropy(logits, target, **keywords)
    (expected,) = torch.autograd.grad(peer.sum(), logits)
    for loss in (
        focal_loss(logits, target, gamma=0, **keywords),
        confidence_penalty_loss(logits, target, strength=0, **keywords),
    ):
        torch.testing.assert_close(loss, peer)
        torch.testing.assert_close(torch.autograd.grad(loss.sum(), logits)[0], expected)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 4.7])
@pytest.mark.parametrize("size", [20.0, 200.0, 1e4])
def test_focal_where_the_probability_rounds_to_one(gamma: float, size: float) -> None:
    logits = torch.tensor([[size, 0.0, 0.0], [0.0, size, -size], [-size, 0, size]])
    for target in (torch.tensor([0, 1, 0]), F.one_hot(torch.tensor([0, 1, 0]), 3).float()):
        leaf = logits.clone().requires_grad_()
        loss = focal_loss(leaf, target, gamma=gamma)
        torch.testing.assert_close(loss, oracles.focal(logits, target, gamma=gamma).float())
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert gradient.isfinite().all()
        torch.testing.assert_close(gradient[2, 0], torch.tensor(-1 / 3))


def test_confidence_penalty_prefers_the_uniform() -> None:
    """With the strength at infinity only entropy counts; at log K it is greatest."""
    logits = torch.tensor([[3.0, 0.0, -1.0]])
    target = torch.tensor([0])
    plain = confidence_penalty_loss(logits, target, strength=0)
    p = logits.softmax(1)
    entropy = -(p * p.log()).sum()
    penalised = confidence_penalty_loss(logits, target, strength=2.5)
    torch.testing.assert_close(penalised, plain - 2.5 * entropy)


# 9. Compilation.


@each_loss
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_function_equals_eager(loss: Callable[..., Tensor], kind: str) -> None:
    torch.compiler.reset()
    logits, target, keywords = make_call(kind, (5, 3), "all", torch.float32)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaf = logits.clone().requires_grad_()
    got, expected = compiled(leaf, target, **keywords), loss(leaf, target, **keywords)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, leaf)[0], torch.autograd.grad(expected, leaf)[0]
    )


# 10. A CUDA device.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@each_loss
def test_cuda_equals_cpu(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    for kind in KINDS:
        logits, target, keywords = make_call(kind, (7, 5, 3), "all", dtype)
        leaf = logits.cuda().requires_grad_()
        weight = keywords.pop("weight")
        torch.cuda.set_sync_debug_mode("error")  # no call may wait for the device
        try:
            loss(leaf, target.cuda(), **keywords)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        got = loss(leaf, target.cuda(), weight=weight.cuda(), **keywords)
        torch.testing.assert_close(got.cpu(), loss(logits, target, weight=weight, **keywords))
        assert torch.autograd.grad(got, leaf)[0].dtype == dtype


@pytest.mark.gpu
@each_loss
def test_cuda_autocast(loss: Callable[..., Tensor]) -> None:
    logits = make_logits((4, 3), torch.float16).cuda().requires_grad_()
    target = torch.tensor([0, 2, 1, -100], device="cuda")
    with torch.autocast("cuda", dtype=torch.float16):
        assert loss(logits, target).dtype == F.cross_entropy(logits, target).dtype
