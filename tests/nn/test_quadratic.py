import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pomona.errors import PomonaError
from pomona.nn.quadratic import (
    QuadActivation,
    QuadraticConv2d,
    QuadraticLinear,
    ReLinear,
    count_pieces_1d,
    quadratize,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def randomise(layer, seed=0):
    with torch.no_grad():
        for k, p in enumerate(layer.parameters()):
            p.copy_(draw(*p.shape, seed=seed + k))
    return layer


def test_relinear_start_equals_the_linear_layer_exactly():
    for variant in ("fan", "product", "square", "full"):
        layer = QuadraticLinear(7, 5, variant)
        nn.init.normal_(layer.bias_r)
        x = torch.randn(50, 7)
        assert (layer(x) - F.linear(x, layer.weight_r, layer.bias_r)).abs().max() == 0


def test_forward_is_the_equation():
    layer = randomise(QuadraticLinear(3, 4, dtype=torch.float64))
    x = draw(6, 3, seed=9)
    r, g = x @ layer.weight_r.T + layer.bias_r, x @ layer.weight_g.T + layer.bias_g
    torch.testing.assert_close(layer(x), r * g + (x * x) @ layer.weight_b.T + layer.bias_b)


def test_full_variant_is_the_quadratic_form_and_contains_the_others():
    fan = randomise(QuadraticLinear(3, 4, bias=False, dtype=torch.float64))
    full = QuadraticLinear(3, 4, "full", bias=False, dtype=torch.float64)
    with torch.no_grad():
        full.weight_r.copy_(fan.weight_r * fan.bias_g[:, None])
        full.weight_q.copy_(torch.einsum("oi,oj->oij", fan.weight_r, fan.weight_g) + torch.diag_embed(fan.weight_b))
    x = draw(6, 3, seed=9)
    torch.testing.assert_close(full(x), fan(x))


def test_quadratize_leaves_outputs_of_a_trained_net_unchanged():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 5),
        nn.ReLU(),
        nn.Linear(5, 3),
    )
    x, target = torch.randn(32, 1, 4, 4), torch.randint(0, 3, (32,))
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(20):
        optimiser.zero_grad()
        F.cross_entropy(net(x), target).backward()
        optimiser.step()
    lifted = quadratize(net)
    assert [type(m) for m in lifted] == [
        QuadraticConv2d,
        nn.ReLU,
        nn.Flatten,
        QuadraticLinear,
        nn.ReLU,
        QuadraticLinear,
    ]
    assert (lifted(x) - net(x)).abs().max() < 1e-6
    assert isinstance(net[3], nn.Linear)  # the old one is untouched
    assert lifted[3].weight_r is not net[3].weight


def test_quadratize_keeps_tied_weights_and_shared_layers():
    net = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6, bias=False))
    net[2].weight = net[0].weight
    lifted = quadratize(net)
    assert lifted[2].weight_r is lifted[0].weight
    twice = nn.Linear(4, 4)
    lifted = quadratize(nn.Sequential(twice, twice))
    assert lifted[0] is lifted[1]
    only = quadratize(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), where=lambda name, module: name == "1")
    assert [type(m) for m in only] == [nn.Linear, QuadraticLinear]
    assert isinstance(quadratize(nn.Linear(2, 2)), QuadraticLinear)


def test_parameter_count():
    count = lambda layer: sum(p.numel() for p in layer.parameters())  # noqa: E731
    assert count(QuadraticLinear(7, 5)) == 3 * 7 * 5 + 3 * 5
    assert count(QuadraticLinear(7, 5, "product")) == 2 * 7 * 5 + 2 * 5
    assert count(QuadraticLinear(7, 5, "square")) == 2 * 7 * 5 + 5
    assert count(QuadraticConv2d(3, 5, 3)) == 3 * 27 * 5 + 3 * 5


def test_one_neuron_computes_a_product_and_separates_xor():
    neuron = QuadraticLinear(2, 1)
    with torch.no_grad():
        neuron.weight_r.copy_(torch.tensor([[1.0, 0.0]]))
        neuron.weight_g.copy_(torch.tensor([[0.0, 1.0]]))
        neuron.bias_g.zero_()
    x = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    assert torch.equal(neuron(x)[:, 0], x[:, 0] * x[:, 1])
    # of a linear neuron w.x + b the two diagonals have equal sums, so no threshold parts them
    linear = nn.Linear(2, 1)(x)[:, 0]
    torch.testing.assert_close(linear[0] + linear[3], linear[1] + linear[2])


def test_gradient_of_the_power_term():
    layer = randomise(QuadraticLinear(3, 2, dtype=torch.float64))
    x, upstream = draw(1, 3, seed=9), draw(1, 2, seed=10)
    layer(x).backward(upstream)
    torch.testing.assert_close(layer.weight_b.grad, torch.outer(upstream[0], x[0] * x[0]))


@pytest.mark.parametrize("variant", ["fan", "product", "square", "full"])
def test_gradients(variant):
    layer = randomise(QuadraticLinear(3, 2, variant, dtype=torch.float64))
    names = [name for name, _ in layer.named_parameters()]
    x = draw(4, 3, seed=9)

    def function(*values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, tuple(layer.parameters()))


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_convolution_is_the_dense_neuron_on_patches(mode):
    conv = randomise(QuadraticConv2d(2, 3, 3, stride=2, padding=1, padding_mode=mode, dtype=torch.float64))
    dense = QuadraticLinear(18, 3, dtype=torch.float64)
    dense.load_state_dict({name: p.flatten(1) if p.dim() > 1 else p for name, p in conv.state_dict().items()})
    x = draw(2, 2, 5, 5, seed=9)
    padded = F.pad(x, (1, 1, 1, 1), mode="constant" if mode == "zeros" else mode)
    patches = F.unfold(padded, 3, stride=2).transpose(1, 2)
    torch.testing.assert_close(conv(x).flatten(2), dense(patches).transpose(1, 2))


def test_relinear_strategies_hold_the_linear_neuron():
    start = randomise(QuadraticLinear(3, 2, dtype=torch.float64))
    for strategy in ("sgd", "shrink", "clip"):
        layer = copy.deepcopy(start)
        layer.relinear = ReLinear(strategy, shrink=0.9, limit=0.2)
        layer.post_step()
        assert torch.equal(layer.weight_r, start.weight_r)
        for (after, reference), (before, _) in zip(
            layer.quadratic_parameters(), start.quadratic_parameters(), strict=True
        ):
            distance = before - reference
            expected = {"sgd": distance, "shrink": 0.9 * distance, "clip": distance.clamp(-0.2, 0.2)}[strategy]
            torch.testing.assert_close(after - reference, expected)


def test_param_groups_give_the_quadratic_terms_their_rate():
    layer = QuadraticLinear(3, 2, relinear=ReLinear(lr_scale=1e-3))
    (group,) = layer.param_groups()
    assert group["lr_scale"] == 1e-3
    assert {id(p) for p in group["params"]} == {
        id(p) for p in (layer.weight_g, layer.bias_g, layer.weight_b, layer.bias_b)
    }


def test_pieces_of_linear_and_quadratic_neurons():
    linear = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    with torch.no_grad():
        linear[0].weight.fill_(1)
        linear[0].bias.fill_(0.1)
    assert count_pieces_1d(linear, -2, 2) == 2
    quadratic = nn.Sequential(QuadraticLinear(1, 1), nn.ReLU())
    with torch.no_grad():  # x^2 - 1 has two roots
        quadratic[0].weight_r.zero_()
        quadratic[0].weight_b.fill_(1)
        quadratic[0].bias_b.fill_(-1)
    assert count_pieces_1d(quadratic, -2, 2) == 3
    assert count_pieces_1d(quadratic, 2.5, 3.0) == 1
    assert count_pieces_1d(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), torch.zeros(2), torch.ones(2)) <= 4


def test_quad_activation_is_the_square():
    assert torch.equal(QuadActivation()(torch.tensor([-2.0, 3.0])), torch.tensor([4.0, 9.0]))


def test_empty_batch_and_vmap():
    layer = QuadraticLinear(3, 2)
    assert layer(torch.zeros(0, 3)).shape == (0, 2)
    layers = [QuadraticLinear(3, 2) for _ in range(4)]
    params, buffers = torch.func.stack_module_state(layers)
    x = torch.randn(5, 3)
    out = torch.vmap(lambda p, b: torch.func.functional_call(layer, (p, b), (x,)))(params, buffers)
    torch.testing.assert_close(out, torch.stack([each(x) for each in layers]))


def test_bad_input():
    with pytest.raises(PomonaError, match="variant='fann' is not known; did you mean fan"):
        QuadraticLinear(2, 2, "fann")
    with pytest.raises(PomonaError, match="strategy='adam' is not known"):
        QuadraticLinear(2, 2, relinear="adam")
    with pytest.raises(PomonaError, match="'full' is for QuadraticLinear only"):
        QuadraticConv2d(2, 2, 3, variant="full")
    with pytest.raises(PomonaError, match="no linear or convolutional layer"):
        quadratize(nn.ReLU())
    with pytest.raises(PomonaError, match="has no ReLU or LeakyReLU module"):
        count_pieces_1d(nn.Linear(1, 1))
