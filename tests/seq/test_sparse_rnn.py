import pytest
import torch
from torch import nn

from pomona.errors import PomonaError
from pomona.seq.sparse_rnn import LayeredGraph, SparseRNN

nx = pytest.importorskip("networkx")

MODES = {"tanh": "RNN_TANH", "relu": "RNN_RELU", "gru": "GRU", "lstm": "LSTM"}


def complete(layers, size):
    """Every node of a layer with every node of the next, and none else."""
    return nx.Graph(
        (size * k + i, size * (k + 1) + j) for k in range(layers - 1) for i in range(size) for j in range(size)
    )


@pytest.mark.parametrize("graph", [
    nx.watts_strogatz_graph(30, 4, 0.5, seed=0), nx.barabasi_albert_graph(30, 2, seed=0),
    nx.gnp_random_graph(20, 0.2, seed=1),
])  # fmt: skip
def test_layers_exceed_those_of_all_parents(graph):
    layered = LayeredGraph(graph)
    for node, parents in layered.parents.items():
        assert all(parent < node and layered.layer[parent] < layered.layer[node] for parent in parents)
        assert layered.layer[node] == (1 + max(layered.layer[p] for p in parents) if parents else 0)
    directed = nx.DiGraph([(p, node) for node, parents in layered.parents.items() for p in parents])
    assert nx.is_directed_acyclic_graph(directed)
    assert directed.number_of_edges() == graph.number_of_edges()
    assert {n for n in directed if directed.out_degree(n) == 0} <= set(layered.sinks)
    assert sorted(node for nodes in layered.layers for node in nodes) == sorted(graph)


@pytest.mark.parametrize("cell", list(MODES))
def test_complete_layers_equal_the_stacked_dense_network(cell):
    net = SparseRNN(complete(3, 5), 3, 2, cell).double()
    make = {"gru": nn.GRU, "lstm": nn.LSTM}.get(cell, nn.RNN)
    options = {"nonlinearity": cell} if cell in ("tanh", "relu") else {}
    dense = make(3, 5, num_layers=3, batch_first=True, **options).double()
    assert all(layer.mask_ih.all() for layer in net.layers)
    for k, layer in enumerate(net.layers):
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            dense.get_parameter(f"{name}_l{k}").data.copy_(layer.get_parameter(f"{name}_l0"))
    x = torch.randn(4, 7, 3, dtype=torch.float64)
    torch.testing.assert_close(net(x), net.out(dense(x)[0][:, -1]), rtol=1e-6, atol=1e-12)


def test_skipping_edges_reach_later_layers_and_missing_ones_do_not():
    # 0 -> 1 -> 2 and 0 -> 2, with 3 -> 4 apart
    net = SparseRNN(nx.Graph([(0, 1), (1, 2), (0, 2), (3, 4)]), 2, 1, read="all").double()
    assert net.graph.layers == [[0, 3], [1, 4], [2]]
    assert net.sources == [[], [0], [0, 1]]
    assert net.layers[2].mask_ih.tolist() == [[True, False, True, False]]
    x = torch.randn(3, 5, 2, dtype=torch.float64)
    h0, h1 = net.layers[0](x)[0], None
    h1 = net.layers[1](h0)[0]
    h2 = net.layers[2](torch.cat([h0, h1], -1))[0]
    torch.testing.assert_close(net(x), net.out(torch.cat([h0, h1, h2], -1)[:, -1]))


@pytest.mark.parametrize("cell", list(MODES))
def test_missing_edges_have_no_weight_and_no_gradient(cell):
    net = SparseRNN(nx.barabasi_albert_graph(12, 2, seed=3), 3, 2, cell, recurrent="self")
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(8, 6, 3)).square().sum().backward()
        optimizer.step()
    for layer in net.layers:
        for kind in ("ih", "hh"):
            weight, mask = getattr(layer, f"weight_{kind}_l0"), getattr(layer, f"mask_{kind}")
            assert (weight[~mask] == 0).all()
            assert (weight.grad[~mask] == 0).all()
    assert net.out.weight.grad.any()


def test_gradient():
    net = SparseRNN(nx.path_graph(3), 2, 1, "gru").double()
    assert torch.autograd.gradcheck(net, torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True))


def test_reads_sinks_or_all():
    graph = nx.star_graph(4)  # node 0 is everyone's parent
    assert SparseRNN(graph, 2, 1).out.in_features == 4
    assert SparseRNN(graph, 2, 1, read="all").out.in_features == 5
    assert SparseRNN(graph, 2, 1).connections == (2 + 1) + (4 + 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SparseRNN(nx.Graph(), 2, 1), "graph has no node"),
        (lambda: SparseRNN(nx.path_graph(2), 2, 1, "tan"), "cell='tan' is not known; did you mean tanh"),
        (lambda: SparseRNN(nx.path_graph(2), 2, 1)(torch.randn(3, 4, 5)), r"\(3, 4, 5\) must be \(n, time, n_in=2\)"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(PomonaError, match=message):
        call()
