import math

import pytest

from pomona.claims.rnn_sparsity import SPARSITIES, rnn_sparsity

pytest.importorskip("networkx")


def test_smoke():
    evidence = rnn_sparsity("smoke", [0, 1])
    assert len(evidence.method) == len(evidence.baseline) == 2
    assert evidence.margin == -0.02
    kinds = [evidence.details[kind] for kind in ("tanh", "relu", "gru", "lstm")]
    for seed in (0, 1):
        retrained = [kind["both 80% retrained"][seed] for kind in kinds]
        assert evidence.method[seed] == pytest.approx(sum(retrained) / 4)
    assert all(len(kind) == 2 + 3 * len(SPARSITIES) + 2 * 3 for kind in kinds)
    assert all(math.isfinite(value) for value in evidence.details["graphs"]["r2"].values())
