import pytest
import torch
from torch import nn

from pomona.claims import lab
from pomona.claims.lab import TUNING_SEED, Arm, compare_arms, grid, seeded
from pomona.data import load
from pomona.train.budget import Budget
from pomona.train.settings import Training

IRIS = load("iris")
BUDGET = Budget("epochs", 3)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(IRIS.inputs.shape[0], 8), nn.ReLU(), nn.Linear(8, 3))


def test_a_grid_is_every_combination():
    assert grid(lr=[1, 2], clip=[None]) == [{"lr": 1, "clip": None}, {"lr": 2, "clip": None}]
    assert grid() == [{}]


def test_seeded_networks_repeat_and_the_global_generator_stays():
    before = torch.random.get_rng_state()
    one, same, other = seeded(net, 1), seeded(net, 1), seeded(net, 2)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one[0].weight, same[0].weight) and not torch.equal(one[0].weight, other[0].weight)


def test_every_arm_gets_the_same_budget_seeds_and_number_of_trials(monkeypatch):
    runs, fit = [], lab.fit

    def watched(network, task, settings, *, budget, seed, **more):
        runs.append((budget, seed, settings.lr, settings.patience))
        return fit(network, task, settings, budget=budget, seed=seed, **more)

    monkeypatch.setattr(lab, "fit", watched)
    compare_arms(
        {"a": Arm(net), "b": Arm(net, Training(patience=3))},
        IRIS,
        [3, 4],
        budget=BUDGET,
        settings=grid(lr=[1e-3, 1e-2]),
    )
    half = len(runs) // 2
    seeds = [(budget, seed, patience) for budget, seed, _, patience in runs]
    assert (
        seeds[:half] == seeds[half:] == [(BUDGET, 3 + TUNING_SEED, None)] * 2 + [(BUDGET, 3, None), (BUDGET, 4, None)]
    )


def test_settings_are_chosen_on_validation_and_test_is_read_once_a_seed(monkeypatch):
    read, evaluate = [], lab.evaluate

    def counted(network, task, split):
        read.append(split)
        return evaluate(network, task, split)

    monkeypatch.setattr(lab, "evaluate", counted)
    flipped = load("iris")
    flipped.splits["test"].y.copy_(2 - flipped.splits["test"].y)  # what is best on validation is worst on test
    outcome = compare_arms(
        {"a": Arm(net)}, flipped, [0, 1], budget=Budget("epochs", 40), settings=grid(lr=[1e-6, 1e-2])
    )["a"]
    assert read == ["test", "test"]
    assert outcome.chosen == {"lr": 1e-2} and len(outcome.tuning) == 2 and outcome.tuning[1] > outcome.tuning[0]


def test_one_setting_needs_no_tuning_and_results_repeat():
    arms = {
        "a": Arm(net, Training(lr=1e-2)),
        "b": Arm(net, options={"callbacks": lambda seed: [lambda network, step: None]}),
    }
    first, again = (compare_arms(arms, IRIS, [0, 1], budget=BUDGET) for _ in range(2))
    for name in arms:
        assert first[name].tuning == [] and first[name].results == again[name].results
        assert first[name].values("accuracy") == [r["accuracy"] for r in first[name].results]
        assert (
            first[name].summary()["parameters"] == first[name].parameters == sum(p.numel() for p in net().parameters())
        )


def test_a_diverged_trial_is_never_chosen():
    choices = grid(optimizer=["sgd"], clip=[None], lr=[1e30, 1e-2])
    assert compare_arms({"a": Arm(net)}, IRIS, [0], budget=BUDGET, settings=choices)["a"].chosen["lr"] == 1e-2


def test_a_task_of_each_seed_and_a_score_of_ones_own():
    asked = []

    def task(seed):
        asked.append(seed)
        return IRIS

    outcome = compare_arms(
        {"a": Arm(net)},
        task,
        [7, 8],
        budget=BUDGET,
        score=lambda fit, here: {"steps": float(fit.steps)},
        keep_fits=True,
    )["a"]
    assert asked == [7, 8] and outcome.values("steps") == [float(fit.steps) for fit in outcome.fits]
    assert isinstance(outcome.fits[0].net, nn.Sequential) and outcome.seconds > 0


@pytest.mark.parametrize("metric, lower", [("rmse", True), ("loss", True), ("r2", False)])
def test_larger_is_better_whatever_the_metric(metric, lower):
    task = load("diabetes", metric="rmse" if metric == "loss" else metric)
    done = lab.fit(nn.Linear(task.inputs.shape[0], 1), task, budget=BUDGET)
    value = done.valid["valid_loss" if metric == "loss" else metric]
    assert lab._signed(done, task, metric) == (-value if lower else value)
