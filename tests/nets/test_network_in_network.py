import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

from pomona.errors import PomonaError
from pomona.nets.build import build
from pomona.nets.cost import parameters
from pomona.nets.network_in_network import (
    NIN,
    CascadedCrossChannelPool,
    GlobalAvgPool2d,
    MaxoutConv,
    MLPConv,
    cam,
    gap_head,
    mlp_conv,
)
from pomona.nets.specs import Inputs, Outputs

X = torch.randn(2, 3, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def seeded(make):
    torch.manual_seed(0)
    return make().double()


def small(**options) -> NIN:
    return seeded(lambda: NIN(3, 5, scale=1 / 24, **options)).eval()


def test_mlpconv_is_an_mlp_on_every_patch():
    layer = seeded(lambda: MLPConv(3, (7, 6, 4), kernel_size=3, stride=2, padding=1))
    patches = F.unfold(X, 3, stride=2, padding=1).transpose(1, 2)
    for conv in (layer[0], layer[2], layer[4]):
        patches = F.linear(patches, conv.weight.flatten(1), conv.bias).relu()
    torch.testing.assert_close(layer(X), patches.transpose(1, 2).unflatten(2, (5, 4)))


def test_1x1_convolution_is_a_linear_layer_on_channels():
    pool = seeded(lambda: CascadedCrossChannelPool(3, 4))
    expected = F.linear(X.movedim(1, -1), pool[0].weight.flatten(1), pool[0].bias).relu().movedim(-1, 1)
    torch.testing.assert_close(pool(X), expected)


def test_mean_after_1x1_convolution_is_a_linear_layer_on_the_mean():
    conv, mean = seeded(lambda: nn.Conv2d(3, 5, 1)), GlobalAvgPool2d()
    torch.testing.assert_close(mean(conv(X)), F.linear(mean(X), conv.weight.flatten(1), conv.bias))
    assert parameters(conv) == 3 * 5 + 5
    assert GlobalAvgPool2d(keep_size=True)(X).shape == (2, 3, 1, 1)


def test_mean_of_the_class_maps_is_the_logit():
    net = small()
    maps = cam(net, X)
    torch.testing.assert_close(maps.mean((2, 3)), net(X))
    assert cam(net, X, size=(9, 8)).shape == (2, 5, 9, 8)
    with pytest.raises(PomonaError, match="net has no GlobalAvgPool2d, so no class maps"):
        cam(nn.ReLU(), X)


def test_network_takes_any_size():
    net = small().float()
    for size in (28, 40, 7):
        assert net(torch.zeros(2, 3, size, size)).shape == (2, 5)
    series = NIN(3, 5, scale=1 / 24, dims=1)
    assert series(torch.zeros(2, 3, 40)).shape == (2, 5)
    assert cam(series, torch.zeros(2, 3, 40), size=(40,)).shape == (2, 5, 40)


def test_options_of_the_network():
    assert (small()(X) >= 0).all() and (small(last_relu=False)(X) < 0).any()
    stds = [
        c.weight.detach().std() for c in seeded(lambda: NIN(3, 5, init_std=0.05)).modules() if isinstance(c, nn.Conv2d)
    ]
    assert all(0.045 < float(s) < 0.055 for s in stds[:-1])
    widths = [c.out_channels for c in NIN(3, 10).modules() if isinstance(c, nn.Conv2d)]
    assert widths == [192, 160, 96, 192, 192, 192, 192, 192, 10]


def test_maxout_is_the_largest_piece():
    layer = seeded(lambda: MaxoutConv(3, 4, 3, padding=1, pieces=2))
    a, b = (F.conv2d(X, layer.conv.weight[k::2], layer.conv.bias[k::2], padding=1) for k in (0, 1))
    torch.testing.assert_close(layer(X), torch.maximum(a, b))
    assert gradcheck(layer, (X[:1, :, :3, :3].clone().requires_grad_(),))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.hidden, self.out = nn.Conv2d(3, 4, 3), nn.Linear(4 * 7 * 6, 11), nn.Linear(11, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.hidden(self.conv(x).flatten(1)))


def test_gap_head_takes_the_place_of_linear_layers():
    conv = nn.Conv2d(3, 4, 3)
    head = (nn.Flatten(), nn.Linear(4 * 7 * 6, 11), nn.ReLU(), nn.Dropout(), nn.Linear(11, 5), nn.LogSoftmax(1))
    net = nn.Sequential(conv, nn.ReLU(), *head).double()
    before = copy.deepcopy(net.state_dict())
    new = gap_head(net, X)
    assert parameters(new) == parameters(conv) + 4 * 5 + 5
    torch.testing.assert_close(new(X).exp().sum(1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(cam(new, X).mean((2, 3)).log_softmax(1), new(X))
    assert new(X[..., :5, :]).shape == (2, 5)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert gap_head(Functional().double(), X)(X).shape == (2, 5)
    relu = nn.ReLU()
    shared = nn.Sequential(nn.Conv2d(3, 4, 3), relu, nn.Flatten(), nn.Linear(168, 4), relu, nn.Linear(4, 5)).double()
    with pytest.raises(PomonaError, match="net uses '1' both before and in its head"):
        gap_head(shared, X)
    with pytest.raises(PomonaError, match=r"net has no nn\.Linear on a flattened feature map"):
        gap_head(nn.Sequential(nn.Linear(8, 2)).double(), X)


def test_it_fills_the_slot_of_a_backbone():
    class Sized:
        inputs, outputs = Inputs("image", (1, 8, 8)), Outputs("classes", 3)

    net = build("convnet conv=mlpconv width=4 depth=2", Sized())
    assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    assert [type(m) for m in mlp_conv(3, 4, 3)][-1] is nn.Conv2d
    assert mlp_conv(3, 4, 3, bias=False)[-1].bias is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NIN(3, 5, pool=("max3s2",)), "widths, kernels and pool have 3, 3 and 1 entries"),
        (lambda: NIN(3, 5, pool=("max3", "avg3s2")), "pool='max3' is not a kind, size and stride"),
        (lambda: MLPConv(3, ()), r"widths=\(\) must name a width or more"),
        (lambda: MLPConv(3, (4, 0)), r"widths\[1\]=0 must be a number above 0"),
        (lambda: MLPConv(2, (4,)).double()(X), "MLPConv takes 2 features on axis 1"),
        (lambda: GlobalAvgPool2d()(X[0, 0]), "averages over positions; its input has shape"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(PomonaError, match=message):
        make()
