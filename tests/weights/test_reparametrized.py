import copy

import pytest
import torch
from torch import nn

from pomona.errors import PomonaError
from pomona.weights.reparametrized import Reparametrized
from pomona.weights.space import WeightSpace


def make(include="*", dtype=torch.float64):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).to(dtype)
    space = WeightSpace(net, include)
    return net, Reparametrized(net, nn.Linear(2, space.numel).to(dtype), space)


def test_only_the_generator_has_parameters():
    _, wrapped = make()
    assert {name.split(".")[0] for name, _ in wrapped.named_parameters()} == {"generator"}
    _, partial = make("*.weight")
    names = {name for name, _ in partial.named_parameters()}
    assert names == {"generator.weight", "generator.bias", "net.0.bias", "net.2.bias"}


def test_materialized_network_is_plain_and_gives_the_same_output():
    net, wrapped = make("*.weight")
    c = torch.randn(2, dtype=torch.float64)
    x = torch.randn(6, 3, dtype=torch.float64)
    plain = wrapped.materialize(c)
    assert torch.equal(plain(x), wrapped(x, c))
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in net.named_parameters()]
    assert list(plain.state_dict()) == list(net.state_dict())


def test_each_example_meets_its_own_network():
    _, wrapped = make()
    c = torch.randn(6, 2, dtype=torch.float64)
    x = torch.randn(6, 3, dtype=torch.float64)
    out = wrapped(x, c)
    cross = wrapped(x, c, batch="cross")
    for i in range(6):
        torch.testing.assert_close(out[i], wrapped(x[i : i + 1], c[i])[0])
        torch.testing.assert_close(cross[i], wrapped(x, c[i]))


def test_copy_and_state_dict_round_trip():
    _, wrapped = make("*.weight")
    c, x = torch.randn(2, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    twin = copy.deepcopy(wrapped)
    assert twin.space.net is twin.net
    nn.init.normal_(twin.generator.weight)
    assert not torch.allclose(twin(x, c), wrapped(x, c))
    twin.load_state_dict(wrapped.state_dict())
    assert torch.equal(twin(x, c), wrapped(x, c))
    assert twin.float()(x.float(), c.float()).dtype == torch.float32


def test_the_given_network_is_untouched():
    net, wrapped = make()
    assert len(list(net.parameters())) == 4
    wrapped(torch.randn(2, 3, dtype=torch.float64), torch.randn(2, dtype=torch.float64)).sum().backward()
    assert all(p.grad is None for p in net.parameters())
    assert wrapped.generator.weight.grad is not None


def test_gradient_check():
    _, wrapped = make()
    x = torch.randn(5, 3, dtype=torch.float64)
    c = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c: wrapped(x, c), (c,))


def test_tied_parameters_are_refused():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    with pytest.raises(PomonaError, match="is tied to '1.weight'"):
        Reparametrized(net, nn.Identity())
