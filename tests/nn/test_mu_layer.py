import pytest
import torch

from pomona.errors import PomonaError
from pomona.nets.cost import parameters
from pomona.nn.mu_layer import (
    MuLayer,
    MuMixer,
    PolyBlock,
    PolyODE,
    coefficients,
    degree_along_line,
    mu_ffn,
    spatial_shift,
)

D = 5


def layer(**options) -> MuLayer:
    return MuLayer(D, 16, 7, generator=torch.Generator().manual_seed(0), **options).double()


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_follows_its_equation():
    net, x = layer(shift=True), rows(2, 3, 4)
    u, v = net.norm_u(spatial_shift(net.a(x))), net.norm_v(net.d(spatial_shift(net.b(x))))
    torch.testing.assert_close(net(x), net.c(u * v + u))


@pytest.mark.parametrize("bias", [False, True])
def test_degree_two_along_any_line_without_norms(bias):
    net, start, line = layer(norm=False, bias=bias), rows(1)[0], rows(2)[1]
    values = net(start + torch.arange(8, dtype=torch.float64)[:, None] * line)
    assert values.diff(n=3, dim=0).abs().max() < 1e-4 * values.abs().max() < 1e4
    assert values.diff(n=2, dim=0).abs().max() > 1e-2
    assert degree_along_line(net, start, line) == 2
    two = torch.nn.Sequential(layer(norm=False, bias=bias), MuLayer(7, norm=False).double())
    assert degree_along_line(two, start, line) == 4
    assert degree_along_line(PolyBlock(D, shift=False, norm=False).double(), start, line) == 4
    with pytest.raises(PomonaError, match="no polynomial of degree most=8 fits"):
        degree_along_line(layer(bias=bias), start, line, most=8)


def test_without_the_second_factor_it_is_the_linear_map_c_a():
    net, x = layer(norm=False, bias=False), rows(3)
    torch.nn.init.zeros_(net.d.weight)
    torch.testing.assert_close(net(x), x @ (net.c.weight @ net.a.weight).T)


@pytest.mark.parametrize("bias", [False, True])
def test_coefficients_reproduce_the_output(bias):
    net, x = layer(norm=False, bias=bias), rows(2, 3)
    with torch.no_grad():
        net.alpha.fill_(0.7)
    found = coefficients(net)
    torch.testing.assert_close(found(x), net(x), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found.quadratic, found.quadratic.mT)
    hessian = torch.autograd.functional.hessian(lambda one: net(one)[3], x[0, 0])
    torch.testing.assert_close(hessian, 2 * found.quadratic[3].detach())


@pytest.mark.parametrize("axis, index", [(1, 0), (1, 1), (2, 2), (2, 3)])
def test_shifted_groups_equal_a_roll_up_to_the_border(axis, index):
    x = torch.randn(2, 4, 5, 9)
    size, step = 9 // 4, 1 - 2 * (index % 2)
    group = slice(index * size, (index + 1) * size if index < 3 else None)
    moved, rolled, own = spatial_shift(x)[..., group], x[..., group].roll(step, axis), x[..., group]
    n = x.shape[axis]
    border = 0 if step > 0 else n - 1
    inner = [i for i in range(n) if i != border]
    assert torch.equal(moved.index_select(axis, torch.tensor(inner)), rolled.index_select(axis, torch.tensor(inner)))
    assert torch.equal(moved.select(axis, border), own.select(axis, border))
    kept = moved.sum(axis) - moved.select(axis, border)
    torch.testing.assert_close(kept, own.sum(axis) - own.select(axis, n - 1 if step > 0 else 0))


def test_shift_leaves_its_input_alone_and_takes_sequences():
    x = torch.arange(6.0).view(1, 3, 2)
    before = x.clone()
    assert spatial_shift(x)[0].tolist() == [[0, 3], [0, 5], [2, 5]] and torch.equal(x, before)


def test_parameters_of_the_mu_layer():
    h, r, out, alpha = 16, 3, 7, 1
    bare = D * h + D * r + r * h + h * out
    assert parameters(layer(rank=r, norm=False, bias=False)) == bare + alpha
    assert parameters(layer(rank=r, norm=False)) == bare + h + r + h + out + alpha
    assert parameters(layer(rank=r)) == bare + h + r + h + out + alpha + 4 * h
    assert layer().b.out_features == 16 // 8


def test_starts_with_constants_of_one_before_the_product():
    net = MuLayer(64, 512)
    assert all((m.bias == 1).all() for m in (net.a, net.b, net.d)) and not net.c.bias.any() and net.alpha == 1
    assert net.a.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.05)


def test_block_follows_its_equation():
    block, x = PolyBlock(D).double(), rows(2, 3, 4)
    y = x + block.first(block.norms[0](x))
    torch.testing.assert_close(block(x), y + block.second(block.norms[1](y)))
    assert block.first.shift and not block.second.shift and block.second.a.out_features == 3 * D
    dropping = PolyBlock(D, drop_path=0.999999).double()
    torch.testing.assert_close(dropping(x), x)


def test_mixer_shifts_on_the_grid():
    net, x = MuMixer(D, 12).double(), rows(2, 12)
    assert net.grid == (3, 4) and MuMixer(D, 7).grid == (1, 7)
    torch.testing.assert_close(net(x), net.mu(x.unflatten(1, (3, 4))).flatten(1, 2))
    line = MuMixer(D, 12, grid=(12,)).double()
    changed = x.clone()
    changed[:, 6] += 1
    moved = (line(changed) - line(x)).abs().amax((0, 2)) > 0
    assert moved.nonzero().flatten().tolist() == [5, 7]  # its own token comes by the residual
    mask = torch.arange(12).expand(2, -1) < 6
    torch.testing.assert_close(net(x, mask), net(torch.where(mask[..., None], x, 0)))
    assert mu_ffn(D, 12)(x.float()).shape == x.shape


def test_ode_integrates_its_field_to_fourth_order():
    field = torch.nn.Linear(D, D, bias=False)
    net = PolyODE(D, field=field).double()
    x, times = rows(3), torch.tensor([0.0, 0.2, 0.5], dtype=torch.float64)
    exact = torch.stack([x @ torch.linalg.matrix_exp(t * field.weight).T for t in times])
    errors = []
    for net.steps in (1, 2):
        errors.append((net(x, times) - exact).abs().max())
    assert 10 * errors[1] < errors[0] < 1e-3
    rest = PolyODE(D).double()
    assert torch.equal(rest(x, times), x.expand(3, -1, -1)) and isinstance(
        coefficients(rest.field).linear, torch.Tensor
    )


def test_gradient():
    assert torch.autograd.gradcheck(layer(shift=True), rows(2, 2, 3).requires_grad_())


def test_bad_arguments_say_what_would_do():
    with pytest.raises(PomonaError, match="coefficients needs a Mu-layer with norm=False and shift=False"):
        coefficients(layer())
    with pytest.raises(PomonaError, match="MuLayer takes 5 features on axis -1"):
        layer()(torch.zeros(2, 4))
    with pytest.raises(PomonaError, match=r"grid=\(3, 3\) does not hold tokens=8"):
        MuMixer(D, 8, grid=(3, 3))
    with pytest.raises(PomonaError, match=r"x has 9 tokens, but this mixer was made for the grid \(2, 4\)"):
        MuMixer(D, 8)(torch.zeros(1, 9, D))
