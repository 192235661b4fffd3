"""Several perceptrons in one: members share one matrix and differ by rank-one factors (BatchEnsemble)."""

import torch
from torch import nn


class Shared(nn.Module):
    """y_m = s_m * (W (r_m * x_m)) + b_m for each member m."""

    def __init__(self, members, in_features, out_features):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False)
        self.r = nn.Parameter(torch.randn(members, in_features).sign())
        self.s = nn.Parameter(torch.randn(members, out_features).sign())
        self.bias = nn.Parameter(torch.zeros(members, out_features))

    def forward(self, x):
        return self.s * self.linear(self.r * x) + self.bias


class Net(nn.Sequential):
    """Four members of two hidden layers; their outputs are averaged."""

    def __init__(self, in_shape, out_shape, prm):
        width, features = prm["width"], torch.Size(in_shape).numel()
        hidden = [Shared(4, features, width), nn.ReLU(), Shared(4, width, width), nn.ReLU()]
        super().__init__(nn.Flatten(), nn.Unflatten(1, (1, features)), *hidden, Shared(4, width, out_shape[0]))

    def forward(self, x):
        return super().forward(x).mean(1)
