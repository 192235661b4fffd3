import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pomona.errors import PomonaError
from pomona.weights.hypernetworks import HyperConv2d, KernelHyperNet, hyperize


def count(module):
    return sum(p.numel() for p in module.parameters())


def conv_net(width=32):
    layers = [nn.Conv2d(1, width, 3, padding=1), nn.ReLU()]
    for _ in range(4):
        layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, width, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize(("z_dim", "d", "n_in", "n_out", "k", "layers"), [(64, 64, 16, 16, 3, 5), (4, 7, 3, 2, 5, 1)])
def test_static_parameter_count(z_dim, d, n_in, n_out, k, layers):
    hyper = KernelHyperNet(z_dim, d, n_in, n_out, k)
    convs = nn.ModuleList(HyperConv2d(n_in, n_out, k, hyper=hyper, bias=False) for _ in range(layers))
    assert count(convs) == z_dim * layers + d * (z_dim + 1) * n_in + k * n_out * k * (d + 1)
    ordinary = nn.ModuleList(nn.Conv2d(n_in, n_out, k, bias=False) for _ in range(layers))
    assert count(ordinary) == layers * n_in * k * n_out * k


def test_equal_embeddings_give_equal_kernels():
    hyper = KernelHyperNet(8, 8, 4, 4, 3)
    a, b = HyperConv2d(8, 4, hyper=hyper), HyperConv2d(8, 4, hyper=hyper)
    assert not torch.equal(a.kernel(), b.kernel())
    b.z.data.copy_(a.z)
    assert torch.equal(a.kernel(), b.kernel())


def test_gradients_reach_embedding_and_hypernetwork_and_no_kernel_parameter_exists():
    conv = HyperConv2d(8, 8, 3, z_dim=5, base=4)
    conv(torch.randn(2, 8, 6, 6)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in conv.parameters())
    names = {name for name, _ in conv.named_parameters()}
    assert names == {"z", "bias", "hyper.w_in", "hyper.b_in", "hyper.w_out", "hyper.b_out"}
    assert not any(p.shape == conv.kernel().shape for p in conv.parameters())


def test_kernel_is_the_tiling_of_blocks_from_the_equation():
    torch.manual_seed(0)
    conv = HyperConv2d(4, 6, 3, hyper=KernelHyperNet(5, 7, 2, 3, 3)).double()
    kernel, h = conv.kernel(), conv.hyper
    for out_tile in range(2):
        for in_tile in range(2):
            z = conv.z[out_tile, in_tile]
            for i in range(2):
                a = h.w_in[i] @ z + h.b_in[i]
                expected = (h.w_out @ a + h.b_out).view(3, 3, 3)  # n_out, k, k
                got = kernel[out_tile * 3 : out_tile * 3 + 3, in_tile * 2 + i]
                torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "options", [{"padding": 1}, {"stride": 2, "padding": "valid"}, {"padding": 1, "padding_mode": "reflect"}]
)
def test_convolution_options_match_conv2d(options):
    conv = HyperConv2d(4, 4, 3, z_dim=6, base=4, **options).double()
    plain = nn.Conv2d(4, 4, 3, **options).double()
    plain.weight.data.copy_(conv.kernel())
    plain.bias.data.copy_(conv.bias)
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(conv(x), plain(x))
    assert conv(x[:0]).shape[0] == 0


def test_kernel_starts_with_the_variance_of_he_initialisation():
    torch.manual_seed(0)
    std = torch.stack([HyperConv2d(64, 64, 3).kernel().std() for _ in range(8)]).mean()
    assert abs(std.item() / (2 / (64 * 9)) ** 0.5 - 1) < 0.05


def test_hyperize_shares_one_hypernetwork_and_keeps_first_shortcut_and_head():
    net = conv_net()
    hyper = hyperize(net, z_dim=8, base=16)
    replaced = [m for m in hyper.modules() if isinstance(m, HyperConv2d)]
    assert len(replaced) == 4
    assert len({id(m.hyper) for m in replaced}) == 1
    assert type(hyper[0]) is nn.Conv2d
    assert type(hyper[14]) is nn.Conv2d
    assert not any(isinstance(m, HyperConv2d) for m in net.modules())
    assert count(hyper) < count(net) / 3
    assert hyper(torch.randn(2, 1, 8, 8)).shape == net(torch.randn(2, 1, 8, 8)).shape


def test_gradient_check():
    torch.manual_seed(0)
    hyper = KernelHyperNet(3, 2, 2, 2, 3).double()
    z = torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    conv = HyperConv2d(4, 2, 3, hyper=hyper, bias=False).double()

    def loss(z):
        conv.z.requires_grad_(False)
        kernel = torch.func.functional_call(hyper, {}, (z,)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        return F.conv2d(x, kernel)

    assert torch.autograd.gradcheck(loss, (z,))


def test_channels_that_do_not_tile_are_refused():
    with pytest.raises(PomonaError, match="in_channels=20 cannot be divided into n_in=16"):
        HyperConv2d(20, 16, 3)
    with pytest.raises(PomonaError, match="kernel_size=5 must be the hypernetwork's, 3"):
        HyperConv2d(16, 16, 5, hyper=KernelHyperNet())
    with pytest.raises(PomonaError, match="fit no replaceable convolution"):
        hyperize(nn.Sequential(nn.Linear(2, 2)))
