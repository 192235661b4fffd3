import copy

import pytest
import torch
from torch import nn

from pomona.errors import PomonaError
from pomona.nn.activation import CLASSES, MetaActivation, Polynomial, Rational, Spline, act, is_activation

SEED = 1


def make(name, **options):
    return act(name, **options).double()


@pytest.mark.parametrize("name", CLASSES)
def test_every_derivative_passes_gradcheck(name):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64, requires_grad=True)
    module = make(name, features=4).eval()
    names, values = zip(*module.named_parameters(), strict=True) if list(module.parameters()) else ((), ())

    def call(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *[v.detach().requires_grad_() for v in values]))


@pytest.mark.parametrize("name", CLASSES)
def test_shapes_dtypes_empty_batch_vmap_and_copies(name):
    module = act(name, features=4, channel_dim=1)
    width = round(4 * getattr(module, "out_factor", 1.0))
    assert module(torch.randn(2, 4, 3, 3)).shape == (2, width, 3, 3)
    assert module(torch.randn(0, 4)).shape == (0, width)
    assert copy.deepcopy(module).bfloat16()(torch.randn(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    module.eval()
    x = torch.randn(5, 2, 4)
    assert torch.allclose(torch.vmap(module)(x), torch.stack([module(row) for row in x]), atol=1e-6)


@pytest.mark.parametrize("name", ["gelu", "rational", "spline", "meta", "swiglu", "prelu", "polynomial"])
def test_traces_for_export_without_branches_on_data(name):
    module = act(name, features=4)
    x = torch.randn(3, 4)
    program = torch.export.export(module, (x,))
    assert torch.allclose(program.module()(x), module(x), atol=1e-6)


def test_stochastic_ones_work_under_vmap():
    for name in ("stochastic_gelu", "rrelu"):
        y = torch.vmap(act(name), randomness="different")(torch.ones(3, 50).mul(-1))
        assert not torch.equal(y[0], y[1])


def test_gates_are_the_first_half_times_a_function_of_the_second():
    u, v = torch.randn(2, 3), torch.randn(2, 3)
    for name, gate in (("glu", torch.sigmoid), ("reglu", torch.relu), ("geglu", nn.GELU()), ("swiglu", nn.SiLU())):
        assert torch.allclose(act(name)(torch.cat([u, v], 1)), u * gate(v))


def test_spline_reproduces_a_line_through_its_knots_and_beyond():
    spline = Spline(5, 2.0, init="identity").double()
    x = torch.tensor([-7.0, -2.0, 0.3, 2.0, 9.0], dtype=torch.float64)
    assert torch.allclose(spline(x), x)
    with torch.no_grad():
        spline.values.copy_(torch.tensor([3.0, 0.0, 1.0, -1.0, 2.0]))
    assert torch.allclose(spline(spline.values.new_tensor([-2, -1, 0, 1, 2])), spline.values)
    assert spline(torch.tensor([3.0], dtype=torch.float64)).item() == pytest.approx(5.0)


def test_rational_starts_near_its_target_and_has_no_poles():
    x = torch.linspace(-3, 3, 301, dtype=torch.float64)
    for name, most in (("leaky_relu", 0.06), ("gelu", 0.02), ("tanh", 0.01)):
        assert (Rational(init=name).double()(x) - act(name)(x)).abs().max() < most
    wild = Rational().double()
    with torch.no_grad():
        wild.denominator.copy_(torch.tensor([3.0, -5.0, 2.0, -7.0]))
    assert wild(100 * x).isfinite().all()


def test_polynomial_starts_as_the_gaussian_projection():
    # the projection of x^2 + x on degree 2 is itself; of GELU on degree 1 it is E[f] + E[f'] z = 1/(2 sqrt(pi)) + z/2
    line = Polynomial(1).coefficients.detach().double()
    assert torch.allclose(line, torch.tensor([0.5 / torch.pi**0.5, 0.5], dtype=torch.float64), atol=1e-6)


def test_meta_activation_is_a_mixture_a_channel():
    meta = MetaActivation(2, ("identity", "relu"))
    with torch.no_grad():
        meta.logits.copy_(torch.tensor([[50.0, -50.0], [-50.0, 50.0]]))
    x = torch.tensor([[-1.0, -1.0], [2.0, 2.0]])
    assert torch.allclose(meta(x), torch.tensor([[-1.0, 0.0], [2.0, 2.0]]))


def test_trainable_functions_have_no_weight_decay():
    for name in ("prelu", "swish", "snake", "polynomial", "rational", "spline", "meta"):
        module = act(name)
        (group,) = module.param_groups()
        assert group["weight_decay"] == 0.0
        assert set(group["params"]) == set(module.parameters())


def test_is_activation_knows_ours_and_torchs():
    assert all(is_activation(act(name)) for name in CLASSES if name != "identity")
    assert is_activation(nn.GELU()) and not is_activation(nn.Linear(1, 1)) and not is_activation(nn.Identity())


def test_bad_input():
    with pytest.raises(PomonaError, match="act='geluu' is not known; did you mean"):
        act("geluu")
    with pytest.raises(PomonaError, match="act='gelu' has no option 'slope'; its options are: approximate, mu, sigma"):
        act("gelu", slope=2)
    with pytest.raises(PomonaError, match="even number of channels, got 3"):
        act("glu")(torch.zeros(1, 3))
    with pytest.raises(PomonaError, match="init='crelu' changes the width"):
        Spline(init="crelu")
