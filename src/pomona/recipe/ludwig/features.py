"""Feature types: what a column of a type is to a network, and what an output of a type means.

A type fits plain JSON-able metadata on training rows, packs a column into numbers with them, offers encoders
(:mod:`~pomona.recipe.ludwig.encoders`), decoders and losses, and turns outputs back into columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pomona.data.encoders import (
    BinaryEncoder,
    CategoryEncoder,
    DateEncoder,
    Encoder,
    ImageEncoder,
    NumberEncoder,
    TextEncoder,
    encoder_from_json,
    encoder_to_json,
    moments,
)
from pomona.data.metrics import classification_metrics, regression_metrics
from pomona.data.target import TargetCoder
from pomona.data.types import labels, to_number
from pomona.errors import PomonaError, unknown
from pomona.recipe.ludwig.cells import arrays, pad_series, words
from pomona.recipe.ludwig.decoders import NUMBER_LOSSES, Loss, logistic, sequence_softmax, softmax
from pomona.recipe.ludwig.encoders import Field

Meta = dict[str, Any]
Missing = Literal["fill_with_mean", "fill_with_mode", "fill_with_const", "ffill", "bfill", "drop_row"]


class FeatureType:
    """A type of column; subclasses are registered with :func:`feature`.

    Attributes:
        name: as in a config.
        encoder: the default encoder.
        decoders: names of decoders, the default first; none for a type that can't be an output.
        losses: by name, the default first.
        missing: the default for gaps in an input; ``None`` leaves them to the type.
        cells: whether cells may be lists or arrays.
    """

    name: ClassVar[str] = ""
    encoder: ClassVar[str] = "passthrough"
    decoders: ClassVar[tuple[str, ...]] = ()
    losses: ClassVar[Mapping[str, Loss]] = {}
    cells: ClassVar[bool] = False

    def fit_meta(self, column: pd.Series, folder: Path) -> Meta:
        """JSON-able metadata from training rows; further keywords are the type's preprocessing options."""
        raise NotImplementedError

    def transform(self, column: pd.Series, meta: Meta, folder: Path) -> np.ndarray:
        """An input column as (n, width) without gaps."""
        return _encoder(meta).encode(column, folder)

    def target(self, column: pd.Series, meta: Meta, folder: Path) -> np.ndarray:
        """An output column as (n, width), nan in rows where it is missing."""
        values = self.transform(column, meta, folder).astype(np.float32)
        values[column.isna().to_numpy()] = np.nan
        return values

    def field(self, meta: Meta) -> Field:
        """What the packed column looks like to an encoder."""
        return Field("values", _encoder(meta).column.width)

    def size(self, meta: Meta) -> int:
        """Entries of the output for a row."""
        return self.field(meta).width

    def steps(self, meta: Meta) -> int:
        """Words of an output that is a sequence, else 0."""
        return 0

    def width(self, meta: Meta) -> int:
        """Entries of the packed target."""
        return self.field(meta).width

    def metrics(self, output: Tensor, target: Tensor, meta: Meta) -> dict[str, float]:
        """Metrics of outputs against packed targets without missing rows."""
        raise NotImplementedError

    def postprocess(self, name: str, output: Tensor, meta: Meta) -> pd.DataFrame:
        """Outputs as columns ``<name>_prediction``, ``<name>_probability_<class>``, ..."""
        raise NotImplementedError


TYPES: dict[str, FeatureType] = {}
Kind = TypeVar("Kind", bound=type[FeatureType])


def feature(name: str) -> Callable[[Kind], Kind]:
    """Register a :class:`FeatureType` under a name for configs."""

    def register(cls: Kind) -> Kind:
        cls.name = name
        TYPES[name] = cls()
        return cls

    return register


def _encoder(meta: Meta) -> Encoder:
    return encoder_from_json(meta["encoder"])


def fill_value(column: pd.Series, strategy: Missing | None, value: Any) -> Any:
    """What fills gaps in a column, from training rows: its mean, its mode, or ``value``."""
    if strategy == "fill_with_const":
        if value is None:
            raise PomonaError(f"{column.name!r}: missing_value_strategy='fill_with_const' needs a fill_value")
        return value
    if strategy == "fill_with_mean":
        return float(np.nan_to_num(to_number(column).mean()))
    mode = labels(column).mode() if strategy == "fill_with_mode" else []
    return mode[0] if len(mode) else None


def fill(column: pd.Series, strategy: Missing | None, value: Any) -> pd.Series:
    """The column with its gaps filled; gaps at the edge that ffill and bfill leave stay."""
    if strategy in {"ffill", "bfill"}:
        return column.ffill() if strategy == "ffill" else column.bfill()
    if value is None or not column.isna().any():
        return column
    return column.astype(object).where(column.notna(), value).infer_objects()


@feature("number")
class Number(FeatureType):
    """A number, normalised: zscore, minmax to [0, 1], log1p, quantile (its rank among training rows) or none."""

    decoders = ("regressor",)
    losses = NUMBER_LOSSES

    def fit_meta(
        self, column: pd.Series, folder: Path,
        normalization: Literal["zscore", "minmax", "log1p", "quantile", "none"] = "zscore",
    ) -> Meta:  # fmt: skip
        """See the class."""
        meta: Meta = {"normalization": normalization}
        number = to_number(column)
        present = number.dropna()
        if not len(present):
            raise PomonaError(f"column {column.name!r} has no number in its training rows; leave it out")
        if normalization == "quantile":
            meta["grid"] = np.quantile(present, np.linspace(0, 1, 101)).tolist()
        mapped = pd.Series(_forward(number.to_numpy(), meta), name=column.name)
        encoder = NumberEncoder.fit(mapped, folder)
        low, high = mapped.min(), mapped.max()
        if normalization == "minmax":
            encoder.mean, encoder.scale = float(low), float(high - low) or 1.0
        elif normalization != "zscore":
            encoder.mean, encoder.scale = 0.0, 1.0
        return meta | {"encoder": encoder_to_json(encoder)}

    def transform(self, column: pd.Series, meta: Meta, folder: Path) -> np.ndarray:
        """See :class:`FeatureType`; a missing entry is the training mean."""
        mapped = _forward(to_number(column).to_numpy(), meta)
        return _encoder(meta).encode(pd.Series(mapped, name=column.name), folder)

    def target(self, column: pd.Series, meta: Meta, folder: Path) -> np.ndarray:
        """See :class:`FeatureType`."""
        values = self.transform(column, meta, folder)[:, :1]
        values[to_number(column).isna().to_numpy()] = np.nan
        return values

    def size(self, meta: Meta) -> int:
        """One."""
        return 1

    width = size

    def _values(self, output: Tensor, meta: Meta) -> np.ndarray:
        """In the column's own units."""
        values = output.detach().double().cpu().numpy() * meta["encoder"]["scale"] + meta["encoder"]["mean"]
        if meta["normalization"] == "log1p":
            return np.expm1(values)
        if meta["normalization"] == "quantile":
            return np.interp(values, np.linspace(0, 1, 101), meta["grid"])
        return values

    def metrics(self, output: Tensor, target: Tensor, meta: Meta) -> dict[str, float]:
        """RMSE, MAE and R2 in the column's own units."""
        return regression_metrics(*(torch.from_numpy(self._values(part, meta)) for part in (output, target)))

    def postprocess(self, name: str, output: Tensor, meta: Meta) -> pd.DataFrame:
        """``<name>_prediction``."""
        return pd.DataFrame({f"{name}_prediction": self._values(output, meta)[:, 0]})


def _forward(values: np.ndarray, meta: Meta) -> np.ndarray:
    if meta["normalization"] == "log1p":
        if (values <= -1).any():
            raise PomonaError("normalization='log1p' needs numbers above -1; use zscore")
        return np.log1p(values)
    if meta["normalization"] == "quantile":
        return np.interp(values, meta["grid"], np.linspace(0, 1, 101))
    return values


class _Classes(FeatureType):
    """What outputs of two classes and of more share: a label coder and its metrics."""

    losses: ClassVar[Mapping[str, Loss]] = {"softmax_cross_entropy": softmax}

    @staticmethod
    def _names(column: pd.Series) -> Meta:
        """The coder of an output, or nothing where there is a single class or far too many."""
        present = column[labels(column).notna()]
        try:
            return {"coder": TargetCoder.of_classes(present).to_json()}
        except (PomonaError, IndexError):
            return {}

    def coder(self, name: str, meta: Meta) -> TargetCoder:
        """The label coder of an output.

        Raises:
            PomonaError: if the training rows have a single class or nearly as many as rows.
        """
        if "coder" not in meta:
            raise PomonaError(f"output {name!r} needs at least two classes, each in several training rows")
        return TargetCoder.from_json(meta["coder"])

    def target(self, column: pd.Series, meta: Meta, folder: Path) -> np.ndarray:
        """Class index (n, 1): nan where missing, -1 for a class that training rows lack."""
        text = labels(column)
        names = pd.Index(self.coder(str(column.name), meta).names, dtype=object)
        return np.where(text.isna(), np.nan, names.get_indexer(pd.Index(text)))[:, None].astype(np.float32)

    def width(self, meta: Meta) -> int:
        """One."""
        return 1

    def _logits(self, output: Tensor) -> Tensor:
        return output

    def metrics(self, output: Tensor, target: Tensor, meta: Meta) -> dict[str, float]:
        """Classification metrics; a class that training rows lack counts as wrong in the accuracy, and only there."""
        known = target[:, 0] >= 0
        found = classification_metrics(self._logits(output[known]), target[known, 0].long())
        return found | {"accuracy": found["accuracy"] * float(known.float().mean())}

    def postprocess(self, name: str, output: Tensor, meta: Meta) -> pd.DataFrame:
        """``<name>_prediction`` and ``<name>_probability_<class>``."""
        return self.coder(name, meta).decode(self._logits(output)).add_prefix(f"{name}_")


@feature("binary")
class Binary(_Classes):
    """Two values, the second in sorted order the positive one; a third counts as missing."""

    decoders = ("regressor",)
    losses = {"binary_cross_entropy": logistic}

    def fit_meta(self, column: pd.Series, folder: Path) -> Meta:
        """See the class."""
        encoder = BinaryEncoder.fit(column, folder)
        two = column.where(labels(column).isin(encoder.levels))
        return {"encoder": encoder_to_json(encoder), **self._names(two)}

    def target(self, column: pd.Series, meta: Meta, folder: Path) -> np.ndarray:
        """0 or 1 (n, 1), nan where missing."""
        codes = super().target(column, meta, folder)
        return np.where(codes < 0, np.nan, codes)

    def size(self, meta: Meta) -> int:
        """One logit."""
        return 1

    def _logits(self, output: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(output), output], -1)


@feature("category")
class Category(_Classes):
    """One of several values; code 0 (``<UNK>``) is a missing one or one that training rows lack."""

    encoder = "dense"
    decoders = ("classifier",)

    def fit_meta(self, column: pd.Series, folder: Path) -> Meta:
        """See the class."""
        encoder = CategoryEncoder.fit(column, folder)
        return {"encoder": encoder_to_json(encoder), "vocabulary": ["<UNK>", *encoder.levels], **self._names(column)}

    def field(self, meta: Meta) -> Field:
        """A code."""
        return Field("code", 1, len(meta["vocabulary"]))

    def size(self, meta: Meta) -> int:
        """A logit a class."""
        return len(meta["coder"]["names"]) if "coder" in meta else 0


@feature("date")
class Date(FeatureType):
    """A date as year, month, weekday, the angle of its day of the year, and the hour where it varies."""

    def fit_meta(self, column: pd.Series, folder: Path) -> Meta:
        """See the class."""
        return {"encoder": encoder_to_json(DateEncoder.fit(column, folder))}


@feature("image")
class Image(FeatureType):
    """An image: a path, or an array (height, width) or (channels, height, width); arrays all have one size."""

    encoder = "stacked_cnn"
    cells = True

    def fit_meta(self, column: pd.Series, folder: Path, size: int = 32) -> Meta:
        """Channels, size (of files) and moments of each channel."""
        if _paths(column):
            return {"encoder": encoder_to_json(ImageEncoder.fit(column, folder, size))}
        pixels = self._pixels(column, None)
        mean, scale = moments(pixels, axis=(0, 2, 3))
        encoder = ImageEncoder(str(column.name), list(pixels.shape[1:]), mean.tolist(), scale.tolist())
        return {"encoder": encoder_to_json(encoder)}

    @staticmethod
    def _pixels(column: pd.Series, shape: tuple[int, ...] | None) -> np.ndarray:
        pixels = arrays(column, None if shape is None else {shape, shape[1:]} if shape[0] == 1 else {shape})
        return pixels[:, None] if pixels.ndim == 3 else pixels

    def transform(self, column: pd.Series, meta: Meta, folder: Path) -> np.ndarray:
        """Pixels, standardised per channel."""
        encoder = _encoder(meta)
        assert isinstance(encoder, ImageEncoder)
        if _paths(column):
            return encoder.encode(column, folder)
        pixels = self._pixels(column, tuple(encoder.shape))
        mean, scale = (np.array(part)[:, None, None] for part in (encoder.mean, encoder.scale))
        return np.nan_to_num((pixels - mean) / scale).reshape(len(pixels), -1).astype(np.float32)

    def field(self, meta: Meta) -> Field:
        """Pixels."""
        column = _encoder(meta).column
        return Field("image", column.width, shape=column.shape)


def _paths(column: pd.Series) -> bool:
    return isinstance(next((cell for cell in column if cell is not None and cell is not np.nan), ""), (str, Path))


@feature("vector")
class Vector(FeatureType):
    """Numbers of a fixed count in a cell: a list, an array, or a string with blanks between."""

    decoders = ("projector",)
    losses = NUMBER_LOSSES
    cells = True

    def fit_meta(self, column: pd.Series, folder: Path, normalization: Literal["zscore", "none"] = "zscore") -> Meta:
        """Mean and scale of each entry."""
        values = arrays(column)
        if values.ndim != 2:
            raise PomonaError(f"column {column.name!r}: the cells of a vector must be flat lists of numbers")
        mean, scale = moments(values)
        if normalization == "none":
            mean, scale = np.zeros_like(mean), np.ones_like(scale)
        return {"mean": mean.tolist(), "scale": scale.tolist()}

    def transform(self, column: pd.Series, meta: Meta, folder: Path) -> np.ndarray:
        """Standardised entries; a missing one is the mean."""
        return np.nan_to_num(self._scaled(column, meta))

    def target(self, column: pd.Series, meta: Meta, folder: Path) -> np.ndarray:
        """Standardised entries."""
        return self._scaled(column, meta)

    def _scaled(self, column: pd.Series, meta: Meta) -> np.ndarray:
        values = arrays(column, {(len(meta["mean"]),)})
        return ((values - meta["mean"]) / meta["scale"]).astype(np.float32)

    def field(self, meta: Meta) -> Field:
        """Numbers."""
        return Field("values", len(meta["mean"]))

    def _values(self, output: Tensor, meta: Meta) -> np.ndarray:
        return output.detach().double().cpu().numpy() * meta["scale"] + meta["mean"]

    def metrics(self, output: Tensor, target: Tensor, meta: Meta) -> dict[str, float]:
        """RMSE, MAE and R2, averaged over entries."""
        return regression_metrics(*(torch.from_numpy(self._values(part, meta)) for part in (output, target)))

    def postprocess(self, name: str, output: Tensor, meta: Meta) -> pd.DataFrame:
        """``<name>_prediction_0``, ``<name>_prediction_1``, ..."""
        values = self._values(output, meta)
        return pd.DataFrame(values, columns=[f"{name}_prediction_{i}" for i in range(values.shape[1])])


@feature("timeseries")
class Timeseries(Vector):
    """Series in a cell: (steps,) or (channels, steps), as an array, list or string; shorter ones end in the mean."""

    encoder = "parallel_cnn"

    def fit_meta(self, column: pd.Series, folder: Path, normalization: Literal["zscore", "none"] = "zscore") -> Meta:
        """Channels, the most steps of a training row, and moments of each channel."""
        values = pad_series(column)
        mean, scale = moments(values, axis=(0, 2))
        if normalization == "none":
            mean, scale = np.zeros_like(mean), np.ones_like(scale)
        steps = values.shape[2]
        repeated = {"mean": np.repeat(mean, steps).tolist(), "scale": np.repeat(scale, steps).tolist()}
        return {"shape": list(values.shape[1:]), **repeated}

    def _scaled(self, column: pd.Series, meta: Meta) -> np.ndarray:
        values = pad_series(column, tuple(meta["shape"])).reshape(len(column), -1)
        return ((values - meta["mean"]) / meta["scale"]).astype(np.float32)

    def field(self, meta: Meta) -> Field:
        """Series."""
        return Field("series", len(meta["mean"]), shape=tuple(meta["shape"]))


class _Members(FeatureType):
    """What sets and bags share: words in no order; column 0 counts those that training rows lack."""

    encoder = "embed"
    cells = True
    once: ClassVar[bool] = True

    def fit_meta(self, column: pd.Series, folder: Path, most_common: int = 1000) -> Meta:
        """The most frequent words of training rows."""
        return {"words": _ranked(words(column), most_common)}

    def transform(self, column: pd.Series, meta: Meta, folder: Path) -> np.ndarray:
        """Counts (n, words + 1)."""
        code = {word: position for position, word in enumerate(meta["words"], start=1)}
        out = np.zeros((len(column), len(code) + 1), np.float32)
        for row, found in enumerate(words(column)):
            np.add.at(out[row], [code.get(word, 0) for word in found], 1)
        return out.clip(max=1) if self.once else out

    def field(self, meta: Meta) -> Field:
        """Counts."""
        return Field("counts", len(meta["words"]) + 1)


@feature("bag")
class Bag(_Members):
    """Words in no order, with how often each occurs: a list, or a string with blanks between."""

    once = False


@feature("set")
class Set(_Members):
    """Words in no order, each once: a list, or a string with blanks between."""

    decoders = ("classifier",)
    losses = {"sigmoid_cross_entropy": logistic}

    def target(self, column: pd.Series, meta: Meta, folder: Path) -> np.ndarray:
        """Which of the known words are members."""
        return super().target(column, meta, folder)[:, 1:]

    def size(self, meta: Meta) -> int:
        """A logit a word."""
        return len(meta["words"])

    width = size

    def metrics(self, output: Tensor, target: Tensor, meta: Meta) -> dict[str, float]:
        """Jaccard index, averaged over rows (1 for two empty sets)."""
        predicted, true = output > 0, target > 0.5
        union = (predicted | true).sum(-1)
        index = torch.where(union > 0, (predicted & true).sum(-1) / union.clamp(min=1), 1.0)
        return {"jaccard": float(index.mean())}

    def postprocess(self, name: str, output: Tensor, meta: Meta) -> pd.DataFrame:
        """``<name>_prediction``: the words whose probability exceeds a half."""
        chosen = (output > 0).cpu().numpy()
        return pd.DataFrame({f"{name}_prediction": [" ".join(np.array(meta["words"], object)[row]) for row in chosen]})


@feature("sequence")
class Sequence(FeatureType):
    """Words in order: a list, or a string with blanks between. Codes: 0 pads, 1 is unknown, then the known words."""

    encoder = "embed"
    decoders = ("generator", "tagger")
    losses = {"sequence_softmax_cross_entropy": sequence_softmax}
    cells = True

    def fit_meta(
        self, column: pd.Series, folder: Path, most_common: int = 20_000, max_sequence_length: int = 256
    ) -> Meta:
        """Words and the longest length of training rows."""
        found = words(column)
        length = min(max(map(len, found), default=1) or 1, max_sequence_length)
        return {"encoder": encoder_to_json(TextEncoder(str(column.name), _ranked(found, most_common), length))}

    def _words(self, column: pd.Series) -> list[list[str]]:
        return words(column)

    def transform(self, column: pd.Series, meta: Meta, folder: Path) -> np.ndarray:
        """Codes (n, length)."""
        code = {word: position for position, word in enumerate(meta["encoder"]["words"], start=2)}
        out = np.zeros((len(column), meta["encoder"]["length"]), np.float32)
        for row, found in enumerate(words(column)):
            found = found[: out.shape[1]]
            out[row, : len(found)] = [code.get(word, 1) for word in found]
        return out

    def field(self, meta: Meta) -> Field:
        """Codes in order."""
        return Field("tokens", meta["encoder"]["length"], len(meta["encoder"]["words"]) + 2)

    def size(self, meta: Meta) -> int:
        """A logit a code and step."""
        field = self.field(meta)
        return field.width * field.codes

    def steps(self, meta: Meta) -> int:
        """Words at most."""
        return int(meta["encoder"]["length"])

    def metrics(self, output: Tensor, target: Tensor, meta: Meta) -> dict[str, float]:
        """Share of right words, and of sequences that are right throughout."""
        predicted, true = self._codes(output, meta), target.long()
        there = true > 0
        right = (predicted == true) & there
        tokens = float(right.sum() / there.sum().clamp(min=1))
        return {"token_accuracy": tokens, "sequence_accuracy": float((predicted == true).all(-1).float().mean())}

    def _codes(self, output: Tensor, meta: Meta) -> Tensor:
        """Likeliest codes up to the first padding."""
        codes = output.unflatten(1, (self.steps(meta), -1)).argmax(-1)
        return codes * ((codes == 0).cumsum(1) == 0)

    def postprocess(self, name: str, output: Tensor, meta: Meta) -> pd.DataFrame:
        """``<name>_prediction``: the words with blanks between."""
        known = ["", "<UNK>", *meta["encoder"]["words"]]
        rows = self._codes(output, meta).tolist()
        return pd.DataFrame({f"{name}_prediction": [" ".join(known[code] for code in row if code) for row in rows]})


@feature("text")
class Text(Sequence):
    """Free text: its words in lower case, without punctuation; else as a sequence."""

    encoder = "parallel_cnn"
    cells = False

    def fit_meta(
        self, column: pd.Series, folder: Path, most_common: int = 5000, max_sequence_length: int | None = None
    ) -> Meta:
        """The most frequent words; as long as 95 % of training texts, 64 words at most unless said."""
        encoder = TextEncoder.fit(column, folder)
        encoder.words = encoder.words[:most_common]
        encoder.length = max_sequence_length or encoder.length
        return {"encoder": encoder_to_json(encoder)}

    def transform(self, column: pd.Series, meta: Meta, folder: Path) -> np.ndarray:
        """Codes (n, length)."""
        return _encoder(meta).encode(column, folder)


def _ranked(rows: list[list[str]], most: int) -> list[str]:
    """Words by frequency, ties in sorted order."""
    counts = Counter(word for row in rows for word in row)
    return sorted(counts, key=lambda word: (-counts[word], word))[:most]


def get_type(where: str, name: str) -> FeatureType:
    """The type of that name.

    Raises:
        PomonaError: if there is none; graphs are refused with what to do instead.
    """
    if name == "graph":
        raise PomonaError(f"{where}='graph' is not supported; give numbers that describe the graph as a vector")
    if name not in TYPES:
        raise unknown(where, name, TYPES)
    return TYPES[name]
