"""A factorization machine: a linear model plus low-rank products of pairs of inputs, for each output."""

import torch
from torch import nn


class Net(nn.Module):
    """y = W x + sum_{i<j} <v_i, v_j> x_i x_j, by the identity 2 sum_{i<j} = (V x)^2 - V^2 x^2."""

    def __init__(self, in_shape, out_shape, prm):
        super().__init__()
        features = torch.Size(in_shape).numel()
        self.linear = nn.Linear(features, out_shape[0])
        rank = max(2, prm["width"] // 8)
        self.factors = nn.Parameter(0.1 * torch.randn(features, rank * out_shape[0]) / features**0.5)
        self.outputs = out_shape[0]

    def forward(self, x):
        x = x.flatten(1)
        pairs = (x @ self.factors).square() - x.square() @ self.factors.square()
        return self.linear(x) + 0.5 * pairs.unflatten(-1, (self.outputs, -1)).sum(-1)
