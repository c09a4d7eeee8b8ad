"""penex.inference: probabilities from logits, export, folding the factor into a layer."""

import copy
import math
import pickle
from collections.abc import Callable

import oracles
import pytest
import torch
import torch.nn.functional as F
from cases import make_logits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm

from penex import PENEX
from penex.inference import Calibrated, fold_temperature, link, predict_log_proba, predict_proba
from penex.losses import ConfidencePenaltyLoss, FocalLoss

ALPHA = 0.4


# 1. Probabilities.


@given(
    values=st.lists(st.floats(-300, 300, width=32), min_size=2, max_size=6),
    alpha=st.floats(1e-4, 5.0),
)
def test_probabilities_are_the_formula(values: list[float], alpha: float) -> None:
    logits = torch.tensor([values], dtype=torch.float64)
    exact = oracles.predict_proba(logits, alpha, 1)
    torch.testing.assert_close(predict_proba(logits, alpha), exact, rtol=1e-9, atol=1e-300)
    likely = exact > 1e-250
    log_proba = predict_log_proba(logits, alpha)
    torch.testing.assert_close(log_proba[likely], exact[likely].log(), rtol=1e-9, atol=1e-9)
    assert torch.equal(predict_proba(logits, alpha).argmax(1), exact.argmax(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_that_are_large(dtype: torch.dtype) -> None:
    """1.4 * 6e4 is infinite in float16; the factor must not be applied there."""
    logits = torch.tensor([[6e4, 5.99e4, -6e4], [40.0, 38.5, 39.0]]).to(dtype)
    exact = oracles.predict_proba(logits, ALPHA, 1)
    got = predict_proba(logits, ALPHA)
    assert got.dtype == dtype
    torch.testing.assert_close(got, exact.to(dtype))
    log_proba = predict_log_proba(logits, ALPHA)
    assert log_proba.dtype == dtype
    assert not log_proba.isnan().any()
    torch.testing.assert_close(log_proba[1], exact[1].log().to(dtype))


def test_minus_infinity_is_probability_zero() -> None:
    logits = torch.tensor([[1.0, -math.inf, 1.0]])
    assert predict_proba(logits, ALPHA).tolist() == [[0.5, 0.0, 0.5]]
    assert predict_log_proba(logits, ALPHA)[0, 1] == -math.inf


@pytest.mark.parametrize(
    ("shape", "dim"), [((5,), 0), ((4, 3), 1), ((2, 3, 4, 2), 1), ((2, 4, 3), 2)]
)
def test_class_dimension(shape: tuple[int, ...], dim: int) -> None:
    logits = make_logits(shape)
    exact = oracles.predict_proba(logits, ALPHA, dim)
    torch.testing.assert_close(predict_proba(logits, ALPHA, dim=dim), exact)
    if dim == 1:
        torch.testing.assert_close(predict_proba(logits, ALPHA), exact)
    if dim == min(1, len(shape) - 1):
        torch.testing.assert_close(PENEX(sensitivity=ALPHA).predict_proba(logits), exact)


@pytest.mark.parametrize("function", [predict_proba, predict_log_proba])
def test_refusals_of_the_helpers(function: Callable[..., Tensor]) -> None:
    with pytest.raises(TypeError, match=r"input: expected floating-point logits, got torch.int64"):
        function(torch.zeros(2, 3).long(), 0.1)
    for value in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"sensitivity: expected .* got {value}"):
            function(torch.zeros(2, 3), value)


# 2. Calibrated.


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def test_calibrated_is_the_model_with_its_inference() -> None:
    model, x = mlp(), torch.randn(4, 6)
    before = copy.deepcopy(model.state_dict())
    calibrated = Calibrated(model, ALPHA)
    torch.testing.assert_close(calibrated(x), predict_proba(model(x), ALPHA))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_calibrated_passes_every_argument_on() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, *, shift: Tensor) -> Tensor:
            return x + shift

    x, shift = torch.randn(2, 3), torch.randn(2, 3)
    torch.testing.assert_close(
        Calibrated(Two(), ALPHA)(x, shift=shift), predict_proba(x + shift, ALPHA)
    )


def test_calibrated_is_exported() -> None:
    calibrated = Calibrated(mlp(), ALPHA).eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        calibrated, (torch.randn(4, 6),), dynamic_shapes={"args": ({0: batch},)}
    )
    x = torch.randn(7, 6)
    torch.testing.assert_close(program.module()(x), calibrated(x))


CRITERIA = {
    "focal": FocalLoss(2.0, label_smoothing=0.1),
    "confidence penalty": ConfidencePenaltyLoss(0.5),
    "penex": PENEX(sensitivity=ALPHA, huberization=2.0),
    "cross-entropy": nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]), label_smoothing=0.2),
}
each_criterion = pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA)


@each_criterion
def test_calibrated_takes_a_criterion(criterion: nn.Module) -> None:
    model, x = mlp(), torch.randn(4, 6)
    calibrated = Calibrated(model, criterion)
    expected = link(criterion)(model(x)).exp()
    torch.testing.assert_close(calibrated(x), expected)
    torch.testing.assert_close(copy.deepcopy(calibrated)(x), expected)
    program = torch.export.export(
        calibrated.eval(),
        (torch.randn(4, 6),),
        dynamic_shapes={"args": ({0: torch.export.Dim("batch")},)},
    )
    torch.testing.assert_close(program.module()(x[:3]), expected[:3])
    # The probabilities are rounded to half precision, not their logarithms.
    rare = Calibrated(nn.Identity(), criterion)(torch.tensor([[4.0, -3.0, 0.0]]).half())
    exact = link(criterion)(torch.tensor([[4.0, -3.0, 0.0]])).exp()
    torch.testing.assert_close(rare, exact.half(), rtol=0, atol=0)


def test_a_copy_of_calibrated_has_weights_of_its_own() -> None:
    criterion = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]), label_smoothing=0.2)
    calibrated, x = Calibrated(mlp(), criterion), torch.randn(4, 6)
    twin, before = copy.deepcopy(calibrated), calibrated(x)
    twin.criterion.weight.fill_(1.0)
    assert not torch.allclose(twin(x), before)
    assert torch.equal(calibrated(x), before)


def test_calibrated_refuses() -> None:
    with pytest.raises(TypeError, match=r"criterion: expected .* got NLLLoss"):
        Calibrated(mlp(), nn.NLLLoss())
    with pytest.raises(ValueError, match=r"sensitivity: expected .* got 0"):
        Calibrated(mlp(), 0.0)
    with pytest.raises(ValueError, match=r"model: its layer '2' has been folded"):
        Calibrated(fold_temperature(mlp(), ALPHA), ALPHA)


# 3. Folding.


class Dense(nn.Module):
    """A forward of its own, with operations after the last layer that a factor passes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(F.relu(self.body(x)).flatten(1))
        return torch.flatten(input=self.dropout(input=y), start_dim=1).view(y.shape[0], -1)


class Segmentation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(1, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.head(torch.relu(self.body(x))), scale_factor=2.0)


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1, bias=False))
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.features(x)).squeeze(-1).squeeze(-1)


MODELS: tuple[tuple[Callable[[], nn.Module], tuple[int, ...]], ...] = (
    (lambda: nn.Linear(6, 3), (4, 6)),
    (lambda: nn.Linear(6, 3, bias=False), (4, 6)),
    (mlp, (4, 6)),
    (lambda: nn.Sequential(mlp(), nn.Dropout(), nn.Identity()), (4, 6)),
    (Dense, (4, 6)),
    (Segmentation, (2, 1, 4, 5)),
    (Pooled, (2, 1, 6, 6)),
    (lambda: nn.Sequential(nn.Linear(6, 3), nn.Flatten(1)).double(), (4, 6)),
)


@pytest.mark.parametrize(("build", "shape"), MODELS)
def test_folding_makes_plain_softmax_right(
    build: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    model = build().eval()
    x = torch.randn(shape, dtype=next(model.parameters()).dtype)
    expected = predict_proba(model(x), ALPHA)
    twin = copy.deepcopy(model)
    assert fold_temperature(model, ALPHA) is model
    torch.testing.assert_close(model(x).softmax(1), expected)
    torch.testing.assert_close(twin(x).softmax(1), predict_proba(twin(x), 1e-9))  # left alone
    changed = [
        name
        for (name, new), old in zip(model.named_parameters(), twin.parameters(), strict=True)
        if not torch.equal(new, old)
    ]
    assert 1 <= len(changed) <= 2
    assert all(p.requires_grad for p in model.parameters())


def test_folding_twice_is_refused_however_it_is_tried() -> None:
    model = nn.Sequential(mlp(), nn.Dropout())
    fold_temperature(model, ALPHA)
    weights = copy.deepcopy(model.state_dict())
    again = (
        model,
        model[0],
        model[0][2],
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        nn.Sequential(model),
    )
    for module in again:
        with pytest.raises(ValueError, match=r"folded already, with sensitivity 0\.4"):
            fold_temperature(module, ALPHA)
        with pytest.raises(ValueError, match=r"folded"):
            Calibrated(module, ALPHA)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
    layer = nn.Linear(2, 2)
    fold_temperature(layer, 0.1)
    with pytest.raises(ValueError, match=r"folded already"):
        fold_temperature(nn.Sequential(nn.ReLU(), layer), 0.1)


class _Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)


class Recursive(_Head):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.fc(x))


class WeightReader(_Head):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x @ self.fc.weight)


class Residual(_Head):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x)


class SoftmaxInside(_Head):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).softmax(1)


class DictOutput(_Head):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.fc(x)}


class Branching(_Head):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.sum() > 0 else x


class Aliased(_Head):
    def __init__(self) -> None:
        super().__init__()
        self.same = self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.same(x)


class CalledByTwoNames(Aliased):
    def forward(self, x: Tensor) -> Tensor:
        return self.same(torch.relu(self.fc(x)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.embedding(x).mean(1))


def last(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.ReLU(), layer)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: nn.Sequential(nn.Linear(3, 3), nn.Softmax(1)),
            "comes from Softmax; give the layer",
        ),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.LogSoftmax(1)), "it comes from LogSoftmax"),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU()), "it comes from ReLU"),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), "it comes from BatchNorm1d"),
        (SoftmaxInside, "it comes from softmax"),
        (Residual, "it comes from add"),
        (DictOutput, "cannot identify the last layer of DictOutput"),
        (nn.Identity, "cannot identify the last layer of Identity"),
        (Branching, "forward cannot be traced .*; give the layer itself"),
        (Recursive, "'fc' is used 2 times in one forward"),
        (WeightReader, "'fc' is used 2 times in one forward"),
        (CalledByTwoNames, "'fc' is used 2 times in one forward"),
        (Aliased, "weights of its last layer are shared .*fc.weight.*same.weight"),
        (Tied, "weights of its last layer are shared .*embedding.weight.*out.weight"),
        (
            lambda: last(parametrizations.weight_norm(nn.Linear(3, 3))),
            "'1' is parametrized; remove",
        ),
        (lambda: last(parametrizations.spectral_norm(nn.Linear(3, 3))), "'1' is parametrized"),
        (lambda: last(spectral_norm(nn.Linear(3, 3))), "'1' is parametrized"),
        (
            lambda: last(prune.l1_unstructured(nn.Linear(3, 3), "weight", 0.5)),
            "'1' is parametrized",
        ),
        (
            lambda: Calibrated(nn.Linear(3, 3), ALPHA),
            "cannot identify the last layer of Calibrated",
        ),
    ],
)
def test_folding_refuses_what_it_cannot_do_rightly(
    build: Callable[[], nn.Module], message: str
) -> None:
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"module: .*{message}"):
        fold_temperature(model, ALPHA)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_advice_works() -> None:
    """Where tracing fails, the layer itself can be given."""
    model, x = Branching(), torch.ones(2, 3)
    expected = predict_proba(model(x), ALPHA)
    fold_temperature(model.fc, ALPHA)
    torch.testing.assert_close(model(x).softmax(1), expected)


def test_folding_refuses_a_bad_sensitivity() -> None:
    model = nn.Linear(2, 2)
    for value in (0.0, -0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"sensitivity: expected"):
            fold_temperature(model, value)
    with pytest.raises(TypeError, match=r"got FocalLoss, for which Calibrated"):
        fold_temperature(model, FocalLoss())
    fold_temperature(model, 0.1)  # and none of them left a mark


def test_the_whole_way() -> None:
    """Train, then three ways to the same probabilities."""
    x = torch.randn(30, 6)
    target = torch.arange(30) % 3
    model, criterion = mlp(), PENEX(sensitivity=ALPHA)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(20):
        optimiser.zero_grad()
        criterion(model(x), target).backward()
        optimiser.step()
    model.eval()
    expected = criterion.predict_proba(model(x))
    torch.testing.assert_close(Calibrated(model, criterion.sensitivity)(x), expected)
    torch.testing.assert_close(
        fold_temperature(model, criterion.sensitivity)(x).softmax(1), expected
    )
