"""An MLP-Mixer over rows of an image or chunks of a series or table."""

import torch
from torch import nn


def tokens(x, size=8):
    """Rows of an image, steps of a series or chunks of a table as tokens (batch, tokens, features)."""
    if x.ndim == 4:
        return x.transpose(1, 2).flatten(2)
    if x.ndim == 3:
        x = x.flatten(1)
    x = nn.functional.pad(x, (0, -x.shape[-1] % size))
    return x.unflatten(-1, (-1, size))


class Mixing(nn.Module):
    """x + mix tokens, then x + mix features."""

    def __init__(self, count, width):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.across = nn.Sequential(nn.Linear(count, 2 * count), nn.GELU(), nn.Linear(2 * count, count))
        self.within = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        x = x + self.across(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.within(self.norms[1](x))


class Net(nn.Module):
    """Embed tokens, ``depth`` mixing blocks, the mean over tokens."""

    def __init__(self, in_shape, out_shape, prm):
        super().__init__()
        _, count, features = tokens(torch.zeros(1, *in_shape)).shape
        self.embed = nn.Linear(features, prm["width"])
        self.blocks = nn.Sequential(*(Mixing(count, prm["width"]) for _ in range(prm["depth"])))
        self.readout = nn.Linear(prm["width"], out_shape[0])

    def forward(self, x):
        return self.readout(self.blocks(self.embed(tokens(x))).mean(1))
