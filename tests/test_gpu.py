"""On a CUDA device: no waiting, CUDA graphs, mixed precision, determinism, the CPU's numbers."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import penex
from penex import penex_loss

pytestmark = [
    pytest.mark.gpu,
    # torch's own words on its prototypes and on its start are no failures of ours.
    pytest.mark.filterwarnings("default::UserWarning"),
]

DEVICE = "cuda"
CLASSES = 7
WEIGHT = torch.linspace(0.3, 2.1, CLASSES)
MODES: dict[str, dict[str, Any]] = {
    "running": {},
    "auto": {"penalty_mode": "auto"},
    "fixed": {"penalty": 0.05},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "weighted": {"weight": WEIGHT, "ignore_index": 2},
    "smoothed": {"weight": WEIGHT, "label_smoothing": 0.1},
    "huberized": {"huberization": 0.9, "reduction": "sum"},
    "rows": {"reduction": "none", "ignore_index": 0},
}


def batch(rows: int, *positions: int) -> tuple[Tensor, Tensor]:
    logits = 2 * torch.randn(rows, CLASSES, *positions)
    return logits, torch.randint(CLASSES, (rows, *positions))


def without_waiting(call: Any, logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The loss and its gradient; the upstream gradient is not one."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = call(logits, *rest)
        (gradient,) = torch.autograd.grad(2.5 * loss.sum(), logits)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return loss.detach().cpu(), gradient.cpu()


# 1. Nothing waits for the device.


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("positions", [(), (3, 5)], ids=["rows", "dense"])
def test_module_waits_for_nothing_and_equals_the_cpu(
    positions: tuple[int, ...], mode: str, options: str, train: bool
) -> None:
    reference = penex.PENEX(**MODES[mode], **OPTIONS[options]).train(train)
    criterion = copy.deepcopy(reference).to(DEVICE)
    for _ in range(3):
        logits, target = batch(9, *positions)
        leaf = logits.to(DEVICE).requires_grad_()
        loss, gradient = without_waiting(criterion, leaf, target.to(DEVICE))
        logits.requires_grad_()
        expected = reference(logits, target)
        torch.testing.assert_close(loss, expected.detach())
        (exact,) = torch.autograd.grad(2.5 * expected.sum(), logits)
        torch.testing.assert_close(gradient, exact)
        torch.testing.assert_close(criterion.penalty.cpu(), reference.penalty, equal_nan=True)


@pytest.mark.parametrize("penalty", ["none", "number", "tensor"])
@pytest.mark.parametrize("kind", ["indices", "one_hot", "probabilities"])
def test_function_waits_for_nothing_and_equals_the_cpu(kind: str, penalty: str) -> None:
    logits, target = batch(9)
    if kind == "one_hot":
        target = nn.functional.one_hot(target, CLASSES)
    if kind == "probabilities":
        target = torch.rand(9, CLASSES).softmax(1)
    given: dict[str, Any] = {"none": None, "number": 0.2, "tensor": torch.tensor(0.2)}

    def loss_of(logits: Tensor, target: Tensor, weight: Tensor, rho: Any) -> Tensor:
        return penex_loss(logits, target, penalty=rho, weight=weight)

    rho = given[penalty]
    leaf = logits.to(DEVICE).requires_grad_()
    on_device = rho.to(DEVICE) if isinstance(rho, Tensor) else rho
    loss, gradient = without_waiting(loss_of, leaf, target.to(DEVICE), WEIGHT.to(DEVICE), on_device)
    logits.requires_grad_()
    expected = loss_of(logits, target, WEIGHT, rho)
    torch.testing.assert_close(loss, expected.detach())
    (exact,) = torch.autograd.grad(2.5 * expected, logits)
    torch.testing.assert_close(gradient, exact)


# 2. The CPU's numbers.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_gradient_of_many_pieces_equals_the_cpu(scale: float, dtype: torch.dtype) -> None:
    """More logits than one piece has, ordinary and large."""
    logits = (scale * torch.randn(1100, 1000)).to(dtype)
    target = torch.randint(1000, (1100,))
    target[::7] = -100
    found = []
    for device in ("cpu", DEVICE):
        criterion = penex.PENEX().to(device)
        leaf = logits.to(device, copy=True).requires_grad_()
        loss = criterion(leaf, target.to(device)).float()
        (1e3 * loss).backward()  # or the gradients of half precision had few digits
        found.append((loss.detach().cpu(), leaf.grad.float().cpu(), criterion.penalty.cpu()))
    (loss, gradient, penalty), (cuda_loss, cuda_gradient, cuda_penalty) = found
    rtol = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(cuda_penalty, penalty, rtol=1e-4, atol=0)
    torch.testing.assert_close(cuda_loss, loss, rtol=rtol, atol=0)
    atol = rtol * gradient.abs().max().item()
    torch.testing.assert_close(cuda_gradient, gradient, rtol=rtol, atol=atol)


# 3. CUDA graphs.


@pytest.mark.parametrize("mode", MODES)
def test_a_training_step_is_captured_and_replayed(mode: str) -> None:
    """Model, loss, backward, step: as torch's documentation captures a whole step."""
    model = nn.Linear(16, CLASSES).to(DEVICE)
    criterion = penex.PENEX(WEIGHT, **MODES[mode]).to(DEVICE)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    x = torch.randn(32, 16, device=DEVICE)
    target = torch.randint(CLASSES, (32,), device=DEVICE)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimiser.zero_grad(set_to_none=True)
            criterion(model(x), target).backward()
            optimiser.step()
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    optimiser.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        loss = criterion(model(x), target)
        loss.backward()
        optimiser.step()

    other_model, other = copy.deepcopy(model), copy.deepcopy(criterion)
    other_optimiser = torch.optim.SGD(other_model.parameters(), lr=0.5)
    for _ in range(3):
        x.copy_(torch.randn(32, 16))
        target.copy_(torch.randint(CLASSES, (32,)))
        graph.replay()
        other_optimiser.zero_grad()
        expected = other(other_model(x), target)
        expected.backward()
        other_optimiser.step()
        torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(criterion.penalty, other.penalty, rtol=1e-4, atol=0)
        torch.testing.assert_close(model.weight, other_model.weight, rtol=1e-4, atol=1e-5)


# 4. Mixed precision.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gradient_scaler_skips_no_step(dtype: torch.dtype, mode: str) -> None:
    model, exact = nn.Linear(16, CLASSES).to(DEVICE), nn.Linear(16, CLASSES).to(DEVICE)
    exact.load_state_dict(model.state_dict())
    criterion = penex.PENEX(**MODES[mode]).to(DEVICE)
    reference = copy.deepcopy(criterion)
    scaler = torch.amp.GradScaler(DEVICE, enabled=dtype == torch.float16)
    scale = scaler.get_scale()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    plain = torch.optim.SGD(exact.parameters(), lr=0.5)
    for _ in range(5):
        x = torch.randn(64, 16).to(DEVICE)
        target = torch.randint(CLASSES, (64,)).to(DEVICE)
        optimiser.zero_grad()
        with torch.autocast(DEVICE, dtype=dtype):
            logits = model(x)
            assert logits.dtype == dtype
            loss = criterion(logits, target)
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        assert scaler.get_scale() == scale  # halved by any gradient that is not finite
        plain.zero_grad()
        expected = reference(exact(x), target)
        expected.backward()
        plain.step()
        torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-2, atol=0)
    torch.testing.assert_close(criterion.penalty, reference.penalty, rtol=1e-2, atol=0)
    torch.testing.assert_close(model.weight, exact.weight, rtol=1e-2, atol=2e-3)


# 5. Determinism.


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_deterministic_algorithms_on_the_device(kind: str, options: str) -> None:
    keywords = dict(OPTIONS[options])
    logits, target = batch(65, 3)
    if kind == "probabilities":
        keywords.pop("ignore_index", None)
        target = torch.rand(65, CLASSES, 3).softmax(1)
    reference = penex.PENEX(**keywords)
    expected = reference(logits.clone().requires_grad_(), target)
    torch.use_deterministic_algorithms(True)
    try:
        found = []
        for _ in range(2):
            criterion = penex.PENEX(**keywords).to(DEVICE)
            leaf = logits.to(DEVICE).requires_grad_()
            loss = criterion(leaf, target.to(DEVICE))
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
            found.append((loss.detach(), gradient, criterion.penalty))
    finally:
        torch.use_deterministic_algorithms(False)
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)
    torch.testing.assert_close(found[0][0].cpu(), expected.detach())
