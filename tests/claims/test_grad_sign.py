import numpy as np

from pomona.claims.grad_sign import RIVALS, grad_sign
from pomona.search.proxies import PROXIES


def test_smoke():
    evidence = grad_sign("smoke", (0, 1))
    assert len(evidence.method) == len(evidence.baseline) == 2 and np.isfinite(evidence.differences).all()
    assert evidence.baseline_name.split(",")[0] in RIVALS
    (table,) = evidence.details.values()
    assert set(table["spearman"]) == set(table["kendall"]) == set(PROXIES)
    assert all(value >= 0 for value in table["regret in points"].values())
    assert table["largest change on retraining"] < 15
