r"""PENEX of a linear layer's output, without the logits, for very many classes: the functions.

:mod:`penex._tiles` has the mathematics. Here is the boundary, and the estimate from few classes.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from penex._inputs import (
    INDEX_DTYPES,
    Batch,
    check_options,
    choice,
    count,
    positive,
    refuse_labels,
)
from penex._penalty import PENALTY_MAX, PENALTY_MIN, Estimated, Given, Penalty
from penex._robust import computed_in
from penex._tiles import MANY_ROWS, ROWS, Head, Rule, Shard, exact, looks, no_autocast

__all__ = ["linear_penex_loss", "sampled_linear_penex_loss"]


def linear_penex_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    sensitivity: float = 0.1,
    penalty: float | Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    huberization: float | None = None,
    chunk_size: int | None = None,
    vocab_group: dist.ProcessGroup | None = None,
    num_classes: int | None = None,
) -> Tensor:
    r"""PENEX of the logits :math:`f = h W^\top + b`, which are never held all at a time.

    .. math::
        \ell_i = w_{y_i} \bigl( \exp(-\alpha f_{i y_i}) + \rho \sum_j \exp f_{ij} \bigr)

    Equal to ``penex_loss(F.linear(input, weight, bias), target, ...)`` up to rounding, with
    gradients for `input`, `weight` and `bias`, as far as they require one. They can be
    differentiated once. See :func:`penex.functional.penex_loss` for what is not described here.

    Args:
        input: :math:`h`, floating point, shape (..., D). Tiles are computed in float32, or float64
            if that is the input's dtype.
        weight: :math:`W`, shape (K, D), dtype of `input`.
        target: Class indices, integer, shape (...).
        bias: :math:`b`, shape (K), dtype of `input`.
        sensitivity: :math:`\alpha > 0`.
        penalty: :math:`\rho > 0`, a number or a 0-d tensor. None estimates it from this batch. It
            is never differentiated.
        class_weight: :math:`w`, one for each class, not differentiated.
        ignore_index: Rows with this class index contribute nothing, and cost nothing on the CPU.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` (shape (...), zeros at ignored rows).
        huberization: Threshold beyond which the exponential part continues linearly.
        chunk_size: Rows whose logits are worked on at a time, by as many classes as make up a tile
            of 8 MiB (CPU) or 128 MiB. None: 1024, or 8192 on other devices.
        vocab_group: The process group whose ranks share the classes: of G ranks, rank r holds
            `weight` and `bias` of the classes from r⌈K/G⌉, ⌈K/G⌉ of them or what is left.
            `input`, `target` and `class_weight` are the same on all ranks, as are the loss and the
            input's gradient. A step takes one collective of a number for each row, and one of the
            input's gradient.
        num_classes: K, if `vocab_group` is given.

    Returns:
        The loss: 0-d, or of shape (...) for ``reduction="none"``.

    Raises:
        TypeError: A dtype or the type of an option is not what was expected.
        ValueError: An option is out of its range, or shapes do not match.
        IndexError: A class index is out of range (on the CPU; a CUDA device asserts by itself).

    Example:
        >>> hidden, weight = torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> linear_penex_loss(hidden, weight, torch.tensor([0, 1]), sensitivity=0.5, penalty=0.25)
        tensor(2.0006)
    """
    alpha = positive("sensitivity", sensitivity)
    rule = Estimated(alpha, PENALTY_MIN, PENALTY_MAX) if penalty is None else Given(penalty)
    return linear_penalized(
        input,
        weight,
        target,
        bias,
        alpha=alpha,
        penalty=rule,
        class_weight=class_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        huberization=huberization,
        chunk_size=chunk_size,
        vocab_group=vocab_group,
        num_classes=num_classes,
    )


def sampled_linear_penex_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    num_sampled: int,
    sampler: str = "log-uniform",
    sensitivity: float = 0.1,
    penalty: float | Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    huberization: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""An estimate of :func:`linear_penex_loss` from few classes, without bias for a given penalty.

    The label's part is exact; the other classes' part of the penalty, a plain sum, is estimated
    from classes :math:`j_1, \dots, j_m` drawn with replacement, the same for all rows, with
    probabilities :math:`p`:

    .. math::
        \sum_j e^{f_{ij}} \approx e^{f_{i y_i}}
            + \frac{1}{m} \sum_{s=1}^m \frac{[j_s \ne y_i]\, e^{f_{i j_s}}}{p_{j_s}}

    The expectation of the loss and of its gradients is that of the exact ones, if `penalty` is
    given: that of sampled softmax is not. An estimated penalty is a quotient, and biased by an
    amount that vanishes as `num_sampled` grows.

    Args:
        input: As in :func:`linear_penex_loss`, like the arguments not listed here.
        weight: As in :func:`linear_penex_loss`.
        target: As in :func:`linear_penex_loss`.
        bias: As in :func:`linear_penex_loss`.
        num_sampled: m, how many classes are drawn, at least one.
        sampler: ``"uniform"``, or ``"log-uniform"``: class k with probability
            log((k + 2) / (k + 1)) / log(K + 1), for classes in the order of falling frequency.
        sensitivity: As in :func:`linear_penex_loss`.
        penalty: As in :func:`linear_penex_loss`.
        class_weight: As in :func:`linear_penex_loss`.
        ignore_index: As in :func:`linear_penex_loss`.
        reduction: As in :func:`linear_penex_loss`.
        huberization: As in :func:`linear_penex_loss`.
        generator: Where the random numbers come from; None: torch's own for the device.

    Returns:
        The loss: 0-d, or of shape (...) for ``reduction="none"``.

    Raises:
        TypeError, ValueError, IndexError: As :func:`linear_penex_loss`.

    Example:
        >>> hidden, weight = torch.ones(3, 2), torch.zeros(1000, 2)
        >>> target = torch.tensor([0, 1, 2])
        >>> sampled_linear_penex_loss(
        ...     hidden, weight, target, num_sampled=5, sampler="uniform", penalty=1e-3
        ... ).round(decimals=2)  # 1 + 1e-3 * 1000
        tensor(2.)
    """
    alpha = positive("sensitivity", sensitivity)
    rule = Estimated(alpha, PENALTY_MIN, PENALTY_MAX) if penalty is None else Given(penalty)
    return sampled_penalized(
        input,
        weight,
        target,
        bias,
        num_sampled=num_sampled,
        sampler=sampler,
        alpha=alpha,
        penalty=rule,
        class_weight=class_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        huberization=huberization,
        generator=generator,
    )


class Rows(NamedTuple):
    """The boundary's result: hidden states and labels of rows that count."""

    hidden: Tensor
    """(N, D)."""
    labels: Tensor
    """(N), safe to index with."""
    mass: Tensor
    """w_y, (N, 1), in :func:`penex._tiles.exact`; all above zero on the CPU."""
    kept: Tensor | None
    """Their places among all rows; None: these are all rows."""


def linear_penalized(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    *,
    alpha: float,
    penalty: Penalty,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    huberization: float | None,
    chunk_size: int | None,
    vocab_group: dist.ProcessGroup | None,
    num_classes: int | None,
) -> Tensor:
    """:func:`linear_penex_loss` with any rule for the penalty."""
    if chunk_size is not None:
        count("chunk_size", chunk_size)
    if vocab_group is not None and num_classes is None:
        raise ValueError(
            "num_classes: a vocab_group shares the classes out; expected how many there are in "
            "all, got None"
        )
    _check_tensors(input, weight, target, bias)
    shard = Shard.of(len(weight) if num_classes is None else num_classes, vocab_group)
    if len(weight) != shard.stop - shard.start:
        whose = "" if vocab_group is None else f" of {shard.num_classes}, this rank's share,"
        raise ValueError(
            f"weight: expected a row for each of the classes {shard.start} to {shard.stop - 1}"
            f"{whose} got {len(weight)} rows"
        )
    rule = _rule(alpha, penalty, ignore_index, reduction, huberization)
    rows = _rows(input, target, class_weight, ignore_index, shard.num_classes)
    hidden, weight, bias = _as_linear(rows.hidden, weight, bias)
    step = chunk_size or (ROWS if input.is_cpu else MANY_ROWS)
    with no_autocast(input):
        value: Tensor = Head.apply(  # type: ignore[no-untyped-call]
            hidden,
            weight,
            bias,
            rows.labels,
            rows.mass,
            rule,
            shard,
            step,
            torch.is_grad_enabled(),
        )
    return _shaped(value, rows, input, reduction)


def sampled_penalized(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    *,
    num_sampled: int,
    sampler: str,
    alpha: float,
    penalty: Penalty,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    huberization: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """:func:`sampled_linear_penex_loss` with any rule for the penalty."""
    from penex import functional  # which has the functions of this module, too

    count("num_sampled", num_sampled)
    choice("sampler", sampler, ("uniform", "log-uniform"))
    _check_tensors(input, weight, target, bias)
    rule = _rule(alpha, penalty, ignore_index, reduction, huberization)
    rows = _rows(input, target, class_weight, ignore_index, len(weight))
    hidden, weight, bias = _as_linear(rows.hidden, weight, bias)
    dtype = computed_in(hidden)
    with no_autocast(input):
        drawn, log_probability = draw(num_sampled, len(weight), sampler, weight.device, generator)
        hidden = hidden.to(dtype)
        used, size = torch.cat([rows.labels, drawn]), len(hidden)
        vectors = weight[used].to(dtype)
        true, others = (hidden * vectors[:size]).sum(1, True), hidden @ vectors[size:].t()
        if bias is not None:
            offsets = bias[used].to(dtype)
            true, others = true + offsets[:size].unsqueeze(1), others + offsets[size:]
        others = others - (log_probability + math.log(num_sampled)).to(dtype)
        others = others.masked_fill(drawn == rows.labels.unsqueeze(1), -math.inf)
        # The label's logit comes first; what follows stands for the other classes.
        logits, mass = torch.cat([true, others], 1), rows.mass.to(dtype)
        first = torch.zeros_like(rows.labels).unsqueeze(1)
        batch = Batch(logits, first, mass, mass.squeeze(1), mass.sum(), target, ignore_index)
        sums = functional.penalty_sums(batch, alpha, rule.log_threshold)
        settled = penalty.settle(sums._replace(num_classes=len(weight)), batch.denominator)
        divisor = settled.divisor() if reduction == "mean" else 1.0
        value = functional.penex_rows(
            batch, alpha, settled.log_penalty, rule.log_threshold, divisor
        )
    return _shaped(value if reduction == "none" else value.sum(), rows, input, reduction)


def draw(
    num_sampled: int,
    num_classes: int,
    sampler: str,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Classes drawn with replacement, and the logarithm of the probability of each."""
    if sampler == "uniform":
        drawn = torch.randint(num_classes, (num_sampled,), device=device, generator=generator)
        return drawn, torch.full((num_sampled,), -math.log(num_classes), device=device)
    # P(class < k) = log(k + 1) / log(K + 1)
    uniform = torch.rand(num_sampled, dtype=torch.float64, device=device, generator=generator)
    drawn = (torch.exp(uniform * math.log(num_classes + 1)) - 1).long().clamp_(0, num_classes - 1)
    return drawn, torch.log(torch.log1p(1 / (drawn + 1.0).double()) / math.log(num_classes + 1))


# The boundary.


def _check_tensors(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    """Refuse what is not hidden states, a linear layer, and a label for each of the former."""
    given = {"input": input, "weight": weight, "target": target, "bias": bias}
    for name, value in given.items():
        if not isinstance(value, Tensor) and not (name == "bias" and value is None):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if not input.is_floating_point():
        raise TypeError(f"input: expected floating-point hidden states, got {input.dtype}")
    if input.ndim == 0:
        raise ValueError("input: expected shape (..., D), got a 0-d tensor")
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"weight: expected shape (K, D), K, D > 0, got {tuple(weight.shape)}")
    if input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"input: expected hidden states of the size {weight.shape[1]} that weight "
            f"{tuple(weight.shape)} has, got {tuple(input.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape ({len(weight)},), got {tuple(bias.shape)}")
    if not torch.is_autocast_enabled(input.device.type):
        for name, value in (("weight", weight), ("bias", bias)):
            if value is not None and value.dtype != input.dtype:
                raise TypeError(
                    f"{name}: expected the input's dtype {input.dtype}, got {value.dtype}"
                )
    if target.dtype not in INDEX_DTYPES:
        raise TypeError(f"target: expected class indices (integer), got {target.dtype}")
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"target: expected shape {tuple(input.shape[:-1])} for input {tuple(input.shape)}, "
            f"got {tuple(target.shape)}"
        )


def _rule(
    alpha: float, penalty: Penalty, ignore_index: int, reduction: str, huberization: float | None
) -> Rule:
    check_options(ignore_index, reduction, 0.0)
    log_threshold = (
        None if huberization is None else math.log(positive("huberization", huberization))
    )
    return Rule(alpha, penalty, reduction, log_threshold)


def _rows(
    input: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    num_classes: int,
) -> Rows:
    """What counts of the rows; the others may hold anything, NaN included."""
    hidden, target = input.reshape(-1, input.shape[-1]), target.reshape(-1).long()
    dtype = exact(input)
    if class_weight is None:
        weights = torch.ones((), dtype=dtype, device=input.device).expand(num_classes)
    else:
        if not isinstance(class_weight, Tensor):
            raise TypeError(f"class_weight: expected a tensor, got {type(class_weight).__name__}")
        if class_weight.shape != (num_classes,):
            raise ValueError(
                f"class_weight: expected one for each class, shape ({num_classes},), got "
                f"{tuple(class_weight.shape)}"
            )
        if class_weight.requires_grad:
            raise ValueError("class_weight: expected a tensor that does not require a gradient")
        weights = class_weight.to(dtype)
    keep = target != ignore_index
    labels = target.where(keep, 0)
    try:
        mass = weights.index_select(0, labels) * keep
    except (IndexError, RuntimeError) as error:
        logits = torch.empty(len(target), num_classes, device="meta")  # its shape is what is read
        refuse_labels(target, logits, ignore_index, error)
        raise
    counts = mass > 0
    if not looks(input):
        return Rows(hidden.masked_fill(~counts.unsqueeze(1), 0), labels, mass.unsqueeze(1), None)
    if counts.all():
        return Rows(hidden, labels, mass.unsqueeze(1), None)
    kept = counts.nonzero().squeeze(1)
    return Rows(hidden.index_select(0, kept), labels[kept], mass[kept].unsqueeze(1), kept)


def _as_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """In the dtype that F.linear would compute in; under autocast that is another."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return hidden, weight, bias


def _shaped(value: Tensor, rows: Rows, input: Tensor, reduction: str) -> Tensor:
    """In the shape and dtype that the loss of the logits would have."""
    if not torch.is_autocast_enabled(input.device.type):
        value = value.to(input.dtype)
    elif value.dtype == torch.float64 != input.dtype:
        value = value.float()
    if reduction != "none":
        return value
    if rows.kept is not None:
        everywhere = value.new_zeros(input.shape[:-1].numel())
        value = everywhere.index_copy(0, rows.kept, value)
    return value.view(input.shape[:-1])
