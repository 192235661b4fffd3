import numpy as np

from pomona.claims.nas_eval import TRICKS, nas_eval


def test_smoke():
    evidence = nas_eval("smoke", (0, 1))
    assert len(evidence.method) == len(evidence.baseline) == 2 and np.isfinite(evidence.differences).all()
    assert set(evidence.details["mean accuracy"]) == set(TRICKS)
    assert set(evidence.details["variance components"]) == {"protocol", "architecture", "seed", "residual"}
    assert len(evidence.details["search"]) == 4 + 2 and -1 <= evidence.details["depth tau"] <= 1
