"""Functions from a network and data to numbers and pictures."""

from pomona.measure.linear_path import (
    PathProfile,
    hidden_barrier_test,
    linear_path,
    per_layer_path,
    triangle,
)
from pomona.measure.neural_collapse import (
    nc_metrics,
    neural_collapse,
    simplex_etf,
)
from pomona.measure.reading import (
    Reading,
)
from pomona.measure.trajectory import (
    DeepLinearToy,
    StoreCheckpoints,
    gradient_alignment,
    residual_walk,
    trajectory_view,
)

__all__ = [
    "DeepLinearToy",
    "PathProfile",
    "Reading",
    "StoreCheckpoints",
    "gradient_alignment",
    "hidden_barrier_test",
    "linear_path",
    "nc_metrics",
    "neural_collapse",
    "per_layer_path",
    "residual_walk",
    "simplex_etf",
    "trajectory_view",
    "triangle",
]
