import pytest
import torch
from torch import nn

from pomona.data.task import tensors
from pomona.errors import PomonaError
from pomona.nets.specs import Inputs, Outputs
from pomona.nn.selectable_kan import PrunedKANLayer, SelectableKANLayer
from pomona.train.budget import Budget
from pomona.train.selectable import fit_selectable
from pomona.train.settings import Training

POOL = ("rbf", "fourier", "base")


def task():
    x = torch.rand(96, 1, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = torch.sin(6 * x)
    parts = [(x[rows], y[rows]) for rows in (slice(64), slice(64, 80), slice(80, 96))]
    return tensors("sine", Inputs("table", (1,)), Outputs("number", 1), *parts)


def net() -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    first = SelectableKANLayer(1, 5, pool=POOL, generator=generator)
    return nn.Sequential(first, SelectableKANLayer(5, 1, pool=POOL, norm="layer", generator=generator))


def run(net, **options):
    training = Training(lr=3e-2, batch_size=32)
    return fit_selectable(net, task(), training, budget=Budget("epochs", 50), seed=3, **options)


def test_three_phases_select_anneal_and_prune():
    seen = []

    def watch(net, step):
        layer = net[0]
        if isinstance(layer, SelectableKANLayer):
            seen.append((float(layer.tau), int(layer.kept.sum(-1)[0]), float(layer.choice_map().sum(-1).mean())))

    start = net()
    before = [p.clone() for p in start.parameters()]
    done = run(start, callbacks=[watch], top=2)
    assert all(torch.equal(a, b) for a, b in zip(before, start.parameters(), strict=True))
    taus, kept, total = zip(*seen, strict=True)
    assert list(taus) == sorted(taus, reverse=True) and (taus[0], taus[-1]) == pytest.approx((1, 0.1), rel=1e-5)
    assert (kept[0], kept[-1]) == (3, 2) and all(t == pytest.approx(1) for t in total)
    assert {type(layer) for layer in done.net} == {PrunedKANLayer}
    assert {name: tuple(c.shape) for name, c in done.choices.items()} == {"0": (5, 3), "1": (1, 3)}
    assert ((done.choices["0"] > 0).sum(-1) <= 2).all()
    assert done.fit.steps == 100 and done.fit.examples == 3200
    steps = [entry["step"] for entry in done.fit.curve]
    assert steps == sorted(steps) and steps[-1] == 100
    assert done.fit.valid["rmse"] < 0.25 and done.fit.valid["rmse"] == done.fit.curve[done.fit.best]["rmse"]


def test_same_seed_same_network():
    a, b = run(net()).net, run(net()).net
    assert all(torch.equal(u, v) for u, v in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_bad_arguments_say_what_would_do():
    with pytest.raises(PomonaError, match="must be three shares above 0 that sum to 1"):
        run(net(), phases=(0.5, 0.3, 0.3))
    with pytest.raises(PomonaError, match="top=0 must be a number above 0"):
        run(net(), top=0)
    with pytest.raises(PomonaError, match="has no SelectableKANLayer to select from"):
        run(nn.Linear(1, 1))
    with pytest.raises(PomonaError, match="budget in seconds cannot be shared out"):
        fit_selectable(net(), task(), budget=Budget("seconds", 1))
