"""The boundary of the losses: a call becomes what the mathematics needs, or is refused.

Everything below this module may rely on what :class:`Batch` promises and checks nothing again. The
conventions are those of :func:`torch.nn.functional.cross_entropy`.
"""

import contextlib
import math
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor

INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Batch(NamedTuple):
    """Logits and targets in the one form that every loss of this package computes with."""

    logits: Tensor
    """(N, K, d1, ...), float32 or float64; rows that are ignored are zero and have no gradient."""
    labels: Tensor | None
    """(N, 1, d1, ...), int64 and safe to gather with; None where the target is dense."""
    mass: Tensor
    """w_k q_ik at the classes that carry it: (N, 1, d1, ...) for labels, else (N, K, d1, ...)."""
    total: Tensor
    """omega_i = sum_k w_k q_ik, (N, d1, ...); zero for ignored rows."""
    denominator: Tensor
    """What ``mean`` divides by, 0-d; zero where there is nothing to learn from."""
    source: Tensor
    """The target as it came, for messages."""
    ignore_index: int

    def select(self, values: Tensor) -> Tensor:
        """`values` (N, K, d1, ...) at the classes that carry mass, in the shape of `mass`."""
        if self.labels is None:
            return values
        try:
            return values.gather(1, self.labels)
        except RuntimeError as error:  # the range check that gather makes anyway on the CPU
            refuse_labels(self.source, values, self.ignore_index, error)
            raise


def number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> float:
    """`value` as a float, refused unless finite and in [low, high] or (low, high]."""
    if isinstance(value, bool) or not isinstance(value, Real):
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


def count(name: str, value: object) -> int:
    """`value` as an int, refused unless it is a whole number of things, one at least."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return int(value)


def choice(name: str, value: object, options: tuple[str, ...]) -> str:
    """`value`, refused unless it is one of `options`."""
    if value not in options:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}, got {value!r}")
    return str(value)


def check_options(ignore_index: int, reduction: str, label_smoothing: float) -> None:
    """Refuse what no loss of this package accepts, whatever the tensors are."""
    choice("reduction", reduction, ("mean", "sum", "none"))
    number("label_smoothing", label_smoothing, 0.0, 1.0)
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")


def validate(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Check the tensors of a call; input and target as a batch, of one if they are unbatched.

    Raises:
        TypeError: `input` is not a floating-point tensor, or `target` is neither integer nor
            floating point.
        ValueError: The shape of `target` or `weight` is not what was expected.
    """
    check_tensors(input, target)
    if input.ndim == 1:
        input, target = input.unsqueeze(0), target.unsqueeze(0)
    if weight is not None:
        if not isinstance(weight, Tensor):
            raise TypeError(f"weight: expected a tensor, got {type(weight).__name__}")
        if weight.shape != (input.shape[1],):
            raise ValueError(
                f"weight: expected one weight per class, shape ({input.shape[1]},), "
                f"got {tuple(weight.shape)}"
            )
    if target.is_floating_point() and ignore_index >= 0:
        raise ValueError(
            "ignore_index: class probabilities have no index to ignore; expected a negative "
            f"value, got {ignore_index}"
        )
    return input, target


def prepare(
    input: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Batch:
    """Bring what :func:`validate` returned into the form of :class:`Batch`."""
    logits = input if input.dtype == torch.float64 else input.float()
    if weight is not None:
        weight = weight.to(logits.dtype)
    if target.is_floating_point():
        return _from_probabilities(logits, target, weight, ignore_index, label_smoothing)
    return _from_labels(logits, target, weight, ignore_index, label_smoothing)


def check_tensors(input: Tensor, target: Tensor) -> None:
    """Refuse what is not logits with a target of a fitting dtype and shape."""
    if not (isinstance(input, Tensor) and isinstance(target, Tensor)):
        name, value = ("target", target) if isinstance(input, Tensor) else ("input", input)
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if not input.is_floating_point():
        raise TypeError(f"input: expected floating-point logits, got {input.dtype}")
    if input.ndim == 0:
        raise ValueError("input: expected shape (K), (N, K) or (N, K, d1, ...), got a 0-d tensor")
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


def _from_labels(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Batch:
    labels = labels_of(target, logits, ignore_index).unsqueeze(1)
    keep = labels != ignore_index
    labels = labels.where(keep, 0)
    logits = logits.masked_fill(~keep, 0)  # an ignored row may hold anything, NaN included
    if weight is None:
        mass = keep.to(logits.dtype)
    else:
        try:
            mass = weight[labels] * keep
        except (IndexError, RuntimeError) as error:
            refuse_labels(target, logits, ignore_index, error)
            raise
    denominator = mass.sum()
    batch = Batch(logits, labels, mass, mass.squeeze(1), denominator, target, ignore_index)
    if label_smoothing == 0:
        return batch
    batch.select(logits)  # the labels' range check, on the tensor whose size the message quotes
    one_hot = torch.zeros_like(logits).scatter(1, labels, 1.0)
    dense = weighted(smooth(one_hot, label_smoothing), weight) * keep
    return Batch(logits, None, dense, dense.sum(1), denominator, target, ignore_index)


def _from_probabilities(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Batch:
    mass = weighted(smooth(target.to(logits.dtype), label_smoothing), weight)
    rows = logits.numel() // max(logits.shape[1], 1)
    denominator = torch.full((), rows, dtype=logits.dtype, device=logits.device)
    return Batch(logits, None, mass, mass.sum(1), denominator, target, ignore_index)


def labels_of(target: Tensor, logits: Tensor, ignore_index: int) -> Tensor:
    """Class indices (N, d1, ...), int64, of an integer target.

    A row that should be one-hot and is not gets a label out of range, so the check of the indexing
    kernel refuses it: at once on the CPU, by the device's own assertion elsewhere, and nowhere at
    the price of a synchronisation.
    """
    if target.ndim < logits.ndim:
        return target.long()
    num_classes = target.shape[1]
    invalid = num_classes if ignore_index != num_classes else num_classes + 1
    valid = (target.sum(1) == 1) & ((target == 0) | (target == 1)).all(1)
    return target.argmax(1).where(valid, invalid)


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


def refuse_labels(target: Tensor, logits: Tensor, ignore_index: int, error: Exception) -> None:
    """Raise what is wrong with the target, if that is why indexing by it raised `error`."""
    if not target.is_cpu:
        return  # the device has its own word on that
    if target.ndim == logits.ndim:
        raise ValueError(
            "target: integer targets of the input's shape are one-hot labels; expected a single 1 "
            "and zeros elsewhere in every row, got a row that is not; for anything softer give "
            "floating-point class probabilities"
        ) from error
    classes = logits.shape[1]
    message = f"target: expected class indices in [0, {classes}) or {ignore_index} (ignore_index)"
    with contextlib.suppress(RuntimeError):  # under vmap there is no single value to quote
        bad = target[(target != ignore_index) & ((target < 0) | (target >= classes))]
        if len(bad) == 0:
            return  # something else is wrong
        message += f", got {int(bad[0])}"
    raise IndexError(message) from error
