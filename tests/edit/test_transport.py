import copy
import dataclasses

import pytest
import torch
from torch import nn

from pomona.edit.masks import Masks, prune
from pomona.edit.operations import duplicate, grow, mask, permute, take
from pomona.edit.transport import transport, transport_masks
from pomona.errors import PomonaError
from tests.edit.handmade import attention, convnet, mlp

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


def steps(net, optimizer, x, count):
    for _ in range(count):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
    return net


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("make", [mlp, convnet, attention])
def test_training_goes_on_as_if_the_units_had_always_lain_so(name, make):
    if (name, make) == ("adafactor", attention):
        pytest.skip("the gradient of a key's bias is rounding alone, which this optimiser scales up")
    net, axes = make()
    x = axes.example[0]
    optimizer = OPTIMIZERS[name](net.parameters())
    steps(net, optimizer, x, 2)
    orders = {one.name: one.random_order(torch.Generator().manual_seed(0)) for one in axes}
    edit = permute(net, axes, orders)
    moved = transport(optimizer, net, edit)
    assert type(moved) is type(optimizer) and moved.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    steps(edit.net, moved, x, 2)
    wanted = permute(steps(net, optimizer, x, 2), axes, orders).net.state_dict()
    for key, value in edit.net.state_dict().items():
        torch.testing.assert_close(value, wanted[key], rtol=0, atol=1e-9)


def test_copies_get_copies_and_new_entries_begin_at_zero():
    net, axes = mlp()
    optimizer = torch.optim.Adam(net.parameters())
    steps(net, optimizer, axes.example[0], 2)
    for edit, last in ((duplicate(net, axes, {"0.weight": [3]}), 3), (grow(net, axes, {"0.weight": 1}), None)):
        moved = transport(optimizer, net, edit)
        before, after = optimizer.state[net[0].weight], moved.state[edit.net[0].weight]
        assert torch.equal(after["exp_avg_sq"][:8], before["exp_avg_sq"]) and after["step"] == 2
        wanted = torch.zeros(5).double() if last is None else before["exp_avg"][last]
        assert torch.equal(after["exp_avg"][8], wanted)
        assert after["step"] is not before["step"]
        steps(edit.net, moved, axes.example[0], 1)


def test_groups_keep_their_settings_and_gates_join_the_last():
    net, axes = mlp()
    groups = [{"params": net[0].parameters(), "lr": 0.5}, {"params": [*net[2].parameters(), *net[4].parameters()]}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    moved = transport(optimizer, net, mask(net, axes, {"0.weight": torch.ones(8)}, learnable=True))
    assert [(len(group["params"]), group["lr"]) for group in moved.param_groups] == [(2, 0.5), (5, 0.1)]
    with pytest.raises(PomonaError, match="a parameter of shape \\(3, 3\\) that the network has not"):
        transport(torch.optim.SGD(nn.Linear(3, 3).parameters()), net, take(net, axes))


def test_edits_one_after_another_are_one_edit():
    net, axes = mlp()
    optimizer = torch.optim.Adam(net.parameters())
    steps(net, optimizer, axes.example[0], 2)
    first = permute(net, axes, {"0.weight": [7, 6, 5, 4, 3, 2, 1, 0]})
    second = take(first.net, dataclasses.replace(axes, net=first.net), 0.5)
    both = first.then(second)
    left = transport(optimizer, net, both)
    right = transport(transport(optimizer, net, first), first.net, second)
    for parameter in second.net.parameters():
        assert torch.equal(left.state[parameter]["exp_avg"], right.state[parameter]["exp_avg"])


def test_masks_follow_and_new_entries_are_kept():
    net, axes = mlp()
    masks = prune(copy.deepcopy(net), density=0.3)
    edit = take(net, axes, {"0.weight": [5, 2]})
    moved = transport_masks(masks, edit)
    assert torch.equal(moved["0.weight"], masks.state()["0.weight"][[5, 2]])
    assert torch.equal(moved["2.weight"], masks.state()["2.weight"][:, [5, 2]])
    assert torch.equal(Masks(edit.net, moved).state()["4.weight"], masks.state()["4.weight"])
    grown = transport_masks(masks, grow(net, axes, {"0.weight": 1}))
    assert grown["0.weight"][8].all() and grown["2.weight"][:, 8].all()
    with pytest.raises(PomonaError, match="mask of '0.weight' would have shape"):
        transport_masks({"0.weight": torch.ones(8, 4)}, edit)
