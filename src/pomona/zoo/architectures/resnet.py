"""A small residual network."""

import torch
from torch import nn


class Block(nn.Module):
    """relu(x + norm(conv(relu(norm(conv(x))))))."""

    def __init__(self, conv, norm, width):
        super().__init__()
        first, second = (conv(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.branch = nn.Sequential(first, norm(width), nn.ReLU(), second, norm(width))

    def forward(self, x):
        return torch.relu(x + self.branch(x))


class Net(nn.Module):
    """A strided stem, ``depth`` blocks, the mean over positions."""

    def __init__(self, in_shape, out_shape, prm):
        super().__init__()
        images, channels = len(in_shape) == 3, in_shape[0] if len(in_shape) > 1 else 1
        conv = nn.Conv2d if images else nn.Conv1d
        norm = nn.BatchNorm2d if images else nn.BatchNorm1d
        width = max(8, prm["width"] // 4)
        self.stem = nn.Sequential(conv(channels, width, 3, 2, padding=1, bias=False), norm(width), nn.ReLU())
        self.blocks = nn.Sequential(*(Block(conv, norm, width) for _ in range(prm["depth"])))
        self.readout = nn.Linear(width, out_shape[0])

    def forward(self, x):
        x = self.blocks(self.stem(x.unsqueeze(1) if x.ndim == 2 else x))
        return self.readout(x.flatten(2).mean(-1))
