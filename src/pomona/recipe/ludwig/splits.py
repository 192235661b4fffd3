"""Dividing the rows of a declaration: at random, by classes, by time, or as a column says."""

from __future__ import annotations

import numpy as np
import pandas as pd

from pomona.data.types import date_format, labels, parse_number, to_date, to_number
from pomona.errors import PomonaError, unknown
from pomona.recipe.ludwig.config import SplitConfig

NAMES = ("train", "valid", "test")
_FIXED = {"0": 0, "1": 1, "2": 2, "train": 0, "training": 0, "valid": 1, "validation": 1, "test": 2}


def split_rows(split: SplitConfig, data: pd.DataFrame, seed: int) -> dict[str, np.ndarray]:
    """Positions of the rows of train, valid and test (which may be empty).

    Raises:
        PomonaError: for a column that is not there or cannot be read, or a split without rows.
    """
    if split.column is not None and split.column not in data:
        raise unknown("preprocessing.split.column", split.column, data.columns)
    rng = np.random.default_rng(seed)
    count = len(data)
    if split.type == "fixed":
        text = labels(data[split.column]).astype(str).str.lower()
        strange = sorted(set(text) - set(_FIXED))
        if strange:
            raise PomonaError(f"split column {split.column!r} holds {strange[0]!r}; use train, valid, test or 0, 1, 2")
        part = text.map(_FIXED).to_numpy()
        rows = [np.flatnonzero(part == number) for number in range(3)]
    elif split.type == "datetime":
        rows = _cut(np.argsort(_moments(data[split.column]), kind="stable"), split.probabilities)
    elif split.type == "stratify":
        stratum = pd.factorize(labels(data[split.column]), use_na_sentinel=False)[0]
        # rows of a stratum are spread evenly over [0, 1), so that each cut takes its share of every stratum
        place = np.empty(count)
        for value in np.unique(stratum):
            own = np.flatnonzero(stratum == value)
            place[own] = (rng.permutation(len(own)) + rng.random()) / len(own)
        edges = np.cumsum(split.probabilities)[:2]
        part = np.searchsorted(edges, place, side="right")
        rows = [np.flatnonzero(part == number) for number in range(3)]
    else:
        rows = [np.sort(part) for part in _cut(rng.permutation(count), split.probabilities)]
    for name, index in zip(NAMES[:2], rows[:2], strict=True):
        if not len(index):
            raise PomonaError(f"no rows are left for the {name} split; give more rows or another preprocessing.split")
    return dict(zip(NAMES, rows, strict=True))


def _cut(order: np.ndarray, shares: tuple[float, float, float]) -> list[np.ndarray]:
    cuts = np.round(np.cumsum(shares)[:2] * len(order)).astype(int)
    return np.split(order, cuts)


def _moments(column: pd.Series) -> np.ndarray:
    known = date_format(column)
    if known is None and parse_number(column)[1].any():
        raise PomonaError(f"split column {column.name!r} cannot be read as dates or numbers")
    moments = to_number(column) if known is None else to_date(column, known)
    if moments.isna().any():
        raise PomonaError(f"split column {column.name!r} has no value in {int(moments.isna().sum()):,} rows")
    return moments.to_numpy()
