import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pomona.errors import PomonaError
from pomona.nn.parametric_spans import (
    ParametricSpan,
    SpanLayer,
    avg_pool,
    compose,
    compose_weights,
    conv,
    dense,
    graph,
    group_conv,
    infer_span,
    locally_connected,
    pointwise,
    toeplitz,
)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


GEOMETRY = [
    {},
    {"stride": 2, "padding": 1},
    {"dilation": 2, "padding": 2},
    {"stride": (1, 2), "padding": (0, 1), "dilation": (2, 1)},
]


@pytest.mark.parametrize("options", GEOMETRY, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_dense_conv2d_and_avg_pool_builders_equal_torch(options, groups):
    x, w = randn(3, 4, 7, 6), randn(6, 4 // groups, 3, 2, seed=1)
    expected = F.conv2d(x, w, groups=groups, **options)
    span = conv((7, 6), (3, 2), **options)
    full = span.channels(4, 6, groups)
    torch.testing.assert_close(full(x.flatten(1), w.flatten()).view_as(expected), expected)
    if groups == 1:  # channels beside the span
        y = span(x.flatten(2).mT, w.flatten(2).movedim(-1, 0))
        torch.testing.assert_close(y.mT.view_as(expected), expected)
    pooled = avg_pool((7, 6), 3, 2)(x.flatten(2), torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(pooled, F.avg_pool2d(x, 3, 2).flatten(2), atol=1e-7, rtol=1e-6)
    v = randn(5, 42, seed=2)
    torch.testing.assert_close(dense(42, 5)(x.flatten(2), v.flatten()), F.linear(x.flatten(2), v))


def test_partial_derivatives_of_the_trilinear_form_are_the_layer_and_its_gradients():
    span = conv((5, 4), 3, stride=2, padding=1)
    span = ParametricSpan(
        span.source, span.target, span.weight, span.n_x, span.n_y, span.n_w, randn(len(span.source), seed=5)
    )
    x, w, y = (randn(n, seed=n).requires_grad_() for n in (span.n_x, span.n_w, span.n_y))
    of_x, of_w, of_y = torch.autograd.grad(span.form(x, w, y), (x, w, y))
    torch.testing.assert_close(span(x, w), of_y)
    torch.testing.assert_close(torch.autograd.grad(span(x, w), (x, w), y), (of_x, of_w))
    torch.testing.assert_close(span.reverse()(y, w), of_x)
    plain = torch.autograd.grad((span.matrix(w) @ x * y.detach()).sum(), (x, w))
    torch.testing.assert_close(plain, (of_x, of_w))


@pytest.mark.parametrize("padding", [0, 1])
def test_reversed_stride_2_conv_is_conv_transpose2d(padding):
    w = randn(5, 3, 3, 3)
    span = conv((7, 9), 3, stride=2, padding=padding).channels(3, 5)
    y = F.conv2d(torch.zeros(1, 3, 7, 9, dtype=torch.float64), w, stride=2, padding=padding)
    y = randn(2, *y.shape[1:], seed=1)
    expected = F.conv_transpose2d(y, w, stride=2, padding=padding)
    torch.testing.assert_close(span.reverse()(y.flatten(1), w.flatten()).view_as(expected), expected)


def test_composed_span_with_products_of_weights_is_b_of_a():
    a, b = conv((6, 5), 3, padding=1, stride=2), dense(9, 4)
    x, w_a, w_b = randn(2, 30), randn(a.n_w, seed=1), randn(b.n_w, seed=2)
    both = compose(a, b)
    torch.testing.assert_close(both(x, compose_weights(w_a, w_b)), b(a(x, w_a), w_b))
    assert (both.n_x, both.n_y, both.n_w) == (30, 4, 9 * 36)
    w_a, w_b = randn(a.n_w, 3, 2, seed=3), randn(b.n_w, 5, 3, seed=4)
    x = randn(2, 30, 2)
    torch.testing.assert_close(both(x, compose_weights(w_a, w_b)), b(a(x, w_a), w_b))
    pool = avg_pool((6, 5), 2)
    twice = compose(pool, pointwise(pool.n_y))
    w = randn(twice.n_w)
    torch.testing.assert_close(twice.matrix(w), torch.diag(w) @ pool.matrix(torch.ones(1, dtype=torch.float64)))


def test_graph_with_one_weight_is_the_product_with_the_adjacency():
    edges = torch.tensor([[0, 1, 2, 2, 3], [1, 2, 0, 1, 3]])
    adjacency = torch.zeros(4, 4, dtype=torch.float64)
    adjacency[edges[1], edges[0]] = 1
    x, w = randn(3, 4), randn(1)
    torch.testing.assert_close(graph(edges, 4)(x, w), w * x @ adjacency.T)
    w = randn(5)
    adjacency[edges[1], edges[0]] = w
    torch.testing.assert_close(graph(edges, 4, "edge")(x, w), x @ adjacency.T)


def test_gradients_match_autograd_in_all_orders_and_under_vmap():
    span = conv((4, 3), 2)
    x, w = randn(2, 12, 2).requires_grad_(), randn(4, 3, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(span, (x, w))
    assert torch.autograd.gradgradcheck(span, (x, w))
    ws = randn(5, 4, 3, 2, seed=2)
    torch.testing.assert_close(torch.func.vmap(span, (None, 0))(x, ws), torch.stack([span(x, w) for w in ws]))
    grads = torch.func.vmap(torch.func.grad(lambda w, x: span(x, w).square().sum()), (0, None))(ws, x)
    one = torch.autograd.grad(span(x, w2 := ws[3].clone().requires_grad_()).square().sum(), w2)[0]
    torch.testing.assert_close(grads[3], one)


def test_other_builders():
    n, x = 6, randn(2, 6)
    w = randn(11)
    index = torch.arange(6)
    torch.testing.assert_close(toeplitz(n)(x, w), x @ w[index[:, None] - index + n - 1].T)
    table = (index[:, None] + index) % n  # the cyclic group
    w = randn(n, seed=1)
    circular = torch.fft.ifft(torch.fft.fft(x) * torch.fft.fft(w)).real
    torch.testing.assert_close(group_conv(table)(x, w), circular)
    torch.testing.assert_close(pointwise(n)(x, w), x * w)
    torch.testing.assert_close(pointwise(n, share=True)(x, w[:1]), x * w[0])
    local = locally_connected((3, 4), 2, padding=1)
    w = randn(local.n_w, seed=2)
    assert local.n_w == len(local.source) == int((local.matrix(torch.ones(local.n_w)) != 0).sum())
    torch.testing.assert_close(local.matrix(w).sum(), w.sum())
    series = conv(9, 3, stride=2)
    w = randn(3)
    torch.testing.assert_close(series(randn(1, 9), w), F.conv1d(randn(1, 1, 9), w.view(1, 1, 3), stride=2)[0])


def test_group_convolution_commutes_with_left_translations():
    elements = [(0, 1, 2), (1, 2, 0), (2, 0, 1), (1, 0, 2), (0, 2, 1), (2, 1, 0)]  # S3, not commutative
    table = torch.tensor([[elements.index(tuple(g[i] for i in h)) for h in elements] for g in elements])
    span, x, w = group_conv(table), randn(6), randn(6, seed=1)
    for g in range(6):
        moved, y = torch.empty_like(x), torch.empty_like(x)
        moved[table[g]] = x
        y[table[g]] = span(x, w)
        torch.testing.assert_close(span(moved, w), y)


def test_quadrature_weights_make_an_integral_operator():
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(12))
    plain = dense(12, 12)
    span = ParametricSpan(plain.source, plain.target, plain.weight, 12, 12, 144, weights[plain.source])
    kernel = torch.exp(nodes[:, None] * nodes)  # the integral of exp(v u) over [-1, 1] is 2 sinh(v) / v
    torch.testing.assert_close(
        span(torch.ones(12, dtype=torch.float64), kernel.flatten()), 2 * torch.sinh(nodes) / nodes
    )


@pytest.mark.parametrize(
    "module, shape",
    [
        (nn.Linear(5, 3), (5,)),
        (nn.Conv1d(2, 3, 3, padding=1), (2, 6)),
        (nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2), (4, 5, 6)),
        (nn.ConvTranspose2d(2, 3, 2, stride=2), (2, 3, 3)),
        (nn.AvgPool2d(2), (2, 4, 4)),
    ],
    ids=lambda v: type(v).__name__,
)
def test_infer_span_recovers_the_sharing_of_a_layer(module, shape):
    span, x = infer_span(module, shape), torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    w = module.weight.detach().flatten() if hasattr(module, "weight") else torch.ones(1)
    expected = module(x) - (module.bias.view(-1, *[1] * (module(x).dim() - 2)) if hasattr(module, "bias") else 0)
    torch.testing.assert_close(span(x.flatten(1), w), expected.flatten(1))


def test_span_layer_trains_its_weights_and_takes_leading_dimensions():
    layer = SpanLayer(conv((4, 4), 3, padding=1), 2, 3, generator=torch.Generator().manual_seed(0)).double()
    x = randn(2, 5, 16, 2)
    y = layer(x)
    assert y.shape == (2, 5, 16, 3) and layer(x[:, :0]).shape == (2, 0, 16, 3)
    conv2d = F.conv2d(
        x.flatten(0, 1).mT.unflatten(-1, (4, 4)),
        layer.weight.movedim(0, -1).unflatten(-1, (3, 3)),
        layer.bias,
        padding=1,
    )
    torch.testing.assert_close(y.flatten(0, 1).mT, conv2d.flatten(2))
    assert torch.autograd.gradcheck(layer, x[:1, :1].requires_grad_())


def test_bad_arguments_say_what_would_do():
    with pytest.raises(PomonaError, match="target must hold indices from 0 to 1, not 0 to 2"):
        ParametricSpan(torch.zeros(3).long(), torch.arange(3), torch.zeros(3).long(), 1, 2, 1)
    with pytest.raises(PomonaError, match="w has shape \\(3,\\), not \\(4,\\)"):
        dense(2, 2)(torch.zeros(2), torch.zeros(3))
    with pytest.raises(PomonaError, match=r"mu has shape \(1,\); it must be \(edges,\), which is \(3,\)"):
        ParametricSpan(*3 * [torch.arange(3)], 3, 3, 3, torch.ones(1))
    with pytest.raises(PomonaError, match=r"edge_index has shape \(5, 2\); it must be \(2, edges\)"):
        graph(torch.zeros(5, 2).long(), 4)
    with pytest.raises(PomonaError, match="share='edges' is not known; did you mean edge"):
        graph(torch.zeros(2, 5).long(), 4, "edges")
    with pytest.raises(PomonaError, match="table must be"):
        group_conv(torch.zeros(3, 3).long())
    with pytest.raises(PomonaError, match="spans compose over one middle space"):
        compose(dense(2, 3), dense(2, 3))
    with pytest.raises(PomonaError, match="module=Conv1d is no span"):
        infer_span(nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular"), (1, 2))  # two weights meet
