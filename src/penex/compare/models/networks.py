"""The networks that the comparison trains; they return logits and use all their parameters."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Encoder = Callable[[Iterable[str]], list[NDArray[np.int64]]]
"""Maps texts to the numbers of their tokens, all above 0; 0 pads the shorter texts of a batch."""


class Normalise(nn.Module):
    """Maps pixels from [0, 1] to [-1, 1]: mean and standard deviation 0.5 in every channel."""

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels - 0.5) / 0.5


def mlp(shape: Sequence[int], num_classes: int, *, hidden: Sequence[int]) -> nn.Sequential:
    """A multilayer perceptron with ReLU from rows of shape `shape` to logits."""
    widths = [prod(shape), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for width, following in pairwise(widths):
        layers += [nn.Linear(width, following), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))


def _with_channels(images: Tensor) -> Tensor:
    """Add a channel dimension to images (n, H, W); images (n, C, H, W) stay as they are."""
    return images.unsqueeze(1) if images.ndim == 3 else images


class ConvNet(nn.Module):
    """The paper's network: three convolutions, each halving the image, and two linear layers.

    Args:
        shape: (C, H, W), H and W at least 8.
        num_classes: Number of logits.
        dropout: Dropout probability before the first linear layer.
        deep_supervision: Whether to classify the channel means after the first and the second
            convolution, too. In training the result is then a tuple of three logits, these two
            first.
    """

    def __init__(
        self, shape: Sequence[int], num_classes: int, *, dropout: float, deep_supervision: bool
    ) -> None:
        super().__init__()
        channels, height, width = shape
        widths = [channels, 32, 64, 128]
        self.blocks = nn.ModuleList(
            # Equivalent to ReLU before pooling, but computed on a quarter of the values.
            nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.MaxPool2d(2), nn.ReLU())
            for before, after in pairwise(widths)
        )
        self.top = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(128 * (height // 8) * (width // 8), 256),
            nn.ReLU(),
            nn.Linear(256, num_classes),
        )
        self.heads = nn.ModuleList(
            nn.Linear(width, num_classes) for width in widths[1:3] if deep_supervision
        )

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        # Channels last takes two thirds of the time on a CPU. contiguous() would not change the
        # strides of grey images, which would then not propagate the layout.
        images = _with_channels(images).clone(memory_format=torch.channels_last)
        early = []
        for depth, block in enumerate(self.blocks):
            images = block(images)
            if self.training and depth < len(self.heads):
                early.append(self.heads[depth](images.mean((2, 3))))
        logits: Tensor = self.top(images)
        return (*early, logits) if early else logits


class ViT(nn.Module):
    """A pre-norm vision transformer that classifies by a class token.

    Args:
        shape: (C, H, W), H and W multiples of `patch`.
        num_classes: Number of logits.
        patch: Height and width of the square patches that become tokens.
        dim: Width of the tokens.
        depth: Number of layers.
        heads: Number of attention heads per layer.
        mlp: Width of the feed-forward networks.
        dropout: Dropout probability.
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int,
        *,
        patch: int,
        dim: int,
        depth: int,
        heads: int,
        mlp: int,
        dropout: float,
    ) -> None:
        super().__init__()
        channels, height, width = shape
        tokens = (height // patch) * (width // patch)
        self.patches = nn.Conv2d(channels, dim, patch, stride=patch)
        self.first = nn.Parameter(torch.zeros(dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens + 1, dim))
        self.dropout = nn.Dropout(dropout)
        self.encoder = _encoder(dim, depth, heads, mlp, dropout)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(_with_channels(images)).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.first.expand(len(images), 1, -1), patches], 1)
        encoded = self.encoder(self.dropout(tokens + self.positions))
        logits: Tensor = self.head(encoded[:, 0])
        return logits


class TextTransformer(nn.Module):
    """A transformer with learned embeddings that classifies the mean of its output tokens.

    Args:
        vocabulary: Number of token numbers, including 0, which is padding.
        num_classes: Number of logits.
        max_length: Maximum number of tokens of a text.
        dim: Width of the tokens.
        depth: Number of layers.
        heads: Number of attention heads per layer.
        mlp: Width of the feed-forward networks.
        dropout: Dropout probability.
    """

    def __init__(
        self,
        vocabulary: int,
        num_classes: int,
        *,
        max_length: int,
        dim: int,
        depth: int,
        heads: int,
        mlp: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, dim, padding_idx=0)
        self.positions = nn.Parameter(0.02 * torch.randn(1, max_length, dim))
        self.dropout = nn.Dropout(dropout)
        self.encoder = _encoder(dim, depth, heads, mlp, dropout)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, ids: Tensor) -> Tensor:
        padding = ids == 0
        tokens = self.tokens(ids) + self.positions[:, : ids.shape[1]]
        encoded = self.encoder(self.dropout(tokens), src_key_padding_mask=padding)
        kept = (~padding).unsqueeze(2)
        logits: Tensor = self.head(encoded.where(kept, 0).sum(1) / kept.sum(1))
        return logits


def _encoder(dim: int, depth: int, heads: int, mlp: int, dropout: float) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        dim, heads, mlp, dropout, activation="gelu", layer_norm_eps=1e-6, batch_first=True,
        norm_first=True,
    )  # fmt: skip
    norm = nn.LayerNorm(dim, eps=1e-6)
    encoder = nn.TransformerEncoder(layer, depth, norm, enable_nested_tensor=False)
    for parameter in encoder.parameters():  # torch makes all layers copies of the first
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)
    return encoder


class Vocabulary:
    """An encoder of words and punctuation.

    A text without tokens is encoded as one unknown word, because attention needs at least one.

    Args:
        words: The known words, numbered from 2; 0 is padding, and 1 stands for every other word.
        max_length: Texts are truncated to this number of tokens.
    """

    def __init__(self, words: Iterable[str], *, max_length: int) -> None:
        self.words = {word: number for number, word in enumerate(words, start=2)}
        self.max_length = max_length

    @classmethod
    def of_texts(cls, texts: Iterable[str], *, size: int, max_length: int) -> "Vocabulary":
        """The vocabulary of the most frequent words of training texts, with at most `size` numbers.

        The two numbers for padding and unknown words are included in `size`.
        """
        counts = Counter(word for text in texts for word in _words(text))
        # Ties are broken by spelling, so that the order of the texts does not matter.
        frequent = sorted(counts, key=lambda word: (-counts[word], word))[: size - 2]
        return cls(frequent, max_length=max_length)

    def __len__(self) -> int:
        return len(self.words) + 2

    def __call__(self, texts: Iterable[str]) -> list[NDArray[np.int64]]:
        return [
            np.array([self.words.get(word, 1) for word in words[: self.max_length]], np.int64)
            for words in (_words(text) or [""] for text in texts)
        ]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


class Foreign(nn.Module):
    """An image classifier of another library, with its own normalisation of pixels.

    Args:
        model: A model of images with `channels` channels.
        channels: Number of channels to which grey images are repeated.
        mean: Mean of each channel, for pixels in [0, 1].
        std: Standard deviation of each channel, for pixels in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: nn.Module, channels: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.model = model
        self.channels = channels
        for name, values in (("mean", mean), ("std", std)):
            column = torch.tensor(list(values)).reshape(1, -1, 1, 1)
            self.register_buffer(name, column, persistent=False)

    def forward(self, images: Tensor) -> Any:
        pixels = _with_channels(images) * 0.5 + 0.5
        pixels = (pixels - self.mean) / self.std
        output = self.model(pixels.expand(-1, self.channels, -1, -1))
        return getattr(output, "logits", output)


class ForeignText(nn.Module):
    """A sequence classifier of the transformers library.

    Args:
        model: A model that takes ``input_ids`` and ``attention_mask``.
        padding: The model's own number of the padding token.
    """

    def __init__(self, model: nn.Module, padding: int) -> None:
        super().__init__()
        self.model = model
        self.padding = padding

    def forward(self, ids: Tensor) -> Tensor:
        kept = ids > 0
        ids = (ids - 1).where(kept, self.padding)
        logits: Tensor = self.model(input_ids=ids, attention_mask=kept.long()).logits
        return logits


class Tokenizer:
    """A tokenizer of the transformers library, with its numbers increased by one.

    Args:
        tokenizer: The tokenizer of the model that is trained.
        max_length: Texts are truncated to this number of tokens.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length

    def __call__(self, texts: Iterable[str]) -> list[NDArray[np.int64]]:
        encoded = self.tokenizer(list(texts), truncation=True, max_length=self.max_length)
        return [np.array(ids, np.int64) + 1 for ids in encoded["input_ids"]]
