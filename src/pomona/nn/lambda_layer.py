"""Lambda layers: a query meets its context as a small linear map, without attention maps (arXiv 2102.08602)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, check_divisible, check_positive, unknown
from pomona.nn.check import check_input, check_longest
from pomona.nn.mixing import hide
from pomona.nn.norm import BatchNorm


def _split(out: int, heads: int | None) -> int:
    """The number of heads: as given, or the largest up to 4 that divides ``out``."""
    if heads is None:
        return next(h for h in (4, 3, 2, 1) if out % h == 0)
    check_positive(heads=heads)
    check_divisible("out", out, "heads", heads)
    return heads


class LambdaLayer(nn.Module):
    """y_n = concat_h L_n^T q_nh with L_n = sum_m (softmax_m(K)_m + E_nm) v_m^T, a linear map (k x v).

    Q = BN(X W_Q), K = C W_K, V = BN(C W_V), v = out / heads. The content part of L is the same for all queries; the
    position part has learned embeddings E of the relative place of m, shared by all examples. All heads share L. Time
    is O(B N M k v), memory O(k N M + B N k v). With a ``scope`` E is zero outside a window, and the position part a
    convolution of V: time O(B N r k v), memory O(k r + B N k v). Batch norm counts padding.

    Args:
        dim: D of the input.
        tokens: N, or (height, width) of the grid that the tokens fill in raster order. A global layer also takes
            smaller grids, a local one any.
        out: features of the output; D by default.
        k: key features.
        heads: queries that share the map; by default the largest of 4, 3, 2, 1 that divides ``out``.
        u: intra-depth: so many keys and values are summed for every map.
        scope: odd side r of the window; by default all of the context (global).
        ndim: 2 reads a single number of tokens as a square grid.
        context: number M of elements of another context; E then is a free table over queries and context.
        content: whether the content part is there.
        position: whether the position part is there.
        causal: a query's context is itself and what comes before it in raster order. Keys that are more than 60 below
            the largest then count as 60 below it.
        norm: batch norm of queries and values.

    Shape:
        (B, N, D), mask (B, M) or None -> (B, N, out)

    Raises:
        PomonaError: for sizes that do not fit together, an even scope, or neither content nor position.

    Source: LambdaNetworks: Modeling Long-Range Interactions Without Attention, arXiv 2102.08602.
    """

    tunable: ClassVar[dict[str, list[int]]] = {"k": [8, 16, 32], "u": [1, 4]}

    def __init__(
        self,
        dim: int,
        tokens: int | Sequence[int],
        out: int | None = None,
        *,
        k: int = 16,
        heads: int | None = None,
        u: int = 1,
        scope: int | None = None,
        ndim: int = 1,
        context: int | None = None,
        content: bool = True,
        position: bool = True,
        causal: bool = False,
        norm: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        out = out or dim
        check_positive(dim=dim, out=out, k=k, u=u)
        if scope is not None and (scope < 1 or scope % 2 == 0):
            raise PomonaError(f"scope={scope} must be an odd number, such as 7")
        if not content and not position:
            raise PomonaError("content=False and position=False leave nothing; set one of them to True")
        if context is not None and (causal or scope is not None):
            raise PomonaError(f"context={context} has no places, so causal and scope cannot be set with it")
        self.sides = _sides(tokens, ndim)
        self.dim, self.k, self.u, self.scope, self.context, self.causal = dim, k, u, scope, context, causal
        self.heads, self.content = _split(out, heads), content
        self.v = out // self.heads
        self.query = nn.Linear(dim, self.heads * k, bias=False)
        self.key = nn.Linear(dim, k * u, bias=False) if content else None
        self.value = nn.Linear(dim, self.v * u, bias=False)
        for linear, fan in ((self.query, dim * k), (self.key, dim), (self.value, dim)):
            if linear is not None:
                nn.init.normal_(linear.weight, std=fan**-0.5, generator=generator)
        self.norm_query = BatchNorm(self.heads * k) if norm else nn.Identity()
        self.norm_value = BatchNorm(self.v * u) if norm else nn.Identity()
        if context is not None:
            offsets: tuple[int, ...] = (math.prod(self.sides), context)
        else:
            offsets = tuple(scope or 2 * side - 1 for side in self.sides)
        self.embedding = nn.Parameter(torch.empty(k, u, *offsets)) if position else None
        if self.embedding is not None:
            nn.init.normal_(self.embedding, generator=generator)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None, grid: Sequence[int] | None = None
    ) -> Tensor:
        """See the class; ``context`` is (B, M, D), ``grid`` the (height, width) of the tokens if not as made."""
        check_input(self, x, self.dim)
        source = x if context is None else context
        check_input(self, source, self.dim)
        q = self.norm_query(self.query(x)).unflatten(-1, (self.heads, self.k))
        maps = self.lambdas(source, mask, grid)
        if maps.shape[1] == 1:  # one product an example instead of one a query
            return (q.flatten(1, 2) @ maps[:, 0]).unflatten(1, q.shape[1:3]).flatten(-2)
        return (q @ maps).flatten(-2)

    def lambdas(self, source: Tensor, mask: Tensor | None = None, grid: Sequence[int] | None = None) -> Tensor:
        """The linear maps L_n of a context (B, M, D): (B, N, k, v), or (B, 1, k, v) without position part."""
        sides = self._check_grid(source.shape[-2], grid)
        v = hide(self.norm_value(self.value(source)), mask).unflatten(-1, (self.v, self.u))
        if self.embedding is None:
            return self._content(source, v, mask)
        position = self._position(v, sides)
        return position + self._content(source, v, mask) if self.content else position

    def _content(self, source: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        assert self.key is not None
        keys = self.key(source)
        if mask is not None:
            keys = keys.masked_fill(~mask[..., None].bool(), torch.finfo(keys.dtype).min)
        if not self.causal:
            weight = keys.softmax(-2).unflatten(-1, (self.k, self.u))
            return torch.einsum("bmku,bmvu->bkv", weight, v)[:, None]
        weight = (keys - keys.amax(-2, keepdim=True)).clamp_min(-60).exp()
        weight = hide(weight, mask).unflatten(-1, (self.k, self.u))
        total = weight.cumsum(1).clamp_min(torch.finfo(keys.dtype).tiny)
        sums = torch.einsum("bmku,bmvu->bmkvu", weight, v).cumsum(1)
        return (sums / total[:, :, :, None]).sum(-1)

    def _position(self, v: Tensor, sides: tuple[int, ...]) -> Tensor:
        if self.scope is None:
            return torch.einsum("kunm,bmvu->bnkv", self._embed(sides), v)
        images = v.movedim(1, -1).flatten(0, 1).unflatten(-1, sides)  # (B v, u, *sides)
        convolve = (F.conv1d, F.conv2d)[len(sides) - 1]
        maps = convolve(images, self._offsets(), padding=self.scope // 2)
        return maps.flatten(2).unflatten(0, (*v.shape[:1], self.v)).permute(0, 3, 2, 1)

    def _embed(self, sides: tuple[int, ...]) -> Tensor:
        """E of every query and context element: (k, u, N, M)."""
        table = self._offsets()
        if self.context is not None:
            return table
        for axis, (side, made) in enumerate(zip(sides, self.sides, strict=True)):
            # a window of `side` offsets a query, from that of the last query to that of the first
            table = table.narrow(2 + axis, made - side, 2 * side - 1).unfold(2 + axis, side, 1).flip(2 + axis)
        return table.flatten(2 + len(sides)).flatten(2, -2)

    def _offsets(self) -> Tensor:
        """E by offset of the context element, (k, u, *offsets), zero at later ones if causal."""
        assert self.embedding is not None
        if not self.causal:
            return self.embedding
        count = math.prod(self.embedding.shape[2:])
        earlier = torch.arange(count, device=self.embedding.device) <= count // 2  # raster order, offset 0 halfway
        return self.embedding * earlier.view(self.embedding.shape[2:])

    def _check_grid(self, tokens: int, grid: Sequence[int] | None) -> tuple[int, ...]:
        if self.context is not None:
            if tokens != self.context:
                raise PomonaError(f"LambdaLayer was made for context={self.context}; it was given {tokens} elements")
            return self.sides
        sides = (tokens,) if len(self.sides) == 1 else tuple(grid or self.sides)
        if math.prod(sides) != tokens:
            raise PomonaError(f"{tokens} tokens do not fill the grid {sides}; pass grid=(height, width)")
        if self.scope is None and self.embedding is not None:
            for side, made in zip(sides, self.sides, strict=True):
                check_longest(self, side, made)
        return sides

    def extra_repr(self) -> str:
        """Sizes and options."""
        parts = f"content={self.content}, position={self.embedding is not None}, causal={self.causal}"
        return f"grid={self.sides}, k={self.k}, heads={self.heads}, u={self.u}, scope={self.scope}, {parts}"


def _sides(tokens: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    if not isinstance(tokens, int):
        if len(tokens) not in (1, 2):
            raise PomonaError(f"tokens={tuple(tokens)} must be a number or (height, width)")
        return tuple(tokens)
    check_positive(tokens=tokens)
    if ndim == 1:
        return (tokens,)
    side = math.isqrt(tokens)
    if ndim != 2 or side**2 != tokens:
        raise PomonaError(f"tokens={tokens} with ndim={ndim} is no square grid; use ndim=1 or tokens=(height, width)")
    return (side, side)


def linear_attention(dim: int, tokens: int | Sequence[int], out: int | None = None, **options: int) -> LambdaLayer:
    """A lambda layer without position part: linear attention with softmax keys, shared by the heads."""
    return LambdaLayer(dim, tokens, out, position=False, **options)  # type: ignore[arg-type]


class LambdaConv2d(nn.Module):
    """A lambda layer on images in place of a convolution, local unless ``scope`` is None; strides by average pooling.

    Args:
        in_channels: C.
        out_channels: channels of the output.
        stride: side of the windows that are averaged afterwards.
        scope: odd side r of the window; None takes the whole image, whose ``size`` must then be given.
        size: largest (height, width), for a global layer.
        options: further arguments of `LambdaLayer`.

    Shape:
        (B, C, H, W) -> (B, out_channels, H / stride, W / stride)

    Source: LambdaNetworks: Modeling Long-Range Interactions Without Attention, arXiv 2102.08602.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        scope: int | None = 23,
        size: tuple[int, int] | None = None,
        **options: object,
    ) -> None:
        super().__init__()
        if scope is None and size is None and options.get("position", True):
            raise PomonaError("scope=None needs size=(height, width) of the largest image")
        self.mix = LambdaLayer(in_channels, size or (1, 1), out_channels, scope=scope, **options)  # type: ignore[arg-type]
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        check_input(self, x, self.mix.dim, 1)
        grid = x.shape[2:]
        y = self.mix(x.flatten(2).mT, grid=grid).mT.unflatten(-1, grid)
        return y if self.stride == 1 else F.avg_pool2d(y, self.stride, ceil_mode=True)


def lambda_conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    *,
    scope: int = 7,
    k: int = 16,
    heads: int | None = None,
    u: int = 1,
) -> nn.Module:
    """``conv=lambda``: a local lambda layer for every convolution but those of kernel 1, which stay as they are."""
    if kernel_size == 1:
        return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return LambdaConv2d(in_channels, out_channels, stride, scope=scope, k=k, heads=heads, u=u)


class Complexity(NamedTuple):
    """Multiply-adds, and numbers held besides input and output, up to constants."""

    time: float
    space: float


COMPLEXITY: dict[str, Callable[..., Complexity]] = {
    "attention": lambda b, n, m, k, v, h, r: Complexity(b * n * m * h * (k + v), b * n * m * h),
    "linear_attention": lambda b, n, m, k, v, h, r: Complexity(b * (n * h + m) * k * v, b * k * v),
    "lambda": lambda b, n, m, k, v, h, r: Complexity(b * n * m * k * v, k * n * m + b * n * k * v),
    "lambda_conv": lambda b, n, m, k, v, h, r: Complexity(b * n * r * k * v, k * r + b * n * k * v),
}
"""Growth laws by kind of layer: (examples, queries, context, key and value features a head, heads, window's places)."""


def complexity(
    kind: str,
    *,
    tokens: int,
    batch: int = 1,
    context: int | None = None,
    k: int = 16,
    v: int = 16,
    heads: int = 4,
    window: int = 49,
) -> Complexity:
    """The paper's growth laws: what mixing costs without its projections.

    Args:
        kind: attention, linear_attention, lambda, or lambda_conv.
        tokens: queries N.
        batch: examples B.
        context: elements M; N by default.
        k: key features of a head.
        v: value features of a head.
        heads: number of heads.
        window: places of a lambda convolution's window (r, or r^2 on images).

    Raises:
        PomonaError: for an unknown kind.
    """
    if kind not in COMPLEXITY:
        raise unknown("kind", kind, COMPLEXITY)
    return COMPLEXITY[kind](batch, tokens, context or tokens, k, v, heads, window)
