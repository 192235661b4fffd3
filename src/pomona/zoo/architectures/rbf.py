"""A radial basis function network with learned centres and widths."""

import torch
from torch import nn


class Net(nn.Module):
    """phi_i = exp(-s_i ||z - c_i||^2 / d) in a learned d-dimensional projection z of the input."""

    def __init__(self, in_shape, out_shape, prm):
        super().__init__()
        features, self.size = torch.Size(in_shape).numel(), 16
        self.project = nn.Sequential(nn.Linear(features, self.size), nn.LayerNorm(self.size))
        self.centres = nn.Parameter(torch.randn(2 * prm["width"], self.size))
        self.log_scale = nn.Parameter(torch.zeros(2 * prm["width"]))
        self.readout = nn.Linear(2 * prm["width"], out_shape[0])

    def forward(self, x):
        z = self.project(x.flatten(1))
        square = (z[:, None] - self.centres).square().sum(-1) / self.size
        return self.readout(torch.exp(-self.log_scale.exp() * square))
