"""What every layer that fills a slot must pass, over all of slots.toml: a new layer gets it by being there."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from pomona import catalog, options
from pomona.data import load
from pomona.errors import PomonaError
from pomona.recipe.recipe import Recipe
from pomona.train import Budget, Training, evaluate, fit

SIZES = {
    "linear": {"in_features": 8, "out_features": 12, "bias": True},
    "act": {"features": 8, "channel_dim": -1},
    "norm": {"features": 8, "dims": 0},
    "pool": {"kernel_size": 2, "stride": 2, "channels": 8},
    "conv": {"in_channels": 8, "out_channels": 8, "kernel_size": 3, "stride": 1, "padding": 1, "bias": True},
    "ffn": {"dim": 8, "hidden": 16},
    "mixer": {"dim": 8, "tokens": 6},
    "memory": {"features": 8},
    "head": {"in_features": 8, "out_features": 12},
}
SHAPES = {"pool": (8, 6, 6), "conv": (8, 6, 6), "mixer": (6, 8)}
LAYERS = [(slot, name) for slot in SIZES for name in catalog.slots()[slot]]
IDS = [f"{slot}={name}" for slot, name in LAYERS]
NEEDS_POSITIONS = {("norm", "instance")}

every = pytest.mark.parametrize(("slot", "name"), LAYERS, ids=IDS)


def make(slot: str, name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    sizes = {**SIZES[slot], "dims": 1} if (slot, name) in NEEDS_POSITIONS else SIZES[slot]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return options.make(slot, name, **sizes).to(dtype)


def rows(slot: str, name: str, count: int = 4, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    shape = (8, 5) if (slot, name) in NEEDS_POSITIONS else SHAPES.get(slot, (8,))
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_keeps_the_dtype_and_gives_finite_numbers(slot: str, name: str, dtype: torch.dtype) -> None:
    y = make(slot, name, dtype=dtype)(rows(slot, name, dtype=dtype))
    assert y.dtype == dtype
    assert torch.isfinite(y).all()


@every
def test_gives_the_promised_shape(slot: str, name: str) -> None:
    layer, x = make(slot, name), rows(slot, name)
    y = layer(x)
    if slot in {"linear", "head"}:
        expected = (4, 12)
    elif slot == "act":
        expected = (4, round(8 * getattr(layer, "out_factor", 1)))
    elif slot == "pool":
        expected = (4, 8, 3, 3)
    else:
        expected = tuple(x.shape)
    assert tuple(y.shape) == expected


@every
def test_takes_an_empty_batch_and_a_single_example(slot: str, name: str) -> None:
    layer = make(slot, name).eval()
    assert len(layer(rows(slot, name, 0))) == 0
    assert torch.isfinite(layer(rows(slot, name, 1))).all()


@every
def test_an_example_does_not_depend_on_those_beside_it(slot: str, name: str) -> None:
    layer, x = make(slot, name, dtype=torch.float64).eval(), rows(slot, name, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[:2], layer(x[:2]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("slot", "name"), [p for p in LAYERS if p[0] in {"linear", "act", "ffn", "memory", "head"}])
def test_takes_extra_leading_dimensions_and_strided_input(slot: str, name: str) -> None:
    layer = make(slot, name, dtype=torch.float64).eval()
    x = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(layer(x), layer(x.flatten(0, 1)).unflatten(0, (3, 5)))
    strided = x.transpose(0, 1)
    torch.testing.assert_close(layer(strided), layer(strided.contiguous()))


@every
def test_is_the_same_for_the_same_seed(slot: str, name: str) -> None:
    a, b = make(slot, name, 3).state_dict(), make(slot, name, 3).state_dict()
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], rtol=0, atol=0, equal_nan=True)


@every
def test_survives_copying_and_its_state_dict(slot: str, name: str) -> None:
    layer, x = make(slot, name, dtype=torch.float64).eval(), rows(slot, name, dtype=torch.float64)
    other = make(slot, name, seed=9, dtype=torch.float64).eval()
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x), layer(x))
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))


@every
def test_gradients_are_right(slot: str, name: str) -> None:
    layer, x = make(slot, name, dtype=torch.float64).eval(), rows(slot, name, 2, torch.float64)
    names = [n for n, p in layer.named_parameters() if p.requires_grad]
    values = [layer.get_parameter(n).detach().clone().requires_grad_() for n in names]

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *values), eps=1e-6, atol=1e-4, fast_mode=True)


@every
def test_stacks_under_vmap(slot: str, name: str) -> None:
    layers = [make(slot, name, seed, torch.float64).eval() for seed in range(3)]
    x = rows(slot, name, dtype=torch.float64)
    parameters, buffers = stack_module_state(layers)
    base = copy.deepcopy(layers[0])

    def run(parameters: dict, buffers: dict, x: torch.Tensor) -> torch.Tensor:
        return functional_call(base, (parameters, buffers), (x,))

    if not parameters and not buffers:
        pytest.skip("nothing to stack")
    together = vmap(run, in_dims=(0, 0, None))(parameters, buffers, x)
    torch.testing.assert_close(together, torch.stack([layer(x) for layer in layers]))


@every
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_stays_finite_for_small_and_large_inputs(slot: str, name: str, scale: float) -> None:
    layer = make(slot, name)
    x = (scale * rows(slot, name)).requires_grad_()
    y = layer(x)
    assert torch.isfinite(y).all()
    objective = y.square().mean()
    if objective.requires_grad and torch.isfinite(objective):  # mixer=none gives zeros, whatever comes in
        objective.backward()
        assert all(torch.isfinite(p.grad).all() for p in [x, *layer.parameters()] if p.grad is not None)


@pytest.mark.slow
@every
def test_compiles_whole(slot: str, name: str) -> None:
    torch.compiler.reset()
    layer, x = make(slot, name).eval(), rows(slot, name)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


@every
def test_says_what_it_is_in_one_piece(slot: str, name: str) -> None:
    assert repr(make(slot, name)).startswith(type(make(slot, name)).__name__)


HOSTS = {
    **dict.fromkeys(("linear", "act", "norm", "memory", "head"), "mlp width=32 depth=1"),
    **dict.fromkeys(("pool", "conv"), "convnet width=4"),
    **dict.fromkeys(("mixer", "ffn"), "mixer width=32 depth=1"),
}
"""The backbone in which a layer of each slot is trained on the digits."""
FLOORS = {
    ("linear", "low_rank"): 0.8,
    ("linear", "relu_kan"): 0.7,
    ("linear", "af_kan"): 0.75,
    ("head", "gmm"): 0.4,
    ("conv", "smpconv"): 0.35,
    ("conv", "lambda"): 0.5,
    ("mixer", "none"): 0.6,
    ("mixer", "linear_attention"): 0.5,
}
"""Accuracy on validation after a few epochs, where it is another than usual: few parameters, or many steps needed."""


@every
def test_learns_the_digits(slot: str, name: str) -> None:
    if (slot, name) == ("linear", "nmu"):
        pytest.skip("a product over 64 pixels, most of them dark, tells no classes apart")
    task = load("digits")
    host = "convnet width=8" if (slot, name) in NEEDS_POSITIONS else HOSTS[slot]
    net = Recipe.parse(f"{host} {slot}={name}").build(task, seed=0)
    settings = Training(lr=1e-2, optimizer="adam", patience=None, batch_size=32)
    found = fit(net, task, settings, budget=Budget("epochs", 8 if slot == "mixer" else 4), seed=0)
    assert evaluate(found.net, task, "valid")["accuracy"] > FLOORS.get((slot, name), 0.75 if slot == "mixer" else 0.85)


# activations promote integers, as torch's own do
@pytest.mark.parametrize(("slot", "name"), [p for p in LAYERS if p[0] != "act"])
def test_integers_are_refused_in_a_sentence(slot: str, name: str) -> None:
    layer, x = make(slot, name), rows(slot, name)
    if not type(layer).__module__.startswith("pomona.") or not any(True for _ in layer.parameters()):
        pytest.skip("torch's own, or without parameters")
    with pytest.raises(PomonaError, match="takes floating-point numbers, not torch.int64"):
        layer(x.long())
