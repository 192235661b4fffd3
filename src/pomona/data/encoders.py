"""One encoder a kind of column: fitted on training rows, plain data inside, so that it travels as JSON.

Every number that reaches a network is standardised, ``(value - mean) / scale``, with mean and scale of the
training rows and scale 1 where nothing varies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import pandas as pd

from pomona.data.images import read_images
from pomona.data.types import date_format, labels, to_date, to_number
from pomona.errors import PomonaError
from pomona.nets.specs import Column

MOST_CATEGORIES = 256
MOST_WORDS = 5000
LONGEST_TEXT = 64
_WORD = r"[^\W_]+(?:'[^\W_]+)?"


class Encoder(Protocol):
    """From a column of a table to the entries of the input row that hold it."""

    kind: ClassVar[str]
    name: str

    @property
    def column(self) -> Column:
        """The entry of :attr:`pomona.nets.specs.Inputs.columns`."""

    @property
    def note(self) -> str:
        """What the data card says of the column."""

    def encode(self, values: pd.Series, folder: Path) -> np.ndarray:
        """``values`` (n,) to (n, width) as float32."""


def moments(values: np.ndarray, axis: int | tuple[int, ...] = 0) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scale that ignore nan, with 0 and 1 where there is nothing or nothing varies."""
    count = np.isfinite(values).sum(axis=axis, keepdims=True)
    mean = np.nansum(values, axis=axis, keepdims=True, dtype=np.float64) / np.maximum(count, 1)
    square = np.nansum((values - mean) ** 2, axis=axis, keepdims=True, dtype=np.float64)
    scale = np.sqrt(square / np.maximum(count, 1))
    flat = scale <= 1e-7 * np.maximum(np.abs(mean), 1e-30)  # rounding of a constant is not variation
    return mean.squeeze(axis), np.where(flat, 1.0, scale).squeeze(axis)


def _with_indicator(values: np.ndarray, indicator: bool) -> np.ndarray:
    """Missing entries of (n, width) become 0, the mean; then, if asked, a column that is 1 where they were."""
    missing = np.isnan(values)
    filled = np.where(missing, 0.0, values)
    if indicator:
        filled = np.concatenate([filled, missing[:, :1]], axis=1)
    return filled.astype(np.float32)


@dataclass
class NumberEncoder:
    """A number: its standardised value, and a missing indicator if training rows lack some."""

    kind: ClassVar[str] = "number"
    name: str
    mean: float
    scale: float
    indicator: bool

    @classmethod
    def fit(cls, values: pd.Series, folder: Path) -> NumberEncoder:
        """Mean, scale and whether any is missing."""
        number = to_number(values).to_numpy()
        mean, scale = moments(number)
        return cls(str(values.name), float(mean), float(scale), bool(np.isnan(number).any()))

    @property
    def column(self) -> Column:
        """One entry, or two with the indicator."""
        return Column(self.name, "number", 1 + self.indicator)

    @property
    def note(self) -> str:
        """How gaps are filled."""
        return "missing: mean and an indicator" if self.indicator else ""

    def encode(self, values: pd.Series, folder: Path) -> np.ndarray:
        """Standardised values (n, width)."""
        number = (to_number(values).to_numpy() - self.mean) / self.scale
        return _with_indicator(number[:, None], self.indicator)


@dataclass
class BinaryEncoder:
    """Two values as 0 and 1, standardised; a third is treated as missing."""

    kind: ClassVar[str] = "binary"
    name: str
    levels: list[str]
    mean: float
    scale: float
    indicator: bool

    @classmethod
    def fit(cls, values: pd.Series, folder: Path) -> BinaryEncoder:
        """The two most frequent values, in sorted order."""
        text = labels(values)
        levels = sorted(text.value_counts().index[:2])
        code = _codes(text, levels)
        mean, scale = moments(code)
        return cls(str(values.name), levels, float(mean), float(scale), bool(np.isnan(code).any()))

    @property
    def column(self) -> Column:
        """One entry, or two with the indicator."""
        return Column(self.name, "binary", 1 + self.indicator)

    @property
    def note(self) -> str:
        """The two values."""
        gaps = "; missing: mean and an indicator" if self.indicator else ""
        return " / ".join(self.levels) + gaps

    def encode(self, values: pd.Series, folder: Path) -> np.ndarray:
        """Standardised 0 or 1 (n, width)."""
        code = (_codes(labels(values), self.levels) - self.mean) / self.scale
        return _with_indicator(code[:, None], self.indicator)


def _codes(text: pd.Series, levels: list[str]) -> np.ndarray:
    """Positions of ``text`` among ``levels`` as floats; nan where it is not among them."""
    code = pd.Index(levels, dtype=object).get_indexer(pd.Index(text)).astype(float)
    return np.where(code < 0, np.nan, code)


@dataclass
class CategoryEncoder:
    """A category as one integer code: 1, 2, ... for training values in sorted order, 0 for all else."""

    kind: ClassVar[str] = "category"
    name: str
    levels: list[str]
    folded: int = 0

    @classmethod
    def fit(cls, values: pd.Series, folder: Path) -> CategoryEncoder:
        """The values of training rows; beyond the 256 most frequent they share code 0."""
        counts = labels(values).value_counts()
        kept = sorted(counts.index[:MOST_CATEGORIES])
        return cls(str(values.name), kept, len(counts) - len(kept))

    @property
    def column(self) -> Column:
        """One entry, with the number of codes."""
        return Column(self.name, "category", 1, len(self.levels) + 1)

    @property
    def note(self) -> str:
        """How many rare values were folded."""
        return f"{self.folded:,} rare values folded into code 0" if self.folded else ""

    def encode(self, values: pd.Series, folder: Path) -> np.ndarray:
        """Codes (n, 1)."""
        code = pd.Index(self.levels, dtype=object).get_indexer(pd.Index(labels(values))) + 1
        return code[:, None].astype(np.float32)


@dataclass
class DateEncoder:
    """A date: year, month, day of week, sine and cosine of the day of the year, and the hour where it varies."""

    kind: ClassVar[str] = "date"
    name: str
    format: str
    mean: list[float]
    scale: list[float]
    hour: bool
    indicator: bool

    @classmethod
    def fit(cls, values: pd.Series, folder: Path) -> DateEncoder:
        """The format, and mean and scale of each part."""
        known = date_format(values) or ""
        date = to_date(values, known)
        wrong = date.isna() & values.notna()
        if wrong.any():
            first = values[wrong].iloc[0]
            raise PomonaError(f"column {str(values.name)!r} cannot be read as dates: {first!r} is none")
        hour = bool((date.dt.hour.fillna(0) != 0).any())
        mean, scale = moments(_date_parts(date, hour))
        gaps = bool(date.isna().any())
        return cls(str(values.name), known, mean.tolist(), scale.tolist(), hour, gaps)

    @property
    def column(self) -> Column:
        """Five entries, one more with the hour, one more with the indicator."""
        return Column(self.name, "date", 5 + self.hour + self.indicator)

    @property
    def note(self) -> str:
        """The parts."""
        return "year, month, weekday, day of year (sin, cos)" + (", hour" if self.hour else "")

    def encode(self, values: pd.Series, folder: Path) -> np.ndarray:
        """Standardised parts (n, width)."""
        parts = (_date_parts(to_date(values, self.format), self.hour) - self.mean) / self.scale
        return _with_indicator(parts, self.indicator)


def _date_parts(date: pd.Series, hour: bool) -> np.ndarray:
    angle = 2 * np.pi * date.dt.dayofyear / 365.25
    parts = [date.dt.year, date.dt.month, date.dt.dayofweek, np.sin(angle), np.cos(angle)]
    if hour:
        parts.append(date.dt.hour + date.dt.minute / 60)
    return np.stack([part.to_numpy(float) for part in parts], axis=1)


@dataclass
class TextEncoder:
    """Free text as its first words in lower case: 0 pads, 1 is a word unseen in training, then the known words."""

    kind: ClassVar[str] = "text"
    name: str
    words: list[str]
    length: int

    @classmethod
    def fit(cls, values: pd.Series, folder: Path) -> TextEncoder:
        """The 5,000 most frequent training words; as long as 95 % of training texts, 64 words at most."""
        split = _words(values)
        counts = Counter(word for words in split for word in words)
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        length = int(np.quantile([len(words) for words in split], 0.95)) if len(split) else 1
        return cls(str(values.name), ranked[:MOST_WORDS], int(np.clip(length, 1, LONGEST_TEXT)))

    @property
    def column(self) -> Column:
        """One entry a word."""
        return Column(self.name, "text", self.length, len(self.words) + 2)

    @property
    def note(self) -> str:
        """Length and vocabulary."""
        return f"first {self.length} words, vocabulary {len(self.words):,}"

    def encode(self, values: pd.Series, folder: Path) -> np.ndarray:
        """Word codes (n, length)."""
        code = {word: position for position, word in enumerate(self.words, start=2)}
        out = np.zeros((len(values), self.length), np.float32)
        for row, words in enumerate(_words(values)):
            known = [code.get(word, 1) for word in words[: self.length]]
            out[row, : len(known)] = known
        return out


def _words(values: pd.Series) -> list[list[str]]:
    return values.fillna("").astype(str).str.lower().str.findall(_WORD).tolist()


@dataclass
class ImageEncoder:
    """A path of an image: its pixels at a fixed size, standardised per channel."""

    kind: ClassVar[str] = "image"
    name: str
    shape: list[int]
    mean: list[float] = field(default_factory=list)
    scale: list[float] = field(default_factory=list)

    @classmethod
    def fit(cls, values: pd.Series, folder: Path, size: int = 32) -> ImageEncoder:
        """Channels and their moments."""
        pixels = _pixels(values, folder, size)
        mean, scale = moments(pixels, axis=(0, 2, 3))
        return cls(str(values.name), list(pixels.shape[1:]), mean.tolist(), scale.tolist())

    @property
    def column(self) -> Column:
        """One entry a pixel and channel."""
        return Column(self.name, "image", int(np.prod(self.shape)), shape=tuple(self.shape))

    @property
    def note(self) -> str:
        """The size."""
        return f"read at {self.shape[-1]} x {self.shape[-2]} pixels, {self.shape[0]} channel(s)"

    def encode(self, values: pd.Series, folder: Path) -> np.ndarray:
        """Standardised pixels (n, channels * height * width); a missing image is the mean everywhere."""
        pixels = _pixels(values, folder, self.shape[-1], self.shape[0])
        mean, scale = (np.array(part)[:, None, None] for part in (self.mean, self.scale))
        return np.nan_to_num((pixels - mean) / scale).reshape(len(values), -1).astype(np.float32)


def _pixels(values: pd.Series, folder: Path, size: int, channels: int | None = None) -> np.ndarray:
    """Pixels (n, channels, size, size) of the paths in ``values``, nan where there is none."""
    there = values.notna().to_numpy()
    found = read_images([folder / str(path) for path in values[there]], size, channels)
    out = np.full((len(values), *found.shape[1:]), np.nan, np.float32)
    out[there] = found
    return out


FIT: dict[str, Callable[..., Encoder]] = {
    "number": NumberEncoder.fit,
    "binary": BinaryEncoder.fit,
    "category": CategoryEncoder.fit,
    "date": DateEncoder.fit,
    "text": TextEncoder.fit,
    "image": ImageEncoder.fit,
}
_CLASSES: dict[str, Callable[..., Encoder]] = {
    "number": NumberEncoder,
    "binary": BinaryEncoder,
    "category": CategoryEncoder,
    "date": DateEncoder,
    "text": TextEncoder,
    "image": ImageEncoder,
}


def encoder_to_json(encoder: Any) -> dict[str, Any]:
    """An encoder as JSON-able data."""
    return {"kind": encoder.kind, **asdict(encoder)}


def encoder_from_json(data: dict[str, Any]) -> Encoder:
    """The inverse of :func:`encoder_to_json`."""
    return _CLASSES[data["kind"]](**{key: value for key, value in data.items() if key != "kind"})
