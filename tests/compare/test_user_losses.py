"""User-defined losses: what is accepted, what is refused, and where their code may run."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import penex
from penex._cli_options import words
from penex.compare.config import configure
from penex.compare.errors import CompareError
from penex.compare.registry import LOSSES, Context, Knob, Loss, parse_loss
from penex.compare.result import compare_losses, load
from penex.compare.user_losses import check, fisher_error, measured_scale, user_loss
from penex.compare.user_objects import register

CONTEXT = Context(num_classes=3, steps_total=6, steps_per_epoch=2)
SMALL: dict[str, Any] = {"seeds": 1, "epochs": 2, "jobs": 1, "quiet": True}
Y = np.random.default_rng(0).integers(3, size=150)
X = np.random.default_rng(1).normal(Y[:, None], 1.0, (150, 4)).astype(np.float32)


class Brier(nn.Module):
    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        labels = F.one_hot(target, input.shape[1])
        return self.factor * (input.softmax(1) - labels).square().sum(1).mean()


def absolute(input: Tensor, target: Tensor, power: float = 1.0) -> Tensor:
    return (1 - input.softmax(1).gather(1, target[:, None])).pow(power).mean()


class Doubled(nn.Module):
    """Cross-entropy of twice the logits, which it says."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(2 * input, target)

    def predict_log_proba(self, input: Tensor, dim: int | None = None) -> Tensor:
        return (2 * input).log_softmax(1)


HINGE = Loss(
    "hinge",
    "Hinge",
    lambda knob, context: nn.MultiMarginLoss(margin=knob),
    Knob("margin", "m", default=1.0, low=0.1, high=10.0, log=True),
    log_proba=lambda logits: logits.log_softmax(1),
)


def test_every_form_of_a_loss_is_trained_and_saved(tmp_path: Path) -> None:
    """In worker processes too, which have not imported this module under its name."""
    losses = ["cross-entropy", Brier, absolute, Doubled(), HINGE]
    made = compare_losses(X, Y, losses=losses, **SMALL | {"jobs": 2}, tune=1)
    names = [f"{__name__}:Brier", f"{__name__}:absolute", f"{__name__}:Doubled", "hinge"]
    assert list(made.table["loss"]) == ["cross-entropy", *names]
    assert made.table["knob"].dropna().tolist() == [1.0]
    assert list(made.summary.index[1:]) == [
        "Cross-entropy",
        "Brier",
        "absolute",
        "Doubled",
        "Hinge",
    ]
    model = made.model(names[2])
    logits = torch.from_numpy(model.logits(X)).double()
    expected = ((2 * logits).log_softmax(1) / model.temperature).softmax(1)
    np.testing.assert_allclose(model.predict_proba(X), expected)
    # By name, from a command or a file, the same loss gives the same run.
    again = compare_losses(X, Y, losses=["cross-entropy", f"{names[0]}(factor=1)"], **SMALL)
    same = compare_losses(X, Y, losses=["cross-entropy", Brier], **SMALL)
    assert again.table["nll"].tolist() == same.table["nll"].tolist()


def test_with_a_common_gradient_scale_a_factor_changes_nothing() -> None:
    name = register(Brier)
    losses = [f"{name}(factor={factor})" for factor in (1, 8)]
    made = compare_losses(X, Y, losses=["cross-entropy", *losses], **SMALL, optimizer="sgd")
    first, second = made.table["nll"][1:]
    assert first == pytest.approx(second, rel=1e-6)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.gradient_scale])
@pytest.mark.parametrize("classes", [2, 7])
def test_the_measured_scale_equals_the_registered_one(name: str, classes: int) -> None:
    loss = LOSSES[name]
    context = Context(classes, steps_total=6, steps_per_epoch=2)
    criterion = loss.build(parse_loss(name).untuned, context)
    assert loss.gradient_scale is not None
    expected = loss.gradient_scale(criterion, classes)
    assert measured_scale(criterion, classes) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda f, y: f.sum(1), r"a tensor of no dimension, got shape \(12,\)"),
        (lambda f, y: 3.0, "a tensor of no dimension, got float"),
        (lambda f, y: f.sum() * math.nan, "expected a finite loss, got nan"),
        (lambda f, y: f.detach().sum(), "one without a gradient"),
        (lambda f, y: (f - f).sum().sqrt(), "expected a finite gradient, got NaN"),
        (lambda f, y: -F.cross_entropy(f, y), "is -1 times that of cross-entropy"),
        (lambda f, y: 1 / 0, "failed on logits of shape .*ZeroDivisionError"),
        (lambda: 3, "returned int, expected an nn.Module"),
        (7, "expected a criterion, its class, a function, .* got int"),
        (
            Loss("odd", "Odd", HINGE.build, HINGE.knob, log_proba=lambda f: f.sum(1)),
            "a link that keeps the shape",
        ),
        (
            Loss("odd", "Odd", HINGE.build, HINGE.knob, log_proba=lambda f: f),
            "a link to log-probabilities, got .* sum",
        ),
        (Loss("penex", "Mine", HINGE.build), "penex is .* of this package"),
    ],
)
def test_a_loss_that_cannot_be_trained_is_refused(loss: Any, message: str) -> None:
    with pytest.raises(CompareError, match=f"^losses: .*{message}"):
        compare_losses(X, Y, losses=["cross-entropy", loss], **SMALL)


@pytest.mark.parametrize(
    ("loss", "consistent"),
    [(Brier, True), (Doubled, True), (penex.PENEX, True), (absolute, False)],
)
def test_fisher_error_distinguishes_correct_from_wrong_links(loss: Any, consistent: bool) -> None:
    assert (fisher_error(loss) < 1e-3) == consistent


# Options in the name of a loss


@pytest.mark.parametrize(
    ("spec", "name", "label", "untuned", "expected"),
    [
        (
            "penex( sensitivity = 0.03, penalty_mode=auto )",
            "penex(sensitivity=0.03,penalty_mode=auto)",
            "PENEX (penalty_mode=auto) α=0.03",
            0.03,
            {"sensitivity": 0.03, "penalty_mode": "auto"},
        ),
        (
            "penex(ema=0.01..0.5,sensitivity=0.2)",
            "penex(ema=0.01..0.5,sensitivity=0.2)",
            "PENEX (sensitivity=0.2)",
            math.sqrt(0.005),
            {"sensitivity": 0.2, "ema": math.sqrt(0.005)},
        ),
        ("focal(gamma=0..4)", "focal(gamma=0..4)", "Focal", 2.0, {"gamma": 2.0}),
        (
            "label-smoothing(smoothing=0.2)",
            "label-smoothing(smoothing=0.2)",
            "Label smoothing ε=0.2",
            0.2,
            {"label_smoothing": 0.2},
        ),
        (
            "log-penex(sensitivity=0.1)",
            "log-penex(sensitivity=0.1)",
            "log-PENEX (sensitivity=0.1)",
            1.0,
            {"sensitivity": 0.1, "power": 1.0},
        ),
    ],
)
def test_options_of_a_loss(
    spec: str, name: str, label: str, untuned: float, expected: dict[str, Any]
) -> None:
    candidate = parse_loss(spec)
    assert (candidate.spec, candidate.label) == (name, label)
    assert candidate.untuned == pytest.approx(untuned)
    criterion = candidate.loss.build(candidate.untuned, CONTEXT)
    assert {option: getattr(criterion, option) for option in expected} == pytest.approx(expected)
    assert configure(losses=[spec]).losses == (name,)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("penex(foo=1)", "unexpected keyword argument 'foo'"),
        ("penex(sensitivity=-1)", "expected penex=NUMBER"),
        ("penex(penalty_mode=wild)", "penalty_mode"),
        ("penex(ema=0..1,sensitivity=0.1..1)", "one option can be tuned, not 2"),
        ("penex(ema=1..0)", "expected ema=LOW..HIGH"),
        ("penex(ema=0.1,ema=0.2)", "an option is repeated"),
        ("penex()", r"expected penex\(OPTION=VALUE, ...\)"),
        ("penex(ema)", r"expected penex\(OPTION=VALUE, ...\)"),
        ("penex(a=../../x)", "expected NAME"),
        ("conex-hard(x=1)", "conex-hard has no options"),
        ("../penex", "expected NAME"),
    ],
)
def test_options_that_are_refused(spec: str, message: str) -> None:
    with pytest.raises(CompareError, match=f"^losses: .*{message}"):
        parse_loss(spec)


def test_the_ranged_option_is_tuned() -> None:
    spec = "penex(ema=0.01..0.5)"
    made = compare_losses(X, Y, losses=["cross-entropy", spec], **SMALL, tune=3, tune_lr=False)
    assert 0.01 <= made.table["knob"][1] <= 0.5


def test_commas_in_parentheses_do_not_separate() -> None:
    assert words("a, b(c=1, d=2),e") == ["a", "b(c=1, d=2)", "e"]
    assert words(None) is None


# Code that a folder names


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Writes a module of a loss that leaves a mark when it is imported."""
    monkeypatch.chdir(tmp_path)

    def write(name: str) -> Path:
        mark = tmp_path / f"{name}-was-here"
        (tmp_path / f"{name}.py").write_text(
            "from pathlib import Path\n"
            "from torch.nn import CrossEntropyLoss\n"
            f"Path({str(mark)!r}).touch()\n"
            "def mine(factor=1.0):\n    return CrossEntropyLoss(label_smoothing=0.0 * factor)\n"
        )
        return mark

    return write


def test_a_module_is_imported_where_the_user_names_it(module: Callable[[str], Path]) -> None:
    mark = module("own_loss_a")
    config = configure(data="iris", losses=["cross-entropy", "own_loss_a:mine(factor=2)"])
    assert mark.exists()
    assert parse_loss(config.losses[1]).label == "mine (factor=2)"
    with pytest.raises(CompareError, match="cannot import no_such_module"):
        configure(losses=["no_such_module:mine"])
    with pytest.raises(CompareError, match="own_loss_a has no attribute other"):
        configure(losses=["own_loss_a:other"])


def test_a_received_folder_runs_no_code_unless_it_is_trusted(
    module: Callable[[str], Path], tmp_path: Path
) -> None:
    made = compare_losses(X, Y, losses=["cross-entropy", Brier], **SMALL, out=tmp_path / "out")
    saved = made.model(f"{__name__}:Brier").save(tmp_path / "model")
    mark = module("own_loss_b")
    for path in (tmp_path / "out" / "comparison.json", saved / "model.json"):
        path.write_text(path.read_text().replace(f"{__name__}:Brier", "own_loss_b:mine"))
    for folder in (tmp_path / "out", saved):
        with pytest.raises(CompareError, match="own_loss_b:mine is user-defined"):
            _ = load(folder).best
    assert not mark.exists()
    assert load(saved, trust=True).best.loss == "own_loss_b:mine"
    assert mark.exists()
    assert json.loads((saved / "model.json").read_text())["loss"] == "own_loss_b:mine"


def test_entries_take_the_given_name() -> None:
    loss = user_loss("hinge", HINGE)
    check(loss)
    assert loss.name == "hinge"
