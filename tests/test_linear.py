"""The head without logits is the loss of the logits: values, gradients, state, refusals."""

import copy
import doctest
import importlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import penex
from penex import LinearPENEX, _linear, penex_loss
from penex._linear import draw
from penex.functional import linear_penex_loss, sampled_linear_penex_loss

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
Case = tuple[Tensor, Tensor, Tensor, Tensor]


def make(rows: int, size: int, classes: int, dtype: torch.dtype, scale: float = 1.0) -> Case:
    """Hidden states, weight, labels, bias; the bias as large as the rest."""
    hidden = (scale * torch.randn(rows, size)).to(dtype)
    weight, bias = torch.randn(classes, size).to(dtype), (3 * torch.randn(classes)).to(dtype)
    return hidden, weight, torch.randint(classes, (rows,)), bias


def close(got: Tensor | None, expected: Tensor | None, tolerance: float) -> None:
    """Up to rounding, as measured by the largest entry: entries of a gradient are differences."""
    assert got is not None
    assert expected is not None
    expected = expected.to(got.dtype).double()
    atol = tolerance * expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=atol)


def check(case: Case, chunk_size: int | None = None, **options: Any) -> None:
    """Value and gradients against those of the logits in float64."""
    hidden, weight, target, bias = case
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    exact = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    loss = linear_penex_loss(
        leaves[0], leaves[1], target, leaves[2], chunk_size=chunk_size, **options
    )
    if "class_weight" in options:
        options["weight"] = options.pop("class_weight").double()
    logits = F.linear(*exact)
    expected = penex_loss(logits.movedim(-1, min(1, logits.ndim - 1)), target, **options)
    assert loss.dtype == hidden.dtype
    assert loss.shape == expected.shape
    tolerance = TOLERANCE[hidden.dtype]
    close(loss, expected, tolerance)
    upstream = torch.randn(loss.shape).to(loss.dtype)
    loss.backward(upstream)
    expected.backward(upstream.double())
    for got, reference in zip(leaves, exact, strict=True):
        assert got.grad is not None
        assert got.grad.dtype == got.dtype
        close(got.grad, reference.grad, tolerance)


# 1. It is the loss of the logits.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"penalty": 0.3, "sensitivity": 0.7},
        {"penalty": torch.tensor(0.3, dtype=torch.float64)},
        {"class_weight": torch.linspace(0.3, 2.1, 11)},
        {"ignore_index": 3},
        {"huberization": 0.8},
        {"class_weight": torch.linspace(0.0, 2, 11), "ignore_index": 5, "huberization": 0.9},
    ],
    ids=["plain", "given", "tensor", "weighted", "ignoring", "huberized", "all"],
)
def test_equals_the_loss_of_the_logits(
    options: dict[str, Any], reduction: str, dtype: torch.dtype
) -> None:
    case = make(23, 5, 11, dtype)
    check(case, reduction=reduction, **dict(options))


@given(
    rows=st.integers(1, 40),
    size=st.integers(1, 9),
    classes=st.integers(1, 40),
    chunk_size=st.sampled_from([None, 1, 2, 7, 100]),
    reduction=st.sampled_from(["mean", "none"]),
)
def test_any_size_in_any_blocks(
    rows: int, size: int, classes: int, chunk_size: int | None, reduction: str
) -> None:
    case = make(rows, size, classes, torch.float32)
    case[2][::3] = -100
    check(case, chunk_size, reduction=reduction, penalty=0.05)


@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (2, 1, 4)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_leading_dimensions(shape: tuple[int, ...], reduction: str) -> None:
    hidden, weight = torch.randn(*shape, 5), torch.randn(11, 5)
    target = torch.randint(11, shape)
    if shape:
        target[0] = -100
    loss = linear_penex_loss(hidden, weight, target, reduction=reduction)
    rows = penex_loss(
        F.linear(hidden.reshape(-1, 5), weight), target.reshape(-1), reduction=reduction
    )
    torch.testing.assert_close(loss, rows.reshape(loss.shape))
    assert loss.shape == (shape if reduction == "none" else ())


@pytest.mark.parametrize("wanted", range(1, 8))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_only_where_required(wanted: int, reduction: str) -> None:
    hidden, weight, target, bias = make(9, 4, 6, torch.float32)
    every = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    some = [
        x.clone().requires_grad_(bool(wanted >> i & 1))
        for i, x in enumerate((hidden, weight, bias))
    ]
    for h, w, b in (every, some):
        linear_penex_loss(h, w, target, b, reduction=reduction).sum().backward()
    for one, other in zip(some, every, strict=True):
        assert (one.grad is None) != one.requires_grad
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("penalty", [0.2, None])
def test_gradcheck(reduction: str, penalty: float | None) -> None:
    """For a given penalty the numeric gradient; an estimated one is not differentiated."""
    hidden, weight, target, bias = make(5, 3, 4, torch.float64)
    target[1] = -100
    if penalty is None:
        penalty = float(penex.functional.estimate_penalty(F.linear(hidden, weight, bias), target))

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_penex_loss(
            hidden, weight, target, bias, penalty=penalty, reduction=reduction, chunk_size=2
        )

    leaves = tuple(x.requires_grad_() for x in (hidden, weight, bias))
    # A second backward computes in another order.
    assert torch.autograd.gradcheck(loss, leaves, nondet_tol=1e-12)


@pytest.mark.parametrize("fill", [20.0, -20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_bias_counts_once(dtype: torch.dtype, fill: float) -> None:
    hidden, weight, target, bias = make(9, 4, 6, dtype)
    check((hidden, weight, target, torch.full_like(bias, fill)), chunk_size=2)


def test_without_bias_and_without_gradient() -> None:
    hidden, weight, target, _ = make(9, 4, 6, torch.float32)
    expected = penex_loss(F.linear(hidden, weight), target)
    torch.testing.assert_close(linear_penex_loss(hidden, weight, target), expected)
    weight.requires_grad_()
    with torch.no_grad():
        assert not linear_penex_loss(hidden, weight, target).requires_grad


def test_evaluation_makes_nothing_of_the_weights_size(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.memory import peak

    monkeypatch.setattr(_linear, "MIN_BLOCK_ROWS", 1)
    monkeypatch.setattr(_linear, "BLOCK_BYTES", 1000)
    hidden, weight, target, _ = make(20, 50, 3000, torch.float32)
    weight.requires_grad_()

    def step() -> None:
        with torch.no_grad():
            linear_penex_loss(hidden, weight, target)

    assert peak(step, torch.device("cpu")) < weight.nbytes / 4


def test_a_second_backward_gives_the_same() -> None:
    hidden, weight, target, _ = make(9, 4, 6, torch.float64)
    weight.requires_grad_()
    loss = linear_penex_loss(hidden, weight, target)
    first, second = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second)


def test_a_gradient_of_the_gradient_is_refused() -> None:
    hidden, weight, target, _ = make(9, 4, 6, torch.float64)
    weight.requires_grad_()
    loss = linear_penex_loss(hidden, weight, target)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(loss, weight, create_graph=True)


def test_no_tensor_of_the_logits_size_is_made() -> None:
    from benchmarks.memory import peak

    hidden, weight, target, bias = make(12000, 8, 3000, torch.float32)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]

    def step() -> None:
        torch.autograd.grad(linear_penex_loss(hidden, weight, target, bias), leaves)

    assert peak(step, torch.device("cpu")) < 12000 * 3000 * 4 / 4


# 2. Extremes.


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [-300.0, -90.0, 50.0, 80.0])
def test_logits_whose_exponentials_overflow(
    offset: float, dtype: torch.dtype, reduction: str
) -> None:
    """Far from zero, alike: what is left are an estimated penalty and a small loss."""
    hidden, weight, target, _ = make(9, 4, 6, dtype)
    check((hidden, weight, target, torch.full((6,), offset).to(dtype)), 4, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("penalty", [None, 1e-10, 0.1, 100.0])
@pytest.mark.parametrize("scale", [1e2, 1e3, 1e5])
def test_never_nan(scale: float, penalty: float | None, reduction: str) -> None:
    hidden, weight, target, bias = make(9, 4, 6, torch.float32, scale)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    loss = linear_penex_loss(
        hidden, weight, target, bias, penalty=penalty, reduction=reduction, sensitivity=0.5
    )
    assert not loss.isnan().any()
    for gradient in torch.autograd.grad(loss.sum(), leaves):
        assert not gradient.isnan().any()


def test_only_the_label_is_extreme() -> None:
    """The sum of the exponentials is ordinary, the exponential part beyond float32."""
    weight = torch.tensor([[1.0], [-2000.0]], requires_grad=True)
    hidden = torch.ones(1, 1, requires_grad=True)
    loss = linear_penex_loss(hidden, weight, torch.tensor([1]), penalty=0.1)
    assert loss == math.inf
    for gradient in torch.autograd.grad(loss, (hidden, weight)):
        assert not gradient.isnan().any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_rows_may_hold_anything(reduction: str) -> None:
    hidden, weight, target, _ = make(6, 4, 5, torch.float32)
    target[[0, 3]] = -100
    expected = linear_penex_loss(hidden, weight, target, reduction=reduction)
    broken = hidden.clone()
    broken[0], broken[3] = math.nan, math.inf
    weight.requires_grad_()
    loss = linear_penex_loss(broken.requires_grad_(), weight, target, reduction=reduction)
    torch.testing.assert_close(loss, expected)
    to_hidden, to_weight = torch.autograd.grad(loss.sum(), (broken, weight))
    assert to_weight.isfinite().all()
    assert (to_hidden[[0, 3]] == 0).all()


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_to_learn_from(reduction: str, rows: int) -> None:
    head = LinearPENEX(4, 5, reduction=reduction)
    loss = head(torch.randn(rows, 4), torch.full((rows,), -100))
    assert loss.shape == ((rows,) if reduction == "none" else ())
    assert (loss == 0).all()
    loss.sum().backward()
    assert (head.weight.grad == 0).all()
    assert head.penalty == 0


def test_float16_parameters() -> None:
    check(make(9, 4, 6, torch.float16), chunk_size=2)


def test_the_gradient_of_a_confident_bfloat16_row_is_rounded_once() -> None:
    """At the optimum both parts cancel: rounded before they meet they would leave noise."""
    alpha, rho = 0.1, 1e-3
    best = math.log(alpha / rho) / (1 + alpha)
    weight = torch.tensor([[best], [-9.0]]).bfloat16().requires_grad_()
    hidden, target = torch.ones(64, 1).bfloat16(), torch.zeros(64, dtype=torch.long)
    loss = linear_penex_loss(
        hidden, weight, target, penalty=rho, sensitivity=alpha, reduction="sum"
    )
    (gradient,) = torch.autograd.grad(loss, weight)
    exact = weight.detach().double().requires_grad_()
    logits = hidden.double() @ exact.t()
    value = penex_loss(logits, target, penalty=rho, sensitivity=alpha, reduction="sum")
    (expected,) = torch.autograd.grad(value, exact)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("num_sampled", [None, 4])
def test_autocast_computes_as_it_does_for_a_linear_layer(num_sampled: int | None) -> None:
    hidden, weight, target, bias = make(9, 4, 6, torch.float32)
    options: dict[str, Any] = {} if num_sampled is None else {"num_sampled": num_sampled}
    loss_of = linear_penex_loss if num_sampled is None else sampled_linear_penex_loss
    found = []
    for low in (False, True):
        torch.manual_seed(0)
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            h, w, b = leaves if low else (x.bfloat16().float() for x in leaves)
            loss = loss_of(h, w, target, b, penalty=0.1, **options)
        loss.backward()
        assert loss.dtype == torch.float32
        found.append((loss, *(x.grad for x in leaves)))
    for got, expected in zip(found[1], found[0], strict=True):
        assert got is not None
        assert got.dtype == torch.float32
        close(got, expected, 1e-2)


# 3. The module.


@pytest.mark.parametrize("options", [{}, {"penalty_mode": "auto"}, {"penalty": 0.2}, {"ema": 0.5}])
def test_module_is_a_linear_layer_and_penex(options: dict[str, Any]) -> None:
    weights = torch.linspace(0.3, 2, 7)
    torch.manual_seed(1)
    head = LinearPENEX(5, 7, class_weight=weights, **options)
    torch.manual_seed(1)
    layer, criterion = nn.Linear(5, 7), penex.PENEX(weights, **options)
    for _ in range(3):
        hidden, target = torch.randn(2, 6, 5), torch.randint(7, (2, 6))
        target[0, :2] = -100
        loss, expected = head(hidden, target), criterion(layer(hidden).movedim(-1, 1), target)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(head.penalty, criterion.penalty, equal_nan=True)
    torch.testing.assert_close(head.weight.grad, layer.weight.grad)
    torch.testing.assert_close(head.bias.grad, layer.bias.grad)
    torch.testing.assert_close(head.logits(hidden), layer(hidden))
    probabilities = criterion.predict_proba(layer(hidden), dim=-1)
    torch.testing.assert_close(head.predict_proba(hidden), probabilities)
    head.eval(), criterion.eval()
    torch.testing.assert_close(
        head(hidden, target), criterion(layer(hidden).movedim(-1, 1), target)
    )
    torch.testing.assert_close(head.penalty, criterion.penalty, equal_nan=True)


@pytest.mark.parametrize("bias", [True, False])
def test_state_is_loaded_strictly_between_fresh_and_trained(bias: bool) -> None:
    trained, fresh = LinearPENEX(5, 7, bias), LinearPENEX(5, 7, bias)
    trained(torch.randn(4, 5), torch.randint(7, (4,)))
    assert list(trained.state_dict()) == ["weight", *["bias"][: int(bias)], "criterion.penalty"]
    penex.LinearLoss(5, 7, bias=bias).load_state_dict(trained.state_dict())
    other = copy.deepcopy(fresh)
    fresh.load_state_dict(trained.state_dict())
    assert fresh.penalty == trained.penalty
    trained.load_state_dict(other.state_dict())
    assert trained.penalty == 0


def test_the_penalty_stays_float32_and_the_weight_can_be_tied() -> None:
    embedding = nn.Embedding(7, 4).bfloat16()
    head = LinearPENEX(4, 7, bias=False).bfloat16()
    assert head.penalty.dtype == torch.float32
    head.weight = embedding.weight
    head(embedding(torch.arange(3)), torch.arange(3)).backward()
    assert embedding.weight.grad is not None
    assert "in_features=4, num_classes=7, bias=False" in repr(head)


def test_the_arguments_of_the_loss_are_the_criterions() -> None:
    head = LinearPENEX(5, 7, class_weight=torch.ones(7), sensitivity=0.3)
    hidden, target = torch.randn(4, 5), torch.randint(7, (4,))
    head(hidden, target)
    assert head.penalty is head.criterion.penalty
    assert head.class_weight is head.criterion.weight
    head.criterion.sensitivity = 0.6
    assert head.sensitivity == 0.6
    for name in ("sensitivity", "penalty", "class_weight"):
        with pytest.raises(AttributeError):
            setattr(head, name, torch.tensor(0.5))
    head.reset_parameters()
    assert head.penalty == 0


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_it_is_the_same(reduction: str) -> None:
    head = LinearPENEX(4, 9, reduction=reduction)
    other = copy.deepcopy(head)
    hidden, target = torch.randn(6, 4, requires_grad=True), torch.randint(9, (6,))
    target[2] = -100
    found = []
    for module in (head, torch.compile(other, backend="aot_eager", fullgraph=True)):
        loss = module(hidden, target)
        found.append((loss, *torch.autograd.grad(loss.sum(), [hidden, *module.parameters()])))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(head.penalty, other.penalty)


# 4. From few classes.


@pytest.mark.parametrize("sampler", ["uniform", "log-uniform"])
def test_probabilities_of_the_samplers(sampler: str) -> None:
    """What was drawn follows the probabilities that are told (chi squared, 9 degrees)."""
    drawn, log_probability = draw(20000, 10, sampler, torch.device("cpu"))
    told = torch.zeros(10, dtype=torch.float64)
    told[drawn] = log_probability.double().exp()
    torch.testing.assert_close(told.sum(), torch.tensor(1.0, dtype=torch.float64))
    counts = torch.bincount(drawn, minlength=10)
    assert ((counts - 20000 * told) ** 2 / (20000 * told)).sum() < 35  # p < 1e-4


@pytest.mark.parametrize("sampler", ["uniform", "log-uniform"])
def test_the_estimate_has_no_bias(sampler: str) -> None:
    """Loss and gradient, averaged over many draws, are the exact ones within 5 standard errors."""
    hidden, weight, target, bias = make(8, 3, 30, torch.float64)
    weight.requires_grad_()
    options: dict[str, Any] = {
        "penalty": 0.02,
        "class_weight": torch.linspace(0.5, 2, 30),
        "huberization": 0.9,
    }
    samples = []
    for _ in range(1500):
        loss = sampled_linear_penex_loss(
            hidden, weight, target, bias, num_sampled=6, sampler=sampler, **options
        )
        (gradient,) = torch.autograd.grad(loss, weight)
        samples.append(torch.cat([loss.detach().view(1), gradient.flatten()]))
    exact = linear_penex_loss(hidden, weight, target, bias, **options)
    expected = torch.cat([exact.detach().view(1), torch.autograd.grad(exact, weight)[0].flatten()])
    found = torch.stack(samples)
    error = found.std(0) / math.sqrt(len(found))
    assert (error[0] > 0) & (error[0] < 0.05 * expected[0])
    assert ((found.mean(0) - expected).abs() <= 5 * error + 1e-12).all()


def test_the_label_is_counted_once_and_exactly() -> None:
    """One class: nothing else can be drawn, and there is nothing to estimate."""
    hidden, weight = torch.randn(4, 3), torch.randn(1, 3)
    target = torch.zeros(4, dtype=torch.long)
    loss = sampled_linear_penex_loss(hidden, weight, target, num_sampled=3)
    torch.testing.assert_close(loss, linear_penex_loss(hidden, weight, target))


def test_a_module_samples_in_training_and_is_exact_later() -> None:
    head = LinearPENEX(3, 50, num_sampled=5, sampler="uniform")
    hidden, target = torch.randn(4, 3), torch.randint(50, (4,))
    target[1] = -100
    first, second = head(hidden, target), head(hidden, target)
    assert first != second
    first.backward()
    assert head.penalty.isfinite()
    head.eval()
    expected = linear_penex_loss(
        hidden, head.weight, target, head.bias, penalty=float(head.penalty)
    )
    torch.testing.assert_close(head(hidden, target), expected)


# 5. Refusals.

HIDDEN, WEIGHT, TARGET = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.long)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"input": torch.zeros(3, 6)},
            ValueError,
            r"size 4 that weight \(5, 4\) has, got \(3, 6\)",
        ),
        ({"input": torch.zeros(3, 4).long()}, TypeError, "hidden states, got torch.int64"),
        ({"input": torch.tensor(1.0)}, ValueError, "got a 0-d tensor"),
        ({"input": [1.0]}, TypeError, "input: expected a tensor, got list"),
        ({"weight": torch.zeros(4)}, ValueError, r"weight: expected shape \(K, D\)"),
        ({"weight": torch.zeros(0, 4)}, ValueError, "K, D > 0"),
        ({"weight": torch.zeros(6, 0)}, ValueError, "K, D > 0"),
        ({"weight": torch.zeros(5, 4).double()}, TypeError, "input's dtype torch.float32"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias: expected shape \(5,\), got \(4,\)"),
        ({"target": torch.zeros(3)}, TypeError, "class indices"),
        ({"target": TARGET[:2]}, ValueError, r"expected shape \(3,\)"),
        ({"target": TARGET + 5}, IndexError, r"\[0, 5\) or -100 \(ignore_index\), got 5"),
        ({"target": TARGET - 1}, IndexError, "got -1"),
        ({"class_weight": torch.ones(4)}, ValueError, r"class_weight: .* shape \(5,\)"),
        ({"class_weight": [1.0]}, TypeError, "class_weight: expected a tensor"),
        ({"class_weight": torch.ones(5, requires_grad=True)}, ValueError, "does not require"),
        ({"chunk_size": 0}, ValueError, "chunk_size: expected at least 1, got 0"),
        ({"chunk_size": 2.0}, TypeError, "chunk_size: expected an int, got float"),
        ({"sensitivity": 0}, ValueError, "sensitivity"),
        ({"penalty": -1.0}, ValueError, "penalty"),
        ({"huberization": 0.0}, ValueError, "huberization"),
        ({"reduction": "median"}, ValueError, "reduction"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index"),
        ({"num_classes": 6}, ValueError, "classes 0 to 5 got 5 rows"),
        ({"vocab_group": object()}, ValueError, "num_classes: a vocab_group shares"),
    ],
)
def test_wrong_input_is_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"input": HIDDEN, "weight": WEIGHT, "target": TARGET, **change}
    with pytest.raises(error, match=message):
        linear_penex_loss(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_sampled": 0}, ValueError, "num_sampled: expected at least 1"),
        ({"sampler": "zipf"}, ValueError, "sampler: expected one of 'uniform', 'log-uniform'"),
        ({"input": torch.zeros(3, 6)}, ValueError, "size 4 that weight"),
        ({"target": TARGET + 5}, IndexError, "got 5"),
    ],
)
def test_the_sampled_loss_refuses(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"input": HIDDEN, "weight": WEIGHT, "target": TARGET, "num_sampled": 2, **change}
    with pytest.raises(error, match=message):
        sampled_linear_penex_loss(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"in_features": 0}, ValueError, "in_features: expected at least 1"),
        ({"num_classes": 2.0}, TypeError, "num_classes: expected an int"),
        ({"chunk_size": -1}, ValueError, "chunk_size"),
        ({"num_sampled": 0}, ValueError, "num_sampled"),
        ({"sampler": "zipf"}, ValueError, "sampler"),
        ({"penalty_mode": "fixed"}, ValueError, "needs a positive number"),
        ({"reduction": "median"}, ValueError, "reduction"),
    ],
)
def test_the_module_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LinearPENEX(**{"in_features": 3, "num_classes": 4, **change})


# 6. Documentation.


@pytest.mark.parametrize("name", ["penex.linear", "penex._linear"])
def test_docstring_examples(name: str) -> None:
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert attempted > 0
    assert failed == 0


# 7. On a CUDA device.


@pytest.mark.gpu
@pytest.mark.filterwarnings("default::UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", [{}, {"penalty": 0.2}, {"num_sampled": 500}])
def test_nothing_waits_for_the_device(
    options: dict[str, Any], reduction: str, dtype: torch.dtype
) -> None:
    head = LinearPENEX(64, 1000, reduction=reduction, dtype=dtype, **options)
    other = copy.deepcopy(head).cuda()
    hidden, target = torch.randn(300, 64).to(dtype), torch.randint(1000, (300,))
    target[::3] = -100
    on_device = hidden.cuda().requires_grad_(), target.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = other(*on_device)
        found = torch.autograd.grad(loss.sum(), [on_device[0], *other.parameters()])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if "num_sampled" in options:
        assert all(gradient.isfinite().all() for gradient in found)
        return
    expected = head(hidden.requires_grad_(), target)
    close(loss.cpu(), expected, TOLERANCE[dtype])
    exact = torch.autograd.grad(expected.sum(), [hidden, *head.parameters()])
    for got, reference in zip(found, exact, strict=True):
        close(got.cpu(), reference, 5 * TOLERANCE[dtype])
    torch.testing.assert_close(other.penalty.cpu(), head.penalty, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    "name", ["reduction", "ignore_index", "penalty_mode", "ema", "sensitivity"]
)
def test_arguments_of_the_loss_are_set_on_the_criterion(name: str) -> None:
    head = LinearPENEX(3, 5)
    before = getattr(head.criterion, name)
    with pytest.raises(AttributeError, match=f"set it on the head's criterion, .*{name}"):
        setattr(head, name, before)
    embedding = torch.nn.Embedding(5, 3)
    head.weight = embedding.weight
    assert head.weight is embedding.weight
