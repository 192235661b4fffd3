import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from pomona.errors import PomonaError
from pomona.nn.activation import act
from pomona.nn.init import FixupBranch, deep_plain, fans, init_, signal_report


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.branch = FixupBranch(
            *[m for _ in range(2) for m in (nn.Linear(width, width), nn.ReLU())], nn.Linear(width, width)
        )

    def forward(self, x):
        return x + self.branch(x)


def mean_square_over_layers(scheme, nets):
    """Mean over nets of the mean square after each ReLU, over that after the first."""
    x = torch.randn(32, 512, generator=rng(99))
    total = torch.zeros(30)
    for seed in range(nets):
        h = x
        for k, layer in enumerate(layers(scheme, seed)):
            h = torch.relu(layer(h))
            total[k] += h.square().mean() / nets
    return total / total[0]


def layers(scheme, seed):
    net = nn.Sequential(*[m for _ in range(30) for m in (nn.Linear(512, 512), nn.ReLU())])
    init_(net, scheme, generator=rng(seed))
    return net[::2]


@torch.no_grad()
def test_he_keeps_mean_square_over_30_relu_layers_and_glorot_loses_half_a_layer():
    # the mean square is kept in expectation; that of one net strays by about sqrt(5 * 30/512), so nets are averaged
    he = mean_square_over_layers("he", 12)
    assert (he > 1 / 1.5).all() and (he < 1.5).all()
    glorot = mean_square_over_layers("glorot", 4)
    assert math.log2(glorot[-1]) == pytest.approx(-29, abs=1.2)


def test_he_std_is_sqrt_two_over_n_and_linear_slope_gives_lecun():
    for a, target in ((0.0, math.sqrt(2 / 600)), (1.0, math.sqrt(1 / 600)), (0.25, math.sqrt(2 / (1.0625 * 600)))):
        net = nn.Sequential(nn.Linear(4, 600), nn.LeakyReLU(a), nn.Linear(600, 800))
        init_(net, generator=rng())
        assert net[2].weight.std().item() == pytest.approx(target, rel=5e-3)
        assert net[0].weight.std().item() == pytest.approx(0.5, rel=0.05)
        assert not net[2].bias.any()
    lecun = init_(nn.Linear(600, 800), "lecun", generator=rng())
    linear = init_(nn.Linear(600, 800), "he", generator=rng())
    assert torch.allclose(lecun.weight, linear.weight)


def test_fan_in_and_fan_out_differ_by_the_ratio_of_first_and_last_width():
    sizes = (30, 50, 20, 40, 10)
    net = nn.Sequential(*[m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())][:-1])

    def product(mode):
        init_(net, mode=mode, generator=rng())
        # rescale each layer to its exact intended variance, so that the identity is exact up to sampling of the draw
        linears = net[::2]
        n = [fans(layer)[mode == "fan_out"] for layer in linears]
        factor = [1.0 if k == (0 if mode == "fan_in" else 3) else 2.0 for k in range(4)]
        for layer, count, f in zip(linears, n, factor, strict=True):
            assert layer.weight.std().item() == pytest.approx(math.sqrt(f / count), rel=0.15)
        return math.prod(fans(layer)[0] * f / count for layer, count, f in zip(linears, n, factor, strict=True))

    assert product("fan_out") / product("fan_in") == pytest.approx(sizes[0] / sizes[-1])


def test_he_agrees_with_torch_kaiming_normal():
    for mode in ("fan_in", "fan_out"):
        net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 96, 3), nn.ReLU(), nn.Conv2d(96, 4, 3))
        init_(net, mode=mode, generator=rng())
        theirs = nn.init.kaiming_normal_(
            torch.empty_like(net[2].weight), mode=mode, nonlinearity="relu", generator=rng(1)
        )
        assert net[2].weight.std().item() == pytest.approx(theirs.std().item(), rel=0.02)


def test_grouped_convolution_counts_its_own_inputs():
    assert fans(nn.Conv2d(8, 12, 3, groups=4)) == (18, 27)
    assert fans(nn.ConvTranspose2d(8, 12, 3)) == (72, 108)


def test_lsuv_gives_every_layer_unit_output_std():
    net = deep_plain(8, 32, "tanh", in_features=20, out_features=5, generator=rng())
    batch = 3 * torch.rand(256, 20, generator=rng(1))
    init_(net, "lsuv", batch=batch, generator=rng(2))
    h = batch
    for module in net:
        h = module(h)
        if isinstance(module, nn.Linear):
            assert h.std().item() == pytest.approx(1.0, abs=0.05)


def test_orthogonal_and_delta_orthogonal_keep_length():
    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=False)).double()
    init_(net, "delta_orthogonal", generator=rng())
    x = torch.randn(2, 4, 6, 6, generator=rng(1), dtype=torch.float64)
    assert net(x).norm().item() == pytest.approx(x.norm().item())
    linear = init_(nn.Linear(6, 6).double(), "orthogonal", generator=rng())
    assert torch.allclose(linear.weight @ linear.weight.T, torch.eye(6, dtype=torch.float64), atol=1e-12)


def test_fixup_starts_as_identity_blocks_with_scaled_branches():
    net = nn.Sequential(nn.Linear(16, 64), Block(64), Block(64), Block(64), Block(64), nn.Linear(64, 3))
    init_(net, "fixup", generator=rng())
    x = torch.randn(5, 16, generator=rng(1))
    assert torch.equal(net[:-1](x), net[0](x))
    assert not net(x).any()
    # L = 4 branches of m = 3 layers: L^(-1/4) times LeCun's for the first, He's for the one behind the ReLU
    assert net[2].branch.layers[0].weight.std().item() == pytest.approx(0.5**0.5 / 8, rel=0.05)
    assert net[2].branch.layers[2].weight.std().item() == pytest.approx(1 / 8, rel=0.05)


def test_act_overrides_the_activation_that_was_found():
    net = nn.Sequential(nn.Linear(500, 500), nn.ReLU(), nn.Linear(500, 500))
    init_(net, act="identity", generator=rng())
    assert net[2].weight.std().item() == pytest.approx(500**-0.5, rel=0.01)


def test_same_generator_same_weights_and_uniform_has_the_same_variance():
    nets = [deep_plain(3, 300, in_features=300, out_features=2, generator=rng(5)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))
    init_(nets[0], distribution="uniform", generator=rng())
    assert nets[0][2].weight.std().item() == pytest.approx(nets[1][2].weight.std().item(), rel=0.01)
    assert nets[0][2].weight.abs().max() <= math.sqrt(6 / 300)


def test_signal_report_agrees_with_theory_and_flags():
    x = torch.randn(64, 256, generator=rng(1))
    shapes = {"in_features": 256, "out_features": 256}
    he = signal_report(deep_plain(30, 256, **shapes, generator=rng()), x, generator=rng(2))
    assert len(he.layers) == 30
    assert (he.forward, he.backward) == ("steady", "steady")
    for signal in he.layers:
        assert signal.ratio == pytest.approx(signal.predicted, rel=0.5)
    assert he.layers[5].predicted == pytest.approx(1.0, abs=0.05)
    glorot = signal_report(deep_plain(30, 256, init="glorot", **shapes, generator=rng()), x)
    assert (glorot.forward, glorot.backward) == ("vanishing", "vanishing")
    assert "forward vanishing" in str(glorot)
    hot = deep_plain(30, 256, **shapes, generator=rng())
    with torch.no_grad():
        for p in hot.parameters():
            p.mul_(2)
    assert signal_report(hot, x).forward == "exploding"
    tanh = deep_plain(5, 256, "tanh", **shapes, generator=rng())
    assert all(s.ratio == pytest.approx(s.predicted, rel=0.2) for s in signal_report(tanh, x).layers)


def test_deep_plain_conv_has_the_depth_asked_for():
    net = deep_plain(8, 4, "prelu", kind="conv", in_features=1, out_features=10, generator=rng())
    assert sum(isinstance(m, (nn.Linear, nn.Conv2d)) for m in net) == 8
    assert net(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    assert net[1].features == 4 and net[1].channel_dim == 1


def test_bad_input():
    net = nn.Sequential(nn.Linear(3, 3), act("gelu"))
    with pytest.raises(PomonaError, match="scheme='hee' is not known; did you mean he"):
        init_(net, "hee")
    with pytest.raises(PomonaError, match="give batch="):
        init_(net, "lsuv")
    with pytest.raises(PomonaError, match="found no residual branch"):
        init_(net, "fixup")
    with pytest.raises(PomonaError, match="do not narrow, got 4 -> 2 channels"):
        init_(nn.Conv2d(4, 2, 3), "delta_orthogonal")
    with pytest.raises(PomonaError, match="does not vary"):
        init_(net, "lsuv", batch=torch.zeros(4, 3))
    with pytest.raises(PomonaError, match="depth=1 must be at least 2"):
        deep_plain(1, in_features=2, out_features=2)
