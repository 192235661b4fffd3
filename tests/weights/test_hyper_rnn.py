import copy

import pytest
import torch
from torch import nn

from pomona.errors import PomonaError
from pomona.weights.hyper_rnn import HyperGRU, HyperLSTM, HyperRNN

ALL = [HyperRNN, HyperGRU, HyperLSTM]
X = torch.randn(6, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def make(cls, **options):
    torch.manual_seed(0)
    options = {"hyper_hidden": 4, "z_dim": 3, "recurrent_dropout": 0.0} | options
    return cls(5, 8, **options).double()


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_scales_are_a_tenth_for_every_gate_and_step_at_the_start(cls, noise):
    net = make(cls, noise=noise)
    hyper_h = torch.randn(50, 4, dtype=torch.float64)
    d_h, d_x, _ = net.scale(hyper_h)
    for d in (d_h, d_x):
        torch.testing.assert_close(d, torch.full_like(d, 0.1), rtol=1e-6, atol=1e-6)


def test_without_layer_norm_hyper_lstm_starts_as_an_lstm_with_the_same_weights():
    net = make(HyperLSTM, layer_norm=False)
    lstm = nn.LSTM(5, 8).double()
    order = [0, 2, 1, 3]  # i, g, f, o here; i, f, g, o there
    lstm.weight_ih_l0.data.copy_(net.weight_x[order].flatten(0, 1))
    lstm.weight_hh_l0.data.copy_(net.weight_h[order].flatten(0, 1))
    lstm.bias_ih_l0.data.copy_(net.scale.bias[order].flatten())
    lstm.bias_hh_l0.data.zero_()
    out, state = net(X)
    expected, (h, c) = lstm(X)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state[0], h[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state[1], c[0], rtol=1e-5, atol=1e-5)


def test_without_layer_norm_hyper_gru_starts_as_a_gru_with_the_same_weights():
    net = make(HyperGRU, layer_norm=False)
    gru = nn.GRU(5, 8).double()
    gru.weight_ih_l0.data.copy_(net.weight_x.flatten(0, 1))
    gru.weight_hh_l0.data.copy_(net.weight_h.flatten(0, 1))
    gru.bias_ih_l0.data.zero_()
    gru.bias_hh_l0.data.zero_()
    torch.testing.assert_close(net(X)[0], gru(X)[0])


def test_row_scaling_equals_scaling_the_matrix():
    net = make(HyperLSTM)
    nn.init.normal_(net.scale.embed.weight)
    h, hyper_h = torch.randn(8, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    scaled, _, _ = net.parts(torch.zeros(4, 8, dtype=torch.float64), h, hyper_h)
    d_h, _, _ = net.scale(hyper_h)
    for gate in range(4):
        torch.testing.assert_close(scaled[gate], (torch.diag(d_h[gate]) @ net.weight_h[gate]) @ h)


@pytest.mark.parametrize("layer_norm", [True, False])
def test_full_form_of_rank_one_in_z_equals_the_row_scaled_form(layer_norm):
    scaled = make(HyperRNN, layer_norm=layer_norm)
    full = make(HyperRNN, layer_norm=layer_norm, full=True)
    for p in scaled.parameters():
        nn.init.normal_(p, std=0.5)
    shared = {k: v for k, v in scaled.state_dict().items() if k not in ("weight_h", "weight_x")}
    full.load_state_dict(shared, strict=False)
    d_h, d_x = scaled.scale.expand[:2, 0]  # (hidden, z)
    with torch.no_grad():
        full.weight_h.copy_(d_h.T[:, :, None] * scaled.weight_h)
        full.weight_x.copy_(d_x.T[:, :, None] * scaled.weight_x)
    torch.testing.assert_close(full(X)[0], scaled(X)[0])


def train_a_little(net):
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        net(X)[0][-1].square().sum().backward()
        optimizer.step()
    return net.scale.expand[:2].std(dim=-1).max().item()


def test_constant_expansion_never_parts_the_embedding_and_noise_does():
    assert train_a_little(make(HyperLSTM)) < 1e-12
    assert train_a_little(make(HyperLSTM, noise=0.5)) > 1e-3


@pytest.mark.parametrize("cls", ALL)
def test_a_sequence_in_two_pieces_equals_it_whole(cls):
    net = make(cls, batch_first=True)
    x = X.transpose(0, 1)
    whole, last = net(x)
    first, state = net(x[:, :2])
    second, end = net(x[:, 2:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    for a, b in zip(last, end, strict=True):
        torch.testing.assert_close(a, b)
    assert net(x[:0])[0].shape == (0, 6, 8)


def test_forget_bias_is_one_and_main_weights_are_orthogonal():
    with_norm, without = make(HyperLSTM), make(HyperLSTM, layer_norm=False)
    assert torch.equal(with_norm.core.norm.bias[2], torch.ones(8, dtype=torch.float64))
    assert torch.equal(without.scale.bias[2], torch.ones(8, dtype=torch.float64))
    assert without.scale.bias.sum() == 8
    for gate in with_norm.weight_h:
        torch.testing.assert_close(gate @ gate.T, torch.eye(8, dtype=torch.float64), atol=1e-6, rtol=0)


def test_recurrent_dropout_acts_in_training_only():
    net = make(HyperLSTM, recurrent_dropout=0.5)
    torch.manual_seed(1)
    assert not torch.allclose(net(X)[0], net(X)[0])
    net.eval()
    assert torch.equal(net(X)[0], net(X)[0])
    assert torch.equal(copy.deepcopy(net)(X)[0], net(X)[0])


@pytest.mark.parametrize("cls", ALL)
def test_works_under_vmap(cls):
    net = make(cls)
    stacked = torch.stack([X, X + 1])
    out = torch.func.vmap(lambda x: net(x)[0])(stacked)
    torch.testing.assert_close(out[1], net(X + 1)[0])


@pytest.mark.parametrize("cls", ALL)
def test_gradient_check(cls):
    net = make(cls, noise=0.5)
    x = X[:3, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: net(x)[0], (x,))
    net(X)[0].sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_bad_sizes_and_states_are_refused():
    with pytest.raises(PomonaError, match="hidden_size=0 must be a number above 0"):
        HyperLSTM(3, 0, hyper_hidden=2)
    with pytest.raises(PomonaError, match="state has 2 tensors; HyperLSTM needs 4"):
        make(HyperLSTM)(X, (X[0], X[0]))
    with pytest.raises(PomonaError, match="x has no time step"):
        make(HyperLSTM)(X[:0])
