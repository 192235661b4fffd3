import numpy as np
import torch

from pomona.claims.gelu import NAMES, autoencoding, gelu


def test_autoencoder_target_is_its_input():
    x, y = autoencoding().splits["test"]
    assert torch.equal(x, y) and x.shape[1:] == (64,)


def test_smoke():
    evidence = gelu("smoke", (0, 1))
    assert len(evidence.method) == len(evidence.baseline) == 2
    assert np.isfinite(evidence.differences).all()
    assert set(evidence.details) == {"plain", "dropout", "autoencoder", "accuracy over relu"}
    for table in ("plain", "dropout", "autoencoder"):
        assert set(evidence.details[table]) == set(NAMES)
        assert len({summary["parameters"] for summary in evidence.details[table].values()}) == 1
