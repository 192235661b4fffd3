"""Linear layers of every kind as one sum over edges, each with a source, a target and a parameter.

A span X <-s- E -t-> Y with a map pi from its edges to parameters and a measure mu on them is the layer

    y(v) = sum over edges e with t(e) = v of mu(e) w(pi(e)) x(s(e)).

x, y and w play the same part in the trilinear form sum_e mu(e) w(pi(e)) x(s(e)) y(t(e)), so that each derivative is
the same sum with the legs s, t and pi permuted.

Source: Neural network layers as parametric spans, arXiv 2208.00809.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pomona.errors import PomonaError, check_divisible, check_positive, unknown
from pomona.nn.check import check_input


class _Contraction(torch.autograd.Function):
    """Edges' sum with channels: x (B, n_x, I), w (n_w, O, I) -> (B, n_y, O)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, w: Tensor, source: Tensor, target: Tensor, weight: Tensor, mu: Tensor, sizes: tuple[int, int]
    ) -> Tensor:
        value = torch.einsum("eoi,bei->beo", w[weight] * mu[:, None, None], x[:, source])
        return value.new_zeros(len(x), sizes[1], w.shape[1]).index_add(1, target, value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:6])
        ctx.sizes = inputs[6]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        x, w, source, target, weight, mu = ctx.saved_tensors
        (g,) = gradients
        n_x, n_y = ctx.sizes
        grad_x = _Contraction.apply(g, w.mT, target, source, weight, mu, (n_y, n_x))  # legs s and t exchanged
        value = torch.einsum("beo,bei->eoi", g[:, target], x[:, source]) * mu[:, None, None]
        return grad_x, torch.zeros_like(w).index_add(0, weight, value), None, None, None, None, None


class ParametricSpan(nn.Module):
    """The maps of a linear layer, without its weights.

    Args:
        source, target, weight: s, t and pi, index tensors of one length |E|.
        n_x, n_y, n_w: sizes of X, Y and the parameter space.
        mu: measure of each edge, such as quadrature weights of a continuous space; 1 by default.

    Shape:
        (*, n_x), w (n_w) -> (*, n_y), or with channels (*, n_x, I), w (n_w, O, I) -> (*, n_y, O)
    """

    source: Tensor
    target: Tensor
    weight: Tensor
    mu: Tensor

    def __init__(
        self,
        source: Tensor,
        target: Tensor,
        weight: Tensor,
        n_x: int,
        n_y: int,
        n_w: int,
        mu: Tensor | None = None,
    ) -> None:
        super().__init__()
        for name, index, size in (("source", source, n_x), ("target", target, n_y), ("weight", weight, n_w)):
            if index.shape != source.shape or index.dim() != 1:
                raise PomonaError(f"{name} has shape {tuple(index.shape)}; all maps must be (edges,)")
            if len(index) and not 0 <= int(index.min()) <= int(index.max()) < size:
                raise PomonaError(f"{name} must hold indices from 0 to {size - 1}, not {index.min()} to {index.max()}")
            self.register_buffer(name, index.long())
        if mu is not None and mu.shape != source.shape:
            raise PomonaError(f"mu has shape {tuple(mu.shape)}; it must be (edges,), which is ({len(source)},)")
        self.register_buffer("mu", torch.ones(len(source)) if mu is None else mu)
        self.n_x, self.n_y, self.n_w = n_x, n_y, n_w

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """See the class."""
        plain = w.dim() == 1
        check_input(self, x, self.n_x, -1 if plain else -2)
        if len(w) != self.n_w or w.dim() not in (1, 3):
            raise PomonaError(f"w has shape {tuple(w.shape)}, not ({self.n_w},) or ({self.n_w}, out, in)")
        if plain:
            x, w = x[..., None], w[:, None, None]
        rows = x.reshape(-1, *x.shape[-2:])
        y = _Contraction.apply(
            rows, w, self.source, self.target, self.weight, self.mu.to(w), (self.n_x, self.n_y)
        ).reshape(*x.shape[:-2], self.n_y, w.shape[1])
        return y[..., 0] if plain else y

    def form(self, x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        """The trilinear form sum_e mu(e) w(pi(e)) x(s(e)) y(t(e)): (n_x), (n_w), (n_y) -> scalar"""
        return (self.mu.to(w) * w[self.weight] * x[self.source] * y[self.target]).sum()

    def reverse(self) -> ParametricSpan:
        """The span from Y to X: the layer's transpose."""
        return ParametricSpan(self.target, self.source, self.weight, self.n_y, self.n_x, self.n_w, self.mu)

    def matrix(self, w: Tensor) -> Tensor:
        """The layer as a matrix, (n_y, n_x)."""
        value = self.mu.to(w) * w[self.weight]
        return (
            w.new_zeros(self.n_y * self.n_x)
            .index_add(0, self.target * self.n_x + self.source, value)
            .view(self.n_y, self.n_x)
        )

    def channels(self, in_channels: int, out_channels: int, groups: int = 1) -> ParametricSpan:
        """The span over all channels: X is (in_channels, n_x), Y (out_channels, n_y), W (out, in / groups, n_w)."""
        check_divisible("in_channels", in_channels, "groups", groups)
        check_divisible("out_channels", out_channels, "groups", groups)
        inner = in_channels // groups
        o, i = torch.meshgrid(torch.arange(out_channels), torch.arange(inner), indexing="ij")
        c = i + o // (out_channels // groups) * inner
        o, i, c = (index.reshape(-1, 1).to(self.source.device) for index in (o, i, c))
        return ParametricSpan(
            (c * self.n_x + self.source).flatten(),
            (o * self.n_y + self.target).flatten(),
            ((o * inner + i) * self.n_w + self.weight).flatten(),
            in_channels * self.n_x,
            out_channels * self.n_y,
            out_channels * inner * self.n_w,
            self.mu.repeat(out_channels * inner),
        )

    def extra_repr(self) -> str:
        """Sizes."""
        return f"n_x={self.n_x}, n_y={self.n_y}, n_w={self.n_w}, edges={len(self.source)}"


class SpanLayer(nn.Module):
    """y = span(x, w) + b with trained weights w (n_w, out, in) and one b a channel.

    Shape:
        (*, n_x, in_channels) -> (*, n_y, out_channels)

    Source: Neural network layers as parametric spans, arXiv 2208.00809.
    """

    def __init__(
        self,
        span: ParametricSpan,
        in_channels: int = 1,
        out_channels: int = 1,
        bias: bool = True,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, out_channels=out_channels)
        self.span = span
        fan = max(1.0, in_channels * len(span.source) / max(1, span.n_y))  # edges that end at a point, on average

        def drawn(*shape: int) -> nn.Parameter:  # as in torch.nn.Linear
            return nn.Parameter(torch.empty(shape).uniform_(-(fan**-0.5), fan**-0.5, generator=generator))

        self.weight = drawn(span.n_w, out_channels, in_channels)
        self.bias = drawn(out_channels) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        y = self.span(x, self.weight)
        return y if self.bias is None else y + self.bias


def dense(n: int, m: int) -> ParametricSpan:
    """Every x to every y, each pair with its own weight: w is W.flatten() for W (m, n)."""
    pairs = torch.arange(n * m)
    return ParametricSpan(pairs % n, pairs // n, pairs, n, m, n * m)


def _tuple(value: int | Sequence[int], length: int) -> tuple[int, ...]:
    return (value,) * length if isinstance(value, int) else tuple(value)


def conv(
    shape: int | Sequence[int],
    kernel: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> ParametricSpan:
    """A convolution on a grid of any number of dimensions, without channels: pi is the offset.

    Edges from beyond the grid are left out, which is zero padding. With `ParametricSpan.channels` its weights are
    those of `torch.nn.functional.conv2d`, flattened, groups included.
    """
    sides = (shape,) if isinstance(shape, int) else tuple(shape)
    kernels, strides, pads, steps = (_tuple(v, len(sides)) for v in (kernel, stride, padding, dilation))
    parts = list(zip(sides, kernels, strides, pads, steps, strict=True))
    outs = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in parts]
    check_positive(**{f"output side {axis}": n for axis, n in enumerate(outs)})
    source = target = weight = torch.zeros(1, dtype=torch.long)
    inside = torch.ones(1, dtype=torch.bool)
    for (n, k, s, p, d), out in zip(parts, outs, strict=True):
        at = torch.arange(out)[:, None] * s - p + torch.arange(k) * d
        here = [at.flatten(), torch.arange(out).repeat_interleave(k), torch.arange(k).repeat(out)]
        source, target, weight = (
            (old[:, None] * size + new).flatten()
            for old, new, size in zip((source, target, weight), here, (n, out, k), strict=True)
        )
        inside = (inside[:, None] & ((here[0] >= 0) & (here[0] < n))).flatten()
    n_x, n_y, n_w = (torch.Size(v).numel() for v in (sides, outs, kernels))
    return ParametricSpan(source[inside], target[inside], weight[inside], n_x, n_y, n_w)


def locally_connected(shape: int | Sequence[int], kernel: int | Sequence[int], **geometry: Any) -> ParametricSpan:
    """A convolution that shares nothing: each edge has its own weight. Geometry as in `conv`."""
    span = conv(shape, kernel, **geometry)
    edges = len(span.source)
    return ParametricSpan(span.source, span.target, torch.arange(edges), span.n_x, span.n_y, edges)


def avg_pool(
    shape: int | Sequence[int], kernel: int | Sequence[int], stride: int | Sequence[int] | None = None
) -> ParametricSpan:
    """Means of windows: one weight, which is 1, and mu = 1 / points of the window."""
    span = conv(shape, kernel, kernel if stride is None else stride)
    mu = torch.full_like(span.mu, 1 / span.n_w)
    return ParametricSpan(span.source, span.target, torch.zeros_like(span.weight), span.n_x, span.n_y, 1, mu)


def pointwise(n: int, share: bool = False) -> ParametricSpan:
    """y_i = w_i x_i, or one weight for all (a 1 x 1 convolution)."""
    points = torch.arange(n)
    return ParametricSpan(points, points, points * (not share), n, n, 1 if share else n)


def graph(edge_index: Tensor, nodes: int, share: str = "all") -> ParametricSpan:
    """y_v = the sum over edges u -> v of w x_u, with one weight for 'all' edges or one for each 'edge'.

    Args:
        edge_index: (2, edges), sources over targets.
    """
    if share not in ("all", "edge"):
        raise unknown("share", share, ("all", "edge"))
    if edge_index.dim() != 2 or len(edge_index) != 2:
        raise PomonaError(f"edge_index has shape {tuple(edge_index.shape)}; it must be (2, edges)")
    own = torch.arange(edge_index.shape[1], device=edge_index.device)
    count = len(own) if share == "edge" else 1
    return ParametricSpan(edge_index[0], edge_index[1], own if share == "edge" else own * 0, nodes, nodes, count)


def toeplitz(n: int, m: int | None = None) -> ParametricSpan:
    """y_v = sum_u w_{v - u + n - 1} x_u: a matrix (m, n) with one weight a diagonal."""
    span = dense(n, n if m is None else m)
    return ParametricSpan(span.source, span.target, span.target - span.source + n - 1, n, span.n_y, n + span.n_y - 1)


def group_conv(table: Tensor) -> ParametricSpan:
    """Convolution on a finite group, (x * w)(g) = sum over h k = g of x(h) w(k).

    Args:
        table: the Cayley table, table[h, k] = h k, (n, n).
    """
    n = len(table)
    if table.shape != (n, n) or (table.sort(-1).values != torch.arange(n, device=table.device)).any():
        raise PomonaError("table must be (n, n) with every element once in each row, as a group's is")
    pairs = torch.arange(n * n, device=table.device)
    return ParametricSpan(pairs // n, table.flatten(), pairs % n, n, n, n)


def compose(a: ParametricSpan, b: ParametricSpan) -> ParametricSpan:
    """The span of B(A(x)), over the pairs of edges (e, f) with t(e) = s(f); its weights are `compose_weights`."""
    if a.n_y != b.n_x:
        raise PomonaError(f"a has n_y={a.n_y} and b n_x={b.n_x}; spans compose over one middle space")
    order = b.source.argsort(stable=True)
    degree = torch.bincount(b.source, minlength=b.n_x)
    count = degree[a.target]  # continuations of each edge of a
    e = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
    place = torch.arange(len(e), device=e.device) - (count.cumsum(0) - count)[e]
    f = order[(degree.cumsum(0) - degree)[a.target[e]] + place]
    weight = a.weight[e] * b.n_w + b.weight[f]
    return ParametricSpan(a.source[e], b.target[f], weight, a.n_x, b.n_y, a.n_w * b.n_w, a.mu[e] * b.mu[f])


def compose_weights(w_a: Tensor, w_b: Tensor) -> Tensor:
    """Products of the weights of two spans: (n_a), (n_b) -> (n_a n_b), with channels (n_a, M, I), (n_b, O, M)."""
    if w_a.dim() == 1:
        return torch.outer(w_a, w_b).flatten()
    return torch.einsum("ami,bom->aboi", w_a, w_b).flatten(0, 1)


@torch.no_grad()
def infer_span(module: nn.Module, x_shape: Sequence[int]) -> ParametricSpan:
    """The span of a layer that is linear in its input and its ``weight``, found by probing it.

    Every input is set to 1 alone, with the weights 1, 2, 3, ...: what comes out says which weight is there. A layer
    without weights gets one, with mu the layer's own factors.

    Args:
        module: such as `torch.nn.Linear` or a convolution; its bias is left out.
        x_shape: shape of one input.

    Raises:
        PomonaError: if the layer is not such a span, as where two weights meet between one input and one output.
    """
    named = {name: p.double() for name, p in itertools.chain(module.named_parameters(), module.named_buffers())}
    named |= {name: torch.zeros_like(p) for name, p in named.items() if name.rpartition(".")[2] == "bias"}
    n_x = torch.Size(x_shape).numel()

    def run(x: Tensor, weight: Tensor | None) -> Tensor:
        given = named if weight is None else named | {"weight": weight.view_as(named["weight"])}
        return functional_call(module, given, (x.reshape(-1, *x_shape),)).flatten(1)

    n_w = named["weight"].numel() if "weight" in named else 0
    numbers = torch.arange(1, n_w + 1, dtype=torch.float64) if n_w else None
    found = run(torch.eye(n_x, dtype=torch.float64), numbers)
    source, target = found.nonzero(as_tuple=True)
    value = found[source, target]
    index = (value.round().long() - 1).clamp(0, n_w - 1) if n_w else torch.zeros_like(source)
    span = ParametricSpan(source, target, index, n_x, found.shape[1], max(n_w, 1), None if n_w else value)
    x, w = (torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) for n in (n_x, span.n_w))
    if not torch.allclose(run(x, w if n_w else None)[0], span(x, w if n_w else torch.ones_like(w))):
        raise PomonaError(f"module={type(module).__name__} is no span: an output is not a sum of weights times inputs")
    return span.to(torch.get_default_dtype())
