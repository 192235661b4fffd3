"""Verdicts: whether a paper's headline held in our own run, by a rule that is fixed before the run.

A claim function returns evidence of one of three kinds; the verdict follows from the evidence:

* :class:`Comparison`: method minus baseline, paired over seeds, with a 95% Student-t interval (seeds are few, and
  with few seeds
  the percentile bootstrap is too narrow). *holds* when the interval lies wholly on the claimed side of the margin,
  *fails* when wholly on the other, else *undecided*.
* :class:`Prediction`: a theory's curve against the measured one. *holds* when no point deviates by more than the
  Bonferroni-corrected 95% limit of its standard error (or the stated relative tolerance, whichever is wider).
* :class:`Bound`: *holds* without any violation; how slack it is stands beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from scipy import stats

Decision = Literal["holds", "fails", "undecided"]
Scale = Literal["smoke", "full", "gpu"]


@dataclass
class Comparison:
    """Paired results of method and baseline, one entry a seed.

    Attributes:
        method: the method's results.
        baseline: the baseline's results at the same seeds.
        metric: what was measured, with its unit.
        method_name: what the method is.
        baseline_name: what it is compared with, tuned alike and at equal budget.
        paper: the paper's own figure, in our words.
        better: which direction of ``metric`` is better.
        margin: the claimed difference must exceed this, in the good direction; negative for "no worse than by".
        note: what we think explains the outcome.
        censored: whether some run ended at its budget before it gave its number.
        details: further JSON-able results.
    """

    method: Sequence[float]
    baseline: Sequence[float]
    metric: str
    method_name: str
    baseline_name: str
    paper: str
    better: Literal["higher", "lower"] = "higher"
    margin: float = 0.0
    note: str = ""
    censored: bool = False
    details: dict[str, Any] = field(default_factory=dict)
    kind = "comparison"

    @property
    def differences(self) -> np.ndarray:
        """Per seed, positive where the method is better."""
        sign = 1.0 if self.better == "higher" else -1.0
        return sign * (np.asarray(self.method, float) - np.asarray(self.baseline, float))

    @property
    def effect(self) -> float:
        """Mean difference, positive where the method is better."""
        return float(self.differences.mean())

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% Student-t interval of the effect; ``None`` with fewer than two seeds."""
        return t_interval(self.differences)

    @property
    def decision(self) -> Decision:
        """See the module's text."""
        if self.interval is None or not np.isfinite(self.differences).all():
            return "undecided"
        low, high = self.interval
        return "holds" if low > self.margin else "fails" if high < self.margin else "undecided"


@dataclass
class Prediction:
    """A theory's curve and its measurement.

    Attributes:
        predicted: (points,) values that the theory gives.
        measured: (seeds, points) values.
        tolerance: relative error that is forgiven at any point, for theories that are exact only in a limit.
    """

    predicted: Sequence[float]
    measured: Sequence[Sequence[float]]
    metric: str
    method_name: str
    baseline_name: str
    paper: str
    tolerance: float = 0.0
    note: str = ""
    censored: bool = False
    details: dict[str, Any] = field(default_factory=dict)
    kind = "prediction"
    interval = None

    def _deviation(self) -> np.ndarray:
        """Deviation of each point in units of its allowance (standard error, or tolerance where that is wider)."""
        measured, predicted = np.atleast_2d(np.asarray(self.measured, float)), np.asarray(self.predicted, float)
        spread = measured.std(axis=0, ddof=1) if len(measured) > 1 else np.zeros(predicted.shape)
        error = np.abs(measured.mean(axis=0) - predicted)
        standard = spread / np.sqrt(len(measured))
        forgiven = self.tolerance * np.abs(predicted) / self._limit()
        return error / np.maximum(np.maximum(standard, forgiven), 1e-300)

    def _limit(self) -> float:
        seeds, points = np.atleast_2d(np.asarray(self.measured, float)).shape
        return float(stats.t.ppf(1 - 0.025 / points, max(seeds - 1, 1)))

    @property
    def effect(self) -> float:
        """Worst deviation in standard errors."""
        return float(self._deviation().max())

    @property
    def decision(self) -> Decision:
        """See the module's text."""
        if len(np.atleast_2d(np.asarray(self.measured, float))) < 2 and not self.tolerance:
            return "undecided"
        if np.isnan(self.effect):
            return "undecided"
        return "holds" if self.effect <= self._limit() else "fails"


@dataclass
class Bound:
    """Values that must stay on one side of a bound.

    Attributes:
        values: measured values, any shape.
        bounds: the bound at each of them.
        side: ``upper`` when values must not exceed the bounds.
    """

    values: Sequence[float]
    bounds: Sequence[float]
    metric: str
    method_name: str
    baseline_name: str
    paper: str
    side: Literal["upper", "lower"] = "upper"
    note: str = ""
    censored: bool = False
    details: dict[str, Any] = field(default_factory=dict)
    kind = "bound"
    interval = None

    def _room(self) -> np.ndarray:
        room = np.asarray(self.bounds, float) - np.asarray(self.values, float)
        return room if self.side == "upper" else -room

    @property
    def effect(self) -> float:
        """Smallest room between value and bound; negative where violated."""
        return float(self._room().min())

    @property
    def decision(self) -> Decision:
        """See the module's text."""
        if np.isnan(self.effect):
            return "undecided"
        return "holds" if self.effect >= 0 else "fails"


Evidence = Comparison | Prediction | Bound


def t_interval(differences: np.ndarray, level: float = 0.95) -> tuple[float, float] | None:
    """Mean +- t * s / sqrt(n), or ``None`` for fewer than two values."""
    values = np.asarray(differences, float)
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    half = stats.t.ppf(0.5 + level / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)
