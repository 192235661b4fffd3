from pomona.claims.grokking_ticket import SIZES, grokking_ticket, search


def test_smoke():
    evidence = grokking_ticket("smoke", [0, 1])
    assert len(evidence.method) == len(evidence.baseline) == 2
    accuracy = evidence.details["test accuracy"]
    for seed, best in enumerate(evidence.baseline):
        assert best == max(accuracy["random mask"][seed], accuracy["memorization ticket"][seed])
    assert len(accuracy) == 14
    assert len(evidence.details["gain over dense, validation, by cell"]) == 4


def test_the_cell_is_the_one_that_gains_most_over_dense():
    cell, dense, searched = search(SIZES["smoke"], 5)
    gains = searched["gain over dense, validation, by cell"]
    assert gains[" ".join(f"{key}={value}" for key, value in cell.items())] == max(gains.values())
    assert set(dense) == {"dim", "hidden", "lr", "weight_decay"}
