"""Residual networks and vision transformers of parameter-free layers, and such layers in other networks.

Source: Learning Features with Parameter-Free Layers, arXiv 2202.02777.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from pomona.errors import PomonaError, check_positive, unknown
from pomona.nets.convnet import global_mean
from pomona.nn.feedforward import FeedForward
from pomona.nn.mixing import AttentionMixer, MixerBlock
from pomona.nn.mlp_mixer import PatchStem
from pomona.nn.parameter_free import PFAttention, PFBottleneck, SpatialOp, eligible
from pomona.nn.swap import Swapped, swap


class PFResNet(nn.Module):
    """Convolutional stem -> stages of `PFBottleneck`, halving the resolution at each but the first -> mean -> head.

    Args:
        in_channels, classes: sizes.
        layers: blocks of each stage.
        ops: a kind of `SpatialOp`, or one for each stage.
        downsample: the operation of blocks with stride 2: 'conv' is the paper's hybrid; None takes the stage's own.
        width: channels of the first stage's operations; they double from stage to stage.
        expansion: channels of a block's output, in those of its operation.
        stem: 'small' is a 3x3 convolution, 'large' a 7x7 one of stride 2 and a max-pooling.
        make_op: (index of the block, channels, stride) -> a module in place of the named operations.

    Shape:
        (B, in_channels, H, W) -> (B, classes)
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        *,
        layers: Sequence[int] = (3, 4, 6, 3),
        ops: str | Sequence[str] = "max",
        downsample: str | None = "conv",
        width: int = 64,
        expansion: int = 4,
        stem: Literal["small", "large"] = "small",
        make_op: Callable[[int, int, int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, classes=classes, width=width)
        named = [ops] * len(layers) if isinstance(ops, str) else list(ops)
        if len(named) != len(layers):
            raise PomonaError(f"ops names {len(named)} operations; layers has {len(layers)} stages")
        if stem not in ("small", "large"):
            raise unknown("stem", stem, ("small", "large"))
        k, stride = (3, 1) if stem == "small" else (7, 2)
        conv = nn.Conv2d(in_channels, width, k, stride, k // 2, bias=False)
        pool = [nn.MaxPool2d(3, 2, 1)] if stem == "large" else []
        self.stem = nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU(), *pool)
        blocks: list[nn.Module] = []
        channels = width
        for stage, (count, op) in enumerate(zip(layers, named, strict=True)):
            mid = width * 2**stage
            for index in range(count):
                stride = 2 if stage and not index else 1
                here = downsample if stride == 2 and downsample else op
                filled = make_op(len(blocks), mid, stride) if make_op else here
                blocks.append(PFBottleneck(channels, mid, expansion=expansion, op=filled, stride=stride))
                channels = expansion * mid
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.head(global_mean(self.blocks(self.stem(x))))


class PFViT(nn.Module):
    """Patches with positions and a class token -> blocks of attention or max-pooling -> norm -> head.

    Args:
        image: side.
        patch: side of a patch.
        in_channels, classes: sizes.
        depth: blocks.
        op_layers: indices of the blocks that have max-pooling in place of attention; the paper takes early ones.
        dim: features of a token.
        heads: of the attention.
        k: window of the max-pooling.

    Shape:
        (B, in_channels, image, image) -> (B, classes)
    """

    def __init__(
        self,
        image: int,
        patch: int,
        in_channels: int,
        classes: int,
        *,
        depth: int = 6,
        op_layers: Collection[int] = (0, 1),
        dim: int = 64,
        heads: int | None = None,
        k: int = 3,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_positive(depth=depth, dim=dim)
        if not set(op_layers) <= set(range(depth)):
            raise PomonaError(f"op_layers={tuple(op_layers)} must be indices below depth={depth}")
        self.patches = PatchStem((image, image), patch, in_channels, dim)
        self.cls = nn.Parameter(torch.zeros(dim))
        self.position = nn.Parameter(0.02 * torch.randn(self.patches.tokens + 1, dim, generator=generator))

        def mixer(index: int) -> nn.Module:
            if index in op_layers:
                return PFAttention(rows=image // patch, k=k, cls=True)
            return AttentionMixer(dim, heads=heads, generator=generator)

        self.blocks = nn.Sequential(*(MixerBlock(dim, mixer(i), FeedForward(dim, 4 * dim)) for i in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        patches = self.patches(x)
        tokens = torch.cat([self.cls.expand(len(patches), 1, -1), patches], 1) + self.position
        return self.head(self.norm(self.blocks(tokens)[:, 0]))


def replace_spatial(
    net: nn.Module, which: Collection[str] | Callable[[str, nn.Module], bool] | None = None, op: str = "max"
) -> Swapped:
    """Another spatial operation in place of convolutions that keep their channels and precede a 1x1 convolution.

    Args:
        net: any network, new or trained; it stays as it is.
        which: names of convolutions, or ``which(name, module)``; every `eligible` one by default.
        op: a kind of `SpatialOp`.

    Raises:
        PomonaError: if nothing can be replaced, or a name is of a convolution that cannot.
    """
    able = eligible(net)
    if which is not None and not callable(which):
        for name in which:
            if name not in able:
                raise PomonaError(f"which={name!r} cannot be replaced; those that can are: {', '.join(able) or 'none'}")

    def where(name: str, module: nn.Module) -> bool:
        chosen = which is None or (which(name, module) if callable(which) else name in which)
        return name in able and chosen

    def make(old: nn.Module) -> nn.Module:
        assert isinstance(old, nn.Conv2d)
        return SpatialOp(op, old.in_channels, k=old.kernel_size[0], stride=old.stride[0])

    return swap(net, where, make)
