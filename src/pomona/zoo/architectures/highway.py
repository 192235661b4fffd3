"""A highway network: learned gates carry part of the input past each layer."""

import torch
from torch import nn


class Highway(nn.Module):
    """t * relu(H x) + (1 - t) * x with t = sigmoid(T x); biased towards carrying at the start."""

    def __init__(self, width):
        super().__init__()
        self.transform, self.gate = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.constant_(self.gate.bias, -1.0)

    def forward(self, x):
        t = torch.sigmoid(self.gate(x))
        return t * torch.relu(self.transform(x)) + (1 - t) * x


class Net(nn.Sequential):
    """Embed, ``depth`` + 2 highway layers, read out."""

    def __init__(self, in_shape, out_shape, prm):
        width = prm["width"]
        layers = [Highway(width) for _ in range(prm["depth"] + 2)]
        first = nn.Linear(torch.Size(in_shape).numel(), width)
        super().__init__(nn.Flatten(), first, *layers, nn.Linear(width, out_shape[0]))
