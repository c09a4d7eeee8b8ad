"""penex.integrations.sklearn: scikit-learn's own checks, and what they do not look at."""
# ruff: noqa: N806

import copy
import doctest
import pickle
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from scipy.special import softmax
from scipy.stats import entropy
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_breast_cancer, load_digits, make_classification
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss
from sklearn.model_selection import GridSearchCV, cross_val_score, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator
from torch import nn

import penex
from penex.integrations.sklearn import PENEXClassifier

LOSSES = ("penex", "cross-entropy", "label-smoothing", "confidence-penalty", "focal")
each_loss = pytest.mark.parametrize("loss", LOSSES)


def network(n_features: int, n_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(n_features, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, n_classes)
    )


def normalised(n_features: int, n_classes: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(n_features), nn.Linear(n_features, n_classes))


def data(classes: int = 3, rows: int = 60, seed: int = 0) -> tuple[Any, Any]:
    return make_classification(
        rows, 6, n_informative=4, n_classes=classes, class_sep=0.7, random_state=seed
    )


def quick(**options: Any) -> PENEXClassifier:
    defaults = {"hidden_layer_sizes": (8,), "max_iter": 5, "tol": None, "random_state": 0}
    if "module" in options:
        del defaults["hidden_layer_sizes"]
    return PENEXClassifier(**{**defaults, **options})


def weights_of(classifier: PENEXClassifier) -> list[Any]:
    return [parameter.detach().numpy() for parameter in classifier.model_.parameters()]


def assert_same(one: PENEXClassifier, other: PENEXClassifier) -> None:
    """To the bit."""
    for mine, theirs in zip(weights_of(one), weights_of(other), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """So small matrices are not worth a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# 1. scikit-learn's checks, with few epochs for the time they take.


CHECKS = [
    pair
    for options in ({}, {"module": nn.Linear, "loss": "focal"})
    for pair in estimator_checks_generator(
        PENEXClassifier(max_iter=25, learning_rate_init=0.01, **options)
    )
]


def name_of(part: Any) -> str:
    if isinstance(part, PENEXClassifier):
        return part.loss
    return str(getattr(part, "func", part).__name__)


@pytest.mark.parametrize(("estimator", "check"), CHECKS, ids=name_of)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_estimator(estimator: Any, check: Any) -> None:
    check(estimator)


# 2. The losses are minimised, and the probabilities are theirs.


def groups() -> tuple[Any, Any, Any]:
    """A linear model on indicators fits each group's frequencies exactly."""
    counts = np.array([[6, 3, 1], [2, 2, 9], [4, 1, 5]])
    group, label = (index.ravel() for index in np.indices(counts.shape))
    repeats = counts.ravel()
    return np.eye(3)[group.repeat(repeats)], label.repeat(repeats), counts


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sensitivity": 0.1}, lambda n: n),
        ({"sensitivity": 1.5}, lambda n: n),
        ({"class_weight": {0: 1, 1: 5, 2: 0.5}}, lambda n: n * [1, 5, 0.5]),
        ({"class_weight": "balanced", "sensitivity": 0.4}, lambda n: n / n.sum(0)),
        ({"loss": "cross-entropy"}, lambda n: n),
        ({"loss": "label-smoothing", "loss_strength": 0.3}, lambda n: n),
        (
            {"loss": "label-smoothing", "class_weight": {0: 1, 1: 5, 2: 0.5}},
            lambda n: n * [1, 5, 0.5],
        ),
        ({"loss": "focal", "loss_strength": 2.0}, lambda n: n),
        ({"loss": "confidence-penalty", "loss_strength": 0.5}, lambda n: n),
    ],
)
def test_probabilities_are_the_frequencies(options: dict[str, Any], expected: Any) -> None:
    X, y, counts = groups()
    classifier = quick(hidden_layer_sizes=(), max_iter=400, learning_rate_init=0.05, **options)
    found = classifier.fit(X, y).predict_proba(np.eye(3))
    expected = expected(counts)
    np.testing.assert_allclose(found, expected / expected.sum(1, keepdims=True), atol=2e-3)


@pytest.mark.parametrize("loss", ["penex", "cross-entropy"])
def test_weights_count_in_small_batches_too(loss: str) -> None:
    """Divided by the weights of its own batch, the heavy row would be outvoted: p = 0.1."""
    X, y = np.ones((40, 1)), np.arange(40) == 7
    classifier = quick(
        loss=loss, hidden_layer_sizes=(), batch_size=4, max_iter=120, learning_rate_init=0.005
    )
    classifier.fit(X, y, sample_weight=np.where(y, 39.0, 1.0))
    assert classifier.predict_proba([[1.0]])[0, 1] == pytest.approx(0.5, abs=0.06)


def test_linear_cross_entropy_is_logistic_regression() -> None:
    X, y = data(rows=200)
    peer = LogisticRegression(C=1e9, max_iter=1000, solver="newton-cg").fit(X, y)
    classifier = quick(
        loss="cross-entropy", hidden_layer_sizes=(), max_iter=600, learning_rate_init=0.05
    )
    found = classifier.fit(X, y).predict_proba(X)
    np.testing.assert_allclose(found, peer.predict_proba(X), atol=1e-3)


@each_loss
@pytest.mark.parametrize("classes", [2, 3])
def test_probabilities_are_those_of_the_logits(loss: str, classes: int) -> None:
    X, y = data(classes)
    classifier = quick(loss=loss, sensitivity=0.7).fit(X, y)
    with torch.no_grad():
        logits = classifier.model_(torch.tensor(X)).numpy()
    probabilities = classifier.predict_proba(X)
    p = softmax(logits * (1.7 if loss == "penex" else 1.0), 1)
    expected = {
        "label-smoothing": p - 0.1 / classes,
        "confidence-penalty": p * (1 + 0.1 * (np.log(p) + entropy(p, axis=1, keepdims=True))),
        "focal": p / ((1 - p) ** 2 - 2 * (1 - p) * p * np.log(p)),
    }.get(loss, p)
    assert (expected > 0.01 * p).all()  # so far from the logits' extremes no link is cut off
    expected = expected / expected.sum(1, keepdims=True)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-12)
    np.testing.assert_allclose(np.exp(classifier.predict_log_proba(X)), probabilities, rtol=1e-12)
    np.testing.assert_array_equal(classifier.predict(X), probabilities.argmax(1))
    decision = classifier.decision_function(X)
    if classes == 2:
        assert decision.shape == (60,)
        np.testing.assert_allclose(1 / (1 + np.exp(-decision)), probabilities[:, 1], rtol=1e-12)
    else:
        np.testing.assert_allclose(decision, np.log(probabilities), rtol=1e-12)
    calibrated = penex.inference.Calibrated(classifier.model_, classifier.criterion_)
    with torch.no_grad():
        served = calibrated(torch.tensor(X)).numpy()
    np.testing.assert_allclose(served, probabilities, rtol=1e-12)
    # What it was trained with counts, not what the next fit would use.
    before = classifier.predict_proba(X)
    classifier.set_params(loss="penex", sensitivity=3.0)
    np.testing.assert_array_equal(classifier.predict_proba(X), before)


def test_the_criterion_is_the_one_asked_for() -> None:
    X, y = data()
    for options, kind, name, value in (
        ({}, penex.PENEX, "sensitivity", 0.1),
        ({"sensitivity": 0.4}, penex.PENEX, "sensitivity", 0.4),
        ({"loss": "focal"}, penex.losses.FocalLoss, "gamma", 2.0),
        ({"loss": "focal", "loss_strength": 1}, penex.losses.FocalLoss, "gamma", 1.0),
        ({"loss": "confidence-penalty"}, penex.losses.ConfidencePenaltyLoss, "strength", 0.1),
    ):
        criterion = quick(max_iter=1, **options).fit(X, y).criterion_
        assert isinstance(criterion, kind)
        assert getattr(criterion, name) == value


# 3. Weights of samples.


@each_loss
@pytest.mark.parametrize("class_weight", [None, "balanced", {0: 0.5, 1: 2.0, 2: 1.0}])
def test_a_weight_is_so_many_rows(loss: str, class_weight: Any) -> None:
    X, y = data()
    count = np.random.default_rng(0).integers(0, 4, len(y))
    classifier = quick(loss=loss, class_weight=class_weight, max_iter=100)
    weighted = clone(classifier).fit(X, y, sample_weight=count * 0.25)
    repeated = clone(classifier).fit(X.repeat(count, 0), y.repeat(count))
    for mine, theirs in zip(weights_of(weighted), weights_of(repeated), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(weighted.loss_curve_, repeated.loss_curve_, rtol=1e-9)
    if loss == "penex":
        torch.testing.assert_close(weighted.criterion_.penalty, repeated.criterion_.penalty)


@pytest.mark.parametrize("early_stopping", [False, True])
def test_weight_zero_is_no_row(early_stopping: bool) -> None:
    X, y = data()
    keep = np.random.default_rng(0).random(len(y)) < 0.7
    strange = np.where(keep, y, 9)  # a class without any weight is none
    classifier = quick(
        batch_size=7,
        early_stopping=early_stopping,
        validation_fraction=0.2,
        class_weight={0: 2.0},
    )
    zeros = clone(classifier).fit(X, strange, sample_weight=keep.astype(int))
    dropped = clone(classifier).fit(X[keep], y[keep])
    assert_same(zeros, dropped)
    assert zeros.classes_.tolist() == [0, 1, 2]


def test_a_class_of_weight_zero_is_still_a_class() -> None:
    X, y = data()
    classifier = quick(class_weight={1: 0.0}, max_iter=50, learning_rate_init=0.02).fit(X, y)
    assert classifier.classes_.tolist() == [0, 1, 2]
    assert 1 not in classifier.predict(X)


def test_score_weighs() -> None:
    X, y = data()
    classifier = quick().fit(X, y)
    weight = np.random.default_rng(0).random(len(y))
    expected = accuracy_score(y, classifier.predict(X), sample_weight=weight)
    assert classifier.score(X, y, sample_weight=weight) == expected


# 4. Random numbers.


@pytest.mark.parametrize("options", [{}, {"module": network}])
@pytest.mark.parametrize("early_stopping", [False, True])
def test_random_state(options: dict[str, Any], early_stopping: bool) -> None:
    X, y = data()
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    classifier = quick(batch_size=16, early_stopping=early_stopping, **options)
    one = clone(classifier).fit(X, y)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    torch.rand(3)
    assert_same(one, clone(classifier).fit(X, y))
    assert_same(one, one.fit(X, y))
    random = np.random.RandomState(0)
    assert_same(one, clone(classifier).set_params(random_state=random).fit(X, y))
    other = clone(classifier).set_params(random_state=1).fit(X, y)
    assert not np.array_equal(weights_of(one)[0], weights_of(other)[0])


# 5. partial_fit and warm_start.


def test_partial_fit_is_an_epoch() -> None:
    X, y = data()
    whole = quick(batch_size=16, max_iter=3).fit(X, y)
    parts = quick(batch_size=16)
    for _ in range(3):
        parts.partial_fit(X, y, classes=[2, 1, 0])
        parts = pickle.loads(pickle.dumps(parts))
    assert_same(whole, parts)
    assert whole.loss_curve_ == parts.loss_curve_
    assert whole.n_iter_ == parts.n_iter_ == 3


def test_partial_fit_takes_what_comes() -> None:
    X, y = data()
    classifier = quick(learning_rate_init=0.01)
    for _ in range(20):
        for label in range(3):
            classifier.partial_fit(X[y == label], y[y == label], classes=np.arange(3))
    assert classifier.score(X, y) > 0.6
    with pytest.raises(ValueError, match=r"classes: expected those of the first call, \[0, 1, 2\]"):
        classifier.partial_fit(X, y, classes=[0, 1])
    with pytest.raises(ValueError, match=r"y: expected labels among .* got \[7\]"):
        classifier.partial_fit(X, np.full_like(y, 7))
    with pytest.raises(ValueError, match="features"):
        classifier.partial_fit(X[:, 1:], y)
    with pytest.raises(ValueError, match="first call"):
        quick().partial_fit(X, y)
    with pytest.raises(ValueError, match="two classes or more"):
        quick().partial_fit(X, np.zeros(60), classes=[0])
    with pytest.raises(ValueError, match="early_stopping: partial_fit"):
        quick(early_stopping=True).partial_fit(X, y, classes=[0, 1, 2])
    with pytest.raises(ValueError, match="class_weight: partial_fit"):
        quick(class_weight="balanced").partial_fit(X, y, classes=[0, 1, 2])


def test_partial_fit_reads_changed_parameters() -> None:
    X, y = data()
    classifier = quick().partial_fit(X, y, classes=[0, 1, 2])
    penalty = classifier.criterion_.penalty.clone()
    before = copy.deepcopy(classifier)
    classifier.set_params(learning_rate_init=1e-12).partial_fit(X, y)
    np.testing.assert_allclose(weights_of(classifier)[0], weights_of(before)[0], rtol=1e-6)
    assert classifier.criterion_.penalty != penalty  # goes on, from where it was
    classifier.set_params(sensitivity=0.9).partial_fit(X, y)
    fresh = penex.functional.estimate_penalty(
        before.model_(torch.tensor(X)), torch.tensor(y), sensitivity=0.9
    )
    torch.testing.assert_close(classifier.criterion_.penalty, fresh.float())
    assert classifier.criterion_.sensitivity == 0.9


def test_warm_start_goes_on() -> None:
    X, y = data()
    classifier = quick(warm_start=True, max_iter=30).fit(X, y)
    first = classifier.loss_curve_
    classifier.fit(X, y)
    assert classifier.n_iter_ == 30
    assert classifier.loss_curve_[0] < first[-1]
    with pytest.raises(ValueError, match="classes of the first fit"):
        classifier.fit(X, y + 1)
    with pytest.raises(ValueError, match="the existing network"):
        classifier.set_params(hidden_layer_sizes=(9,)).fit(X, y)
    classifier.set_params(hidden_layer_sizes=(8,), loss="focal").fit(X, y)
    assert isinstance(classifier.criterion_, penex.losses.FocalLoss)
    # Without it, a fit begins anew.
    classifier.set_params(warm_start=False, loss="penex").fit(X[:, :4], y + 1)
    assert_same(classifier, quick(max_iter=30).fit(X[:, :4], y + 1))


# 6. When training stops.


@pytest.mark.parametrize("options", [{}, {"module": network}])
def test_early_stopping_keeps_the_best(options: dict[str, Any]) -> None:
    X, y = data(rows=150)
    weight = np.random.default_rng(0).random(150)
    classifier = quick(
        early_stopping=True,
        learning_rate_init=0.03,
        validation_fraction=0.2,
        max_iter=300,
        tol=0.0,
        **options,
    ).fit(X, y, sample_weight=weight)
    scores = classifier.validation_scores_
    assert len(scores) == len(classifier.loss_curve_) == classifier.n_iter_ < 300
    best = int(np.argmax(scores))
    assert best == len(scores) - 12  # 10 epochs are tolerated, the next is not
    random = np.random.RandomState(0)
    _, held = train_test_split(np.arange(150), test_size=0.2, stratify=y, random_state=random)
    found = log_loss(y[held], classifier.predict_proba(X[held]), sample_weight=weight[held])
    assert found == pytest.approx(-scores[best], rel=1e-9)
    assert not hasattr(classifier.set_params(early_stopping=False).fit(X, y), "validation_scores_")


@pytest.mark.parametrize("sensitivity", [0.01, 1.0])
def test_training_goes_on_while_the_model_improves(sensitivity: float) -> None:
    """The value of PENEX itself is smallest after some 20 epochs here."""
    X, y = load_breast_cancer(return_X_y=True)
    classifier = PENEXClassifier(sensitivity=sensitivity, max_iter=80, random_state=0)
    X = StandardScaler().fit_transform(X)
    with pytest.warns(ConvergenceWarning, match="after 80 epochs"):
        classifier.fit(X, y)
    assert classifier.n_iter_ == 80
    assert np.all(np.diff(classifier.loss_curve_[:40]) < 0)


@each_loss
def test_the_curve_is_the_log_loss(loss: str) -> None:
    X, y = data()
    weight = np.random.default_rng(0).random(len(y))
    classifier = quick(loss=loss, sensitivity=2.0, batch_size=16, learning_rate_init=1e-14)
    classifier.fit(X, y, sample_weight=weight)
    expected = log_loss(y, classifier.predict_proba(X), sample_weight=weight)
    np.testing.assert_allclose(classifier.loss_curve_, [expected] * 5, rtol=1e-9)


def test_tol() -> None:
    X, y = data()
    classifier = quick(tol=10.0, n_iter_no_change=3, max_iter=50).fit(X, y)
    assert classifier.n_iter_ == 5  # the first sets the mark, three are tolerated
    assert quick(tol=None, n_iter_no_change=1, max_iter=20).fit(X, y).n_iter_ == 20


def test_divergence_is_an_error() -> None:
    X, y = data()
    with pytest.raises(ValueError, match=r"diverged in epoch 1.*Standardise"):
        quick().fit(X * 1e200, y)


def test_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    X, y = data()
    classifier = quick(verbose=True, early_stopping=True, max_iter=2).fit(X, y)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == (
        f"Epoch 2: log-loss {classifier.loss_curve_[1]:.6f}, "
        f"of the rows held out {-classifier.validation_scores_[1]:.6f}"
    )
    assert len(lines) == 2
    quick().fit(X, y)
    assert capsys.readouterr().out == ""


# 7. Inputs.


@pytest.mark.parametrize("kind", ["csr_matrix", "csr_array", "csc_array", "coo_array"])
def test_sparse_is_dense(kind: str) -> None:
    X, y = data()
    X[np.abs(X) < 0.5] = 0
    sparse = getattr(scipy.sparse, kind)(X)
    one, other = quick(batch_size=16).fit(X, y), quick(batch_size=16).fit(sparse, y)
    assert_same(one, other)
    np.testing.assert_array_equal(one.predict_proba(X), other.predict_proba(sparse))


def test_sparse_is_made_dense_by_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = data()
    rows = []
    toarray = scipy.sparse.csr_array.toarray

    def spy(self: Any, *args: Any, **keywords: Any) -> Any:
        rows.append(self.shape[0])
        return toarray(self, *args, **keywords)

    monkeypatch.setattr(scipy.sparse.csr_array, "toarray", spy)
    classifier = quick(batch_size=16, early_stopping=True, validation_fraction=0.5)
    classifier.fit(scipy.sparse.csr_array(X), y).predict(scipy.sparse.csr_array(X))
    assert max(rows) == 16


def test_float32_stays() -> None:
    X, y = data()
    classifier = quick().fit(X.astype(np.float32), y)
    assert weights_of(classifier)[0].dtype == np.float32
    assert classifier.predict_proba(X).dtype == np.float32
    for method in ("decision_function", "predict_log_proba"):
        assert getattr(classifier, method)(X).dtype == np.float32
    assert quick().fit(X.astype(np.float16), y).predict_proba(X).dtype == np.float64


def test_frames_and_strings() -> None:
    X, y = data()
    names = np.array(["low", "mid", "top"])[y]
    frame = pd.DataFrame(X, columns=list("abcdef"))
    plain = quick().fit(X, y)
    for labels in (names, names.astype(object), pd.Series(names), pd.Series(names, dtype=object)):
        classifier = quick().fit(frame, labels)
        assert_same(plain, classifier)
        assert classifier.feature_names_in_.tolist() == list("abcdef")
        assert classifier.classes_.tolist() == ["low", "mid", "top"]
        expected = np.array(["low", "mid", "top"])[plain.predict(X)]
        np.testing.assert_array_equal(classifier.predict(frame), expected)
        weights = {"low": 2.0, "top": 0.5}
        weighted = quick(class_weight=weights).partial_fit(frame, labels, classes=list(set(names)))
        numbers = quick(class_weight={0: 2.0, 2: 0.5}).partial_fit(X, y, classes=[0, 1, 2])
        assert_same(weighted, numbers)
    with pytest.raises(ValueError, match="feature names"):
        classifier.predict(frame[list("fedcba")])
    assert quick().fit(X, y > 0).predict(X).dtype == bool


# 8. A network of one's own.


def test_a_module_may_learn_from_batches_of_two_alone() -> None:
    X, y = data(rows=33)
    classifier = quick(module=normalised, batch_size=16).fit(X, y)  # 16 + 16 + 1
    assert not classifier.model_.training
    np.testing.assert_allclose(
        classifier.predict_proba(X[:1]), classifier.predict_proba(X)[:1], rtol=1e-12
    )


def test_dropout_differs_from_call_to_call() -> None:
    """partial_fit goes on in the sequence of random numbers, rather than beginning it again."""
    X, y = data()
    classifier = quick(module=lambda n, k: nn.Sequential(nn.Dropout(), nn.Linear(n, k)))
    masks = []
    classifier.partial_fit(X, y, classes=[0, 1, 2])
    classifier.model_[0].register_forward_hook(
        lambda module, args, output: masks.append(output == 0) if module.training else None
    )
    classifier.partial_fit(X, y).partial_fit(X, y)
    assert len(masks) == 2
    assert not torch.equal(*masks)


def test_what_is_no_module_is_refused() -> None:
    X, y = data()
    with pytest.raises(TypeError, match="got Sequential"):
        quick(module=network(6, 3)).fit(X, y)
    with pytest.raises(TypeError, match=r"return a nn\.Module, got int"):
        quick(module=lambda n, k: n + k).fit(X, y)
    with pytest.raises(
        ValueError, match=r"module: expected logits of shape \(60, 3\), got \(60, 2"
    ):
        quick(module=lambda n, k: nn.Linear(n, 2)).fit(X, y)
    with pytest.raises(ValueError, match="a module has its own layers"):
        quick(module=network).set_params(hidden_layer_sizes=(8,)).fit(X, y)


# 9. Refusals.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss": "hinge"}, ValueError, "loss: expected one of 'penex'"),
        ({"sensitivity": 0}, ValueError, "sensitivity"),
        ({"loss_strength": 0.1}, ValueError, "loss_strength: 'penex' has none, but sensitivity"),
        ({"loss": "cross-entropy", "loss_strength": 1}, ValueError, "'cross-entropy' has none;"),
        ({"loss": "label-smoothing", "loss_strength": 1.1}, ValueError, r"\[0, 1\], got 1.1"),
        ({"loss": "focal", "loss_strength": -1}, ValueError, "loss_strength"),
        ({"hidden_layer_sizes": 8.0}, TypeError, "hidden_layer_sizes: expected an int"),
        ({"hidden_layer_sizes": (8, 0)}, ValueError, "hidden_layer_sizes: expected at least 1"),
        ({"batch_size": 0}, ValueError, "batch_size: expected at least 1, got 0"),
        ({"batch_size": "full"}, TypeError, "batch_size: expected an int, got str"),
        ({"max_iter": True}, TypeError, "max_iter: expected an int, got bool"),
        ({"n_iter_no_change": 0}, ValueError, "n_iter_no_change"),
        ({"learning_rate_init": 0.0}, ValueError, "learning_rate_init"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay"),
        ({"tol": -1e-4}, ValueError, "tol"),
        ({"validation_fraction": 0.0}, ValueError, "validation_fraction"),
        ({"class_weight": "even"}, ValueError, "class_weight"),
        ({"class_weight": {0: -1.0}}, ValueError, "class_weight: expected finite weights >= 0"),
        ({"class_weight": {0: 0, 1: 0, 2: 0}}, ValueError, "class_weight: expected a row"),
    ],
)
def test_parameters_are_checked(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    X, y = data()
    with pytest.raises(error, match=message):
        quick(**options).fit(X, y)


def test_inputs_are_checked() -> None:
    X, y = data()
    for weight, message in (
        (np.ones(59), r"shape \(60,\), got \(59,\)"),
        (-np.ones(60), "expected weights >= 0, got -1"),
        (np.zeros(60), "all are zero"),
        (np.full(60, np.nan), "sample_weight contains NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            quick().fit(X, y, sample_weight=weight)
    with pytest.raises(ValueError, match="got 1 class"):
        quick().fit(X, np.zeros(60))
    with pytest.raises(NotFittedError):
        quick().predict(X)


# 10. In the company of scikit-learn.


def test_parameters_are_parameters() -> None:
    sizes = quick(hidden_layer_sizes=np.int64(8), batch_size=np.int64(16))
    X, y = data()
    assert_same(sizes.fit(X, y), quick(hidden_layer_sizes=[8], batch_size=16).fit(X, y))


def test_grid_search_over_losses() -> None:
    X, y = data()
    pipeline = make_pipeline(StandardScaler(), quick(max_iter=30, learning_rate_init=0.01))
    grid = [
        {"penexclassifier__sensitivity": [0.05, 1.0]},
        {
            "penexclassifier__loss": ["label-smoothing", "focal"],
            "penexclassifier__loss_strength": [None, 0.5],
        },
    ]
    search = GridSearchCV(pipeline, grid, scoring="neg_log_loss", cv=2).fit(X, y)
    scores = search.cv_results_["mean_test_score"]
    assert len(set(scores)) == 6  # every point is another model
    assert search.best_estimator_.score(X, y) > 0.6


def test_calibrated_classifier() -> None:
    X, y = data(rows=120)
    for method in ("sigmoid", "isotonic"):
        calibrated = CalibratedClassifierCV(quick(max_iter=30), method=method, cv=3).fit(X, y)
        np.testing.assert_allclose(calibrated.predict_proba(X).sum(1), 1)


def test_cross_validation_in_processes() -> None:
    X, y = data()
    scores = [cross_val_score(quick(), X, y, cv=2, n_jobs=jobs) for jobs in (1, 2)]
    np.testing.assert_array_equal(*scores)


def test_threads_do_not_disturb_each_other() -> None:
    X, y = data()
    with joblib.parallel_config(backend="threading", n_jobs=4):
        scores = cross_val_score(quick(max_iter=20), X, y, cv=6, scoring="neg_log_loss")
    alone = cross_val_score(quick(max_iter=20), X, y, cv=6, scoring="neg_log_loss")
    np.testing.assert_array_equal(scores, alone)


@pytest.mark.parametrize("module", [None, network])
def test_pickles(module: Any, tmp_path: Path) -> None:
    X, y = data()
    classifier = quick(module=module) if module else quick()
    pickle.loads(pickle.dumps(classifier)).fit(X, y)
    expected = classifier.fit(X, y).predict_proba(X)
    joblib.dump(classifier, tmp_path / "classifier.joblib")
    for again in (
        pickle.loads(pickle.dumps(classifier)),
        joblib.load(tmp_path / "classifier.joblib"),
        copy.deepcopy(classifier),
    ):
        np.testing.assert_array_equal(again.predict_proba(X), expected)
        again.set_params(warm_start=True).fit(X, y)  # its network is its own
    np.testing.assert_array_equal(classifier.predict_proba(X), expected)
    assert not hasattr(clone(classifier), "model_")


def test_digits() -> None:
    X, y = load_digits(return_X_y=True)
    train, test, train_y, test_y = train_test_split(X, y, random_state=0, stratify=y)
    pipeline = make_pipeline(
        StandardScaler(), PENEXClassifier(random_state=0, learning_rate_init=0.005, max_iter=30)
    )
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        pipeline.fit(train, train_y)
    assert pipeline.score(test, test_y) > 0.96
    assert log_loss(test_y, pipeline.predict_proba(test)) < 0.12


def test_docstring_example() -> None:
    failed, attempted = doctest.testmod(sys.modules[PENEXClassifier.__module__])
    assert attempted > 0
    assert failed == 0


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    X, y = data()
    state = torch.cuda.get_rng_state()
    for options in ({}, {"module": network}, {"early_stopping": True}):
        classifier = quick(device="cuda", **options).fit(X, y)
        again = quick(device="cuda", **options).fit(X, y)
        assert torch.equal(torch.cuda.get_rng_state(), state)
        assert next(classifier.model_.parameters()).is_cpu
        np.testing.assert_allclose(weights_of(classifier)[0], weights_of(again)[0])
        if options != {"module": network}:
            cpu = quick(**options).fit(X, y)
            np.testing.assert_allclose(classifier.predict_proba(X), cpu.predict_proba(X), rtol=1e-6)
    classifier = quick(device="cuda").partial_fit(X, y, classes=[0, 1, 2])
    on_cpu = pickle.loads(pickle.dumps(classifier)).set_params(device="cpu").partial_fit(X, y)
    classifier.partial_fit(X, y)
    np.testing.assert_allclose(classifier.predict_proba(X), on_cpu.predict_proba(X), rtol=1e-6)
