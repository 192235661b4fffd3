import pytest
import torch
import torch.nn.functional as F

from pomona.errors import PomonaError
from pomona.nn.bilinear import GATES, GLUMLP, Bilinear, BilinearNet, bilinear_ffn, geglu, glu, reglu, swiglu


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("bias", [False, True])
def test_forward_is_the_gated_product(gate, bias):
    layer = Bilinear(4, 3, bias, gate, dtype=torch.float64)
    x = draw(5, 4)
    c, d = layer.both.bias.chunk(2) if bias else (0, 0)
    functions = {None: lambda z: z, "sigmoid": torch.sigmoid, "relu": F.relu, "silu": F.silu, "gelu": F.gelu}
    torch.testing.assert_close(layer(x), functions[gate](x @ layer.w.T + c) * (x @ layer.v.T + d))


def test_bilinear_layer_is_even_and_homogeneous_of_degree_two():
    layer, x = Bilinear(4, 3, dtype=torch.float64), draw(5, 4)
    torch.testing.assert_close(layer(-x), layer(x))
    torch.testing.assert_close(layer(2 * x), 4 * layer(x))


def test_exchange_and_rescaling_leave_outputs_unchanged():
    layer, other, x = Bilinear(4, 3, dtype=torch.float64), Bilinear(4, 3, dtype=torch.float64), draw(5, 4)
    scale = draw(3, 1, seed=1).exp()
    for w, v in ((layer.v, layer.w), (scale * layer.w, layer.v / scale)):
        with torch.no_grad():
            other.both.weight.copy_(torch.cat([w, v]))
        torch.testing.assert_close(other(x), layer(x))


@pytest.mark.parametrize(
    ("make", "gate"), [(glu, "sigmoid"), (reglu, "relu"), (swiglu, "silu"), (geglu, "gelu"), (bilinear_ffn, None)]
)
def test_named_blocks_have_their_gate(make, gate):
    block = make(6, 12)
    assert block.product.gate == gate
    assert block(torch.zeros(2, 5, 6)).shape == (2, 5, 6)


def test_matched_block_has_the_parameters_of_an_ordinary_one():
    block = GLUMLP(30, 120, match=True)
    assert sum(p.numel() for p in block.parameters()) == 2 * 30 * 120


def test_noise_is_for_training_only():
    net, x = BilinearNet(4, 6, 3, noise=0.5), torch.randn(5, 2, 2)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


def test_residual_net_is_the_recursion():
    net, x = BilinearNet(4, 6, 3, depth=2, residual=True, dtype=torch.float64), draw(5, 4)
    h = net.embed(x)
    h = h + net.layers[0](h)
    torch.testing.assert_close(net(x), net.head(h + net.layers[1](h)))


@pytest.mark.parametrize("gate", GATES)
def test_gradients(gate):
    layer = Bilinear(3, 2, True, gate, dtype=torch.float64)
    x = draw(4, 3).requires_grad_()

    def function(x, weight, bias):
        return torch.func.functional_call(layer, {"both.weight": weight, "both.bias": bias}, (x,))

    assert torch.autograd.gradcheck(function, (x, layer.both.weight, layer.both.bias))


def test_bad_input():
    with pytest.raises(PomonaError, match="gate='swish' is not known"):
        Bilinear(4, 3, gate="swish")
    with pytest.raises(PomonaError, match="dim=0 must be a number above 0"):
        GLUMLP(0, 3)
