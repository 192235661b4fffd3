"""Attention whose softmax is replaced by a learned operator on the rows of the attention matrix.

Source: Kolmogorov-Arnold Attention: Is Learnable Attention Better For Vision Transformers?, arXiv 2503.10632.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from pomona.errors import PomonaError, check_positive, unknown
from pomona.nn.basis import BASES, make_basis, trigonometric
from pomona.nn.check import check_input
from pomona.nn.feedforward import FeedForward
from pomona.nn.mixing import AttentionMixer, MixerNet, check_tokens
from pomona.nn.mlp_mixer import PatchStem

PROJECTIONS = ("softmax", "simplex")


def project_simplex(x: Tensor) -> Tensor:
    """The nearest point of the probability simplex, along the last axis: max(x - t, 0) with t such that it sums to 1.

    Source: the sorting algorithm of Efficient Projections onto the l1-Ball (Duchi et al., 2008).
    """
    ordered = x.sort(-1, descending=True).values
    above = ordered.cumsum(-1) - 1
    rank = torch.arange(1, x.shape[-1] + 1, device=x.device).to(x)
    support = (ordered * rank > above).sum(-1, keepdim=True)
    return (x - above.gather(-1, support - 1) / support).clamp(min=0)


class FourierSeries(nn.Module):
    """cos(m x), sin(m x), m = 1 .. size, of x itself: (*) -> (*, 2 size)"""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.n_basis = size, 2 * size

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return trigonometric(x, self.size)


class LinearFunction(nn.Module):
    """The function x alone: (*) -> (*, 1)"""

    n_basis = 1

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x[..., None]


class KArAtOperator(nn.Module):
    """sigma(a) = W Phi(a),  Phi(a)_p = sum_q sum_m c_pqm B_m(a_q): what replaces the softmax, for each head its own.

    Args:
        tokens: N, the length of a row a of attention logits.
        heads: number of heads.
        basis: fourier (cos(m a), sin(m a) of the logits as they are), identity (a itself) or a name in
            `pomona.nn.basis.BASES`.
        grid: G, its frequencies, degree or grid intervals.
        rank: r, rows of Phi; 12, or N if that is less, by default. 'full' is Phi with N rows and no W, which
            costs N^2 functions a head.
        grid_range: logits between which the grid of a basis from the registry lies.

    Shape:
        (*, heads, N, N) -> (*, heads, N, N); 2 G r N + N r parameters a head for fourier.
    """

    def __init__(
        self,
        tokens: int,
        heads: int,
        *,
        basis: str = "fourier",
        grid: int = 3,
        rank: int | Literal["full"] | None = None,
        grid_range: tuple[float, float] = (-3.0, 3.0),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        rows = tokens if rank == "full" else min(12, tokens) if rank is None else rank
        check_positive(tokens=tokens, heads=heads, grid=grid, rank=rows)
        own: dict[str, Callable[[], nn.Module]] = {"fourier": lambda: FourierSeries(grid), "identity": LinearFunction}
        if basis not in own and basis not in BASES:
            raise unknown("basis", basis, [*own, *BASES])
        self.basis = own[basis]() if basis in own else make_basis(basis, tokens, grid, *grid_range)
        self.tokens, self.heads, self.rank = tokens, heads, rows
        self.coefficients = nn.Parameter(torch.empty(heads, rows, tokens, self.basis.n_basis))  # type: ignore[call-overload]
        nn.init.normal_(self.coefficients, std=(tokens * grid) ** -0.5, generator=generator)
        self.weight = None if rank == "full" else nn.Parameter(torch.empty(heads, tokens, rows))
        if self.weight is not None:
            bound = (6 / (tokens + rows)) ** 0.5  # Xavier's, of each head's matrix
            nn.init.uniform_(self.weight, -bound, bound, generator=generator)

    def forward(self, logits: Tensor) -> Tensor:
        """See the class."""
        check_input(self, logits, self.tokens)
        check_input(self, logits, self.heads, -3)
        y = self.basis(logits).flatten(-2) @ self.coefficients.flatten(-2).mT
        return y if self.weight is None else y @ self.weight.mT

    def extra_repr(self) -> str:
        """Sizes."""
        return f"tokens={self.tokens}, heads={self.heads}, rank={self.rank}"


class KArAt(AttentionMixer):
    """y = concat_h P(sigma_h(q_h k_h^T / sqrt(d))) v_h W_O: attention with a learned operator on each row of logits.

    The operator knows every position of a row, so that the number of tokens is fixed and nothing can be masked.

    Args:
        dim: D.
        tokens: N.
        heads: number of heads; by default the divisor of D nearest below D / 16, at least 1.
        project: what makes rows distributions: 'softmax', 'simplex' (nearest point) or None, the paper's choice.
        operator: sigma, (*, heads, N, N) to itself, such as one that other layers use as well; the identity with
            project='softmax' is ordinary attention.
        basis, grid, rank: of `KArAtOperator`, where no operator is given.

    Shape:
        (B, N, D) -> (B, N, D)

    Raises:
        PomonaError: when called with a mask or another number of tokens.
    """

    tunable = {"grid": [1, 3, 5], "rank": [4, 12]}

    def __init__(
        self,
        dim: int,
        tokens: int,
        *,
        heads: int | None = None,
        basis: str = "fourier",
        grid: int = 3,
        rank: int | Literal["full"] | None = None,
        project: Literal["softmax", "simplex"] | None = None,
        operator: nn.Module | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(dim, heads=heads, generator=generator)
        if project is not None and project not in PROJECTIONS:
            raise unknown("project", project, PROJECTIONS)
        self.dim, self.tokens, self.project = dim, tokens, project
        if operator is None:
            operator = KArAtOperator(tokens, self.heads, basis=basis, grid=grid, rank=rank, generator=generator)
        self.operator = operator

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Attention (*, heads, N, N) and values (*, heads, N, d)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).movedim((-3, -2), (0, -3))
        weights = self.operator(q @ k.mT * q.shape[-1] ** -0.5)
        if self.project == "softmax":
            weights = weights.softmax(-1)
        elif self.project == "simplex":
            weights = project_simplex(weights)
        return weights, v

    def attention(self, x: Tensor) -> Tensor:
        """The matrices that weigh the values: (B, N, D) -> (B, heads, N, N)"""
        return self._parts(x)[0]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See the class."""
        if mask is not None:
            raise PomonaError("KArAt takes no mask: its operator is made for rows of all tokens")
        check_input(self, x, self.dim)
        check_tokens(x, self.tokens)
        weights, v = self._parts(x)
        return self.out((weights @ v).movedim(-3, -2).flatten(-2))

    def extra_repr(self) -> str:
        """Sizes."""
        return f"dim={self.dim}, tokens={self.tokens}, heads={self.heads}, project={self.project}"


class ClassStem(nn.Module):
    """A class token before the patches' tokens, and a learned position added to each: (B, C, *sides) -> (B, N, dim)."""

    def __init__(self, patches: PatchStem, dim: int) -> None:
        super().__init__()
        self.patches, self.tokens = patches, patches.tokens + 1
        self.first = nn.Parameter(torch.zeros(dim))
        self.position = nn.Parameter(0.02 * torch.randn(self.tokens, dim))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.patches(x)
        return torch.cat([self.first.expand(*x.shape[:-2], 1, -1), x], -2) + self.position


class ViTTiny(MixerNet):
    """A vision transformer whose attention is softmax's or learned; the class token's features go to the head.

    Args:
        image, patch, channels: of `pomona.nn.mlp_mixer.PatchStem`.
        classes: outputs of the head.
        dim, depth, heads: those of ViT-Tiny by default.
        hidden: width of the channel MLP; 4 dim by default.
        attention: 'softmax', or G with the grid and B (an operator for each layer) or U (universal: one that all
            layers share), such as 'G3B' or 'G1U'.
        basis, rank, project: of `KArAt`.

    Shape:
        (B, channels, *sides) -> (B, classes)
    """

    def __init__(
        self,
        image: int | tuple[int, ...] = 32,
        patch: int = 4,
        channels: int = 3,
        classes: int = 10,
        *,
        dim: int = 192,
        depth: int = 12,
        heads: int = 3,
        hidden: int | None = None,
        attention: str = "G3B",
        basis: str = "fourier",
        rank: int | Literal["full"] | None = None,
        project: Literal["softmax", "simplex"] | None = None,
        drop_path: float = 0.0,
    ) -> None:
        name = re.fullmatch(r"G(\d+)([BU])", attention)
        if name is None and attention != "softmax":
            raise PomonaError(f"attention={attention!r} must be 'softmax' or such as 'G3B' or 'G1U'")
        sides = (image, image) if isinstance(image, int) else image
        stem = ClassStem(PatchStem(sides, patch, channels, dim), dim)

        def operator() -> nn.Module:
            if name is None:
                return nn.Identity()
            return KArAtOperator(stem.tokens, heads, basis=basis, grid=int(name[1]), rank=rank)

        shared = operator() if name is not None and name[2] == "U" else None
        super().__init__(
            stem,
            dim,
            lambda: KArAt(
                dim,
                stem.tokens,
                heads=heads,
                project="softmax" if name is None else project,
                operator=shared or operator(),
            ),
            lambda: FeedForward(dim, hidden or 4 * dim),
            depth=depth,
            head=nn.Linear(dim, classes),
            drop_path=drop_path,
        )

    def features(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the head receives, the class token: (B, dim)."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)[..., 0, :]


@torch.no_grad()
def attention_spectrum(net: nn.Module, x: Tensor) -> Tensor:
    """Singular values of each head's attention matrices, largest first, mean over the batch: (layers, heads, N).

    Args:
        net: any network with `KArAt` layers of one size; it is put in evaluation mode for the call.
        x: inputs of the network.
    """
    found: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda layer, inputs: found.append(torch.linalg.svdvals(layer.attention(inputs[0])).mean(0))
        )
        for module in net.modules()
        if isinstance(module, KArAt)
    ]
    if not hooks:
        raise PomonaError(f"net={type(net).__name__} has no KArAt layer")
    training = net.training
    try:
        net.eval()(x)
    finally:
        net.train(training)
        for hook in hooks:
            hook.remove()
    return torch.stack(found)
