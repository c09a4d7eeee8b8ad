r"""The losses of a linear layer's output, without holding the logits: for very many classes.

Rows come in blocks, with all their classes. With :math:`c_i = \partial L / \partial s_i` the
gradients of a block of probabilities p are :math:`c\,(p W)` and :math:`p^\top (c\,h)`, and what the
labels contribute is one number for each row. A loss that sums rows knows c at once. PENEX and
log-PENEX know it up to one factor of the batch, which scales the sums afterwards:
:math:`c_i \propto \omega_i e^{\beta s_i}` is taken relative to the largest exponent so far. So
there are three products, one for the logits and two for the gradients, whatever the loss.

A process may hold the share of the classes that is its own: two numbers for each row make of the
shares' t and s those of all classes.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

from penex import _row_losses as row_losses
from penex._inputs import (
    INDEX_DTYPES,
    Reduction,
    can_inspect,
    check_device,
    check_reduction,
    check_weight,
    choice,
    computed_in,
    count,
    integer,
    positive,
    refuse_labels,
)
from penex._log_mean import row_dtype
from penex._matmul import add_product, linear
from penex._passes import powers_from
from penex._penalty import rule_of
from penex._row_losses import Penex, RowLoss, Rows, Rule, log_partition

__all__ = ["linear_loss", "linear_penex_loss", "sampled_linear_penex_loss"]

BLOCK_BYTES, DEVICE_BLOCK_BYTES = 1 << 25, 1 << 28
"""Bytes of logits held at a time, on the CPU and on other devices."""
MIN_BLOCK_ROWS = 256
"""A block has so many rows at least: products of fewer are slow."""
GROWTH = 20.0
"""So far exponents may rise above the first ones before what was summed is scaled down."""


def linear_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    criterion: nn.Module | Rule,
    chunk_size: int | None = None,
    vocab_group: dist.ProcessGroup | None = None,
    num_classes: int | None = None,
) -> Tensor:
    r"""A loss of the logits :math:`f = h W^\top + b`, which are never held all at a time.

    Equal to ``criterion(F.linear(input, weight, bias), target)`` up to rounding, with gradients for
    `input`, `weight` and `bias`, as far as they require one. They can be differentiated once.

    Beyond the gradients it takes the memory of a block of logits, which on the CPU is the larger of
    32 MiB and 256 rows (so it grows with K from 32768 classes on), on other devices of 256 MiB.

    Args:
        input: :math:`h`, floating point, shape (..., D). Computed in float32, or float64 if that
            is the input's dtype; products of half precision in that on other devices than the CPU.
        weight: :math:`W`, shape (K, D), dtype of `input`.
        target: Class indices, integer, shape (...).
        bias: :math:`b`, shape (K), dtype of `input`.
        criterion: A criterion of :mod:`penex.losses` without label smoothing, except
            :class:`penex.losses.ConfidencePenaltyLoss`, which is no function of two numbers a row.
            It has the class weights, `ignore_index` and `reduction`; PENEX updates its penalty. Or
            the `rule` of :func:`row_loss`, for the mean over rows whose label is not -100.
        chunk_size: Rows of a block. None: as many as the memory above has room for.
        vocab_group: The process group whose ranks share the classes: of G ranks, rank r holds
            `weight` and `bias` of the classes from r⌈K/G⌉, ⌈K/G⌉ of them or what is left.
            `input`, `target` and `criterion` are the same on all ranks, as are the loss and the
            input's gradient. A step takes one collective of two numbers for each row of a block,
            and one of the input's gradient.
        num_classes: K, if `vocab_group` is given.

    Returns:
        The loss: 0-d, or of shape (...) for ``reduction="none"``, which takes a fourth product.

    Raises:
        TypeError: A dtype or the type of an option is not what was expected.
        ValueError: An option is out of its range, or shapes or devices do not match.
        IndexError: A class index is out of range (on the CPU; a CUDA device asserts by itself).

    Example:
        >>> from penex.losses import FocalLoss
        >>> hidden, weight = torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> linear_loss(hidden, weight, torch.tensor([0, 1]), criterion=FocalLoss(gamma=1.0))
        tensor(0.0497)
    """
    return head_loss(
        input,
        weight,
        target,
        bias,
        **options_of(criterion),
        chunk_size=chunk_size,
        vocab_group=vocab_group,
        num_classes=num_classes,
    )


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

    Equal to ``penex_loss(F.linear(input, weight, bias), target, ...)`` up to rounding; see
    :func:`linear_loss`, which it calls, and :func:`penex_loss`.

    `sensitivity`, `penalty` and `huberization` are those of :func:`penex_loss`, `class_weight`,
    :math:`w`, is its `weight`, and is not differentiated. The other arguments, the result and the
    errors are those of :func:`linear_loss`.

    Example:
        >>> hidden, weight = torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> linear_penex_loss(hidden, weight, torch.tensor([0, 1]), sensitivity=0.5, penalty=0.25)
        tensor(2.0006)
    """
    return head_loss(
        input,
        weight,
        target,
        bias,
        loss=_penex(sensitivity, penalty, huberization),
        class_weight=class_weight,
        ignore_index=ignore_index,
        reduction=reduction,
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

    `num_sampled` is m, at least one. `sampler` is ``"uniform"``, or ``"log-uniform"``: class k with
    probability log((k + 2) / (k + 1)) / log(K + 1), for classes in the order of falling frequency.
    `generator` is where the random numbers come from; None: torch's own for the device. The other
    arguments, the result and the errors are those of :func:`linear_penex_loss`.

    Example:
        >>> hidden, weight = torch.ones(3, 2), torch.zeros(1000, 2)
        >>> target = torch.tensor([0, 1, 2])
        >>> sampled_linear_penex_loss(
        ...     hidden, weight, target, num_sampled=5, sampler="uniform", penalty=1e-3
        ... ).round(decimals=2)  # 1 + 1e-3 * 1000
        tensor(2.)
    """
    return sampled_head_loss(
        input,
        weight,
        target,
        bias,
        num_sampled=num_sampled,
        sampler=sampler,
        loss=_penex(sensitivity, penalty, huberization),
        class_weight=class_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        generator=generator,
    )


def options_of(criterion: nn.Module | Rule) -> dict[str, Any]:
    """The loss of the rows' numbers, and the options, that a criterion or a rule stands for."""
    if not isinstance(criterion, nn.Module) and callable(criterion):
        rule = row_losses.RuleLoss(criterion)
        return {"loss": rule, "class_weight": None, "ignore_index": -100, "reduction": "mean"}
    found: Any = criterion
    loss: RowLoss | None = found._row_loss() if hasattr(criterion, "_row_loss") else None
    if loss is None or not loss.by_rows(soft=False):
        raise TypeError(
            "criterion: expected a criterion of penex.losses that is a function of two numbers a "
            f"row, or a rule, got {type(criterion).__name__}"
        )
    if found.label_smoothing:
        raise ValueError(
            "criterion: the loss of a linear layer takes no label smoothing, got "
            f"label_smoothing={found.label_smoothing}"
        )
    return {
        "loss": loss,
        "class_weight": found.weight,
        "ignore_index": found.ignore_index,
        "reduction": found.reduction,
    }


def _penex(sensitivity: float, penalty: float | Tensor | None, huberization: float | None) -> Penex:
    alpha = positive("sensitivity", sensitivity)
    return Penex(alpha, rule_of(penalty, alpha), huberization)


class _Batch(NamedTuple):
    """The boundary's result: hidden states and labels of rows that count."""

    hidden: Tensor
    """(N, D)."""
    labels: Tensor
    """(N), valid to index with."""
    weights: Tensor
    """omega, (N, 1), in :func:`row_dtype`; all above zero on the CPU."""
    kept: Tensor | None
    """Their places among all rows; None: these are all rows."""


def head_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    *,
    loss: RowLoss,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    chunk_size: int | None,
    vocab_group: dist.ProcessGroup | None,
    num_classes: int | None,
) -> Tensor:
    """:func:`linear_loss` of any loss of the rows' numbers."""
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
    reduction = check_reduction(reduction)
    batch = _batch(input, target, class_weight, ignore_index, shard.num_classes)
    hidden, weight, bias = _as_linear(batch.hidden, weight, bias)
    with _no_autocast(input):
        value: Tensor = _Head.apply(  # type: ignore[no-untyped-call]
            hidden,
            weight,
            bias,
            batch.labels,
            batch.weights,
            loss,
            reduction,
            shard,
            chunk_size or shard.block_rows(hidden),
            torch.is_grad_enabled(),
        )
    return _shaped(value, batch, input, reduction)


def sampled_head_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    *,
    num_sampled: int,
    sampler: str,
    loss: RowLoss,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    generator: torch.Generator | None,
) -> Tensor:
    """:func:`sampled_linear_penex_loss` with any rule for the penalty."""
    count("num_sampled", num_sampled)
    choice("sampler", sampler, ("uniform", "log-uniform"))
    _check_tensors(input, weight, target, bias)
    checked = check_reduction(reduction)
    batch = _batch(input, target, class_weight, ignore_index, len(weight))
    hidden, weight, bias = _as_linear(batch.hidden, weight, bias)
    if len(hidden) == 0:
        nothing = hidden.sum(1) + 0 * weight.sum()
        return _shaped(nothing if reduction == "none" else nothing.sum(), batch, input, reduction)
    dtype = computed_in(hidden)
    with _no_autocast(input):
        drawn, log_probability = draw(num_sampled, len(weight), sampler, weight.device, generator)
        hidden = hidden.to(dtype)
        used, size = torch.cat([batch.labels, drawn]), len(hidden)
        vectors = weight[used].to(dtype)
        true, others = (hidden * vectors[:size]).sum(1, True), hidden @ vectors[size:].t()
        if bias is not None:
            offsets = bias[used].to(dtype)
            true, others = true + offsets[:size].unsqueeze(1), others + offsets[size:]
        others = others - (log_probability + math.log(num_sampled)).to(dtype)
        others = others.masked_fill(drawn == batch.labels.unsqueeze(1), -math.inf)
        # The label's logit comes first; what follows stands for the other classes.
        largest, log_sum = log_partition(torch.cat([true, others], 1))
        t = true.to(row_dtype(true))
        rows = Rows(
            t, largest + log_sum, t - largest - log_sum, batch.weights, None, checked, len(weight)
        )
        value = loss.on_rows(rows).value
    return _shaped(value, batch, input, reduction)


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
        if value is not None and isinstance(input, Tensor):
            check_device(name, value, input)
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


def _batch(
    input: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    num_classes: int,
) -> _Batch:
    """What counts of the rows; the others may hold anything, NaN included."""
    ignore_index = integer("ignore_index", ignore_index)
    hidden, target = input.reshape(-1, input.shape[-1]), target.reshape(-1).long()
    dtype = row_dtype(input)
    if class_weight is None:
        weights = torch.ones((), dtype=dtype, device=input.device).expand(num_classes)
    else:
        check_weight("class_weight", class_weight, input, num_classes)
        if class_weight.requires_grad:
            raise ValueError("class_weight: expected a tensor that does not require a gradient")
        weights = class_weight.to(dtype)
    keep = target != ignore_index
    labels = target.where(keep, 0)
    try:
        row_weights = weights.index_select(0, labels) * keep
    except (IndexError, RuntimeError) as error:
        refuse_labels(target, num_classes, ignore_index, error)
        raise
    counts = row_weights > 0
    if not can_inspect(input):
        hidden = hidden.masked_fill(~counts.unsqueeze(1), 0)
        return _Batch(hidden, labels, row_weights.unsqueeze(1), None)
    if counts.all():
        return _Batch(hidden, labels, row_weights.unsqueeze(1), None)
    kept = counts.nonzero().squeeze(1)
    hidden = hidden.index_select(0, kept)
    return _Batch(hidden, labels[kept], row_weights[kept].unsqueeze(1), kept)


def _as_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """In the dtype that F.linear would compute in; under autocast that is another."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return hidden, weight, bias


def _shaped(value: Tensor, rows: _Batch, input: Tensor, reduction: str) -> Tensor:
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


# The mathematics.


def _no_autocast(input: Tensor) -> torch.autocast:
    """What is multiplied here has the dtype that it should have."""
    return torch.autocast(input.device.type, enabled=False)


class Shard(NamedTuple):
    """The classes that this process holds, from `start` up to `stop`."""

    start: int
    stop: int
    num_classes: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, num_classes: int, group: dist.ProcessGroup | None) -> "Shard":
        """The share of this rank, as :func:`torch.chunk` divides; without a group all of them."""
        if group is None:
            return cls(0, num_classes, num_classes, None)
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        if rank < 0:
            raise ValueError("vocab_group: this process does not belong to it")
        each = -(-num_classes // size)
        if each * (size - 1) >= num_classes:
            raise ValueError(
                f"vocab_group: {num_classes} classes in shares of {each} leave nothing for the "
                f"last of {size} ranks; use a smaller group"
            )
        return cls(rank * each, min((rank + 1) * each, num_classes), num_classes, group)

    def block_rows(self, hidden: Tensor) -> int:
        """Rows of a block: the same on all ranks, as each block takes a collective."""
        ranks = 1 if self.group is None else dist.get_world_size(self.group)
        room = BLOCK_BYTES if hidden.is_cpu else DEVICE_BLOCK_BYTES
        size = -(-self.num_classes // ranks) * computed_in(hidden).itemsize
        return max(room // size, MIN_BLOCK_ROWS)

    def place(self, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Where the labels are in this shard, valid to index with, and which are; None: all."""
        if self.group is None:
            return labels, None
        local = labels - self.start
        inside = (local >= 0) & (local < self.stop - self.start)
        return local.where(inside, 0), inside

    def join(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """t and s over all shards, from those of this one; t is 0 where another has the label."""
        if self.group is None:
            return t, s
        both = torch.cat([t, s], 1)
        shards = [torch.empty_like(both) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(shards, both, group=self.group)
        stacked = torch.stack(shards)
        return stacked[..., :1].sum(0), stacked[..., 1:].logsumexp(0)


class _Layer:
    """A linear layer on its input, in blocks of rows."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, shard: Shard, step: int
    ) -> None:
        # Half precision is multiplied as it is where the device has units for it.
        self.dtype = computed_in(hidden)
        dtype = self.dtype if hidden.is_cpu else hidden.dtype
        self.hidden, self.weight = hidden.to(dtype), weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.shard = shard
        self.blocks = [slice(i, i + step) for i in range(0, len(hidden), step)]

    def rows(self, block: slice, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """t and s of a block over all classes; e^f of this shard's, and r with p = r e^f."""
        logits = linear(self.hidden[block], self.weight, self.bias).to(self.dtype)
        place, inside = self.shard.place(labels[block])
        t = logits.gather(1, place.unsqueeze(1))
        if inside is not None:
            t = t.where(inside.unsqueeze(1), 0)
        limits = torch.finfo(self.dtype)
        largest = logits.amax(1, True).clamp_(limits.min, limits.max)
        powers = powers_from(logits, -largest, out=logits)
        sums, wide = powers.sum(1, True), row_dtype(logits)
        own = sums.to(wide).log().add_(largest)
        t, s = self.shard.join(t.to(wide), own)
        factor = 1 / sums if self.shard.group is None else (own - s).exp().to(sums.dtype) / sums
        return t, s, powers, factor


class _Gradients:
    """The sums c (p W), p^T (c h) and p^T c over the blocks, relative to e^log_scale.

    None where none is wanted. Relative, as slopes and their sums may be beyond the dtype.
    """

    def __init__(self, layer: _Layer, wanted: tuple[bool, ...]) -> None:
        given = layer.hidden, layer.weight, layer.bias
        self.layer = layer
        self.sums = [
            torch.zeros_like(x, dtype=layer.dtype) if want and x is not None else None
            for x, want in zip(given, wanted, strict=True)
        ]
        dtype = row_dtype(layer.hidden)
        self.largest = torch.finfo(dtype).max
        self.log_scale = torch.full((), -self.largest, dtype=dtype, device=layer.hidden.device)

    def add(
        self, block: slice, powers: Tensor, factor: Tensor, log_c: Tensor, sign: Tensor | float
    ) -> None:
        """Add a block with p = factor * powers and c = sign * e^log_c."""
        to_hidden, to_weight, to_bias = self.sums
        hidden, weight = self.layer.hidden[block], self.layer.weight
        top = log_c.amax().clamp(max=self.largest)
        if not can_inspect(top) or top > self.log_scale + GROWTH:
            before, self.log_scale = self.log_scale, torch.maximum(self.log_scale, top)
            self.scale(before - self.log_scale)
        c = ((log_c - self.log_scale).exp() * sign).to(factor.dtype) * factor
        if to_bias is not None:
            to_bias.addmv_(powers.t(), c.squeeze(1))
        powers = powers.to(weight.dtype)
        if to_hidden is not None:
            add_product(to_hidden[block], powers, weight)
            to_hidden[block].mul_(c)
        if to_weight is not None:
            add_product(to_weight, powers.t(), hidden * c.to(hidden.dtype))

    def finish(
        self, labels: Tensor, log_dt: Tensor, sign: Tensor, log_factor: Tensor | float = 0.0
    ) -> None:
        """Multiply by e^log_factor, and add what the slopes in t contribute."""
        before = self.log_scale + log_factor
        largest = log_dt.amax() if log_dt.numel() else before
        self.log_scale = torch.maximum(before, largest).clamp(-self.largest, self.largest)
        self.scale(before - self.log_scale)
        dt = ((log_dt - self.log_scale).exp() * sign).to(self.layer.dtype)
        to_hidden, to_weight, to_bias = self.sums
        place, inside = self.layer.shard.place(labels)
        if inside is not None:
            dt = dt.where(inside.unsqueeze(1), 0)
        for block in self.layer.blocks:
            at, slope = place[block], dt[block]
            if to_hidden is not None:
                to_hidden[block].addcmul_(self.layer.weight[at].to(slope.dtype), slope)
            if to_weight is not None:
                to_weight.index_add_(0, at, self.layer.hidden[block] * slope)
        if to_bias is not None:
            to_bias.index_add_(0, place, dt.squeeze(1))
        if to_hidden is not None and self.layer.shard.group is not None:
            dist.all_reduce(to_hidden, group=self.layer.shard.group)

    def scale(self, log_factor: Tensor, sign: Tensor | float = 1.0) -> None:
        """Multiply by a factor that may be beyond the dtype: in two steps, each within it."""
        if can_inspect(log_factor) and log_factor.item() == 0 and sign == 1:
            return
        half = (log_factor / 2).clamp(max=math.log(torch.finfo(self.layer.dtype).max) - 1).exp()
        for total in self.sums:
            if total is not None:
                total.mul_((half * sign).to(total.dtype)).mul_(half.to(total.dtype))


class _Head(Function):
    """From hidden states, weight and bias to the loss; the other arguments are the boundary's.

    The forward pass computes the gradients up to the upstream gradient, a factor. For ``none`` that
    has a number for each row, and the backward pass computes them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        weights: Tensor,
        loss: RowLoss,
        reduction: Reduction,
        shard: Shard,
        step: int,
        tracked: bool,
    ) -> Tensor:
        layer = _Layer(hidden, weight, bias, shard, step)
        # Without gradients autograd still calls them needed, if a parameter might want one.
        wanted = tuple(tracked and need for need in ctx.needs_input_grad[:3])
        now = any(wanted) and reduction != "none" and len(hidden) > 0
        gradients = _Gradients(layer, wanted) if now else None
        denominator, numbers = weights.sum(), [weights[:0].expand(0, 2)]
        for block in layer.blocks:
            t, s, powers, factor = layer.rows(block, labels)
            t, s = (x.masked_fill(weights[block] == 0, 0) for x in (t, s))
            numbers.append(torch.cat([t, s], 1))
            if gradients is not None:
                rows = Rows(t, s, t - s, weights[block], denominator, reduction, shard.num_classes)
                gradients.add(block, powers, factor, *_relative_slopes(loss, rows))
            del powers  # or two blocks would be held
        t, s = torch.cat(numbers).tensor_split(2, 1)
        rows = Rows(t, s, t - s, weights, denominator, reduction, shard.num_classes)
        outcome = loss.on_rows(rows)
        dt, ds = (
            torch.as_tensor(x, dtype=s.dtype, device=s.device) for x in (outcome.dt, outcome.ds)
        )
        log_ds = ds.abs().log() if outcome.log_dz is None else outcome.log_dz + s
        log_dt = dt.abs().log() if outcome.log_dt is None else outcome.log_dt
        if gradients is not None:  # the factor, by the row with the largest slope
            exponent, _ = _relative_slopes(loss, rows)
            row = exponent.argmax()
            gradients.finish(labels, log_dt, dt.sign(), log_ds.take(row) - exponent.take(row))
        ctx.slopes = dt.sign(), log_dt, ds.sign(), log_ds
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.gradients, ctx.shard, ctx.step = gradients, shard, step
        return outcome.value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the loss of a linear layer without its logits can be differentiated once, and "
                "create_graph=True asks for more; use the criterion on "
                "torch.nn.functional.linear(input, weight, bias)"
            )
        hidden, weight, bias, labels = ctx.saved_tensors
        gradients: _Gradients | None = ctx.gradients
        ctx.gradients = None
        sign_dt, log_dt, sign_ds, log_ds = ctx.slopes
        grad = grad.to(log_ds.dtype)
        grad = grad.unsqueeze(1) if grad.ndim else grad
        log_grad, sign = grad.abs().log(), grad.sign()
        with _no_autocast(hidden):
            if gradients is None:  # "none", or the forward pass's are used up
                layer = _Layer(hidden, weight, bias, ctx.shard, ctx.step)
                gradients = _Gradients(layer, ctx.needs_input_grad[:3])
                log_c, sign_c = log_ds + log_grad, sign_ds * sign
                for block in layer.blocks:
                    _, _, powers, factor = layer.rows(block, labels)
                    gradients.add(block, powers, factor, log_c[block], sign_c[block])
                    del powers
                gradients.finish(labels, log_dt + log_grad, sign_dt * sign)
                gradients.scale(gradients.log_scale)
            else:
                gradients.scale(gradients.log_scale + log_grad, sign)
        given = (hidden, weight, bias)
        made = (
            None if x is None else x.to(y.dtype) for x, y in zip(gradients.sums, given, strict=True)
        )
        return *made, *[None] * 7


def _relative_slopes(loss: RowLoss, rows: Rows) -> tuple[Tensor, Tensor | float]:
    """Slopes in s up to one positive factor of the batch: logarithms, above -inf, and signs."""
    log_slopes, sign = loss.relative_slopes(rows)
    return log_slopes.clamp(min=-torch.finfo(log_slopes.dtype).max), sign
