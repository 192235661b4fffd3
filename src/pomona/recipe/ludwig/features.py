"""Feature types: what a column of a type is to a network, and what an output of a type means.

A type fits plain JSON-able metadata on training rows, packs a column into numbers with them, offers encoders
(:mod:`~pomona.recipe.ludwig.encoders`), decoders and losses, and turns outputs back into columns.

Source: Ludwig: a type-based declarative deep learning toolbox, arXiv 1909.07930.
"""

from __future__ import annotations

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
    NumberEncoder,
    encoder_from_json,
    encoder_to_json,
)
from pomona.data.metrics import classification_metrics, regression_metrics
from pomona.data.target import TargetCoder
from pomona.data.types import labels, to_number
from pomona.errors import PomonaError, unknown
from pomona.recipe.ludwig.decoders import NUMBER_LOSSES, Loss, logistic, softmax
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
    if strategy != "fill_with_mode":
        return None
    mode = labels(column).mode()
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
        if not known.any():
            return {"accuracy": 0.0}
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
