import pytest
import torch
from torch import nn

from pomona.errors import PomonaError
from pomona.nn.kan import KANLayer
from pomona.nn.norm import RMSNorm
from pomona.nn.pool import GatedPool2d
from pomona.nn.structured import LowRankLinear
from pomona.nn.swap import swap


def mlp():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.LayerNorm(16), nn.Sequential(nn.Linear(16, 16), nn.ReLU()))


def test_every_layer_of_a_slot_is_replaced_and_the_old_net_kept():
    net = mlp().double().eval()
    new = swap(net, "linear", "kan:grid=3").net
    assert isinstance(new[0], KANLayer) and isinstance(new[3][0], KANLayer)
    assert isinstance(net[0], nn.Linear)
    assert new(torch.randn(2, 6, dtype=torch.float64)).dtype == torch.float64
    assert not new[0].training
    assert isinstance(swap(net, "norm", "rms").net[2], RMSNorm)
    assert type(swap(net, "act", "gelu").net[1]).__name__ == "GELU"


def test_costs_before_and_after_are_in_the_table():
    swapped = swap(mlp(), "linear", "low_rank:rank=2", example=torch.zeros(3, 6))
    first, second = swapped.table
    assert (first.name, first.old, first.new) == ("0", "Linear", "LowRankLinear")
    assert first.parameters == (6 * 16 + 16, 2 * (6 + 16) + 16)
    assert first.flops == (2 * 6 * 16, 2 * 2 * (6 + 16))
    assert second.name == "3.0"
    assert str(swapped).splitlines()[-1].split()[:2] == ["all", "384"]


def test_places_are_chosen_by_class_pattern_or_function():
    def low_rank(old):
        return LowRankLinear(old.in_features, old.out_features, 2)

    for where in ("3.*", lambda name, module: name == "3.0" and isinstance(module, nn.Linear)):
        new = swap(mlp(), where, lambda old: low_rank(old) if isinstance(old, nn.Linear) else None).net
        assert isinstance(new[0], nn.Linear) and isinstance(new[3][0], LowRankLinear)
    assert isinstance(swap(nn.Linear(3, 4), nn.Linear, low_rank).net, LowRankLinear)


def test_a_shared_layer_stays_shared():
    layer = nn.Linear(4, 4)
    new = swap(nn.Sequential(layer, nn.ReLU(), layer), nn.Linear, lambda old: nn.Linear(4, 4, bias=False)).net
    assert new[0] is new[2]


def test_convolutions_and_poolings_keep_their_geometry():
    net = nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.MaxPool2d(2))
    new = swap(swap(net, "conv", "quadratic").net, "pool", "gated").net
    assert isinstance(new[2], GatedPool2d)
    x = torch.randn(2, 2, 8, 8)
    assert new(x).shape == net(x).shape


def test_bad_requests_are_named():
    with pytest.raises(PomonaError, match="no layer of Sequential was replaced; it holds LayerNorm, Linear"):
        swap(mlp(), "pool", "gated")
    with pytest.raises(PomonaError, match="linear='kann' is not known; did you mean kan"):
        swap(mlp(), "linear", "kann")
    with pytest.raises(PomonaError, match="where, with make='kan' given by name 'blocks' is not known"):
        swap(mlp(), "blocks", "kan")
    with pytest.raises(PomonaError, match="fails on the example"):
        swap(mlp(), nn.LayerNorm, lambda old: nn.Linear(16, 5), example=torch.zeros(2, 6))
