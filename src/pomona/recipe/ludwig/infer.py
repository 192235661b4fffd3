"""A first declaration for a table, with inferred types.

Source: Ludwig: a type-based declarative deep learning toolbox, arXiv 1909.07930.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from pomona.data.target import clean_target, target_kind
from pomona.data.types import infer as infer_kind
from pomona.errors import PomonaError, unknown
from pomona.recipe.ludwig.cells import is_missing


def infer(data: pd.DataFrame, target: str | Sequence[str]) -> dict[str, Any]:
    """A config for a table: a type for each column that is worth using, and the targets as outputs.

    Args:
        data: the table.
        target: the column to predict, or several.

    Raises:
        PomonaError: for a target that is not there, or when no column is left as an input.
    """
    targets = [target] if isinstance(target, str) else list(target)
    for name in targets:
        if name not in data:
            raise unknown("target", name, data.columns)
    inputs = [
        {"name": str(name), "type": kind}
        for name in data.columns
        if name not in targets and (kind := _kind(data[name])) != "drop"
    ]
    if not inputs:
        raise PomonaError("no usable column is left beside the target")
    outputs = []
    for name in targets:
        column = clean_target(data[name]).dropna()
        kind = target_kind(column)
        kind_name = "number" if kind == "number" else "binary" if column.nunique() == 2 else "category"
        outputs.append({"name": name, "type": kind_name})
    combiner = {"type": "concat", "layers": [64]}
    return {"input_features": inputs, "output_features": outputs, "combiner": combiner}


def _kind(column: pd.Series) -> str:
    """A column's type; lists of numbers are vectors where all have one length, else timeseries; lists of words sets."""
    first: Any = next((cell for cell in column if not is_missing(cell)), None)
    if not hasattr(first, "__len__") or isinstance(first, str):
        return infer_kind(column).kind
    cells = [cell for cell in column if not is_missing(cell)]
    if isinstance(next(iter(first), None), str):
        return "set"
    shape = getattr(first, "shape", (len(first),))
    if len(shape) == 3 or (len(shape) == 2 and str(getattr(first, "dtype", "")) == "uint8"):
        return "image"
    return "vector" if len(shape) == 1 and len({len(cell) for cell in cells}) == 1 else "timeseries"
