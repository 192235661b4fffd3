import pytest
import torch
from torch import nn

from pomona.errors import PomonaError
from pomona.implicit.hopfield import (
    Hopfield,
    HopfieldLayer,
    HopfieldMemory,
    HopfieldPooling,
    association,
    energy,
    hopfield_retrieve,
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def in_ball(state: torch.Tensor, patterns: torch.Tensor) -> torch.Tensor:
    return state / state.norm(dim=-1, keepdim=True) * patterns.norm(dim=-1).max() * 0.9


def test_one_update_equals_scaled_dot_product_attention():
    q, k = draw(2, 5, 8), draw(2, 7, 8, seed=1)
    expected = nn.functional.scaled_dot_product_attention(q, k, k)
    torch.testing.assert_close(hopfield_retrieve(q, k, 8**-0.5), expected)


def test_layer_equals_multihead_attention_with_copied_weights():
    mine = Hopfield(8, stored_features=6, heads=2, norm=False, from_stored=False).double()
    theirs = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True).double()
    with torch.no_grad():
        for layer, weight in (
            (mine.query, "q_proj_weight"),
            (mine.key, "k_proj_weight"),
            (mine.value, "v_proj_weight"),
        ):
            layer.weight.copy_(getattr(theirs, weight))
            layer.bias.normal_()
        theirs.in_proj_bias.copy_(torch.cat([mine.query.bias, mine.key.bias, mine.value.bias]))
        mine.out.weight.copy_(theirs.out_proj.weight)
    state, stored, values = draw(3, 5, 8), draw(3, 7, 6, seed=1), draw(3, 7, 6, seed=2)
    padding = torch.arange(7).expand(3, 7) < 5
    expected = theirs(state, stored, values, key_padding_mask=~padding)[0]
    torch.testing.assert_close(mine(state, stored, values, padding=padding), expected, atol=1e-6, rtol=1e-6)


def test_energy_never_increases_and_lies_between_0_and_2_m_squared():
    patterns = draw(4, 9, 6)
    state = in_ball(draw(4, 20, 6, seed=1), patterns)
    largest = patterns.square().sum(-1).amax(-1)[:, None]
    for beta in (0.1, 1.0, 5.0):
        xi, before = state, energy(state, patterns, beta)
        for _ in range(6):
            assert (before >= -1e-12).all() and (before <= 2 * largest + 1e-12).all()
            xi = hopfield_retrieve(xi, patterns, beta)
            after = energy(xi, patterns, beta)
            assert (after <= before + 1e-12).all()
            before = after


def test_gradient_of_the_energy_is_state_minus_update():
    patterns, state = draw(9, 6), draw(5, 6, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(energy(state, patterns, 0.7).sum(), state)
    torch.testing.assert_close(gradient, state - hopfield_retrieve(state, patterns, 0.7))


def test_small_beta_returns_the_mean_and_large_beta_the_nearest_pattern():
    patterns, state = draw(9, 6), draw(5, 6, seed=1)
    torch.testing.assert_close(
        hopfield_retrieve(state, patterns, 1e-9), patterns.mean(0).expand(5, 6), atol=1e-7, rtol=0
    )
    nearest = patterns[(state @ patterns.T).argmax(-1)]
    torch.testing.assert_close(hopfield_retrieve(state, patterns, 1e4), nearest)


def test_permuting_the_stored_patterns_changes_nothing():
    patterns, state, order = draw(2, 9, 6), draw(2, 5, 6, seed=1), torch.randperm(9)
    torch.testing.assert_close(hopfield_retrieve(state, patterns[:, order]), hopfield_retrieve(state, patterns))
    torch.testing.assert_close(energy(state, patterns[:, order]), energy(state, patterns))


def test_masked_patterns_have_zero_gradient():
    patterns, state = draw(2, 9, 6).requires_grad_(), draw(2, 5, 6, seed=1)
    padding = torch.arange(9).expand(2, 9) < 6
    net = Hopfield(6, heads=2).double()
    (gradient,) = torch.autograd.grad(net(state, patterns, padding=padding).sum(), patterns)
    assert not gradient[:, 6:].any() and gradient[:, :6].any()
    masked = energy(state, patterns, mask=padding[:, None])
    torch.testing.assert_close(masked, energy(state, patterns[:, :6]))


def test_pooling_returns_quantity_times_d_whatever_the_bag():
    pool = HopfieldPooling(6, quantity=3)
    for n in (1, 4, 11):
        assert pool(torch.randn(2, n, 6)).shape == (2, 18)
    x = torch.randn(2, 5, 6)
    padding = torch.arange(5).expand(2, 5) < 3
    torch.testing.assert_close(pool(x, padding), pool(x[:, :3]))


def test_convergence_is_per_batch_entry_and_at_a_fixed_point():
    patterns, state = 2 * draw(3, 6, 8), draw(3, 4, 8, seed=1)
    together = hopfield_retrieve(state, patterns, steps=None, eps=1e-10)
    apart = torch.stack([hopfield_retrieve(s, p, steps=None, eps=1e-10) for s, p in zip(state, patterns, strict=True)])
    torch.testing.assert_close(together, apart, atol=1e-12, rtol=0)
    torch.testing.assert_close(hopfield_retrieve(together, patterns), together, atol=1e-8, rtol=0)
    many = hopfield_retrieve(state, patterns, steps=200)
    torch.testing.assert_close(together, many, atol=1e-7, rtol=0)


def test_repeated_updates_act_on_the_query_with_fixed_keys():
    net = Hopfield(8, heads=2, steps=3).double()
    state, stored = draw(2, 5, 8), draw(2, 7, 8, seed=1)
    k = net._split(net.key(net.norm_stored(stored)))
    q = hopfield_retrieve(net._split(net.query(net.norm_state(state))), k, net.beta, steps=2)
    _, weight = net.attend(state, stored)
    torch.testing.assert_close(weight, association(q, k, net.beta))


def test_zero_association_and_bias_pattern_add_a_pattern():
    state, stored = draw(2, 5, 8), draw(2, 7, 8, seed=1)
    net = Hopfield(8, heads=2, zero_association=True, bias_pattern=True).double()
    padding = torch.zeros(2, 7, dtype=torch.bool)
    _, weight = net.attend(state, stored, padding=padding)
    assert weight.shape[-1] == 9 and not weight[..., :7].any()
    assert torch.isfinite(net(state, stored, padding=padding)).all()


def test_static_inputs_have_no_projection():
    net = Hopfield(6, static=("state", "stored", "projected"), norm=False, out_projection=False, beta=0.8).double()
    assert not list(net.parameters())
    state, stored = draw(2, 5, 6), draw(2, 7, 6, seed=1)
    torch.testing.assert_close(net(state, stored), hopfield_retrieve(state, stored, 0.8))


def test_one_beta_a_head():
    net = Hopfield(8, heads=2, beta=[0.5, 2.0]).double()
    _, weight = net.attend(draw(1, 4, 8))
    assert weight.shape == (1, 2, 4, 4)


@pytest.mark.parametrize("make", [HopfieldLayer, HopfieldMemory])
def test_layer_and_memory_map_any_leading_shape(make):
    net = make(6, quantity=5).double()
    x = draw(2, 3, 6)
    torch.testing.assert_close(net(x), net(x.reshape(6, 6)).reshape(2, 3, 6))
    assert net(x[:0]).shape == (0, 3, 6)
    assert torch.autograd.gradcheck(net, x.requires_grad_())
    nets = [make(6, quantity=5), make(6, quantity=5)]
    params, buffers = torch.func.stack_module_state(nets)
    v = torch.randn(2, 4, 6)
    out = torch.func.vmap(lambda p, b, u: torch.func.functional_call(nets[0], (p, b), (u,)))(params, buffers, v)
    torch.testing.assert_close(out, torch.stack([n(u) for n, u in zip(nets, v, strict=True)]), atol=1e-5, rtol=1e-4)


def test_bad_arguments_say_what_would_do():
    with pytest.raises(PomonaError, match="features=8 cannot be divided into heads=3 equal parts"):
        Hopfield(8, heads=3)
    with pytest.raises(PomonaError, match="steps=0 must be 1 or more"):
        Hopfield(8, steps=0)
    with pytest.raises(PomonaError, match="set from_stored=False"):
        Hopfield(8)(draw(1, 2, 8), draw(1, 2, 8), draw(1, 2, 8))
