import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pomona.errors import PomonaError
from pomona.nn.feedforward import FeedForward
from pomona.nn.prelu import LearnableLeaky, PReLU, absorb, learnable_leaky


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_prelu_gradient_wrt_a_matches_autograd():
    y, upstream = draw(4, 3, 5), draw(5, 3, 4).transpose(0, 2)
    prelu = PReLU(3, channel_dim=1).double()
    prelu(y).backward(upstream)
    assert torch.allclose(prelu.slope.grad, (upstream * y.clamp_max(0)).sum((0, 2)))
    weight = torch.full((3,), 0.25, dtype=torch.float64, requires_grad=True)
    F.prelu(y, weight).backward(upstream)
    assert torch.allclose(prelu.slope.grad, weight.grad)


def test_prelu_gradcheck():
    prelu = PReLU(3).double()
    assert torch.autograd.gradcheck(
        lambda y, a: torch.func.functional_call(prelu, {"slope": a}, (y,)),
        (draw(4, 3).requires_grad_(), draw(3).requires_grad_()),
    )


def test_prelu_starts_at_a_quarter_shared_or_per_channel():
    assert PReLU(7).slope.tolist() == [0.25] * 7
    assert PReLU(7, shared=True).slope.tolist() == [0.25]


def test_prelu_slope_has_no_weight_decay():
    prelu = PReLU(2)
    (group,) = prelu.param_groups()
    assert group["weight_decay"] == 0.0
    assert group["params"] == [prelu.slope]


def test_absorb_turns_unit_slope_into_one_linear_map():
    net = nn.Sequential(nn.Linear(4, 6), PReLU(6, init=1.0), nn.Linear(6, 3, bias=False), nn.Tanh()).double()
    small = absorb(net)
    x = draw(5, 4)
    assert [type(m) for m in small] == [nn.Linear, nn.Tanh]
    assert torch.allclose(small(x), net(x))
    assert len(net) == 4


def test_absorb_keeps_what_still_bends():
    net = nn.Sequential(nn.Linear(4, 6), PReLU(6, init=0.5), nn.Linear(6, 3), PReLU(init=0.0))
    x = draw(5, 4).float()
    small = absorb(net)
    assert [type(m) for m in small] == [nn.Linear, PReLU, nn.Linear, nn.ReLU]
    assert torch.allclose(small(x), net(x))
    assert isinstance(absorb(PReLU(3, init=1.0)), nn.Identity)
    assert isinstance(absorb(nn.PReLU(init=1.001), tolerance=0.01), nn.Identity)


def test_prelu_rejects_no_channels():
    with pytest.raises(PomonaError, match="features=0 must be a number above 0"):
        PReLU(0)


def test_learnable_leaky_is_relu_at_slope_0_and_leaves_a_linear_ffn_at_slope_1():
    x, y = draw(5, 4), draw(6, 4)[1:]
    torch.testing.assert_close(LearnableLeaky(0.0)(x), x.relu(), rtol=0, atol=0)
    ffn = FeedForward(4, 8, make_act=lambda features: LearnableLeaky(1.0)).double()
    offset = ffn(torch.zeros_like(x))
    torch.testing.assert_close(ffn(2 * x - 3 * y) - offset, 2 * (ffn(x) - offset) - 3 * (ffn(y) - offset))
    assert torch.autograd.gradcheck(LearnableLeaky().double(), (x.requires_grad_(),))


def test_learnable_leaky_has_a_slope_a_layer_or_one_for_all():
    one, own = learnable_leaky("global", 0.1), learnable_leaky()
    assert one(4) is one(8) and own(4) is not own(4)
    assert float(own(4).slope.detach()) == pytest.approx(0.01)
    with pytest.raises(PomonaError, match="per='head' is not known; choose one of layer, global"):
        learnable_leaky("head")
