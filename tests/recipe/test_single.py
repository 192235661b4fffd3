import pytest

from pomona.data import load
from pomona.errors import PomonaError
from pomona.recipe import restore
from pomona.recipe.single import run_recipe
from pomona.zoo import Zoo

IRIS = load("iris")


def test_a_run_keeps_its_network_with_test_metrics_and_costs():
    record = run_recipe("mlp width=16", IRIS, epochs=5, seed=3)
    assert record.seed == 3 and record.status == "ok" and set(record.metrics) == {"valid", "test"}
    assert {"parameters", "flops", "seconds", "memory", "latency_1", "latency_256"} <= set(record.cost)
    with Zoo() as zoo:
        assert restore(zoo, record.id).record.metrics == record.metrics


def test_a_yaml_file_may_name_data_budget_and_seed_and_arguments_win(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("candidate: mlp width=8\ndata: iris\nepochs: 2\nseed: 7\nload: {limit: 90}\n")
    assert run_recipe(path).seed == 7
    record = run_recipe(path, seed=1, epochs=1)
    assert record.seed == 1 and record.curve[-1]["examples"] <= 90


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "no data: name it with --data, or as 'data:' in the recipe"),
        ({"data": "iris", "seed": "seven"}, "seed='seven' must be a whole number"),
        ({"data": "iris", "epochs": "many"}, "epochs='many' must be a number above 0"),
        ({"data": "iris", "load": {"limt": 3}}, "key of load 'limt' is not known; did you mean limit"),
        ({"data": "iris", "load": 3}, "load=3 must be a mapping of "),
        ({"data": "irys"}, "source='irys' is not known; did you mean iris?"),
    ],
)
def test_a_run_that_cannot_be_is_one_sentence(changes, message):
    with pytest.raises(PomonaError) as error:
        run_recipe({"candidate": "mlp", **changes})
    assert str(error.value).startswith(message)


def test_two_budgets_are_one_too_many():
    with pytest.raises(PomonaError, match=r"^give one budget, epochs or seconds, not both$"):
        run_recipe("mlp", IRIS, epochs=1, seconds=1)


def test_a_training_that_diverges_says_what_to_do():
    with pytest.raises(PomonaError, match=r"^the training diverged after \d+ steps; try a smaller learning rate"):
        run_recipe("mlp act=square depth=6 lr=1e9 optimizer=sgd clip=none", IRIS, epochs=5)
