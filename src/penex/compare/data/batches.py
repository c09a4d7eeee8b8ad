"""Batches of rows, the same and in the same order for any number of worker processes and ranks."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from penex.compare.data.images import Images
from penex.compare.data.split import Inputs, Part
from penex.compare.errors import CompareError
from penex.compare.models.choose import row_shape
from penex.compare.models.networks import Encoder

Rows = NDArray[np.int64]


def evaluation_rows(inputs: Inputs) -> int:
    """Batch size for evaluation."""
    if isinstance(inputs, list):
        return 64
    return 4096 if len(row_shape(inputs)) == 1 else 128


class Batches(Sampler[Rows]):
    """The row numbers of one rank's share of every batch.

    The order of rows depends only on the seed and on :attr:`epoch`.

    Args:
        rows: The number of rows.
        size: Rows of a batch over all ranks; the last batch of an epoch has the rows that are left.
        seed: Seed of the order; None: the rows in their original order.
        rank: The rank of this process.
        world: The number of processes. Each gets a contiguous share of every batch, the first ones
            one row more if it does not divide evenly. A rank without a row gets one of another
            rank.
    """

    def __init__(
        self, rows: int, size: int, *, seed: int | None = None, rank: int = 0, world: int = 1
    ) -> None:
        self.rows, self.size, self.seed, self.rank, self.world = rows, size, seed, rank, world
        self.epoch = 0

    def __len__(self) -> int:
        return -(-self.rows // self.size)

    def __iter__(self) -> Iterator[Rows]:
        order = np.arange(self.rows)
        if self.seed is not None:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(order)
        for start in range(0, self.rows, self.size):
            batch = order[start : start + self.size]
            own = np.array_split(batch, self.world)[self.rank] if self.world > 1 else batch
            yield own if len(own) else batch[:1]

    def whole(self, index: int) -> int:
        """The number of rows of a batch over all ranks."""
        return min(self.size, self.rows - index * self.size)

    def own(self, index: int) -> int:
        """The number of rows in this rank's share of a batch."""
        rows, more = divmod(self.whole(index), self.world)
        return rows + (self.rank < more)

    def weights(self, accumulate: int, synchronised: bool) -> list[float]:
        """The factor of the mean loss of each of this rank's shares.

        With these factors, the gradient that is averaged over ranks and summed over `accumulate`
        batches is that of the mean over all rows of the step.

        Args:
            accumulate: Batches per step; the last step of an epoch may have fewer.
            synchronised: Whether the mean of the loss already divides by the average number of rows
                over all ranks.
        """
        sizes = [self.whole(index) for index in range(len(self))]
        weights = []
        for index, size in enumerate(sizes):
            first = index - index % accumulate
            weight = size / sum(sizes[first : first + accumulate])
            weights.append(weight if synchronised else weight * self.own(index) * self.world / size)
        return weights


class _Part(Dataset[Any]):
    """Batches of a part as tensors: the network's inputs, images still as bytes, and the labels."""

    def __init__(self, part: Part, encoder: Encoder | None) -> None:
        inputs, target = part
        self.target = torch.from_numpy(target)
        self.take = _taker(inputs, encoder)

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, rows: Rows) -> tuple[Tensor, Tensor] | CompareError:
        try:
            return self.take(rows), self.target[torch.from_numpy(rows)]
        except CompareError as error:
            return error  # raised by the consumer: a worker process would add its traceback


def _taker(inputs: Inputs, encoder: Encoder | None) -> Callable[[Rows], Tensor]:
    if isinstance(inputs, Images):
        return inputs.take
    if isinstance(inputs, list):
        assert encoder is not None  # noqa: S101  # models for text have one
        return _Padded(encoder(inputs))
    return _Indexed(torch.from_numpy(inputs))


class _Indexed:
    def __init__(self, features: Tensor) -> None:
        self.features = features

    def __call__(self, rows: Rows) -> Tensor:
        return self.features[torch.from_numpy(rows)]


class _Padded:
    """Token numbers, padded with 0 to the longest text of the batch."""

    def __init__(self, tokens: list[NDArray[np.int64]]) -> None:
        self.lengths = np.array([len(text) for text in tokens])
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.tokens = np.concatenate(tokens)

    def __call__(self, rows: Rows) -> Tensor:
        batch = np.zeros((len(rows), self.lengths[rows].max()), np.int64)
        for line, row in zip(batch, rows, strict=True):
            start, length = self.starts[row], self.lengths[row]
            line[:length] = self.tokens[start : start + length]
        return torch.from_numpy(batch)


def loader(
    part: Part, batches: Batches, encoder: Encoder | None, workers: int, device: torch.device
) -> DataLoader[Any]:
    """A loader of `batches` of `part` in `workers` processes, or in this process if 0."""
    return DataLoader(
        _Part(part, encoder),
        sampler=batches,
        batch_size=None,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=_as_it_is,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # leaves the global generator, and so the results, untouched
    )


def _as_it_is(batch: Any) -> Any:
    return batch
