from pomona.claims.git_rebasin import git_rebasin


def test_smoke_run_gives_barriers_and_accuracies():
    evidence = git_rebasin("smoke", (0, 1))
    assert len(evidence.method) == len(evidence.baseline) == 2
    assert set(evidence.details) == {"width 8", "width 16", "width 32"}
    middle = evidence.details["width 16"]
    assert {"ste_barrier", "activations_barrier", "sinkhorn_barrier", "half_repaired"} <= set(middle)
    assert all(0 <= value <= 1 for name, value in middle.items() if "accuracy" in name or "half" in name)
