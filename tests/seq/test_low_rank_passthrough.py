import copy

import pytest
import torch
from torch import nn

from pomona.errors import PomonaError
from pomona.nn.structured import LowRankLinear
from pomona.seq.low_rank_passthrough import (
    LowRankGRU,
    LowRankHighway,
    LowRankLSTM,
    balance,
    budget,
    low_rank_residual,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def make(kind, *sizes, **options):
    return kind(*sizes, generator=seeded(), **options).double()


def fit_to(low, dense):
    """The parameters of ``dense`` in ``low``, whose rank suffices."""
    state = {k: v for k, v in dense.state_dict().items() if not k.endswith("weight") or k.startswith("input_map")}
    low.load_state_dict(state, strict=False)
    for a, b in zip(low.modules(), dense.modules(), strict=True):
        if isinstance(a, LowRankLinear):
            a.project_(b.weight.detach())


@pytest.mark.parametrize("kind", [LowRankGRU, LowRankLSTM])
@pytest.mark.parametrize("diag", [False, True])
def test_full_rank_equals_the_dense_network(kind, diag):
    dense, low = make(kind, 3, 5, None), make(kind, 3, 5, 5, diag=diag)
    fit_to(low, dense)
    x = draw(2, 7, 3)
    torch.testing.assert_close(low(x), dense(x), rtol=1e-5, atol=1e-6)
    high, deep = make(LowRankHighway, 5, None, layers=3), make(LowRankHighway, 5, 5, diag, 3)
    fit_to(deep, high)
    torch.testing.assert_close(deep(draw(4, 5)), high(draw(4, 5)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank, share", [(None, False), (2, False), (2, True)])
def test_gru_equals_its_equations(rank, share):
    net = make(LowRankGRU, 3, 5, rank, share=share)
    x, h = draw(2, 4, 3), draw(2, 5, seed=1)
    start = h
    r_map, u_map, c_map = (m.weight if rank is None else m.weight() for m in net.maps)
    for t in range(4):
        from_r, from_u, from_c = net.input_map(x[:, t]).chunk(3, 1)
        r, u = torch.sigmoid(h @ r_map.T + from_r), torch.sigmoid(h @ u_map.T + from_u)
        h = u * h + (1 - u) * torch.tanh((r * h) @ c_map.T + from_c)
    outputs, (last,) = net(x, (start,))
    torch.testing.assert_close(last, h)
    torch.testing.assert_close(outputs[:, -1], h)


def test_lstm_equals_torchs():
    net, oracle = make(LowRankLSTM, 3, 5, None), nn.LSTM(3, 5, batch_first=True).double()
    order = [0, 1, 3, 2]  # torch has i, f, g, o
    with torch.no_grad():
        oracle.weight_ih_l0.copy_(torch.cat([net.input_map.weight.chunk(4)[k] for k in order]))
        oracle.weight_hh_l0.copy_(torch.cat([net.maps[k].weight for k in order]))
        oracle.bias_ih_l0.copy_(torch.cat([net.input_map.bias.chunk(4)[k] for k in order]))
        oracle.bias_hh_l0.zero_()
    x = draw(2, 6, 3)
    torch.testing.assert_close(net(x)[0], oracle(x)[0])


def test_parameters_and_rank_of_a_recurrent_matrix():
    plain, diag = (make(LowRankGRU, 3, 20, 4, diag=d).maps[0] for d in (False, True))
    assert plain.n_params() == 2 * 20 * 4 and diag.n_params() == 2 * 20 * 4 + 20
    assert torch.linalg.matrix_rank(plain.weight()) == 4
    with torch.no_grad():
        diag.left.zero_()
        diag.diagonal.fill_(1)
    torch.testing.assert_close(diag.weight().detach(), torch.eye(20, dtype=torch.float64))
    shared = make(LowRankGRU, 3, 20, 4, share=True)
    assert sum(p.numel() for p in shared.maps.parameters()) == (3 + 1) * 20 * 4 + 3 * 20


@pytest.mark.parametrize("kind", [LowRankGRU, LowRankLSTM])
def test_open_carry_gates_pass_the_state_through(kind):
    net = make(kind, 3, 5, 2, carry_bias=1e4)
    if kind is LowRankLSTM:
        nn.init.constant_(net.input_map.bias[:5], -1e4)
    state = tuple(draw(2, 5, seed=k) for k in range(net.states))
    last = net(draw(2, 200, 3), state)[1]
    assert torch.equal(last[-1], state[-1])
    deep = make(LowRankHighway, 5, 2, layers=50, carry_bias=-1e4)
    assert torch.equal(deep(state[0]), state[0])


def test_factored_product_equals_the_weight():
    layer = LowRankLinear(12, 12, 3, diag=True, dtype=torch.float64)
    nn.init.normal_(layer.diagonal)
    torch.testing.assert_close(layer.weight(), layer.left @ layer.right + torch.diag(layer.diagonal))
    torch.testing.assert_close(layer(draw(4, 12)), draw(4, 12) @ layer.weight().T + layer.bias)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_initial_values(orthogonal):
    net = LowRankGRU(8, 200, 20, orthogonal=orthogonal, carry_bias=4, gate_diag=1, generator=seeded())
    for layer in net.maps:
        off_diagonal = layer.weight().detach() - torch.diag(layer.diagonal.detach())
        assert float(off_diagonal.var()) == pytest.approx(1 / 200, rel=0.1)
    assert [float(layer.diagonal.detach().mean()) for layer in net.maps] == [1, 1, 0]
    assert net.input_map.bias.detach().view(3, -1).mean(1).tolist() == [0, 4, 0]


@pytest.mark.parametrize("share", [False, True])
def test_balance_changes_scales_and_nothing_else(share):
    net = make(LowRankGRU, 3, 6, 2, share=share)
    with torch.no_grad():
        net.maps[0].right.mul_(100)
    before, x = [m.weight().detach().clone() for m in net.maps], draw(2, 5, 3)
    expected = net(x)[0]
    balance(net)
    for layer, weight in zip(net.maps, before, strict=True):
        torch.testing.assert_close(layer.weight(), weight)
    torch.testing.assert_close(net(x)[0], expected)
    left = torch.stack([layer.left.norm() for layer in net.maps])
    torch.testing.assert_close(left.norm() if share else left[0], net.maps[0].right.norm())


def test_max_norm_dropout_and_residual_layers():
    net = make(LowRankGRU, 3, 6, 2, max_norm=0.5)
    net.post_step()
    assert all(float(m.left.detach().norm(dim=0).max()) <= 0.5 + 1e-9 for m in net.maps)
    x = draw(64, 5, 3)
    dropped = make(LowRankGRU, 3, 6, 2, dropout=0.5)
    assert not torch.equal(dropped(x)[0], dropped.eval()(x)[0])
    copied = copy.deepcopy(dropped)
    torch.testing.assert_close(copied(x)[0], dropped(x)[0])
    layer = make(low_rank_residual, 5, 2)
    torch.testing.assert_close(layer(draw(4, 5)), draw(4, 5) + torch.relu(layer.proposals[0](draw(4, 5))))
    assert net(draw(0, 4, 3))[0].shape == (0, 4, 6)


@pytest.mark.parametrize("diag, share", [(True, False), (False, True)])
def test_budget_gives_equal_parameters(diag, share):
    def count(net):
        return sum(p.numel() for p in net.parameters())

    dense = count(LowRankGRU(10, 64, None))
    low = count(LowRankGRU(10, 150, budget(10, 150, 64, diag=diag, share=share), diag=diag, share=share))
    assert low == pytest.approx(dense, rel=0.06)
    with pytest.raises(PomonaError, match="hidden_size=2000 is too large"):
        budget(10, 2000, 64)


@pytest.mark.parametrize("kind", [LowRankGRU, LowRankLSTM])
def test_gradients(kind):
    net = make(kind, 2, 3, 1)
    names, values = zip(*net.named_parameters(), strict=True)
    x = draw(2, 3, 2)

    def run(*values):
        return torch.func.functional_call(net, dict(zip(names, values, strict=True)), (x,))[0]

    assert torch.autograd.gradcheck(run, values, fast_mode=True)


def test_bad_input():
    with pytest.raises(PomonaError, match="rank=9 must lie between 1 and 6"):
        LowRankGRU(3, 6, 9)
    with pytest.raises(PomonaError, match="time above 0"):
        LowRankGRU(3, 6, 2)(torch.zeros(2, 0, 3))
    with pytest.raises(PomonaError, match="LowRankGRU takes 3 features"):
        LowRankGRU(3, 6, 2)(torch.zeros(2, 4, 5))
