"""Hidden units that are products of a value and a gate (SwiGLU)."""

import torch
from torch import nn


class Gated(nn.Module):
    """h = (V x) * silu(G x)."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.linear = nn.Linear(in_features, 2 * out_features)

    def forward(self, x):
        value, gate = self.linear(x).chunk(2, -1)
        return value * nn.functional.silu(gate)


class Net(nn.Sequential):
    """Two gated layers with normalisation between."""

    def __init__(self, in_shape, out_shape, prm):
        width, features = prm["width"], torch.Size(in_shape).numel()
        hidden = [Gated(features, width), nn.LayerNorm(width), Gated(width, width), nn.Dropout(prm["dropout"])]
        super().__init__(nn.Flatten(), *hidden, nn.Linear(width, out_shape[0]))
