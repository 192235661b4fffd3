"""Terminator: blocks of slow and fast networks without residual connections.

Source: HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction, arXiv 2401.17948.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pomona.errors import check_positive
from pomona.nets.convnet import global_mean
from pomona.nn.hyperzzw import SFNEBlock, slow_loss


class Terminator(nn.Module):
    """1x1 convolution -> `SFNEBlock`s, the image repeated into each after the first -> mean -> linear.

    Args:
        in_channels, classes: sizes.
        size: (H, W) of the images.
        width: channels.
        blocks: how many.
        slow_weight: of the loss that draws the blocks' global kernels together, in `aux_loss`.
        repeat: join the stem's output to the branches of every block after the first.
        **options: of the blocks.

    Shape:
        (B, in_channels, H, W) -> (B, classes)
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        size: tuple[int, int],
        *,
        width: int = 12,
        blocks: int = 2,
        slow_weight: float = 0.05,
        repeat: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, classes=classes, width=width, blocks=blocks)
        self.slow_weight, self.repeat = slow_weight, repeat
        self.stem = nn.Conv2d(in_channels, width, 1)
        self.blocks = nn.ModuleList(
            SFNEBlock(width, width, size, repeat=width if repeat and index else 0, **options) for index in range(blocks)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        z = first = self.stem(x)
        for index, block in enumerate(self.blocks):
            z = block(z, first if self.repeat and index else None)
        return self.head(global_mean(z))

    def aux_loss(self) -> Tensor:
        """slow_weight times `slow_loss` of the blocks' global kernels."""
        kernels = [block.slow() for block in self.blocks if block.slow is not None]  # type: ignore[operator,union-attr]
        if not kernels or not self.slow_weight:
            return torch.zeros((), device=self.head.weight.device)
        return self.slow_weight * slow_loss(kernels)
