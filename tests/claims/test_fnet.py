import numpy as np
import torch

from pomona.claims.fnet import MASKED, OTHERS, fnet, masked_windows


def test_masked_windows_hide_their_share_and_keep_the_rest():
    ids = torch.arange(1000) % 7
    starts = torch.arange(100)
    x, target, hidden = masked_windows(ids, starts, 50, 9, torch.Generator().manual_seed(0))
    assert torch.equal(x[~hidden], target[~hidden]) and (x[hidden] == 9).all()
    assert abs(hidden.float().mean() - MASKED) < 0.02 and torch.equal(target[3], ids[3:53])


def test_smoke():
    evidence = fnet("smoke", (0, 1))
    assert len(evidence.method) == len(evidence.baseline) == 2
    assert np.isfinite(evidence.differences).all()
    assert set(evidence.details["encoders"]) == {"attention", "fnet", *OTHERS}
    assert all(rate > 0 for rates in evidence.details["steps a second"].values() for rate in rates.values())
