import math

from pomona.claims.lottery_ticket import lottery_ticket


def test_smoke_run_gives_finite_paired_results():
    evidence = lottery_ticket("smoke", (0, 1))
    assert len(evidence.method) == len(evidence.baseline) == 2
    assert all(0 <= value <= 1 for value in (*evidence.method, *evidence.baseline))
    assert set(evidence.details) == {"density", "ticket", "new weights", "shuffled mask"}
    assert list(evidence.details["ticket"]) == ["round 0", "round 1", "round 2"]
    assert math.isclose(evidence.details["density"]["round 2"], 0.64, abs_tol=2e-3)
