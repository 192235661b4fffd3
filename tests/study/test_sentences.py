import pytest

from pomona.study.result import Row
from pomona.study.sentences import amount, conclude, gap, listed


def row(name, values, kind="network", seconds=1.0, parameters=100.0, status="ok"):
    mean = sum(values) / len(values) if values else float("nan")
    cost = {"seconds": seconds, "parameters": parameters}
    return Row(name, kind, status, list(values), mean, cost=cost if kind == "network" else {"seconds": seconds})


GOOD, FAIR, BAD = [0.90, 0.91, 0.92, 0.905], [0.895, 0.915, 0.915, 0.91], [0.70, 0.72, 0.71, 0.70]


def test_amounts_as_people_say_them():
    assert amount(0.912, "accuracy") == "91.2%" and gap(-0.034, "accuracy") == "3.4 points"
    assert amount(1234.5678, "rmse") == "1235" and gap(-0.01234, "rmse") == "0.0123"
    assert listed(["a"]) == "a" and listed(["a", "b", "c"]) == "a, b and c"
    assert listed(list("abcdefgh")) == "a, b, c, d, e and 3 more"


def test_a_clear_winner():
    said = conclude([row("kan", GOOD), row("mlp", BAD)], "accuracy", True, "mlp")
    assert said == [
        "The best network is kan with accuracy 90.9%, better than mlp by 20.1 points (95% sure over 4 seeds)."
    ]


def test_what_cannot_be_told_apart_is_not_called_better_and_the_cheap_one_is_named():
    rows = [
        row("kan", GOOD, seconds=9.0, parameters=50),
        row("mlp", FAIR, seconds=2.0, parameters=70),
        row("poor", BAD),
    ]
    said = conclude(rows, "accuracy", True, "mlp")
    assert said[0].startswith("The best network is kan with accuracy 90.9%, better than poor by")
    assert said[1] == "kan and mlp cannot be told apart here (means within 0.0 points)."
    assert said[2] == "Among these, mlp trains fastest (2.0 s) and kan is smallest (50 parameters)."


def test_one_seed_says_nothing_is_sure():
    said = conclude([row("kan", [0.9]), row("mlp", [0.1])], "accuracy", True, "mlp")
    assert said[0] == "The best network is kan with accuracy 90.0%, but over 1 seed no other network is surely worse."


@pytest.mark.parametrize(
    "classical, sentence",
    [
        ([0.99, 0.99, 0.98, 0.99], "A classical model beats every network: trees, 98.8%, by 7.9 points."),
        (
            [0.80, 0.80, 0.81, 0.80],
            "The best classical model (trees, 80.2%) is behind the best network by 10.6 points.",
        ),
        (FAIR, "The best classical model (trees, 90.9%) and the best network cannot be told apart."),
    ],
)
def test_classical_models_have_their_sentence(classical, sentence):
    said = conclude([row("kan", GOOD), row("trees", classical, "reference")], "accuracy", True, "kan")
    assert said[-1] == sentence


def test_lower_may_be_better():
    said = conclude([row("kan", [1.0, 1.1, 1.0, 1.1]), row("mlp", [2.0, 2.2, 2.1, 2.1])], "rmse", False, "mlp")
    assert said[0].startswith("The best network is kan with rmse 1.05, better than mlp by 1.05")


def test_failures_are_left_out_and_nothing_finished_is_said():
    lost = row("lost", [], status="diverged")
    assert conclude([row("kan", GOOD), lost], "accuracy", True, "kan") == [
        "The best network is kan with accuracy 90.9%."
    ]
    assert conclude([lost], "accuracy", True, "lost") == ["No network finished, so nothing can be compared."]
