import numpy as np

from pomona.claims.nc_deep_linear import falling_counts, nc_deep_linear


def test_counts_fall_by_the_ratio():
    assert falling_counts(1) == (40, 40, 40, 40) and falling_counts(20)[0] / falling_counts(20)[-1] == 20


def test_smoke():
    evidence = nc_deep_linear("smoke", (0, 1))
    measured = np.asarray(evidence.measured)
    assert measured.shape == (2, len(evidence.predicted)) == (2, 16) and np.isfinite(measured).all()
    assert not np.array_equal(measured[0], measured[1]) and evidence.details["largest excess of the objective"] > -1e-9
    assert set(evidence.details["networks"]) == {"balanced M=1", "imbalanced M=1", "balanced M=1 with bias"}
    for row in evidence.details["networks"].values():
        assert np.isfinite(list(row.values())).all()
