"""The eager paths are the definition, whatever the shapes, the weights and the logits."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import penex
from penex import _fast, _robust

SHAPES = [(1, 2), (5, 3), (7, 130), (2, 3, 5), (2, 4, 3, 5)]


@pytest.fixture(params=["plain", "robust", "pieces"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the eager paths calls take."""
    if request.param == "robust":
        monkeypatch.setattr(_fast, "_safe", lambda *values: False)
    if request.param == "pieces":
        monkeypatch.setattr(_robust, "PIECE", 48)
    return request.param


def batch(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    logits = 3 * torch.randn(shape, generator=generator, dtype=dtype)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    return logits.requires_grad_(), target


def by_definition(monkeypatch: pytest.MonkeyPatch, logits: Tensor, target: Tensor, **options):
    with monkeypatch.context() as patch:
        patch.setattr(_fast, "_applies", lambda input: False)
        loss = penex.penex_loss(logits, target, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("penalty", [None, 0.3])
@pytest.mark.parametrize("extra", ["nothing", "weight", "ignored", "both"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_the_definition(monkeypatch, path, shape, penalty, extra, reduction) -> None:
    logits, target = batch(shape)
    options = {"sensitivity": 0.4, "penalty": penalty, "reduction": reduction}
    if extra in ("weight", "both"):
        options["weight"] = torch.linspace(0.0, 2, shape[1], dtype=torch.float64)
    if extra in ("ignored", "both"):
        target.view(-1)[0] = -100
    value, gradient = by_definition(monkeypatch, logits, target, **options)
    loss = penex.penex_loss(logits, target, **options)
    assert type(loss.grad_fn).__name__ in ("_PlainBackward", "_RobustBackward")
    torch.testing.assert_close(loss.detach(), value)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), logits)[0], gradient)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("penalty", [None, 0.3])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("extra", ["nothing", "weight"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("soft", [True, False])
def test_dense_equals_the_definition(
    monkeypatch, path, shape, penalty, smoothing, extra, reduction, soft
) -> None:
    logits, target = batch(shape)
    options = {"penalty": penalty, "reduction": reduction, "label_smoothing": smoothing}
    if extra == "weight":
        options["weight"] = torch.linspace(0.0, 2, shape[1], dtype=torch.float64)
    if soft:
        target = torch.rand(shape, dtype=torch.float64).softmax(1)
        target[0, 0] = 0
    else:
        target.view(-1)[0] = -100
    value, gradient = by_definition(monkeypatch, logits, target, **options)
    loss = penex.penex_loss(logits, target, **options)
    if path != "robust" and (soft or smoothing):
        empty = not soft and target.numel() == 1
        assert (type(loss.grad_fn).__name__ == "_DenseBackward") is not empty
    torch.testing.assert_close(loss.detach(), value)
    for factor in (1.0, -0.5, 1e7):
        (found,) = torch.autograd.grad(loss, logits, factor * loss.new_ones(()), retain_graph=True)
        torch.testing.assert_close(found, factor * gradient)


def test_the_plain_path_is_taken_by_default_and_only_where_it_is_safe() -> None:
    def name(logits: Tensor) -> str:
        loss = penex.penex_loss(logits.requires_grad_(), torch.tensor([0, 1]), penalty=1e-10)
        return type(loss.grad_fn).__name__

    assert name(torch.zeros(2, 3)) == "_PlainBackward"
    assert name(torch.full((2, 3), 75.0)) == "_RobustBackward"
    assert name(torch.full((2, 3), -75.0)) == "_RobustBackward"
    assert name(torch.zeros(2, 3).double()) == "_PlainBackward"


@pytest.mark.parametrize("factor", [0.0, -2.0, 1e-35, 1e6, 3e30])
def test_any_upstream_gradient(monkeypatch, path, factor) -> None:
    logits, target = batch((5, 3))
    target[0] = -100
    _, gradient = by_definition(monkeypatch, logits, target, penalty=2.0)
    loss = penex.penex_loss(logits, target, penalty=2.0)
    torch.testing.assert_close(torch.autograd.grad(factor * loss, logits)[0], factor * gradient)


def test_what_underflowed_is_not_multiplied_up() -> None:
    # e^-100 is no float32, but 1e6 e^-100 is.
    logits = torch.tensor([[0.0, -100.0]], requires_grad=True)
    loss = penex.penex_loss(logits, torch.tensor([0]), penalty=1.0)
    (gradient,) = torch.autograd.grad(1e6 * loss, logits)
    assert gradient[0, 1].item() == pytest.approx(1e6 * math.exp(-100), rel=1e-4)


def test_backward_twice_and_a_third_time(path) -> None:
    logits, target = batch((7, 130))
    target[3] = -100
    loss = penex.penex_loss(logits, target)
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert first.data_ptr() != second.data_ptr()
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], first)


def test_the_input_is_left_alone_and_watched(path) -> None:
    logits, target = batch((5, 3))
    before = logits.detach().clone()
    penex.penex_loss(logits, target).backward()
    assert torch.equal(logits, before)

    activations = logits * 1.0
    loss = penex.penex_loss(activations, target)
    activations.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_weights_and_targets_get_their_gradients_too(path) -> None:
    logits, labels = batch((5, 3))
    weight = torch.rand(3, dtype=torch.float64, requires_grad=True)
    soft = torch.rand(5, 3, dtype=torch.float64).softmax(1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda f, w: penex.penex_loss(f, labels, weight=w, penalty=0.3), (logits, weight)
    )
    assert torch.autograd.gradcheck(
        lambda f, q: penex.penex_loss(f, q, penalty=0.3), (logits, soft)
    )


def test_strides_of_the_gradient_follow_the_logits(path) -> None:
    logits, target = batch((2, 4, 3, 5))
    channels_last = logits.detach().to(memory_format=torch.channels_last).requires_grad_()
    for some in (channels_last, logits.detach().transpose(2, 3).requires_grad_()):
        labels = target if some is channels_last else target.transpose(1, 2)
        (gradient,) = torch.autograd.grad(penex.penex_loss(some, labels), some)
        (expected,) = torch.autograd.grad(penex.penex_loss(logits, target), logits)
        if some is not channels_last:
            expected = expected.transpose(2, 3)
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("mode", ["running", "auto", "fixed"])
@pytest.mark.parametrize("training", [True, False])
def test_the_penalty_follows_one_rule_on_both_paths(monkeypatch, mode, training) -> None:
    plain = penex.PENEX(
        penalty_mode=mode, penalty=None if mode == "auto" else 0.2, ema=0.3, penalty_max=0.25
    ).train(training)
    robust = copy.deepcopy(plain)
    for seed in range(4):
        logits, target = batch((5 + seed, 3), torch.float32)
        value = plain(logits, target)
        with monkeypatch.context() as patch:
            patch.setattr(_fast, "_safe", lambda *values: False)
            torch.testing.assert_close(robust(logits, target), value)
        torch.testing.assert_close(plain.penalty, robust.penalty, equal_nan=True)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(1, 5),
    classes=st.integers(2, 6),
    scale=st.sampled_from([1.0, 20.0, 85.0, 120.0, 900.0, 6e4]),
    shift=st.sampled_from([0.0, -80.0, 85.0, 3e4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    penalty=st.sampled_from([None, 1e-10, 0.1, 50.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
)
def test_float32_has_what_float64_says(
    seed, rows, classes, scale, shift, dtype, penalty, reduction
) -> None:
    """Never NaN; and right to 1e-4 wherever float32 can hold the exact result."""
    generator = torch.Generator().manual_seed(seed)
    spread = 2 * torch.rand(rows, classes, generator=generator) - 1
    logits = (scale * spread + shift).clamp(-6e4, 6e4).to(dtype).float()
    target = torch.randint(classes, (rows,), generator=generator)
    options = {"sensitivity": 0.1, "penalty": penalty, "reduction": reduction}

    def value_and_gradient(logits: Tensor) -> tuple[Tensor, Tensor]:
        logits.requires_grad_()
        loss = penex.penex_loss(logits, target, **options)
        return loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]

    exact = value_and_gradient(logits.double())
    limits = torch.finfo(torch.float32)
    for found, true in zip(value_and_gradient(logits.clone()), exact, strict=True):
        assert not found.isnan().any()
        size = true.abs()
        if true.shape == logits.shape:  # at the label the gradient is a difference of two parts
            part = 0.1 * torch.exp(-0.1 * logits.detach().double().gather(1, target[:, None]))
            size = size.scatter_add(1, target[:, None], 2 * part)
        shown = (size < limits.max / 2) & (true.abs() > limits.tiny * 1e4)
        assert ((found.double() - true).abs()[shown] <= 1e-4 * size[shown]).all()
        assert found[true.abs() > 2 * limits.max].isinf().all()
