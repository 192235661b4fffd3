import numpy as np
import pytest

from pomona.claims.lemur import lemur


@pytest.mark.slow
def test_smoke():
    evidence = lemur("smoke", (0, 1))
    assert len(evidence.method) == len(evidence.baseline) == 2
    assert np.isfinite(evidence.differences).all()
    assert all(0 <= share <= 1 for share in evidence.method)
    for seed in evidence.details["seeds"]:
        assert seed["rows"] == 2 * 2 * (2 + 2) * 2
        assert seed["failed trials"] == 0
        assert -1 <= seed["spearman"] <= 1
        assert -1 <= seed["kendall"] <= 1
    assert set(evidence.details["checks"]) == {
        "data() within 0.2 s",
        "first epoch predicts last",
        "held-out networks predicted",
    }
