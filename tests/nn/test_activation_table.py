import math

import pytest
import torch
from torch import nn

from pomona.errors import PomonaError
from pomona.nn.activation import CLASSES, act
from pomona.nn.activation_table import ACTIVATIONS, calibrate_gain, curve, swap_activation
from pomona.nn.gain import gain

SAME_WIDTH = [name for name, facts in ACTIVATIONS.items() if facts.out_factor == 1.0]
GRID = torch.linspace(-40, 40, 160001, dtype=torch.float64)


def test_table_and_classes_list_the_same_names():
    assert list(ACTIVATIONS) == list(CLASSES)


@pytest.mark.parametrize("name", CLASSES)
def test_width_and_trainability_in_the_table_are_true(name):
    module, facts = act(name), ACTIVATIONS[name]
    assert getattr(module, "out_factor", 1.0) == facts.out_factor
    assert bool(list(module.parameters())) == facts.trainable


@pytest.mark.parametrize("name", SAME_WIDTH)
def test_minimum_and_lipschitz_constant_in_the_table_are_true(name):
    facts = ACTIVATIONS[name]
    x, y, slope = curve(name, -40, 40, 160001)
    if math.isfinite(facts.minimum):
        assert y.min().item() == pytest.approx(facts.minimum, abs=0.03)
        assert y.min().item() >= facts.minimum - 1e-6
    else:
        wide = act(name).double().eval()(1e3 * x[:, None])
        assert wide.min() < 2 * y.min() < 0
    if math.isfinite(facts.lipschitz):
        assert slope.abs().max().item() == pytest.approx(facts.lipschitz, rel=1e-3)
        assert slope.abs().max().item() <= facts.lipschitz + 1e-5
    else:
        assert slope.abs().max() > 10


@pytest.mark.parametrize("name", SAME_WIDTH)
def test_homogeneity_and_monotony_in_the_table_are_true(name):
    module, facts = act(name).double().eval(), ACTIVATIONS[name]
    y = module(GRID[:, None])
    assert torch.allclose(module(3 * GRID[:, None]), 3 * y, atol=1e-5) == facts.homogeneous
    assert bool((y.diff(dim=0) >= -1e-9).all()) == facts.monotone


def test_gain_in_the_table_is_the_quadrature():
    assert ACTIVATIONS["relu"].gain == pytest.approx(math.sqrt(2), abs=1e-6)
    assert ACTIVATIONS["relu"].derivative_second_moment == pytest.approx(0.5, abs=1e-6)


def test_curve_gives_value_and_slope():
    x, y, slope = curve("tanh", -2, 2, 5)
    assert x.tolist() == [-2, -1, 0, 1, 2]
    assert torch.allclose(y, x.tanh()) and torch.allclose(slope, 1 - x.tanh().square())


def test_swap_activation_replaces_every_module_and_keeps_the_rest():
    inner = nn.Sequential(nn.Conv2d(1, 3, 3), act("prelu", features=3, channel_dim=1))
    net = nn.Sequential(inner, nn.Flatten(), nn.Linear(3, 2), nn.ReLU()).double()
    new = swap_activation(net, "meta")
    assert new[0][1].features == 3 and new[0][1].channel_dim == 1 and new[0][1].logits.dtype == torch.float64
    assert new[3].features == 1 and isinstance(net[3], nn.ReLU)
    assert torch.equal(new[2].weight, net[2].weight)
    some = swap_activation(net, "gelu", where=lambda path, module: path == "3")
    assert type(some[0][1]) is type(net[0][1]) and isinstance(some[3], type(act("gelu")))
    assert new(torch.randn(2, 1, 3, 3, dtype=torch.float64)).shape == (2, 2)


def test_calibrate_gain_keeps_the_signal_of_the_new_activation():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 5))
    new = calibrate_gain(swap_activation(net, "silu"))
    assert torch.equal(new[0].weight, net[0].weight)
    for k in (2, 4):
        assert new[k].weight.square().mean().sqrt().item() == pytest.approx(gain(nn.SiLU()) / 8, rel=1e-5)
    before = calibrate_gain(net, "silu")
    assert torch.allclose(before[2].weight, new[2].weight)


def test_bad_input():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(PomonaError, match="multiplies the width by 2 and ReLU by 1"):
        swap_activation(net, "crelu")
    with pytest.raises(PomonaError, match="no layer of Linear was replaced"):
        swap_activation(nn.Linear(2, 2), "relu")
    with pytest.raises(PomonaError, match="changes the width, so it has no single curve"):
        curve("glu")
