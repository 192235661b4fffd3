"""Every backbone on every kind of input that it takes, with every name in its slots."""

import pytest
import torch
from torch.func import functional_call, stack_module_state, vmap

from pomona import catalog
from pomona.errors import PomonaError
from pomona.nets import BACKBONES, Column, Inputs, Outputs, build
from pomona.nets.build import keys
from pomona.nets.cost import parameters

COLUMNS = (
    Column("age", "number"),
    Column("wage", "number", 2),
    Column("colour", "category", 1, 4),
    Column("town", "category", 1, 40),
    Column("words", "text", 5, 30),
    Column("photo", "image", 3 * 8 * 8, 0, (3, 8, 8)),
)
TABLE = Inputs("table", (sum(c.width for c in COLUMNS),), COLUMNS)
INPUTS = {
    "table": Inputs("table", (8,)),
    "image": Inputs("image", (1, 8, 8)),
    "series": Inputs("series", (2, 16)),
    "tokens": Inputs("tokens", (12,), vocabulary=9),
}
CLASSES = Outputs("classes", 3)
NUMBERS = Outputs("number", 2, ("a", "b"), (10.0, -5.0), (2.0, 0.5))
FITS = [(name, kind) for name, cls in BACKBONES.items() for kind in cls.kinds]
SLOTS = [
    (name, slot, option)
    for name in BACKBONES
    for slot in keys(name)[0]
    for option in catalog.slots()[slot]
    if option != keys(name)[0][slot]
]


class Sizes:
    """The two specs, as a task has them."""

    def __init__(self, inputs: Inputs, outputs: Outputs = CLASSES) -> None:
        self.inputs, self.outputs = inputs, outputs


def rows(inputs: Inputs, count: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if inputs.kind == "tokens":
        return torch.randint(inputs.vocabulary, (count, *inputs.shape), generator=generator)
    x = torch.randn(count, *inputs.shape, generator=generator)
    start = 0
    for column in inputs.columns:
        if column.kind in {"category", "text"}:
            x[:, start : start + column.width] = torch.randint(
                column.cardinality, (count, column.width), generator=generator
            ).float()
        start += column.width
    return x


@pytest.mark.parametrize("outputs", [CLASSES, NUMBERS], ids=["classes", "numbers"])
@pytest.mark.parametrize("name, kind", FITS)
def test_each_backbone_takes_its_kinds_of_input(name, kind, outputs):
    net = build(f"{name} width=16", Sizes(INPUTS[kind], outputs))
    x = rows(INPUTS[kind])
    out = net(x)
    assert out.shape == (4, outputs.size) and out.isfinite().all()
    out.square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert net.eval()(x[:0]).shape == (0, outputs.size)  # an empty batch
    again = build(f"{name} width=16", Sizes(INPUTS[kind], outputs)).eval()
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(x), net(x))


@pytest.mark.parametrize("name", ["mlp", "mixer"])
def test_each_backbone_takes_typed_columns(name):
    net = build(f"{name} width=16", Sizes(TABLE)).eval()
    x = rows(TABLE)
    assert net(x).shape == (4, 3) and net(x[:0]).shape == (0, 3)
    start = 0
    for column in TABLE.columns:  # each column reaches the output
        other = x.clone()
        other[:, start : start + column.width] = 1 - (x[:, start : start + column.width] > 0).float()
        assert not torch.allclose(net(other), net(x)), column.name
        start += column.width


@pytest.mark.parametrize("name, slot, option", SLOTS, ids=[f"{n}-{s}-{o}" for n, s, o in SLOTS])
def test_each_name_fills_its_slot(name, slot, option):
    inputs = INPUTS[BACKBONES[name].kinds[0]]
    if option == "instance" and name not in {"convnet", "resnet"}:
        with pytest.raises(PomonaError, match=r"^norm='instance' needs positions to average over"):
            build(f"{name} {slot}={option} width=16", Sizes(inputs))
        return
    net = build(f"{name} {slot}={option} width=16", Sizes(inputs))
    x = rows(inputs)
    out = net(x)
    assert out.shape == (4, 3) and out.isfinite().all()
    out.square().mean().backward()
    assert net.eval()(x[:0]).shape == (0, 3)


@pytest.mark.parametrize("name, kind", FITS)
def test_networks_of_one_shape_run_as_one_stack(name, kind):
    nets = [build(f"{name} width=16", Sizes(INPUTS[kind]), seed=seed).eval() for seed in range(3)]
    x = rows(INPUTS[kind])
    weights, buffers = stack_module_state(nets)

    def call(weights, buffers, x):
        return functional_call(nets[0], (weights, buffers), (x,))

    out = vmap(call, (0, 0, None))(weights, buffers, x)
    torch.testing.assert_close(out, torch.stack([net(x) for net in nets]), rtol=1e-4, atol=1e-5)


def test_networks_on_typed_columns_run_as_one_stack():
    nets = [build("mlp width=16", Sizes(TABLE), seed=seed).eval() for seed in range(3)]
    weights, buffers = stack_module_state(nets)
    x = rows(TABLE)
    out = vmap(lambda w, b: functional_call(nets[0], (w, b), (x,)))(weights, buffers)
    torch.testing.assert_close(out, torch.stack([net(x) for net in nets]), rtol=1e-4, atol=1e-5)


def test_the_seed_decides_the_weights_and_the_global_generator_stays():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, same, other = (build("mlp width=8", Sizes(INPUTS["table"]), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    for p, q in zip(one.parameters(), same.parameters(), strict=True):
        assert torch.equal(p, q)
    assert any(not torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_numbers_come_out_in_the_targets_own_units():
    net = build("mlp width=8", Sizes(INPUTS["table"], NUMBERS))
    with torch.no_grad():
        for p in net.head.parameters():
            p.zero_()
    torch.testing.assert_close(net(rows(INPUTS["table"])), torch.tensor([10.0, -5.0]).expand(4, 2))


def test_depth_zero_is_a_linear_model():
    net = build("mlp depth=0", Sizes(INPUTS["table"]))
    assert parameters(net) == 8 * 3 + 3


def test_a_residual_mlp_joins_where_widths_agree():
    net = build("mlp residual=add width=8 depth=2", Sizes(INPUTS["table"]))
    x = rows(INPUTS["table"])
    with torch.no_grad():
        for block in net.blocks:
            for p in block.unit.parameters():
                p.zero_()
    torch.testing.assert_close(net.blocks(x), x)


@pytest.mark.parametrize("name", ["mlp", "convnet", "resnet", "mixer", "sequence"])
def test_match_gives_the_asked_parameters_within_two_per_cent(name):
    inputs = INPUTS[BACKBONES[name].kinds[-1]]
    net = build(name, Sizes(inputs), match=30_000)
    assert abs(parameters(net) - 30_000) <= 600


@pytest.mark.parametrize("linear", catalog.slots()["linear"])
def test_match_works_with_every_linear_layer(linear):
    goal = 200_000 if linear == "selectable_kan" else 20_000  # one unit more has over a thousand parameters
    net = build(f"mlp linear={linear}", Sizes(Inputs("table", (20,))), match=goal)
    assert abs(parameters(net) - goal) <= goal // 50
    assert net(torch.randn(4, 20)).shape == (4, 3)


@pytest.mark.parametrize("act", ["crelu", "maxout", "swiglu"])
def test_match_finds_a_width_that_the_activation_can_give(act):
    net = build(f"mlp act={act}", Sizes(Inputs("table", (20,))), match=20_000)
    assert abs(parameters(net) - 20_000) <= 400
    assert net(torch.randn(4, 20)).shape == (4, 3)


@pytest.mark.parametrize(
    "candidate, kind, message",
    [
        ("mpl", "table", "candidate='mpl' is not known; did you mean mlp"),
        ("mlp actt=gelu", "table", "key of mlp 'actt' is not known; did you mean act"),
        ("mlp act=geluu", "table", "act='geluu' is not known; did you mean "),
        ("mlp width=0", "table", "width=0 of mlp must be above 0"),
        ("mlp depth=-1", "table", "depth=-1 of mlp must be 0 or more"),
        ("mlp dropout=1", "table", "dropout=1 of mlp must be in [0, 1)"),
        ("mlp width=big", "table", "width='big' of mlp is not valid: "),
        ("convnet", "table", "convnet takes image input, not table; use mlp, mixer"),
        ("sequence", "image", "sequence takes series or tokens input, not image; use mlp, convnet, resnet, mixer"),
        ("mixer patch=3", "image", "patch=3 does not divide the input's 8 x 8; use one of 1, 2, 4, 8"),
        ("mlp act=crelu width=7", "table", "act=crelu makes 2 features of one, so width=7 cannot come out of it"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(candidate, kind, message):
    with pytest.raises(PomonaError) as error:
        build(candidate, Sizes(INPUTS[kind]))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_width_that_does_not_exist():
    with pytest.raises(PomonaError, match=r"^no width comes within 2% of 10 parameters; the nearest is width="):
        build("mlp", Sizes(Inputs("table", (20,))), match=10)
