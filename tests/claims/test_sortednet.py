from pomona.claims.sortednet import sortednet


def test_smoke_run_gives_accuracies_of_all_widths():
    evidence = sortednet("smoke", (0, 1))
    assert len(evidence.method) == len(evidence.baseline) == 2
    assert set(evidence.details) == {"sorted", "random", "sliced", "separate"}
    assert all(set(row) == {"width 0.5", "width 1"} for row in evidence.details.values())
    assert all(0 <= value <= 1 for row in evidence.details.values() for value in row.values())
