import numpy as np

from pomona.claims.grad_noise import grad_noise


def test_smoke():
    evidence = grad_noise("smoke", (0, 1))
    assert len(evidence.method) == len(evidence.baseline) == 2
    assert np.isfinite(evidence.differences).all()
    assert set(evidence.details["kaiming"]) == set(evidence.details["adam"]) == {"noise", "none"}
    assert len(evidence.details["validation accuracy by eta"]) == len(
        evidence.details["validation accuracy by lr without noise"]
    )
