import numpy as np

from pomona.claims.prelu_he_init import CONV_LAYERS, prelu_he_init


def test_smoke():
    evidence = prelu_he_init("smoke", (0, 1))
    assert len(evidence.method) == len(evidence.baseline) == 2
    assert np.isfinite(evidence.differences).all()
    assert set(evidence.details) == {"digits", "fashion_mnist", "convolutions"}
    prelu, relu = (evidence.details["convolutions"][act] for act in ("prelu", "relu"))
    assert all(np.isfinite(prelu[f"slope {k}"]) for k in range(1, CONV_LAYERS + 1))
    assert "slope 1" not in relu
