"""The graph of a network's parameters: complete, invertible, and permuted where the network is."""

import pytest
import torch

from pomona.errors import PomonaError
from pomona.trace import axes, neuron_graph
from pomona.trace.check import permuted
from tests.trace import models as zoo


@pytest.mark.parametrize("edges", ["vector", "multi"])
@pytest.mark.parametrize("bias", ["node", "edge"])
@pytest.mark.parametrize("name", ["mlp", "resnet20", "vit", "grouped", "lstm", "mixer", "conv3d"])
def test_write_back_is_the_inverse(name, edges, bias):
    net, example = zoo.make(name)
    graph = neuron_graph(net, *example, edges=edges, bias=bias)
    back = graph.write_back()
    assert set(back) == dict(net.named_parameters()).keys()
    assert all(torch.equal(back[k], p) for k, p in net.named_parameters())
    refs = torch.cat([graph.node_ref[graph.node_ref >= 0], graph.edge_ref[graph.edge_ref >= 0]])
    assert torch.equal(refs.sort().values, torch.arange(sum(p.numel() for p in net.parameters())))


@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet20", "lstm"])
def test_permuting_units_permutes_nodes(name):
    """A node feature that a message-passing network would compute is the same multiset before and after."""
    net, example = zoo.make(name)
    found = axes(net, *example)
    orders = {a.name: a.random_order(torch.Generator().manual_seed(1)) for a in found}

    def messages(graph):
        sent = graph.edge_attr.double().sin() * (1 + graph.edge_type[:, None])
        x = torch.cat([graph.x.double(), torch.zeros(len(graph.x), sent.shape[1])], 1)
        state = x.cos().sum(1)
        for _ in range(2):
            heard = torch.zeros(len(x)).double()
            heard.index_add_(0, graph.edge_index[1], sent.sum(1) * state[graph.edge_index[0]])
            state = torch.tanh(state + heard)
        return state

    before = messages(neuron_graph(found))
    state = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    with torch.no_grad():
        for key, tensor in permuted(state, found, orders).items():
            state[key].copy_(tensor.clone())
    after = messages(neuron_graph(axes(net, *example)))
    assert not torch.allclose(before, after)
    torch.testing.assert_close(before.sort().values, after.sort().values)


def test_mlp_has_one_node_per_unit():
    net, example = zoo.make("mlp")
    graph = neuron_graph(net, *example)
    assert len(graph.x) == 6 + 16 + 12 + 3 + 1
    assert graph.edge_index.shape == (2, 6 * 16 + 16 * 12 + 12 * 3)
    assert int(graph.fixed.sum()) == 6 + 3 + 1


def test_unknown_options():
    net, example = zoo.make("mlp")
    with pytest.raises(PomonaError, match="edges='matrix' is not known"):
        neuron_graph(net, *example, edges="matrix")
