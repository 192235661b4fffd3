import numpy as np
import pytest

from pomona.claims.generalized_pooling import KINDS, generalized_pooling
from pomona.errors import PomonaError


def test_smoke():
    try:
        evidence = generalized_pooling("smoke", (0, 1))
    except PomonaError as error:
        pytest.skip(str(error))  # Fashion-MNIST is not on this machine
    assert len(evidence.method) == len(evidence.baseline) == 2
    assert np.isfinite(evidence.differences).all()
    assert set(evidence.details) == set(KINDS)
    assert evidence.details["max"]["accuracy over max"] == (0.0, 0.0)
    assert evidence.details["tree, gated"]["parameters"] == evidence.details["max"]["parameters"] + 27 + 9
