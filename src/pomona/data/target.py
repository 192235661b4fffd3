"""The target: whether it is classes or numbers, and how it is coded and decoded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pomona.data.types import labels, parse_number, to_number
from pomona.errors import PomonaError, unknown
from pomona.nets.specs import Outputs

MOST_INTEGER_CLASSES = 20
MOST_CLASSES = 1000
TARGET_NAMES = ("target", "label", "y")


def find_target(columns: list[str], target: str | None) -> str:
    """The target's column; without a name, the one called target, label or y, or a last one called class."""
    if target is not None:
        if target not in columns:
            raise unknown("target", target, columns)
        return target
    likely = [column for column in columns if column.lower() in TARGET_NAMES]
    likely = likely or [column for column in columns[-1:] if column.lower() == "class"]
    if len(likely) == 1:
        return likely[0]
    shown = ", ".join(columns[:12]) + (", ..." if len(columns) > 12 else "")
    raise PomonaError(f"say which column is the target: target=... with one of {shown}")


def clean_target(target: pd.Series, override: str | None = None) -> pd.Series:
    """Strings that all read as numbers become numbers; empty cells, ``?`` and infinities become missing.

    Raises:
        PomonaError: naming the first cell that is not a number in a column of many distinct numbers.
    """
    if pd.api.types.is_bool_dtype(target):
        return target.astype(float) if override == "number" else target
    if pd.api.types.is_numeric_dtype(target):
        return target.where(np.isfinite(target)) if pd.api.types.is_float_dtype(target) else target
    if pd.api.types.infer_dtype(target, skipna=True) == "boolean":
        return target.astype(float) if override == "number" else target
    target = target.mask(target.astype(str).str.strip().isin(["", "?"]))
    if override == "category":
        return target
    number, wrong = parse_number(target)
    few = 0 < wrong.sum() <= max(1, 0.05 * len(target)) and number.nunique() > MOST_INTEGER_CLASSES
    if override == "number" or few:
        return to_number(target)
    return target if wrong.any() or number.isna().all() else number


def target_kind(target: pd.Series, override: str | None = None) -> Literal["classes", "number"]:
    """Classes for strings, booleans and at most 20 distinct integers, each in four rows on average; else a number.

    Args:
        target: the column, without missing rows.
        override: ``category`` (or ``binary``) or ``number``.
    """
    if override is not None:
        choices = {"category": "classes", "binary": "classes", "number": "number"}
        if override not in choices:
            raise unknown(f"types[{target.name!r}]", override, choices)
        return "classes" if choices[override] == "classes" else "number"
    if not pd.api.types.is_numeric_dtype(target) or pd.api.types.is_bool_dtype(target):
        return "classes"
    whole = bool((target == target.round()).all())
    most = min(MOST_INTEGER_CLASSES, max(2, len(target) // 4))
    return "classes" if whole and target.nunique() <= most else "number"


@dataclass
class TargetCoder:
    """Targets to tensors and outputs back to values.

    Attributes:
        name: the target's column (several, joined by commas, for several numbers).
        kind: ``classes`` or ``number``.
        names: class labels in logit order, or target names.
        label: how a label is written in predictions: ``str``, ``int`` or ``bool``.
        mean: mean of each number over training rows.
        scale: standard deviation of each number over training rows.
    """

    name: str
    kind: Literal["classes", "number"]
    names: tuple[str, ...]
    label: Literal["str", "int", "bool"] = "str"
    mean: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()

    @property
    def outputs(self) -> Outputs:
        """What a network must give."""
        return Outputs(self.kind, len(self.names), self.names, self.mean, self.scale)

    @classmethod
    def of_classes(cls, target: pd.Series) -> TargetCoder:
        """Sorted labels of a column of classes.

        Raises:
            PomonaError: for a single class, more than 1,000, or nearly as many as there are rows.
        """
        name, count = str(target.name), target.nunique()
        if count < 2:
            raise PomonaError(
                f"target {name!r} is constant ({target.iloc[0]!r} in all {len(target):,} rows); "
                "there is nothing to learn"
            )
        if count > MOST_CLASSES or count > max(0.5 * len(target), 2):
            advice = "is it an identifier or free text? Name another column, or fold rare classes together"
            if pd.api.types.is_numeric_dtype(target):
                advice = f"for a number say types={{{name!r}: 'number'}}"
            raise PomonaError(f"target {name!r} has {count:,} classes in {len(target):,} rows; {advice}")
        label: Literal["str", "int", "bool"] = "str"
        if pd.api.types.is_bool_dtype(target):
            label = "bool"
        elif pd.api.types.is_numeric_dtype(target) and bool((target == target.round()).all()):
            label = "int"
        return cls(name, "classes", tuple(labels(pd.Series(np.sort(target.unique())))), label)

    @classmethod
    def of_numbers(cls, names: list[str], values: np.ndarray, train: np.ndarray) -> TargetCoder:
        """Mean and scale of ``values`` (n, size) over the rows ``train``.

        Raises:
            PomonaError: for a number that does not vary.
        """
        mean, scale = values[train].mean(axis=0), values[train].std(axis=0)
        for name, spread, first in zip(names, scale, values[train][0], strict=True):
            if not spread > 0:
                raise PomonaError(f"target {name!r} is constant ({first:g} in all training rows)")
        return cls(", ".join(names), "number", tuple(names), "str", tuple(mean.tolist()), tuple(scale.tolist()))

    def encode(self, target: pd.Series | np.ndarray) -> Tensor:
        """Class indices (n,) as int64, or values (n, size) as float32.

        Raises:
            PomonaError: for a class that is not among ``names``.
        """
        if self.kind == "number":
            if isinstance(target, pd.Series):
                target = to_number(target).to_numpy(float)
            return torch.from_numpy(np.asarray(target, np.float32).reshape(len(target), -1))
        text = labels(pd.Series(target))
        codes = pd.Index(self.names).get_indexer(pd.Index(text))
        if (codes < 0).any():
            unseen = sorted(set(text[codes < 0].astype(str)))
            shown = ", ".join(repr(name) for name in unseen[:5]) + (", ..." if len(unseen) > 5 else "")
            raise PomonaError(
                f"target {self.name!r} has {len(unseen)} classes that the training table lacks ({shown}); "
                "leave these rows out, or load both files as one table"
            )
        return torch.from_numpy(codes.astype(np.int64))

    def decode(self, output: Tensor) -> pd.DataFrame:
        """Outputs (n, size) as columns: ``prediction`` and, for classes, ``probability_<class>``."""
        if self.kind == "number":
            heads = ["prediction"] if len(self.names) == 1 else [f"prediction_{name}" for name in self.names]
            return pd.DataFrame(output.detach().double().cpu().numpy(), columns=heads)
        probability = output.detach().double().softmax(-1).cpu().numpy()
        names: Any = np.array(self.names, dtype=object)
        if self.label == "int":
            names = np.array([int(name) for name in self.names])
        elif self.label == "bool":
            names = np.array([name == "True" for name in self.names])
        frame = pd.DataFrame(probability, columns=[f"probability_{name}" for name in self.names])
        picked = probability.argmax(axis=1) if len(probability) else np.zeros(0, int)
        frame.insert(0, "prediction", names[picked])
        return frame

    def to_json(self) -> dict[str, Any]:
        """The coder as JSON-able data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TargetCoder:
        """The inverse of :meth:`to_json`."""
        lists = {key: tuple(data[key]) for key in ("names", "mean", "scale")}
        return cls(**{**data, **lists})
