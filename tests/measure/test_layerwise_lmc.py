import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pomona.claims.layerwise_lmc import layerwise_lmc
from pomona.edit.lottery_ticket import linear_barrier
from pomona.edit.masks import Masks
from pomona.errors import PomonaError
from pomona.measure.layerwise_lmc import (
    average_layers,
    barrier,
    barrier_reading,
    cumulative_barriers,
    deep_linear_layer_convexity,
    layers,
    layerwise_barriers,
    perturb_layer,
)
from pomona.measure.linear_path import linear_path


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def mlp():
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 6), nn.Linear(6, 3)).double()


def plain():
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).double()


def classes(n=40):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 5, generator=g, dtype=torch.float64), torch.randint(3, (n,), generator=g)


def numbers(n=30, outs=2):
    g = torch.Generator().manual_seed(2)
    return torch.randn(n, 4, generator=g).double(), torch.randn(n, outs, generator=g).double()


def linear_net(depth, seed=0):
    sizes = [4, *[5] * (depth - 1), 2]
    return seeded(lambda: nn.Sequential(*(nn.Linear(i, o, bias=False) for i, o in pairwise(sizes))).double(), seed)


# --- facts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_one_layer_of_a_deep_linear_network_has_no_barrier(depth):
    a, b = linear_net(depth, 1), linear_net(depth, 2)
    found = layerwise_barriers(a, b, numbers(), loss_fn=F.mse_loss)
    assert len(found) == depth
    for one in found.values():
        assert max(one.segment) <= 1e-6
        for path in (one.rest_a, one.rest_b):  # convex: second differences never negative
            assert path.diff().diff().min() >= -1e-9


def test_a_linear_network_and_its_negative_have_a_full_barrier_but_none_in_a_layer():
    x, _ = numbers()
    a = linear_net(2, 1)
    b = copy.deepcopy(a)
    for p in b.parameters():
        p.data.neg_()
    y = a(x).detach()  # both ends have loss 0, the midpoint predicts 0
    full = barrier(a, b, (x, y), loss_fn=F.mse_loss)
    assert full.segment == pytest.approx([float(y.square().mean())] * 2)
    assert full.segment == pytest.approx(full.network)
    for one in layerwise_barriers(a, b, (x, y), loss_fn=F.mse_loss).values():
        assert max(one.segment) <= 1e-6


def test_all_parameters_reproduce_the_ordinary_barrier_and_none_give_zero():
    a, b, data = seeded(plain, 0), seeded(plain, 1), classes()
    alphas = torch.linspace(0, 1, 11, dtype=torch.float64)
    path = linear_path(a, a.state_dict(), b.state_dict(), data, alphas=alphas)
    full = barrier(a, b, data)
    torch.testing.assert_close(full.rest_a, path.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(full.rest_b, path.loss, rtol=1e-12, atol=0)
    assert full.segment == pytest.approx([path.barrier()] * 2)
    none = barrier(a, b, data, [])
    assert none.segment == pytest.approx((0, 0), abs=1e-15) and none.rest_a.unique().numel() == 1


def test_itself_has_no_barrier_and_swapping_mirrors():
    a, b, data = seeded(mlp, 0), seeded(mlp, 1), classes()
    same = layerwise_barriers(a, copy.deepcopy(a), data, n=5)
    assert all(max(*one.segment, *map(abs, one.network)) < 1e-12 for one in same.values())
    there, back = (layerwise_barriers(*pair, data, n=5) for pair in ((a, b), (b, a)))
    for layer, one in there.items():
        torch.testing.assert_close(one.rest_a, back[layer].rest_b.flip(0), rtol=1e-10, atol=1e-12)
        assert one.network == pytest.approx(back[layer].network[::-1])


@pytest.mark.parametrize("batchnorm", ["recompute", "interpolate"])
def test_alpha_one_is_the_layer_loaded_from_b_and_the_midpoint_is_the_average(batchnorm):
    a, b, (x, y) = seeded(mlp, 0), seeded(mlp, 1), classes()
    with torch.no_grad():
        a(x), b(2 * x)  # running statistics that differ
    found = layerwise_barriers(a, b, (x, y), batchnorm=batchnorm)
    statistics = [x] if batchnorm == "recompute" else None
    for layer, names in layers(a).items():
        swapped = copy.deepcopy(a)
        swapped.load_state_dict({**a.state_dict(), **{name: b.state_dict()[name] for name in names}})
        for weight, at in ((1.0, -1), (0.5, 5), (0.0, 0)):
            net = average_layers(a, b, names, weight, statistics=statistics)
            if weight == 1 and statistics is None:
                assert all(torch.equal(v, swapped.state_dict()[k]) for k, v in net.state_dict().items())
            torch.testing.assert_close(found[layer].rest_a[at], F.cross_entropy(net.eval()(x), y).detach())


# --- layers and options ---------------------------------------------------------------------------------------


def test_layers_take_their_norm_along_and_cumulative_ends_with_the_whole_network():
    a, b, data = seeded(mlp, 0), seeded(mlp, 1), classes()
    found = layers(a)
    assert list(found) == ["0", "3", "4"]
    assert sorted(n for n in found["0"] if n.startswith("1.")) == sorted(f"1.{n}" for n in a[1].state_dict())
    assert list(layers(a, "parameter")) == [*dict(a.named_parameters()), *dict(a.named_buffers())]
    assert list(layers(a, [a[:3], a[3:]]).values()) == [found["0"], found["3"] + found["4"]]
    assert layers(a, {"head": ["4"]}) == {"head": ["4.weight", "4.bias"]}
    full = barrier(a, b, data, n=5)
    for order in ("bottom_up", "top_down", ["3", "0", "4"]):
        grown = cumulative_barriers(a, b, data, order=order, n=5)
        assert set(grown) == set(found)
        torch.testing.assert_close(list(grown.values())[-1].rest_a, full.rest_a)
        first = next(iter(grown))
        torch.testing.assert_close(grown[first].rest_b, layerwise_barriers(a, b, data, n=5)[first].rest_b)


def test_error_and_reading():
    a, b, (x, y) = seeded(plain, 0), seeded(plain, 1), classes()
    found = layerwise_barriers(a, b, (x, y), n=3, metric="error")
    wrong = (a(x).argmax(1) != y).double().mean()
    torch.testing.assert_close(found["0"].rest_a[0], wrong)
    reading = barrier_reading(found)
    assert reading["layers"] == ["0", "2", "4"] and len(reading.figure.data) == 4
    assert reading["network, rest at b"][1] == pytest.approx(found["2"].network[1])


def test_tied_and_masked_networks():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.mix(self.embed(x)))

    a, b = seeded(Tied, 0), seeded(Tied, 1)
    data = torch.arange(7), torch.arange(7).roll(1)
    assert list(layers(a)) == ["embed", "mix"]
    one = barrier(a, b, data, ["head"], n=3)
    net = average_layers(a, b, ["embed"], 0.5)
    torch.testing.assert_close(one.rest_a[1].float(), F.cross_entropy(net(data[0]), data[1]).detach())

    mask = {"0.weight": torch.rand(8, 5, generator=torch.Generator().manual_seed(0)) < 0.5}
    a, b, data = seeded(plain, 0), seeded(plain, 1), classes()
    for net in (a, b):
        Masks(net, mask)
    folded = (Masks(copy.deepcopy(net)).fold() for net in (a, b))
    torch.testing.assert_close(barrier(a, b, data).rest_a, barrier(*folded, data).rest_a)
    assert list(layers(a)) == ["0", "2", "4"]
    one_by_one = linear_barrier(a, b, lambda net: {"loss": F.cross_entropy(net(data[0]), data[1])})
    assert barrier(a, b, data).segment[0] == pytest.approx(max(one_by_one["barrier"], 0))


# --- perturbations --------------------------------------------------------------------------------------------


def test_perturbations_have_their_norm_and_direction():
    a, b, c = (seeded(mlp, s) for s in range(3))

    def moved(net):
        return torch.cat([(net[3].weight - a[3].weight).flatten(), net[3].bias - a[3].bias]).detach()

    g = torch.Generator().manual_seed(0)
    random = moved(perturb_layer(a, "3", 0.7, generator=g))
    assert random.norm() == pytest.approx(0.7)
    others = [k for k in a.state_dict() if not k.startswith("3.")]
    net = perturb_layer(a, "3", 0.7, towards=b)
    assert all(torch.equal(net.state_dict()[k], a.state_dict()[k]) for k in others)
    torch.testing.assert_close(moved(net), 0.7 * moved(b) / moved(b).norm())
    basis = torch.linalg.qr(torch.stack([moved(b), moved(c)], 1)).Q
    for outside in (False, True):
        d = moved(perturb_layer(a, "3", 0.7, span=[b, c], outside=outside, generator=g))
        inside = basis @ (basis.mT @ d)
        assert d.norm() == pytest.approx(0.7)
        torch.testing.assert_close(inside, torch.zeros_like(d) if outside else d, rtol=1e-9, atol=1e-9)
    full = moved(perturb_layer(a, ["3.weight", "3.bias"], float(moved(b).norm()), towards=b))
    torch.testing.assert_close(full, moved(b))


def test_curvature_of_a_deep_linear_network_is_autograds():
    x, y = numbers()
    weights = [p.detach() for p in linear_net(3, 1).parameters()]
    for layer in range(3):

        def loss(w, layer=layer):
            ws = [*weights[:layer], w, *weights[layer + 1 :]]
            return F.mse_loss(x @ ws[0].mT @ ws[1].mT @ ws[2].mT, y)

        size = weights[layer].numel()
        hessian = torch.autograd.functional.hessian(loss, weights[layer]).reshape(size, size)
        found = deep_linear_layer_convexity(weights, x, y, layer)
        torch.testing.assert_close(found.eigenvalues, torch.linalg.eigvalsh(hessian), rtol=1e-8, atol=1e-10)
        assert found.eigenvalues[0] >= -1e-12
        d = torch.randn(weights[layer].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        torch.testing.assert_close(found.along(d), d.flatten() @ hessian @ d.flatten())


def test_bad_input_messages():
    a, b, data = seeded(plain, 0), seeded(plain, 1), classes()
    with pytest.raises(PomonaError, match="n=10 must be odd"):
        barrier(a, b, data, n=10)
    with pytest.raises(PomonaError, match=r"subset='2.wight' is not known; did you mean 2.weight"):
        barrier(a, b, data, ["2.wight"])
    wide = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    with pytest.raises(PomonaError, match=r"'0.weight' has \(8, 5\) and \(9, 5\)"):
        barrier(a, wide, data)
    with pytest.raises(PomonaError, match="'4.bias' is in one only"):
        barrier(a, a[:4], data)
    with pytest.raises(PomonaError, match="metric='error' needs classes"):
        barrier(linear_net(2), linear_net(2, 1), numbers(), metric="error", loss_fn=F.mse_loss)
    with pytest.raises(PomonaError, match="order='9' is not known"):
        cumulative_barriers(a, b, data, order=["9"])
    with pytest.raises(PomonaError, match="no direction of that kind"):
        perturb_layer(a, "0", 1.0, towards=copy.deepcopy(a))


def test_claim_at_smoke_scale():
    evidence = layerwise_lmc("smoke", (7,))
    assert len(evidence.method) == len(evidence.baseline) == 1
    assert len(evidence.details["single layers"]) == 3
    assert list(evidence.details["cumulative, top_down"]) == ["5", "3", "1"]
    assert evidence.details["cumulative, top_down"]["1"] == pytest.approx(evidence.details["whole"], rel=1e-5)
