import pytest
import torch
from torch import nn

from pomona.errors import PomonaError
from pomona.weights.space import WeightSpace


def small_net(dtype=torch.float64):
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def test_flatten_undoes_unflatten_with_any_leading_dimensions():
    space = WeightSpace(small_net())
    vec = torch.randn(2, 4, space.numel, dtype=torch.float64)
    parts = space.unflatten(vec)
    assert parts["0.weight"].shape == (2, 4, 5, 3)
    assert torch.equal(space.flatten(parts), vec)
    assert space.numel == sum(p.numel() for p in space.net.parameters())


def test_call_with_the_read_weights_is_the_network_itself():
    net = small_net().eval()
    space = WeightSpace(net)
    x = torch.randn(7, 3, dtype=torch.float64)
    assert torch.equal(space.call(space.read(), x), net(x))
    before = net(x)
    vec = space.sample_init(1, seed=3)[0]
    assert not torch.allclose(space.call(vec, x), before)
    assert torch.equal(net(x), before)
    space.write(vec)
    assert torch.equal(space.read(), vec)


def test_batched_calls_equal_the_loop_over_networks():
    net = small_net().eval()
    space = WeightSpace(net)
    vecs = space.sample_init(4, seed=0).view(2, 2, -1)
    x = torch.randn(7, 3, dtype=torch.float64)
    cross = space.call(vecs, x, batch="cross")
    assert cross.shape == (2, 2, 7, 2)
    xs = torch.randn(2, 2, 6, 3, dtype=torch.float64)
    pair = space.call(vecs, xs, batch="pair")
    for i in range(2):
        for j in range(2):
            torch.testing.assert_close(cross[i, j], space.call(vecs[i, j], x))
            torch.testing.assert_close(pair[i, j], space.call(vecs[i, j], xs[i, j]))


def test_sample_init_is_seeded_and_leaves_the_global_generator_alone():
    space = WeightSpace(nn.Linear(100, 200))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    a, b = space.sample_init(3, seed=1), space.sample_init(3, seed=1)
    assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(a[0], a[1])
    weight = space.unflatten(a)["weight"]
    assert weight.abs().max() <= 0.1  # uniform in +-1/sqrt(fan_in)
    assert abs(weight.std().item() - 0.1 / 3**0.5) < 1e-3


def test_sample_init_asks_for_reset_when_a_module_has_none():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    with pytest.raises(PomonaError, match="has no reset_parameters; pass reset="):
        WeightSpace(Scale()).sample_init(1, seed=0)
    draw = WeightSpace(Scale()).sample_init(2, 0, reset=lambda net: nn.init.normal_(net.scale))
    assert draw.shape == (2, 3)


def test_specs_tell_role_axes_and_fans():
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6, 2), nn.Embedding(9, 3))
    spec = {s.name: s for s in WeightSpace(net).specs}
    assert spec["0.weight"].axes == ("out", "in", "height", "width")
    assert (spec["0.weight"].fan_in, spec["0.weight"].fan_out) == (36, 54)
    assert (spec["0.bias"].role, spec["0.bias"].fan_in) == ("bias", 36)
    assert spec["1.weight"].role == "norm_scale"
    assert spec["1.bias"].role == "norm_shift"
    assert spec["3.weight"].axes == ("out", "in")
    assert spec["4.weight"].role == "embedding"
    transposed = WeightSpace(nn.ConvTranspose1d(4, 6, 3)).specs[0]
    assert (transposed.axes, transposed.fan_in) == (("in", "out", "width"), 12)


def test_include_exclude_and_norm_choose_the_parameters():
    net = small_net()
    assert WeightSpace(net, "*.weight").names == ("0.weight", "1.weight", "3.weight")
    assert WeightSpace(net, "*.weight", norm="free").names == ("0.weight", "3.weight")
    assert WeightSpace(net, exclude=["0.*", "1.*"]).names == ("3.weight", "3.bias")
    assert WeightSpace(nn.Linear(2, 2), "*.weight").names == ("weight",)
    assert set(WeightSpace(net).blocks("layer")) == {"0", "1", "3"}
    assert len(WeightSpace(net).blocks("tensor")) == 6


def test_norm_batch_lets_networks_be_called_in_training_mode():
    net = small_net().train()
    space = WeightSpace(net, norm="batch")
    xs = torch.randn(3, 8, 3, dtype=torch.float64)
    out = space.call(space.sample_init(3, seed=0), xs, batch="pair")
    assert out.shape == (3, 8, 2)
    assert net[1].num_batches_tracked == 0
    assert net[1].track_running_stats


def test_recurrent_networks_take_other_weights():
    net = nn.LSTM(3, 4).double()
    space = WeightSpace(net)
    vec = space.sample_init(1, seed=2)[0]
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    called = space.call(vec, x)[0]
    space.write(vec)
    torch.testing.assert_close(called, net(x)[0])


def test_gradients_reach_the_vector():
    space = WeightSpace(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double())
    vec = space.read().requires_grad_()
    x = torch.randn(4, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: space.call(v, x), (vec,))


def test_a_vector_of_wrong_length_is_refused():
    space = WeightSpace(nn.Linear(2, 2))
    with pytest.raises(PomonaError, match="its last dimension must be 6"):
        space.unflatten(torch.zeros(5))
    with pytest.raises(PomonaError, match="leaves no parameter"):
        WeightSpace(nn.Linear(2, 2), include="conv*")
    with pytest.raises(PomonaError, match="say batch='pair' or 'cross'"):
        space.call(torch.zeros(3, 6), torch.zeros(1, 2))
