"""Depthwise-separable convolutions with squeeze-and-excitation."""

from torch import nn


class Separable(nn.Module):
    """A depthwise and a pointwise convolution; channels are rescaled by what their means say."""

    def __init__(self, conv, norm, in_channels, out_channels):
        super().__init__()
        depthwise = conv(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False)
        pointwise = conv(in_channels, out_channels, 1, bias=False)
        self.body = nn.Sequential(depthwise, pointwise, norm(out_channels), nn.SiLU())
        bottleneck = max(2, out_channels // 4)
        self.excite = nn.Sequential(
            nn.Linear(out_channels, bottleneck), nn.ReLU(), nn.Linear(bottleneck, out_channels), nn.Sigmoid()
        )

    def forward(self, x):
        x = self.body(x)
        scale = self.excite(x.flatten(2).mean(-1))
        return x * scale.reshape(*scale.shape, *([1] * (x.ndim - 2)))


class Net(nn.Module):
    """A strided stem, two separable blocks, the mean over positions."""

    def __init__(self, in_shape, out_shape, prm):
        super().__init__()
        images, channels = len(in_shape) == 3, in_shape[0] if len(in_shape) > 1 else 1
        conv = nn.Conv2d if images else nn.Conv1d
        norm = nn.BatchNorm2d if images else nn.BatchNorm1d
        width = max(8, prm["width"] // 2)
        self.body = nn.Sequential(
            conv(channels, width, 3, 2, padding=1),
            Separable(conv, norm, width, width),
            Separable(conv, norm, width, 2 * width),
        )
        self.readout = nn.Linear(2 * width, out_shape[0])

    def forward(self, x):
        x = self.body(x.unsqueeze(1) if x.ndim == 2 else x)
        return self.readout(x.flatten(2).mean(-1))
