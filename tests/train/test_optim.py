import pytest
import torch
from torch import nn

from pomona.train.optim import make_optimizer, parameter_groups
from pomona.train.settings import Training


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.gate = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)

    def param_groups(self):
        return [
            {"params": [self.gate], "lr_scale": 10.0, "weight_decay": 0.5},
            {"params": [self.linear.weight], "lr_scale": 2.0},
        ]


def test_every_trainable_parameter_is_in_exactly_one_group():
    net = nn.Sequential(Gated(), nn.LayerNorm(3), nn.Linear(3, 2))
    held = [id(p) for group in parameter_groups(net, 0.1) for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in net.parameters() if p.requires_grad)


def test_modules_choose_their_scale_and_decay():
    net = nn.Sequential(Gated())
    by_parameter = {id(p): group for group in parameter_groups(net, 0.1) for p in group["params"]}
    gate, weight, bias = (by_parameter[id(p)] for p in (net[0].gate, net[0].linear.weight, net[0].linear.bias))
    assert (gate["lr_scale"], gate["weight_decay"]) == (10.0, 0.5)
    assert (weight["lr_scale"], weight["weight_decay"]) == (2.0, 0.1)
    assert (bias["lr_scale"], bias["weight_decay"]) == (1.0, 0.0)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "nesterov", "rmsprop", "lion"])
def test_each_optimizer_lowers_a_loss(name):
    net = Gated()
    optimizer = make_optimizer(net, Training(optimizer=name, lr=0.01))
    assert {g["lr"] for g in optimizer.param_groups} == {0.1, 0.02, 0.01}
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(20):
        loss = (net.linear(x) * net.gate - 1).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
