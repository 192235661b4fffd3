"""What a network must know of its data: the shape and type of what goes in, and what must come out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

ColumnKind = Literal["number", "binary", "category", "date", "text", "image", "constant"]


@dataclass(frozen=True)
class Column:
    """One typed column of a table and the slice of the input row that holds it.

    The input row is one float vector; a column occupies ``width`` consecutive entries of it: its standardised
    value(s) (number, binary, date), its integer code (category: one entry, 0 stands for missing or unseen), its
    token codes (text: ``width`` tokens, 0 is padding) or its pixels (image: ``shape`` flattened).
    """

    name: str
    kind: ColumnKind
    width: int = 1
    cardinality: int = 0
    """Number of codes of a category, or of tokens of a text, code 0 included."""
    shape: tuple[int, ...] = ()
    """(channels, height, width) of an image column."""


@dataclass(frozen=True)
class Inputs:
    """The shape of one example, without the batch dimension.

    Attributes:
        kind: ``table`` (features,), ``image`` (channels, height, width), ``series`` (channels, length) or
            ``tokens`` (length,), integers below ``vocabulary`` stored as int64.
        shape: sizes as above.
        columns: for a table, its columns in order; their widths sum to ``shape[0]``.
        vocabulary: for tokens, how many there are.
    """

    kind: Literal["table", "image", "series", "tokens"]
    shape: tuple[int, ...]
    columns: tuple[Column, ...] = ()
    vocabulary: int = 0


@dataclass(frozen=True)
class Outputs:
    """What the network gives for one example.

    Attributes:
        kind: ``classes`` (``size`` logits) or ``number`` (``size`` values in the target's own units).
        size: number of logits or values.
        names: class labels in logit order, or target names.
        mean: training mean of each target (``number`` only).
        scale: training standard deviation of each target (``number`` only).
    """

    kind: Literal["classes", "number"]
    size: int
    names: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()


def to_json(spec: Inputs | Outputs) -> dict[str, Any]:
    """The spec as JSON-able data."""
    return asdict(spec)


def inputs_from_json(data: dict[str, Any]) -> Inputs:
    """The inverse of :func:`to_json` for :class:`Inputs`."""
    columns = tuple(Column(**{**column, "shape": tuple(column["shape"])}) for column in data["columns"])
    return Inputs(data["kind"], tuple(data["shape"]), columns, data["vocabulary"])


def outputs_from_json(data: dict[str, Any]) -> Outputs:
    """The inverse of :func:`to_json` for :class:`Outputs`."""
    return Outputs(data["kind"], data["size"], tuple(data["names"]), tuple(data["mean"]), tuple(data["scale"]))
