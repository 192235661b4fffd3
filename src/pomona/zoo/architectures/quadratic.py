"""Neurons that are quadratic in their inputs."""

import torch
from torch import nn


class Quadratic(nn.Module):
    """y = (A x + a) * (B x + b) + C x^2; starts as an ordinary layer: B = 0, b = 1, C = 0."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.a = nn.Linear(in_features, out_features)
        self.b = nn.Linear(in_features, out_features)
        self.c = nn.Linear(in_features, out_features, bias=False)
        nn.init.zeros_(self.b.weight)
        nn.init.ones_(self.b.bias)
        nn.init.zeros_(self.c.weight)

    def forward(self, x):
        return self.a(x) * self.b(x) + self.c(x.square())


class Net(nn.Sequential):
    """A quadratic hidden layer, ReLU, a linear readout."""

    def __init__(self, in_shape, out_shape, prm):
        width, features = prm["width"], torch.Size(in_shape).numel()
        hidden = [Quadratic(features, width), nn.ReLU(), nn.Dropout(prm["dropout"])]
        super().__init__(nn.Flatten(), *hidden, nn.Linear(width, out_shape[0]))
