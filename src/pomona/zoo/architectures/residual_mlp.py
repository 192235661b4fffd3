"""A perceptron of residual blocks with layer normalisation in front of each."""

import torch
from torch import nn


class Block(nn.Module):
    """x + W2 gelu(W1 norm(x))."""

    def __init__(self, width, dropout):
        super().__init__()
        self.branch = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(2 * width, width),
        )

    def forward(self, x):
        return x + self.branch(x)


class Net(nn.Sequential):
    """Embed, ``depth`` blocks, read out."""

    def __init__(self, in_shape, out_shape, prm):
        width = prm["width"]
        blocks = [Block(width, prm["dropout"]) for _ in range(prm["depth"])]
        first = nn.Linear(torch.Size(in_shape).numel(), width)
        super().__init__(nn.Flatten(), first, *blocks, nn.LayerNorm(width), nn.Linear(width, out_shape[0]))
