"""Cells that hold several values: words, vectors, series and images."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from pomona.errors import PomonaError


def is_missing(cell: Any) -> bool:
    """Whether a cell is None, nan or an empty string."""
    return cell is None or (isinstance(cell, float) and np.isnan(cell)) or (isinstance(cell, str) and not cell.strip())


def words(column: pd.Series) -> list[list[str]]:
    """Each cell's words: items of a list, what blanks or commas divide in a string; none where it is missing."""
    return [[str(item) for item in _items(cell)] for cell in column]


def _items(cell: Any) -> Any:
    if is_missing(cell):
        return []
    if isinstance(cell, str):
        return cell.replace(",", " ").split()
    if isinstance(cell, (np.ndarray, Tensor)):
        return cell.tolist()
    if isinstance(cell, (set, frozenset)):
        return sorted(cell)
    return cell if isinstance(cell, (list, tuple)) else [cell]


def _parse(column: pd.Series, row: int, cell: Any) -> np.ndarray:
    """One cell as an array of numbers; in a string blanks or commas divide entries, semicolons rows."""
    try:
        if isinstance(cell, str):
            lines = [line.replace(",", " ").split() for line in cell.strip(" []").split(";")]
            return np.array(lines[0] if len(lines) == 1 else lines, np.float32)
        return np.asarray(cell.detach().cpu() if isinstance(cell, Tensor) else cell, np.float32)
    except (ValueError, TypeError) as error:
        raise PomonaError(
            f"column {column.name!r}, row {row + 1}: {str(cell)[:40]!r} is not a list of numbers"
        ) from error


def arrays(column: pd.Series, shapes: Collection[tuple[int, ...]] | None = None) -> np.ndarray:
    """Cells of one shape as (n, *shape), nan where missing.

    Args:
        column: cells that are lists, arrays or strings of numbers.
        shapes: the shapes allowed; by default that of the first cell that is there.

    Raises:
        PomonaError: for a cell that is not numbers, or of another shape.
    """
    found = {row: _parse(column, row, cell) for row, cell in enumerate(column) if not is_missing(cell)}
    if not found and shapes is None:
        raise PomonaError(f"column {column.name!r} has no values in its training rows; leave it out")
    shape = next(iter(found.values())).shape if found else next(iter(shapes or ()))
    for row, cell in found.items():
        if cell.shape != shape or (shapes is not None and shape not in shapes):
            wanted = next(iter(shapes)) if shapes is not None else shape
            raise PomonaError(
                f"column {column.name!r}, row {row + 1}: a cell of shape {cell.shape} does not fit; needed is {wanted}"
            )
    out = np.full((len(column), *shape), np.nan, np.float32)
    for row, cell in found.items():
        out[row] = cell
    return out


def pad_series(column: pd.Series, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Series of any length as (n, channels, steps), nan where there is no step; longer ones are cut.

    Args:
        column: cells (steps,) or (channels, steps).
        shape: (channels, steps); by default the longest cell's.

    Raises:
        PomonaError: for a cell that is not numbers, or has other channels.
    """
    found = {row: np.atleast_2d(_parse(column, row, cell)) for row, cell in enumerate(column) if not is_missing(cell)}
    if not found and shape is None:
        raise PomonaError(f"column {column.name!r} has no values in its training rows; leave it out")
    channels, steps = shape or (next(iter(found.values())).shape[0], max(cell.shape[1] for cell in found.values()))
    out = np.full((len(column), channels, steps), np.nan, np.float32)
    for row, cell in found.items():
        if cell.ndim != 2 or len(cell) != channels:
            raise PomonaError(
                f"column {column.name!r}, row {row + 1}: a cell of shape {cell.shape} does not fit; "
                f"needed is ({channels}, steps)"
            )
        out[row, :, : cell.shape[1]] = cell[:, :steps]
    return out
