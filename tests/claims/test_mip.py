import math

from pomona.claims.mip import VARIANTS, mip


def test_smoke_run_gives_finite_paired_results():
    evidence = mip("smoke", (0, 1))
    assert len(evidence.method) == len(evidence.baseline) == 2
    assert all(math.isfinite(value) for value in (*evidence.method, *evidence.baseline))
    assert evidence.better == "lower"
    assert set(evidence.details["mean_steps"]) == set(VARIANTS)
    std = evidence.details["weight_std_at_g"]
    assert abs(std["default"]["0.01"] / std["default"]["1"] - 0.01) < 1e-4
    assert abs(std["mip"]["0.01"] / std["mip"]["1"] - 1) < 0.5
