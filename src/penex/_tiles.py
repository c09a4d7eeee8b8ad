r"""PENEX of a linear layer's output, without the logits: for very many classes.

The loss is a sum over classes, and the exponentials that make its value make its gradient too. For
a tile of logits, some rows by some classes, with :math:`E = e^{h W^\top + b}`, all that is needed
of it are the sums of :math:`E`, and the products :math:`E W` and :math:`E^\top h`. They add up over
tiles, and the penalty :math:`\rho`, which may depend on all of them, scales them afterwards. What
the labels contribute is one number for each row.

On the CPU, in float32 and float64, one pass of tiles makes value and gradient. Where its sums
over- or underflow, in half precision, for ``reduction="none"``, on other devices and in a second
backward, the first pass takes log sum_j e^f of each row and a second one the gradient, whose
factors all enter the exponent. Nothing but the CPU's way waits for a device.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from penex._matmul import add_product, linear
from penex._penalty import Penalty
from penex._robust import LOG2E, computed_in, settle_rows

TILE, LARGE_TILE = 1 << 23, 1 << 27
"""Bytes of logits held at a time: few on the CPU, to stay in its cache; more on other devices."""
ROWS, MANY_ROWS = 1024, 8192
"""Rows of a tile, unless it is said: on the CPU, and on other devices."""
SAFE = 1e20
"""Between 1 / SAFE and SAFE, the sum of all exponentials has lost nothing that could show."""
MARGIN = 28.0
"""So far below the dtype's largest exponent of 2 a tile ends, that products with it are finite."""


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

    def sum(self, at_labels: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of the labels and the sum of the exponentials, over all shards."""
        if self.group is None:
            return at_labels, total
        both = torch.cat([at_labels.flatten(), total.view(1)])
        dist.all_reduce(both, group=self.group)
        return both[:-1].unsqueeze(1), both[-1]

    def sum_log(self, at_labels: Tensor, log_partition: Tensor) -> tuple[Tensor, Tensor]:
        """The same with the logarithm of the sum for each row."""
        if self.group is None:
            return at_labels, log_partition
        both = torch.cat([at_labels, log_partition], 1)
        shards = [torch.empty_like(both) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(shards, both, group=self.group)
        stacked = torch.stack(shards)
        return stacked[..., :1].sum(0), stacked[..., 1:].logsumexp(0)

    def place(self, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Where the labels are in this shard, safe to index with, and which are; None: all."""
        if self.group is None:
            return labels, None
        local = labels - self.start
        inside = (local >= 0) & (local < self.stop - self.start)
        return local.where(inside, 0), inside


class Rule(NamedTuple):
    """What is asked of the rows."""

    alpha: float
    penalty: Penalty
    reduction: str
    log_threshold: float | None


def no_autocast(input: Tensor) -> torch.autocast:
    """What is multiplied here has the dtype that it should have."""
    return torch.autocast(input.device.type, enabled=False)


def looks(input: Tensor) -> bool:
    """Whether values may be looked at: not where that would wait, or is traced."""
    return input.is_cpu and not torch.compiler.is_compiling()


def exact(input: Tensor) -> torch.dtype:
    """For what is one number for each row, so that sums over very many lose nothing."""
    return torch.float32 if input.device.type == "mps" else torch.float64


def _finite(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`factor` in `dtype`, so far from its limits that products with it are finite."""
    largest = _largest(dtype)
    return factor.clamp(-(2.0**largest), 2.0**largest).to(dtype)


def _largest(dtype: torch.dtype) -> float:
    return math.log2(torch.finfo(dtype).max) - MARGIN


def _spans(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, start + step)


class _Tiles:
    """Tiles of log2(e) (h W^T + b), in float32 or float64."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, step: int) -> None:
        self.dtype = computed_in(hidden)
        # Half precision is multiplied as it is where the device has units for it.
        self.factor = self.dtype if hidden.is_cpu else hidden.dtype
        self.hidden, self.weight = hidden, weight
        self.bias = None if bias is None else bias.to(self.factor)
        self.height = max(min(step, len(hidden)), 1)
        numbers = (TILE if hidden.is_cpu else LARGE_TILE) // self.dtype.itemsize
        self.width = min(max(numbers // self.height, 1), len(weight))

    def classes(self) -> Iterator[tuple[slice, Tensor]]:
        for span in _spans(len(self.weight), self.width):
            yield span, self.weight[span].to(self.factor)

    def rows(self) -> Iterator[tuple[slice, Tensor]]:
        for span in _spans(len(self.hidden), self.height):
            yield span, self.hidden[span].to(self.factor)

    def logits(self, hidden: Tensor, weight: Tensor, classes: slice) -> Tensor:
        """The tile, to be overwritten; times log2(e), for exp2 is faster than exp on the CPU."""
        bias = None if self.bias is None else self.bias[classes]
        return linear(hidden, weight, bias).to(self.dtype).mul_(LOG2E)

    def at_labels(self, places: Tensor) -> Tensor:
        """The logits of the labels, (N, 1)."""
        result = torch.empty(len(self.hidden), 1, dtype=self.dtype, device=self.hidden.device)
        for span, hidden in self.rows():
            weight = self.weight[places[span]].to(self.dtype)
            torch.sum(weight.mul_(hidden), 1, True, out=result[span])
        if self.bias is not None:
            result += self.bias[places].unsqueeze(1)
        return result


class _Products(NamedTuple):
    """What becomes the gradients of input, weight and bias; None where none is wanted."""

    input: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def _products(tiles: _Tiles, mass: Tensor, wanted: tuple[bool, ...]) -> tuple[Tensor, _Products]:
    """sum_i m_i sum_j E_ij; and E W, E^T (m h) and E^T m, in one pass."""
    given = (tiles.hidden, tiles.weight, tiles.bias)
    made = _Products(
        *(torch.zeros_like(x) if want and x is not None else None
          for x, want in zip(given, wanted, strict=True))
    )  # fmt: skip
    total, factor = mass.new_zeros(()), mass.to(tiles.dtype)
    alike = bool((mass == 1).all())
    for classes, weight in tiles.classes():
        for rows, hidden in tiles.rows():
            powers = tiles.logits(hidden, weight, classes).exp2_()
            total += (powers.sum(1, True) * mass[rows]).sum()
            if made.input is not None:
                add_product(made.input[rows], powers, weight)
            if made.weight is not None:
                weighted = hidden if alike else hidden * factor[rows]
                add_product(made.weight[classes], powers.t(), weighted)
            if made.bias is not None:
                made.bias[classes].addmv_(powers.t(), factor[rows, 0])
    return total, made


def _scaled(
    products: _Products,
    tiles: _Tiles,
    places: Tensor,
    inside: Tensor | None,
    share: Tensor,
    rows_share: Tensor,
    slope: Tensor,
) -> _Products:
    """The gradients from the products, in their memory: times rho, with the labels' part."""
    slope = _finite(slope if inside is None else slope * inside.unsqueeze(1), tiles.dtype)
    if products.input is not None:
        products.input.mul_(_finite(rows_share, tiles.dtype))
    for whole in (products.weight, products.bias):
        if whole is not None:
            whole.mul_(_finite(share, tiles.dtype))
    for rows, hidden in tiles.rows():
        at = places[rows]
        if products.input is not None:
            products.input[rows].addcmul_(tiles.weight[at], slope[rows])
        if products.weight is not None:
            products.weight.index_add_(0, at, hidden * slope[rows])
    if products.bias is not None:
        products.bias.index_add_(0, places, slope.squeeze(1))
    return products


def _log_partition(tiles: _Tiles, dtype: torch.dtype) -> Tensor:
    """log sum_j e^{f_ij}, (N, 1)."""
    result = torch.full((len(tiles.hidden), 1), -math.inf, dtype=dtype, device=tiles.hidden.device)
    limits = torch.finfo(tiles.dtype)
    for classes, weight in tiles.classes():
        for rows, hidden in tiles.rows():
            tile = tiles.logits(hidden, weight, classes)
            largest = tile.amax(1, True).clamp_(limits.min, limits.max)
            sums = tile.sub_(largest).exp2_().sum(1, True)
            part = sums.to(dtype).log2() + largest
            result[rows] = torch.logaddexp2(result[rows], part)
    return result / LOG2E


def _gradients(
    tiles: _Tiles,
    labels: Tensor,
    log_rows: Tensor,
    slope: Tensor,
    grad: Tensor,
    wanted: tuple[bool, ...],
) -> _Products:
    """The gradients from tiles of e^{f + log_rows}, plus `slope` at the labels, times `grad`.

    `labels` count from the first class of the tiles, and may lie outside of them.
    """
    size, largest = grad.abs(), _largest(tiles.dtype)
    exponents = ((log_rows + size.log()) * LOG2E).to(tiles.dtype)
    slope = _finite(_finite(slope, slope.dtype) * size, tiles.dtype)
    sign = torch.ones_like(log_rows).where(grad >= 0, -1.0).to(tiles.dtype)
    to_input = torch.zeros_like(tiles.hidden, dtype=tiles.dtype) if wanted[0] else None
    to_weight = torch.empty_like(tiles.weight) if wanted[1] else None
    to_bias = torch.empty_like(tiles.weight[:, 0]) if wanted[2] else None
    for classes, weight in tiles.classes():
        place = (labels - classes.start).unsqueeze(1)
        mine = (place >= 0) & (place < len(weight))
        place, at_label = place.where(mine, 0), slope.where(mine, 0)
        share = torch.zeros_like(weight, dtype=tiles.dtype)
        total = share.new_zeros(len(weight))
        for rows, hidden in tiles.rows():
            tile = tiles.logits(hidden, weight, classes).add_(exponents[rows])
            tile.clamp_(max=largest).exp2_().scatter_add_(1, place[rows], at_label[rows])
            if to_bias is not None:
                total.addmv_(tile.t(), sign[rows, 0])
            tile = tile.to(tiles.factor)
            if to_input is not None:
                add_product(to_input[rows], tile, weight)
            if to_weight is not None:
                add_product(share, tile.t(), hidden * sign[rows].to(hidden.dtype))
        if to_weight is not None:
            to_weight[classes] = share
        if to_bias is not None:
            to_bias[classes] = total
    return _Products(None if to_input is None else to_input.mul_(sign), to_weight, to_bias)


class Head(torch.autograd.Function):
    """From hidden states, weight and bias to the loss; the other arguments are the boundary's."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        mass: Tensor,
        rule: Rule,
        shard: Shard,
        step: int,
        tracked: bool,
    ) -> Tensor:
        tiles = _Tiles(hidden, weight, bias, step)
        places, inside = shard.place(labels)
        at_labels = tiles.at_labels(places).to(mass.dtype)
        if inside is not None:
            at_labels = at_labels * inside.unsqueeze(1)
        products = None
        if looks(hidden) and hidden.dtype == tiles.dtype and rule.reduction != "none":
            # Without gradients autograd still calls them needed, if a parameter might want one.
            wanted = tuple(tracked and need for need in ctx.needs_input_grad[:3])
            total, products = _products(tiles, mass, wanted)
            true, total = shard.sum(at_labels, total)
            log_partition = total.log()
            if not 1 / SAFE < total.item() < SAFE:
                products = None  # every rank knows the same total
        if products is None:
            true, log_partition = shard.sum_log(at_labels, _log_partition(tiles, mass.dtype))
            log_partition = (log_partition + mass.log()).masked_fill(mass <= 0, -math.inf)
        value, log_rows, slope, settled = settle_rows(
            true, mass, log_partition, shard.num_classes, *rule
        )
        ctx.save_for_backward(hidden, weight, bias, labels, log_rows, slope)
        if products is not None:
            ctx.share = torch.as_tensor(settled.log_penalty, dtype=mass.dtype).exp()
            if rule.reduction == "mean":
                ctx.share = ctx.share / settled.divisor()
        ctx.products, ctx.shard, ctx.step = products, shard, step
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the loss of a linear layer without its logits can be differentiated once, and "
                "create_graph=True asks for more; use penex_loss(F.linear(input, weight, bias))"
            )
        hidden, weight, bias, labels, log_rows, slope = ctx.saved_tensors
        shard: Shard = ctx.shard
        products, ctx.products = ctx.products, None
        grad = grad.to(log_rows.dtype)
        with no_autocast(hidden):
            tiles = _Tiles(hidden, weight, bias, ctx.step)
            if products is not None:
                made = _scaled(
                    products,
                    tiles,
                    *shard.place(labels),
                    ctx.share * grad,
                    log_rows.exp() * grad,
                    slope * grad,
                )
            else:
                wanted = ctx.needs_input_grad[:3]
                grad = grad.unsqueeze(1) if grad.ndim else grad.expand_as(log_rows)
                made = _gradients(tiles, labels - shard.start, log_rows, slope, grad, wanted)
        if made.input is not None and shard.group is not None:
            dist.all_reduce(made.input, group=shard.group)
        given = (hidden, weight, bias)
        gradients = (None if x is None else x.to(y.dtype) for x, y in zip(made, given, strict=True))
        return *gradients, *[None] * 6
