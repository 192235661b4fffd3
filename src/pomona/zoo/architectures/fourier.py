"""A linear model over random Fourier features of the input, followed by one hidden layer."""

import torch
from torch import nn


class Net(nn.Module):
    """phi(x) = [cos(B x), sin(B x)] with fixed Gaussian B; ``scale`` is the bandwidth, from 0.01 to 1."""

    def __init__(self, in_shape, out_shape, prm):
        super().__init__()
        features, width = torch.Size(in_shape).numel(), 2 * prm["width"]
        bandwidth = 10 ** (2 * prm["scale"] - 2)
        self.register_buffer("frequencies", bandwidth * torch.randn(features, width))
        self.hidden = nn.Linear(2 * width, prm["width"])
        self.readout = nn.Linear(prm["width"], out_shape[0])

    def forward(self, x):
        phase = x.flatten(1) @ self.frequencies
        return self.readout(torch.relu(self.hidden(torch.cat([phase.cos(), phase.sin()], -1))))
