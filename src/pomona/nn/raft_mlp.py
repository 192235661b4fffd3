"""Raft token mixing: an MLP over columns, then one over rows, each together with a few channels (arXiv 2108.04384)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, check_divisible, check_positive
from pomona.nn.check import check_input
from pomona.nn.feedforward import FeedForward
from pomona.nn.mixing import Branch, MLPTokenMixer, hide, lecun_


def raft_shrink(x: Tensor, raft: int, axis: int) -> Tensor:
    """One axis of the image together with ``raft`` groups of channels as the last one.

    Channel c is place c // (C / raft) in its raft: (B, H, W, C) -> (B, C / raft, W, raft * H) for axis 0, and
    (B, C / raft, H, raft * W) for axis 1.
    """
    rafts = x.unflatten(-1, (raft, -1))  # (B, H, W, raft, C / raft)
    return rafts.permute((0, 4, 2, 3, 1) if axis == 0 else (0, 4, 1, 3, 2)).flatten(-2)


def raft_expand(y: Tensor, raft: int, axis: int) -> Tensor:
    """The inverse of `raft_shrink`."""
    rafts = y.unflatten(-1, (raft, -1))  # (B, C / raft, other axis, raft, axis)
    return rafts.permute((0, 4, 2, 3, 1) if axis == 0 else (0, 2, 4, 3, 1)).flatten(-2)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic interpolation of (B, H, W, C) to another (H, W); the same tensor where nothing changes."""
    if tuple(x.shape[1:3]) == tuple(size):
        return x
    return F.interpolate(x.movedim(-1, 1), size, mode="bicubic", align_corners=False).movedim(1, -1)


class _GridMixer(nn.Module):
    """Tokens as a feature map of ``sides``, interpolated to it and back where they fill another grid."""

    def __init__(self, height: int, width: int, dim: int, residual: bool, drop_path: float) -> None:
        super().__init__()
        check_positive(height=height, width=width, dim=dim)
        self.sides, self.dim, self.residual = (height, width), dim, residual
        self.branch = Branch(dim, drop=drop_path)

    def forward(self, x: Tensor, mask: Tensor | None = None, grid: tuple[int, int] | None = None) -> Tensor:
        """(B, N, D), with ``grid`` the (height, width) of the tokens where they are not as made -> (B, N, D)."""
        check_input(self, x, self.dim)
        grid = self.sides if grid is None else grid
        if x.shape[-2] != math.prod(grid):
            raise PomonaError(f"{x.shape[-2]} tokens do not fill the grid {tuple(grid)}; pass grid=(height, width)")
        if mask is not None and tuple(grid) != self.sides:
            raise PomonaError(f"mask needs tokens on the grid {self.sides}, not {tuple(grid)}")
        tokens = resize(x.unflatten(-2, grid), self.sides).flatten(1, 2)
        mixed = self.change(tokens, mask)
        if self.residual:
            mixed = tokens + mixed
        return resize(mixed.unflatten(-2, self.sides), grid).flatten(1, 2)

    def change(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """What is added to the tokens."""
        raise NotImplementedError


class RaftTokenMixer(_GridMixer):
    """y = x + V(LN x),  z = y + H(LN y): MLPs over (raft, column) and (raft, row).

    The C channels are r groups of C / r. V takes the r H numbers of a column that have the same place in their group,
    H the r W of a row; each is shared by all columns (rows) and all C / r places.

    Args:
        height: H in tokens.
        width: W in tokens.
        dim: channels C.
        raft: groups r that are mixed with the axis; 1 mixes the axes alone.
        expansion: hidden width of V and H, in inputs.
        residual: the token itself is part of the output; False for blocks that add it.
        dropout: probability after the activations.
        drop_path: probability of leaving a step out for an example.

    Shape:
        (B, H W, C), mask (B, H W) or None -> (B, H W, C)

    Raises:
        PomonaError: if the rafts do not divide the channels, or the tokens fill no grid.

    Source: RaftMLP: How Much Can Be Done Without Attention and with Less Spatial Locality?, arXiv 2108.04384.
    """

    def __init__(
        self,
        height: int,
        width: int,
        dim: int,
        *,
        raft: int = 2,
        expansion: float = 2.0,
        residual: bool = True,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(height, width, dim, residual, drop_path)
        check_positive(raft=raft, expansion=expansion)
        check_divisible("dim", dim, "raft", raft)
        self.raft = raft
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in self.sides)
        self.mlps = nn.ModuleList(
            FeedForward(
                n, max(1, round(expansion * n)), lambda i, o: lecun_(nn.Linear(i, o), generator), dropout=dropout
            )
            for n in (raft * height, raft * width)
        )

    def change(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """See the class."""
        vertical = self.branch(self.step(x, 0, mask))
        return vertical + self.branch(self.step(x + vertical, 1, mask))

    def step(self, x: Tensor, axis: int, mask: Tensor | None = None) -> Tensor:
        """V(LN x) for axis 0, H(LN x) for axis 1: (B, N, C) -> (B, N, C)."""
        image = hide(self.norms[axis](x), mask).unflatten(-2, self.sides)
        return raft_expand(self.mlps[axis](raft_shrink(image, self.raft, axis)), self.raft, axis).flatten(1, 2)

    def extra_repr(self) -> str:
        """Sizes and options."""
        return f"height={self.sides[0]}, width={self.sides[1]}, dim={self.dim}, raft={self.raft}"


def separable_mixer(height: int, width: int, dim: int, **options: float) -> RaftTokenMixer:
    """A mixer of columns and then of rows, channel by channel: rafts of one."""
    return RaftTokenMixer(height, width, dim, raft=1, **options)  # type: ignore[arg-type]


class OriginalMixer(_GridMixer):
    """y = x + MLP(LN x) over all H W tokens, as in MLP-Mixer, but for any resolution: what rafts are compared with.

    Args:
        height: H in tokens.
        width: W in tokens.
        dim: channels C.
        expansion: hidden width, in tokens.
        residual: the token itself is part of the output.
        dropout: probability after the activation.
        drop_path: probability of leaving the step out for an example.

    Shape:
        (B, H W, C), mask (B, H W) or None -> (B, H W, C)

    Source: MLP-Mixer: An all-MLP Architecture for Vision, arXiv 2105.01601.
    """

    def __init__(
        self,
        height: int,
        width: int,
        dim: int,
        *,
        expansion: float = 2.0,
        residual: bool = True,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(height, width, dim, residual, drop_path)
        self.norm = nn.LayerNorm(dim)
        self.mix = MLPTokenMixer(height * width, expand=expansion, dropout=dropout, generator=generator)

    def change(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """See the class."""
        return self.branch(self.mix(self.norm(x), mask))


class RaftMixer(RaftTokenMixer):
    """``mixer=raft``: `RaftTokenMixer` on the squarest grid that the tokens fill, without the token itself.

    Shape:
        (B, N, D), mask (B, N) or None -> (B, N, D)
    """

    tunable: ClassVar[dict[str, list[float]]] = {"expansion": [1.0, 2.0, 4.0]}

    def __init__(
        self,
        dim: int,
        tokens: int,
        *,
        raft: int = 2,
        expansion: float = 2.0,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        check_positive(tokens=tokens)
        height = next(h for h in range(math.isqrt(tokens), 0, -1) if tokens % h == 0)
        options = {"raft": raft, "expansion": expansion, "dropout": dropout, "generator": generator}
        super().__init__(height, tokens // height, dim, residual=False, **options)  # type: ignore[arg-type]


class MultiScalePatchEmbedding(nn.Module):
    """Windows of several sizes around each patch, concatenated, through one linear map.

    Images that no whole number of patches fills are enlarged to one by bicubic interpolation.

    Args:
        channels: of the image.
        dim: features of a token.
        kernels: sides of the windows; the smallest is the patch and the stride, the others exceed it by an even number.

    Shape:
        (B, channels, H, W) -> (B, H / patch, W / patch, dim)

    Raises:
        PomonaError: for kernels that cannot be centred on the patch.

    Source: RaftMLP: How Much Can Be Done Without Attention and with Less Spatial Locality?, arXiv 2108.04384.
    """

    def __init__(self, channels: int, dim: int, kernels: Sequence[int] = (4, 8)) -> None:
        super().__init__()
        check_positive(channels=channels, dim=dim, **{f"kernels[{i}]": kernel for i, kernel in enumerate(kernels)})
        self.channels, self.kernels, self.patch = channels, tuple(kernels), min(kernels)
        for kernel in kernels:
            if (kernel - self.patch) % 2:
                raise PomonaError(f"kernels={self.kernels} must all be even or all be odd, such as (4, 8)")
        self.linear = nn.Linear(channels * sum(kernel**2 for kernel in kernels), dim)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        check_input(self, x, self.channels, 1)
        height, width = (-(-side // self.patch) for side in x.shape[2:])
        if (height * self.patch, width * self.patch) != tuple(x.shape[2:]):
            x = F.interpolate(x, (height * self.patch, width * self.patch), mode="bicubic", align_corners=False)
        windows = [F.unfold(x, k, padding=(k - self.patch) // 2, stride=self.patch) for k in self.kernels]
        return self.linear(torch.cat(windows, 1).mT).unflatten(1, (height, width))
