import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pomona.errors import PomonaError
from pomona.nets.build import build
from pomona.nn.phc_conv import PHConv1d, PHConv2d, SplitBN, ph_net, ph_vgg
from pomona.nn.phm import PHMLinear


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def conv(*sizes, kind=PHConv2d, **options):
    return kind(*sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(1), **options)


def test_one_pixel_is_a_phm_layer_at_each():
    layer, linear = conv(6, 12, 1, 3), PHMLinear(6, 12, 3, dtype=torch.float64)
    with torch.no_grad():
        linear.rules.copy_(layer.linear.rules)
        linear.blocks.copy_(layer.linear.blocks)
    x = draw(2, 6, 4, 5)
    torch.testing.assert_close(layer(x), linear(x.movedim(1, -1)).movedim(-1, 1))


def test_quaternion_rules_give_the_quaternion_convolution():
    layer = conv(8, 12, 3, 4, padding=1, bias=False, learn_rules=False, rules="quaternion")
    r, i, j, k = layer.linear.blocks.unflatten(-1, (2, 3, 3))
    a, b, c, d = draw(2, 8, 6, 6).chunk(4, 1)

    def mul(x, kernel):
        return F.conv2d(x, kernel, padding=1)

    expected = [
        mul(a, r) - mul(b, i) - mul(c, j) - mul(d, k),
        mul(a, i) + mul(b, r) - mul(c, k) + mul(d, j),
        mul(a, j) + mul(b, k) + mul(c, r) - mul(d, i),
        mul(a, k) - mul(b, j) + mul(c, i) + mul(d, r),
    ]
    torch.testing.assert_close(layer(torch.cat([a, b, c, d], 1)), torch.cat(expected, 1))
    assert layer.n_params() == 8 * 12 * 9 // 4


@pytest.mark.parametrize("kind, shape", [(PHConv1d, (2, 6, 11)), (PHConv2d, (2, 6, 11, 9))])
def test_fold_is_a_plain_convolution(kind, shape):
    layer = conv(6, 4, 3, 2, 2, 1, 2, kind=kind)
    nn.init.normal_(layer.bias)
    plain = layer.fold()
    assert type(plain) is {PHConv1d: nn.Conv1d, PHConv2d: nn.Conv2d}[kind]
    torch.testing.assert_close(plain(draw(*shape)), layer(draw(*shape)))
    torch.testing.assert_close(conv(6, 4, 3, 2, kind=kind).project_(layer.weight()).weight(), layer.weight())


def test_parameter_count():
    assert conv(6, 12, 3, 3).n_params() == 3**3 + 6 * 12 * 9 // 3 + 12
    assert conv(6, 12, 5, 2, kind=PHConv1d, bias=False).n_params() == 2**3 + 6 * 12 * 5 // 2


def test_one_block_with_unit_rule_is_a_convolution():
    layer, plain = conv(3, 5, (3, 1), 1, rules=torch.ones(1, 1, 1)), nn.Conv2d(3, 5, (3, 1)).double()
    with torch.no_grad():
        layer.linear.blocks.copy_(plain.weight.flatten(1)[None])
        layer.bias.copy_(plain.bias)
    torch.testing.assert_close(layer(draw(2, 3, 6, 6)), plain(draw(2, 3, 6, 6)))


@pytest.mark.parametrize("sizes", [(16, 32), (7, 30)])
def test_kernel_is_a_kronecker_product_of_unit_gain(sizes):
    layer = conv(*sizes, 3, 4, pad=True)
    assert float(layer.weight().detach().square().sum()) == pytest.approx(sizes[1], rel=0.1)
    rules, blocks = layer.linear.rules, layer.linear.blocks.flatten(1)
    whole = sum(torch.kron(a, s.view(8, -1)) for a, s in zip(rules, blocks, strict=True))
    torch.testing.assert_close(layer.weight(), whole.unflatten(1, (-1, 3, 3))[: sizes[1], : sizes[0]])


def test_padding_adds_channels_of_zeros():
    layer = conv(3, 5, 3, 2, pad=True)
    nn.init.ones_(layer.bias)
    whole = conv(4, 6, 3, 2, bias=False)
    whole.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "bias"})
    x = draw(2, 3, 6, 6)
    torch.testing.assert_close(layer(x), whole(F.pad(x, (0, 0, 0, 0, 0, 1)))[:, :5] + 1)


def test_networks_become_hypercomplex():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 10)
    ).double()
    x = draw(2, 3, 5, 5)
    new = ph_net(net, 2)
    assert [c.name for c in new.table] == ["2", "4"] and new.left == ["0"]
    padded = ph_net(net, 2, pad=True, shared=True, split_bn=True)
    assert padded.left == [] and isinstance(padded.net[1], SplitBN)
    assert len({id(m.rules) for m in padded.net.modules() if isinstance(m, PHMLinear)}) == 1
    assert padded.net(x).shape == (2, 10)
    dense = nn.Sequential(new.net[2].fold(), nn.Flatten(), new.net[4].fold())
    image = draw(2, 8, 3, 3)
    torch.testing.assert_close(ph_net(dense, 2, project=True).net(image), dense(image))
    with pytest.raises(PomonaError, match="no layer of Linear was replaced"):
        ph_net(nn.Linear(3, 3), 2)


def test_provided_networks():
    image = ph_vgg(3, 10, 3, ((12, 12), (24,)))
    assert image.net(torch.zeros(2, 3, 8, 8)).shape == (2, 10) and image.left == ["12"]
    assert image.net[12] is image.net[-1]
    series = ph_vgg(6, 4, 2, ((12,), (24,)), dims=1, kernel_size=5)
    assert series.net(torch.zeros(2, 6, 20)).shape == (2, 4)
    assert sum(isinstance(m, PHConv1d) for m in series.net) == 2

    class Sized:
        from pomona.nets.specs import Inputs, Outputs

        inputs, outputs = Inputs("image", (1, 8, 8)), Outputs("classes", 3)

    resnet = build("resnet conv=phc:n=4 width=8 depth=2", Sized())
    kinds = [type(m) for m in resnet.modules() if isinstance(m, (PHConv2d, nn.Conv2d))]
    assert kinds == [nn.Conv2d, *[PHConv2d] * 5]  # the first one sees a gray image


def test_split_batch_norm():
    x = draw(50, 6, 3, 3) * torch.tensor([1.0, 2, 3, 4, 5, 6]).view(-1, 1, 1) + 1
    layer = SplitBN(6, 2, momentum=1.0).double()
    y = layer(x).detach()
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(6, dtype=torch.float64), atol=1e-9, rtol=0)
    var = y.var((0, 2, 3), correction=0).view(2, 3)
    torch.testing.assert_close(var.mean(0), torch.ones(3, dtype=torch.float64), atol=1e-4, rtol=0)
    assert var[1, 0] / var[0, 0] > 10  # directions are kept
    torch.testing.assert_close(layer.eval()(x), y, atol=1e-2, rtol=0)
    real = nn.BatchNorm2d(6).double()
    torch.testing.assert_close(SplitBN(6, 1).double()(x), real(x))


def test_gradients():
    layer, x = conv(4, 4, 3, 2, kind=PHConv1d), draw(2, 4, 6).requires_grad_()

    def run(x, rules, blocks):
        return torch.func.functional_call(layer, {"linear.rules": rules, "linear.blocks": blocks}, (x,))

    assert torch.autograd.gradcheck(run, (x, layer.linear.rules, layer.linear.blocks))


def test_bad_input():
    with pytest.raises(PomonaError, match="in_channels=3 is not divisible by n=2; choose another n or set pad=True"):
        PHConv2d(3, 8, 3, 2)
    with pytest.raises(PomonaError, match="PHConv2d takes 4 features on axis -3"):
        PHConv2d(4, 8, 3, 2)(torch.zeros(2, 6, 5, 5))
