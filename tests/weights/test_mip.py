import pytest
import torch
from torch import nn

from pomona.errors import PomonaError
from pomona.weights.mip import MIPHyperNet, cos_sin, fourier, mip_convert, z_1mz
from pomona.weights.space import WeightSpace

SHAPE = {"gamma": (1,)}


def target(dtype=torch.float64):
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)


def hypernet(seed=0, **options):
    torch.manual_seed(seed)
    return MIPHyperNet(SHAPE, WeightSpace(target(), "*.weight"), **options)


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("encode", [cos_sin, fourier])
def test_encoding_has_squared_norm_equal_to_the_number_of_inputs_and_is_injective(encode):
    g = torch.rand(100, 5, dtype=torch.float64)
    torch.testing.assert_close(encode(g).square().sum(-1), torch.full((100,), 5.0, dtype=torch.float64))
    line = torch.linspace(0, 1, 501, dtype=torch.float64)[:, None]
    apart = torch.cdist(encode(line), encode(line)) + torch.eye(501)
    assert apart.min() > 0.9 * 2 * torch.sin(torch.tensor(torch.pi / 4 / 500))


def test_without_encoding_and_residual_weights_are_proportional_to_the_input():
    net = hypernet(encode=None, residual=False)
    g = torch.rand(7, 1, dtype=torch.float64)
    torch.testing.assert_close(net(0.1 * g), 0.1 * net(g), atol=1e-6, rtol=1e-6)


def test_weight_scale_does_not_follow_the_input_with_mip_and_does_without():
    def ratio(**options):
        g = torch.tensor([[0.01], [1.0]], dtype=torch.float64)
        stds = torch.stack([hypernet(seed, **options)(g).std(-1) for seed in range(50)])
        return (stds[:, 0] / stds[:, 1]).mean().item()

    assert 0.8 <= ratio() <= 1.25
    assert ratio(encode=None, residual=False) == pytest.approx(0.01)


@pytest.mark.parametrize("residual", [True, "bias"])
def test_with_a_zero_last_matrix_training_is_training_the_plain_net(residual):
    torch.manual_seed(0)
    plain = target()
    net = mip_convert(plain, SHAPE, "*", residual=residual)
    nn.init.zeros_(net.generator.last.weight)
    net.generator.last.weight.requires_grad_(False)
    if residual is True:
        net.generator.last.bias.requires_grad_(False)
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.randint(3, (20,))
    for model, context in ((plain, ()), (net, (torch.rand(1, dtype=torch.float64),))):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x, *context), y).backward()
            optimizer.step()
    for g in (0.0, 0.3, 1.0):
        torch.testing.assert_close(net(x, torch.tensor([g], dtype=torch.float64)), plain(x))


def test_materialized_and_called_outputs_are_equal():
    net = mip_convert(target(), SHAPE)
    g, x = torch.rand(1, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    torch.testing.assert_close(net.materialize(g)(x), net(x, g), atol=1e-5, rtol=0)


def test_separate_residual_weights_add_one_number_a_weight():
    p = 6 * 8 + 8 * 3
    ordinary = hypernet(residual=False)
    assert count(hypernet(residual=True)) == count(ordinary) + p
    assert count(hypernet(residual="bias")) == count(ordinary)
    assert count(ordinary) == (2 * 16 + 16) + (16 * 128 + 128) + (128 * p + p)


def test_split_init_draws_each_tensor_as_a_head_of_its_own():
    net = hypernet(hidden=(16, 512))
    first, second = net.last.weight.split([48, 24])
    gain = (2 / (1 + 0.01**2)) ** 0.5
    assert first.std().item() == pytest.approx(gain / 48**0.5, rel=0.03)
    assert second.std().item() == pytest.approx(gain / 24**0.5, rel=0.03)
    joint = hypernet(hidden=(16, 512), split_init=False)
    assert joint.last.weight.std().item() == pytest.approx(gain / 72**0.5, rel=0.03)


def test_theta0_starts_as_the_networks_own_weights():
    torch.manual_seed(0)
    net = target()
    space = WeightSpace(net)
    for residual in (True, "bias"):
        hyper = MIPHyperNet(SHAPE, space, residual=residual)
        nn.init.zeros_(hyper.last.weight)
        assert torch.equal(hyper(torch.rand(1, dtype=torch.float64)), space.read())


def test_several_inputs_join_in_the_order_of_their_names():
    space = WeightSpace(target())
    net = MIPHyperNet({"b": (2,), "a": (), "kind": (3,)}, space, encode={"a": "cos_sin", "b": "z_1mz", "kind": None})
    inputs = {"b": torch.rand(4, 2), "a": torch.rand(4), "kind": torch.eye(3)[[0, 1, 2, 0]]}
    inputs = {name: value.double() for name, value in inputs.items()}
    expected = torch.cat([cos_sin(inputs["a"][:, None]), z_1mz(inputs["b"]), inputs["kind"]], dim=-1)
    assert torch.equal(net.encode(inputs), expected)
    assert net(inputs).shape == (4, space.numel)


def test_bounds_rescale_and_values_outside_are_warned_about():
    net = MIPHyperNet(SHAPE, WeightSpace(target()), bounds={"gamma": (-2.0, 2.0)})
    plain = MIPHyperNet(SHAPE, WeightSpace(target()))
    g = torch.tensor([1.0], dtype=torch.float64)
    assert torch.equal(net.encode(g), plain.encode(torch.tensor([0.75], dtype=torch.float64)))
    with pytest.warns(UserWarning, match="gamma lies outside"):
        plain(torch.tensor([1.5], dtype=torch.float64))


@pytest.mark.parametrize(
    "options", [{"act": a} for a in ("relu", "gelu", "silu", "tanh")] + [{"norm": "layer", "dropout": 0.1}]
)
def test_options_run_under_vmap_and_on_an_empty_batch(options):
    net = hypernet(**options).eval()
    g = torch.rand(4, 1, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(net)(g), net(g))
    assert net(g[:0]).shape == (0, 72)


def test_gradient_check():
    net = mip_convert(target(), SHAPE, hidden=(3,))
    x = torch.randn(4, 6, dtype=torch.float64)
    g = torch.rand(4, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g: net(x, g), (g,))


def test_unknown_options_and_shapes_are_refused():
    with pytest.raises(PomonaError, match="encode='cossin' is not known; did you mean cos_sin?"):
        hypernet(encode="cossin")
    with pytest.raises(PomonaError, match=r"gamma has shape \(4, 2\); it must end with \(1,\)"):
        hypernet()(torch.rand(4, 2, dtype=torch.float64))
    with pytest.raises(PomonaError, match="leaves no parameter"):
        mip_convert(target(), SHAPE, "*.kernel")
