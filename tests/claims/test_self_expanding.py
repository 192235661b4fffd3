from pomona.claims.self_expanding import self_expanding


def test_smoke_run_gives_accuracies_of_grown_and_fixed_networks():
    evidence = self_expanding("smoke", (5, 6))
    assert len(evidence.method) == len(evidence.baseline) == 2
    assert {"grown", "random growth", "scratch", "fixed small", "largest fall"} <= set(evidence.details)
    assert 0 < evidence.details["share of operations"] <= 1
