import numpy as np

from pomona.claims.forward_forward import forward_forward


def test_smoke():
    evidence = forward_forward("smoke", (0, 1))
    assert len(evidence.method) == len(evidence.baseline) == 2
    assert np.isfinite(evidence.differences).all()
    names = {"plain", "all", "previous", "all, one layer's theta", "backpropagation", "random layers, linear readout"}
    assert set(evidence.details) == names
    assert len(evidence.details["all"]["accuracy of each layer alone"]) == 3
    assert all(0 <= value <= 1 + 1e-6 for value in evidence.details["all"]["cka of neighbouring layers"])
