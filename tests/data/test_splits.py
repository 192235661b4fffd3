import numpy as np
import pandas as pd
import pytest

from pomona.data.splits import by_group, by_time, strata, stratified
from pomona.errors import PomonaError


def together(rows):
    return np.sort(np.concatenate(list(rows.values())))


@pytest.mark.parametrize("n", [10, 11, 25, 150, 1797])
def test_every_row_is_in_one_split_and_shares_are_64_16_20(n):
    rows = stratified(np.arange(n) % 3, seed=1)
    assert list(rows) == ["train", "valid", "test"]
    assert np.array_equal(together(rows), np.arange(n))
    for part, share in (("train", 0.64), ("valid", 0.16), ("test", 0.2)):
        assert abs(len(rows[part]) - share * n) <= 2
        assert len(rows[part]) >= 1


def test_each_class_has_its_share_to_within_a_row():
    y = np.repeat(np.arange(7), 40)
    rows = stratified(y, seed=3)
    for part, share in (("train", 0.64), ("valid", 0.16), ("test", 0.2)):
        assert (np.abs(np.bincount(y[rows[part]], minlength=7) - share * 40) <= 2).all()


def test_a_seed_repeats_and_another_differs():
    y = np.zeros(100, int)
    first, again, other = (stratified(y, seed=seed)["test"] for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_each_row_is_tested_equally_often_over_seeds():
    y = np.arange(60) % 2
    counts = sum(np.bincount(stratified(y, seed)["test"], minlength=60) for seed in range(400))
    assert abs(counts.mean() - 80) < 2
    assert counts.min() > 45 and counts.max() < 120  # 80 +- 4.4 standard deviations


def test_classes_of_one_or_two_rows_are_always_learned():
    y = np.concatenate([np.zeros(50, int), [1], [2, 2], [3, 3, 3]])
    for seed in range(30):
        assert set(y[stratified(y, seed)["train"]]) == {0, 1, 2, 3}


def test_without_a_test_split_shares_are_80_20():
    rows = stratified(np.arange(200) % 2, seed=0, test=False)
    assert list(rows) == ["train", "valid"]
    assert len(rows["train"]) == 160


def test_a_number_is_stratified_by_its_quantiles():
    y = pd.Series(np.random.default_rng(0).exponential(size=1000))
    rows = stratified(strata(y), seed=0)
    deciles = pd.qcut(y, 10, labels=False).to_numpy()
    assert (np.abs(np.bincount(deciles[rows["test"]]) - 20) <= 1).all()


@pytest.mark.parametrize("test", [True, False])
def test_groups_do_not_straddle(test):
    groups = pd.Series(np.repeat([f"g{i}" for i in range(30)], 5), name="who")
    rows = by_group(groups, seed=0, test=test)
    assert np.array_equal(together(rows), np.arange(150))
    parts = [set(groups.iloc[index]) for index in rows.values()]
    assert sum(map(len, parts)) == 30


def test_two_groups_are_too_few():
    with pytest.raises(PomonaError, match=r"group='who' has 2 distinct values; at least 3 are needed"):
        by_group(pd.Series(["a", "b"] * 10, name="who"), seed=0)


def test_the_latest_rows_are_the_test_and_ties_stay_together():
    times = pd.Series(np.random.default_rng(0).permutation(np.repeat(np.arange(50), 4)), name="t")
    rows = by_time(times)
    assert np.array_equal(together(rows), np.arange(200))
    assert times.iloc[rows["train"]].max() < times.iloc[rows["valid"]].min()
    assert times.iloc[rows["valid"]].max() < times.iloc[rows["test"]].min()
    assert len(rows["test"]) == 40


def test_one_moment_cannot_divide_rows():
    with pytest.raises(PomonaError, match=r"time='t' has too few distinct moments \(1\)"):
        by_time(pd.Series(np.zeros(20), name="t"))
