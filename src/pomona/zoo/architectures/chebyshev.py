"""A Kolmogorov-Arnold network: learned univariate functions in the Chebyshev basis on every edge."""

import torch
from torch import nn


class Chebyshev(nn.Module):
    """y_j = sum_i sum_k c_jik T_k(tanh x_i), with T_k(cos a) = cos(k a), k = 0..degree."""

    def __init__(self, in_features, out_features, degree=4):
        super().__init__()
        std = (in_features * (degree + 1)) ** -0.5
        self.coefficients = nn.Parameter(std * torch.randn(out_features, in_features, degree + 1))
        self.register_buffer("order", torch.arange(degree + 1.0))

    def forward(self, x):
        angle = torch.acos(0.999 * torch.tanh(x))
        basis = torch.cos(torch.einsum("ni,k->nik", angle, self.order))
        return torch.einsum("nik,jik->nj", basis, self.coefficients)


class Net(nn.Sequential):
    """Two layers of univariate functions with normalisation between."""

    def __init__(self, in_shape, out_shape, prm):
        width, features = prm["width"], torch.Size(in_shape).numel()
        layers = [Chebyshev(features, width), nn.LayerNorm(width), Chebyshev(width, out_shape[0])]
        super().__init__(nn.Flatten(), *layers)
