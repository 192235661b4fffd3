import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pomona.errors import PomonaError
from pomona.train.local_rule import LocalRule, blocks_of
from pomona.train.rule import split_tensors


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.blocks = nn.Sequential(
            nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        )
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))


class MeanSquare(LocalRule):
    """Each block lowers its own mean squared output."""

    def losses(self, tensors, batch, noise):
        outputs, extra = self.run(tensors, self.cut.stem(self.net, tensors, batch[0])[0])
        return [out.square().mean() + extra * (i == 0) for i, out in enumerate(outputs)]


X, Y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


def test_a_backbone_is_cut_at_its_stem_blocks_and_head():
    cut = blocks_of(Backbone())
    assert (cut.stem.names, cut.head.names) == (("stem",), ("head",))
    assert [block.names for block in cut.blocks] == [("blocks.0",), ("blocks.1",)]


def test_a_sequential_is_cut_before_each_layer_with_weights():
    layers = (nn.Flatten(), nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))
    cut = blocks_of(nn.Sequential(*layers))
    assert cut.stem.names == ("0",) and cut.head.names == ("6",)
    assert [block.names for block in cut.blocks] == [("1", "2", "3"), ("4", "5")]
    headless = blocks_of(nn.Sequential(*layers[:-1]))
    assert len(headless.blocks) == 2 and not headless.head.names


def test_the_cut_pieces_run_to_the_networks_output():
    net = Backbone()
    tensors = split_tensors(net)[0]
    h = X
    cut = blocks_of(net)
    for piece in (cut.stem, *cut.blocks, cut.head):
        h, extra = piece(net, tensors, h)
        assert extra == 0
    torch.testing.assert_close(h, net(X).detach())


def test_named_blocks_are_taken_as_they_are():
    assert [b.names for b in blocks_of(Backbone(), ["blocks.1", "head"]).blocks] == [("blocks.1",), ("head",)]
    with pytest.raises(PomonaError, match="'tail', which is not a submodule"):
        blocks_of(Backbone(), ["tail"])


@pytest.mark.parametrize("net", [nn.Linear(3, 2), nn.Sequential(nn.ReLU()), nn.Identity()])
def test_networks_without_blocks_are_refused(net):
    with pytest.raises(PomonaError, match="has no blocks to learn locally"):
        blocks_of(net)


def test_each_block_gets_the_gradient_of_its_own_loss_alone():
    net, rule = Backbone().double(), MeanSquare()
    x = X.double()
    rule.init(net, F.cross_entropy, (x, Y))
    update = rule.grads(*split_tensors(net), {}, (x, Y), torch.zeros(8, 0))
    stem = net.stem(x)
    first = net.blocks[0](stem)
    second = net.blocks[1](first.detach())
    own = torch.autograd.grad(first.square().mean(), [*net.stem.parameters(), *net.blocks[0].parameters()])
    own += torch.autograd.grad(second.square().mean(), list(net.blocks[1].parameters()))
    names = [name for name, _ in net.named_parameters() if not name.startswith("head")]
    assert list(update.grads) == names, "the head, which no loss touches, is frozen"
    torch.testing.assert_close([update.grads[name] for name in names], list(own))
    torch.testing.assert_close(update.loss, (first.square().mean() + second.square().mean()).detach())


class Decayed(nn.Linear):
    def aux_loss(self):
        return self.weight.square().sum()


def test_auxiliary_losses_count():
    net, rule = nn.Sequential(Decayed(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 3)), MeanSquare()
    rule.init(net, F.cross_entropy, (X, Y))
    update = rule.grads(*split_tensors(net), {}, (X, Y), torch.zeros(8, 0))
    loss = net[:2](X).square().mean() + net[0].weight.square().sum()
    torch.testing.assert_close(update.grads["0.weight"], torch.autograd.grad(loss, net[0].weight)[0])
