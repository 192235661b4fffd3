"""Dividing rows into train, valid and test: stratified, by group, or by time."""

from __future__ import annotations

import numpy as np
import pandas as pd
from sklearn.model_selection import GroupShuffleSplit

from pomona.errors import PomonaError

Rows = dict[str, np.ndarray]

# Of every 25 rows 16 train, 4 validate and 5 test, interleaved so that short runs are divided fairly too.
_PATTERN = np.array(list("abacaabaca" + "abaca" + "abaca" + "abaaa"))
_NAMES = {"a": "train", "b": "test", "c": "valid"}
FEWEST_ROWS = 10


def strata(target: pd.Series) -> np.ndarray:
    """A class index per row: the class itself, or one of up to ten quantile bins of a float target."""
    if not pd.api.types.is_float_dtype(target):
        return pd.factorize(target, sort=True)[0]
    bins = int(np.clip(len(target) // 25, 1, 10))
    return pd.qcut(target.rank(method="first"), bins, labels=False).to_numpy()


def stratified(stratum: np.ndarray, seed: int, *, test: bool = True) -> Rows:
    """Deal the shuffled rows of each stratum to the splits in turn: 64 : 16 : 20, or 80 : 20 without a test split.

    Each split gets its share of every stratum to within a row. A stratum too small to reach ``train``
    goes there whole, so that nothing is tested that could not be learned.
    """
    rng = np.random.default_rng(seed)
    order = np.lexsort((rng.random(len(stratum)), stratum))
    pattern = _PATTERN if test else _PATTERN[_PATTERN != "b"]
    part = np.empty(len(stratum), dtype="<U1")
    part[order] = np.resize(np.roll(pattern, rng.integers(len(pattern))), len(stratum))
    learned = np.isin(stratum, stratum[part == "a"])
    part[~learned] = "a"
    names = _NAMES if test else {"a": "train", "c": "valid"}
    return {name: np.flatnonzero(part == letter) for letter, name in sorted(names.items(), key=_order)}


def by_group(groups: pd.Series, seed: int, *, test: bool = True) -> Rows:
    """Whole groups to each split, shuffled: about 64 : 16 : 20 of the groups (80 : 20 without a test split)."""
    codes = pd.factorize(groups, use_na_sentinel=False)[0]
    needed = 3 if test else 2
    found = len(np.unique(codes))
    if found < needed:
        raise PomonaError(f"group={groups.name!r} has {found} distinct values; at least {needed} are needed")
    rest, rows = np.arange(len(codes)), {}
    for name in ("test", "valid") if test else ("valid",):
        cut = GroupShuffleSplit(1, test_size=0.2, random_state=seed)
        keep, out = next(cut.split(rest, groups=codes[rest]))
        rows[name], rest = rest[out], rest[keep]
    return {"train": rest, **{name: rows[name] for name in ("valid", "test") if name in rows}}


def by_time(times: pd.Series, *, test: bool = True) -> Rows:
    """The latest 20 % test, the 16 % before them validate (20 % without a test split); ties stay together."""
    order = np.argsort(times.to_numpy(), kind="stable")
    ordered = times.to_numpy()[order]
    shares = (0.64, 0.8) if test else (0.8,)
    cuts = [int(np.searchsorted(ordered, ordered[int(share * len(order))])) for share in shares]
    names = ("train", "valid", "test")[: len(cuts) + 1]
    parts = np.split(order, cuts)
    if any(len(part) == 0 for part in parts):
        raise PomonaError(
            f"time={times.name!r} has too few distinct moments ({times.nunique()}) to divide the rows by; "
            "leave time out for a random split"
        )
    return dict(zip(names, parts, strict=True))


def _order(item: tuple[str, str]) -> int:
    return ("train", "valid", "test").index(item[1])
