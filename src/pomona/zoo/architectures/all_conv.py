"""Strided convolutions only, with batch normalisation and averaging over positions at the end."""

from torch import nn


class Net(nn.Module):
    """Three convolutions, the second and third with stride 2, then the mean over positions."""

    def __init__(self, in_shape, out_shape, prm):
        super().__init__()
        images, channels = len(in_shape) == 3, in_shape[0] if len(in_shape) > 1 else 1
        conv = nn.Conv2d if images else nn.Conv1d
        norm = nn.BatchNorm2d if images else nn.BatchNorm1d
        width, layers = max(8, prm["width"] // 2), []
        for stride in (1, 2, 2):
            layers += [conv(channels, width, 3, stride, padding=1, bias=False), norm(width), nn.ReLU()]
            channels = width
        self.body, self.readout = nn.Sequential(*layers), nn.Linear(width, out_shape[0])

    def forward(self, x):
        x = self.body(x.unsqueeze(1) if x.ndim == 2 else x)
        return self.readout(x.flatten(2).mean(-1))
