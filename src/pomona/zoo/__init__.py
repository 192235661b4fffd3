"""The store of every network ever trained, and a corpus of runnable networks with their training records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pomona.zoo.record import Record
from pomona.zoo.store import Zoo

if TYPE_CHECKING:
    from pomona.zoo.corpus import Corpus

__all__ = ["Corpus", "Record", "Zoo"]


def __getattr__(name: str) -> Any:
    # the corpus brings pandas; the store alone does not
    if name == "Corpus":
        from pomona.zoo.corpus import Corpus

        return Corpus
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
