"""Two convolutions with pooling and a hidden layer; tables are read as a series of one channel."""

import torch
from torch import nn


class Net(nn.Module):
    """conv, relu, pool, twice; then a hidden layer."""

    def __init__(self, in_shape, out_shape, prm):
        super().__init__()
        images, channels = len(in_shape) == 3, in_shape[0] if len(in_shape) > 1 else 1
        conv = nn.Conv2d if images else nn.Conv1d
        pool = nn.AdaptiveAvgPool2d if images else nn.AdaptiveAvgPool1d
        narrow, wide = max(4, prm["width"] // 4), max(8, prm["width"] // 2)
        self.body = nn.Sequential(
            *(conv(channels, narrow, 3, padding=1), nn.ReLU(), pool(max(4, in_shape[-1] // 2))),
            *(conv(narrow, wide, 3, padding=1), nn.ReLU(), pool(4), nn.Flatten()),
            *(nn.LazyLinear(prm["width"]), nn.ReLU(), nn.Dropout(prm["dropout"])),
        )
        self.readout = nn.Linear(prm["width"], out_shape[0])
        with torch.no_grad():
            self(torch.zeros(2, *in_shape))  # the lazy layer learns its size

    def forward(self, x):
        return self.readout(self.body(x.unsqueeze(1) if x.ndim == 2 else x))
