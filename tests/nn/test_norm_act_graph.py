import pytest
import torch
from torch.autograd import gradcheck

from pomona.errors import PomonaError
from pomona.nn.evonorm import EvoNormB0, EvoNormS0
from pomona.nn.norm_act_graph import AGGREGATES, ELEMENTWISE, GraphNormAct, Node, formula, used

X = torch.randn(4, 6, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
B0 = (
    *(Node("std_bhw", 0, 0), Node("mul", 4, 0), Node("std_hw", 0, 0), Node("tanh", 6, 0)),
    *(Node("add", 6, 7), Node("max", 5, 9), Node("div", 0, 10)),
)
S0 = (Node("mul", 4, 0), Node("sigmoid", 5, 0), Node("mul", 0, 6), Node("std_ghw", 0, 0), Node("div", 7, 8))


def test_graphs_of_evonorm_equal_evonorm_in_training_and_evaluation():
    for genome, kind in ((B0, EvoNormB0), (S0, EvoNormS0)):
        graph, layer = GraphNormAct(genome, 6, 2, eps=1e-12).double(), kind(6, 2, eps=1e-12).double()
        torch.testing.assert_close(graph(X), layer(X))
        graph.eval(), layer.eval()
        torch.testing.assert_close(graph(X), layer(X))
    assert formula(B0) == "div(x, max(std_bhw(x), add(mul(v1, x), std_hw(x))))"
    assert used(B0) == {0, 4, 5, 6, 7, 9, 10, 11}


@pytest.mark.parametrize("op", [*ELEMENTWISE, *AGGREGATES])
@pytest.mark.parametrize("dims", [0, 2])
def test_each_operation_keeps_the_shape_and_has_a_gradient(op, dims):
    layer = GraphNormAct((Node(op, 0, 4),), 6, dims).double()
    x = X[:2, :, :2, :2] if dims else X[:2, :, 0, 0]
    layer(x)
    layer.eval()
    assert layer(x).shape == x.shape
    assert gradcheck(layer, (x.clone().requires_grad_(),))
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]))


def test_bad_input():
    with pytest.raises(PomonaError, match="op='ad' is not known; did you mean add"):
        GraphNormAct((Node("ad", 0, 0),), 6)
    with pytest.raises(PomonaError, match="node 5 takes 0 and 5; it can take the nodes 0 to 4 only"):
        GraphNormAct((Node("add", 0, 5),), 6)
