import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pomona.errors import PomonaError
from pomona.nn.parameter_free import (
    OPS,
    DeformableMaxPool2d,
    MixedSpatialOp,
    PFAttention,
    PFBottleneck,
    PFConv2d,
    PFInvertedBottleneck,
    Shift2d,
    SpatialOp,
    named_op,
    receptive_field,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_max_pool_bottleneck_has_no_spatial_weights():
    size, mid, norm = 24, 6, 2 * 6  # a convolution is followed by a batch norm of 2 mid parameters
    plain = count(PFBottleneck(size, mid, op="max"))
    assert plain == (size * mid + 2 * mid) + (mid * size + 2 * size)
    assert count(PFBottleneck(size, mid, op="conv")) - norm - plain == 9 * mid**2
    assert count(PFBottleneck(size, mid, op="depthwise")) - norm - plain == 9 * mid
    assert all(count(PFBottleneck(size, mid, op=kind)) == plain for kind in ("avg", "shift", "identity"))


def test_max_commutes_with_increasing_maps_and_average_does_not():
    x, scale = draw(2, 3, 6, 6), torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)[:, None, None]

    def g(x):
        return torch.exp(scale * x) + scale

    top, mean = SpatialOp("max"), SpatialOp("avg")
    torch.testing.assert_close(top(g(x)), g(top(x)), rtol=0, atol=0)
    assert (mean(g(x)) - g(mean(x))).abs().max() > 0.1


def test_only_a_spatial_op_sees_where_pixels_are():
    x, order = draw(2, 8, 5, 5), torch.randperm(25, generator=torch.Generator().manual_seed(1))
    moved = x.flatten(2)[..., order].view_as(x)
    for kind in OPS:
        net = nn.Sequential(*(PFBottleneck(8, 2, op=kind) for _ in range(2))).double().eval()
        difference = (net(x) - net(moved).flatten(2)[..., order.argsort()].view_as(x)).abs().max()
        pooled = (net(x).mean((-2, -1)) - net(moved).mean((-2, -1))).abs().max()
        assert (difference < 1e-12) == (pooled < 1e-12) == (kind == "identity")


@pytest.mark.parametrize("kind", ["max", "conv"])
@pytest.mark.parametrize(("blocks", "k"), [(1, 3), (3, 3), (2, 5)])
def test_receptive_field_of_max_pooling_grows_by_k_minus_1_as_of_convolution(kind, blocks, k):
    net = nn.Sequential(*(SpatialOp(kind, 1, k=k) for _ in range(blocks))).double()
    side = 13
    x = torch.zeros(1, 1, side, side, dtype=torch.float64)
    base = net(x)[0, 0, side // 2, side // 2]
    changed = 0
    for i, j in itertools.product(range(side), range(side)):
        other = x.clone()
        other[0, 0, i, j] = 1
        changed += int(net(other)[0, 0, side // 2, side // 2] != base)
    assert changed == receptive_field(blocks, k) ** 2 == (1 + blocks * (k - 1)) ** 2


@pytest.mark.parametrize("kind", OPS)
@pytest.mark.parametrize(("k", "stride"), [(3, 1), (3, 2), (5, 2)])
def test_every_op_keeps_channels_and_strides_alike(kind, k, stride):
    x = draw(2, 10, 9, 8)
    assert SpatialOp(kind, 10, k=k, stride=stride).double()(x).shape == (2, 10, -(-9 // stride), -(-8 // stride))
    assert SpatialOp(kind, 10, k=k, stride=stride).double()(x[:0]).shape[0] == 0


def test_deformable_pooling_starts_as_max_pooling_and_follows_its_offsets():
    x = draw(2, 3, 7, 6)
    for k, stride in ((3, 1), (3, 2), (5, 1)):
        pool = DeformableMaxPool2d(3, k, stride).double()
        torch.testing.assert_close(pool(x), F.max_pool2d(x, k, stride, k // 2))
    pool = DeformableMaxPool2d(3).double()
    with torch.no_grad():
        pool.offsets.bias.copy_(torch.tensor([1.0, 0.0]).repeat(9))  # one column to the right
    torch.testing.assert_close(pool(x)[..., 1:-2], F.max_pool2d(x, 3, 1, 1)[..., 2:-1])


def test_shift_moves_each_group_its_own_way():
    x = draw(1, 9, 5, 5)
    y = Shift2d()(x)
    assert torch.equal(y[:, 4], x[:, 4])
    assert torch.equal(y[:, 0, 1:, 1:], x[:, 0, :-1, :-1])
    assert (y[:, 0, 0] == 0).all()
    assert torch.equal(y[:, 5, :, :-1], x[:, 5, :, 1:])


def test_attention_takes_the_maximum_of_neighbours_and_leaves_class_and_padding_out():
    x = draw(2, 13, 4)
    y = PFAttention(rows=3, cls=True)(x)
    assert torch.equal(y[:, 0], x[:, 0])
    image = x[:, 1:].mT.unflatten(-1, (3, 4))
    assert torch.equal(y[:, 1:].mT, F.max_pool2d(image, 3, 1, 1).flatten(2))
    assert torch.equal(PFAttention()(x).mT, F.max_pool1d(x.mT, 3, 1, 1))
    mask = torch.arange(13).expand(2, 13) < 9
    short = PFAttention()(x, mask)
    assert torch.equal(short[:, :9], PFAttention()(x[:, :9]))
    assert (short[:, 9:] == 0).all()


def test_mixed_op_is_the_weighted_sum_and_names_its_choice():
    mixed, x = MixedSpatialOp(3).double(), draw(2, 3, 6, 6)
    with torch.no_grad():
        mixed.alpha.copy_(torch.tensor([0.0, 1.0, 3.0, 0.0, 0.0]))
    assert mixed.chosen() == "max3"
    p = mixed.alpha.softmax(0)
    torch.testing.assert_close(mixed(x), sum(w * op(x) for w, op in zip(p, mixed.ops, strict=True)))
    mixed.gumbel = True
    sampled = mixed.train().weights()
    assert float(sampled.sum().detach()) == pytest.approx(1)
    assert not torch.equal(sampled, mixed.weights())
    assert torch.equal(mixed.eval().weights(), p)
    assert named_op("dw5", 4).op.kernel_size == (5, 5)


def test_inverted_bottleneck_and_conv_have_their_parts():
    x = draw(2, 4, 6, 6)
    block = PFInvertedBottleneck(4, 4, expansion=2).double()
    assert count(block) == 4 * 8 + 2 * 8 + 8 * 4 + 2 * 4
    torch.testing.assert_close(block(x), x + block.body(x))
    conv = PFConv2d(4, 5, 3, 2, 1).double()
    torch.testing.assert_close(conv(x), F.conv2d(F.max_pool2d(x, 3, 2, 1), conv[1].weight, conv[1].bias))


@pytest.mark.parametrize("kind", OPS)
def test_gradients(kind):
    op = SpatialOp(kind, 2).double()
    with torch.no_grad():
        for p in op.parameters():
            p.copy_(0.3 * draw(*p.shape, seed=3))
    assert torch.autograd.gradcheck(op, draw(1, 2, 4, 4).requires_grad_())


def test_bad_input():
    with pytest.raises(PomonaError, match="kind='median' is not known"):
        SpatialOp("median")
    with pytest.raises(PomonaError, match="k=2 must be an odd number"):
        SpatialOp("max", k=2)
    with pytest.raises(PomonaError, match="k=4 must be an odd number, such as 5"):
        DeformableMaxPool2d(2, 4)
    with pytest.raises(PomonaError, match="tokens=5 cannot be divided into rows=2"):
        PFAttention(rows=2)(draw(1, 5, 3))
