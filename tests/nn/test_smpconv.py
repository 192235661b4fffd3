import copy

import pytest
import torch
import torch.nn.functional as F

from pomona.errors import PomonaError
from pomona.nn.coord_kernel import relative_grid
from pomona.nn.smpconv import SMPConv1d, SMPConv2d, SMPKernel, SMPMixer, WeightNet


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def naive(kernel, x):
    """The formula, point by point."""
    kernel = copy.deepcopy(kernel).requires_grad_(False)
    owners, n, _ = kernel.positions.shape
    out = torch.zeros(len(kernel.weight), kernel.weight.shape[2], len(x), dtype=x.dtype)
    for o in range(len(out)):
        for index, c in enumerate(x):
            total, active = 0, 0
            for j in range(n):
                p, r = kernel.positions[o % owners, j], kernel.radius[o % owners, j]
                g = max(0.0, 1 - float((c - p).abs().sum() / r))
                active += g > 0
                total = total + g * kernel.weight[o, j]
            if active:
                out[o, :, index] = total / active
    return out


@pytest.mark.parametrize(("dim", "shared"), [(1, False), (2, False), (2, True)])
def test_kernel_equals_the_double_loop_and_is_zero_where_no_point_reaches(dim, shared):
    kernel = SMPKernel(3, 4, 5, dim=dim, radius=0.3, shared=shared).double()
    x = relative_grid((7,) * dim, draw(1))
    value = kernel(x)
    torch.testing.assert_close(value, naive(kernel, x), rtol=1e-12, atol=1e-15)
    reached = (kernel.influence(x) > 0).any(1).expand(4, -1)
    assert not reached.all()
    assert (value.transpose(1, 2)[~reached] == 0).all()


def test_points_on_the_nodes_are_an_ordinary_kernel():
    conv = SMPConv2d(3, 4, 3, n_points=9, radius=0.9).double()
    with torch.no_grad():
        conv.function.positions.copy_(relative_grid((3, 3), draw(1)))
    weight = conv.function.weight.mT.unflatten(-1, (3, 3))
    torch.testing.assert_close(conv.kernel(), weight, rtol=0, atol=0)
    torch.testing.assert_close(conv(draw(2, 3, 6, 6)), F.conv2d(draw(2, 3, 6, 6), weight, padding=1))


@pytest.mark.parametrize("depthwise", [True, False])
def test_fft_equals_direct_and_causal_sees_no_future(depthwise):
    options = {"n_points": 6, "length": 20, "depthwise": depthwise, "radius": 0.2}
    direct = SMPConv1d(4, 4, "full", conv="direct", **options)
    fft = SMPConv1d(4, 4, "full", conv="fft", **options)
    fft.load_state_dict(direct.state_dict())
    x = draw(2, 4, 20).float()
    torch.testing.assert_close(fft(x), direct(x), rtol=1e-4, atol=1e-4)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(direct(x)[..., 7].sum(), x)
    assert (gradient[..., 8:] == 0).all()
    assert (gradient[..., :8] != 0).any()


def test_resample_gives_the_same_values_at_matching_coordinates():
    conv = SMPConv1d(3, 4, 9, n_points=6, causal=False, radius=0.4).double()
    before = conv.kernel()
    conv.resample(17)
    torch.testing.assert_close(conv.kernel()[..., ::2], before, rtol=0, atol=1e-14)
    conv.resample(9, rescale=True)
    torch.testing.assert_close(conv.kernel(), 2 * before)


def test_only_active_points_move_and_radii_stay_in_range():
    kernel = SMPKernel(2, 3, 8, radius=0.05).double()
    x = relative_grid((6,), draw(1))
    active = (kernel.influence(x) > 0).any(-1)
    assert active.any()
    assert not active.all()
    kernel(x).square().sum().backward()
    assert (kernel.positions.grad[~active] == 0).all()
    assert (kernel.positions.grad[active] != 0).any()
    assert (kernel.weight.grad[~active] == 0).all()
    with torch.no_grad():
        kernel.radius[0], kernel.radius[1] = -1, 5
    kernel.post_step()
    assert float(kernel.radius.detach().min()) == pytest.approx(1e-4)
    assert kernel.radius.max() == 1


def test_parameters_do_not_depend_on_the_kernel_size():
    def count(module):
        return sum(p.numel() for p in module.parameters())

    for size in (5, 51):
        assert count(SMPConv1d(7, 3, size, n_points=4, bias=False)) == 3 * 4 * (7 + 1 + 1)
        assert count(SMPConv2d(6, 6, size, n_points=4, bias=False, depthwise=True)) == 6 * 4 * (1 + 2 + 1)


def test_causal_points_start_at_the_recent_end():
    causal = SMPKernel(1, 50, 20, causal=True).positions
    assert causal.max() <= 1
    assert causal.min() >= -1
    assert causal.mean() > 0.5
    assert SMPKernel(1, 50, 20).positions.mean().abs() < 0.05


def test_weight_net_starts_at_the_variance_of_an_ordinary_kernel():
    net = WeightNet(16, 64, taps=33, generator=torch.Generator().manual_seed(0))
    value = net(relative_grid((33,), torch.ones(1)))
    assert float(value.detach().var()) == pytest.approx(1 / (33 * 16), rel=0.3)


def test_mixer_leaves_padding_out():
    mixer, x = SMPMixer(4, 6).double(), draw(2, 6, 4)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[:, 4:] = False
    other = x.clone()
    other[:, 4:] = 7
    torch.testing.assert_close(mixer(x, mask), mixer(other, mask))


def test_gradients():
    kernel, x = SMPKernel(2, 2, 3, dim=2, radius=0.7).double(), draw(5, 2) / 3
    names, values = zip(*((n, p.detach().clone().requires_grad_()) for n, p in kernel.named_parameters()), strict=True)
    assert torch.autograd.gradcheck(
        lambda *p: torch.func.functional_call(kernel, dict(zip(names, p, strict=True)), (x,)), values
    )


def test_bad_input():
    with pytest.raises(PomonaError, match="kernel_size='full' needs length="):
        SMPConv1d(2, 2)
    with pytest.raises(PomonaError, match="n_points=0 must be a number above 0"):
        SMPKernel(2, 2, 0)
    with pytest.raises(PomonaError, match="act='relu' is not known"):
        WeightNet(2, 2, act="relu")
    with pytest.raises(PomonaError, match="in_channels=3 cannot be divided into groups=2"):
        WeightNet(3, 2, groups=2)
    with pytest.raises(PomonaError, match="n_points=0 must be a number above 0"):
        SMPConv2d(2, 2, 3, n_points=0)
    with pytest.raises(PomonaError, match="radius=0 must be a number above 0"):
        SMPConv1d(2, 2, 5, radius=0)
