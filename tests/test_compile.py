"""Compiled and exported, the losses are what they are in eager mode, in one graph, once."""

import copy
import os
import shutil
from typing import Any

import pytest
import torch
from cases import make_call
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import penex
from penex import penex_loss

WEIGHT = torch.tensor([0.3, 1.0, 2.0, 0.7])
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"weight": WEIGHT, "ignore_index": 1, "label_smoothing": 0.2},
    "sum": {"weight": WEIGHT, "reduction": "sum", "huberization": 0.9},
    "none": {"reduction": "none", "ignore_index": 0},
}
MODES: dict[str, dict[str, Any]] = {
    "running": {},
    "auto": {"penalty_mode": "auto"},
    "fixed": {"penalty": 0.3},
}
SIZES = (5, 9, 14, 6, 31)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def batch(rows: int, *positions: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 4, *positions), torch.randint(4, (rows, *positions))


def soft(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 4), torch.rand(rows, 4).softmax(1)


def assert_same(compiled: Any, eager: Any, logits: Tensor, target: Tensor) -> None:
    """Value and gradient; an upstream gradient that is not one."""
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    got, expected = compiled(ours, target), eager(theirs, target)
    torch.testing.assert_close(got, expected)
    (3.5 * got.sum()).backward()
    (3.5 * expected.sum()).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


# 1. Recompilation.


@pytest.mark.parametrize("mode", MODES)
def test_a_changing_penalty_compiles_nothing_anew(mode: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    eager = penex.PENEX(**MODES[mode])
    criterion = copy.deepcopy(eager)
    compiled = torch.compile(criterion, fullgraph=True, backend=counter)
    seen = set()
    for _ in range(5):
        assert_same(compiled, eager, *batch(7))
        torch.testing.assert_close(criterion.penalty, eager.penalty)
        seen.add(criterion.penalty.item())
    assert len(seen) == (1 if mode == "fixed" else 5)
    assert counter.frame_count == 1


def test_training_and_evaluation_take_turns_with_one_graph_each() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    eager = penex.PENEX()
    criterion = copy.deepcopy(eager)
    compiled = torch.compile(criterion, fullgraph=True, backend=counter)
    for _ in range(3):
        for train in (True, False):
            compiled.train(train)
            eager.train(train)
            assert_same(compiled, eager, *batch(7))
            torch.testing.assert_close(criterion.penalty, eager.penalty)
    assert counter.frame_count == 2


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["indices", "soft", "dense"])
def test_batch_size_becomes_dynamic_by_itself(kind: str, mode: str, train: bool) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    eager = penex.PENEX(WEIGHT, label_smoothing=0.1 * (kind == "soft"), **MODES[mode]).train(train)
    criterion = copy.deepcopy(eager)
    compiled = torch.compile(criterion, fullgraph=True, backend=counter)
    for rows in SIZES:
        logits, target = soft(rows) if kind == "soft" else batch(rows, *(3,) * (kind == "dense"))
        assert_same(compiled, eager, logits, target)
        torch.testing.assert_close(criterion.penalty, eager.penalty, equal_nan=True)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("options", CASES)
def test_a_dynamic_batch_size_is_compiled_once(options: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    eager = penex.PENEX(**CASES[options])
    criterion = copy.deepcopy(eager)
    compiled = torch.compile(criterion, fullgraph=True, backend=counter)

    def marked(logits: Tensor, target: Tensor) -> Tensor:
        torch._dynamo.mark_dynamic(logits, 0)
        torch._dynamo.mark_dynamic(target, 0)
        return compiled(logits, target)

    for rows in SIZES:
        assert_same(marked, eager, *batch(rows))
        torch.testing.assert_close(criterion.penalty, eager.penalty)
    assert counter.frame_count == 1


def test_a_penalty_tensor_is_an_input_of_the_compiled_function() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(penex_loss, fullgraph=True, backend=counter)
    for value in (0.3, 0.01, 2.0, 7.0):
        rho = torch.tensor(value)
        logits, target = batch(6)
        torch.testing.assert_close(
            compiled(logits, target, penalty=rho), penex_loss(logits, target, penalty=value)
        )
    assert counter.frame_count == 1


def test_numbers_may_change_between_calls() -> None:
    """A compiler that meets a second value makes the number a symbol, and so must the checks."""
    compiled = torch.compile(penex_loss, fullgraph=True, backend="aot_eager")
    for value in (0.3, 0.45, 0.9):
        logits, target = batch(6)
        options = {
            "penalty": value,
            "sensitivity": value / 2,
            "label_smoothing": value / 3,
            "huberization": 1 + value,
        }
        torch.testing.assert_close(
            compiled(logits, target, **options), penex_loss(logits, target, **options)
        )
    with pytest.raises((ValueError, torch._dynamo.exc.Unsupported)):
        compiled(logits, target, penalty=-1.0)


# 2. The function; nothing but one graph.


@pytest.mark.parametrize("penalty", [None, 0.3])
@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("dynamic", [True, False])
def test_function(options: str, penalty: float | None, dynamic: bool) -> None:
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return penex_loss(logits, target, penalty=penalty, **CASES[options])

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (5, 8):
        assert_same(compiled, loss, *batch(rows))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["indices", "one_hot", "probabilities"])
def test_function_in_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    logits, target, keywords = make_call(kind, (6, 5, 3), "all", dtype)

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return penex_loss(logits, target, penalty=0.1, **keywords)

    assert_same(torch.compile(loss, fullgraph=True, backend="aot_eager"), loss, logits, target)


@pytest.mark.parametrize("options", ["plain", "sum", "none"])
@pytest.mark.parametrize("magnitude", [80.0, 1e4, 6e4])
def test_extreme_logits_are_as_in_eager_mode(options: str, magnitude: float) -> None:
    compiled = torch.compile(penex_loss, fullgraph=True, backend="aot_eager")
    logits, target = batch(6)
    logits *= magnitude
    logits[0, 0] = -torch.inf
    target[0] = 1
    found = []
    for loss in (compiled, penex_loss):
        leaf = logits.clone().requires_grad_()
        value = loss(leaf, target, penalty=1e-10, **CASES[options])
        found.append((value, *torch.autograd.grad(value.sum(), leaf)))
    assert not any(part.isnan().any() for part in found[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=0)


def test_an_ignored_row_may_hold_anything() -> None:
    compiled = torch.compile(penex_loss, fullgraph=True, backend="aot_eager")
    logits, target = batch(6)
    logits[2], target[2] = torch.nan, -100
    leaf = logits.requires_grad_()
    (gradient,) = torch.autograd.grad(compiled(leaf, target), leaf)
    assert gradient.isfinite().all()
    assert not gradient[2].any()


def test_a_label_out_of_range_is_refused() -> None:
    compiled = torch.compile(penex_loss, fullgraph=True, backend="aot_eager")
    with pytest.raises((IndexError, RuntimeError), match="index 4 is out of|expected class"):
        compiled(torch.zeros(2, 4), torch.tensor([0, 4]))


def test_second_derivatives_are_refused() -> None:
    compiled = torch.compile(penex_loss, fullgraph=True, backend="aot_eager")
    logits = torch.randn(3, 4, requires_grad=True)
    loss = compiled(logits, torch.tensor([0, 1, 2]), penalty=0.3)
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    # Up to torch 2.6 the compiled gradient has no graph of its own.
    with pytest.raises(RuntimeError, match="double backward|does not require grad"):
        torch.autograd.grad(gradient.sum(), logits)


def test_second_derivatives_without_a_backward_graph_are_refused_or_right() -> None:
    compiled = torch.compile(penex_loss, fullgraph=True, backend="eager")
    logits, target = torch.randn(3, 4, requires_grad=True), torch.tensor([0, 1, 2])
    found = []
    for loss in (penex_loss, compiled):
        (gradient,) = torch.autograd.grad(
            loss(logits, target, penalty=0.3), logits, create_graph=True
        )
        if gradient.requires_grad:
            found += torch.autograd.grad(gradient.sum(), logits)
    assert found
    for second in found:
        torch.testing.assert_close(second, found[0])


def test_function_transforms_inside_compiled_code() -> None:
    logits, target = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2])

    def hessian(logits: Tensor) -> Tensor:
        return torch.func.hessian(lambda f: penex_loss(f, target, penalty=0.3))(logits)

    found = torch.compile(hessian, fullgraph=True, backend="aot_eager")(logits)
    torch.testing.assert_close(found, hessian(logits))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_no_graph_break(mode: str, train: bool) -> None:
    logits, target = batch(5)
    criterion = penex.PENEX(WEIGHT, label_smoothing=0.1, **MODES[mode]).train(train)
    found = torch._dynamo.explain(criterion)(logits.requires_grad_(), target)
    assert (found.graph_count, found.graph_break_count) == (1, 0)


def test_a_compiled_training_step_is_the_eager_one() -> None:
    """Model, loss and criterion in one graph; parameters and penalty after four steps."""
    counter = CompileCounterWithBackend("aot_eager")

    def train(compile: bool) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        criterion = penex.PENEX(WEIGHT)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))

        def loss(x: Tensor, y: Tensor) -> Tensor:
            return criterion(model(x), y)

        if compile:
            loss = torch.compile(loss, fullgraph=True, backend=counter)
        optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
        for _ in range(4):
            optimiser.zero_grad()
            loss(torch.randn(9, 6), torch.randint(4, (9,))).backward()
            optimiser.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()]), criterion.penalty

    for got, expected in zip(train(True), train(False), strict=True):
        torch.testing.assert_close(got, expected)
    assert counter.frame_count == 1


compilers = [os.environ.get("CXX"), "g++", "clang++", "c++"]


@pytest.mark.skipif(
    not any(shutil.which(name) for name in compilers if name), reason="needs a C++ compiler"
)
@pytest.mark.filterwarnings("default")  # inductor's own, of its imports and of this machine
def test_inductor() -> None:
    eager = penex.PENEX(WEIGHT, label_smoothing=0.1)
    criterion = copy.deepcopy(eager)
    compiled = torch.compile(criterion, fullgraph=True, dynamic=True)
    for rows in (17, 9, 33):
        assert_same(compiled, eager, *batch(rows))
        torch.testing.assert_close(criterion.penalty, eager.penalty)


# 3. Export.


class WithLoss(nn.Module):
    """A model that returns its loss, as many are written."""

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.criterion = criterion

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = self.criterion(self.layer(x), y)
        return loss


class Function(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", WEIGHT)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return penex_loss(logits, target, penalty=0.2, weight=self.weight, label_smoothing=0.1)


def exported(module: nn.Module, *example: Tensor) -> nn.Module:
    size = torch.export.Dim("batch", min=2)
    # Of a copy, for the exported program shares the buffers of what it was made from. torch 2.6
    # is strict unless told otherwise, and then drops a buffer that the loss does not read.
    program = torch.export.export(
        copy.deepcopy(module), example, dynamic_shapes=({0: size}, {0: size}), strict=False
    )
    return program.module()


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_export_of_a_model_with_its_loss(mode: str, seen: bool) -> None:
    module = WithLoss(penex.PENEX(WEIGHT, **MODES[mode]))
    if seen:
        module(torch.randn(5, 6), torch.randint(4, (5,)))
    module.eval()
    program = exported(module, torch.randn(7, 6), torch.randint(4, (7,)))
    rho = module.criterion.penalty.clone()
    torch.testing.assert_close(program.criterion.penalty, rho, equal_nan=True)
    for rows in (2, 11):
        x, y = torch.randn(rows, 6), torch.randint(4, (rows,))
        y[0] = -100
        torch.testing.assert_close(program(x, y), module(x, y))
    torch.testing.assert_close(program.criterion.penalty, rho, equal_nan=True)


def test_export_in_training_keeps_the_update_of_the_penalty() -> None:
    module = WithLoss(penex.PENEX())
    x, y = torch.randn(7, 6), torch.randint(4, (7,))
    module(x, y)
    program = exported(module, x, y)
    for rows in (5, 9):
        x, y = 3 * torch.randn(rows, 6), torch.randint(4, (rows,))
        before = module.criterion.penalty.clone()
        torch.testing.assert_close(program(x, y), module(x, y))
        torch.testing.assert_close(program.criterion.penalty, module.criterion.penalty)
        assert not torch.allclose(module.criterion.penalty, before, rtol=1e-3)


def test_the_exported_penalty_is_a_buffer_that_can_be_loaded() -> None:
    module = WithLoss(penex.PENEX(penalty=0.2, penalty_mode="running")).eval()
    program = exported(module, torch.randn(7, 6), torch.randint(4, (7,)))
    module.criterion.penalty.fill_(1.5)
    program.load_state_dict(module.state_dict())
    x, y = torch.randn(3, 6), torch.randint(4, (3,))
    torch.testing.assert_close(program(x, y), module(x, y))


def test_export_of_the_function() -> None:
    program = exported(Function(), *batch(7))
    for rows in (2, 12):
        logits, target = batch(rows)
        target[0] = -100
        torch.testing.assert_close(program(logits, target), Function()(logits, target))
