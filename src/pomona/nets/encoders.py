"""Encoders: from a task's input row to what a backbone works on."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pomona.errors import PomonaError
from pomona.nets.specs import Column, Inputs

ONE_HOT_LIMIT = 8
"""Categories with at most this many codes are one-hot; larger ones are embedded."""

PLACE_SCALE = 0.2
"""Standard deviation of the learned vectors that tell places apart: about that of the projections they are added to."""


def embedding_size(cardinality: int) -> int:
    """Width of a category's embedding: 1.6 n^0.56, at most 64, the usual rule for tables."""
    return min(64, max(2, round(1.6 * cardinality**0.56)))


class ImageEncoder(nn.Module):
    """Two strided convolutions and global average pooling, for an image column of a table.

    Shapes:
        (B, channels * height * width) -> (B, features)
    """

    def __init__(self, shape: tuple[int, ...], features: int = 32) -> None:
        super().__init__()
        self.shape = shape
        self.body = nn.Sequential(
            nn.Conv2d(shape[0], features // 2, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(features // 2, features, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.body(x.reshape(len(x), *self.shape))


class TextEncoder(nn.Module):
    """Mean of the embeddings of a text column's tokens; code 0 is padding.

    Shapes:
        (B, tokens) -> (B, features)
    """

    def __init__(self, cardinality: int, features: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(cardinality, features, padding_idx=0)
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        ids = x.long()
        present = (ids > 0).to(self.embedding.weight.dtype)
        total = (self.embedding(ids) * present.unsqueeze(-1)).sum(-2)
        return total / present.sum(-1, keepdim=True).clamp(min=1)


class OneHotEncoder(nn.Module):
    """One-hot of a code.

    Shapes:
        (B, 1) -> (B, cardinality)
    """

    def __init__(self, cardinality: int) -> None:
        super().__init__()
        self.features = self.cardinality = cardinality

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return nn.functional.one_hot(x[:, 0].long(), self.cardinality).to(x.dtype)


class CodeEmbedding(nn.Module):
    """Learned vector of a code.

    Shapes:
        (B, 1) -> (B, features)
    """

    def __init__(self, cardinality: int, features: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(cardinality, features)
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.embedding(x[:, 0].long())


class Pass(nn.Module):
    """Values as they are.

    Shapes:
        (B, features) -> (B, features)
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x


def width(encoder: nn.Module) -> int:
    """How many features an encoder gives."""
    features = encoder.features
    assert isinstance(features, int)
    return features


def column_encoder(column: Column) -> nn.Module:
    """The default encoder of a typed column; its ``features`` says how wide its output is."""
    if column.kind == "category":
        if column.cardinality <= ONE_HOT_LIMIT:
            return OneHotEncoder(column.cardinality)
        return CodeEmbedding(column.cardinality, embedding_size(column.cardinality))
    if column.kind == "text":
        return TextEncoder(column.cardinality)
    if column.kind == "image":
        return ImageEncoder(column.shape)
    return Pass(column.width)


class TableEncoder(nn.Module):
    """Typed columns -> one feature vector: each column through its encoder, concatenated.

    Neighbouring columns that pass through unchanged share one slice, so that a table of numbers costs one copy.

    Shapes:
        (B, sum of column widths) -> (B, features)
    """

    def __init__(self, columns: tuple[Column, ...]) -> None:
        super().__init__()
        self.slices: list[tuple[int, int]] = []
        encoders: list[nn.Module] = []
        start = 0
        for column in columns:
            encoder = column_encoder(column)
            if isinstance(encoder, Pass) and encoders and isinstance(encoders[-1], Pass):
                encoders[-1] = Pass(encoders[-1].features + column.width)
                self.slices[-1] = (self.slices[-1][0], start + column.width)
            else:
                encoders.append(encoder)
                self.slices.append((start, start + column.width))
            start += column.width
        self.encoders = nn.ModuleList(encoders)
        self.features = sum(width(encoder) for encoder in encoders)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        parts = [encode(x[:, a:b]) for encode, (a, b) in zip(self.encoders, self.slices, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


class TokenVectors(nn.Module):
    """Token ids -> the concatenation of their embeddings, for networks that want one vector.

    Shapes:
        (B, length) -> (B, length * dim)
    """

    def __init__(self, vocabulary: int, length: int, dim: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.features = length * dim

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.embedding(x).flatten(1)


class Flatten(nn.Module):
    """(B, *) -> (B, features)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x.flatten(1)


def vector_encoder(inputs: Inputs) -> nn.Module:
    """An encoder of any input to (B, features)."""
    if inputs.kind == "table" and inputs.columns:
        return TableEncoder(inputs.columns)
    if inputs.kind == "tokens":
        return TokenVectors(inputs.vocabulary, inputs.shape[0])
    return Flatten(math.prod(inputs.shape))


class ColumnTokens(nn.Module):
    """A table as tokens: each column's encoding mapped to ``dim`` features, plus a learned vector that tells
    columns apart.

    Columns that are single values share one batched product: token_j = x_j w_j + b_j.

    Source: Revisiting Deep Learning Models for Tabular Data, arXiv 2106.11959 (the feature tokeniser).

    Shapes:
        (B, sum of column widths) -> (B, columns, dim)
    """

    plain: Tensor

    def __init__(self, inputs: Inputs, dim: int) -> None:
        super().__init__()
        columns = inputs.columns or tuple(Column(f"x{i}", "number") for i in range(inputs.shape[0]))
        plain, rest, start = [], [], 0
        for column in columns:
            encoder = column_encoder(column)
            if isinstance(encoder, Pass) and column.width == 1:
                plain.append(start)
            else:
                rest.append((start, start + column.width, encoder))
            start += column.width
        self.register_buffer("plain", torch.tensor(plain, dtype=torch.long), persistent=False)
        self.slices = [(a, b) for a, b, _ in rest]
        self.encoders = nn.ModuleList(nn.Sequential(encoder, nn.Linear(width(encoder), dim)) for _, _, encoder in rest)
        self.tokens = len(plain) + len(rest)
        bound = dim**-0.5
        self.weight = nn.Parameter(torch.empty(len(plain), dim).uniform_(-bound, bound))
        self.place = nn.Parameter(torch.empty(self.tokens, dim).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        numbers = x[:, self.plain].unsqueeze(-1) * self.weight
        others = [encode(x[:, a:b]) for encode, (a, b) in zip(self.encoders, self.slices, strict=True)]
        tokens = torch.cat([numbers, torch.stack(others, 1)], 1) if others else numbers
        return tokens + self.place


class Patches(nn.Module):
    """Images or series cut into patches, each mapped to ``dim`` features, plus a learned vector for each place.

    Without ``patch`` the size is chosen so that images give at most 8 patches a side and series at most 32, and the
    input is padded with zeros to a multiple of it.

    Shapes:
        (B, C, H, W) or (B, C, L) -> (B, patches, dim)

    Raises:
        PomonaError: if ``patch`` is given and does not divide the input.
    """

    def __init__(self, inputs: Inputs, dim: int, patch: int | None) -> None:
        super().__init__()
        channels, *sizes = inputs.shape
        if patch is not None and any(size % patch for size in sizes):
            choices = [p for p in range(1, min(sizes) + 1) if all(size % p == 0 for size in sizes)]
            raise PomonaError(
                f"patch={patch} does not divide the input's {' x '.join(map(str, sizes))}; "
                f"use one of {', '.join(map(str, choices))}"
            )
        most = 8 if len(sizes) == 2 else 32
        patch = patch or max(2, math.ceil(max(sizes) / most))
        # last dimension first, as torch's pad wants it
        self.padding = [amount for size in reversed(sizes) for amount in (0, -size % patch)]
        conv = nn.Conv2d if len(sizes) == 2 else nn.Conv1d
        self.project = conv(channels, dim, patch, stride=patch)
        self.tokens = math.prod(math.ceil(size / patch) for size in sizes)
        self.positions = nn.Parameter(PLACE_SCALE * torch.randn(self.tokens, dim))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        padded = nn.functional.pad(x, self.padding) if any(self.padding) else x
        return self.project(padded).flatten(2).transpose(1, 2) + self.positions


class Steps(nn.Module):
    """A series (or tokens) as one token a step, with learned positions; long series are strided down to at most
    ``longest`` tokens.

    Shapes:
        (B, C, L) or (B, L) of ids -> (B, steps, dim)
    """

    def __init__(self, inputs: Inputs, dim: int, longest: int = 128) -> None:
        super().__init__()
        length = inputs.shape[-1]
        if inputs.kind == "tokens":
            self.embed: nn.Module = nn.Embedding(inputs.vocabulary, dim)
            self.tokens = length
        else:
            stride = math.ceil(length / longest)
            kernel = min(2 * stride + 1, 2 * length - 1)
            self.embed = nn.Conv1d(inputs.shape[0], dim, kernel, stride=stride, padding=kernel // 2)
            self.tokens = (length + 2 * (kernel // 2) - kernel) // stride + 1
        self.positions = nn.Parameter(PLACE_SCALE * torch.randn(self.tokens, dim))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        embedded = self.embed(x)
        tokens = embedded if isinstance(self.embed, nn.Embedding) else embedded.transpose(1, 2)
        return tokens + self.positions
