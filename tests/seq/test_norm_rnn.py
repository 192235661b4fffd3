import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pomona.errors import PomonaError
from pomona.seq.norm_rnn import LayerNormGRU, LayerNormLSTM, LayerNormRNN

ALL = {"rnn": (LayerNormRNN, nn.RNN), "gru": (LayerNormGRU, nn.GRU), "lstm": (LayerNormLSTM, nn.LSTM)}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shapes(result):
    output, state = result
    states = state if isinstance(state, tuple) else (state,)
    return [tuple(t.shape) for t in (output, *states)]


def randomized(module):
    with torch.no_grad():
        for k, p in enumerate(module.double().parameters()):
            p.add_(0.3 * draw(*p.shape, seed=k))
    return module


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_interface_is_that_of_torch(name, batch_first, bidirectional):
    options = {"num_layers": 2, "batch_first": batch_first, "bidirectional": bidirectional}
    ours, theirs = (cls(3, 5, **options) for cls in ALL[name])
    for x in (torch.randn(7, 4, 3), torch.randn(7, 3)):
        assert shapes(ours(x)) == shapes(theirs(x))
        assert shapes(ours(x, theirs(x)[1])) == shapes(theirs(x))


def test_lstm_step_is_the_papers_equations():
    net = randomized(LayerNormLSTM(3, 5))
    cell, norm = net.cells[0], net.cells[0].norm
    x, h, c = draw(1, 2, 3), draw(1, 2, 5, seed=1), draw(1, 2, 5, seed=2)

    def ln(k, v):
        mean, std = v.mean(-1, keepdim=True), (v.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return norm.gains[k] * (v - mean) / std + norm.biases[k]

    gates = ln(0, h[0] @ cell.hidden_weight.T) + ln(1, x[0] @ cell.input_weight.T) + cell.bias
    f, i, o, g = gates.chunk(4, -1)
    new_c = f.sigmoid() * c[0] + i.sigmoid() * g.tanh()
    new_h = o.sigmoid() * ln(2, new_c).tanh()
    output, (h_n, c_n) = net(x, (h, c))
    assert torch.allclose(output[0], new_h) and torch.allclose(h_n[0], new_h) and torch.allclose(c_n[0], new_c)


def test_gru_and_rnn_steps_are_the_papers_equations():
    x, h = draw(1, 2, 3), draw(1, 2, 5, seed=1)
    gru = randomized(LayerNormGRU(3, 5, bias=False))
    cell, ln = gru.cells[0], gru.cells[0].norm
    z, r = torch.sigmoid(ln(0, h[0] @ cell.hidden_weight[:10].T) + ln(1, x[0] @ cell.input_weight[:10].T)).chunk(2, -1)
    candidate = torch.tanh(ln(2, x[0] @ cell.input_weight[10:].T) + r * ln(3, h[0] @ cell.hidden_weight[10:].T))
    assert torch.allclose(gru(x, h)[0][0], (1 - z) * h[0] + z * candidate)
    rnn = randomized(LayerNormRNN(3, 5))
    cell = rnn.cells[0]
    a = h[0] @ cell.hidden_weight.T + x[0] @ cell.input_weight.T
    normed = F.layer_norm(a, (5,), cell.norm.gains[0], cell.norm.biases[0])
    assert torch.allclose(rnn(x, h)[0][0], torch.tanh(normed + cell.bias))


@pytest.mark.parametrize("name", ALL)
def test_output_does_not_depend_on_the_scale_of_the_recurrent_weights(name):
    net = ALL[name][0](3, 16, eps=1e-12).double()
    x = draw(6, 2, 3)
    y = net(x)[0]
    with torch.no_grad():
        for cell in net.cells:
            cell.hidden_weight.mul_(5)
            cell.input_weight.mul_(5)
    assert torch.allclose(net(x)[0], y, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_a_sequence_in_two_parts_gives_the_same_as_whole(name):
    net = randomized(ALL[name][0](3, 5, num_layers=2))
    x = draw(9, 2, 3)
    whole, last = net(x)
    first, state = net(x[:4])
    second, end = net(x[4:], state)
    assert torch.allclose(torch.cat([first, second]), whole)
    assert all(torch.allclose(a, b) for a, b in zip(end, last, strict=True))


def test_backward_direction_is_forward_on_the_reversed_sequence():
    net = randomized(LayerNormGRU(3, 5, bidirectional=True))
    single = LayerNormGRU(3, 5).double()
    single.cells[0].load_state_dict(net.cells[1].state_dict())
    x = draw(6, 2, 3)
    assert torch.allclose(net(x)[0][..., 5:], single(x.flip(0))[0].flip(0))


@pytest.mark.parametrize("name", ALL)
def test_gradcheck_vmap_and_empty_batch(name):
    net = randomized(ALL[name][0](2, 3, batch_first=True))
    x = draw(2, 4, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: net(v)[0], (x,))
    assert torch.allclose(torch.vmap(lambda v: net(v)[0])(x[None]), net(x)[0][None])
    assert net(x[:0])[0].shape == (0, 4, 3)
    assert ALL[name][0](2, 3).bfloat16()(torch.zeros(2, 1, 2).bfloat16())[0].dtype == torch.bfloat16


def test_same_generator_same_weights_with_orthogonal_recurrence():
    a, b = (LayerNormLSTM(3, 6, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    block = a.cells[0].hidden_weight[:6]
    assert torch.allclose(block @ block.T, torch.eye(6), atol=1e-5)
    assert all(bool((g == 0.1).all()) for g in LayerNormRNN(3, 6, gain=0.1).cells[0].norm.gains)


def test_bad_input():
    with pytest.raises(PomonaError, match="hidden_size=0 must be a number above 0"):
        LayerNormLSTM(3, 0)
    net = LayerNormLSTM(3, 5)
    with pytest.raises(PomonaError, match="the last of input_size=3"):
        net(torch.zeros(2, 2, 4))
    with pytest.raises(PomonaError, match="0 time steps"):
        net(torch.zeros(0, 2, 3))
    with pytest.raises(PomonaError, match=r"must be \(layers \* directions, batch, hidden\)=\(1, 2, 5\)"):
        net(torch.zeros(4, 2, 3), (torch.zeros(1, 3, 5), torch.zeros(1, 3, 5)))
