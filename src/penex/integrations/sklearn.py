r"""A scikit-learn classifier trained with PENEX.

Between calls, the tensors of a classifier are on the CPU, so that it can be pickled and loaded on
any machine.
"""
# ruff: noqa: N803, N806  # X is scikit-learn's name

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penex._extras import need
from penex._inputs import choice, count, number, positive, smooth
from penex.inference import link
from penex.losses import PENEX, ConfidencePenaltyLoss, FocalLoss

need("penex.integrations.sklearn", "sklearn", "numpy", "sklearn")

import numpy as np  # noqa: E402
from numpy.typing import ArrayLike, NDArray  # noqa: E402
from sklearn.base import BaseEstimator, ClassifierMixin  # noqa: E402
from sklearn.exceptions import ConvergenceWarning  # noqa: E402
from sklearn.model_selection import train_test_split  # noqa: E402
from sklearn.utils import check_array, check_random_state, gen_batches  # noqa: E402
from sklearn.utils.class_weight import compute_class_weight  # noqa: E402
from sklearn.utils.multiclass import check_classification_targets  # noqa: E402
from sklearn.utils.validation import check_is_fitted, validate_data  # noqa: E402

__all__ = ["PENEXClassifier"]

_STRENGTHS = {"label-smoothing": 0.1, "confidence-penalty": 0.1, "focal": 2.0}
_LOSSES = ("penex", "cross-entropy", *_STRENGTHS)
_HIDDEN = (100,)


class PENEXClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    r"""A multi-layer perceptron, or a network of your own, trained with PENEX.

    Its probabilities are those of the loss, :math:`\operatorname{softmax}((1+\alpha) f)` for PENEX
    and :func:`penex.inference.link` for the others. Parameters shared with
    :class:`sklearn.neural_network.MLPClassifier` have its names and defaults; the activation is
    ReLU and the optimizer AdamW.

    Inputs are not scaled. Networks need features on a similar scale, so put a
    :class:`~sklearn.preprocessing.StandardScaler` before the classifier in a pipeline. float32
    input is computed in float32, any other in float64; sparse matrices are made dense one batch at
    a time.

    Training stops when the log-loss of the predicted probabilities, rather than the value of the
    loss, has not improved by `tol` for `n_iter_no_change` epochs: PENEX's own value may rise while
    the model improves, because :math:`\rho` moves. The log-loss is that of the training rows, each
    evaluated when its batch is trained on; with `early_stopping`, that of the held-out rows.

    Sample weights are relative to each other. A weight multiplies the row's term in the loss and,
    for PENEX, in the sums that estimate :math:`\rho`; so a row of weight two is equivalent to two
    rows if all rows are in one batch, and a row of weight zero is ignored.

    Args:
        hidden_layer_sizes: Widths of the hidden layers; ``()`` is a linear model.
        loss: ``"penex"``, ``"cross-entropy"``, ``"label-smoothing"``, ``"confidence-penalty"`` or
            ``"focal"``.
        sensitivity: PENEX's :math:`\alpha > 0`; ignored by other losses.
        loss_strength: Smoothing :math:`\varepsilon` (None: 0.1), weight of the confidence penalty
            :math:`\beta` (None: 0.1) or focal :math:`\gamma` (None: 2). Must be None for losses
            without such a parameter.
        learning_rate_init: Learning rate, constant.
        weight_decay: Decoupled weight decay of all parameters (AdamW).
        batch_size: Rows in a batch; ``"auto"`` is 200. A single leftover row joins the batch
            before it.
        max_iter: Maximum number of epochs.
        tol: Smallest improvement of the log-loss that counts as one. None: always train for
            `max_iter` epochs.
        n_iter_no_change: Number of epochs without improvement that are tolerated.
        early_stopping: Hold out a stratified part of the rows, and keep the weights of the epoch
            with the lowest log-loss on it. Not supported by :meth:`partial_fit`.
        validation_fraction: Share of the rows to hold out.
        class_weight: ``{label: weight}``, or ``"balanced"`` for equal total weights of the classes
            (not supported by :meth:`partial_fit`); multiplies the sample weights.
        module: A function ``(n_features, n_classes) -> nn.Module`` in place of the perceptron. The
            module maps (N, n_features) to logits (N, n_classes); it is cast to the dtype of the
            input. Operations on whole batches, such as batch normalisation, ignore sample weights.
        warm_start: Whether :meth:`fit` continues from the current weights. The classes must be the
            same.
        device: Where to compute, such as ``"cuda"``. Batches are moved one at a time.
        random_state: Seed or numpy ``RandomState``. The state of torch's own generators is kept;
            with a `module`, provided that no other thread draws from them meanwhile.
        verbose: Whether to print a line after every epoch.

    Attributes:
        classes_: The sorted labels, in the order of the columns of the probabilities.
        n_features_in_: Number of features.
        feature_names_in_: Names of the features, if X had column names.
        model_: The network, on the CPU in evaluation mode; returns logits :math:`f`.
        criterion_: The loss, with PENEX's penalty in ``criterion_.penalty``;
            ``penex.inference.Calibrated(model_, criterion_)`` returns probabilities.
        n_iter_: Number of epochs trained.
        loss_curve_: Log-loss of the training rows in each epoch, comparable between losses.
        validation_scores_: Negative log-loss of the held-out rows after each epoch; only with
            `early_stopping`.

    Raises:
        TypeError, ValueError: A parameter or input is not as described; raised on its first use.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> from sklearn.pipeline import make_pipeline
        >>> from sklearn.preprocessing import StandardScaler
        >>> X, y = load_iris(return_X_y=True)
        >>> classifier = PENEXClassifier(learning_rate_init=0.01, max_iter=50, tol=None,
        ...                              random_state=0)
        >>> make_pipeline(StandardScaler(), classifier).fit(X, y).score(X, y) > 0.9
        True
    """

    classes_: NDArray[Any]
    n_features_in_: int
    model_: nn.Module
    criterion_: nn.Module
    n_iter_: int
    loss_curve_: list[float]
    validation_scores_: list[float]
    # State for further training: the random numbers, AdamW's state after partial_fit, and the
    # settings from which the network and the loss were built.
    _random: np.random.RandomState
    _moments: dict[int, dict[str, Tensor]]
    _layers: tuple[Any, tuple[int, ...]]
    _loss: "_Loss"
    _dtype: type[np.floating[Any]]

    def __init__(
        self,
        hidden_layer_sizes: tuple[int, ...] | int = _HIDDEN,
        *,
        loss: str = "penex",
        sensitivity: float = 0.1,
        loss_strength: float | None = None,
        learning_rate_init: float = 0.001,
        weight_decay: float = 0.0,
        batch_size: int | str = "auto",
        max_iter: int = 200,
        tol: float | None = 1e-4,
        n_iter_no_change: int = 10,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        class_weight: dict[Any, float] | str | None = None,
        module: Callable[[int, int], nn.Module] | None = None,
        warm_start: bool = False,
        device: str | torch.device = "cpu",
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.loss = loss
        self.sensitivity = sensitivity
        self.loss_strength = loss_strength
        self.learning_rate_init = learning_rate_init
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.max_iter = max_iter
        self.tol = tol
        self.n_iter_no_change = n_iter_no_change
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.class_weight = class_weight
        self.module = module
        self.warm_start = warm_start
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def fit(self, X: Any, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Train on `X` and `y`, from scratch unless `warm_start`.

        Args:
            X: Features, an array, DataFrame or sparse matrix, shape (N, n_features).
            y: Labels, numbers or strings, shape (N).
            sample_weight: Weights >= 0, shape (N). None: equal weights.

        Returns:
            This classifier.
        """
        loss = self._checked()
        resume = self.warm_start and hasattr(self, "model_")
        X, y = self._validated(X, y, resume)
        weights = _weights(sample_weight, len(y))
        classes = np.unique(y[weights > 0])
        if len(classes) < 2:
            raise ValueError(f"y: expected two classes or more, got 1 class: {classes.tolist()}")
        if resume and not np.array_equal(classes, self.classes_):
            raise ValueError(
                "y: with warm_start, expected the classes of the first fit, "
                f"{self.classes_.tolist()}; got {classes.tolist()}"
            )
        self.classes_ = classes
        self._begin()
        rows = self._weighted(X, y, weights)
        held = None
        if self.early_stopping:
            train, test = train_test_split(
                np.arange(len(rows.labels)),
                test_size=self.validation_fraction,
                stratify=rows.labels,
                random_state=self._random,
            )
            rows, held = rows.part(train), rows.part(test)
            self.validation_scores_ = []
        with self._seeded():
            self._prepare(loss, X.dtype, resume)
            self._train(rows, held)
        return self

    def partial_fit(
        self,
        X: Any,
        y: ArrayLike,
        classes: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
    ) -> Self:
        """Train for one epoch on `X` and `y`, continuing from earlier calls.

        Args:
            X: As in :meth:`fit`.
            y: As in :meth:`fit`; some of the classes may be missing.
            classes: All labels that will ever occur; required in the first call.
            sample_weight: As in :meth:`fit`; relative to the other rows of this call.

        Returns:
            This classifier.
        """
        loss = self._checked()
        if self.early_stopping:
            raise ValueError(
                "early_stopping: partial_fit does one epoch on all of its rows; expected False, "
                f"got {self.early_stopping}"
            )
        if isinstance(self.class_weight, str):
            raise ValueError(
                "class_weight: partial_fit sees a part of the rows, which cannot be balanced; "
                f"expected {{label: weight}} or None, got {self.class_weight!r}"
            )
        resume = hasattr(self, "model_")
        known = self._known_classes(classes, resume)
        X, y = self._validated(X, y, resume)
        if not np.isin(y, known).all():
            raise ValueError(
                f"y: expected labels among the classes {known.tolist()}, got "
                f"{np.setdiff1d(y, known).tolist()}"
            )
        weights = _weights(sample_weight, len(y))
        self.classes_ = known
        rows = self._weighted(X, y, weights)
        if not resume:
            self._begin()
        with self._seeded():
            self._prepare(loss, X.dtype, resume)
            self._train(rows, once=True)
        return self

    def predict(self, X: Any) -> NDArray[Any]:
        """The most probable labels, shape (N)."""
        log_proba = self._log_proba(X)
        labels: NDArray[Any] = self.classes_[log_proba.argmax(1).numpy()]
        return labels

    def predict_proba(self, X: Any) -> NDArray[Any]:
        r"""Probabilities, :math:`\operatorname{softmax}((1+\alpha) f)` for PENEX, shape (N, K)."""
        return _numpy(self._log_proba(X).exp())

    def predict_log_proba(self, X: Any) -> NDArray[Any]:
        """Logarithm of :meth:`predict_proba`, computed in the log domain."""
        return _numpy(self._log_proba(X))

    def decision_function(self, X: Any) -> NDArray[Any]:
        """Log-probabilities, shape (N, K); for two classes log-odds of the second, shape (N)."""
        values = self._log_proba(X)
        return _numpy(values[:, 1] - values[:, 0] if values.shape[1] == 2 else values)

    # Validation of parameters and input.

    def _checked(self) -> "_Loss":
        """Check the parameters that no other library checks, and return the loss."""
        name = choice("loss", self.loss, _LOSSES)
        if self.module is not None:
            if isinstance(self.module, nn.Module) or not callable(self.module):
                raise TypeError(
                    "module: expected a function (n_features, n_classes) -> nn.Module, got "
                    f"{type(self.module).__name__}"
                )
            if self._hidden != _HIDDEN:
                raise ValueError(
                    f"hidden_layer_sizes: a module has its own layers; expected {_HIDDEN}, the "
                    f"default, got {self.hidden_layer_sizes}"
                )
        for size in self._hidden:
            count("hidden_layer_sizes", size)
        if self.batch_size != "auto":
            count("batch_size", self.batch_size)
        count("max_iter", self.max_iter)
        count("n_iter_no_change", self.n_iter_no_change)
        positive("learning_rate_init", self.learning_rate_init)
        number("weight_decay", self.weight_decay, 0.0, math.inf)
        if self.tol is not None:
            number("tol", self.tol, 0.0, math.inf)
        number("validation_fraction", self.validation_fraction, 0.0, 1.0, open_low=True)

        if name in _STRENGTHS:
            most = 1.0 if name == "label-smoothing" else math.inf
            value = _STRENGTHS[name] if self.loss_strength is None else self.loss_strength
            return _Loss(name, number("loss_strength", value, 0.0, most))
        if self.loss_strength is not None:
            instead = ", but sensitivity" if name == "penex" else ""
            raise ValueError(
                f"loss_strength: {name!r} has none{instead}; expected None, "
                f"got {self.loss_strength!r}"
            )
        return _Loss(name, positive("sensitivity", self.sensitivity) if name == "penex" else 0.0)

    @property
    def _hidden(self) -> tuple[int, ...]:
        sizes = self.hidden_layer_sizes
        return tuple(sizes) if isinstance(sizes, Iterable) else (sizes,)

    @property
    def _batch_rows(self) -> int:
        return 200 if self.batch_size == "auto" else int(self.batch_size)

    def _validated(self, X: Any, y: Any, resume: bool) -> tuple[Any, NDArray[Any]]:
        dtype = self._dtype if resume else (np.float64, np.float32)
        X, y = validate_data(self, X, y, accept_sparse="csr", dtype=dtype, reset=not resume)
        check_classification_targets(y)
        return X, y

    def _known_classes(self, classes: ArrayLike | None, resume: bool) -> NDArray[Any]:
        if classes is None:
            if not resume:
                raise ValueError("classes: the first call to partial_fit needs all labels")
            return self.classes_
        known = np.unique(np.asarray(classes))
        if resume and not np.array_equal(known, self.classes_):
            raise ValueError(
                f"classes: expected those of the first call, {self.classes_.tolist()}, got "
                f"{known.tolist()}"
            )
        if len(known) < 2:
            raise ValueError(f"classes: expected two classes or more, got {known.tolist()}")
        return known

    def _weighted(self, X: Any, y: NDArray[Any], weights: NDArray[np.float64]) -> "_Rows":
        """The rows whose weight, multiplied by that of their class, is positive."""
        index = np.flatnonzero(weights)
        y, weights = y[index], weights[index]
        labels = np.searchsorted(self.classes_, y)
        if isinstance(self.class_weight, str) and self.class_weight == "balanced":
            weights = weights / np.bincount(labels, weights, len(self.classes_))[labels]
        elif self.class_weight is not None:
            of_classes = compute_class_weight(self.class_weight, classes=self.classes_, y=y)
            if not (np.isfinite(of_classes) & (of_classes >= 0)).all():
                raise ValueError(
                    f"class_weight: expected finite weights >= 0, got {self.class_weight}"
                )
            weights = weights * of_classes[labels]
        rows = _Rows(X, index, labels, weights).part(np.flatnonzero(weights))
        if not len(rows.labels):
            raise ValueError("class_weight: expected a row with a weight above zero, got none")
        return rows

    # Training.

    def _begin(self) -> None:
        self._random = check_random_state(self.random_state)
        self.n_iter_ = 0
        self.loss_curve_ = []
        self.__dict__.pop("validation_scores_", None)
        self._moments = {}

    @contextlib.contextmanager
    def _seeded(self) -> Iterator[None]:
        """Seed torch's own generators, which a module may draw from, and restore them afterwards.

        The perceptron does not draw from them, so it can be trained in several threads.
        """
        if self.module is None:
            yield
            return
        seed = int(self._random.randint(2**31))
        devices = [torch.device(self.device)] if torch.device(self.device).type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.default_generator.manual_seed(seed)
            for device in devices:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            yield

    def _prepare(self, loss: "_Loss", dtype: np.dtype[Any], resume: bool) -> None:
        """Create the network and the loss, or keep the existing ones where training resumes."""
        layers = self.module, self._hidden
        if not resume:
            self._dtype = dtype.type
            self.model_ = self._network()
        elif layers != self._layers:
            raise ValueError(
                "module, hidden_layer_sizes: training continues with the existing network, of "
                f"{self._layers}; got {layers}"
            )
        if not (resume and loss == self._loss):  # the penalty means nothing to another loss
            self.criterion_ = loss.criterion()
        self._layers, self._loss = layers, loss

    def _network(self) -> nn.Module:
        n_classes = len(self.classes_)
        if self.module is None:
            sizes = [self.n_features_in_, *self._hidden, n_classes]
            network: nn.Module = _perceptron(sizes, self._random)
        else:
            network = self.module(self.n_features_in_, n_classes)
            if not isinstance(network, nn.Module):
                raise TypeError(
                    f"module: expected it to return a nn.Module, got {type(network).__name__}"
                )
        return network.to(torch.float32 if self._dtype == np.float32 else torch.float64)

    def _train(self, rows: "_Rows", held: "_Rows | None" = None, *, once: bool = False) -> None:
        """Train until the log-loss stops improving, or for one epoch if `once`."""
        device = torch.device(self.device)
        model, criterion = self.model_.to(device), self.criterion_.to(device)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=self.learning_rate_init, weight_decay=self.weight_decay
        )
        if self._moments:
            optimizer.load_state_dict({**optimizer.state_dict(), "state": self._moments})
        best, best_weights, waited = math.inf, None, 0
        tol = -math.inf if self.tol is None else self.tol
        for _ in range(1 if once else self.max_iter):
            log_loss = self._epoch(rows, model, criterion, optimizer, device)
            self.n_iter_ += 1
            self.loss_curve_.append(log_loss)
            line = f"Epoch {self.n_iter_}: log-loss {log_loss:.6f}"
            if held is not None:
                log_loss = self._log_loss(held, model, device)
                self.validation_scores_.append(-log_loss)
                line += f", of the rows held out {log_loss:.6f}"
            if self.verbose:
                print(line)  # noqa: T201
            waited = waited + 1 if log_loss > best - tol else 0
            if log_loss < best:
                best = log_loss
                best_weights = None if held is None else copy.deepcopy(model.state_dict())
            if waited > self.n_iter_no_change:
                break
        else:
            if self.tol is not None and not once:
                warnings.warn(
                    f"max_iter: after {self.max_iter} epochs the log-loss was still improving. "
                    "Increase max_iter, or set tol=None to train for exactly this many epochs.",
                    ConvergenceWarning,
                    stacklevel=3,
                )
        if best_weights is not None:
            model.load_state_dict(best_weights)
        model.cpu().eval()
        criterion.cpu()
        if once:
            self._moments = {
                index: {name: value.cpu() for name, value in state.items()}
                for index, state in optimizer.state_dict()["state"].items()
            }

    def _epoch(
        self,
        rows: "_Rows",
        model: nn.Module,
        criterion: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
    ) -> float:
        """Train for one epoch; the log-loss of the rows, each before the update of its batch."""
        count, n_classes = len(rows.labels), len(self.classes_)
        # Normalised over all rows: within a batch, a row's weight would depend on the other rows.
        mean_weight = rows.weights.mean()
        order = self._random.permutation(count)
        log_losses = []
        model.train()
        # At least two rows, as batch normalisation refuses to train on one.
        for batch in gen_batches(count, self._batch_rows, min_batch_size=min(2, self._batch_rows)):
            part = rows.part(order[batch])
            size = len(part.labels)
            logits = model(_dense(part.X, part.index, device))
            if logits.shape != (size, n_classes):
                raise ValueError(
                    f"module: expected logits of shape {(size, n_classes)}, got "
                    f"{tuple(logits.shape)}"
                )
            one_hot = F.one_hot(torch.from_numpy(part.labels), n_classes).to(logits)
            weight = torch.from_numpy(part.weights / mean_weight)[:, None].to(logits)
            # Scaling its target weights a row in every loss here, but CrossEntropyLoss would not
            # scale the label smoothing; so the targets are smoothed first.
            target = weight * smooth(one_hot, self._loss.smoothing)
            plain = isinstance(criterion, nn.CrossEntropyLoss)
            loss = F.cross_entropy(logits, target) if plain else criterion(logits, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            log_proba = link(criterion)(logits.detach())
            log_losses.append(size / count * F.cross_entropy(log_proba, weight * one_hot))
        log_loss = torch.stack(log_losses).sum()
        if not all(values.isfinite().all() for values in (log_loss, *model.parameters())):
            raise ValueError(
                f"The training diverged in epoch {self.n_iter_ + 1}: the log-loss or a weight of "
                "the network is not finite. Standardise X, or lower learning_rate_init."
            )
        return log_loss.item()

    # Prediction.

    def _log_loss(self, rows: "_Rows", model: nn.Module, device: torch.device) -> float:
        log_proba = link(self.criterion_)(self._logits(rows.X, rows.index, model, device))
        losses = F.nll_loss(log_proba, torch.from_numpy(rows.labels), reduction="none")
        return float(np.average(losses.numpy(), weights=rows.weights))

    def _log_proba(self, X: Any) -> Tensor:
        check_is_fitted(self, "model_")
        X = validate_data(self, X, accept_sparse="csr", dtype=self._dtype, reset=False)
        device = torch.device(self.device)
        # On another device a copy predicts, so that prediction does not change the classifier.
        model = self.model_ if device.type == "cpu" else copy.deepcopy(self.model_).to(device)
        logits = self._logits(X, np.arange(X.shape[0]), model, device)
        return link(self.criterion_)(logits)

    @torch.no_grad()
    def _logits(
        self, X: Any, index: NDArray[np.intp], model: nn.Module, device: torch.device
    ) -> Tensor:
        model.eval()
        batches = gen_batches(len(index), self._batch_rows)
        return torch.cat([model(_dense(X, index[batch], device)).cpu() for batch in batches])


class _Loss(NamedTuple):
    """The name and the one parameter of a loss."""

    name: str
    strength: float

    def criterion(self) -> nn.Module:
        match self.name:
            case "penex":
                return PENEX(sensitivity=self.strength)
            case "confidence-penalty":
                return ConfidencePenaltyLoss(self.strength)
            case "focal":
                return FocalLoss(self.strength)
        return nn.CrossEntropyLoss(label_smoothing=self.smoothing)

    @property
    def smoothing(self) -> float:
        return self.strength if self.name == "label-smoothing" else 0.0


@dataclass(frozen=True)
class _Rows:
    """A selection of the rows of X, which is not copied."""

    X: Any
    index: NDArray[np.intp]
    labels: NDArray[np.intp]
    """Class indices."""
    weights: NDArray[np.float64]

    def part(self, which: NDArray[np.intp]) -> "_Rows":
        return _Rows(self.X, self.index[which], self.labels[which], self.weights[which])


def _weights(sample_weight: ArrayLike | None, count: int) -> NDArray[np.float64]:
    if sample_weight is None:
        return np.ones(count)
    weights: NDArray[np.float64] = check_array(
        sample_weight, ensure_2d=False, dtype=np.float64, input_name="sample_weight"
    )
    if weights.shape != (count,):
        raise ValueError(
            f"sample_weight: expected one weight per row, shape ({count},), got {weights.shape}"
        )
    if (weights < 0).any():
        raise ValueError(f"sample_weight: expected weights >= 0, got {weights.min():g}")
    if not weights.any():
        raise ValueError("sample_weight: expected a weight above zero, all are zero")
    return weights


def _perceptron(sizes: list[int], random: np.random.RandomState) -> nn.Sequential:
    """Linear layers with ReLU between them, initialised as in torch but drawn from `random`."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        layer = nn.utils.skip_init(nn.Linear, n_in, n_out, dtype=torch.float64)  # type: ignore[no-untyped-call]
        for parameter in layer.parameters():
            bound = n_in**-0.5
            parameter.data.copy_(torch.from_numpy(random.uniform(-bound, bound, parameter.shape)))
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _dense(X: Any, index: NDArray[np.intp], device: torch.device) -> Tensor:
    rows = X[index]
    return torch.tensor(rows if isinstance(rows, np.ndarray) else rows.toarray(), device=device)


def _numpy(values: Tensor) -> NDArray[Any]:
    result: NDArray[Any] = values.numpy()
    return result
