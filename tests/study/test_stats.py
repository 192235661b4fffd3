import math

import numpy as np
import pytest
from scipy import stats

from pomona.study.stats import bootstrap_interval, paired_difference, pareto_front, relative_improvement


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
def test_intervals_of_normal_seeds_cover_their_mean_about_95_times_in_100(n):
    rng = np.random.default_rng(n)
    trials = 400
    inside = 0
    for _ in range(trials):
        low, high = bootstrap_interval(rng.normal(3.0, 2.0, n))
        inside += low <= 3.0 <= high
    assert 0.915 <= inside / trials <= 0.98  # three binomial standard errors, and the bootstrap's own shortfall


def test_a_small_samples_interval_is_students():
    values = [0.8, 0.9, 0.85]
    half = stats.t.ppf(0.975, 2) * np.std(values, ddof=1) / math.sqrt(3)
    assert bootstrap_interval(values) == pytest.approx((0.85 - half, 0.85 + half))


def test_intervals_without_spread_or_values():
    assert bootstrap_interval([2.0]) == (2.0, 2.0)
    assert bootstrap_interval([2.0] * 6) == (2.0, 2.0)
    assert all(map(math.isnan, bootstrap_interval([])))
    assert all(map(math.isnan, bootstrap_interval([1.0, math.nan, 2.0])))


def test_an_interval_is_the_same_each_time():
    values = np.random.default_rng(0).normal(size=9)
    assert bootstrap_interval(values) == bootstrap_interval(values)


def test_a_paired_difference_by_hand():
    gap = paired_difference([0.9, 0.8, 0.7], [0.8, 0.75, 0.6], higher_is_better=True)
    d = np.array([0.1, 0.05, 0.1])
    t = d.mean() / (d.std(ddof=1) / math.sqrt(3))
    assert gap.mean == pytest.approx(d.mean())
    assert gap.probability == pytest.approx(stats.t.cdf(t, 2))
    assert gap.sure == (t > stats.t.ppf(0.975, 2))
    lower = paired_difference([0.9, 0.8, 0.7], [0.8, 0.75, 0.6], higher_is_better=False)
    assert lower.mean == pytest.approx(-gap.mean) and lower.probability == pytest.approx(1 - gap.probability)


def test_pairing_removes_what_the_seeds_share():
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 10, 8)
    gap = paired_difference(shared + 0.5 + rng.normal(0, 0.1, 8), shared, True)
    assert gap.sure and 0.3 < gap.interval[0] <= gap.mean <= gap.interval[1] < 0.7


def test_sure_is_wrong_about_one_time_in_twenty_where_nothing_differs():
    rng = np.random.default_rng(1)
    wrong = [paired_difference(rng.normal(size=5), rng.normal(size=5), True).sure for _ in range(1000)]
    assert 0.03 < np.mean(wrong) < 0.07


def test_equal_gaps_are_as_sure_as_their_signs():
    few = paired_difference([0.9, 0.8], [0.8, 0.7], True)
    assert not few.sure and few.probability == 0.75
    many = paired_difference(np.arange(6) + 0.5, np.arange(6), True)
    assert many.sure and many.probability == 1 - 0.5**6
    none = paired_difference([0.5] * 6, [0.5] * 6, True)
    assert not none.sure and none.probability == 0.5 and none.mean == 0


def test_one_seed_or_none_is_never_sure():
    one = paired_difference([0.9], [0.1], True)
    assert one.mean == pytest.approx(0.8) and not one.sure and math.isnan(one.probability)
    none = paired_difference([], [0.5], True)
    assert math.isnan(none.mean) and not none.sure
    assert math.isnan(paired_difference([math.nan, 1.0], [0.0, 0.0], True).mean)


def test_relative_improvement_is_per_cent_over_the_average():
    assert relative_improvement([0.9, 0.6], True) == pytest.approx([20, -20])
    assert relative_improvement([3.0, 1.0], False) == pytest.approx([-50, 50])
    assert relative_improvement([-1.0, -3.0], True) == pytest.approx([50, -50])
    assert all(map(math.isnan, relative_improvement([0.0, 0.0], True)))
    assert relative_improvement([1.0, math.nan], True)[0] == 0
    assert relative_improvement([], True) == []


def test_the_pareto_front_is_what_nothing_beats_in_both():
    cost, quality = [1, 2, 2, 3, 4], [0.5, 0.7, 0.6, 0.65, 0.9]
    assert pareto_front(cost, quality, True) == [0, 1, 4]
    assert pareto_front(cost, [-q for q in quality], False) == [0, 1, 4]
    assert pareto_front([1, 1], [0.5, 0.5], True) == [0]
    assert pareto_front([1, 2], [math.nan, 0.1], True) == [1]
    rng = np.random.default_rng(0)
    cost, quality = rng.random(40), rng.random(40)
    front = set(pareto_front(cost, quality, True))
    for i in range(40):
        beaten = any((cost[j] <= cost[i]) and (quality[j] >= quality[i]) for j in range(40) if j != i)
        assert (i in front) != beaten
