"""Linear layers whose weights are functions of the distances between neurons that have positions.

Source: Point Cloud Network: An Order of Magnitude Improvement in Linear Layer Parameter Count, 2023.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, check_positive, unknown
from pomona.nn.check import check_input
from pomona.nn.gain import gain as gain_of
from pomona.nn.structured import StructuredLinear

TRANSFORMS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "tri": lambda d, period, typical: 0.5 - (torch.remainder(d, 2 * period) - period).abs() / period,
    "cos": lambda d, period, typical: -0.5 * torch.cos(math.pi * d / period),
    "gauss": lambda d, period, typical: torch.exp(-(d / typical).square()) - math.exp(-1),
    "linear": lambda d, period, typical: 1 - d / typical,
}
"""Distance d, half period p and typical distance -> weight; the waves lie within 1/2 and have mean 0, the others are
near 0 at the typical distance."""


def distances(p: Tensor, q: Tensor) -> Tensor:
    """Euclidean distances (n, m) of points p (n, dims) and q (m, dims), with a gradient where they coincide, too."""
    squared = p.square().sum(-1)[:, None] + q.square().sum(-1) - 2 * p @ q.T
    return (squared.clamp(min=0) + 1e-12).sqrt()


class PointCloudLinear(StructuredLinear):
    """A linear layer with a position for each input and output in the place of a weight for each pair.

    W[j, i] = tau(||P_i - Q_j||) / sqrt(in_features)

    tau is a wave of amplitude A about 0, A (1/2 - |d mod 2p - p| / p) for 'tri', so that a small move of a neuron lets
    its weights take any value. Parameters: dims (in + out) (+ out); the product is a dense one, after in out dims
    operations for the distances, so that parameters are saved and time is not. `fold` makes it a plain linear layer.

    Args:
        in_features, out_features, bias: as in `StructuredLinear`; the bias starts uniform within 0.1.
        dims: of the space that the positions lie in; they start uniform within 1.
        transform: tau: 'tri', 'cos', or without a wave 'gauss' and 'linear'.
        period: p; the wave has period 2 p.
        amplitude: A; the paper has 1. By default the one that gives the weights the variance gain^2 / in_features.
        gain: of that variance.
        positions_in: positions (in_features, dims) that belong to the layer before, to share them.
        generator: source of the initial values.

    Shape:
        (*, in_features) -> (*, out_features)

    Raises:
        PomonaError: for an unknown transform, a size below 1, or positions of another shape.

    Source: Point Cloud Network: An Order of Magnitude Improvement in Linear Layer Parameter Count, 2023.
    """

    amplitude: Tensor
    tunable = {"dims": [4, 8, 16, 32]}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        dims: int = 16,
        bias: bool = True,
        *,
        transform: str = "tri",
        period: float = 0.1,
        amplitude: float | None = None,
        gain: float = 1.0,
        positions_in: nn.Parameter | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive(dims=dims, period=period, gain=gain)
        if transform not in TRANSFORMS:
            raise unknown("transform", transform, TRANSFORMS)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.dims, self.transform, self.period = dims, transform, period
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def uniform(*size: int, bound: float = 1.0) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, **factory).uniform_(-bound, bound, generator=generator))

        self.positions_in = uniform(in_features, dims) if positions_in is None else positions_in
        if self.positions_in.shape != (in_features, dims):
            raise PomonaError(f"positions_in={tuple(self.positions_in.shape)} must be ({in_features}, {dims})")
        self.positions_out = uniform(out_features, dims)
        if bias:
            self.bias = uniform(out_features, bound=0.1)
        self.register_buffer("amplitude", torch.ones((), **factory))
        with torch.no_grad():
            if amplitude is None:
                self.amplitude.copy_(gain / (self.weight().square().mean() * in_features).sqrt().clamp(min=1e-6))
            else:
                self.amplitude.fill_(amplitude)

    def weight(self) -> Tensor:
        """tau(||P_i - Q_j||) / sqrt(in_features), (out_features, in_features)."""
        dtype = torch.promote_types(self.positions_out.dtype, torch.float32)  # differences of squares need the digits
        d = distances(self.positions_out.to(dtype), self.positions_in.to(dtype))
        wave = TRANSFORMS[self.transform](d, self.period, math.sqrt(2 * self.dims / 3))
        return self.amplitude * wave.to(self.positions_out.dtype) / math.sqrt(self.in_features)

    @torch.no_grad()
    def project_(self, matrix: Tensor, steps: int = 300, lr: float = 3e-3) -> Self:
        """Move the positions so that W comes near ``matrix``, by Adam on the squared error; A is set to its scale."""
        self.check_matrix(matrix)
        self.amplitude.mul_(matrix.norm() / self.weight().norm())
        places = [self.positions_in, self.positions_out]
        optimizer = torch.optim.Adam(places, lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
        with torch.enable_grad():
            for _ in range(steps):
                loss = (self.weight() - matrix).square().sum() / matrix.square().sum()
                for place, gradient in zip(places, torch.autograd.grad(loss, places), strict=True):
                    place.grad = gradient
                optimizer.step()
                schedule.step()
        optimizer.zero_grad()
        return self

    def flops(self, batch: int = 1) -> int:
        """The distances and a dense product."""
        return super().flops(batch) + 2 * self.dims * self.in_features * self.out_features

    def param_groups(self) -> list[dict[str, Any]]:
        """Positions do not decay: that would only draw all neurons together."""
        return [{"params": [self.positions_in, self.positions_out], "weight_decay": 0.0}]

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        return f"{super().extra_repr()}, dims={self.dims}, transform={self.transform!r}"


class PointCloudNet(nn.Module):
    """A perceptron of neurons with positions, each layer of which serves the weights before and after it.

    z_0 = x + b_0,  z_{l+1} = act(W_l z_l + b_{l+1}), without act on the last;  W_l from P_l and P_{l+1}

    Parameters: (dims + 1) times the number of neurons, inputs included.

    Args:
        widths: neurons of each layer, from inputs to outputs.
        dims, transform, period, amplitude: as in `PointCloudLinear`; by default the amplitude keeps the mean square
            of the signal through the activation.
        act: the activation.
        generator: source of the initial values.

    Shape:
        (*, widths[0]) -> (*, widths[-1])

    Source: Point Cloud Network: An Order of Magnitude Improvement in Linear Layer Parameter Count, 2023.
    """

    def __init__(
        self,
        widths: Sequence[int],
        dims: int = 16,
        *,
        act: Callable[[Tensor], Tensor] = F.relu,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if len(widths) < 2:
            raise PomonaError(f"widths={list(widths)} must name inputs and outputs at least")
        self.act, self.layers = act, nn.ModuleList()
        places: nn.Parameter | None = None
        for n, m in pairwise(widths):
            gain = 1.0 if places is None else gain_of(act)
            layer = PointCloudLinear(n, m, dims, gain=gain, positions_in=places, generator=generator, **options)
            places = layer.positions_out
            self.layers.append(layer)
        self.input_bias = nn.Parameter(torch.empty(widths[0]).uniform_(-0.1, 0.1, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        check_input(self, x, len(self.input_bias))
        x = self.layers[0](x + self.input_bias)
        for layer in self.layers[1:]:
            x = layer(self.act(x))
        return x

    def positions(self) -> list[Tensor]:
        """The positions of every layer's neurons, (widths[l], dims) each."""
        return [self.layers[0].positions_in, *(layer.positions_out for layer in self.layers)]  # type: ignore[list-item]


def compress(linear: nn.Linear, dims: int = 16, *, steps: int = 300, **options: Any) -> tuple[PointCloudLinear, float]:
    """A point cloud layer fitted to a dense one, and the relative error of its weight, ||W - W'|| / ||W||.

    Args:
        linear: stays as it is.
        dims, **options: as in `PointCloudLinear`.
        steps: of gradient descent.

    Source: Point Cloud Network: An Order of Magnitude Improvement in Linear Layer Parameter Count, 2023.
    """
    weight = linear.weight.detach()
    options = {"device": weight.device, "dtype": weight.dtype, **options}
    layer = PointCloudLinear(linear.in_features, linear.out_features, dims, linear.bias is not None, **options)
    layer.project_(weight, steps)
    if layer.bias is not None:
        layer.bias.data.copy_(linear.bias.detach())
    return layer, layer.relative_error(weight)
