import numpy as np

from pomona.claims.generalized_pooling import KINDS, generalized_pooling


def test_smoke():
    evidence = generalized_pooling("smoke", (0, 1))
    assert len(evidence.method) == len(evidence.baseline) == 2
    assert np.isfinite(evidence.differences).all()
    assert set(evidence.details) == set(KINDS)
    assert evidence.details["max"]["accuracy over max"] == (0.0, 0.0)
    assert evidence.details["tree, gated"]["parameters"] == evidence.details["max"]["parameters"] + 27 + 9
