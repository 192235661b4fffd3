"""MONet: image and table networks of Mu-layers, without any activation (arXiv 2401.17992)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor, nn

from pomona.errors import PomonaError, check_positive, unknown
from pomona.nn.check import check_input
from pomona.nn.mu_layer import PolyBlock

SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "T": ((64, 128, 192, 192), (4, 8, 12, 10)),
    "S": ((128, 192, 256, 384), (4, 6, 12, 14)),
}
"""Channels and blocks of the stages of the paper's networks for large images, with patches of 4."""


def _convolution(channels: int, out: int, kernel: int, stride: int, padding: int = 0) -> nn.Conv2d:
    conv = nn.Conv2d(channels, out, kernel, stride, padding)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


class PyramidEmbedding(nn.Module):
    """Patches at two scales: half patches and then 2 x 2 of them, plus alpha times whole patches, all linear.

    Args:
        channels: of the image.
        dim: channels C of a token.
        patch: side of a patch, even.

    Shape:
        (B, channels, H, W) -> (B, dim, H / patch, W / patch)

    Source: Multilinear Operator Networks, arXiv 2401.17992.
    """

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        if patch < 2 or patch % 2:
            raise PomonaError(f"patch={patch} must be even for two scales; take another or pyramid=False")
        self.fine = nn.Sequential(_convolution(channels, dim, patch // 2, patch // 2), _convolution(dim, dim, 2, 2))
        self.coarse = _convolution(channels, dim, patch, patch)
        self.alpha = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.fine(x) + self.alpha * self.coarse(x)


class MONet(nn.Module):
    """Patch embedding -> stages of `PolyBlock`s, a strided 3 x 3 convolution between them -> mean -> linear head.

    Without norms the output is a polynomial of the image, of degree 4^k after k blocks.

    Args:
        channels: of the image.
        classes: outputs; their weights start at 0.
        dims: channels of each stage.
        depths: blocks of each stage.
        patch: side of a patch.
        pyramid: patches at two scales.
        expansion: of the blocks.
        norm: layer norms.
        drop_path: stochastic depth at the last block, linearly less before it.

    Shape:
        (B, channels, H, W) -> (B, classes)

    Raises:
        PomonaError: for dims and depths of different number, or an odd patch with ``pyramid``.

    Source: Multilinear Operator Networks, arXiv 2401.17992.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        dims: Sequence[int] = (48,),
        depths: Sequence[int] = (4,),
        *,
        patch: int = 4,
        pyramid: bool = True,
        expansion: int = 3,
        norm: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive(channels=channels, classes=classes, patch=patch)
        if not dims or len(dims) != len(depths):
            raise PomonaError(f"depths={tuple(depths)} must give one depth for each of dims={tuple(dims)}")
        self.channels = channels
        self.embed: nn.Module = (
            PyramidEmbedding(channels, dims[0], patch) if pyramid else _convolution(channels, dims[0], patch, patch)
        )
        total, done = sum(depths), 0
        self.merges, self.stages = nn.ModuleList([nn.Identity()]), nn.ModuleList()
        for before, after in pairwise(dims):
            self.merges.append(_convolution(before, after, 3, 2, 1))
        for dim, depth in zip(dims, depths, strict=True):
            drops = [drop_path * (done + i) / max(total - 1, 1) for i in range(depth)]
            self.stages.append(nn.Sequential(*(PolyBlock(dim, expansion, norm=norm, drop_path=p) for p in drops)))
            done += depth
        self.head = nn.Linear(dims[-1], classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def sized(cls, name: str, *, channels: int = 3, classes: int = 1000) -> Self:
        """One of the paper's networks by name: T or S."""
        if name not in SIZES:
            raise unknown("name", name, SIZES)
        return cls(channels, classes, *SIZES[name])

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        check_input(self, x, self.channels, 1)
        x = self.embed(x)
        for merge, stage in zip(self.merges, self.stages, strict=True):
            x = stage(merge(x).movedim(1, -1)).movedim(-1, 1)
        return self.head(x.mean((2, 3)))


class MONetTabular(nn.Module):
    """Linear embedding -> `PolyBlock`s without shift -> linear head, whose weights start at 0.

    Args:
        features: columns.
        outputs: of the head.
        dim: width of the blocks.
        depth: blocks.
        expansion: of the blocks.
        norm: layer norms; without them the output is a polynomial of degree 4^depth.

    Shape:
        (B, features) -> (B, outputs)

    Source: Multilinear Operator Networks, arXiv 2401.17992.
    """

    def __init__(
        self, features: int, outputs: int, dim: int = 64, depth: int = 2, *, expansion: int = 3, norm: bool = True
    ) -> None:
        super().__init__()
        check_positive(features=features, outputs=outputs, depth=depth)
        self.embed = nn.Linear(features, dim)
        self.blocks = nn.Sequential(*(PolyBlock(dim, expansion, shift=False, norm=norm) for _ in range(depth)))
        self.head = nn.Linear(dim, outputs)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        check_input(self, x, self.embed.in_features)
        return self.head(self.blocks(self.embed(x)))
