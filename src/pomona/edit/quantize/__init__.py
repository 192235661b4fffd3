"""Quantisation: few bits a weight and an activation, after training or within it, and int8 that runs faster."""

from pomona.edit.quantize.adaround import AdaRound
from pomona.edit.quantize.equalize import equalize
from pomona.edit.quantize.fake import FakeQuant
from pomona.edit.quantize.integer import IntegerLayer
from pomona.edit.quantize.integer_net import to_integer
from pomona.edit.quantize.mixed_precision import allocate, hessian_traces
from pomona.edit.quantize.network import quantize
from pomona.edit.quantize.quantizer import Quantizer
from pomona.edit.quantize.report import report, sqnr, stored_bytes

__all__ = [
    "AdaRound",
    "FakeQuant",
    "IntegerLayer",
    "Quantizer",
    "allocate",
    "equalize",
    "hessian_traces",
    "quantize",
    "report",
    "sqnr",
    "stored_bytes",
    "to_integer",
]
