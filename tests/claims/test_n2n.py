from pomona.claims.n2n import n2n


def test_smoke_run_gives_rewards_sizes_and_accuracies():
    evidence = n2n("smoke", (0, 1))
    assert len(evidence.method) == len(evidence.baseline) == 2
    details = evidence.details
    for name in ("reinforce", "random", "even"):
        assert details[f"{name}_parameters"] <= details["teacher_parameters"]
        assert 0 <= details[f"{name}_accuracy"] <= 1
    assert details["reinforce_first_rewards"] <= details["reinforce_best_reward"] <= 1.5
