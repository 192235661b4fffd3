"""Pomona: published ideas about neural networks, tried on your own data under one fair protocol.

Attributes are imported when first used, so that ``import pomona`` costs nothing and brings no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pomona.claims import claim
    from pomona.data import Task, load
    from pomona.recipe import Recipe, restore
    from pomona.recipe.estimators import PomonaClassifier, PomonaRegressor
    from pomona.study import Study, compare
    from pomona.zoo import Zoo

_NAMES = {
    "PomonaClassifier": "pomona.recipe.estimators",
    "PomonaRegressor": "pomona.recipe.estimators",
    "Recipe": "pomona.recipe",
    "Study": "pomona.study",
    "Task": "pomona.data",
    "Zoo": "pomona.zoo",
    "claim": "pomona.claims",
    "compare": "pomona.study",
    "load": "pomona.data",
    "restore": "pomona.recipe",
}
_PACKAGES = {
    "claims", "data", "edit", "implicit", "measure", "nets", "nn", "recipe", "report", "search", "seq", "study",
    "theory", "trace", "train", "weights", "zoo",
}  # fmt: skip

__version__ = "0.1.0"
__all__ = [
    "PomonaClassifier",
    "PomonaRegressor",
    "Recipe",
    "Study",
    "Task",
    "Zoo",
    "claim",
    "compare",
    "load",
    "restore",
]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
        globals()[name] = value
        return value
    if name in _PACKAGES:
        return importlib.import_module(f"pomona.{name}")
    raise AttributeError(f"module 'pomona' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES, *_PACKAGES})
