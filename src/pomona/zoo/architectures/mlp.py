"""A multilayer perceptron with one to four hidden layers, ReLU and dropout."""

import torch
from torch import nn


class Net(nn.Sequential):
    """h = dropout(relu(W h + b)), ``depth`` times."""

    def __init__(self, in_shape, out_shape, prm):
        features = torch.Size(in_shape).numel()
        layers: list[nn.Module] = [nn.Flatten()]
        for _ in range(prm["depth"]):
            layers += [nn.Linear(features, prm["width"]), nn.ReLU(), nn.Dropout(prm["dropout"])]
            features = prm["width"]
        super().__init__(*layers, nn.Linear(features, out_shape[0]))
