import math

import numpy as np
import pytest
from scipy import stats

from pomona.claims.verdict import Bound, Comparison, Prediction, t_interval

NAMES = {"metric": "accuracy", "method_name": "a", "baseline_name": "b", "paper": "two points"}


def comparison(method, baseline, **more):
    return Comparison(method, baseline, **NAMES, **more)


def test_the_interval_is_students():
    d = np.array([0.1, 0.3, 0.2])
    half = stats.t.ppf(0.975, 2) * d.std(ddof=1) / math.sqrt(3)
    assert t_interval(d) == pytest.approx((0.2 - half, 0.2 + half))
    assert t_interval(np.array([0.1])) is None and t_interval(np.array([0.1, math.nan])) is None


@pytest.mark.parametrize(
    "method, baseline, more, decision",
    [
        ([0.9, 0.91, 0.92], [0.8, 0.81, 0.82], {}, "holds"),
        ([0.8, 0.81, 0.82], [0.9, 0.91, 0.92], {}, "fails"),
        ([0.9, 0.7, 0.8], [0.8, 0.8, 0.79], {}, "undecided"),
        ([1.0, 1.1], [2.0, 2.1], {"better": "lower"}, "holds"),
        ([0.90, 0.91, 0.92], [0.89, 0.90, 0.91], {"margin": 0.05}, "fails"),
        ([0.90, 0.91, 0.90], [0.91, 0.91, 0.91], {"margin": -0.05}, "holds"),  # no worse than by five points
        ([0.9], [0.1], {}, "undecided"),
        ([0.9, math.nan], [0.1, 0.1], {}, "undecided"),
    ],
)
def test_a_comparison_holds_only_with_its_whole_interval_beyond_the_margin(method, baseline, more, decision):
    assert comparison(method, baseline, **more).decision == decision


def test_where_nothing_differs_a_comparison_decides_wrongly_one_time_in_twenty():
    rng = np.random.default_rng(0)
    decided = [comparison(rng.normal(size=5), rng.normal(size=5)).decision for _ in range(1000)]
    assert 0.01 < decided.count("holds") / 1000 < 0.04 and 0.01 < decided.count("fails") / 1000 < 0.04


def prediction(predicted, measured, **more):
    return Prediction(predicted, measured, **NAMES, **more)


def test_a_prediction_holds_within_the_noise_and_fails_beyond():
    rng = np.random.default_rng(0)
    curve = np.linspace(1, 2, 10)
    right = [prediction(curve, curve + rng.normal(0, 0.1, (8, 10))).decision for _ in range(300)]
    assert 0.92 < right.count("holds") / 300 <= 0.99  # 95% for all points together
    assert prediction(curve + 0.5, curve + rng.normal(0, 0.1, (8, 10))).decision == "fails"


def test_a_prediction_with_a_tolerance():
    assert prediction([1.0], [[1.04]], tolerance=0.05).decision == "holds"
    assert prediction([1.0], [[1.06]], tolerance=0.05).decision == "fails"
    assert prediction([1.0], [[1.0]]).decision == "undecided"  # one seed has no standard error
    assert prediction([1.0, 2.0], [[1.0, 2.0], [1.0, 2.0]]).decision == "holds"
    assert prediction([1.0], [[math.nan], [1.0]]).decision == "undecided"


def bound(values, bounds, **more):
    return Bound(values, bounds, **NAMES, **more)


def test_a_bound_holds_without_any_violation():
    assert bound([1.0, 2.0], [1.0, 3.0]).decision == "holds" and bound([1.0, 2.0], [1.5, 3.0]).effect == 0.5
    assert bound([1.0, 3.1], [1.0, 3.0]).decision == "fails"
    assert bound([1.0], [0.5], side="lower").decision == "holds"
    assert bound([math.inf], [1.0]).decision == "fails"
    assert bound([math.nan], [1.0]).decision == "undecided"
