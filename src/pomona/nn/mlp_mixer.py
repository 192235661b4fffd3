"""MLP-Mixer: an MLP over the tokens, then an MLP over the channels, and nothing else."""

from __future__ import annotations

import math
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, check_divisible, check_positive, unknown
from pomona.nn.check import check_input
from pomona.nn.feedforward import FeedForward
from pomona.nn.mixing import MixerBlock, MixerNet, MLPTokenMixer, lecun_

SIZES: dict[str, dict[str, int]] = {
    "S/32": {"depth": 8, "patch": 32, "dim": 512, "token_width": 256, "channel_width": 2048},
    "S/16": {"depth": 8, "patch": 16, "dim": 512, "token_width": 256, "channel_width": 2048},
    "B/32": {"depth": 12, "patch": 32, "dim": 768, "token_width": 384, "channel_width": 3072},
    "B/16": {"depth": 12, "patch": 16, "dim": 768, "token_width": 384, "channel_width": 3072},
    "L/32": {"depth": 24, "patch": 32, "dim": 1024, "token_width": 512, "channel_width": 4096},
    "L/16": {"depth": 24, "patch": 16, "dim": 1024, "token_width": 512, "channel_width": 4096},
    "H/14": {"depth": 32, "patch": 14, "dim": 1280, "token_width": 640, "channel_width": 5120},
}
"""The paper's networks, for images of side 224."""


class MixerLayer(MixerBlock):
    """U = X + W_2 gelu(W_1 LN(X)) over tokens, channel by channel; Y = U + W_4 gelu(W_3 LN(U)) over channels.

    Args:
        tokens: N.
        dim: channels C.
        token_width: hidden width D_S of the token MLP.
        channel_width: hidden width D_C of the channel MLP.
        dropout: probability after each activation.
        drop_path: probability of leaving a branch out for an example.

    Shape:
        (B, N, C), mask (B, N) or None -> (B, N, C)

    Source: MLP-Mixer: An all-MLP Architecture for Vision, arXiv 2105.01601.
    """

    def __init__(
        self,
        tokens: int,
        dim: int,
        token_width: int,
        channel_width: int,
        *,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        check_positive(tokens=tokens, dim=dim, token_width=token_width, channel_width=channel_width)
        super().__init__(
            dim,
            MLPTokenMixer(tokens, width=token_width, dropout=dropout, generator=generator),
            FeedForward(dim, channel_width, lambda n, m: lecun_(nn.Linear(n, m), generator), dropout=dropout),
            drop_path=drop_path,
        )


class PatchStem(nn.Module):
    """Non-overlapping patches, each mapped linearly to a token: (B, channels, *sides) -> (B, N, dim).

    One side in ``image`` cuts a series, two an image.
    """

    def __init__(self, image: tuple[int, ...], patch: int, channels: int, dim: int) -> None:
        super().__init__()
        if len(image) not in (1, 2):
            raise PomonaError(f"image={image} must have one side (a series) or two (an image)")
        for side in image:
            check_divisible("image", side, "patch", patch)
        self.grid = tuple(side // patch for side in image)
        self.conv: nn.Module = (nn.Conv1d, nn.Conv2d)[len(image) - 1](channels, dim, patch, stride=patch)

    @property
    def tokens(self) -> int:
        """N."""
        return math.prod(self.grid)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        check_input(self, x)
        return self.conv(x).flatten(2).mT


class MLPMixer(MixerNet):
    """Patches -> mixer layers -> LN -> mean over tokens -> linear head, whose weights start at 0.

    Args:
        image: side of a square image, or its sides; one side in a tuple is a series.
        patch: side of a patch.
        channels: of the image.
        dim: channels C of a token.
        depth: mixer layers.
        token_width: D_S; half of C by default.
        channel_width: D_C; four times C by default.
        classes: outputs of the head.
        dropout: probability after each activation.
        drop_path: stochastic depth at the last layer, linearly less before it.

    Shape:
        (B, channels, *sides) -> (B, classes)

    Source: MLP-Mixer: An all-MLP Architecture for Vision, arXiv 2105.01601.
    """

    def __init__(
        self,
        image: int | tuple[int, ...],
        patch: int,
        channels: int,
        *,
        classes: int,
        dim: int = 64,
        depth: int = 4,
        token_width: int | None = None,
        channel_width: int | None = None,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        check_positive(patch=patch, channels=channels, dim=dim, depth=depth, classes=classes)
        stem = PatchStem((image, image) if isinstance(image, int) else tuple(image), patch, channels, dim)
        width, wide = token_width or max(1, dim // 2), channel_width or 4 * dim
        head = nn.Linear(dim, classes)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        super().__init__(
            stem,
            dim,
            lambda: MLPTokenMixer(stem.tokens, width=width, dropout=dropout, generator=generator),
            lambda: FeedForward(dim, wide, lambda n, m: lecun_(nn.Linear(n, m), generator), dropout=dropout),
            depth=depth,
            head=head,
            drop_path=drop_path,
        )

    @classmethod
    def sized(cls, name: str, *, image: int = 224, channels: int = 3, classes: int = 1000, **options: float) -> Self:
        """One of the paper's networks by name, such as ``"B/16"``; see `SIZES`."""
        if name not in SIZES:
            raise unknown("name", name, SIZES)
        return cls(image, channels=channels, classes=classes, **SIZES[name], **options)  # type: ignore[arg-type]


@torch.no_grad()
def resize_tokens(
    mixer: MLPTokenMixer,
    new_grid: tuple[int, int],
    grid: tuple[int, int] | None = None,
    mode: Literal["bicubic", "block"] = "bicubic",
) -> MLPTokenMixer:
    """The token MLP for images of another resolution, from a trained one.

    * bicubic: W_1's rows and W_2's columns are images over the token grid; they are interpolated, W_1 scaled by
      N / N' so that sums keep their size. The hidden width stays.
    * block: for K times finer grids. W_1 and W_2 are repeated K^2 times along the diagonal, one copy for each of
      the K^2 coarse grids that interleave in the fine one. (The paper leaves the order of the tokens open; in this
      one, an image enlarged by repetition gives the enlarged output.)

    Args:
        mixer: token MLP for ``grid``.
        new_grid: (height, width) in tokens.
        grid: the present (height, width); square by default.
        mode: bicubic or block.
    """
    side = math.isqrt(mixer.tokens)
    rows, columns = grid or (side, side)
    if rows * columns != mixer.tokens:
        raise PomonaError(
            f"grid={grid or (side, side)} does not hold the mixer's {mixer.tokens} tokens; pass grid=(rows, columns)"
        )
    height, width = new_grid
    up, down = mixer.up, mixer.down
    if mode == "bicubic":
        new = MLPTokenMixer(height * width, width=mixer.width, dropout=mixer.dropout.p).to(up.weight)

        def resize(image: Tensor) -> Tensor:  # (n, N) -> (n, N')
            image = image.unflatten(-1, (rows, columns))[:, None]
            return F.interpolate(image, new_grid, mode="bicubic", align_corners=False).flatten(1)

        new.up.weight.copy_(resize(up.weight) * (mixer.tokens / new.tokens))
        new.up.bias.copy_(up.bias)
        new.down.weight.copy_(resize(down.weight.T).T)
        new.down.bias.copy_(resize(down.bias[None])[0])
        return new
    if mode != "block":
        raise unknown("mode", mode, ["bicubic", "block"])
    factor = height // rows
    if (height, width) != (factor * rows, factor * columns) or factor < 1:
        raise PomonaError(f"new_grid={new_grid} must be a whole multiple of grid=({rows}, {columns}) for mode='block'")
    copies = factor**2
    new = MLPTokenMixer(height * width, width=copies * mixer.width, dropout=mixer.dropout.p).to(up.weight)
    fine = torch.arange(height * width, device=up.weight.device).view(rows, factor, columns, factor)
    order = fine.permute(1, 3, 0, 2).flatten()  # the fine tokens, coarse grid after coarse grid
    new.up.weight[:, order] = torch.block_diag(*[up.weight] * copies)
    new.up.bias.copy_(up.bias.repeat(copies))
    new.down.weight[order] = torch.block_diag(*[down.weight] * copies)
    new.down.bias[order] = down.bias.repeat(copies)
    return new
