import pytest
import torch
from torch import nn

from pomona.data import load
from pomona.errors import PomonaError
from pomona.nn.norm_act_graph import LEAVES, Node
from pomona.search.norm_act_search import NETS, NormActSearch, pareto_front, worst_gradient_norm
from pomona.train.settings import Training

TASK = load("digits", limit=400)
S0 = (Node("mul", 4, 0), Node("sigmoid", 5, 0), Node("mul", 0, 6), Node("std_ghw", 0, 0), Node("div", 7, 8))
FLAT = (Node("sigmoid", 1, 0),)
EXPLODES = (Node("exp", 0, 0), Node("exp", 5, 0), Node("exp", 6, 0))


def small(**options) -> NormActSearch:
    settings = {"quality_steps": 30, "steps": 30, "stability_steps": 2, "training": Training(batch_size=32, lr=1e-2)}
    return NormActSearch(TASK, **{"threshold": 0.15, "population": 3, "tournament": 2, **settings, **options})


def test_protocols_keep_evonorm_and_reject_constant_and_exploding_graphs():
    search = small()
    kept = search.judge(S0)
    assert kept.verdict == "kept" and len(kept.scores) == 3 and min(kept.scores) > 0.15
    assert search.judge(FLAT).verdict == "quality"
    assert small(threshold=0.0).judge(EXPLODES).verdict == "stability"


def test_gradient_norm_grows_along_the_ascent():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    before = worst_gradient_norm(net, TASK, steps=0)
    weights = [p.detach().clone() for p in net.parameters()]
    assert worst_gradient_norm(net, TASK, steps=5) > 1.2 * before
    assert all(torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))
    torch.nn.init.constant_(net[1].weight, float("nan"))
    assert worst_gradient_norm(net, TASK) == float("inf")


def test_pareto_front_is_what_nothing_dominates():
    assert pareto_front([(1, 0), (0, 1), (0, 0), (1, 0), (0.5, 0.5), (0.4, 0.5)]) == [0, 1, 3, 4]


@pytest.mark.parametrize("winner", ["pareto", "average"])
def test_mutation_changes_one_node_and_seeds_repeat(winner):
    search, again = small(seed=5, winner=winner), small(seed=5, winner=winner)
    genome = search.random_genome()
    assert genome == again.random_genome()
    assert len(genome) == 14 - len(LEAVES)
    for _ in range(20):
        child = search.mutate(genome)
        assert sum(a != b for a, b in zip(genome, child, strict=True)) <= 1
        assert child == again.mutate(genome)
    for run in (search, again):
        run.nets, run.quality_steps, run.steps, run.threshold = NETS[:1], 3, 3, 0.0
        for _ in range(6):
            run.step()
    assert [t.genome for t in search.tried] == [t.genome for t in again.tried]
    assert abs(sum(search.shares().values()) - 1) < 1e-9
    assert search.best is None or search.best == max(search.members, key=lambda t: sum(t.scores))


def test_bad_input():
    with pytest.raises(PomonaError, match="nodes=5 must be above 5, the number of leaves"):
        small(nodes=5)
    with pytest.raises(PomonaError, match="winner='best' is not known"):
        small(winner="best")
