"""Hidden units that are the largest of four affine maps."""

import torch
from torch import nn


class Maxout(nn.Module):
    """h_i = max_k (W_k x + b_k)_i."""

    def __init__(self, in_features, out_features, pieces=4):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features * pieces)
        self.pieces = pieces

    def forward(self, x):
        return self.linear(x).unflatten(-1, (-1, self.pieces)).amax(-1)


class Net(nn.Sequential):
    """Two maxout layers with dropout."""

    def __init__(self, in_shape, out_shape, prm):
        width, features = prm["width"], torch.Size(in_shape).numel()
        hidden = [Maxout(features, width), nn.Dropout(prm["dropout"]), Maxout(width, width)]
        super().__init__(nn.Flatten(), *hidden, nn.Linear(width, out_shape[0]))
