import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pomona.errors import PomonaError
from pomona.nn.point_cloud_linear import TRANSFORMS, PointCloudLinear, PointCloudNet, compress, distances


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def test_parameter_count():
    widths = (256, 512, 512, 10)
    net = PointCloudNet(widths, 16)
    assert sum(p.numel() for p in net.parameters()) == (16 + 1) * sum(widths) == 21_930
    assert sum(n * m + m for n, m in pairwise(widths)) == 399_370  # dense
    assert PointCloudLinear(256, 512, 4).n_params() == 4 * (256 + 512) + 512


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_weights_do_not_see_rotations_and_translations(transform):
    layer = PointCloudLinear(7, 5, 4, transform=transform, dtype=torch.float64, generator=seeded())
    before = layer.weight()
    rotation = torch.linalg.qr(draw(4, 4))[0]
    with torch.no_grad():
        for place in (layer.positions_in, layer.positions_out):
            place.copy_(place @ rotation + draw(4, seed=1))
    torch.testing.assert_close(layer.weight(), before)
    assert before.std() > 0


def test_wave_has_its_period_mean_height_and_slope():
    period, d = 0.1, torch.arange(0, 2, 1e-3, dtype=torch.float64) + 5e-4
    wave = TRANSFORMS["tri"](d, period, 1.0)
    torch.testing.assert_close(wave[200:], wave[:-200], atol=1e-9, rtol=0)  # 2 period = 200 points
    assert float(wave[:200].mean()) == pytest.approx(0, abs=1e-12)
    assert float(wave.max()) == pytest.approx(0.5, abs=0.006) and float(wave.min()) == pytest.approx(-0.5, abs=0.006)
    slope = wave[:200].diff().abs() / 1e-3
    assert float(slope.median()) == pytest.approx(1 / period)
    assert ((slope - 1 / period).abs() < 1e-6).sum() == 198  # but at the peak
    torch.testing.assert_close(TRANSFORMS["cos"](d, period, 1.0).sign(), wave.sign())


def test_hidden_neurons_may_be_permuted():
    net = PointCloudNet((6, 9, 9, 3), 4, generator=seeded()).double()
    x, order = draw(5, 6), torch.randperm(9, generator=seeded())
    before = net(x)
    with torch.no_grad():
        net.layers[0].positions_out.copy_(net.layers[0].positions_out[order])
        net.layers[0].bias.copy_(net.layers[0].bias[order])
    torch.testing.assert_close(net(x), before)
    assert net.layers[1].positions_in is net.layers[0].positions_out and len(net.positions()) == 4


def test_initial_weights_are_uniform_over_the_wave():
    layer = PointCloudLinear(400, 300, 16, amplitude=1.0, generator=seeded())
    weight = layer.weight().detach()
    assert float(weight.std()) == pytest.approx(1 / math.sqrt(12) / math.sqrt(400), rel=0.02)
    assert float(weight.mean()) == pytest.approx(0, abs=1e-3)
    for transform in TRANSFORMS:
        layer = PointCloudLinear(400, 300, 16, transform=transform, bias=False, generator=seeded())
        y = layer(torch.randn(200, 400, generator=seeded(1))).detach()
        assert float(y.square().mean()) == pytest.approx(1, rel=0.15)
    y = PointCloudNet((256, 256, 256, 256), generator=seeded())(torch.randn(200, 256, generator=seeded(1))).detach()
    assert float(y.square().mean()) == pytest.approx(1, rel=0.3)


def test_coincident_points_have_finite_gradients():
    p = draw(3, 4).requires_grad_()
    d = distances(p, p.detach().clone())
    assert torch.isfinite(torch.autograd.grad(d.sum(), p)[0]).all()
    q = draw(5, 4, seed=1)
    torch.testing.assert_close(distances(p, q), torch.cdist(p, q))


def test_compression_fits_the_positions():
    linear = nn.Linear(12, 8).double()
    layer, error = compress(linear, 8, generator=seeded())
    weaker = compress(linear, 1, generator=seeded())[1]
    assert error < 0.35 < weaker
    assert layer.relative_error(linear.weight.detach()) == error
    x = draw(4, 12)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight(), linear.bias))
    torch.testing.assert_close(layer.fold()(x), layer(x))


def test_gradients():
    layer = PointCloudLinear(4, 3, 2, dtype=torch.float64, generator=seeded())
    x = draw(2, 4)

    def run(p, q):
        return torch.func.functional_call(layer, {"positions_in": p, "positions_out": q}, (x,))

    assert torch.autograd.gradcheck(run, (layer.positions_in, layer.positions_out))


def test_bad_input():
    with pytest.raises(PomonaError, match=r"transform='trii' is not known; did you mean tri\?"):
        PointCloudLinear(4, 3, transform="trii")
    with pytest.raises(PomonaError, match=r"positions_in=\(4, 3\) must be \(4, 2\)"):
        PointCloudLinear(4, 3, 2, positions_in=nn.Parameter(torch.zeros(4, 3)))
    with pytest.raises(PomonaError, match="widths=.4. must name"):
        PointCloudNet([4])
