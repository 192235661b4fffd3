"""i-RevNet: a classifier that can be inverted up to its last, pooling layer.

Source: i-RevNet: Deep Invertible Networks, arXiv 1802.07088.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, check_divisible, check_positive, unknown
from pomona.nets.convnet import global_mean
from pomona.nn.check import check_input, check_odd
from pomona.nn.reversible import RevBlock, RevSequential, squeeze, unsqueeze


def bottleneck(
    channels: int,
    out: int,
    *,
    stride: int = 1,
    kernels: Sequence[int] = (1, 3, 1),
    squeeze_by: int = 4,
    dropout: float = 0.0,
    first: bool = False,
) -> nn.Sequential:
    """BN-ReLU-conv three times, out / squeeze_by channels inside, the stride at the second; ``first``: no BN-ReLU
    before the first convolution.
    """
    mid = max(1, out // squeeze_by)
    sizes, layers = (channels, mid, mid, out), []
    for index, k in enumerate(kernels):
        if index or not first:
            layers += [nn.BatchNorm2d(sizes[index]), nn.ReLU()]
        if index == 2 and dropout:
            layers.append(nn.Dropout(dropout))
        step = stride if index == 1 else 1
        layers.append(nn.Conv2d(sizes[index], sizes[index + 1], k, step, k // 2, bias=False))
    return nn.Sequential(*layers)


class IRevNet(nn.Module):
    """psi -> split -> stages of additive couplings, the first of each with stride -> merge -> BN, ReLU, mean, linear.

    Two streams (x_1, x_2) go through y_1 = S(x_2), y_2 = S(x_1) + F(x_2), where S is the identity or a pixel shuffle
    into channels and F a bottleneck. All up to the merged features can be inverted, and keeps volume: |det| = 1.

    Args:
        in_channels, classes: sizes.
        blocks: of each stage.
        strides: of each stage's first block.
        init: 'split' shuffles by 2 and splits the channels: bijective, features are as many as pixels; 'injective-pad'
            then adds channels of zeros to each stream, up to ``width``: more features than pixels.
        width: channels of each stream before the first stage, for 'injective-pad'.
        kernels: of the three convolutions of F, odd; the authors' code has (3, 3, 3).
        squeeze_by: channels of a stream over those inside F.
        dropout: probability before F's last convolution.
        reversible: see `RevSequential`.

    Shape:
        (B, in_channels, H, W) -> (B, classes); H and W are multiples of twice the product of the strides.

    Raises:
        PomonaError: for sizes that do not fit.

    Source: i-RevNet: Deep Invertible Networks, arXiv 1802.07088.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        *,
        blocks: Sequence[int] = (6, 16, 72, 6),
        strides: Sequence[int] = (2, 2, 2, 2),
        init: Literal["split", "injective-pad"] = "split",
        width: int | None = None,
        kernels: Sequence[int] = (1, 3, 1),
        squeeze_by: int = 4,
        dropout: float = 0.0,
        reversible: bool = False,
    ) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, classes=classes, squeeze_by=squeeze_by)
        if init not in ("split", "injective-pad"):
            raise unknown("init", init, ("split", "injective-pad"))
        if len(blocks) != len(strides) or len(kernels) != 3:
            raise PomonaError(f"blocks={tuple(blocks)} and strides={tuple(strides)} must be as many, and kernels three")
        for k in kernels:
            check_odd(kernels=k)
        least = 2 * in_channels
        if (width is None) != (init == "split") or (width is not None and width < least):
            raise PomonaError(
                f"width={width} must be at least {least} with init='injective-pad', and None with 'split'"
            )
        self.in_channels, self.shrink = in_channels, 2 * math.prod(strides)
        channels = least if width is None else width
        self.padding = channels - least  # zeros in each stream: one of zeros alone would have no variance
        couplings: list[nn.Module] = []
        for count, step in zip(blocks, strides, strict=True):
            for index in range(count):
                stride = 1 if index else step
                out = channels * stride**2
                function = bottleneck(
                    channels,
                    out,
                    stride=stride,
                    kernels=kernels,
                    squeeze_by=squeeze_by,
                    dropout=dropout,
                    first=not couplings,
                )
                couplings.append(RevBlock(function, stride))
                channels = out
        self.body = RevSequential(couplings, reversible=reversible)
        self.norm = nn.BatchNorm2d(2 * channels)
        self.head = nn.Linear(2 * channels, classes)

    def streams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two streams that enter the first block."""
        check_input(self, x, self.in_channels, 1)
        for side in x.shape[-2:]:
            check_divisible("side of the image", side, "2 x product of strides", self.shrink)
        x1, x2 = squeeze(x, 2).chunk(2, 1)
        padding = (0, 0, 0, 0, 0, self.padding)
        return F.pad(x1, padding), F.pad(x2, padding)

    def forward_features(self, x: Tensor) -> Tensor:
        """Both streams of the last block: (B, C, H, W) -> (B, 2 channels, H', W')."""
        return torch.cat(self.body(*self.streams(x)), 1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.head(global_mean(F.relu(self.norm(self.forward_features(x)))))

    def states(self, x: Tensor) -> list[Tensor]:
        """Both streams before the first and after every block."""
        return [torch.cat(pair, 1) for pair in self.body.states(*self.streams(x))]

    def inverse(self, features: Tensor) -> Tensor:
        """The image of the features, in evaluation mode."""
        streams = self.body.inverse(*features.chunk(2, 1))
        return unsqueeze(torch.cat([x[:, : 2 * self.in_channels] for x in streams], 1), 2)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """The image as it comes back from its features."""
        return self.inverse(self.forward_features(x))

    @torch.no_grad()
    def interpolate(self, a: Tensor, b: Tensor, n: int) -> Tensor:
        """Images of ``n`` features on the straight line between those of ``a`` and ``b``: (n, B, C, H, W)."""
        check_positive(n=n)
        ends = self.forward_features(a), self.forward_features(b)
        return torch.stack([self.inverse(torch.lerp(*ends, float(w))) for w in torch.linspace(0, 1, n)])
