"""Residual networks of bottleneck blocks whose spatial part is a convolution or a lambda layer (arXiv 2102.08602)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, check_positive, unknown
from pomona.nets.convnet import global_mean
from pomona.nn.lambda_layer import LambdaConv2d

Spatial = Callable[[int, int, tuple[int, int]], nn.Module]
"""(channels, stride, (height, width)) -> a module that keeps the channels and divides the sides by the stride."""


class LambdaBlock(nn.Module):
    """y = relu(shortcut(x) + BN(W_2 relu(BN(spatial(relu(BN(W_1 x))))))), the spatial part being a lambda layer.

    Args:
        channels: of the input.
        width: channels of the spatial part; 4 width come out.
        stride: of the spatial part.
        spatial: the spatial part in place of a local lambda layer.
        options: of `LambdaConv2d`, where ``spatial`` is not given.

    Shape:
        (B, channels, H, W) -> (B, 4 width, H / stride, W / stride)

    Source: LambdaNetworks: Modeling Long-Range Interactions Without Attention, arXiv 2102.08602.
    """

    expansion = 4

    def __init__(
        self, channels: int, width: int, stride: int = 1, *, spatial: nn.Module | None = None, **options: object
    ) -> None:
        super().__init__()
        out = self.expansion * width
        self.reduce, self.expand = nn.Conv2d(channels, width, 1, bias=False), nn.Conv2d(width, out, 1, bias=False)
        self.spatial = spatial or LambdaConv2d(width, width, stride, **options)  # type: ignore[arg-type]
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (width, width, out))
        nn.init.zeros_(self.norms[2].weight)  # type: ignore[arg-type]
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        y = F.relu(self.norms[0](self.reduce(x)))
        y = F.relu(self.norms[1](self.spatial(y)))
        return F.relu(self.shortcut(x) + self.norms[2](self.expand(y)))


class LambdaResNet(nn.Module):
    """stem -> stages of bottleneck blocks, widths doubling and sides halving -> global mean -> linear head.

    Args:
        channels: of the image.
        classes: outputs.
        image: (height, width), which global lambda layers are made for.
        stages: one entry a stage: "C" (3 x 3 convolutions), "L" (lambda layers), or a function (channels, stride,
            (height, width)) -> module. ("C", "C", "L", "L") is the paper's hybrid.
        depths: blocks of each stage.
        width: of the first stage's spatial parts.
        large: a stem of a 7 x 7 convolution of stride 2 and max pooling, instead of 3 x 3.
        stem_stride: stride of the 3 x 3 stem.
        scope: window of the lambda layers; None is global.
        options: further options of `LambdaConv2d`.

    Shape:
        (B, channels, H, W) -> (B, classes)

    Raises:
        PomonaError: for unknown stages, or stages and depths of different number.

    Source: LambdaNetworks: Modeling Long-Range Interactions Without Attention, arXiv 2102.08602.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        image: tuple[int, int] = (224, 224),
        *,
        stages: Sequence[str | Spatial] = ("C", "C", "L", "L"),
        depths: Sequence[int] = (3, 4, 6, 3),
        width: int = 64,
        large: bool = False,
        stem_stride: int = 1,
        scope: int | None = 23,
        **options: object,
    ) -> None:
        super().__init__()
        check_positive(channels=channels, classes=classes, width=width)
        if len(stages) != len(depths):
            raise PomonaError(f"depths={tuple(depths)} must give one depth for each of the {len(stages)} stages")

        def convolution(n: int, stride: int, size: tuple[int, int]) -> nn.Module:
            return nn.Conv2d(n, n, 3, stride, 1, bias=False)

        def lambdas(n: int, stride: int, size: tuple[int, int]) -> nn.Module:
            return LambdaConv2d(n, n, stride, scope=scope, size=size, **options)  # type: ignore[arg-type]

        kinds: dict[str, Spatial] = {"C": convolution, "L": lambdas}
        pools = [nn.MaxPool2d(3, 2, 1)] if large else []
        kernel, step = (7, 2) if large else (3, stem_stride)
        convolve = nn.Conv2d(channels, width, kernel, step, kernel // 2, bias=False)
        self.stem = nn.Sequential(convolve, nn.BatchNorm2d(width), nn.ReLU(), *pools)
        height, breadth = (-(-side // (step * 2 ** len(pools))) for side in image)
        blocks: list[nn.Module] = []
        now = width
        for stage, (kind, depth) in enumerate(zip(stages, depths, strict=True)):
            if isinstance(kind, str) and kind not in kinds:
                raise unknown("stages", kind, kinds)
            make = kinds[kind] if isinstance(kind, str) else kind
            for block in range(depth):
                stride, inner = 2 if stage and not block else 1, width * 2**stage
                spatial = make(inner, stride, (height, breadth))
                blocks.append(LambdaBlock(now, inner, stride, spatial=spatial))
                now, height, breadth = LambdaBlock.expansion * inner, -(-height // stride), -(-breadth // stride)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(now, classes)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.head(global_mean(self.blocks(self.stem(x))))
