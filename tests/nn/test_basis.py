import numpy as np
import pytest
import torch
from scipy import interpolate

from pomona.errors import PomonaError
from pomona.nn.basis import BASES, BSpline, fit_coefficients, make_basis


def random_grid(features: int = 2, size: int = 6, k: int = 3) -> BSpline:
    basis = BSpline(features, size, -2.0, 1.5, k=k).double()
    basis.refit(torch.randn(200, features, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    return basis


def cox_de_boor(x: torch.Tensor, t: torch.Tensor, k: int) -> torch.Tensor:
    """The recursion as written, for one feature: the oracle."""
    value = ((x[:, None] >= t[:-1]) & (x[:, None] < t[1:])).to(x.dtype)
    for d in range(1, k + 1):
        rising = (x[:, None] - t[: -d - 1]) / (t[d:-1] - t[: -d - 1])
        falling = (t[d + 1 :] - x[:, None]) / (t[d + 1 :] - t[1:-d])
        value = rising * value[:, :-1] + falling * value[:, 1:]
    return value


def test_bspline_bases_are_non_negative_and_sum_to_1_inside_the_grid():
    basis = random_grid()
    values = basis(basis.points(50))
    assert values.min() >= -1e-15
    torch.testing.assert_close(values.sum(-1), torch.ones_like(values[..., 0]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("k", [0, 1, 2, 3, 5])
def test_bspline_bases_match_scipy_basis_element(k):
    basis = random_grid(k=k)
    t = basis.extended()
    x = torch.stack([torch.linspace(float(r[0]) + 1e-3, float(r[-1]) - 1e-3, 301, dtype=torch.float64) for r in t], 1)
    values = basis(x)
    for feature in range(2):
        knots = t[feature].numpy()
        for m in range(basis.n_basis):
            element = interpolate.BSpline.basis_element(knots[m : m + k + 2], extrapolate=False)
            expected = np.nan_to_num(element(x[:, feature].numpy()))
            np.testing.assert_allclose(values[:, feature, m].numpy(), expected, atol=1e-10)
        torch.testing.assert_close(values[:, feature], cox_de_boor(x[:, feature], t[feature], k), atol=1e-12, rtol=0)


def test_at_most_k_plus_1_bases_are_non_zero_at_any_x():
    basis = random_grid(features=1)
    x = torch.linspace(-8, 8, 999, dtype=torch.float64)[:, None]
    assert (basis(x) != 0).sum(-1).max() == 4


def test_bspline_is_smooth_to_zero_beyond_the_extended_grid():
    basis = BSpline(1, 5).double()
    low, high = basis.extended()[0, [0, -1]]
    assert basis(torch.stack([low - 1e-9, low, high, high + 1, high * 100])[:, None]).abs().max() < 1e-20


@pytest.mark.parametrize("name", BASES)
def test_every_basis_has_its_shape_gradient_and_vmap(name):
    basis = make_basis(name, 3, 4, -1.0, 1.0).double()
    x = (torch.rand(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1).requires_grad_()
    values = basis(x)
    assert values.shape == (2, 5, 3, basis.n_basis)
    torch.testing.assert_close(torch.func.vmap(basis)(x), values)
    assert torch.autograd.gradcheck(basis, x)
    assert basis(x[:, :0]).shape == (2, 0, 3, basis.n_basis)
    assert torch.isfinite(make_basis(name, 3, 4, -1.0, 1.0)(1e3 * x.float())).all()


@pytest.mark.parametrize("k", range(4))
def test_bspline_differentiates_again_and_forwards(k):
    basis = random_grid(features=2, size=3, k=k)
    x = torch.randn(2, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(basis, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(basis, x, check_fwd_over_rev=True, check_rev_over_rev=True)

    def loss(row: torch.Tensor) -> torch.Tensor:
        return basis(row).square().sum()

    row = x[0, 0].detach()
    over = torch.func.vmap(torch.func.hessian(loss))(x[0].detach())[0]  # forward over reverse
    torch.testing.assert_close(over, torch.autograd.functional.hessian(loss, row))


def test_bspline_third_derivative_is_that_of_the_cubics():
    basis, x = random_grid(features=1), torch.linspace(-1.4, 1.3, 40, dtype=torch.float64)
    third = torch.func.vmap(torch.func.jacrev(torch.func.jacrev(torch.func.jacrev(lambda u: basis(u[None])[0]))))(x)
    t = basis.extended()[0].numpy()
    for m in range(basis.n_basis):
        expected = interpolate.BSpline(t, np.eye(basis.n_basis)[m], 3)(x.numpy(), nu=3)
        np.testing.assert_allclose(third[:, m].detach().numpy(), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", BASES)
def test_fit_coefficients_recovers_a_function_of_the_basis(name):
    basis = make_basis(name, 2, 5, -1.0, 1.0).double()
    c = torch.randn(3, 2, basis.n_basis, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x = basis.points(10)
    y = torch.einsum("pim,oim->poi", basis(x), c)
    found = fit_coefficients(basis, x, y)
    assert found.is_contiguous()  # torch's L-BFGS fails otherwise
    again = torch.einsum("pim,oim->poi", basis(x), found)
    torch.testing.assert_close(again, y, atol=1e-6, rtol=1e-6)


def test_gram_polynomials_are_orthonormal_on_even_points():
    basis = make_basis("gram", 1, 5, -1.0, 1.0).double()
    v = torch.linspace(-1, 1, 26, dtype=torch.float64)[1:-1]  # tanh reaches no end
    ends = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    values = torch.cat([basis(torch.atanh(v)[:, None]), basis(30 * ends[:, None])])[:, 0]
    torch.testing.assert_close(values.T @ values / 26, torch.eye(6, dtype=torch.float64))


def test_rational_functions_have_their_numerators_and_denominators():
    u = torch.linspace(-3, 3, 31, dtype=torch.float64)[:, None]
    values, q = make_basis("rational", 1, 2, -1.0, 1.0).double()(u)[:, 0], 1 + u[:, 0] ** 2
    u = u[:, 0]
    tops = ((1 - u**2) * q, (1 - u**2) ** 2 - 4 * u**2, 2 * u * q, 4 * u * (1 - u**2))
    torch.testing.assert_close(values[:, 1:], torch.stack(tops, -1) / q[:, None] ** 2)


def test_refit_mixes_uniform_and_quantile_edges():
    x = torch.rand(1001, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) ** 3
    basis = BSpline(1, 4, grid_eps=0.1).double()
    basis.refit(x)
    share = torch.linspace(0, 1, 5, dtype=torch.float64)
    uniform = x.min() + (x.max() - x.min()) * share
    expected = 0.1 * uniform + 0.9 * torch.quantile(x[:, 0], share)
    torch.testing.assert_close(basis.edges[0, 1:-1], expected[1:-1])
    margin = 0.05 * (x.max() - x.min())
    torch.testing.assert_close(basis.edges[0, [0, -1]], torch.stack([x.min() - margin, x.max() + margin]))


def test_refit_of_a_constant_feature_keeps_an_interval():
    basis = BSpline(1, 4)
    basis.refit(torch.full((10, 1), 3.0))
    assert (basis.edges.diff() > 0).all()
    assert torch.isfinite(basis(torch.full((2, 1), 3.0))).all()


def test_bad_arguments_say_what_would_do():
    with pytest.raises(PomonaError, match="basis='bsplin' is not known; did you mean bspline"):
        make_basis("bsplin", 1, 5, -1.0, 1.0)
    with pytest.raises(PomonaError, match="must go from a lower to a higher number"):
        BSpline(1, 5, 1.0, -1.0)
