"""A plain convolutional network, with slots."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from pomona.nets.fill import Fill, make_head, make_memory
from pomona.nets.specs import Inputs, Outputs


def global_mean(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C)"""
    return x.mean((-2, -1))


class ConvNet(nn.Module):
    """``depth`` stages of (conv 3x3, norm, act), a pooling after each while the image is at least 4 pixels, global
    mean, memory, head.

    Channels double at each pooling.

    Args:
        width: channels of the first stage.
        depth: stages.
        dropout: probability before the head.
    """

    slots: ClassVar[dict[str, str]] = {
        "conv": "conv",
        "act": "relu",
        "norm": "batch",
        "pool": "max",
        "memory": "none",
        "head": "linear",
    }
    kinds: ClassVar[tuple[str, ...]] = ("image",)

    def __init__(
        self, inputs: Inputs, outputs: Outputs, fill: Fill, *, width: int = 32, depth: int = 3, dropout: float = 0.0
    ) -> None:
        super().__init__()
        channels, height, breadth = inputs.shape
        stages: list[nn.Module] = []
        out = width
        for stage in range(depth):
            stages.append(
                fill.unit(
                    lambda n, c=channels: fill.make(  # type: ignore[misc]
                        "conv",
                        in_channels=c,
                        out_channels=n,
                        kernel_size=3,
                        stride=1,
                        padding=1,
                        bias=fill.empty("norm"),
                    ),
                    out,
                    dims=2,
                )
            )
            channels = out
            if min(height, breadth) >= 4 and stage + 1 < depth:
                stages.append(fill.make("pool", kernel_size=2, stride=2, channels=channels))
                height, breadth, out = height // 2, breadth // 2, out * 2
        self.blocks = nn.Sequential(*stages)
        self.memory = make_memory(fill, channels)
        self.dropout = nn.Dropout(dropout)
        self.head = make_head(fill, channels, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, outputs)"""
        return self.head(self.dropout(self.memory(global_mean(self.blocks(x)))))
