"""Trainable matrix activation functions (TMAF): sigma(y) = D(y) y with a banded matrix D of step functions.

Source: Neural networks with trainable matrix activation functions (arXiv 2109.09948).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, check_positive
from pomona.nn.activation import act
from pomona.nn.activation_functions import Activation
from pomona.nn.check import check_input

REACH = 2.0
"""Where a number of knots is given they lie equally spaced on [-REACH, REACH]."""
Function = Callable[[Tensor], Tensor]


class BandTMAF(Activation):
    """Matrix activation with ``bandwidth`` neighbours on each side.

        sigma(y)_i = sum_{|d| <= bandwidth} a_{i,d}(y_{i+d}) y_{i+d},        y = 0 beyond the first and last channel

    Each a is a step function with the trained level t_0 up to the first knot, t_j on (s_j, s_{j+1}] and t_m beyond the
    last: the output is linear between knots and may jump at them. Gradients: dsigma/dt_j = y 1[y in interval j] and
    dsigma/dy = D(y). At a knot the function jumps, so the knots' own gradient is zero almost everywhere; ``ste`` trains
    them with the jump spread over a hat of unit area.

    Args:
        features: channels, each with functions of its own.
        bandwidth: neighbours on each side; 0 is a diagonal D, 1 a tridiagonal one.
        knots: increasing numbers, or how many of them, equally spaced on [-2, 2].
        init: first diagonal: name of an activation, or the function itself, sampled as f(s)/s in the middle of each
            interval (so that 'relu' is exact), or 'random' (normal, deviation 0.1). Off-diagonals start at 0.
        shared: one set of functions for all channels.
        ste: half-width of that hat; 0 keeps the knots fixed.
        channel_dim: axis of the channels.

    Shapes: (*, features, *) -> the same.

    Raises:
        PomonaError: for sizes not above 0, knots that do not increase, or an ``init`` that is not 0 at 0.

    Source: Neural networks with trainable matrix activation functions (arXiv 2109.09948).
    """

    def __init__(
        self,
        features: int,
        bandwidth: int = 1,
        knots: int | Sequence[float] = 5,
        init: str | Function = "relu",
        shared: bool = False,
        ste: float = 0.0,
        channel_dim: int = -1,
    ) -> None:
        super().__init__()
        check_positive(features=features)
        if bandwidth < 0 or ste < 0:
            raise PomonaError(f"bandwidth={bandwidth} and ste={ste} must be 0 or more")
        values = torch.linspace(-REACH, REACH, max(knots, 0)).tolist() if isinstance(knots, int) else list(knots)
        at = torch.tensor(values, dtype=torch.float64)
        if not values or not bool((at.diff() > 0).all() & at.isfinite().all()):
            raise PomonaError(f"knots={knots} must be one or more increasing numbers")
        self.features, self.bandwidth, self.ste, self.channel_dim = features, bandwidth, ste, channel_dim
        self.kinks = tuple(at.tolist())
        levels = torch.zeros(1 if shared else features, 2 * bandwidth + 1, len(at) + 1)
        if init == "random":
            nn.init.normal_(levels[:, bandwidth], std=0.1)
        else:
            levels[:, bandwidth] = interval_levels(act(init).double() if isinstance(init, str) else init, at)
        self.levels = nn.Parameter(levels)
        self.knots: Tensor
        if ste:
            self.knots = nn.Parameter(at.to(levels.dtype))
        else:
            self.register_buffer("knots", at.to(levels.dtype))

    def _windows(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(*, features) -> each channel with its neighbours (*, features, 2 bandwidth + 1), and their a."""
        padded = F.pad(y, (self.bandwidth, self.bandwidth)) if self.bandwidth else y
        z = torch.stack([padded[..., k : k + self.features] for k in range(2 * self.bandwidth + 1)], -1)
        interval = torch.bucketize(z.detach(), self.knots.detach())
        rows = torch.arange(self.levels[..., 0].numel(), device=y.device).view(self.levels.shape[:-1])
        return z, self.levels.flatten()[interval + rows * self.levels.shape[-1]]

    def forward(self, y: Tensor) -> Tensor:
        """sigma(y)."""
        check_input(self, y, self.features, self.channel_dim)
        z, a = self._windows(y.movedim(self.channel_dim, -1))
        terms = a * z
        if self.ste:
            distance = (z.detach()[..., None] - self.knots.detach()).abs()
            hat = F.relu(1 - distance / self.ste) / self.ste
            slope = -(self.levels.diff(dim=-1) * z[..., None] * hat).detach()
            terms = terms + (slope * (self.knots - self.knots.detach())).sum(-1)  # 0, with that slope
        return terms.sum(-1).movedim(-1, self.channel_dim)

    def matrix(self, y: Tensor) -> Tensor:
        """D(y) of vectors y (*, features): (*, features, features)."""
        a, n = self._windows(y)[1], self.features
        b = min(self.bandwidth, n - 1)
        diagonals = {d: a[..., max(0, -d) : n - max(0, d), d + self.bandwidth] for d in range(-b, b + 1)}
        return torch.stack([torch.diag_embed(values, d) for d, values in diagonals.items()]).sum(0)

    def post_step(self) -> None:
        """Keep trained knots in order."""
        if self.ste:
            self.knots.copy_(self.knots.sort().values)

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"features={self.features}, bandwidth={self.bandwidth}, knots={len(self.kinks)}"


def DiagTMAF(
    features: int,
    knots: int | Sequence[float] = 5,
    init: str | Function = "relu",
    shared: bool = False,
    ste: float = 0.0,
    channel_dim: int = -1,
) -> BandTMAF:
    """sigma(y)_i = a_i(y_i) y_i: ``BandTMAF`` with a diagonal D. Source: arXiv 2109.09948."""
    return BandTMAF(features, 0, knots, init, shared, ste, channel_dim)


def TridiagTMAF(
    features: int,
    knots: int | Sequence[float] = 5,
    init: str | Function = "relu",
    shared: bool = False,
    ste: float = 0.0,
    channel_dim: int = -1,
) -> BandTMAF:
    """sigma(y)_i = a_i(y_i) y_i + b_i(y_{i+1}) y_{i+1} + c_i(y_{i-1}) y_{i-1}: ``BandTMAF`` with one neighbour on each
    side. Source: arXiv 2109.09948.
    """
    return BandTMAF(features, 1, knots, init, shared, ste, channel_dim)


def from_activation(function: str | Function, knots: int | Sequence[float], features: int = 1) -> BandTMAF:
    """The diagonal TMAF whose levels are function(s)/s in the middle of each interval. Source: arXiv 2109.09948.

    Raises:
        PomonaError: if the function is not 0 at 0, where D(y) y always is.
    """
    return DiagTMAF(features, knots, function)


@torch.no_grad()
def interval_levels(function: Function, knots: Tensor) -> Tensor:
    """function(s)/s in the middle of each interval of the knots (m,), the outer two as wide as those beside them."""
    if float(function(knots.new_zeros(1)).abs()) > 1e-6:
        raise PomonaError("a matrix activation is 0 at 0, and this function is not; subtract its value there")
    gaps = knots.diff() if len(knots) > 1 else knots.new_ones(1)
    edges = torch.cat([knots[:1] - gaps[:1], knots, knots[-1:] + gaps[-1:]])
    middle, quarter = (edges[1:] + edges[:-1]) / 2, edges.diff() / 4
    slope = (function(middle + quarter) - function(middle - quarter)) / (2 * quarter)
    return torch.where(middle.abs() < 1e-3 * quarter, slope, function(middle) / middle)
