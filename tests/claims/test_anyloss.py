import numpy as np

from pomona.claims.anyloss import anyloss


def test_smoke():
    evidence = anyloss("smoke", (0, 1))
    assert len(evidence.method) == len(evidence.baseline) == 2
    assert np.isfinite(evidence.differences).all()
    assert {"weighted cross-entropy", "cross-entropy, fitted threshold"} < set(evidence.details["mean over tables"])
    assert all(0 <= value <= 1 for row in evidence.details["f1 by table"].values() for value in row.values())
