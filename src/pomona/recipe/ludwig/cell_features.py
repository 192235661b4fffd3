"""Feature types whose cells hold several values: images, vectors, series, sets, bags, sequences and text."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pomona.data.encoders import ImageEncoder, TextEncoder, encoder_from_json, encoder_to_json, moments
from pomona.data.metrics import regression_metrics
from pomona.errors import PomonaError
from pomona.recipe.ludwig.cells import arrays, pad_series, words
from pomona.recipe.ludwig.decoders import NUMBER_LOSSES, logistic, sequence_softmax
from pomona.recipe.ludwig.encoders import Field
from pomona.recipe.ludwig.features import FeatureType, Meta, feature


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
        encoder = encoder_from_json(meta["encoder"])
        assert isinstance(encoder, ImageEncoder)
        if _paths(column):
            return encoder.encode(column, folder)
        pixels = self._pixels(column, tuple(encoder.shape))
        mean, scale = (np.array(part)[:, None, None] for part in (encoder.mean, encoder.scale))
        return np.nan_to_num((pixels - mean) / scale).reshape(len(pixels), -1).astype(np.float32)

    def field(self, meta: Meta) -> Field:
        """Pixels."""
        column = encoder_from_json(meta["encoder"]).column
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
        return encoder_from_json(meta["encoder"]).encode(column, folder)


def _ranked(rows: list[list[str]], most: int) -> list[str]:
    """Words by frequency, ties in sorted order."""
    counts = Counter(word for row in rows for word in row)
    return sorted(counts, key=lambda word: (-counts[word], word))[:most]
