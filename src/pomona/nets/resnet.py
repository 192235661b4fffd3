"""A residual convolutional network of basic blocks, with slots."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from pomona.nets.convnet import global_mean
from pomona.nets.fill import Fill, make_head, make_memory
from pomona.nets.specs import Inputs, Outputs


class BasicBlock(nn.Module):
    """act(residual(shortcut(x), norm(conv(act(norm(conv(x)))))))

    The shortcut is the identity, or a strided 1x1 convolution with norm where sizes change.

    Source: Deep Residual Learning for Image Recognition, arXiv 1512.03385.
    """

    def __init__(self, fill: Fill, channels: int, out: int, stride: int) -> None:
        super().__init__()

        def conv(into: int, outof: int, size: int, stride: int) -> nn.Module:
            return fill.make(
                "conv",
                in_channels=into,
                out_channels=outof,
                kernel_size=size,
                stride=stride,
                padding=size // 2,
                bias=fill.empty("norm"),
            )

        def norm() -> nn.Module:
            return nn.Identity() if fill.empty("norm") else fill.make("norm", features=out, dims=2)

        self.first = fill.unit(lambda n: conv(channels, n, 3, stride), out, dims=2)
        self.second = nn.Sequential(conv(out, out, 3, 1), norm())
        same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if same else nn.Sequential(conv(channels, out, 1, stride), norm())
        self.residual = fill.make("residual", features=out, dims=2)
        act, before = fill.widened_act(out, 1)
        # an activation that changes the width needs a 1x1 convolution to come out at `out` again
        self.act = act if before == out else nn.Sequential(nn.Conv2d(out, before, 1), act)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out, H / stride, W / stride)"""
        return self.act(self.residual(self.shortcut(x), self.second(self.first(x))))


class ResNet(nn.Module):
    """conv 3x3 -> stages of basic blocks, channels doubling and resolution halving from stage to stage -> global
    mean -> head.

    Args:
        width: channels of the first stage.
        depth: stages.
        blocks: basic blocks a stage.
        dropout: probability before the head.
    """

    slots: ClassVar[dict[str, str]] = {
        "conv": "conv",
        "act": "relu",
        "norm": "batch",
        "residual": "add",
        "memory": "none",
        "head": "linear",
    }
    kinds: ClassVar[tuple[str, ...]] = ("image",)

    def __init__(
        self,
        inputs: Inputs,
        outputs: Outputs,
        fill: Fill,
        *,
        width: int = 16,
        depth: int = 3,
        blocks: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.stem = fill.unit(
            lambda n: fill.make(
                "conv",
                in_channels=inputs.shape[0],
                out_channels=n,
                kernel_size=3,
                stride=1,
                padding=1,
                bias=fill.empty("norm"),
            ),
            width,
            dims=2,
        )
        layers, channels = [], width
        for stage in range(depth):
            for block in range(blocks):
                out = width * 2**stage
                layers.append(BasicBlock(fill, channels, out, 2 if stage and not block else 1))
                channels = out
        self.blocks = nn.Sequential(*layers)
        self.memory = make_memory(fill, channels)
        self.dropout = nn.Dropout(dropout)
        self.head = make_head(fill, channels, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, outputs)"""
        return self.head(self.dropout(self.memory(global_mean(self.blocks(self.stem(x))))))
