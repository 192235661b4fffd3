import numpy as np

from pomona.claims.linear_path import HARD, OPTIMIZERS, linear_path


def test_smoke():
    evidence = linear_path("smoke", (0, 1))
    assert len(evidence.method) == 2 and all(0 <= share <= 1 for share in evidence.method)
    arms = evidence.details["arms"]
    assert set(arms) == {f"{net}, {name}" for net in ("mlp relu", "gru") for name in OPTIMIZERS} | set(HARD)
    for row in arms.values():
        assert np.isfinite(list(row.values())).all() and row["barrier"] >= 0
    assert evidence.details["scalar product"]["largest difference from the closed form"] < 1e-10
    assert set(evidence.details["barrier between independent solutions"]) == {"mlp relu", "gru"}
