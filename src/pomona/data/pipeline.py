"""Raw rows to input tensors and outputs to predictions: fitted on training rows, stored as plain JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pomona.data.encoders import FIT, Encoder, encoder_from_json, encoder_to_json, moments
from pomona.data.images import read_images
from pomona.data.tables import plain_frame
from pomona.data.target import TargetCoder
from pomona.data.types import Inferred, infer
from pomona.errors import PomonaError, nearest
from pomona.nets.specs import Inputs, Outputs


@dataclass
class Pipeline:
    """What a task's networks need around them to be used on new rows.

    Attributes:
        kind: ``table``, ``image`` or ``series``.
        target: codes targets and decodes outputs.
        encoders: of a table, one a used column.
        shape: of images (channels, height, width) or series (channels, length).
        mean: of images or series, per channel.
        scale: of images or series, per channel.
    """

    kind: Literal["table", "image", "series"]
    target: TargetCoder
    encoders: list[Encoder] = field(default_factory=list)
    shape: tuple[int, ...] = ()
    mean: list[float] = field(default_factory=list)
    scale: list[float] = field(default_factory=list)

    @property
    def inputs(self) -> Inputs:
        """Shape and columns of an example."""
        if self.kind != "table":
            return Inputs(self.kind, self.shape)
        columns = tuple(encoder.column for encoder in self.encoders)
        return Inputs("table", (sum(column.width for column in columns),), columns)

    @property
    def outputs(self) -> Outputs:
        """What a network must give."""
        return self.target.outputs

    @classmethod
    def fit_array(cls, kind: Literal["image", "series"], train: np.ndarray, target: TargetCoder) -> Pipeline:
        """Per-channel mean and scale of ``train`` (n, channels, ...), nan and infinities left out."""
        mean, scale = moments(finite(train), axis=(0, *range(2, train.ndim)))
        return cls(kind, target, [], tuple(train.shape[1:]), mean.tolist(), scale.tolist())

    def transform(self, data: pd.DataFrame | np.ndarray | Tensor | Sequence[Any], folder: str | Path = ".") -> Tensor:
        """Input tensor (n, ...) as float32.

        Args:
            data: for a table, a frame with the columns of training (others are ignored) or an array of them in
                order; for series an array (n, channels, length); for images an array (n, channels, height, width)
                or the paths of image files.
            folder: where relative paths of images start.

        Raises:
            PomonaError: for a column that is missing, a cell that cannot be read, or an array of another shape.
        """
        if self.kind == "table":
            return self._transform_table(data, Path(folder))
        if self.kind == "image" and not isinstance(data, (np.ndarray, Tensor)):
            paths = data.iloc[:, 0] if isinstance(data, pd.DataFrame) else data
            data = read_images([Path(folder) / str(path) for path in paths], self.shape[-1], self.shape[0])
        array = np.asarray(data.detach().cpu() if isinstance(data, Tensor) else data)
        if array.shape[1:] != self.shape:
            raise PomonaError(
                f"{self.kind} data of shape {array.shape} do not fit; needed is (n, {', '.join(map(str, self.shape))})"
            )
        channels = (-1,) + (1,) * (len(self.shape) - 1)
        mean = np.array(self.mean, np.float32).reshape(channels)
        scale = np.array(self.scale, np.float32).reshape(channels)
        return torch.from_numpy(np.nan_to_num((finite(array) - mean) / scale))

    def _transform_table(self, data: Any, folder: Path) -> Tensor:
        names = [encoder.name for encoder in self.encoders]
        if not isinstance(data, pd.DataFrame):
            array = np.asarray(data.detach().cpu() if isinstance(data, Tensor) else data)
            if array.ndim != 2 or array.shape[1] != len(names):
                raise PomonaError(
                    f"an array of shape {array.shape} does not fit; needed are the {len(names)} used columns "
                    f"in order ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''}), or a DataFrame"
                )
            data = pd.DataFrame(array, columns=names)
        plain = self._columns(data)
        parts = [encoder.encode(plain[encoder.name], folder) for encoder in self.encoders]
        return torch.from_numpy(np.concatenate(parts, axis=1))

    def _columns(self, data: pd.DataFrame) -> pd.DataFrame:
        """The used columns of a raw frame, in plain types; row numbers of the frame are kept where it has them."""
        plain = plain_frame(data)[0]
        if pd.api.types.is_integer_dtype(data.index):
            plain.index = data.index
        for encoder in self.encoders:
            if encoder.name not in plain:
                near = nearest(encoder.name, plain.columns)
                hint = f"; nearest are {', '.join(near)}" if near else f"; there are {', '.join(plain.columns[:12])}"
                raise PomonaError(f"column {encoder.name!r} is missing{hint}")
        return plain

    def decode(self, output: Tensor) -> pd.DataFrame:
        """Outputs (n, size) as a frame: ``prediction`` and, for classes, ``probability_<class>``."""
        return self.target.decode(output)

    def to_json(self) -> dict[str, Any]:
        """The pipeline as JSON-able data."""
        return {
            "kind": self.kind,
            "target": self.target.to_json(),
            "encoders": [encoder_to_json(encoder) for encoder in self.encoders],
            "shape": list(self.shape),
            "mean": self.mean,
            "scale": self.scale,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Pipeline:
        """The inverse of :meth:`to_json`."""
        return cls(
            data["kind"],
            TargetCoder.from_json(data["target"]),
            [encoder_from_json(encoder) for encoder in data["encoders"]],
            tuple(data["shape"]),
            data["mean"],
            data["scale"],
        )


def finite(array: np.ndarray) -> np.ndarray:
    """``array`` as float32 with infinities made nan."""
    values = np.asarray(array, np.float32)
    return values if np.isfinite(values).all() else np.where(np.isfinite(values), values, np.nan)


def fit_encoders(
    train: pd.DataFrame, types: dict[str, str], folder: Path, image_size: int
) -> tuple[list[Encoder], dict[str, Inferred]]:
    """An encoder for each used column, and the kind of every column, from training rows alone.

    Raises:
        PomonaError: if no column is left.
    """
    encoders: list[Encoder] = []
    found: dict[str, Inferred] = {}
    for name in train.columns:
        column = train[name]
        found[name] = kind = infer(column, types.get(name))
        if kind.kind == "drop":
            continue
        size = {"size": image_size} if kind.kind == "image" else {}
        encoder = FIT[kind.kind](column, folder, **size)
        kind.note = "; ".join(part for part in (kind.note, encoder.note) if part)
        encoders.append(encoder)
    if not encoders:
        why = ", ".join(f"{name}: {kind.note or kind.kind}" for name, kind in list(found.items())[:5])
        raise PomonaError(f"no usable column is left beside the target ({why})")
    return encoders, found
