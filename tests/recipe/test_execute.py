import pytest
import torch

from pomona.data import load
from pomona.errors import PomonaError
from pomona.recipe import Recipe, restore, train_recipe
from pomona.recipe.execute import measure_cost, metrics_of, task_json, versions
from pomona.train.budget import Budget
from pomona.zoo import Record, Zoo

IRIS = load("iris")
BUDGET = Budget("epochs", 3)


def keep(zoo, recipe, trained, task=IRIS):
    record = Record(
        candidate=str(recipe), recipe=recipe.model_dump(mode="json"), task=task_json(task), versions=versions()
    )
    return zoo.add(record, trained.fit.net.state_dict())


@pytest.mark.parametrize(
    "text", ["mlp width=16", "mixer width=16", "mlp norm=batch act=prelu", "mlp linear=kan", "mlp precision=float64"]
)
def test_a_restored_network_equals_the_trained_one_bit_for_bit(text):
    recipe = Recipe.parse(text)
    trained = train_recipe(recipe, IRIS, BUDGET, seed=1)
    with Zoo() as zoo:
        again = restore(zoo, keep(zoo, recipe, trained))
    x = IRIS.splits["test"].x.to(next(trained.fit.net.parameters()).dtype)
    assert torch.equal(again.network(x), trained.fit.net(x))
    assert again.recipe == recipe and not again.network.training


def test_generated_weights_come_back_as_ordinary_ones():
    digits = load("digits", limit=100)
    recipe = Recipe.parse("convnet width=16 depth=2 weights=hypernetwork")
    trained = train_recipe(recipe, digits, Budget("epochs", 1))
    with Zoo() as zoo:
        again = restore(zoo, keep(zoo, recipe, trained, digits))
    x = digits.splits["test"].x
    assert torch.equal(again.network(x), trained.fit.net(x))


def test_a_restored_network_predicts_raw_rows():
    frame = load("iris").extra  # row numbers of each split
    recipe = Recipe.parse("mlp width=32")
    trained = train_recipe(recipe, IRIS, Budget("epochs", 30))
    from sklearn.datasets import load_iris

    raw = load_iris(as_frame=True).frame.iloc[frame["rows"]["test"]]
    with Zoo() as zoo:
        predicted = restore(zoo, keep(zoo, recipe, trained)).predict(raw)
    names = list(load_iris().target_names)
    right = [names[t] == p for t, p in zip(raw["target"], predicted["prediction"], strict=True)]
    assert sum(right) / len(right) == pytest.approx(metrics_of(trained.fit.net, IRIS, "test")["test"]["accuracy"])


def test_the_same_seed_gives_the_same_network_and_another_another():
    recipe = Recipe.parse("mlp width=16 dropout=0.2")
    one, same, other = (train_recipe(recipe, IRIS, BUDGET, seed=seed).fit.net.state_dict() for seed in (4, 4, 5))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_costs_are_measured():
    recipe = Recipe.parse("mlp width=10 depth=1")
    trained = train_recipe(recipe, IRIS, BUDGET)
    features = IRIS.inputs.shape[0]
    assert trained.cost["parameters"] == 10 * features + 10 + 30 + 3
    assert trained.cost["flops"] == 2 * (10 * features + 30)
    assert trained.cost["examples"] == trained.fit.examples and trained.cost["seconds"] > 0
    cost = measure_cost(trained.fit.net, IRIS, 64)
    assert cost["memory"] >= 4 * trained.cost["parameters"] and cost["latency_1"] > 0 and cost["latency_256"] > 0
    assert not trained.fit.net.training


def test_a_recipes_own_device_counts_unless_another_is_asked_for():
    recipe = Recipe.parse("mlp width=8 device=meta_device")
    with pytest.raises(PomonaError, match=r"^device='meta_device' is not available here; use cpu or auto$"):
        train_recipe(recipe, IRIS, BUDGET, device="auto")
    train_recipe(recipe, IRIS, BUDGET, device="cpu")


def test_networks_that_cannot_be_restored():
    with Zoo() as zoo:
        failed = zoo.add(Record(status="diverged", error="the loss became infinite"))
        with pytest.raises(PomonaError, match=rf"^network {failed} has no weights: its training ended with diverged"):
            restore(zoo, failed)
        recipe = Recipe.parse("mlp width=8")
        trained = train_recipe(recipe, IRIS, BUDGET)
        wrong = keep(zoo, Recipe.parse("mlp width=9"), trained)
        with pytest.raises(
            PomonaError, match=rf"^the weights of network {wrong} do not fit the network that its recipe"
        ):
            restore(zoo, wrong)
