"""Text as word pieces: a byte-pair vocabulary learned from the training part of a text."""

from __future__ import annotations

import heapq
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from pomona.data.text import CharacterText
from pomona.errors import PomonaError

_WORDS = re.compile(r" ?[^\W\d_]+| ?\d+| ?[^\w\s]+|\s|_")


@dataclass(frozen=True)
class WordPieces:
    """A vocabulary of pieces: single characters, and merges of two earlier pieces, which never cross words.

    Attributes:
        pieces: a piece an index; the characters first.
        merges: (left, right) -> merged piece; earlier ones are applied first.
    """

    pieces: tuple[str, ...]
    merges: dict[tuple[int, int], int]
    _known: dict[str, list[int]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {piece: index for index, piece in enumerate(self.pieces)}

    @cached_property
    def _rank(self) -> dict[tuple[int, int], int]:
        return {pair: rank for rank, pair in enumerate(self.merges)}

    def _word(self, word: str) -> list[int]:
        if word not in self._known:
            parts = [self._index[c] for c in word]
            while len(parts) > 1:
                pair = min(pairwise(parts), key=lambda p: self._rank.get(p, len(self._rank)))
                if pair not in self.merges:
                    break
                parts = _merge(parts, pair, self.merges[pair])
            self._known[word] = parts
        return self._known[word]

    def encode(self, text: str) -> Tensor:
        """Indices (length,) of a string.

        Raises:
            PomonaError: for a character that is not in the vocabulary.
        """
        strange = sorted(set(text) - {p for p in self.pieces if len(p) == 1})
        if strange:
            raise PomonaError(f"text has characters outside the vocabulary: {''.join(strange)!r}")
        parts = [self._word(word) for word in _WORDS.findall(text)]
        return torch.from_numpy(np.fromiter((p for word in parts for p in word), np.int64))

    def decode(self, indices: Tensor) -> str:
        """The string of indices (length,)."""
        return "".join(self.pieces[index] for index in indices.tolist())


def train_word_pieces(text: str, vocab: int = 2000) -> WordPieces:
    """Byte-pair encoding: merge the most frequent pair of neighbours inside words until there are ``vocab`` pieces.

    Stops earlier where no pair occurs twice. Ties go to the earlier pieces.

    Args:
        text: training text.
        vocab: number of pieces.

    Raises:
        PomonaError: if the text has more characters than ``vocab``.

    Source: Neural Machine Translation of Rare Words with Subword Units, arXiv 1508.07909.
    """
    pieces = sorted(set(text))
    if len(pieces) > vocab:
        raise PomonaError(f"vocab={vocab} must be at least the text's {len(pieces)} characters")
    index = {piece: i for i, piece in enumerate(pieces)}
    counted = Counter(_WORDS.findall(text))
    words, weights = [[index[c] for c in word] for word in counted], list(counted.values())
    pairs: Counter[tuple[int, int]] = Counter()
    where: dict[tuple[int, int], set[int]] = defaultdict(set)
    for n, word in enumerate(words):
        for pair in pairwise(word):
            pairs[pair] += weights[n]
            where[pair].add(n)
    merges: dict[tuple[int, int], int] = {}
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    while len(pieces) < vocab and heap:
        count, best = heapq.heappop(heap)
        if -count != pairs[best]:  # this entry is older than the last change
            continue
        if -count < 2:
            break
        piece = pieces[best[0]] + pieces[best[1]]
        if piece not in index:
            index[piece] = len(pieces)
            pieces.append(piece)
        merges[best] = index[piece]
        changed = set()
        for n in where.pop(best):
            old = words[n]
            new = words[n] = _merge(old, best, index[piece])
            for pair in pairwise(old):
                pairs[pair] -= weights[n]
                changed.add(pair)
            for pair in pairwise(new):
                pairs[pair] += weights[n]
                where[pair].add(n)
                changed.add(pair)
        for pair in changed:
            heapq.heappush(heap, (-pairs[pair], pair))
    return WordPieces(tuple(pieces), merges)


def _merge(parts: list[int], pair: tuple[int, int], merged: int) -> list[int]:
    out, i = [], 0
    while i < len(parts):
        if i + 1 < len(parts) and (parts[i], parts[i + 1]) == pair:
            out.append(merged)
            i += 2
        else:
            out.append(parts[i])
            i += 1
    return out


@dataclass(frozen=True)
class PieceText(CharacterText):
    """A `CharacterText` whose indices are word pieces, each part encoded for itself.

    Attributes:
        coder: the vocabulary.
    """

    coder: WordPieces = field(default_factory=lambda: WordPieces((), {}))

    @property
    def size(self) -> int:
        """Number of pieces."""
        return len(self.coder.pieces)

    @cached_property
    def counts(self) -> Tensor:
        """Occurrences of each piece in the training part, (size,)."""
        return torch.bincount(self.train, minlength=self.size)

    def encode(self, text: str) -> Tensor:
        """Indices (length,) of a string."""
        return self.coder.encode(text)

    def decode(self, indices: Tensor) -> str:
        """The string of indices (length,)."""
        return self.coder.decode(indices)


def word_pieces(text: CharacterText, vocab: int = 2000) -> PieceText:
    """A text of characters as a text of ``vocab`` pieces, learned from its training part."""
    parts = {name: text.decode(text.split(name)) for name in ("train", "valid", "test")}
    coder = train_word_pieces(parts["train"], vocab)
    return PieceText(text.vocabulary, **{name: coder.encode(part) for name, part in parts.items()}, coder=coder)
