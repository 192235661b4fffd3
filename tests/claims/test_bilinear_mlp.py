import numpy as np
import pytest

from pomona.claims.bilinear_mlp import bilinear_mlp


def test_smoke():
    evidence = bilinear_mlp("smoke", (0, 1))
    assert len(evidence.method) == len(evidence.baseline) == 2
    assert np.isfinite(evidence.differences).all()
    arms = evidence.details["digits"]
    assert set(arms) == {"relu", "swiglu", "bilinear", "bilinear without noise"}
    assert arms["relu"]["parameters"] == pytest.approx(arms["bilinear"]["parameters"], rel=0.1)
    assert 0 <= arms["bilinear"]["cosine between seeds"] <= 1
    assert {"turned by mask", "turned by random mask"} <= set(arms["bilinear"])
