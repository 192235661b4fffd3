"""What every layer must pass that fills a slot or is named in the catalogue: a new one gets it by being there."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils._pytree import tree_leaves, tree_map

from pomona import catalog, options
from pomona.data import load
from pomona.errors import PomonaError
from pomona.recipe.recipe import Recipe
from pomona.train import Budget, Training, evaluate, fit
from tests.layers_outside_slots import NOT_LAYERS, OUTSIDE, Case, Ids, N

SIZES = {
    "linear": {"in_features": 8, "out_features": 12, "bias": True},
    "act": {"features": 8, "channel_dim": -1},
    "norm": {"features": 8, "dims": 0},
    "pool": {"kernel_size": 2, "stride": 2, "channels": 8},
    "conv": {"in_channels": 8, "out_channels": 8, "kernel_size": 3, "stride": 1, "padding": 1, "bias": True},
    "residual": {"features": 8},
    "ffn": {"dim": 8, "hidden": 16},
    "mixer": {"dim": 8, "tokens": 6},
    "memory": {"features": 8},
    "head": {"in_features": 8, "out_features": 12},
}
INPUTS = {"pool": (N(8, 6, 6),), "conv": (N(8, 6, 6),), "mixer": (N(6, 8),), "residual": (N(8), N(8))}
OUT = {"linear": (12,), "head": (12,), "pool": (8, 3, 3)}
LEADING = {"linear", "act", "ffn", "memory", "head"}
NEEDS_POSITIONS = {("norm", "instance")}
LAYERS = [(slot, name) for slot in SIZES for name in catalog.slots()[slot]]


def in_slot(slot: str, name: str) -> Case:
    sizes, inputs = SIZES[slot], INPUTS.get(slot, (N(8),))
    if (slot, name) in NEEDS_POSITIONS:
        sizes, inputs = {**sizes, "dims": 1}, (N(8, 5),)
    made = Case(lambda _: options.make(slot, name, **sizes), inputs, OUT.get(slot), leading=slot in LEADING)
    if slot == "act":
        return replace(made, out=(round(8 * getattr(made.make(None), "out_factor", 1)),))
    return made


CASES: dict[str, Case] = {f"{slot}={name}": in_slot(slot, name) for slot, name in LAYERS}
CASES |= {
    part: replace(case, make=lambda _, case=case, part=part: case.make(catalog.load(part)))
    for part, case in OUTSIDE.items()
}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def cases(which: Callable[[str, Case], bool] = lambda name, case: True) -> pytest.MarkDecorator:
    """The test is for each case of which this holds; one that is excused must fail it."""
    chosen = [name for name, case in CASES.items() if which(name, case)]
    return pytest.mark.parametrize("name", chosen, ids=[name.removeprefix("pomona.") for name in chosen])


every = cases()


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def excuses(request: pytest.FixtureRequest) -> None:
    given = getattr(request.node, "callspec", None)
    case = CASES.get(given.params.get("name", "")) if given else None
    if case and (reason := case.excused.get(request.node.originalname.removeprefix("test_"))):
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))


def make(
    name: str, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu", wake: bool = False
) -> nn.Module:
    """The layer; with ``wake`` parameters that start at zero are drawn at random, since they hide others."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = CASES[name].make(None)
        for parameter in layer.parameters() if wake else ():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return layer.to(device, dtype)


def awake(name: str, seed: int = 0, device: str = "cpu") -> nn.Module:
    return make(name, seed, torch.float64, device, wake=True).eval()


def arguments(
    name: str, count: int = 4, dtype: torch.dtype = torch.float64, device: str = "cpu", scale: float = 1.0
) -> tuple[Any, ...]:
    """What the layer is called with: a batch of ``count`` examples."""
    generator = torch.Generator().manual_seed(1)

    def draw(spec: Any) -> Any:
        if isinstance(spec, Ids):
            return torch.randint(spec.below, (count, *spec.shape), generator=generator).to(device)
        if isinstance(spec, N):
            return (scale * torch.randn(count, *spec.shape, generator=generator)).to(device, dtype)
        return spec.to(device, dtype) if isinstance(spec, Tensor) else spec

    return tree_map(draw, CASES[name].inputs)


def batched(change: Callable[[Tensor], Tensor], name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments, those with a batch axis changed."""
    return tree_map(lambda spec, x: change(x) if isinstance(spec, N) else x, CASES[name].inputs, args)


def outputs(name: str, y: Any) -> list[Tensor]:
    """The tensors of an output, batch axis first."""
    leaves = tree_leaves(y)
    axes = CASES[name].axes or (0,) * len(leaves)
    return [leaf.movedim(axis, 0) for leaf, axis in zip(leaves, axes, strict=True)]


def numbers(y: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(y) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def test_every_layer_of_the_catalogue_is_here() -> None:
    known = {type(make(f"{slot}={name}")) for slot, name in LAYERS}
    known |= {catalog.load(part) for part in (*OUTSIDE, *NOT_LAYERS)}
    named = {part: catalog.load(part) for p in catalog.papers().values() if p.family == "layers" for part in p.parts}
    missing = [
        part
        for part, thing in named.items()
        if inspect.isclass(thing) and issubclass(thing, nn.Module) and thing not in known
    ]
    assert not missing, "say in tests/layers_outside_slots.py how to make and call " + ", ".join(missing)


def test_excuses_are_from_tests_that_exist() -> None:
    assert {f"test_{name}" for case in CASES.values() for name in case.excused} <= globals().keys()


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_keeps_the_dtype_and_gives_finite_numbers(name: str, dtype: torch.dtype, device: str) -> None:
    y = make(name, dtype=dtype, device=device)(*arguments(name, dtype=dtype, device=device))
    assert all(leaf.dtype == dtype and leaf.isfinite().all() for leaf in numbers(y))


@every
def test_gives_the_promised_shape(name: str) -> None:
    y = make(name)(*arguments(name, dtype=torch.float32))
    assert [tuple(leaf.shape) for leaf in outputs(name, y)] == [(4, *out) for out in CASES[name].outs]


@every
def test_takes_an_empty_batch_and_a_single_example(name: str, device: str) -> None:
    layer = make(name, device=device).eval()
    empty = outputs(name, layer(*arguments(name, 0, torch.float32, device)))
    assert [tuple(leaf.shape) for leaf in empty] == [(0, *out) for out in CASES[name].outs]
    one = layer(*arguments(name, 1, torch.float32, device))
    assert all(len(leaf) == 1 for leaf in outputs(name, one)) and all(leaf.isfinite().all() for leaf in numbers(one))


@every
def test_an_example_does_not_depend_on_those_beside_it(name: str) -> None:
    layer, args = awake(name), arguments(name)
    some = outputs(name, layer(*batched(lambda x: x[:2], name, args)))
    torch.testing.assert_close([y[:2] for y in outputs(name, layer(*args))], some, rtol=1e-10, atol=1e-12)


@every
def test_takes_strided_input(name: str, device: str) -> None:
    def strided(x: Tensor) -> Tensor:
        return torch.stack([x, x], -1)[..., 0] if x.dim() < 2 else x.transpose(0, -1).contiguous().transpose(0, -1)

    layer, args = awake(name, device=device), arguments(name, device=device)
    torch.testing.assert_close(layer(*batched(strided, name, args)), layer(*args))


@cases(lambda name, case: case.leading)
def test_takes_extra_leading_dimensions(name: str) -> None:
    layer, (x, *rest) = awake(name), arguments(name, 15)
    torch.testing.assert_close(layer(x.unflatten(0, (3, 5)), *rest), layer(x, *rest).unflatten(0, (3, 5)))


@every
def test_works_where_its_input_is(name: str) -> None:
    """Tensors that a layer made on the CPU would not mix with those on the meta device."""
    y = make(name).eval().to("meta")(*arguments(name, dtype=torch.float32, device="meta"))
    assert {leaf.device.type for leaf in outputs(name, y)} == {"meta"}


@every
def test_is_the_same_for_the_same_seed(name: str) -> None:
    a, b = make(name, 3).eval(), make(name, 3).eval()
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0, equal_nan=True)
    args = arguments(name, dtype=torch.float32)
    torch.testing.assert_close(a(*args), b(*args), rtol=0, atol=0)


@every
def test_survives_copying_and_its_state_dict(name: str, device: str) -> None:
    layer, args = awake(name, device=device), arguments(name, device=device)
    other = awake(name, 9, device)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(*args), layer(*args))
    torch.testing.assert_close(copy.deepcopy(layer)(*args), layer(*args))


@every
def test_gradients_are_right(name: str, device: str) -> None:
    layer, args = awake(name, device=device), arguments(name, 2, device=device)
    parameters = {key: p.detach() for key, p in layer.named_parameters() if p.requires_grad}
    moved = numbers(args)
    if parameters:  # as one vector: a random direction through all of them is enough
        moved.append(torch.cat([p.flatten() for p in parameters.values()]))

    def run(*moved: Tensor) -> tuple[Tensor, ...]:
        given = iter(moved)
        inputs = tree_map(lambda a: next(given) if isinstance(a, Tensor) and a.is_floating_point() else a, args)
        pieces = next(given).split([p.numel() for p in parameters.values()]) if parameters else ()
        values = {key: piece.view_as(p) for piece, (key, p) in zip(pieces, parameters.items(), strict=True)}
        return tuple(numbers(functional_call(layer, values, inputs)))

    moved = [x.detach().clone().requires_grad_() for x in moved]
    assert torch.autograd.gradcheck(run, moved, eps=1e-6, atol=1e-5, fast_mode=True)


@every
def test_stacks_under_vmap(name: str, device: str) -> None:
    layers, args = [awake(name, seed, device) for seed in range(3)], arguments(name, device=device)
    parameters, buffers = stack_module_state(layers)
    base = copy.deepcopy(layers[0])

    def run(parameters: dict, buffers: dict) -> Any:
        return functional_call(base, (parameters, buffers), args)

    if not parameters and not buffers:
        pytest.skip("nothing to stack")
    together = vmap(run)(parameters, buffers)
    torch.testing.assert_close(together, tree_map(lambda *ys: torch.stack(ys), *(layer(*args) for layer in layers)))


@every
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_stays_finite_for_small_and_large_inputs(name: str, scale: float, device: str) -> None:
    layer, args = make(name, device=device), arguments(name, dtype=torch.float32, device=device, scale=scale)
    inputs = [x.requires_grad_() for x in numbers(args)]
    y = numbers(layer(*args))
    assert all(leaf.isfinite().all() for leaf in y)
    objective = sum(leaf.mul(leaf.detach().sign()).mean() for leaf in y)
    if isinstance(objective, Tensor) and objective.requires_grad:  # mixer=none gives zeros, whatever comes in
        objective.backward()
        assert all(p.grad.isfinite().all() for p in [*inputs, *layer.parameters()] if p.grad is not None)


@pytest.mark.slow
@every
def test_compiles_whole(name: str, device: str) -> None:
    torch.compiler.reset()
    layer, args = make(name, device=device).eval(), arguments(name, dtype=torch.float32, device=device)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*args), layer(*args))


@every
def test_says_what_it_is_in_one_piece(name: str) -> None:
    assert repr(make(name)).startswith(type(make(name)).__name__)


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


@pytest.mark.parametrize(("slot", "name"), [p for p in LAYERS if p[0] in HOSTS])
def test_learns_the_digits(slot: str, name: str) -> None:
    if (slot, name) == ("linear", "nmu"):
        pytest.skip("a product over 64 pixels, most of them dark, tells no classes apart")
    task = load("digits")
    host = "convnet width=8" if (slot, name) in NEEDS_POSITIONS else HOSTS[slot]
    net = Recipe.parse(f"{host} {slot}={name}").build(task, seed=0)
    settings = Training(lr=1e-2, optimizer="adam", patience=None, batch_size=32)
    found = fit(net, task, settings, budget=Budget("epochs", 8 if slot == "mixer" else 4), seed=0)
    assert evaluate(found.net, task, "valid")["accuracy"] > FLOORS.get((slot, name), 0.75 if slot == "mixer" else 0.85)


NO_CHECK_OF_THEIR_OWN = ("act=", "pomona.nets.", "pomona.train.", "pomona.theory.", "pomona.nn.mixing:MixerNet")
"""Activations promote integers, as torch's own do; networks leave the check to their first layer."""


@cases(
    lambda name, case: not name.startswith(NO_CHECK_OF_THEIR_OWN) and bool(case.inputs) and type(case.inputs[0]) is N
)
def test_integers_are_refused_in_a_sentence(name: str) -> None:
    layer, args = make(name), arguments(name)
    if not type(layer).__module__.startswith("pomona.") or not any(True for _ in layer.parameters()):
        pytest.skip("torch's own, or without parameters")
    with pytest.raises(PomonaError, match=r"floating-point numbers, not torch.int64"):
        layer(args[0].long(), *args[1:])
