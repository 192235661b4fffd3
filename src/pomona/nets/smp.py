"""Networks of self-moving point convolutions.

Source: SMPConv: Self-moving Point Representations for Continuous Convolution, arXiv 2304.02330.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

from pomona.errors import check_positive, unknown
from pomona.nets.fill import Fill
from pomona.nets.resnet import ResNet
from pomona.nets.specs import Inputs, Outputs
from pomona.nn.check import check_odd
from pomona.nn.coord_kernel import CoordKernel
from pomona.nn.smpconv import SMPConv1d, SMPConv2d


class TemporalBlock(nn.Module):
    """y = x + dropout(gelu(BN(conv(x)))): (B, C, L) -> (B, C, L)."""

    def __init__(self, conv: nn.Module, width: int, dropout: float) -> None:
        super().__init__()
        self.conv, self.norm, self.act, self.dropout = conv, nn.BatchNorm1d(width), nn.GELU(), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x + self.dropout(self.act(self.norm(self.conv(x))))


class TCN(nn.Module):
    """1x1 convolution -> ``blocks`` of (conv, BN, GELU, residual) -> the mean or last step -> linear head.

    Args:
        in_channels, classes: sizes.
        make_conv: (index of the block, width) -> a convolution that keeps the shape (B, width, L).
        width: channels.
        blocks: how many.
        readout: 'mean' over time, or the 'last' step.
        dropout: probability after each block's activation.

    Shape:
        (B, in_channels, L) -> (B, classes)
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        make_conv: Callable[[int, int], nn.Module],
        *,
        width: int = 32,
        blocks: int = 3,
        readout: Literal["mean", "last"] = "mean",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, classes=classes, width=width, blocks=blocks)
        if readout not in ("mean", "last"):
            raise unknown("readout", readout, ("mean", "last"))
        self.readout = readout
        self.stem = nn.Conv1d(in_channels, width, 1)
        self.blocks = nn.Sequential(*(TemporalBlock(make_conv(i, width), width, dropout) for i in range(blocks)))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.blocks(self.stem(x))
        return self.head(x.mean(-1) if self.readout == "mean" else x[..., -1])

    def resample(self, length: int, *, rescale: bool = True) -> None:
        """Kernels for sequences of another resolution: those that span the old length then span ``length`` steps."""
        for module in self.modules():
            if isinstance(module, CoordKernel):
                taps = length if module.causal else length | 1
                module.resample(taps, rescale=rescale)


def smp_tcn(in_channels: int, classes: int, length: int, *, width: int = 32, blocks: int = 3, **options: Any) -> TCN:
    """A `TCN` of `SMPConv1d` whose causal kernels span ``length`` steps; options are the convolution's."""

    def make_conv(_index: int, width: int) -> nn.Module:
        return SMPConv1d(width, width, "same", length=length, **options)

    return TCN(in_channels, classes, make_conv, width=width, blocks=blocks)


def smp_resnet(inputs: Inputs, outputs: Outputs, **options: Any) -> ResNet:
    """The residual backbone with `SMPConv2d` in every convolution; options are the backbone's."""
    return ResNet(inputs, outputs, Fill({**ResNet.slots, "conv": "smpconv"}), **options)


class SMPBlock(nn.Module):
    """u = x + W_2 gelu(BN(K * z) + BN(k * z)), z = relu(BN(W_1 BN(x)));  y = u + V_2 gelu(V_1 BN(u)).

    A large depthwise self-moving point convolution K beside a small ordinary one k, then a feed-forward part of 1x1
    convolutions, each on a residual branch.

    Args:
        channels: C.
        kernel_size, small_kernel: odd taps of K and k.
        n_points: points of a channel; a quarter of the taps by default.
        expand: hidden channels of the feed-forward part, in C.

    Shape:
        (B, C, H, W) -> (B, C, H, W)

    Source: Scaling Up Your Kernels to 31x31: Revisiting Large Kernel Design in CNNs, arXiv 2203.06717.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        *,
        small_kernel: int = 5,
        n_points: int | None = None,
        expand: int = 4,
        **options: Any,
    ) -> None:
        super().__init__()
        check_odd(small_kernel=small_kernel)

        def batch_norm() -> nn.Module:
            return nn.BatchNorm2d(channels)

        self.before = nn.Sequential(batch_norm(), nn.Conv2d(channels, channels, 1, bias=False), batch_norm(), nn.ReLU())
        large = SMPConv2d(channels, channels, kernel_size, bias=False, n_points=n_points, depthwise=True, **options)
        small = nn.Conv2d(channels, channels, small_kernel, 1, small_kernel // 2, groups=channels, bias=False)
        self.large, self.small = nn.Sequential(large, batch_norm()), nn.Sequential(small, batch_norm())
        self.after = nn.Sequential(nn.GELU(), nn.Conv2d(channels, channels, 1, bias=False), batch_norm())
        hidden = expand * channels
        self.ffn = nn.Sequential(
            batch_norm(), nn.Conv2d(channels, hidden, 1), nn.GELU(), nn.Conv2d(hidden, channels, 1), batch_norm()
        )

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        z = self.before(x)
        x = x + self.after(self.large(z) + self.small(z))
        return x + self.ffn(x)


def smp_stage(channels: int, depth: int, kernel_size: int, **options: Any) -> nn.Sequential:
    """``depth`` of `SMPBlock`: a stage of a network of large kernels."""
    return nn.Sequential(*(SMPBlock(channels, kernel_size, **options) for _ in range(depth)))
