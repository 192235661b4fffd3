import numpy as np

from pomona.claims.stitch import stitch


def test_smoke():
    evidence = stitch("smoke", (0, 1))
    assert len(evidence.method) == len(evidence.baseline) == 2
    assert np.isfinite(evidence.differences).all()
    assert (
        set(evidence.details["lstsq"]) == set(evidence.details["flops"]) == set(evidence.details["kaiming, untrained"])
    )
    assert len(evidence.details["lstsq"]) == 2 + 4
    assert all(0 <= row[0]["stitch"] <= 1 for row in evidence.details["trained alone, and best stitch"])
