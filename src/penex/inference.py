r"""Probabilities from trained logits, and export to other runtimes.

Every loss has a link, which maps the logits that minimise it to the class probabilities:
:func:`link`. PENEX is minimised by :math:`f_j = \log(\alpha p_j / \rho) / (1 + \alpha)`, so its
probabilities are :math:`\operatorname{softmax}((1+\alpha) f)`. The factor :math:`1+\alpha` does not
change the predicted class.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from penex import _links
from penex._inputs import positive
from penex._links import ProbabilityMixin

__all__ = ["Calibrated", "fold_temperature", "link", "predict_log_proba", "predict_proba"]


def link(criterion: nn.Module) -> Callable[[Tensor], Tensor]:
    r"""The function from a criterion's trained logits to log-probabilities.

    The probabilities are those at the minimum of the expected loss. A link that would leave [0, 1]
    for other logits (label smoothing, confidence penalty) is clipped: no class gets less than
    1/1000 of its softmax probability, before the probabilities are normalised.

    Args:
        criterion: A criterion of :mod:`penex.losses`, or any other with a method
            ``predict_log_proba``, which is returned; or :class:`torch.nn.CrossEntropyLoss`, with or
            without label smoothing and class weights.

    Returns:
        A function of logits, floating point, shape (N, K) or (N, K, d1, ...), which returns
        log-probabilities of their shape and dtype, computed in float32 or better.

    Raises:
        TypeError: The link of `criterion` is not known.

    Example:
        >>> log_proba = link(nn.CrossEntropyLoss(label_smoothing=0.1))
        >>> log_proba(torch.tensor([[0.95, 0.05]]).log()).exp()
        tensor([[9.9994e-01, 5.5552e-05]])
    """
    predict: Callable[[Tensor], Tensor] | None = getattr(criterion, "predict_log_proba", None)
    if callable(predict):
        return predict
    if type(criterion) is nn.CrossEntropyLoss:
        return _CrossEntropyLink(criterion).predict_log_proba
    raise TypeError(
        "criterion: expected one of penex.losses, torch.nn.CrossEntropyLoss, or one with a method "
        f"predict_log_proba, got {type(criterion).__name__}; which probabilities its logits stand "
        "for depends on the loss, so implement predict_log_proba(logits) -> log-probabilities"
    )


class _CrossEntropyLink(ProbabilityMixin):
    """The link of torch's cross-entropy, which smooths and weights targets as penex.losses do."""

    def __init__(self, criterion: nn.CrossEntropyLoss) -> None:
        self.criterion = criterion

    def _calibrated_logits(self, logits: Tensor, dim: int) -> Tensor:
        smoothing, weight = self.criterion.label_smoothing, self.criterion.weight
        return _links.remove_smoothing(logits, smoothing, dim, weight)


def predict_log_proba(input: Tensor, sensitivity: float, dim: int = 1) -> Tensor:
    r"""Log-probabilities of logits trained with PENEX, the logarithm of :func:`predict_proba`.

    Args:
        input: Logits, floating point, any shape.
        sensitivity: The :math:`\alpha > 0` of the loss that trained them.
        dim: The class dimension.

    Returns:
        Log-probabilities, shape and dtype of `input`, computed in float32 or better.

    Raises:
        TypeError: `input` is not floating point, or `sensitivity` not a number.
        ValueError: `sensitivity` is not finite and positive.

    Example:
        >>> predict_log_proba(torch.tensor([[2.0, 0.0]]), 0.5)
        tensor([[-0.0486, -3.0486]])
    """
    logits = _links.penex(_links.precise(input), positive("sensitivity", sensitivity))
    return F.log_softmax(logits, dim).to(input.dtype)


def predict_proba(input: Tensor, sensitivity: float, dim: int = 1) -> Tensor:
    r"""Probabilities of logits trained with PENEX, :math:`\operatorname{softmax}((1+\alpha) f)`.

    Args:
        input: Logits, floating point, any shape.
        sensitivity: The :math:`\alpha > 0` of the loss that trained them.
        dim: The class dimension.

    Returns:
        Probabilities, shape and dtype of `input`, computed in float32 or better.

    Raises:
        TypeError: `input` is not floating point, or `sensitivity` not a number.
        ValueError: `sensitivity` is not finite and positive.

    Example:
        >>> predict_proba(torch.tensor([[2.0, 0.0]]), 0.5)
        tensor([[0.9526, 0.0474]])
    """
    logits = _links.penex(_links.precise(input), positive("sensitivity", sensitivity))
    return F.softmax(logits, dim).to(input.dtype)


class Calibrated(nn.Module):
    r"""A trained model together with the link of its loss; returns probabilities.

    Meant for :func:`torch.export.export`, ONNX and serving. The wrapped model is not changed.

    Args:
        model: A model that returns logits, shape (N, K) or (N, K, d1, ...).
        sensitivity: The :math:`\alpha > 0` of the PENEX loss that it was trained with; or, for any
            loss that :func:`link` knows, the criterion itself.

    Raises:
        TypeError: The link of the criterion is not known.
        ValueError: The sensitivity is not finite and positive, or `model` has been folded with
            :func:`fold_temperature`, so that its plain softmax is right already.

    Example:
        >>> model = Calibrated(torch.nn.Linear(3, 2), sensitivity=0.1)
        >>> bool(torch.allclose(model(torch.zeros(1, 3)).sum(1), torch.ones(1)))
        True
        >>> smoothed = nn.CrossEntropyLoss(label_smoothing=0.1)
        >>> model = Calibrated(torch.nn.Linear(3, 2), smoothed)
    """

    def __init__(self, model: nn.Module, sensitivity: float | nn.Module) -> None:
        super().__init__()
        for name, module in model.named_modules():
            if _FOLDED in vars(module):
                raise ValueError(
                    f"model: its layer {name!r} has been folded, so the softmax of its output is "
                    "right already; expected a model without fold_temperature"
                )
        self.model = model
        if isinstance(sensitivity, nn.Module):
            self.criterion = sensitivity  # a submodule: its class weights move with the model
            self.link = link(sensitivity)
        else:
            alpha = positive("sensitivity", sensitivity)
            self.link = partial(predict_log_proba, sensitivity=alpha)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Probabilities, shape and dtype of the model's logits."""
        logits = self.model(*args, **kwargs)
        return self.link(_links.precise(logits)).exp().to(logits.dtype)


def fold_temperature(module: nn.Module, sensitivity: float) -> nn.Module:
    r"""Scale the last linear layer by :math:`1 + \alpha`, in place, so that plain softmax is right.

    For models trained with PENEX or log-PENEX, without label smoothing and huberization: other
    links are not a factor and cannot be folded; use :class:`Calibrated` for them.

    Fold only a copy meant for deployment: the criterion and further training need the original
    logits. A state dict does not record whether it has been folded; the module does, and cannot be
    folded twice.

    The last layer is `module` itself if it is linear or a convolution; otherwise it is found by
    following the traced computation back from the output, through operations that commute with
    scaling (dropout, flatten, reshape, mean, average pooling, interpolation). Where tracing fails,
    pass the layer itself, for example ``fold_temperature(model.classifier, 0.1)``.

    Args:
        module: The model, in full or half precision.
        sensitivity: The :math:`\alpha > 0` it was trained with.

    Returns:
        `module`.

    Raises:
        TypeError: `sensitivity` is not a number.
        ValueError: `sensitivity` is not finite and positive; the last layer cannot be identified;
            it cannot be scaled on its own, because it is used more than once, shares its weight or
            is parametrized; or it has already been folded.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> x = torch.randn(5, 3)
        >>> before = predict_proba(model(x), 0.1)
        >>> bool(torch.allclose(fold_temperature(model, 0.1)(x).softmax(1), before))
        True
    """
    if isinstance(sensitivity, nn.Module):
        raise TypeError(
            "sensitivity: expected a number, that of PENEX, as only its link is a factor; got "
            f"{type(sensitivity).__name__}, for which Calibrated(model, criterion) is meant"
        )
    factor = 1 + positive("sensitivity", sensitivity)
    name, layer = _last_layer(module)
    if _FOLDED in vars(layer):
        raise ValueError(
            f"module: its layer {name!r} was folded already, with sensitivity "
            f"{getattr(layer, _FOLDED)}; folding again would sharpen the probabilities"
        )
    _check_alone(module, name, layer)
    with torch.no_grad():
        for parameter in layer.parameters(recurse=False):
            parameter.mul_(factor)
    setattr(layer, _FOLDED, float(sensitivity))
    return module


_FOLDED = "_penex_folded_sensitivity"
_LINEAR = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
# Operations that commute with scaling: g(c x) = c g(x).
_HOMOGENEOUS_MODULES = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.Flatten,
    nn.Unflatten,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.Upsample,
)
_HOMOGENEOUS_FUNCTIONS = (torch.flatten, torch.mean, torch.squeeze, F.dropout, F.interpolate)
_HOMOGENEOUS_METHODS = (
    "contiguous",
    "flatten",
    "float",
    "mean",
    "permute",
    "reshape",
    "squeeze",
    "transpose",
    "view",
)


def _last_layer(module: nn.Module) -> tuple[str, nn.Module]:
    if isinstance(module, _LINEAR):
        return type(module).__name__, module
    advice = "give the layer itself, such as fold_temperature(model.classifier, sensitivity)"
    try:
        graph = fx.Tracer().trace(module)
    except Exception as error:  # tracing runs the user's forward, which may raise anything
        raise ValueError(
            f"module: cannot identify the last layer of {type(module).__name__}, as its forward "
            f"cannot be traced ({type(error).__name__}: {error}); {advice}"
        ) from error
    node: Any = next(node for node in graph.nodes if node.op == "output").args[0]
    while isinstance(node, fx.Node):
        layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, _LINEAR):
            _check_used_once(module, graph, str(node.target), layer)
            return str(node.target), layer
        if not (
            isinstance(layer, _HOMOGENEOUS_MODULES)
            or (node.op == "call_function" and node.target in _HOMOGENEOUS_FUNCTIONS)
            or (node.op == "call_method" and node.target in _HOMOGENEOUS_METHODS)
        ):
            break
        node = node.args[0] if node.args else node.kwargs.get("input")
    found = type(layer).__name__ if isinstance(node, fx.Node) and layer is not None else node
    raise ValueError(
        f"module: cannot identify the last layer of {type(module).__name__}; expected its output "
        f"to be that of a linear layer or convolution, it comes from {found}; {advice}"
    )


def _check_used_once(module: nn.Module, graph: fx.Graph, name: str, layer: nn.Module) -> None:
    """Refuse a layer that the forward calls again, or whose weights it reads directly."""
    uses = [
        node
        for node in graph.nodes
        if (node.op == "call_module" and module.get_submodule(str(node.target)) is layer)
        or (node.op == "get_attr" and str(node.target).startswith(f"{name}."))
    ]
    if len(uses) > 1:
        raise ValueError(
            f"module: its last layer {name!r} is used {len(uses)} times in one forward; scaling it "
            "would change more than the output, so use Calibrated or predict_proba"
        )


def _check_alone(module: nn.Module, name: str, layer: nn.Module) -> None:
    """Refuse a layer that is parametrized or shares its weights."""
    # The older weight_norm, spectral_norm and prune leave a plain tensor where the weight was.
    if parametrize.is_parametrized(layer) or not isinstance(layer.weight, nn.Parameter):
        raise ValueError(
            f"module: its last layer {name!r} is parametrized; remove the parametrization first"
        )
    own = {id(parameter) for parameter in layer.parameters(recurse=False)}
    uses = [n for n, p in module.named_parameters(remove_duplicate=False) if id(p) in own]
    if len(uses) > len(own):
        raise ValueError(
            f"module: the weights of its last layer are shared ({', '.join(uses)}); scaling them "
            "would change more than the output, so use Calibrated or predict_proba"
        )
