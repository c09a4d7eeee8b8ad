"""Rows in batches: the same ones in the same order, whoever loads them and however many share."""

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
    """Rows that go through the network at once where nothing is learnt."""
    if isinstance(inputs, list):
        return 64
    return 4096 if len(row_shape(inputs)) == 1 else 128


class Batches(Sampler[Rows]):
    """The row numbers of one rank's share of every batch.

    The order of the epoch :attr:`epoch` depends on it and on the seed alone.

    Args:
        rows: So many there are.
        size: Rows of a batch, all ranks together; the last batch of an epoch has what is left.
        seed: Of the order; None: as they come.
        rank: Which process this is.
        world: How many there are. Each gets a stretch of every batch, the first ones one row more
            where it does not come out even, and a row that is another's where nothing is left.
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
        """Rows of a batch, all ranks together."""
        return min(self.size, self.rows - index * self.size)

    def own(self, index: int) -> int:
        """Rows of a batch that are this rank's."""
        rows, more = divmod(self.whole(index), self.world)
        return rows + (self.rank < more)

    def weights(self, accumulate: int, synchronised: bool) -> list[float]:
        """What to multiply the mean loss of each of this rank's shares by.

        With these, the gradients that ranks average and `accumulate` batches add up to are those of
        the mean over all rows of the step.

        Args:
            accumulate: Batches to a step; the last step of an epoch may have fewer.
            synchronised: The mean of the loss divides by the average number of rows of all ranks
                already.
        """
        sizes = [self.whole(index) for index in range(len(self))]
        weights = []
        for index, size in enumerate(sizes):
            first = index - index % accumulate
            weight = size / sum(sizes[first : first + accumulate])
            weights.append(weight if synchronised else weight * self.own(index) * self.world / size)
        return weights


class _Part(Dataset[Any]):
    """Batches of a part, as tensors: what the network takes, images still as bytes, and labels."""

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
            return error  # raised by who asked: a worker process would add its traceback


def _taker(inputs: Inputs, encoder: Encoder | None) -> Callable[[Rows], Tensor]:
    if isinstance(inputs, Images):
        return inputs.take
    if isinstance(inputs, list):
        assert encoder is not None  # noqa: S101  # of a model for text
        return _Padded(encoder(inputs))
    return _Indexed(torch.from_numpy(inputs))


class _Indexed:
    def __init__(self, features: Tensor) -> None:
        self.features = features

    def __call__(self, rows: Rows) -> Tensor:
        return self.features[torch.from_numpy(rows)]


class _Padded:
    """Token numbers, those of shorter texts of a batch filled up with 0."""

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
    """What loads `batches` of `part`, in so many worker processes, or in this one if 0."""
    return DataLoader(
        _Part(part, encoder),
        sampler=batches,
        batch_size=None,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=_as_it_is,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # the global one is for what the numbers depend on
    )


def _as_it_is(batch: Any) -> Any:
    return batch
