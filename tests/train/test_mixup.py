import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pomona.errors import PomonaError
from pomona.train.mixup import Mixup
from pomona.train.rule import Backprop, Rule, split_tensors

X, Y = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.arange(8) % 3
NOISE = torch.rand(8, 2, generator=torch.Generator().manual_seed(1))


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 3).double()


def bound(net: nn.Module, **options: float) -> Mixup:
    rule = Mixup(**options)
    rule.init(net, F.cross_entropy, (X, Y))
    return rule


def test_gradient_is_that_of_the_blended_batch():
    net = make()
    rule = bound(net)
    update = rule.grads(*split_tensors(net), {}, (X, Y), NOISE)
    other = NOISE[:, 0].argsort()
    k = rule.quantiles[int(NOISE[0, 1] * 4096)]
    output = net(k * X + (1 - k) * X[other])
    loss = k * F.cross_entropy(output, Y) + (1 - k) * F.cross_entropy(output, Y[other])
    loss.backward()
    torch.testing.assert_close(update.loss, loss.detach())
    torch.testing.assert_close(update.grads["weight"], net.weight.grad)
    assert isinstance(rule, Rule)


def test_without_mixing_it_is_backpropagation():
    net, plain = make(), Backprop()
    plain.init(net, F.cross_entropy, (X, Y))
    still = NOISE.clone()
    still[:, 0] = torch.arange(8) / 8  # the same order
    left, right = (r.grads(*split_tensors(net), {}, (X, Y), still) for r in (bound(net), plain))
    torch.testing.assert_close(left.grads, right.grads)


def test_shares_are_distributed_as_beta():
    quantiles = Mixup(0.8).quantiles
    assert float(quantiles.mean()) == pytest.approx(0.5, abs=1e-6)
    assert float(quantiles.var()) == pytest.approx(0.25 / (2 * 0.8 + 1), rel=1e-3)


def test_says_what_is_wrong():
    with pytest.raises(PomonaError, match=r"inputs of torch.int64 cannot be mixed"):
        Mixup().init(make(), F.cross_entropy, (Y, Y))
    with pytest.raises(PomonaError, match="alpha=0 must be a number above 0"):
        Mixup(0)
