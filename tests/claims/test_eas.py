from pomona.claims.eas import eas


def test_smoke_run_gives_accuracies_of_grown_and_fresh_networks():
    evidence = eas("smoke", (5, 6))
    assert len(evidence.method) == len(evidence.baseline) == 2
    assert {"rl", "random", "scratch", "largest drift", "rl minus random"} <= set(evidence.details)
    assert evidence.details["largest drift"] < 1e-4
    assert 1 <= evidence.details["epochs of the best"] <= 3
