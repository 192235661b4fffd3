import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pomona.errors import PomonaError
from pomona.nets.cost import flops, parameters
from pomona.nn.lambda_layer import LambdaConv2d, LambdaLayer, complexity, lambda_conv, linear_attention

D, K, H, W = 6, 3, 4, 5
N = H * W
GRIDS = [(N,), (H, W)]


def layer(tokens=(H, W), **options) -> LambdaLayer:
    options = {"k": K, "heads": 2, "generator": torch.Generator().manual_seed(0)} | options
    return LambdaLayer(D, tokens, **options).double().eval()


def tokens(batch: int = 3, n: int = N) -> torch.Tensor:
    return torch.randn(batch, n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_loops(net: LambdaLayer, x: torch.Tensor) -> torch.Tensor:
    """Query by query, context element by context element, with E by offset."""
    keys = net.key(x).unflatten(-1, (net.k, net.u))
    v = net.norm_value(net.value(x)).unflatten(-1, (net.v, net.u))
    q = net.norm_query(net.query(x)).unflatten(-1, (net.heads, net.k))
    places = torch.cartesian_prod(*map(torch.arange, net.sides)).view(len(x[0]), -1)
    out = torch.empty(*x.shape[:2], net.heads, net.v, dtype=x.dtype)
    for n in range(x.shape[1]):
        seen = slice(0, n + 1) if net.causal else slice(None)
        content = keys[:, seen].softmax(1)
        total = torch.einsum("bmku,bmvu->bkv", content, v[:, seen])
        for m in range(x.shape[1])[seen]:
            offset = places[m] - places[n] + torch.tensor(net.embedding.shape[2:]) // 2
            if all(0 <= o < size for o, size in zip(offset.tolist(), net.embedding.shape[2:], strict=True)):
                total = total + torch.einsum("ku,bvu->bkv", net.embedding[:, :, *offset.tolist()], v[:, m])
        out[:, n] = q[:, n] @ total
    return out.flatten(-2)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    "options", [{}, {"scope": 3}, {"u": 2}, {"causal": True}, {"causal": True, "scope": 3, "u": 2}]
)
def test_equals_an_explicit_loop_over_queries(grid, options):
    net, x = layer(grid, **options), tokens()
    torch.testing.assert_close(net(x), by_loops(net, x))


def test_zero_embeddings_equal_linear_attention_with_softmax_keys():
    net, x = layer(norm=False), tokens()
    nn.init.zeros_(net.embedding)
    q = net.query(x).unflatten(-1, (2, K)).transpose(1, 2)
    summary = net.key(x).softmax(1).mT @ net.value(x)
    torch.testing.assert_close(net(x), (q @ summary[:, None]).transpose(1, 2).flatten(-2))
    alone = linear_attention(D, (H, W), k=K, heads=2, norm=False).double()
    alone.load_state_dict(net.state_dict(), strict=False)
    torch.testing.assert_close(alone(x), net(x))


@pytest.mark.parametrize("grid", GRIDS)
def test_global_restricted_to_a_window_equals_the_lambda_convolution(grid):
    wide, local, x = layer(grid, u=2), layer(grid, u=2, scope=3), tokens()
    local.load_state_dict({k: v for k, v in wide.state_dict().items() if k != "embedding"}, strict=False)
    centre = [slice(side - 2, side + 1) for side in wide.sides]
    nn.init.zeros_(wide.embedding)
    with torch.no_grad():
        wide.embedding[:, :, *centre] = local.embedding
    torch.testing.assert_close(wide(x), local(x))


def test_position_only_local_layer_is_translation_equivariant_away_from_borders():
    net = LambdaConv2d(D, D, scope=3, k=K, heads=2, content=False).double().eval()
    x = torch.randn(2, D, 9, 9, dtype=torch.float64)
    moved = x.roll((1, 2), (2, 3))
    torch.testing.assert_close(net(moved)[..., 3:-1, 3:-1], net(x).roll((1, 2), (2, 3))[..., 3:-1, 3:-1])
    both = LambdaConv2d(D, D, scope=3, k=K, heads=2).double().eval()
    assert both(x).shape == x.shape and both.mix.key is not None


def test_output_is_linear_in_the_queries_and_heads_share_the_lambda():
    net, x = layer(norm=False), tokens()
    before, maps = net(x), net.lambdas(x)
    q = net.query(x).unflatten(-1, (2, K))
    for head in range(2):
        torch.testing.assert_close(
            (q[..., head, None, :] @ maps)[..., 0, :], before.unflatten(-1, (2, -1))[..., head, :]
        )
    with torch.no_grad():
        net.query.weight.mul_(2)
    assert torch.equal(net(x), 2 * before)


def test_parameters_of_the_layer():
    d, k, h, u, out = 12, 5, 2, 3, 8
    common = d * k * h + d * k * u + d * u * out // h + 2 * (k * h) + 2 * (u * out // h)
    make = {"k": k, "heads": h, "u": u}
    assert parameters(LambdaLayer(d, (H, W), out, **make)) == common + (2 * H - 1) * (2 * W - 1) * k * u
    assert parameters(LambdaLayer(d, N, out, scope=7, **make)) == common + 7 * k * u
    assert parameters(LambdaLayer(d, N, out, context=9, **make)) == common + N * 9 * k * u
    assert parameters(LambdaLayer(d, N, out, position=False, **make)) == common


def test_starts_as_the_paper_says():
    net = LambdaLayer(256, 64, k=16, heads=4)
    assert net.query.weight.std().item() == pytest.approx((256 * 16) ** -0.5, rel=0.1)
    assert net.key.weight.std().item() == pytest.approx(256**-0.5, rel=0.1)
    assert net.value.weight.std().item() == pytest.approx(256**-0.5, rel=0.1)
    assert net.embedding.std().item() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("options", [{}, {"scope": 3}, {"causal": True}, {"scope": 3, "causal": True}])
def test_masked_context_adds_nothing(options):
    net, x = layer((N + 4,), **options), tokens()
    mask = torch.arange(N + 4).expand(3, -1) < N
    padded = torch.cat([x, 100 * tokens(n=4)], 1)
    torch.testing.assert_close(net(padded, mask)[:, :N], net(x))


def test_causal_layers_do_not_look_ahead():
    x = tokens()
    later = torch.cat([x[:, :11], tokens(n=9).flip(0)], 1)
    for options in ({}, {"scope": 3}):
        net = layer(causal=True, **options)
        torch.testing.assert_close(net(later)[:, :11], net(x)[:, :11])


def test_another_context_and_smaller_grids():
    net, x = layer(N, context=7), tokens()
    assert net(x, context=tokens(n=7)).shape == (3, N, D)
    with pytest.raises(PomonaError, match="made for context=7; it was given 20"):
        net(x)
    wide = layer((H, W))
    small = layer((2, 3))
    small.load_state_dict(wide.state_dict() | {"embedding": wide.embedding[:, :, 2:-2, 2:-2]})
    torch.testing.assert_close(wide(x[:, :6], grid=(2, 3)), small(x[:, :6]))


def test_cost_grows_as_the_paper_says():
    assert complexity("lambda", tokens=10, context=20, batch=2, k=3, v=4) == (2 * 10 * 20 * 12, 3 * 200 + 2 * 10 * 12)
    assert (
        complexity("lambda_conv", tokens=80, window=9).time == 8 * complexity("lambda_conv", tokens=10, window=9).time
    )
    for kind, options in {"lambda": {}, "lambda_conv": {"scope": 3}}.items():
        counts = []
        for n in (16, 32):
            alone = LambdaLayer(D, n, k=K, heads=2, content=False, **options)
            projections = 2 * n * (alone.query.weight.numel() + alone.value.weight.numel())
            read = 2 * n * D * K  # what the queries do with the maps
            counts.append(flops(alone, torch.randn(2, n, D)) - projections - read)
        law = [2 * complexity(kind, tokens=n, k=K, v=3, heads=2, window=3).time for n in (16, 32)]
        assert counts == law
    space = [complexity(kind, batch=128, tokens=784, k=16, v=8).space for kind in ("attention", "lambda")]
    assert space[0] > 3 * space[1]


def test_stride_averages_and_the_factory_keeps_pointwise_convolutions():
    x = torch.randn(2, 8, 6, 6)
    net = LambdaConv2d(8, 12, 2, scope=3).eval()
    flat = LambdaConv2d(8, 12, scope=3).eval()
    flat.load_state_dict(net.state_dict())
    torch.testing.assert_close(net(x), F.avg_pool2d(flat(x), 2))
    assert isinstance(lambda_conv(8, 12, 1), nn.Conv2d) and isinstance(lambda_conv(8, 12, 3), LambdaConv2d)
    assert LambdaConv2d(8, 8, scope=None, size=(7, 7))(x).shape == x.shape


def test_gradient():
    net = layer(u=2)
    assert torch.autograd.gradcheck(net, tokens(1).requires_grad_())
    assert torch.autograd.gradcheck(layer(scope=3, causal=True), tokens(1).requires_grad_())


def test_bad_arguments_say_what_would_do():
    with pytest.raises(PomonaError, match="scope=4 must be an odd number"):
        layer(scope=4)
    with pytest.raises(PomonaError, match="content=False and position=False leave nothing"):
        layer(content=False, position=False)
    with pytest.raises(PomonaError, match="tokens=20 with ndim=2 is no square grid"):
        layer(N, ndim=2)
    with pytest.raises(PomonaError, match=r"6 tokens do not fill the grid \(4, 5\)"):
        layer()(tokens(n=6))
    with pytest.raises(PomonaError, match="LambdaLayer was made for tokens=20"):
        layer(N)(tokens(n=21))
    with pytest.raises(PomonaError, match="scope=None needs size"):
        LambdaConv2d(8, 8, scope=None)
    with pytest.raises(PomonaError, match="kind='lamda' is not known"):
        complexity("lamda", tokens=3)
