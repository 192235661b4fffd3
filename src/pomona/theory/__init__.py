"""Predictions of theory, held against networks that are really trained."""

from pomona.theory.nc_deep_linear import (
    DeepLinearUFM,
    NCSolution,
    nc_deep_linear,
)
from pomona.theory.prediction import (
    Agreement,
    Measurement,
    Prediction,
    hold,
)

__all__ = [
    "Agreement",
    "DeepLinearUFM",
    "Measurement",
    "NCSolution",
    "Prediction",
    "hold",
    "nc_deep_linear",
]
