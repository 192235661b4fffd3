import numpy as np

from pomona.claims.modern_hopfield import digit_bags, modern_hopfield


def test_bags_are_of_the_split_and_hold_one_nine_when_positive():
    task = digit_bags(20, 3)
    for split in task.splits.values():
        real = split.x[..., 64] > 0
        assert real.sum(1).min() >= 10 and real.sum(1).max() <= 50
        assert not split.x[~real].any() and split.y.float().mean() == 0.5


def test_smoke():
    evidence = modern_hopfield("smoke", (0, 1))
    assert len(evidence.method) == len(evidence.baseline) == 2
    assert np.isfinite(evidence.differences).all()
    pooling = evidence.details["pooling"]
    assert set(pooling) == {"hopfield", "gated", "max", "mean"}
    parameters = [summary["parameters"] for summary in pooling.values()]
    assert max(parameters) < 1.05 * min(parameters)
    assert all(
        0 <= share <= 1 for at in evidence.details["retrieved after one update"].values() for share in at.values()
    )
