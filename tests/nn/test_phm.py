import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pomona.errors import PomonaError
from pomona.nn.algebra import algebra, multiply
from pomona.nn.phm import (
    PHMAttention,
    PHMLinear,
    PHMLSTMCell,
    QuaternionLinear,
    learned_rules,
    phm_transformer,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_one_block_with_unit_rule_is_an_ordinary_linear():
    layer = PHMLinear(6, 4, 1, learn_rules=False, rules=torch.ones(1, 1, 1), dtype=torch.float64)
    linear = nn.Linear(6, 4, dtype=torch.float64)
    with torch.no_grad():
        layer.blocks.copy_(linear.weight[None])
        layer.bias.copy_(linear.bias)
    x = draw(5, 6)
    torch.testing.assert_close(layer(x), linear(x))
    assert layer.n_params() == 6 * 4 + 4


@pytest.mark.parametrize("name", ["complex", "quaternion", "octonion"])
def test_fixed_rules_give_the_product_of_the_algebra(name):
    rules = algebra(name, dtype=torch.float64)
    n = len(rules)
    layer = PHMLinear(n, n, n, False, name, bias=False, dtype=torch.float64)
    x = draw(7, n)
    w = layer.blocks[:, 0, 0].expand(7, n)
    torch.testing.assert_close(layer(x), multiply(rules, w, x))


def test_quaternion_rules_give_the_hamilton_product_of_blocks():
    layer = QuaternionLinear(8, 12, bias=False, dtype=torch.float64)
    r, x, y, z = layer.blocks
    a, b, c, d = draw(5, 8).chunk(4, dim=1)
    mul = F.linear
    expected = [
        mul(a, r) - mul(b, x) - mul(c, y) - mul(d, z),
        mul(b, r) + mul(a, x) - mul(c, z) + mul(d, y),
        mul(c, r) + mul(a, y) + mul(b, z) - mul(d, x),
        mul(d, r) + mul(a, z) - mul(b, y) + mul(c, x),
    ]
    torch.testing.assert_close(layer(torch.cat([a, b, c, d], 1)), torch.cat(expected, 1))
    assert layer.n_params() == 8 * 12 // 4


def test_complex_rules_equal_complex_multiplication():
    layer = PHMLinear(6, 4, 2, False, "complex", bias=False, dtype=torch.float64)
    weight, x = torch.complex(*layer.blocks), draw(5, 6)
    product = torch.complex(*x.chunk(2, 1)) @ weight.T
    torch.testing.assert_close(layer(x), torch.cat([product.real, product.imag], 1))


@pytest.mark.parametrize("sizes", [(12, 8), (8, 12), (7, 9)])
def test_fast_path_equals_dense_weight(sizes):
    layer = PHMLinear(*sizes, 4, pad=True, dtype=torch.float64)
    for shape in ((3,), (0,), (2, 5), (2, 2, 3)):
        x = draw(*shape, sizes[0])
        torch.testing.assert_close(layer.by_blocks(x), F.linear(x, layer.weight()))


def test_parameter_count():
    assert PHMLinear(64, 32, 4).n_params() == 4**3 + 64 * 32 // 4 + 32
    assert PHMLinear(64, 32, 8, learn_rules=False, rules="octonion", bias=False).n_params() == 64 * 32 // 8


def test_projection_of_a_phm_weight_recovers_it():
    target = PHMLinear(12, 8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).weight().detach()
    assert PHMLinear(12, 8, 4, dtype=torch.float64).project_(target).relative_error(target) < 1e-5
    target = QuaternionLinear(12, 8, dtype=torch.float64).weight().detach()
    assert QuaternionLinear(12, 8, dtype=torch.float64).project_(target).relative_error(target) < 1e-5


def test_projection_is_a_minimum():
    matrix = draw(8, 8)
    layer = PHMLinear(8, 8, 2, dtype=torch.float64).project_(matrix)
    loss = (layer.weight() - matrix).square().sum()
    gradients = torch.autograd.grad(loss, [layer.rules, layer.blocks])
    assert max(float(g.abs().max()) for g in gradients) < 1e-10


def test_initial_variance_is_glorots():
    for rules in (None, "quaternion", "cyclic"):
        layer = PHMLinear(256, 128, 4, rules=rules, generator=torch.Generator().manual_seed(0))
        assert float(layer.weight().detach().square().mean()) == pytest.approx(2 / 384, rel=0.1)


def test_shared_rules_are_one_parameter():
    net = phm_transformer(11, dim=16, depth=2, n=4, shared=True, max_tokens=8)
    layers = [m for m in net.modules() if isinstance(m, PHMLinear)]
    assert len(layers) == 8
    assert all(layer.rules is layers[0].rules for layer in layers)
    net(torch.zeros(1, 3, dtype=torch.long)).sum().backward()
    assert layers[0].rules.grad is not None


def test_learned_rules_name_the_algebra():
    layer = PHMLinear(8, 8, 4, rules="quaternion")
    similarity = learned_rules(layer)
    assert next(iter(similarity)) == "quaternion"
    assert similarity["quaternion"] == pytest.approx(1)
    assert similarity["cyclic"] < 0.9


def test_lstm_cell_equals_its_equations():
    cell = PHMLSTMCell(8, 4, 2, dtype=torch.float64)
    x, h, c = draw(3, 8), draw(3, 4, seed=1), draw(3, 4, seed=2)
    sums = cell.input_map(x) + cell.hidden_map(h)
    # block k of the output holds block k of each gate
    i, f, g, o = sums.view(3, 2, 4, 2).permute(2, 0, 1, 3).reshape(4, 3, 4)
    expected = f.sigmoid() * c + i.sigmoid() * g.tanh()
    new_h, new_c = cell(x, (h, c))
    torch.testing.assert_close(new_c, expected)
    torch.testing.assert_close(new_h, o.sigmoid() * expected.tanh())
    torch.testing.assert_close(cell(x)[0], cell(x, (torch.zeros_like(h), torch.zeros_like(c)))[0])


def test_attention_masks():
    x = draw(2, 5, 8)
    layer = PHMAttention(8, 2, 2, causal=True, dtype=torch.float64)
    changed = x.clone()
    changed[:, 3:] += 1
    torch.testing.assert_close(layer(changed)[:, :3], layer(x)[:, :3])  # later tokens do not matter
    layer = PHMAttention(8, 2, 2, dtype=torch.float64)
    mask = torch.tensor([True, True, True, False, False]).expand(2, 5)
    torch.testing.assert_close(layer(changed, mask)[:, :3], layer(x, mask)[:, :3])  # nor do absent ones
    torch.testing.assert_close(layer(x, mask)[:, :3], layer(x[:, :3]))
    assert not torch.allclose(layer(changed)[:, :3], layer(x)[:, :3])


def test_transformer_has_about_one_nth_of_the_linear_parameters():
    def linear_parameters(net):
        return sum(p.numel() for part in (net.attention, net.ffn) for p in part.parameters() if p.dim() > 1)

    dense = phm_transformer(60, linear=nn.Linear)
    quarter = phm_transformer(60, n=4)
    assert linear_parameters(quarter) / linear_parameters(dense) == pytest.approx(0.25, abs=0.01)
    tokens = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    assert quarter(tokens).shape == dense(tokens).shape == (2, 9, 60)


def test_gradients():
    layer = PHMLinear(6, 4, 2, dtype=torch.float64)
    x = draw(3, 6).requires_grad_()

    def by_blocks(x, rules, blocks):
        return torch.func.functional_call(layer, {"rules": rules, "blocks": blocks}, (x,))

    assert torch.autograd.gradcheck(by_blocks, (x, layer.rules, layer.blocks))


def test_bad_input():
    with pytest.raises(PomonaError, match=r"in_features=10 is not divisible by n=4; choose another n or set pad=True"):
        PHMLinear(10, 8, 4)
    with pytest.raises(PomonaError, match=r"rules have shape \(2, 2, 2\); n=4 needs \(4, 4, 4\)"):
        PHMLinear(8, 8, 4, rules=torch.zeros(2, 2, 2))
    assert PHMLinear(10, 7, 4, pad=True)(torch.zeros(2, 10)).shape == (2, 7)
