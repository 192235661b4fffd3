import numpy as np

from pomona.claims.cyclic_lr import cyclic_lr


def test_smoke():
    evidence = cyclic_lr("smoke", (0, 1))
    assert len(evidence.method) == len(evidence.baseline) == 2
    assert np.isfinite(evidence.differences).all()
    assert 0 < evidence.details["bounds"]["base_lr"] < evidence.details["bounds"]["max_lr"] <= 3
    assert len(evidence.details["third"]) == len(evidence.details["all"]) == 6
