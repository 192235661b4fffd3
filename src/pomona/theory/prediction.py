"""A theory's curve against what was measured on networks really trained or sampled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from pomona.errors import PomonaError, unknown

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Array = NDArray[np.float64]
Kind = Literal["exact", "asymptotic", "upper", "lower", "sign"]


def _array(values: Any) -> Array:
    values = values.detach().cpu().numpy() if hasattr(values, "detach") else values
    return np.atleast_1d(np.asarray(values, dtype=np.float64))


@dataclass
class Prediction:
    """A predicted curve ``y(x)``, with an optional band ``[lo, hi]``.

    Attributes:
        x: ``(points,)``, increasing.
        y: ``(points,)``.
        lo: lower edge of the band.
        hi: upper edge of the band.
        kind: ``exact``; ``asymptotic`` (judged at the largest x only); ``upper`` or ``lower`` bound; ``sign``.
        assumptions: what the theory needs, in words.
    """

    x: Any
    y: Any
    lo: Any = None
    hi: Any = None
    kind: Kind = "exact"
    assumptions: str = ""

    def __post_init__(self) -> None:
        if self.kind not in JUDGES:
            raise unknown("kind", self.kind, JUDGES)
        self.x, self.y = _array(self.x), _array(self.y)
        self.lo = self.y if self.lo is None else _array(self.lo)
        self.hi = self.y if self.hi is None else _array(self.hi)
        if not self.x.shape == self.y.shape == self.lo.shape == self.hi.shape:
            raise PomonaError(f"x has {self.x.size} points and y {self.y.size}; give one y (lo, hi) a point")
        if np.any(np.diff(self.x) <= 0):
            raise PomonaError("x must be increasing; sort the points")

    def at(self, x: Any) -> tuple[Array, Array, Array]:
        """``y``, ``lo`` and ``hi`` at ``x``, linear between the points."""
        x = _array(x)
        if x.min() < self.x[0] or x.max() > self.x[-1]:
            raise PomonaError(f"x={x.min():g}..{x.max():g} leaves the predicted range {self.x[0]:g}..{self.x[-1]:g}")
        return np.interp(x, self.x, self.y), np.interp(x, self.x, self.lo), np.interp(x, self.x, self.hi)


@dataclass
class Measurement:
    """Means ``(points,)`` with standard errors over ``n_seeds`` runs."""

    x: Any
    mean: Any
    sem: Any = None
    n_seeds: int = 1

    def __post_init__(self) -> None:
        self.x, self.mean = _array(self.x), _array(self.mean)
        self.sem = np.zeros_like(self.mean) if self.sem is None else _array(self.sem)
        if not self.x.shape == self.mean.shape == self.sem.shape:
            raise PomonaError(f"x has {self.x.size} points and mean {self.mean.size}; give one mean (and sem) a point")

    @classmethod
    def of(cls, x: Any, samples: Any) -> Measurement:
        """From ``samples`` ``(seeds, points)``."""
        samples = _array(samples)
        if samples.ndim != 2:
            raise PomonaError(f"samples has {samples.ndim} dimension(s); give (seeds, points)")
        n = len(samples)
        sem = samples.std(0, ddof=1) / n**0.5 if n > 1 else np.zeros(samples.shape[1])
        return cls(x, samples.mean(0), sem, n)


@dataclass
class Agreement:
    """What ``hold`` found.

    Attributes:
        agrees: no judged point outside what is allowed.
        worst_z: largest distance from the prediction (bounds: beyond the bound) in standard errors; ``inf`` when
            the standard error is 0 and the distance is not.
        violations: number of judged points outside.
        slack: mean distance between measurement and bound on the allowed side (``upper``, ``lower``), else 0.
    """

    agrees: bool
    worst_z: float
    violations: int
    slack: float
    prediction: Prediction = field(repr=False)
    measurement: Measurement = field(repr=False)

    def figure(self) -> Figure:
        """Both curves on one axis."""
        from plotly.graph_objects import Figure, Scatter

        p, m = self.prediction, self.measurement
        bars = {"type": "data", "array": m.sem.tolist()}
        return Figure(
            [
                Scatter(x=p.x.tolist(), y=p.y.tolist(), mode="lines", name=f"predicted ({p.kind})"),
                Scatter(
                    x=m.x.tolist(), y=m.mean.tolist(), error_y=bars, mode="markers", name=f"measured (n={m.n_seeds})"
                ),
            ]
        )

    def plot(self, path: str) -> None:
        """Write the figure as an HTML file."""
        self.figure().write_html(path)


def _outside(mean: Array, y: Array, lo: Array, hi: Array) -> Array:
    return np.maximum(np.maximum(lo - mean, mean - hi), 0.0)


def _wrong_sign(mean: Array, y: Array, lo: Array, hi: Array) -> Array:
    return np.where(np.sign(mean) == np.sign(y), 0.0, np.maximum(np.abs(mean), np.finfo(np.float64).tiny))


# distance of each measured mean beyond what the kind of prediction says
JUDGES: dict[str, Callable[[Array, Array, Array, Array], Array]] = {
    "exact": _outside,
    "asymptotic": _outside,
    "upper": lambda mean, y, lo, hi: np.maximum(mean - hi, 0.0),
    "lower": lambda mean, y, lo, hi: np.maximum(lo - mean, 0.0),
    "sign": _wrong_sign,
}


def hold(prediction: Prediction, measurement: Measurement, rtol: float = 0.0, *, z: float = 3.0) -> Agreement:
    """Judge a measurement: each point may be off by ``rtol * |y| + z * sem``.

    Bounds are checked for violation and their slack is reported; ``asymptotic`` judges only the largest ``x``;
    ``sign`` forgives a wrong sign within ``z`` standard errors of 0.

    Args:
        prediction: the theory.
        measurement: the runs; its ``x`` must lie inside the prediction's.
        rtol: relative tolerance.
        z: tolerance in standard errors.
    """
    y, lo, hi = prediction.at(measurement.x)
    mean, sem = measurement.mean, measurement.sem
    beyond = JUDGES[prediction.kind](mean, y, lo, hi)
    tolerance = z * sem + (0.0 if prediction.kind == "sign" else rtol) * np.abs(y)
    judged = measurement.x == measurement.x.max() if prediction.kind == "asymptotic" else np.full(y.shape, True)
    in_sem = np.divide(beyond, sem, out=np.where(beyond > 0, np.inf, 0.0), where=sem > 0)
    violations = int((judged & ~(beyond <= tolerance)).sum())
    slack = {"upper": hi - mean, "lower": mean - lo}.get(prediction.kind, np.zeros(1))
    return Agreement(
        violations == 0,
        float(in_sem[judged].max()),
        violations,
        float(np.maximum(slack, 0.0).mean()),
        prediction,
        measurement,
    )
