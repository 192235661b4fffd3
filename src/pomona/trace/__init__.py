"""What a network's operations say about it: axes of exchangeable units, blocks in a chain, a graph of neurons."""

from pomona.trace.axes import axes
from pomona.trace.axis import Axis, AxisSet, Fixed, Place
from pomona.trace.chain import Block, chain
from pomona.trace.check import Check
from pomona.trace.neuron_graph import NeuronGraph, neuron_graph
from pomona.trace.program import export
from pomona.trace.resize import resized
from pomona.trace.rules import axis_rule

__all__ = [
    "Axis",
    "AxisSet",
    "Block",
    "Check",
    "Fixed",
    "NeuronGraph",
    "Place",
    "axes",
    "axis_rule",
    "chain",
    "export",
    "neuron_graph",
    "resized",
]
