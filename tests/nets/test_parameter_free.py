import pytest
import torch
from torch import nn

from pomona.errors import PomonaError
from pomona.nets.parameter_free import PFResNet, PFViT, replace_spatial
from pomona.nn.mixing import AttentionMixer
from pomona.nn.parameter_free import PFAttention, SpatialOp


def kinds(net):
    return [m.kind for m in net.modules() if isinstance(m, SpatialOp)]


def test_hybrid_keeps_convolutions_where_it_downsamples():
    x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    hybrid = PFResNet(3, 5, layers=(2, 2), width=4)
    assert kinds(hybrid) == ["max", "max", "conv", "max"]
    assert hybrid(x).shape == (2, 5)
    assert kinds(PFResNet(3, 5, layers=(2, 2), width=4, downsample=None)) == ["max"] * 4
    assert kinds(PFResNet(3, 5, layers=(1, 2), width=4, ops=["avg", "shift"])) == ["avg", "conv", "shift"]
    assert PFResNet(3, 5, layers=(1, 1), width=4, stem="large")(x).shape == (2, 5)
    with pytest.raises(PomonaError, match="stem='tiny' is not known"):
        PFResNet(3, 5, stem="tiny")
    with pytest.raises(PomonaError, match="ops names 1 operations; layers has 2 stages"):
        PFResNet(3, 5, layers=(1, 1), ops=["max"])


def test_vit_has_max_pooling_in_the_named_layers():
    net = PFViT(8, 2, 1, 3, depth=3, op_layers=(0, 2), dim=8)
    found = [type(block.mixer) for block in net.blocks]
    assert found == [PFAttention, AttentionMixer, PFAttention]
    assert net(torch.randn(2, 1, 8, 8)).shape == (2, 3)
    with pytest.raises(PomonaError, match="must be indices below depth=2"):
        PFViT(8, 2, 1, 3, depth=2, op_layers=(2,))


def test_replaces_convolutions_before_a_pointwise_one():
    net = PFResNet(3, 5, layers=(2, 2), width=4, ops="conv")
    replaced = replace_spatial(net)
    assert len(replaced.table) == 4
    assert not [m for m in replaced.net.blocks.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    x = torch.randn(2, 3, 12, 12)
    assert replaced.net(x).shape == net(x).shape
    one = replace_spatial(net, [replaced.table[1].name], "avg")
    assert len(one.table) == 1
    with pytest.raises(PomonaError, match="which='stem.0' cannot be replaced; those that can are"):
        replace_spatial(net, ["stem.0"])
