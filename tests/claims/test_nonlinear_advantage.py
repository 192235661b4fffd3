from pomona.claims.nonlinear_advantage import nonlinear_advantage


def test_smoke_run_gives_accuracies_at_the_wanted_share():
    evidence = nonlinear_advantage("smoke", (0, 1))
    assert len(evidence.method) == len(evidence.baseline) == 2
    assert set(evidence.details) == {"plain", "wholly linear", "early 0.2", "late 0.2"}
    assert evidence.details["wholly linear"]["path_length"] == 0
    assert all(evidence.details[kind]["share"] <= 0.21 for kind in ("early 0.2", "late 0.2"))
