import math

from pomona.claims.sparseland import EXPECTED, METHODS, sparseland


def test_every_method_is_tested_at_the_deciding_density():
    evidence = sparseland("smoke", (0, 1))
    assert len(evidence.method) == len(evidence.baseline) == 2
    assert evidence.margin == -0.01
    assert set(evidence.details["accuracy"]) == set(METHODS)
    assert all(0 < rows["0.05"] < 1 for rows in evidence.details["accuracy"].values())
    assert set(evidence.details["expected"]) == set(EXPECTED)
    assert all(math.isfinite(row["difference"]) for row in evidence.details["expected"].values())
