"""Layers defined by an energy or a fixed point."""

from pomona.implicit.hopfield import (
    Hopfield,
    HopfieldLayer,
    HopfieldMemory,
    HopfieldPooling,
    energy,
    hopfield_retrieve,
)
from pomona.implicit.hopfield_measures import (
    MILNet,
    head_report,
    separation,
    storage_test,
)

__all__ = [
    "Hopfield",
    "HopfieldLayer",
    "HopfieldMemory",
    "HopfieldPooling",
    "MILNet",
    "energy",
    "head_report",
    "hopfield_retrieve",
    "separation",
    "storage_test",
]
