import pytest
import torch
from torch import nn

from pomona.errors import PomonaError
from pomona.nn.activation_functions import (
    GELU,
    CReLU,
    Maxout,
    RReLU,
    Snake,
    Squareplus,
    StochasticGELU,
    Swish,
)

X = torch.linspace(-10, 10, 20001, dtype=torch.float64)


def test_gelu_value_slope_and_minimum():
    x = torch.zeros((), dtype=torch.float64, requires_grad=True)
    y = GELU()(x)
    (slope,) = torch.autograd.grad(y, x)
    assert y.item() == 0
    assert slope.item() == pytest.approx(0.5, abs=1e-12)
    fine = torch.linspace(-0.752, -0.751, 100001, dtype=torch.float64)
    values = GELU()(fine)
    assert values.min().item() == pytest.approx(-0.16997, abs=5e-6)
    assert fine[values.argmin()].item() == pytest.approx(-0.75179, abs=5e-6)


@pytest.mark.parametrize("module", [GELU(), GELU(sigma=2.0), nn.SiLU(), Swish(3.0).double()])
def test_gelu_and_silu_difference_is_the_identity(module):
    assert torch.allclose(module(X) - module(-X), X, atol=1e-12)


def test_gelu_approximations_are_close():
    exact = GELU()(X)
    assert (GELU("tanh")(X) - exact).abs().max() < 5e-4
    assert (GELU("sigmoid")(X) - exact).abs().max() < 2.1e-2


def test_general_form_contains_the_plain_one():
    assert torch.allclose(GELU(mu=1e-14)(X), GELU()(X), atol=1e-12)
    assert torch.allclose(GELU("tanh", mu=1e-14)(X), GELU("tanh")(X), atol=1e-12)


def test_gelu_tends_to_relu_as_sigma_falls():
    gaps = [(GELU(sigma=s)(X) - torch.relu(X)).abs().max().item() for s in (1.0, 0.1, 0.01)]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 2e-3


def test_gelu_derivative_is_phi_plus_x_density():
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(GELU(mu=1e-15)(x).sum(), x)
    normal = torch.distributions.Normal(0.0, 1.0)
    assert torch.allclose(slope, normal.cdf(X) + X * normal.log_prob(X).exp(), atol=1e-10)


def test_stochastic_gelu_mean_is_gelu():
    draws = 40000
    x = torch.tensor([-2.0, -0.7, 0.0, 0.5, 3.0], dtype=torch.float64)
    module = StochasticGELU(generator=torch.Generator().manual_seed(0))
    samples = module(x.expand(draws, -1))
    keep = module.keep(x)
    error = (x.square() * keep * (1 - keep) / draws).sqrt()
    assert ((samples.mean(0) - GELU()(x)).abs() <= 5 * error + 1e-12).all()
    assert bool(((samples == 0) | (samples == x)).all())
    assert torch.equal(module.eval()(x), GELU()(x))


def test_stochastic_gelu_is_repeatable_from_its_generator():
    runs = [StochasticGELU(generator=torch.Generator().manual_seed(3))(X) for _ in range(2)]
    assert torch.equal(*runs)
    assert torch.equal(RReLU(0.1, 0.1)(X), RReLU(0.1, 0.1).eval()(X))


def test_rrelu_slopes_stay_in_range():
    x = -torch.ones(10000)
    slopes = -RReLU(generator=torch.Generator().manual_seed(0))(x)
    assert 1 / 8 <= slopes.min() < 0.13
    assert 0.33 < slopes.max() <= 1 / 3


def test_squareplus_is_close_to_relu_and_snake_to_a_line():
    assert torch.allclose(Squareplus(1e-12)(X), torch.relu(X), atol=1e-5)
    snake = Snake(2.0).double()
    assert torch.allclose(snake(X), X + (1 - torch.cos(4 * X)) / 4, atol=1e-12)


def test_crelu_and_maxout_change_width_as_declared():
    x = torch.randn(2, 6, 5, 5)
    for module in (CReLU(channel_dim=1), Maxout(3, channel_dim=1)):
        assert module(x).shape == (2, round(6 * module.out_factor), 5, 5)
    assert torch.equal(CReLU(1)(x)[:, :6] - CReLU(1)(x)[:, 6:], x)
    assert torch.equal(Maxout(2)(torch.tensor([[1.0, 4.0, 3.0, 2.0]])), torch.tensor([[4.0, 3.0]]))


def test_bad_input():
    with pytest.raises(PomonaError, match="approximate='tan' is not known; did you mean tanh"):
        GELU("tan")
    with pytest.raises(PomonaError, match="sigma=0 must be a number above 0"):
        GELU(sigma=0)
    with pytest.raises(PomonaError, match="maxout k=4 needs channels it divides, got 6"):
        Maxout(4)(torch.zeros(2, 6))
