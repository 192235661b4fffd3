import pytest
import torch
import torch.nn.functional as F

from pomona.errors import PomonaError
from pomona.nn.af_kan import FUNCTIONS, METHODS, AFKANLayer, ReLUKANLayer


def seeded(kind=AFKANLayer, *sizes, **options):
    return kind(*(sizes or (5, 4)), generator=torch.Generator().manual_seed(0), **options).double()


def inputs(n: int = 6, features: int = 5) -> torch.Tensor:
    return torch.rand(n, features, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 0.5


@pytest.mark.parametrize("grid, k", [(5, 3), (3, 1), (4, 0)])
def test_relu_kan_basis_has_support_s_to_e_and_peak_1_at_the_midpoint(grid, k):
    layer = seeded(ReLUKANLayer, 1, 1, grid=grid, k=k)
    low, high = layer.low[0].detach(), layer.high[0].detach()
    own = torch.eye(grid + k, dtype=torch.bool)
    torch.testing.assert_close(low, (torch.arange(grid + k, dtype=torch.float64) - k) / grid, atol=1e-7, rtol=0)
    for at, expected in (((low + high) / 2, 1.0), (low, 0.0), (high, 0.0)):
        peak = layer.basis(at[:, None])[:, 0][own]
        torch.testing.assert_close(peak, torch.full_like(peak, expected), atol=1e-6, rtol=0)
    x = torch.linspace(-2, 3, 4001, dtype=torch.float64)
    values = layer.basis(x[:, None])[:, 0]
    inside = (x[:, None] > low) & (x[:, None] < high)
    assert torch.equal(values > 0, inside) and values.max() <= 1 + 1e-6


def count(layer: torch.nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize("reduce", ["multistep", "global_attn"])
def test_parameters_are_those_of_a_linear_layer_and_little_more(reduce):
    d, m, grid, k = 11, 7, 4, 2
    layer = AFKANLayer(d, m, grid=grid, k=k, reduce=reduce)
    assert count(layer) == d * m + 2 * (grid + k) + (grid + k + 1) + 2 * d + (reduce == "global_attn")
    assert count(ReLUKANLayer(d, m, grid=grid, k=k)) == (grid + k) * d * (m + 2) + m


def test_functions_follow_their_formulae_and_quad1_of_relu_is_the_relu_kan_basis():
    a, b = torch.tensor(2.0), torch.tensor(3.0)
    expected = {"quad1": 36, "quad2": 19, "sum": 5, "prod": 6, "sum_prod": 11, "cubic1": 65, "cubic2": 216}
    assert {name: float(f(a, b)) for name, f in FUNCTIONS.items()} == expected
    x = inputs()
    layer = seeded(act="relu", func="quad1", func_norm="none", grid=5, k=3)
    torch.testing.assert_close(layer.functions(x) * 16 * 5**4 / 4**4, seeded(ReLUKANLayer, 5, 4, grid=5, k=3).basis(x))
    layer = seeded(func="quad2", func_norm="none")
    a, b = F.silu(x[..., None] - layer.low), F.silu(layer.high - x[..., None])
    torch.testing.assert_close(layer.functions(x), a * b + a * a + b * b)


@pytest.mark.parametrize("reduce", METHODS)
def test_outputs_depend_on_the_rest_of_the_batch_only_if_asked(reduce):
    x = inputs()
    other = torch.cat([x[:1], 3 * x[1:]])
    layer = seeded(reduce=reduce)
    torch.testing.assert_close(layer(x)[0], layer(other)[0], rtol=0, atol=1e-14)
    layer = seeded(reduce=reduce, func_norm="batch")
    assert (layer(x)[0] - layer(other)[0]).abs().max() > 1e-6


def test_attention_weights_sum_to_1_over_inputs_or_over_functions():
    x = inputs()
    for reduce, dim in (("global_attn", -2), ("spatial_attn", -1)):
        layer = seeded(reduce=reduce)
        values = layer.functions(x)
        weights = layer.attention(values)
        total = weights.sum(dim)
        torch.testing.assert_close(total, torch.ones_like(total))
        assert weights.shape == (6, 5, 1 if reduce == "global_attn" else 6)


def test_the_range_is_that_of_the_l2_normalised_functions():
    x = inputs(1)
    plain = seeded(func_norm="none").functions(x)[0]
    z = F.normalize(plain, p=2, dim=None)
    torch.testing.assert_close(seeded().functions(x)[0], (z - z.min()) / (z.max() - z.min()))
    constant = seeded(act="identity", func="sum").functions(torch.zeros(1, 5, dtype=torch.float64))
    assert torch.isfinite(constant).all()


def test_spatial_attention_is_the_formula_row_by_row():
    layer, x = seeded(reduce="spatial_attn", norm="none"), inputs(3)
    for row, y in zip(x, layer(x), strict=True):
        values = layer.functions(row[None])[0]
        scores = layer.score(values.T[None])[0].T / layer.temperature
        z = (values * scores.softmax(-1)).sum(-1)
        torch.testing.assert_close(layer.weight @ F.silu(z), y)
    assert layer(inputs(6).view(2, 3, 5)).shape == (2, 3, 4) and layer(x[:0]).shape == (0, 4)


def test_temperature_starts_at_the_root_of_the_width_and_acts_as_1_at_least():
    layer, x = seeded(AFKANLayer, 16, 2), inputs(2, 16)
    assert float(layer.temperature.detach()) == 4
    layer.temperature.data.fill_(1.0)
    values = layer.functions(x)
    at_1 = layer.attention(values)
    layer.temperature.data.fill_(0.1)
    torch.testing.assert_close(layer.attention(values), at_1)


@pytest.mark.parametrize("reduce", METHODS)
def test_gradients_reach_inputs_and_windows(reduce):
    layer, x = seeded(AFKANLayer, 3, 2, reduce=reduce), inputs(2, 3).requires_grad_()
    assert torch.autograd.gradcheck(layer, x)
    layer(x).sum().backward()
    assert layer.low.grad.abs().sum() > 0 and layer.high.grad.abs().sum() > 0


def test_bad_arguments_say_what_would_do():
    with pytest.raises(PomonaError, match="func='quad3' is not known; did you mean quad"):
        AFKANLayer(2, 2, func="quad3")
    with pytest.raises(PomonaError, match="reduce='local' is not known"):
        AFKANLayer(2, 2, reduce="local")
    with pytest.raises(PomonaError, match="k=-1 must be 0 or more"):
        ReLUKANLayer(2, 2, k=-1)
    with pytest.raises(PomonaError, match="ReLUKANLayer takes 5 features on axis -1"):
        seeded(ReLUKANLayer, 5, 4)(inputs(2, 3))
