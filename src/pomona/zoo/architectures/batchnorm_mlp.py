"""A deep narrow perceptron that batch normalisation makes trainable."""

import torch
from torch import nn


class Net(nn.Sequential):
    """h = gelu(batchnorm(W h)), five times."""

    def __init__(self, in_shape, out_shape, prm):
        features = torch.Size(in_shape).numel()
        layers: list[nn.Module] = [nn.Flatten()]
        for _ in range(5):
            layers += [nn.Linear(features, prm["width"], bias=False), nn.BatchNorm1d(prm["width"]), nn.GELU()]
            features = prm["width"]
        super().__init__(*layers, nn.Linear(features, out_shape[0]))
