"""Learning-rate schedules: functions of training progress, so that they serve any kind of budget.

A schedule is ``schedule(progress, step) -> factor`` of the base learning rate, with progress in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from pomona.errors import PomonaError

Schedule = Callable[[float, int], float]


@dataclass(frozen=True)
class Constant:
    """factor = 1."""

    def __call__(self, progress: float, step: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Cosine:
    """factor = floor + (1 - floor) (1 + cos(pi p)) / 2, from 1 at p = 0 to ``floor`` at p = 1.

    Source: SGDR: Stochastic Gradient Descent with Warm Restarts, arXiv 1608.03983 (one period).
    """

    floor: float = 0.0

    def __call__(self, progress: float, step: int) -> float:
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


@dataclass(frozen=True)
class Linear:
    """factor = 1 - (1 - floor) p."""

    floor: float = 0.0

    def __call__(self, progress: float, step: int) -> float:
        return 1 - (1 - self.floor) * min(progress, 1.0)


@dataclass(frozen=True)
class Step:
    """factor = gamma^k after the k-th of ``drops`` equally spaced drops."""

    drops: int = 2
    gamma: float = 0.1

    def __call__(self, progress: float, step: int) -> float:
        return self.gamma ** min(self.drops, int(progress * (self.drops + 1)))


@dataclass(frozen=True)
class Warmup:
    """``inner``, scaled linearly from near 0 to 1 over the first ``fraction`` of training."""

    inner: Schedule
    fraction: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 1:
            raise PomonaError(f"warmup={self.fraction} must be a fraction of training in [0, 1)")

    def __call__(self, progress: float, step: int) -> float:
        if progress >= self.fraction:
            return self.inner(progress, step)
        # step 0 must move a little, or the first batch is wasted
        return max(progress / self.fraction, 0.02) * self.inner(progress, step)
