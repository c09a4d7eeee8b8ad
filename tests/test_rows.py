"""Every way through the core gives, for every loss, what its definition gives."""

import contextlib
import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from cases import make_call
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

import penex
from penex import _inputs, _passes, _row_losses, _rows, functional


def gce_rule(true_logit: Tensor, log_partition: Tensor) -> Tensor:
    """Generalised cross-entropy, q = 0.7."""
    return -torch.expm1(0.7 * (true_logit - log_partition)) / 0.7


@dataclass(frozen=True)
class Loss:
    """A loss, its own options, and whether it takes soft targets."""

    function: Callable[..., Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    soft: bool = True


LOSSES = {
    "penex": Loss(functional.penex_loss, {"sensitivity": 0.4, "penalty": 0.3}),
    "penex auto": Loss(functional.penex_loss, {"sensitivity": 0.4}),
    "penex normalized": Loss(functional.penex_loss, {"penalty": 0.3, "normalize": True}),
    "penex huberized": Loss(functional.penex_loss, {"penalty": 0.3, "huberization": 0.9}),
    "log-penex": Loss(functional.log_penex_loss, {"sensitivity": 0.3, "power": 3.0}),
    "cross-entropy": Loss(functional.cross_entropy),
    "z": Loss(functional.z_loss, {"strength": 0.3}),
    "focal": Loss(functional.focal_loss, {"gamma": 1.7}, soft=False),
    "gce": Loss(functional.generalized_cross_entropy_loss, {"q": 0.7}, soft=False),
    "rule": Loss(functional.row_loss, {"rule": gce_rule}, soft=False),
}
PATHS = ("chosen", "pieces", "softmax", "device")
SHAPES = ((1, 2), (7, 130), (2, 4, 3, 5))
each_loss = pytest.mark.parametrize("name", LOSSES)


def take(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make calls go one of the ways through the code."""
    if path == "definition":
        monkeypatch.setattr(_rows, "_differentiated_once", lambda *args: False)
    if path == "pieces":
        monkeypatch.setattr(_passes, "PIECE_BYTES", 48)
        monkeypatch.setattr(_rows, "SMALL_BATCH", 0)
    if path == "softmax":
        for kind in (_row_losses.Penex, _row_losses.LogPenex):
            monkeypatch.setattr(kind, "can_use_partition", lambda *args: False)
    if path == "device":
        monkeypatch.setattr(_inputs, "INSPECT_VALUES", False)


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    take(request.param, monkeypatch)
    return request.param


def both(
    name: str, logits: Tensor, target: Tensor, factor: float = 1.0, **options: Any
) -> tuple[Tensor, Tensor]:
    """The loss, and `factor` times the gradient of its sum."""
    leaf = logits.detach().clone().requires_grad_()
    loss = LOSSES[name].function(leaf, target, **LOSSES[name].options, **options)
    return loss.detach(), torch.autograd.grad(factor * loss.sum(), leaf)[0]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", ["plain", "weight", "ignore", "all"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@each_loss
def test_equals_the_definition(
    monkeypatch: pytest.MonkeyPatch, path: str, name: str, kind: str, options: str, reduction: str
) -> None:
    if not LOSSES[name].soft and (kind == "probabilities" or options == "all"):
        pytest.skip("class indices alone")
    for shape in SHAPES:
        logits, target, keywords = make_call(kind, shape, options)
        keywords["reduction"] = reduction
        if "weight" in keywords:
            keywords["weight"][0] = 0
        found = both(name, logits, target, **keywords)
        with monkeypatch.context() as patch:
            patch.setattr(_rows, "_differentiated_once", lambda *args: False)
            torch.testing.assert_close(found, both(name, logits, target, **keywords))


@pytest.mark.parametrize("options", ["plain", "weight", "ignore", "smoothing", "all"])
@pytest.mark.parametrize("kind", ["indices", "one_hot", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cross_entropy_is_torch_s(path: str, kind: str, options: str, dtype: torch.dtype) -> None:
    for shape in ((5,), (7, 130), (3, 5, 4)):
        if len(shape) == 1 and options in ("ignore", "all"):
            continue  # all ignored: torch's mean is NaN
        logits, target, keywords = make_call(kind, shape, options, dtype)
        labels = target.argmax(min(1, target.ndim - 1)) if kind == "one_hot" else target
        for reduction in ("mean", "sum", "none"):
            keywords["reduction"] = reduction
            leaf = logits.clone().requires_grad_()
            peer = F.cross_entropy(leaf, labels, **keywords)
            expected = peer.detach(), torch.autograd.grad(peer.sum(), leaf)[0]
            found = both("cross-entropy", logits, target, **keywords)
            torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-7)


def test_generalized_cross_entropy_is_its_formula() -> None:
    logits, target, keywords = make_call("indices", (6, 4), "weight")
    p = logits.softmax(1).gather(1, target[:, None]).squeeze(1)
    expected = keywords["weight"][target] * (1 - p**0.7) / 0.7
    for name in ("gce", "rule"):
        found, _ = both(name, logits, target, reduction="none", **keywords)
        torch.testing.assert_close(found, expected)
        mean, _ = both(name, logits, target, **keywords)
        torch.testing.assert_close(mean, expected.sum() / keywords["weight"][target].sum())


@each_loss
def test_slopes_by_hand_are_the_numeric_ones(path: str, name: str) -> None:
    """But for an estimated penalty, which is a constant in them."""
    logits, target, keywords = make_call("indices", (3, 4), "weight")
    target[1] = -100
    options = LOSSES[name].options | ({"penalty": 0.3} if name == "penex auto" else {})
    assert gradcheck(
        lambda f: LOSSES[name].function(f, target, **options, **keywords),
        logits.requires_grad_(),
        check_batched_grad=True,
    )


@pytest.mark.parametrize("factor", [0.0, -2.0, 1e-35, 1e6, 3e30])
@each_loss
def test_any_upstream_gradient(path: str, name: str, factor: float) -> None:
    logits, target, keywords = make_call("indices", (5, 3), "ignore")
    for reduction in ("mean", "none"):
        _, gradient = both(name, logits, target, reduction=reduction, **keywords)
        _, scaled = both(name, logits, target, factor, reduction=reduction, **keywords)
        torch.testing.assert_close(scaled, factor * gradient)


def test_what_underflowed_is_not_multiplied_up(path: str) -> None:
    # e^-100 is no float32, but 1e6 e^-100 is.
    logits = torch.tensor([[0.0, -100.0]], requires_grad=True)
    loss = penex.penex_loss(logits, torch.tensor([0]), penalty=1.0)
    (gradient,) = torch.autograd.grad(1e6 * loss, logits)
    assert gradient[0, 1].item() == pytest.approx(1e6 * math.exp(-100), rel=1e-4)


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@each_loss
def test_backward_again(path: str, name: str, kind: str) -> None:
    if kind == "probabilities" and not LOSSES[name].soft:
        pytest.skip("class indices alone")
    logits, target, _ = make_call(kind, (7, 130), "plain")
    leaf = logits.requires_grad_()
    loss = LOSSES[name].function(leaf, target, **LOSSES[name].options)
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert first.data_ptr() != second.data_ptr()
    torch.testing.assert_close(first, second)
    (third,) = torch.autograd.grad(loss, leaf, create_graph=True)
    torch.testing.assert_close(third, first)
    assert third.requires_grad


@each_loss
def test_what_changes_before_the_backward_is_noticed(path: str, name: str) -> None:
    logits, target, keywords = make_call("indices", (5, 3), "weight")
    activations = logits.requires_grad_() * 1.0
    loss = LOSSES[name].function(activations, target, **LOSSES[name].options, **keywords)
    activations.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    if not LOSSES[name].soft:
        return
    for changed in ("weight", "target"):
        logits, target, keywords = make_call("probabilities", (5, 3), "all")
        _, expected = both(name, logits, target, **keywords)
        leaf = logits.requires_grad_()
        loss = LOSSES[name].function(leaf, target, **LOSSES[name].options, **keywords)
        {"target": target, **keywords}[changed].mul_(2)
        with contextlib.suppress(RuntimeError):  # by autograd's check of what it saved
            loss.backward()
            torch.testing.assert_close(leaf.grad, expected)  # the definition works with copies


@each_loss
def test_strides_of_the_gradient_follow_the_logits(path: str, name: str) -> None:
    logits, target, _ = make_call("indices", (2, 4, 3, 5), "plain")
    channels_last = logits.to(memory_format=torch.channels_last)
    for some, labels, back in (
        (channels_last, target, lambda x: x),
        (logits.transpose(2, 3), target.transpose(1, 2), lambda x: x.transpose(2, 3)),
    ):
        found = both(name, some, labels)[1]
        torch.testing.assert_close(back(found), both(name, logits, target)[1])


@pytest.mark.parametrize("mode", ["running", "auto", "fixed"])
@pytest.mark.parametrize("training", [True, False])
def test_the_penalty_follows_one_rule(
    monkeypatch: pytest.MonkeyPatch, path: str, mode: str, training: bool
) -> None:
    chosen = penex.PENEX(
        penalty_mode=mode, penalty=None if mode == "auto" else 0.2, ema=0.3, penalty_max=0.25
    ).train(training)
    definition = copy.deepcopy(chosen)
    for rows in range(5, 9):
        logits, target, _ = make_call("indices", (rows, 3), "plain", torch.float32)
        value = chosen(logits.requires_grad_(), target)
        with monkeypatch.context() as patch:
            patch.setattr(_rows, "_differentiated_once", lambda *args: False)
            torch.testing.assert_close(definition(logits, target), value)
        torch.testing.assert_close(chosen.penalty, definition.penalty)


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("name", [name for name in LOSSES if name.startswith("penex")])
def test_extreme_logits_are_exact_where_representable(path: str, name: str, kind: str) -> None:
    options = {k: v for k, v in LOSSES[name].options.items() if k != "normalize"}
    scale = 0.1 if "normalize" in LOSSES[name].options else 1.0
    pattern = torch.tensor([[1.0, 0, 0], [1, 1, 1], [-1, 0, 1], [0, 0, -1]])
    target = torch.tensor([0, 1, 2, 1])
    if kind == "probabilities":
        target = F.one_hot(target, 3).float()
    for size in (85.0, 200.0, -200.0, 1e4):
        value, gradient = both(name, size * pattern, target)
        exact = oracles.penex(size * pattern, target, **options)
        torch.testing.assert_close(value, (exact.value / scale).float(), rtol=2e-4, atol=1e-30)
        expected = (exact.gradient / scale).float()
        finite = expected.isfinite()
        largest = expected[finite].abs().max().item()
        torch.testing.assert_close(
            gradient[finite], expected[finite], rtol=2e-4, atol=largest * 1e-6
        )
        assert (gradient[~finite] == expected[~finite]).all()  # an overflow check must see it


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(1, 5),
    classes=st.integers(2, 6),
    scale=st.sampled_from([1.0, 20.0, 85.0, 120.0, 900.0, 6e4]),
    shift=st.sampled_from([0.0, -80.0, 85.0, 3e4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    penalty=st.sampled_from([None, 1e-10, 0.1, 50.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    device=st.booleans(),
)
def test_float32_has_what_float64_says(
    seed, rows, classes, scale, shift, dtype, penalty, reduction, device
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
    with pytest.MonkeyPatch.context() as patch:
        take("device" if device else "chosen", patch)
        results = value_and_gradient(logits.clone())
    for found, true in zip(results, exact, strict=True):
        assert not found.isnan().any()
        size = true.abs()
        if true.shape == logits.shape:  # at the label the gradient is a difference of two parts
            part = 0.1 * torch.exp(-0.1 * logits.detach().double().gather(1, target[:, None]))
            size = size.scatter_add(1, target[:, None], 2 * part)
        shown = (size < limits.max / 2) & (true.abs() > limits.tiny * 1e4)
        assert ((found.double() - true).abs()[shown] <= 1e-4 * size[shown]).all()
        assert found[true.abs() > 2 * limits.max].isinf().all()


@pytest.mark.parametrize("size", [1.0, 100.0, 6e4])
@pytest.mark.parametrize("name", ["cross-entropy", "z", "focal", "gce", "rule", "log-penex"])
def test_bounded_slopes_at_any_logits(path: str, name: str, size: float) -> None:
    logits = size * torch.tensor([[1.0, -1, 0], [-1, -1, -1], [-1, 1, 1], [0, 0, 0.01]])
    target = torch.tensor([1, 0, 2, 0])
    for found, exact in zip(
        both(name, logits, target), both(name, logits.double(), target), strict=True
    ):
        scale = exact.abs().max().item() + 1
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6 * scale)


# Rules.


def test_a_rule_with_a_wrong_result_is_refused() -> None:
    logits, target, _ = make_call("indices", (5, 3), "plain")
    with pytest.raises(ValueError, match=r"rule: expected one value a row, .* got \(\)"):
        functional.row_loss(logits, target, lambda t, s: (s - t).mean())
    with pytest.raises(ValueError, match="rule: expected one value a row, .* got float"):
        functional.row_loss(logits, target, lambda t, s: 1.0)
    with pytest.raises(TypeError, match="rule: expected a function, got float"):
        functional.row_loss(logits, target, 0.7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes class indices or integer one-hot labels"):
        functional.row_loss(logits, logits.softmax(1), gce_rule)


def test_a_rule_of_the_partition_alone_has_no_slope_at_the_label(path: str) -> None:
    logits, target, _ = make_call("indices", (5, 3), "ignore")
    leaf = logits.requires_grad_()
    loss = functional.row_loss(leaf, target, lambda t, s: s.square(), ignore_index=-7)
    (gradient,) = torch.autograd.grad(loss, leaf)
    kept = target != -7
    s = logits.detach().logsumexp(1, keepdim=True)
    expected = 2 * s * logits.detach().softmax(1) * kept[:, None] / kept.sum()
    torch.testing.assert_close(gradient, expected)


# What a device would execute.


def test_nothing_is_looked_at_without_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither forward nor backward reads a value, which would wait for a device."""
    take("device", monkeypatch)

    def refuse(tensor: Tensor) -> None:
        raise AssertionError("a value was looked at")

    logits, target, _ = make_call("indices", (7, 5), "ignore", torch.float32)
    for criterion in (
        penex.PENEX(ignore_index=-7),
        penex.PENEX(penalty_mode="auto", ignore_index=-7),
        penex.PENEX(penalty=0.3, ignore_index=-7),
        penex.LogPENEX(ignore_index=-7),
        penex.losses.FocalLoss(ignore_index=-7),
    ):
        with monkeypatch.context() as patch:
            for looks in ("item", "__bool__", "__float__", "tolist"):
                patch.setattr(Tensor, looks, refuse)
            criterion(logits.clone().requires_grad_(), target).backward()
