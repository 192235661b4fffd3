import numpy as np

from pomona.claims.kan import kan


def test_smoke():
    evidence = kan("smoke", (0, 1))
    assert len(evidence.method) == len(evidence.baseline) == 2
    assert np.isfinite(evidence.differences).all()
    assert evidence.details["parameters"] == [24, 30]
    assert set(evidence.details["digits"]) == {"kan", "mlp"}
    sizes = [summary["parameters"] for summary in evidence.details["digits"].values()]
    assert max(sizes) < 1.02 * min(sizes)
