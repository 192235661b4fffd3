import torch
import torch.nn.functional as F
from torch import nn

from pomona.nn.activation import act
from pomona.nn.layer_order import layer_neighbours, residual_branches
from pomona.nn.norm import LayerNorm


def kinds(net):
    return {
        name: tuple(None if m is None else type(m).__name__ for m in (near.before, near.after))
        for name, near in layer_neighbours(net).items()
    }


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 2)
        self.first = nn.Conv2d(1, 4, 3)

    def forward(self, x):
        y = F.adaptive_avg_pool2d(F.leaky_relu(self.first(x), 0.3), 1).flatten(1)
        return self.last(y)


class OnData(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.act, self.b = nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)

    def forward(self, x):
        return self.b(self.act(self.a(x))) if x.sum() > 0 else self.b(x)


class Residual(nn.Module):
    def __init__(self, width, projected=False):
        super().__init__()
        self.one, self.two, self.act = nn.Linear(width, width), nn.Linear(width, width), nn.ReLU()
        self.skip = nn.Linear(width, width) if projected else nn.Identity()

    def forward(self, x):
        return self.skip(x) + self.two(self.act(self.one(x)))


def test_chain_with_pooling_dropout_and_norms():
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(64, 8),
        act("gelu"),
        LayerNorm(8),
        nn.Linear(8, 2),
    )
    # a norm passes the view forward to the activation, but hides from the next layer what came before it
    assert kinds(net) == {"0": (None, "ReLU"), "6": ("ReLU", "GELU"), "9": (None, None)}


def test_order_of_the_graph_not_of_the_attributes():
    assert kinds(Functional()) == {"first": (None, "LeakyReLU"), "last": ("LeakyReLU", None)}
    assert layer_neighbours(Functional())["last"].before.negative_slope == 0.3


def test_module_order_where_tracing_fails():
    assert kinds(OnData()) == {"a": (None, "Tanh"), "b": ("Tanh", None)}
    assert residual_branches(OnData()) == []


def test_single_layer():
    assert kinds(nn.Linear(2, 2)) == {"": (None, None)}


def test_residual_branches_are_found_with_and_without_projection():
    net = nn.Sequential(nn.Linear(4, 4), Residual(4), Residual(4, projected=True), nn.Linear(4, 2))
    assert residual_branches(net) == [["1.one", "1.two"], ["2.one", "2.two"]]
    assert residual_branches(nn.Sequential(nn.Linear(4, 4), nn.ReLU())) == []
    assert net(torch.randn(2, 4)).shape == (2, 2)
