import math

import pytest
import torch
from sklearn.linear_model import Ridge
from torch import nn

from pomona.errors import PomonaError
from pomona.nn.snnk import SNNK, Bundle, SNNKAdapter, bundle, fully_bundled, gaussian_directions
from pomona.nn.swap import swap

VALUES = {
    "sin": torch.sin,
    "cos": torch.cos,
    "gauss": lambda z: torch.exp(-z.square() / 2),
    "exp": torch.exp,
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def unit_layer(inputs=4, outputs=3):
    linear = nn.Linear(inputs, outputs).double()
    with torch.no_grad():
        linear.weight.copy_(nn.functional.normalize(draw(outputs, inputs), dim=1))
        linear.bias.copy_(draw(outputs, seed=1) / 2)
    return linear, nn.functional.normalize(draw(6, inputs, seed=2), dim=1)


@pytest.mark.parametrize("f", VALUES)
def test_estimate_tends_to_the_layer(f):
    linear, x = unit_layer()
    exact = VALUES[f](linear(x)).detach()
    draws = 200_000  # two features each, but of 'exp'
    estimate = SNNK.like(linear, draws * (1 + (f != "exp")), f, orthogonal=False, generator=seeded())(x).detach()
    tolerance = {"exp": 0.06, "gauss": 0.3}  # frequencies without a bound have a variance of exp(|a| |x + w|^2)
    torch.testing.assert_close(estimate, exact, atol=tolerance.get(f, 0.03), rtol=0)

    def error(m):
        errors = [SNNK.like(linear, m, f, orthogonal=False, generator=seeded(k))(x) - exact for k in range(20)]
        return float(torch.stack(errors).detach().square().mean().sqrt())

    assert 2 < error(300) / error(4800) < 8  # 4 by the square root


@pytest.mark.parametrize("f", ["exp", "gauss"])
def test_positive_features_are_unbiased_too(f):
    linear, x = unit_layer()
    estimate = SNNK.like(linear, 200_000, f, orthogonal=False, positive=0.05, generator=seeded())(x)
    torch.testing.assert_close(estimate, VALUES[f](linear(x)), atol=0.06, rtol=0)


def test_relu_features_give_the_arc_cosine_kernel():
    linear, x = unit_layer()
    x = x * torch.linspace(0.5, 2, 6, dtype=torch.float64)[:, None]
    t = torch.acos(nn.functional.cosine_similarity(x[:, None], linear.weight, dim=-1).clamp(-1, 1))
    sizes = x.norm(dim=1)[:, None] * linear.weight.norm(dim=1)
    kernel = sizes * (t.sin() + (math.pi - t) * t.cos()) / (2 * math.pi)
    layer = SNNK.like(linear, 200_000, generator=seeded())
    torch.testing.assert_close(layer(x), kernel + linear.bias, atol=0.02, rtol=0)
    normal = SNNK.like(linear, 50, normalize=True, generator=seeded())
    torch.testing.assert_close(normal(3 * x), normal(x))


def test_orthogonal_directions():
    g = gaussian_directions(10, 4, generator=seeded()).double()
    for block in g.split(4):
        gram = block @ block.T
        torch.testing.assert_close(gram, torch.diag(gram.diagonal()), atol=1e-5, rtol=0)
    lengths = gaussian_directions(40_000, 5, generator=seeded()).square().sum(1)
    assert float(lengths.mean()) == pytest.approx(5, rel=0.02) and float(lengths.var()) == pytest.approx(10, rel=0.05)
    linear, x = unit_layer(8)

    def error(orthogonal):
        layers = [SNNK.like(linear, 8, orthogonal=orthogonal, generator=seeded(k)) for k in range(400)]
        return float(torch.stack([layer(x).detach() for layer in layers]).var(0).mean())

    assert error(True) < error(False)


def test_adapter_is_the_identity_at_the_start():
    adapter, x = SNNKAdapter(6, 4, generator=seeded()).double(), draw(5, 6)
    assert torch.equal(adapter(x), x)
    adapter(x).sum().backward()
    assert (adapter.layer.psi.grad != 0).any()


def test_parameters_and_flops():
    layer = SNNK(512, 256, 64, bias=False)
    assert layer.n_params() == 256 * 64 < 512 * 256
    assert layer.flops(3) == 3 * 2 * 64 * (512 + 256)
    assert SNNK(512, 256, 64, "sin").n_params() == 256 * 64
    frozen = SNNK(8, 4, mode="frozen")
    assert frozen.n_params() == 0 and {"psi", "bias", "directions"} <= set(frozen.state_dict())


@pytest.mark.parametrize("f", ["relu", *VALUES])
def test_first_outputs(f):
    y = SNNK(256, 128, 128, f, generator=seeded())(
        torch.randn(300, 256, generator=seeded(1)) / (1 if f == "relu" else 16)
    )
    assert torch.isfinite(y).all()
    if f == "relu":
        assert float(y.detach().square().mean()) == pytest.approx(1, rel=0.2)
    assert torch.isfinite(SNNK(8, 4, f=f, generator=seeded())(1e3 * torch.randn(5, 8, generator=seeded()))).all()


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)).double()


def test_bundle_equals_the_layers_one_after_another():
    net, x = perceptron(), draw(4, 6)
    layers = [SNNK.like(net[k], 16, generator=g) for g in [seeded()] for k in (0, 2)]
    expected = layers[1](layers[0](x))
    half = bundle(net, 2, 16, generator=seeded())
    torch.testing.assert_close(half(x), net[4](expected))
    assert isinstance(half[0], Bundle) and len(half) == 1  # the last layer is merged
    one = bundle(net, 1, 16, generator=seeded())
    torch.testing.assert_close(one(x), net[2:](layers[0](x)))
    torch.testing.assert_close(fully_bundled(net, 16, generator=seeded())(x), half(x))
    assert sum(p.numel() for p in half.parameters() if p.requires_grad) == 3 * 16 + 3


def test_closed_form_fit_is_ridge_regression():
    net = fully_bundled(perceptron(), 12, generator=seeded())
    x, y = draw(60, 6), draw(60, 3, seed=1)
    net.fit_closed_form(x, y, ridge=0.3)
    oracle = Ridge(alpha=0.3, solver="cholesky").fit(net.features(x).detach(), y)
    torch.testing.assert_close(net.weight.detach(), torch.tensor(oracle.coef_), atol=1e-6, rtol=0)
    torch.testing.assert_close(net.bias.detach(), torch.tensor(oracle.intercept_), atol=1e-6, rtol=0)
    labels = torch.arange(60) % 3
    by_class = net.fit_closed_form(x, labels).weight.clone()
    torch.testing.assert_close(by_class, net.fit_closed_form(x, nn.functional.one_hot(labels)).weight)


def test_takes_the_place_of_layers_in_a_network():
    swapped = swap(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), "0", SNNK.like, example=torch.zeros(1, 8))
    assert isinstance(swapped.net[0], SNNK)


def test_gradients():
    layer = SNNK(4, 3, 6, "gauss", generator=seeded()).double()
    assert torch.autograd.gradcheck(
        lambda x, psi: torch.func.functional_call(layer, {"psi": psi}, (x,)), (draw(2, 4).requires_grad_(), layer.psi)
    )


def test_bad_input():
    with pytest.raises(PomonaError, match="m=5 must be even for f='sin'"):
        SNNK(4, 3, 5, "sin")
    with pytest.raises(PomonaError, match="f='sine' is not known; did you mean sin"):
        SNNK(4, 3, f="sine")
    with pytest.raises(PomonaError, match="layers=3: the network must start with so many pairs"):
        bundle(perceptron(), 3, 4)
    with pytest.raises(PomonaError, match="SNNK takes 4 features"):
        SNNK(4, 3)(torch.zeros(2, 5))
