import numpy as np
import pytest

from pomona.claims.learngene_pool import ARMS, learngene_pool


@pytest.mark.slow
def test_smoke():
    evidence = learngene_pool("smoke", (0, 1))
    assert len(evidence.method) == len(evidence.baseline) == 2
    assert np.isfinite(evidence.differences).all()
    assert set(evidence.details["after"]) == set(ARMS)
    assert set(evidence.details["from scratch"]) == {"0", "1", "0:1>1:1"}
    assert evidence.details["storage"]["pool"] < evidence.details["storage"]["separate"]
    assert len(evidence.details["before"]["learned"]) == len(evidence.details["parameters"]) == 2 + 1
