"""Backbones with named slots, sized from a task."""

from pomona.nets.build import BACKBONES, build
from pomona.nets.cost import flops, latency, match_width, parameters, training_memory
from pomona.nets.specs import Column, Inputs, Outputs

__all__ = [
    "BACKBONES",
    "Column",
    "Inputs",
    "Outputs",
    "build",
    "flops",
    "latency",
    "match_width",
    "parameters",
    "training_memory",
]
