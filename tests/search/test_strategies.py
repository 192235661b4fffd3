import pytest

from pomona.errors import PomonaError
from pomona.search.strategies import RandomSearch, Ranked, RegularizedEvolution, run_search

SPACE = {"a": (0, 1, 2, 3), "b": (0, 1, 2, 3), "c": (5,)}


def total(arch):
    return arch["a"] + arch["b"]


def test_random_search_is_uniform_and_seeded():
    archs = run_search(RandomSearch(SPACE, seed=1), total, 1600).archs
    counts = [sum(arch["a"] == value for arch in archs) for value in range(4)]
    assert min(counts) > 330 and archs == run_search(RandomSearch(SPACE, seed=1), total, 1600).archs


def test_mutation_changes_exactly_one_free_variable():
    evolution = RegularizedEvolution(SPACE, seed=0)
    for _ in range(50):
        child = evolution.mutate({"a": 1, "b": 2, "c": 5})
        assert (child["a"] != 1) + (child["b"] != 2) == 1 and child["c"] == 5


def test_the_oldest_leaves_the_population():
    evolution = RegularizedEvolution(SPACE, population=2, sample=1)
    for score in (9.0, 1.0, 2.0):
        evolution.tell({"a": 0, "b": 0, "c": 5}, score)
    assert [score for _, score in evolution.population] == [1.0, 2.0]


def test_evolution_beats_random_on_a_separable_score():
    wide = {name: tuple(range(12)) for name in "abcd"}
    value = lambda arch: sum(arch.values())  # noqa: E731
    best = lambda kind: sum(max(run_search(kind(wide, seed=s), value, 60).scores) for s in range(30)) / 30  # noqa: E731
    assert best(RegularizedEvolution) > best(RandomSearch) + 1


def test_ranked_asks_best_first_and_ends():
    ranked = Ranked([{"a": 1, "b": 0}, {"a": 3, "b": 0}], total)
    assert [ranked.ask()["a"], ranked.ask()["a"]] == [3, 1]
    with pytest.raises(PomonaError, match="archs are used up"):
        ranked.ask()


def test_best_of_a_search_is_the_first_of_equals():
    found = run_search(Ranked([{"a": 1, "b": 0}, {"a": 0, "b": 1}], total), total, 2)
    assert found.best == {"a": 1, "b": 0}


def test_bad_input_message():
    with pytest.raises(PomonaError, match="sample=5 must be at most population=4"):
        RegularizedEvolution(SPACE, population=4, sample=5)
