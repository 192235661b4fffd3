"""Intervals and differences over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 10_000


def bootstrap_interval(values: Sequence[float] | np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, widened for small samples.

    With n values the plain percentile interval is too narrow by sqrt((n-1)/n) and by the normal's quantile standing
    where Student's should. The levels are therefore moved to Phi(+-sqrt(n/(n-1)) t_{n-1}) (the expanded percentile
    interval). No resample leaves the range of the values, which covers the mean with probability 1 - 2^(1-n): that is
    short of 95% for fewer than six values (75% of three), so these get Student's interval, mean +- t s / sqrt(n).

    Source: What Teachers Should Know about the Bootstrap, arXiv 1411.5279.

    Returns:
        (low, high); (nan, nan) without values and (v, v) for one.
    """
    data = np.asarray(values, float)
    if data.size == 0 or not np.isfinite(data).all():
        return float("nan"), float("nan")
    if data.size == 1:
        return float(data[0]), float(data[0])
    n = data.size
    if n < 6:
        half = stats.t.ppf((1 + level) / 2, n - 1) * data.std(ddof=1) / np.sqrt(n)
        return float(data.mean() - half), float(data.mean() + half)
    index = np.random.default_rng(0).integers(0, n, (RESAMPLES, n))
    tail = stats.norm.cdf(stats.t.ppf((1 - level) / 2, n - 1) * np.sqrt(n / (n - 1)))
    means = data[index].mean(axis=1)
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """A candidate minus the reference, paired over seeds, positive where the candidate is better.

    Attributes:
        mean: average difference.
        interval: its 95% bootstrap interval.
        probability: that the candidate improves on the reference: Student-t posterior of the mean difference.
        sure: whether the 95% Student-t interval, too, excludes zero. Plain sentences say "better" only then.
    """

    mean: float
    interval: tuple[float, float]
    probability: float
    sure: bool


def paired_difference(values: Sequence[float], reference: Sequence[float], higher_is_better: bool) -> Difference:
    """The paired difference over the seeds that both have."""
    n = min(len(values), len(reference))
    sign = 1.0 if higher_is_better else -1.0
    gaps = sign * (np.asarray(values[:n], float) - np.asarray(reference[:n], float))
    if n == 0 or not np.isfinite(gaps).all():
        return Difference(float("nan"), (float("nan"),) * 2, float("nan"), False)
    mean = float(gaps.mean())
    if n == 1:
        return Difference(mean, (mean, mean), float("nan"), False)
    error = gaps.std(ddof=1) / np.sqrt(n)
    if error <= 1e-12 * abs(mean):  # equal gaps, as shares of few rows often are: their signs are all that is known
        tail = 0.5 ** (n if mean else 1)
        return Difference(mean, (mean, mean), 1 - tail if mean > 0 else tail, bool(mean) and 2 * tail < 0.05)
    probability = float(stats.t.cdf(mean / error, n - 1))
    half = stats.t.ppf(0.975, n - 1) * error
    return Difference(mean, bootstrap_interval(gaps), probability, bool(abs(mean) > half))


def relative_improvement(means: Sequence[float], higher_is_better: bool) -> list[float]:
    """Per cent by which each is better than the average of all.

    RI = 100 (m - average) / |average|, with the sign turned where lower is better.

    Source: NAS evaluation is frustratingly hard, arXiv 1912.12522.
    """
    data = np.asarray(means, float)
    average = np.nanmean(data) if np.isfinite(data).any() else float("nan")
    sign = 1.0 if higher_is_better else -1.0
    return [float(v) for v in sign * 100 * (data - average) / abs(average)] if average else [float("nan")] * len(data)


def pareto_front(cost: Sequence[float], quality: Sequence[float], higher_is_better: bool) -> list[int]:
    """Indices of points that no other beats in both cost (less) and quality, cheapest first."""
    order = sorted(range(len(cost)), key=lambda i: (cost[i], -quality[i] if higher_is_better else quality[i]))
    front: list[int] = []
    best = -np.inf
    for i in order:
        value = quality[i] if higher_is_better else -quality[i]
        if np.isfinite(value) and value > best:
            front.append(i)
            best = value
    return front
