"""Token mixers, and the network that any of them makes.

A `TokenMixer` maps tokens ``(B, N, D)`` to ``(B, N, D)`` and lets them see one another. ``mask`` (B, N) is True at
real tokens; padding is set to zero before mixing, so that it adds nothing (attention leaves it out of the softmax).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, check_divisible, check_positive
from pomona.nn.check import check_input
from pomona.nn.feedforward import FeedForward


class TokenMixer(Protocol):
    """What mixes tokens: (B, N, D), mask (B, N) or None -> (B, N, D)."""

    def __call__(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix the tokens."""
        ...


def hide(x: Tensor, mask: Tensor | None) -> Tensor:
    """Tokens with the padding set to zero: (B, N, D), (B, N) -> (B, N, D)."""
    return x if mask is None else torch.where(mask[..., None].bool(), x, 0)


def check_tokens(x: Tensor, tokens: int) -> None:
    """Raise unless x (B, N, D) holds floating-point numbers, for as many tokens as the layer was made for."""
    check_input("a token mixer", x)
    if x.shape[-2] != tokens:
        raise PomonaError(f"x has {x.shape[-2]} tokens, but this mixer was made for tokens={tokens}")


def lecun_(linear: nn.Linear, generator: torch.Generator | None = None) -> nn.Linear:
    """Weights ~ truncated N(0, 1 / in), biases 0, in place."""
    nn.init.trunc_normal_(linear.weight, std=linear.in_features**-0.5, generator=generator)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear


class NoMix(nn.Module):
    """y = 0: tokens stay apart, and only the channel part of a block acts.

    Shape:
        (B, N, D) -> (B, N, D)
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See the class."""
        return torch.zeros_like(x)


class MLPTokenMixer(nn.Module):
    """Y^T = W_2 gelu(W_1 X^T): an MLP over the tokens, the same for every channel.

    Args:
        tokens: N.
        expand: hidden width in tokens, where ``width`` is not given.
        width: hidden width D_S, which need not depend on N.
        dropout: probability after the activation.

    Shape:
        (B, N, D) -> (B, N, D)

    Source: MLP-Mixer: An all-MLP Architecture for Vision, arXiv 2105.01601.
    """

    def __init__(
        self,
        tokens: int,
        *,
        width: int | None = None,
        expand: float = 2.0,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_positive(tokens=tokens, expand=expand)
        self.tokens = tokens
        self.width = width or max(1, round(expand * tokens))
        self.up = lecun_(nn.Linear(tokens, self.width), generator)
        self.dropout = nn.Dropout(dropout)
        self.down = lecun_(nn.Linear(self.width, tokens), generator)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See the class."""
        check_tokens(x, self.tokens)
        hidden = F.gelu(self.up(hide(x, mask).mT))
        return self.down(self.dropout(hidden)).mT


class LinearTokenMixer(nn.Module):
    """Y = A X + a: one linear map over the tokens, as in ResMLP; lower triangular when ``causal``.

    Args:
        tokens: N.
        causal: a token sees only itself and earlier ones.

    Shape:
        (B, N, D) -> (B, N, D)

    Source: ResMLP: Feedforward networks for image classification with data-efficient training, arXiv 2105.03404.
    """

    def __init__(self, tokens: int, *, causal: bool = False, generator: torch.Generator | None = None) -> None:
        super().__init__()
        check_positive(tokens=tokens)
        self.tokens, self.causal = tokens, causal
        self.mix = lecun_(nn.Linear(tokens, tokens), generator)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See the class."""
        check_tokens(x, self.tokens)
        weight = self.mix.weight.tril() if self.causal else self.mix.weight
        return F.linear(hide(x, mask).mT, weight, self.mix.bias).mT


class AttentionMixer(nn.Module):
    """y = concat_h softmax(q_h k_h^T / sqrt(d)) v_h W_O, with q, k, v linear in x.

    Args:
        dim: D.
        heads: number of heads; by default the divisor of D nearest below D / 16, at least 1.
        causal: a token sees only itself and earlier ones.
        bias: biases of the projections.

    Shape:
        (B, N, D) -> (B, N, D)

    Source: Attention Is All You Need, arXiv 1706.03762.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int | None = None,
        causal: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if heads is None:
            heads = next(h for h in range(max(1, dim // 16), 0, -1) if dim % h == 0)
        check_positive(dim=dim, heads=heads)
        check_divisible("dim", dim, "heads", heads)
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        for linear in (self.qkv, self.out):
            nn.init.xavier_uniform_(linear.weight, generator=generator)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See the class."""
        check_input(self, x)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).movedim((-3, -2), (0, -3))
        allowed = None if mask is None else mask[..., None, None, :].bool()
        if self.causal and allowed is not None:
            n = x.shape[-2]
            allowed = allowed & torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        y = F.scaled_dot_product_attention(q, k, v, allowed, is_causal=self.causal and mask is None)
        return self.out(y.movedim(-3, -2).flatten(-2))


class PoolMixer(nn.Module):
    """y = avgpool(x) - x over ``kernel`` neighbouring tokens; on a ``grid`` (height, width) over kernel x kernel ones.

    Shape:
        (B, N, D) -> (B, N, D)

    Source: MetaFormer Is Actually What You Need for Vision, arXiv 2111.11418.
    """

    def __init__(self, *, kernel: int = 3, grid: tuple[int, int] | None = None) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise PomonaError(f"kernel={kernel} must be an odd number, such as 3")
        self.kernel, self.grid = kernel, grid

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See the class."""
        x = hide(x, mask)
        half = self.kernel // 2
        if self.grid is None:
            return F.avg_pool1d(x.mT, self.kernel, 1, half, count_include_pad=False).mT - x
        image = x.mT.unflatten(-1, self.grid)
        pooled = F.avg_pool2d(image, self.kernel, 1, half, count_include_pad=False)
        return pooled.flatten(-2).mT - x


class ConvMixer1d(nn.Module):
    """y_n = sum_j w_j * x_{n+j}: a convolution over the tokens, depthwise unless ``depthwise=False``.

    Args:
        dim: D.
        kernel: window in tokens, odd unless causal.
        causal: the window ends at the token.

    Shape:
        (B, N, D) -> (B, N, D)
    """

    def __init__(self, dim: int, *, kernel: int = 5, depthwise: bool = True, causal: bool = False) -> None:
        super().__init__()
        check_positive(kernel=kernel)
        if kernel % 2 == 0 and not causal:
            raise PomonaError(f"kernel={kernel} must be an odd number, such as 5")
        self.pad = (kernel - 1, 0) if causal else (kernel // 2, kernel // 2)
        self.conv = nn.Conv1d(dim, dim, kernel, groups=dim if depthwise else 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See the class."""
        check_input(self, x)
        return self.conv(F.pad(hide(x, mask).mT, self.pad)).mT


class GatingMixer(nn.Module):
    """u, v = split(gelu(x W_1)); y = (u * (A LN(v) + 1)) W_2: the spatial gating unit of gMLP, A near 0 at the start.

    Args:
        dim: D.
        tokens: N.
        expand: width of u and v together, in D.
        causal: A is lower triangular.

    Shape:
        (B, N, D) -> (B, N, D)

    Source: Pay Attention to MLPs, arXiv 2105.08050.
    """

    def __init__(
        self,
        dim: int,
        tokens: int,
        *,
        expand: float = 2.0,
        causal: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, tokens=tokens, expand=expand)
        half = max(1, round(expand * dim / 2))
        self.up = lecun_(nn.Linear(dim, 2 * half), generator)
        self.norm = nn.LayerNorm(half)
        self.gate = LinearTokenMixer(tokens, causal=causal, generator=generator)
        nn.init.uniform_(self.gate.mix.weight, -1e-3 / tokens, 1e-3 / tokens, generator=generator)
        nn.init.ones_(self.gate.mix.bias)
        self.down = lecun_(nn.Linear(half, dim), generator)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See the class."""
        check_input(self, x)
        u, v = F.gelu(self.up(x)).chunk(2, -1)
        return self.down(u * self.gate(self.norm(v), mask))


class Branch(nn.Module):
    """LayerScale and stochastic depth: y = scale * x, or 0 for a whole example with probability ``drop``."""

    def __init__(self, dim: int, scale: float | None = None, drop: float = 0.0) -> None:
        super().__init__()
        if not 0 <= drop < 1:
            raise PomonaError(f"drop_path={drop} must be at least 0 and below 1")
        self.scale = None if scale is None else nn.Parameter(torch.full((dim,), float(scale)))
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)"""
        if self.scale is not None:
            x = x * self.scale
        if self.training and self.drop:
            keep = torch.rand(x.shape[:-2], device=x.device, dtype=x.dtype)[..., None, None] >= self.drop
            x = x * keep / (1 - self.drop)
        return x


class MixerBlock(nn.Module):
    """pre:  u = x + mixer(norm(x)),  y = u + ffn(norm(u));  post: u = norm(x + mixer(x)), y = norm(u + ffn(u)).

    Args:
        dim: D.
        mixer: a token mixer.
        channel_mlp: what acts on every token, (*, D) -> (*, D).
        norm: pre or post.
        make_norm: (D) -> norm layer.
        drop_path: probability of leaving a branch out for an example.
        layer_scale: start of a learned factor per channel on each branch; none by default.

    Shape:
        (B, N, D), mask (B, N) or None -> (B, N, D)
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        channel_mlp: nn.Module,
        *,
        norm: Literal["pre", "post"] = "pre",
        make_norm: Callable[[int], nn.Module] = nn.LayerNorm,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        if norm not in ("pre", "post"):
            raise PomonaError(f"norm={norm!r} must be 'pre' or 'post'")
        self.pre = norm == "pre"
        self.norm_mixer, self.norm_channel = make_norm(dim), make_norm(dim)
        self.mixer, self.channel_mlp = mixer, channel_mlp
        self.branch_mixer = Branch(dim, layer_scale, drop_path)
        self.branch_channel = Branch(dim, layer_scale, drop_path)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See the class."""
        check_input(self, x)
        if self.pre:
            x = x + self.branch_mixer(self.mixer(self.norm_mixer(x), mask))
            return x + self.branch_channel(self.channel_mlp(self.norm_channel(x)))
        x = self.norm_mixer(x + self.branch_mixer(self.mixer(x, mask)))
        return self.norm_channel(x + self.branch_channel(self.channel_mlp(x)))


class MixerNet(nn.Module):
    """stem -> ``depth`` mixer blocks -> norm -> mean over the real tokens -> head.

    Args:
        stem: anything -> (B, N, D).
        dim: D.
        mixer: () -> a token mixer, called for each block.
        channel_mlp: () -> what acts on every token; an MLP of width 4 D by default.
        depth: blocks.
        head: (B, D) -> output.
        norm: pre or post, see `MixerBlock`.
        drop_path: probability of dropping a branch at the last block; earlier ones linearly less.

    Shape:
        stem input, mask (B, N) or None -> head output
    """

    def __init__(
        self,
        stem: nn.Module,
        dim: int,
        mixer: Callable[[], nn.Module],
        channel_mlp: Callable[[], nn.Module] | None = None,
        *,
        depth: int,
        head: nn.Module,
        norm: Literal["pre", "post"] = "pre",
        make_norm: Callable[[int], nn.Module] = nn.LayerNorm,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        check_positive(dim=dim)
        make_channel = channel_mlp or (lambda: FeedForward(dim, 4 * dim))
        self.stem = stem
        self.blocks = nn.ModuleList(
            MixerBlock(
                dim,
                mixer(),
                make_channel(),
                norm=norm,
                make_norm=make_norm,
                drop_path=drop_path * index / max(depth - 1, 1),
                layer_scale=layer_scale,
            )
            for index in range(depth)
        )
        self.norm = make_norm(dim) if norm == "pre" else nn.Identity()
        self.head = head

    def features(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the head receives: (B, D)."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x)
        if mask is None:
            return x.mean(-2)
        return hide(x, mask).sum(-2) / mask.sum(-1, keepdim=True).clamp(min=1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See the class."""
        return self.head(self.features(x, mask))
