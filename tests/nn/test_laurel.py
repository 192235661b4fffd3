import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from pomona import options
from pomona.errors import PomonaError
from pomona.nets import Inputs, Outputs, build
from pomona.nets.decoder import DecoderLM
from pomona.nn.laurel import Laurel, LaurelResidual, LaurelStack, expose_residuals, laurelize
from pomona.nn.mixing import MixerBlock, PoolMixer
from pomona.nn.residual import Add

D = 6
KINDS = [
    *({"kind": "rw"}, {"kind": "rw", "weighting": "sigmoid"}, {"kind": "rw", "weighting": "softmax"}),
    *({"kind": "lr", "rank": 2}, {"kind": "lr", "rank": 2, "post_norm": True}, {"kind": "rw+lr", "rank": 3}),
    *({"kind": "pa", "history": 2}, {"kind": "pa+lr", "history": 3, "rank": 2}, {"kind": "rw+lr+pa", "history": 1}),
]
every = pytest.mark.parametrize("options", KINDS, ids=lambda o: "-".join(map(str, o.values())))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moved(layer: nn.Module, seed: int = 0) -> nn.Module:
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + i)))
    return layer


class Block(nn.Module):
    """A residual sum as people write it."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(into, 9), nn.ReLU(), nn.Linear(9, out))
        self.norm = nn.LayerNorm(into)
        self.shortcut = nn.Identity() if into == out else nn.Linear(into, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.norm(x)) + self.shortcut(x)


@every
def test_every_variant_starts_as_the_plain_residual_sum(options):
    x, branch, earlier = draw(4, D), draw(4, D, seed=1), [draw(4, D, seed=s) for s in (2, 3)]
    layer = LaurelResidual(D, **options).double()
    assert torch.equal(layer(x, branch, earlier), x + branch)
    assert not torch.equal(moved(layer)(x, branch, earlier), x + branch)
    image = LaurelResidual(D, dims=2, **options).double()
    x, branch = draw(2, D, 3, 3), draw(2, D, 3, 3, seed=1)
    assert torch.equal(image(x, branch), x + branch)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"kind": "rw"}, 2),
        ({"kind": "lr", "rank": 4}, 2 * 4 * D),
        ({"kind": "pa", "history": 5}, 5),
        ({"kind": "pa+lr", "history": 5, "rank": 2}, 5 + 2 * 2 * D),
        ({"kind": "rw+lr", "rank": 3}, 2 + 2 * 3 * D),
    ],
)
def test_parameters_of_each_variant(options, expected):
    layer = LaurelResidual(D, **options)
    assert sum(p.numel() for p in layer.parameters()) == expected == layer.overhead(1)["parameters"]


def test_a_full_rank_map_of_minus_one_removes_the_skip():
    layer = LaurelResidual(D, "lr", rank=D).double()
    with torch.no_grad():
        layer.up.copy_(-torch.linalg.inv(layer.down))
    x, branch = draw(4, D), draw(4, D, seed=1)
    torch.testing.assert_close(layer(x, branch), branch, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.down @ layer.down.T, torch.eye(D, dtype=torch.float64), atol=1e-6, rtol=0)


def test_gradient_of_the_weights_is_the_product_with_branch_and_input():
    layer, x, branch, upstream = LaurelResidual(D, "rw").double(), *(draw(4, D, seed=s) for s in range(3))
    layer(x, branch).backward(upstream)
    expected = torch.stack([(upstream * branch).sum(), (upstream * x).sum()])
    torch.testing.assert_close(layer.weights.grad, expected, rtol=1e-12, atol=1e-12)


def test_laurelizing_a_residual_mlp_and_a_resnet_changes_no_output():
    torch.manual_seed(0)
    mlp, x = nn.Sequential(nn.Linear(5, D), *(Block(D, D) for _ in range(3)), Block(D, 4)).double(), draw(7, 5)
    for chosen in ({"kind": "rw+lr", "rank": 2}, {"kind": "pa", "history": 2}):
        new = laurelize(mlp, x, **chosen)
        joins = [m for m in new.modules() if isinstance(m, LaurelResidual)]
        assert [join.features for join in joins] == [D, D, D, 4]
        assert torch.equal(new(x), mlp(x))
        assert not torch.allclose(moved(new)(x), mlp(x))
    task = SimpleNamespace(inputs=Inputs("image", (3, 8, 8)), outputs=Outputs("classes", 4))
    resnet = build("resnet width=4 depth=2", task).double().eval()
    image = draw(2, 3, 8, 8)
    new = laurelize(resnet, image, "rw+lr", 2)
    assert torch.equal(new(image), resnet(image))
    assert [m.dims for m in new.modules() if isinstance(m, LaurelResidual)] == [2, 2]
    assert all(isinstance(b.residual, Add) for b in resnet.blocks)  # the old one is as it was


def test_laurelized_transformer_and_mixer_block():
    torch.manual_seed(0)
    model, tokens = DecoderLM(9, 8, 2, 2, max_len=5), torch.arange(10).view(2, 5) % 9
    new = laurelize(model, tokens, "rw+lr+pa", 2, history=2)
    assert sum(isinstance(m, LaurelResidual) for m in new.modules()) == 4
    torch.testing.assert_close(new(tokens), model(tokens), rtol=0, atol=0)
    moved(new)(tokens).sum().backward()
    torch.testing.assert_close(copy.deepcopy(new)(tokens), new(tokens))
    block, x = MixerBlock(8, PoolMixer(), nn.Linear(8, 8)), torch.randn(2, 5, 8)
    torch.testing.assert_close(laurelize(block, x)(x), block(x), rtol=0, atol=0)


def test_a_position_table_is_no_residual_connection():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.position, self.body = nn.Embedding(9, D), nn.Parameter(torch.zeros(5, D)), nn.Linear(D, D)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.token(tokens) + self.position[: tokens.shape[1]]
            return x + self.body(x)

    assert sum(isinstance(m, Add) for m in expose_residuals(Net()).modules()) == 1


def test_a_module_that_cannot_be_traced_stays_and_is_logged(caplog):
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(D, D)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.body(x) if x.sum() > 0 else x

    caplog.set_level("INFO", "pomona.nn")
    net = nn.Sequential(Branching(), Block(D, D))
    assert sum(isinstance(m, LaurelResidual) for m in laurelize(net, torch.randn(2, D), "rw").modules()) == 1
    assert "Branching 0 is left as it is" in caplog.text


def test_a_stack_hands_on_earlier_inputs():
    torch.manual_seed(0)
    stack = LaurelStack(Laurel(nn.Linear(D, D), D, "pa+lr", 2, history=2) for _ in range(3)).double()
    inputs = [draw(4, D)]
    for block in moved(stack):
        past = inputs[-1]
        for gamma, earlier in zip(block.join.gamma, inputs[-2::-1], strict=False):
            past = past + gamma * earlier
        inputs.append(block.f(inputs[-1]) + past + past @ block.join.down.T @ block.join.up.T)
    torch.testing.assert_close(stack(inputs[0]), inputs[-1])
    wide = Laurel(nn.Linear(D, 4), 4, "rw", shortcut=nn.Linear(D, 4, bias=False)).double()
    torch.testing.assert_close(wide(inputs[0]), wide.f(inputs[0]) + wide.shortcut(inputs[0]))


def test_image_maps_are_1x1_convolutions():
    layer, x, branch = moved(LaurelResidual(D, "lr", 2, dims=2)).double(), draw(2, D, 3, 4), draw(2, D, 3, 4, seed=1)
    low = nn.functional.conv2d(x, layer.down[..., None, None])
    expected = x + branch + nn.functional.conv2d(low, layer.up[..., None, None])
    torch.testing.assert_close(layer(x, branch), expected)


@every
def test_gradients_dtypes_and_stacking(options):
    x, branch, earlier = draw(2, D), draw(2, D, seed=1), [draw(2, D, seed=2)]
    layers = [moved(LaurelResidual(D, **options).double(), seed) for seed in range(2)]
    names = [name for name, _ in layers[0].named_parameters()]
    values = [p.detach().requires_grad_() for p in layers[0].parameters()]

    def run(x, branch, *values):
        return functional_call(layers[0], dict(zip(names, values, strict=True)), (x, branch, earlier))

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), branch.requires_grad_(), *values), fast_mode=True)
    stacked, _ = stack_module_state(layers)
    together = vmap(lambda p: functional_call(layers[0], p, (x, branch, earlier)))(stacked)
    torch.testing.assert_close(together, torch.stack([layer(x, branch, earlier) for layer in layers]))
    half = LaurelResidual(D, **options).bfloat16()
    assert half(x.bfloat16(), branch.bfloat16()).dtype == torch.bfloat16
    assert layers[0](x[:0], branch[:0]).shape == (0, D)


@pytest.mark.slow
@every
def test_compiles_whole(options):
    torch.compiler.reset()
    layer, args = moved(LaurelResidual(D, **options).double()), (draw(2, D), draw(2, D, seed=1), [draw(2, D, seed=2)])
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(*args), layer(*args))


def test_what_it_costs():
    rw, lr = LaurelResidual(D, "rw").overhead(10), LaurelResidual(D, "lr", 2).overhead(10)
    assert rw == {"parameters": 2, "flops": 0, "stored": 120}
    assert lr == {"parameters": 24, "flops": 480, "stored": 80}


def test_fills_the_residual_slot():
    for name in ("laurel_rw", "laurel_lr", "laurel_rw_lr"):
        layer = options.make("residual", name, features=D, dims=0).double()
        assert torch.equal(layer(draw(3, D), draw(3, D, seed=1)), draw(3, D) + draw(3, D, seed=1))


def test_says_what_is_wrong():
    with pytest.raises(PomonaError, match="kind='rq' is not known"):
        LaurelResidual(D, "rq+lr")
    with pytest.raises(PomonaError, match="kind='pa' and history=0 disagree"):
        LaurelResidual(D, "pa")
    with pytest.raises(PomonaError, match="takes 6 features on axis -1"):
        LaurelResidual(D)(torch.randn(3, 5), torch.randn(3, 5))
    with pytest.raises(PomonaError, match="Linear has no residual connection"):
        laurelize(nn.Linear(3, 3), torch.randn(2, 3))
