"""ONNX: onnxruntime computes the probabilities that torch does."""

import copy
from collections.abc import Callable
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from penex import PENEX
from penex.inference import Calibrated, fold_temperature, link, predict_proba
from penex.losses import ConfidencePenaltyLoss, FocalLoss

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]

ALPHA = 0.3
TOLERANCE = 1e-6


class Dense(nn.Module):
    """Logits (N, K, H, W), by a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


MODELS: tuple[tuple[Callable[[], nn.Module], tuple[int, ...]], ...] = (
    (mlp, (6,)),
    (Dense, (2, 5, 7)),
)


def run(exported: Any, x: Tensor) -> Tensor:
    """The graph's output, computed by onnxruntime from the bytes that would be deployed."""
    session = onnxruntime.InferenceSession(exported.model_proto.SerializeToString())
    (name,) = (entry.name for entry in session.get_inputs())
    (output,) = session.run(None, {name: x.numpy()})
    return torch.from_numpy(output)


@pytest.mark.parametrize(("build", "shape"), MODELS)
@torch.no_grad()
def test_calibrated(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    """The export is of torch's exported program, with a batch size that varies."""
    model = build().eval()
    dynamic = {"args": ({0: torch.export.Dim("batch")},)}
    program = torch.export.export(
        Calibrated(model, ALPHA), (torch.randn(3, *shape),), dynamic_shapes=dynamic
    )
    exported = torch.onnx.export(program, verbose=False)
    for rows in (1, 7):
        x = 3 * torch.randn(rows, *shape)
        expected = ((1 + ALPHA) * model(x).double()).softmax(1).float()
        for served in (run(exported, x), program.module()(x)):
            assert served.shape == expected.shape
            assert (served - expected).abs().max() < TOLERANCE
        assert (model(x).softmax(1) - expected).abs().max() > 1000 * TOLERANCE


@pytest.mark.parametrize(
    "criterion",
    [
        FocalLoss(2.0, label_smoothing=0.1),
        ConfidencePenaltyLoss(0.5),
        PENEX(sensitivity=ALPHA, huberization=2.0),
        nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]), label_smoothing=0.2),
    ],
    ids=lambda criterion: type(criterion).__name__,
)
@torch.no_grad()
def test_calibrated_with_the_link_of_a_criterion(criterion: nn.Module) -> None:
    model = nn.Identity()
    exported = torch.onnx.export(
        Calibrated(model, criterion).eval(),
        (torch.randn(2, 3),),
        dynamic_shapes={"args": ({0: torch.export.Dim("batch")},)},
        dynamo=True,
        verbose=False,
    )
    x = torch.cat([5 * torch.randn(50, 3), torch.tensor([[1e4, 0, -1e4], [20, 0, 1], [0, 0, 0]])])
    expected = link(criterion)(x.double()).exp()
    assert (run(exported, x) - expected).abs().max() < 2e-6


@pytest.mark.parametrize(("build", "shape"), MODELS)
@torch.no_grad()
def test_folded(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    """The graph gives logits, and their plain softmax is right."""
    model = build().eval()
    folded = fold_temperature(copy.deepcopy(model), ALPHA)
    exported = torch.onnx.export(
        folded,
        (torch.randn(3, *shape),),
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    for rows in (1, 7):
        x = 3 * torch.randn(rows, *shape)
        served = run(exported, x).softmax(1)
        assert (served - predict_proba(model(x), ALPHA)).abs().max() < TOLERANCE


@torch.no_grad()
def test_large_logits_do_not_overflow() -> None:
    model = nn.Linear(3, 3, bias=False)
    model.weight.copy_(300 * torch.eye(3))
    exported = torch.onnx.export(
        Calibrated(model, ALPHA).eval(), (torch.eye(3),), dynamo=True, verbose=False
    )
    assert torch.equal(run(exported, torch.eye(3)), torch.eye(3))
