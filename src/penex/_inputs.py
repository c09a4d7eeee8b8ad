"""The boundary of the losses: a call becomes what the mathematics needs, or is refused.

What is below this module checks nothing again. The conventions are those of
:func:`torch.nn.functional.cross_entropy`.
"""

import contextlib
import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Reduction = Literal["mean", "sum", "none"]
INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(slots=True)
class LossArguments:
    """What a loss is called with, next to the logits, after :func:`validate`."""

    target: Tensor
    """Class indices, int64, (N, d1, ...), or class probabilities, (N, K, d1, ...)."""
    weight: Tensor | None
    ignore_index: int
    reduction: Reduction
    label_smoothing: float

    @property
    def soft(self) -> bool:
        """Whether a row's target weight lies on more than one class."""
        return self.target.is_floating_point() or self.label_smoothing > 0


class Batch(NamedTuple):
    """Logits and targets by differentiable operations alone, for the definitions of the losses."""

    logits: Tensor
    """(N, K, d1, ...), float32 or float64; rows that are ignored are zero and have no gradient."""
    labels: Tensor | None
    """(N, 1, d1, ...), int64, valid to gather with; None where the target is soft."""
    target_weights: Tensor
    """w_k q_ik at the classes that carry it: (N, 1, d1, ...) for labels, else (N, K, d1, ...)."""
    row_weights: Tensor
    """omega_i = sum_k w_k q_ik, (N, d1, ...); zero for ignored rows."""
    denominator: Tensor
    """What ``mean`` divides by, 0-d; zero where there is nothing to learn from."""

    def select(self, values: Tensor) -> Tensor:
        """`values` (N, K, d1, ...) at the classes with target weight, in its shape."""
        return values if self.labels is None else values.gather(1, self.labels)


INSPECT_VALUES = True
"""The tests' switch: without it a CPU takes the way of the other devices."""


def can_inspect(tensor: Tensor) -> bool:
    """Whether values may be looked at: not if that waits for a device, nor if it is traced."""
    return (
        tensor.is_cpu
        and INSPECT_VALUES
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def computed_in(input: Tensor) -> torch.dtype:
    """float64 for float64 logits, else float32."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> float:
    """`value` as a float, refused unless finite and in [low, high] or (low, high]."""
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, Real)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    result = float(value)
    # Comparisons, for a compiler may make the number a symbol, and cannot trace isfinite of one.
    inside = low < result <= high if open_low else low <= result <= high
    if not inside or result == math.inf:
        bound = f"{'(' if open_low else '['}{low:g}, {high:g}{']' if high < math.inf else ')'}"
        raise ValueError(f"{name}: expected a finite number in {bound}, got {value!r}")
    return result


def positive(name: str, value: object) -> float:
    """`value` as a float, refused unless it is finite and above zero."""
    return number(name, value, 0.0, math.inf, open_low=True)


def nonnegative(name: str, value: object) -> float:
    """`value` as a float, refused unless it is finite and at least zero."""
    return number(name, value, 0.0, math.inf)


def choice(name: str, value: object, options: tuple[str, ...]) -> str:
    """`value`, refused unless it is one of `options`."""
    if value not in options:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}, got {value!r}")
    return str(value)


def integer(name: str, value: object) -> int:
    """`value` as an int, refused unless it is one."""
    if type(value) is int:  # the test for other kinds of integers takes a microsecond
        return value
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    return int(value)


def count(name: str, value: object) -> int:
    """`value` as an int, refused unless it is a whole number of things, one at least."""
    result = integer(name, value)
    if result < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return result


def check_reduction(value: object) -> Reduction:
    """`value`, refused unless it is a reduction."""
    return choice("reduction", value, ("mean", "sum", "none"))  # type: ignore[return-value]


def smoothing(value: object) -> float:
    """`value` as a float, refused unless it may be a label smoothing."""
    return number("label_smoothing", value, 0.0, 1.0)


def validate(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, LossArguments]:
    """Check a call; logits and arguments as a batch, of one row if they are unbatched.

    Raises:
        TypeError: `input` is not a floating-point tensor, `target` is neither integer nor floating
            point, or an option has the wrong type.
        ValueError: A shape, a device or a value is not what was expected.
    """
    arguments = LossArguments(
        target=target,
        weight=weight,
        ignore_index=integer("ignore_index", ignore_index),
        reduction=check_reduction(reduction),
        label_smoothing=smoothing(label_smoothing),
    )
    check_tensors(input, target)
    if input.ndim == 1:
        input, target = input.unsqueeze(0), target.unsqueeze(0)
    if weight is not None:
        check_weight("weight", weight, input, input.shape[1])
    if not target.is_floating_point():
        arguments.target = labels_of(target, input, arguments.ignore_index)
        return input, arguments
    if ignore_index >= 0:
        raise ValueError(
            "ignore_index: class probabilities have no index to ignore; expected a negative "
            f"value, got {ignore_index}"
        )
    if can_inspect(target) and target.numel() and target.detach().amin().item() < 0:
        raise ValueError(
            f"target: expected class probabilities of at least 0, got {target.min().item():g}"
        )
    arguments.target = target
    return input, arguments


def check_weight(name: str, weight: Tensor, input: Tensor, num_classes: int) -> None:
    """Refuse what is not one class weight of at least 0 for each class, where `input` is."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(weight).__name__}")
    if weight.shape != (num_classes,):
        raise ValueError(
            f"{name}: expected one weight per class, shape ({num_classes},), "
            f"got {tuple(weight.shape)}"
        )
    check_device(name, weight, input)
    if can_inspect(weight) and not weight.detach().amin().item() >= 0:
        raise ValueError(
            f"{name}: expected class weights of at least 0, got {weight.min().item():g}"
        )


def check_device(name: str, tensor: Tensor, input: Tensor) -> None:
    """Refuse a tensor that is not where `input` is."""
    if tensor.device != input.device:
        raise ValueError(
            f"{name}: expected a tensor on the input's device {input.device}, got "
            f"{tensor.device}; a criterion is moved like a model, by .to({str(input.device)!r})"
        )


def check_tensors(input: Tensor, target: Tensor) -> None:
    """Refuse what is not logits with a target of a fitting dtype, shape and device."""
    if not (isinstance(input, Tensor) and isinstance(target, Tensor)):
        name, value = ("target", target) if isinstance(input, Tensor) else ("input", input)
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if not input.is_floating_point():
        raise TypeError(f"input: expected floating-point logits, got {input.dtype}")
    if input.ndim == 0:
        raise ValueError("input: expected shape (K), (N, K) or (N, K, d1, ...), got a 0-d tensor")
    check_device("target", target, input)
    if target.dtype == torch.int64 and input.ndim == 2 and target.shape == input.shape[:1]:
        return
    if target.is_floating_point():
        if target.shape != input.shape:
            raise ValueError(
                "target: floating-point targets are class probabilities and need the input's shape "
                f"{tuple(input.shape)}, got {tuple(target.shape)}; class indices need an integer "
                "dtype"
            )
        return
    if target.dtype not in INDEX_DTYPES:
        raise TypeError(
            "target: expected class indices (integer) or class probabilities (floating point), "
            f"got {target.dtype}"
        )
    indices = input.shape[:1] + input.shape[2:] if input.ndim > 1 else torch.Size()
    if target.shape != indices and target.shape != input.shape:
        shape = tuple(input.shape)
        raise ValueError(
            f"target: expected class indices of shape {tuple(indices)}, or one-hot labels or class "
            f"probabilities of shape {shape}, for input {shape}; got {tuple(target.shape)}"
        )


def prepare(input: Tensor, arguments: LossArguments) -> Batch:
    """What :func:`validate` returned in the form of :class:`Batch`."""
    logits = input.to(computed_in(input))
    target, smoothing = arguments.target, arguments.label_smoothing
    weight = None if arguments.weight is None else arguments.weight.to(logits.dtype)
    if target.is_floating_point():
        target_weights = weighted(smooth(target.to(logits.dtype), smoothing), weight)
        rows = logits.numel() // max(logits.shape[1], 1)
        denominator = torch.full((), rows, dtype=logits.dtype, device=logits.device)
        return Batch(logits, None, target_weights, target_weights.sum(1), denominator)
    if can_inspect(target):
        refuse_labels(target, logits.shape[1], arguments.ignore_index, None)
    labels = target.unsqueeze(1)
    ignored = labels == arguments.ignore_index
    labels = labels.masked_fill(ignored, 0)
    logits = logits.masked_fill(ignored, 0)  # an ignored row may hold anything, NaN included
    kept = (~ignored).to(logits.dtype)
    at_label = kept if weight is None else weight[labels] * kept
    denominator = at_label.sum()
    if smoothing == 0:
        return Batch(logits, labels, at_label, at_label.squeeze(1), denominator)
    one_hot = torch.zeros_like(logits).scatter(1, labels, 1.0)
    target_weights = weighted(smooth(one_hot, smoothing), weight) * kept
    return Batch(logits, None, target_weights, target_weights.sum(1), denominator)


def labels_of(target: Tensor, logits: Tensor, ignore_index: int) -> Tensor:
    """Class indices (N, d1, ...), int64, of an integer target.

    Raises:
        ValueError: A row is not one-hot, on the CPU. On other devices it gets a label out of range,
            which the indexing kernel refuses.
    """
    if target.ndim < logits.ndim:
        return target.long()
    num_classes = target.shape[1]
    valid = (target.sum(1) == 1) & ((target == 0) | (target == 1)).all(1)
    if can_inspect(target) and not valid.all():
        raise ValueError(
            "target: integer targets of the input's shape are one-hot labels; expected a single 1 "
            "and zeros elsewhere in every row, got a row that is not; for anything softer give "
            "floating-point class probabilities"
        )
    invalid = num_classes if ignore_index != num_classes else num_classes + 1
    return target.argmax(1).masked_fill(~valid, invalid)


def smooth(probabilities: Tensor, label_smoothing: float) -> Tensor:
    """q with its share of the uniform distribution."""
    if label_smoothing == 0:
        return probabilities
    return (1 - label_smoothing) * probabilities + label_smoothing / probabilities.shape[1]


def weighted(probabilities: Tensor, weight: Tensor | None) -> Tensor:
    """w_k q_ik, class dimension 1."""
    if weight is None:
        return probabilities
    return probabilities * weight.view(-1, *[1] * (probabilities.ndim - 2))


def refuse_labels(
    labels: Tensor, num_classes: int, ignore_index: int, error: Exception | None
) -> None:
    """Raise an error that names the label out of range, if there is one; `error` is its cause."""
    if not labels.is_cpu:
        return
    message = (
        f"target: expected class indices in [0, {num_classes}) or {ignore_index} (ignore_index)"
    )
    with contextlib.suppress(RuntimeError):  # under vmap there is no single value to quote
        invalid = (labels < 0) | (labels >= num_classes)
        wrong = labels[invalid & (labels != ignore_index)]
        if len(wrong) == 0:
            return
        message += f", got {int(wrong[0])}"
    raise IndexError(message) from error
