from pomona.claims.ftwt import ftwt


def test_smoke_run_gives_accuracies_at_equal_operations():
    evidence = ftwt("smoke", (0, 1))
    assert len(evidence.method) == len(evidence.baseline) == 2
    details = evidence.details
    assert all(0 <= details[name] <= 1 for name in ("whole", "dynamic", "static", "random", "flops"))
    assert details["flops"] <= details["static_flops"] or details["static_width"] == 1
    assert 0.2 < details["estimated_flops"] <= 0.5 and 0 < details["tau"] <= 1
