"""The catalogue of papers, and the named options of every slot, as data: read without importing torch.

``catalog.toml`` has a row a paper; ``slots.toml`` says which names fill which slot (``linear=kan``) and which short
names stand for whole candidates. Nothing here is typed in twice: whether a paper is done follows from its row.
"""

from __future__ import annotations

import importlib
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from pomona.errors import unknown

Status = Literal["done", "part", "open"]


@dataclass(frozen=True)
class Paper:
    """A row of the catalogue.

    Attributes:
        key: the field's short name, unique.
        parts: public classes and functions, ``module:name``, the main one first.
        facts: names of the tests (less ``test_``) that hold the paper's identities.
        claim: ``module:function`` of the executable headline claim.
        figures: functions, ``module:name``, that draw what was learned.
    """

    key: str
    title: str
    arxiv: str
    year: int
    family: str
    kind: str
    parts: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()
    claim: str = ""
    figures: tuple[str, ...] = ()

    @property
    def status(self) -> Status:
        """``done`` with parts, facts and a claim; ``part`` with some of them; else ``open``."""
        filled = [bool(self.parts), bool(self.facts), bool(self.claim)]
        return "done" if all(filled) else "part" if any(filled) else "open"

    @property
    def slots(self) -> dict[str, list[str]]:
        """Slot -> names by which this paper's parts fill it."""
        found: dict[str, list[str]] = {}
        for slot, options in slots().items():
            for name, entry in options.items():
                if entry.paper == self.key:
                    found.setdefault(slot, []).append(name)
        return found


@dataclass(frozen=True)
class SlotEntry:
    """What a name in a slot stands for.

    Attributes:
        make: ``module:factory``.
        paper: key of its catalogue row, or empty.
    """

    make: str
    paper: str = ""


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads(resources.files("pomona").joinpath(name).read_text(encoding="utf-8"))


@cache
def papers() -> dict[str, Paper]:
    """Every paper by key, in the catalogue's order."""
    rows: list[dict[str, Any]] = _read("catalog.toml")["paper"]
    for row in rows:
        row |= {field: tuple(row.get(field, ())) for field in ("parts", "facts", "figures")}
    return {row["key"]: Paper(**row) for row in rows}


def paper(key: str) -> Paper:
    """One paper.

    Raises:
        PomonaError: if there is none of that key; names the nearest.
    """
    if key not in papers():
        raise unknown("key", key, papers())
    return papers()[key]


@cache
def slots() -> dict[str, dict[str, SlotEntry]]:
    """Slot -> name -> entry."""
    return {
        slot: {
            name: SlotEntry(entry) if isinstance(entry, str) else SlotEntry(**entry) for name, entry in options.items()
        }
        for slot, options in _read("slots.toml")["slot"].items()
    }


@cache
def short_names() -> dict[str, str]:
    """Short candidate name -> the candidate it stands for, e.g. ``kan`` -> ``mlp linear=kan``."""
    return dict(_read("slots.toml")["short"])


def entry(slot: str, name: str) -> SlotEntry:
    """The entry of ``name`` in ``slot``.

    Raises:
        PomonaError: for an unknown slot or name; names the nearest.
    """
    if slot not in slots():
        raise unknown("slot", slot, slots())
    if name not in slots()[slot]:
        raise unknown(slot, name, slots()[slot])
    return slots()[slot][name]


def load(path: str) -> Any:
    """Import what ``module:name`` points at."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
