"""HyperMixer: a token-mixing MLP whose weights are made from the tokens themselves (arXiv 2203.03691).

It is as dynamic as attention, takes sequences of any length, and costs time linear in the length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, check_divisible, check_positive, unknown
from pomona.nn.check import check_input
from pomona.nn.feedforward import FeedForward
from pomona.nn.fnet import FourierMixer
from pomona.nn.mixing import AttentionMixer, GatingMixer, MixerBlock, MLPTokenMixer, hide


def sinusoid(tokens: int, dim: int, like: Tensor) -> Tensor:
    """Positions (tokens, dim): p[n, 2i] = sin(n / 10000^(2i / dim)), p[n, 2i + 1] = cos of the same.

    Source: Attention Is All You Need, arXiv 1706.03762.
    """
    position = torch.arange(tokens, device=like.device, dtype=torch.float64)[:, None]
    angle = position / 10000 ** (torch.arange(0, dim, 2, device=like.device) / dim)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)[:, :dim].to(like)


class HeadMLP(nn.Module):
    """W_h = gelu(X_h A_h) B_h for each head's share X_h of the features, the hidden width as wide as X_h.

    Shape:
        (B, N, dim) -> (B, heads, N, out / heads)
    """

    def __init__(
        self, dim: int, out: int, heads: int = 1, *, bias: bool = False, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        width = dim // heads
        self.up = nn.Parameter(torch.empty(heads, width, width))
        self.down = nn.Parameter(torch.empty(heads, width, out // heads))
        for weight in (*self.up, *self.down):  # head by head: fans are those of one head's matrix
            nn.init.xavier_uniform_(weight, gain=2**0.5, generator=generator)
        self.up_bias = nn.Parameter(torch.zeros(heads, 1, width)) if bias else None
        self.down_bias = nn.Parameter(torch.zeros(heads, 1, out // heads)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        hidden = x.unflatten(-1, (len(self.up), -1)).movedim(-2, -3) @ self.up
        out = F.gelu(hidden if self.up_bias is None else hidden + self.up_bias) @ self.down
        return out if self.down_bias is None else out + self.down_bias


class HyperMixing(nn.Module):
    """Y = LN(W_2 gelu(W_1^T X)) with W_1 = MLP_1(X + P) and W_2 = MLP_2(X + P), token by token.

    P are positions, which only the weights see. Padding has zero rows in W_1, W_2 and X. Time is O(N D D'), parameters
    do not depend on N.

    Args:
        dim: D.
        hidden: width D' of the token-mixing MLP; 2 D by default.
        heads: D and D' are split among so many token-mixing MLPs, each with its own, smaller generator.
        tied: W_2 = W_1.
        pos: sinusoid, or none (permutation equivariant).
        norm: layer norm of the output.
        bias: biases in the generators.
        causal: must be False; the paper has no causal form.

    Shape:
        (B, N, D), mask (B, N) or None -> (B, N, D)

    Raises:
        PomonaError: for ``causal=True``, an unknown ``pos``, or heads that divide D or D' unevenly.

    Source: HyperMixer: An MLP-based Low Cost Alternative to Transformers, arXiv 2203.03691.
    """

    tunable: ClassVar[dict[str, list[bool]]] = {"tied": [False, True]}

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        heads: int = 1,
        tied: bool = False,
        pos: Literal["sinusoid", "none"] = "sinusoid",
        norm: bool = True,
        bias: bool = False,
        causal: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        hidden = hidden or 2 * dim
        check_positive(dim=dim, hidden=hidden, heads=heads)
        check_divisible("dim", dim, "heads", heads)
        check_divisible("hidden", hidden, "heads", heads)
        if pos not in ("sinusoid", "none"):
            raise unknown("pos", pos, ["sinusoid", "none"])
        if causal:
            raise PomonaError("causal=True is impossible: the hidden units of the mixing MLP sum over all tokens")
        self.dim, self.hidden, self.heads, self.pos = dim, hidden, heads, pos
        self.first = HeadMLP(dim, hidden, heads, bias=bias, generator=generator)
        self.second = None if tied else HeadMLP(dim, hidden, heads, bias=bias, generator=generator)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See the class."""
        check_input(self, x, self.dim)
        return self._mix(x, None, x, mask, mask)

    def cross(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        query_mask: Tensor | None = None,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """W_1 from the keys, W_2 from the queries, X = values: (B, M, D), (B, N, D), (B, N, D) -> (B, M, D).

        Raises:
            PomonaError: if the layer is tied.
        """
        if self.second is None:
            raise PomonaError("tied=True makes both weights from the same tokens; cross needs tied=False")
        for x in (queries, keys, values):
            check_input(self, x, self.dim)
        return self._mix(keys, queries, values, query_mask, key_mask)

    def _mix(
        self, keys: Tensor, queries: Tensor | None, values: Tensor, query_mask: Tensor | None, key_mask: Tensor | None
    ) -> Tensor:
        located = self._locate(keys)
        w1 = self.first(located)
        if self.second is None:
            w2 = w1
        else:
            w2 = self.second(located if queries is None else self._locate(queries))
        key_heads, query_heads = (None if m is None else m[..., None, :] for m in (key_mask, query_mask))
        x = hide(values, key_mask).unflatten(-1, (self.heads, -1)).movedim(-2, -3)
        y = hide(w2, query_heads) @ F.gelu(hide(w1, key_heads).mT @ x)
        return self.norm(y.movedim(-3, -2).flatten(-2))

    def _locate(self, x: Tensor) -> Tensor:
        return x if self.pos == "none" else x + sinusoid(x.shape[-2], self.dim, x)

    def extra_repr(self) -> str:
        """Sizes and options."""
        tied = self.second is None
        return f"dim={self.dim}, hidden={self.hidden}, heads={self.heads}, tied={tied}, pos={self.pos}"


class HyperMixerBlock(MixerBlock):
    """u = x + HyperMixing(LN x),  y = u + FFN(LN u).

    Args:
        dim: D.
        hidden: width D' of the token-mixing MLP; 2 D by default.
        ffn: width of the feed-forward part; 4 D by default.
        dropout: probability after the feed-forward activation.
        options: further arguments of `HyperMixing`.

    Shape:
        (B, N, D), mask (B, N) or None -> (B, N, D)

    Source: HyperMixer: An MLP-based Low Cost Alternative to Transformers, arXiv 2203.03691.
    """

    def __init__(
        self, dim: int, hidden: int | None = None, *, ffn: int | None = None, dropout: float = 0.0, **options: object
    ) -> None:
        mixer = HyperMixing(dim, hidden, **options)  # type: ignore[arg-type]
        super().__init__(dim, mixer, FeedForward(dim, ffn or 4 * dim, dropout=dropout))


class LinearAttentionMixer(nn.Module):
    """y_n = sum_m (phi(q_n) . phi(k_m)) v_m / sum_m phi(q_n) . phi(k_m), phi = elu + 1, in time linear in N.

    Args:
        dim: D.
        heads: number of heads.

    Shape:
        (B, N, D), mask (B, N) or None -> (B, N, D)

    Source: Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention, arXiv 2006.16236.
    """

    def __init__(self, dim: int, *, heads: int = 1, generator: torch.Generator | None = None) -> None:
        super().__init__()
        check_positive(dim=dim, heads=heads)
        check_divisible("dim", dim, "heads", heads)
        self.dim, self.heads = dim, heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        for linear in (self.qkv, self.out):
            nn.init.xavier_uniform_(linear.weight, generator=generator)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See the class."""
        check_input(self, x, self.dim)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).movedim((-3, -2), (0, -3))
        q, k = F.elu(q) + 1, hide(F.elu(k) + 1, None if mask is None else mask[..., None, :])
        total = q @ k.sum(-2, keepdim=True).mT
        y = q @ (k.mT @ v) / (total + 1e-6)
        return self.out(y.movedim(-3, -2).flatten(-2))


MIXERS: dict[str, Callable[[int, int], nn.Module]] = {
    "hypermixer": lambda dim, tokens: HyperMixing(dim),
    "mlp_mixer": lambda dim, tokens: MLPTokenMixer(tokens),
    "gmlp": GatingMixer,
    "fnet": lambda dim, tokens: FourierMixer(scale="ortho"),
    "linear_transformer": lambda dim, tokens: LinearAttentionMixer(dim),
    "attention": lambda dim, tokens: AttentionMixer(dim),
}
"""HyperMixer and what the paper compares it with: (dim, largest number of tokens) -> token mixer."""


def diagnose(net: Callable[..., Tensor], x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention-like map of any token mixer, block or stack: a[i, j] ~ |d y_i / d x_j|, rows summing to 1.

    Args:
        net: called as ``net(x)`` or ``net(x, mask)``; each example apart.
        x: tokens (B, N, D).
        mask: (B, N), True at real tokens.

    Returns:
        (B, N, N); row i says which tokens output i depends on (zero where it depends on none).
    """
    maps = []
    for row in range(len(x)):
        given = () if mask is None else (mask[row : row + 1],)
        jacobian = torch.func.jacrev(lambda one, given=given: net(one[None], *given)[0])(x[row])  # (N, D, N, D)
        maps.append(jacobian.square().sum((1, 3)).sqrt().detach())
    found = torch.stack(maps) if maps else x.new_zeros(0, x.shape[1], x.shape[1])
    return found / found.sum(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def tuning_curve(scores: Sequence[float]) -> Tensor:
    """Expected best score after k = 1, 2, ..., n random trials, from the validation scores of n trials.

    V_k = sum_i s_(i) ((i / n)^k - ((i - 1) / n)^k), with s_(i) in ascending order: trials drawn with replacement.

    Returns:
        (n,), float64, non-decreasing.

    Raises:
        PomonaError: for no scores.

    Source: Show Your Work: Improved Reporting of Experimental Results, arXiv 1909.03004.
    """
    if not len(scores):
        raise PomonaError("scores is empty; give the validation score of at least one trial")
    ordered = torch.tensor(sorted(scores), dtype=torch.float64)
    n = len(ordered)
    below = (torch.arange(n + 1, dtype=torch.float64) / n) ** torch.arange(1, n + 1)[:, None]
    return below.diff(dim=1) @ ordered
