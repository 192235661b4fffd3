"""One-dimensional function bases, evaluated feature by feature: what Kolmogorov-Arnold layers are made of.

A basis maps ``(..., features)`` to ``(..., features, n_basis)``; each feature has its own grid. Outside their grid
the local bases (B-spline, radial, wavelet, ReLU) fade to zero, so that only a layer's base branch acts there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, check_positive, unknown

MARGIN = 0.05
"""How far the outermost grid intervals reach beyond the samples, in their range, for inputs a little further out."""


class Basis(nn.Module):
    """``size`` pieces of the interval ``[low, high]``, and functions that stand on them.

    Args:
        features: last axis of the input; each has its own grid.
        size: number of grid intervals, or of frequencies.
        low: left end of the grid.
        high: right end of the grid.
        grid_eps: share of the uniform grid, against the quantiles of the samples, in `refit`.

    Shape:
        (*, features) -> (*, features, n_basis)
    """

    edges: Tensor
    per_interval = 1

    def __init__(
        self, features: int, size: int = 5, low: float = -1.0, high: float = 1.0, *, grid_eps: float = 0.02
    ) -> None:
        super().__init__()
        check_positive(features=features, size=size)
        if not low < high:
            raise PomonaError(f"grid_range=({low}, {high}) must go from a lower to a higher number")
        if not 0 <= grid_eps <= 1:
            raise PomonaError(f"grid_eps={grid_eps} must lie between 0 and 1")
        self.features, self.size, self.low, self.high, self.grid_eps = features, size, low, high, grid_eps
        self.n_basis = self.per_interval * size + 1
        edges = torch.linspace(low, high, size + 1, dtype=torch.float64)
        self.register_buffer("edges", edges.to(torch.get_default_dtype()).repeat(features, 1))

    def options(self) -> dict[str, float]:
        """Arguments, beside features, size and range, that make the same kind of basis."""
        return {"grid_eps": self.grid_eps}

    def on_edges(self, edges: Tensor) -> Basis:
        """The same kind of basis on other grid edges, (features, size + 1)."""
        features, size = edges.shape[0], edges.shape[1] - 1
        new = type(self)(features, size, self.low, self.high, **self.options()).to(edges)  # type: ignore[arg-type]
        new.edges.copy_(edges)
        new.place_()
        return new

    def place_(self) -> None:
        """Recompute what depends on ``edges``."""

    @torch.no_grad()
    def refit(self, x: Tensor) -> None:
        """Move the grid to the samples: edges = eps * uniform + (1 - eps) * quantiles, the end ones 5% further out.

        Args:
            x: (samples, features), at least one sample.
        """
        x = x.reshape(-1, self.features)
        if not len(x):
            raise PomonaError("x has no samples; refit needs at least one")
        share = torch.linspace(0, 1, self.size + 1, dtype=x.dtype, device=x.device)
        x = x.sort(0).values  # torch.quantile has a limit on the number of samples
        at = share * (len(x) - 1)
        below = at.floor().long()
        above = (below + 1).clamp(max=len(x) - 1)
        quantiles = torch.lerp(x[below], x[above], (at - below)[:, None])
        half = ((x[-1] - x[0]) / 2).clamp(min=1e-3)  # a constant feature still gets an interval
        middle = (x[-1] + x[0]) / 2
        uniform = middle + half * (2 * share[:, None] - 1)
        wide = x[-1] - x[0] > 2e-3
        eps = torch.where(wide, self.grid_eps, 1.0)
        self.edges.copy_((eps * uniform + (1 - eps) * quantiles).T)
        self.edges[:, 0] -= 2 * MARGIN * half
        self.edges[:, -1] += 2 * MARGIN * half
        self.place_()

    def points(self, per_interval: int = 5) -> Tensor:
        """Evenly spaced points in every grid interval, ends included: (points, features)."""
        return resample_edges(self.edges, self.size * per_interval).T

    def extra_repr(self) -> str:
        """Sizes."""
        return f"features={self.features}, size={self.size}, n_basis={self.n_basis}"


def resample_edges(edges: Tensor, size: int) -> Tensor:
    """Grid edges at even steps of their own index: (features, old size + 1) -> (features, size + 1)."""
    return F.interpolate(edges[None].double(), size + 1, mode="linear", align_corners=True)[0].to(edges)


def _b_splines(x: Tensor, t: Tensor, k: int, n: int = 1) -> tuple[Tensor, Tensor]:
    """The B-splines of order ``k`` and their n-th derivative: (features, *) -> two of (functions, features, *).

    B_{m,d} = (x - t_m) w_m + (t_{m+d+1} - x) w_{m+1},  B'_{m,d} = d (w_m - w_{m+1}),
    w_m = B_{m,d-1} / (t_{m+d} - t_m).  The knots t are (knots, features, 1, ...).
    """
    first = k - n + 1  # the order from which on the derivative is taken
    z = x - t  # the index of the function leads: every slice is contiguous
    if first > 1:  # a function of order 1 is the difference of two ramps, one of order 0 that of two steps
        rising = (z[:-1] / (t[1:] - t[:-1])).clamp(0, 1)
    else:
        rising = torch.cat([z[:-1] >= 0, z[-1:] > 0]).to(x.dtype)  # the last interval holds its right end
    value = rising[:-1] - rising[1:]
    slope = value if first > 0 else torch.zeros_like(value)
    for d in range(2 if first > 1 else 1, k + 1):
        width = t[d:] - t[:-d]
        w = value.div_(width)
        if d >= first:
            v = w if d == first else slope / width
            slope = (v[:-1] - v[1:]).mul_(d)
        value = torch.addcmul(z[: -d - 1] * w[:-1], z[d + 1 :], w[1:], value=-1)
    return value, slope


class _BSplines(torch.autograd.Function):
    """`_b_splines` in one pass; backward keeps one derivative and takes the next, if asked, from here."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, t: Tensor, k: int, n: int) -> tuple[Tensor, Tensor]:
        """B(x) and its n-th derivative."""
        return _b_splines(x, t, k, n)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, t, ctx.k, ctx.n = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, t, output[1])
        ctx.save_for_forward(x, t, output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        x, t, slope = ctx.saved_tensors
        by_value, by_slope = grads  # by_value only if n = 1
        dx = None if by_value is None else (by_value * slope).sum(0)
        if by_slope is not None:
            further = (by_slope * _BSplines.apply(x, t, ctx.k, ctx.n + 1)[1]).sum(0)
            dx = further if dx is None else dx + further
        return dx, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        x, t, slope = ctx.saved_tensors
        return tangents[0] * slope, tangents[0] * _BSplines.apply(x, t, ctx.k, ctx.n + 1)[1]


class BSpline(Basis):
    """B-splines of order ``k`` on the grid extended by ``k`` intervals to each side: size + k functions.

    B_{m,0}(x) = [t_m <= x < t_{m+1}],
    B_{m,d}(x) = (x - t_m) / (t_{m+d} - t_m) B_{m,d-1}(x) + (t_{m+d+1} - x) / (t_{m+d+1} - t_{m+1}) B_{m+1,d-1}(x).

    They are non-negative, sum to 1 on the grid and fade to 0 over the k intervals beside it. Values and slopes come
    from one pass, and backward keeps no tensor of more than batch * features * (size + k) entries.

    Source: A Practical Guide to Splines (de Boor, 1978); as used in KAN: Kolmogorov-Arnold Networks, arXiv 2404.19756.
    """

    knots: Tensor

    def __init__(
        self,
        features: int,
        size: int = 5,
        low: float = -1.0,
        high: float = 1.0,
        *,
        k: int = 3,
        grid_eps: float = 0.02,
    ) -> None:
        super().__init__(features, size, low, high, grid_eps=grid_eps)
        if k < 0:
            raise PomonaError(f"k={k} must be 0 or more")
        self.k, self.n_basis = k, size + k
        self.register_buffer("knots", self.edges.new_empty(size + 2 * k + 1, features))
        self.place_()

    def options(self) -> dict[str, float]:
        """See the base class."""
        return {"grid_eps": self.grid_eps, "k": self.k}

    def place_(self) -> None:
        """Extend the edges evenly by k intervals a side."""
        edges = self.edges.double()
        step = (edges[:, -1:] - edges[:, :1]) / self.size
        out = step * torch.arange(1, self.k + 1, device=edges.device)
        self.knots.copy_(torch.cat([edges[:, :1] - out.flip(-1), edges, edges[:, -1:] + out], -1).T)

    def extended(self) -> Tensor:
        """The extended knot vector, (features, size + 2k + 1)."""
        return self.knots.T

    def forward(self, x: Tensor) -> Tensor:
        """(*, features) -> (*, features, size + k)"""
        t = self.knots.to(x).view(*self.knots.shape, *[1] * (x.dim() - 1))
        x = x.movedim(-1, 0).contiguous()
        # the compiler derives and fuses the backward itself, and does not take a custom jvp
        evaluate = _b_splines if torch.compiler.is_compiling() else _BSplines.apply
        return evaluate(x, t, self.k, 1)[0].movedim((0, 1), (-1, -2))


class Located(Basis):
    """Copies of one shape at evenly spaced places of the grid: phi_m(x) = shape((x - c_m) / h), ``size + 1`` functions.

    The centres c_m are the grid's edges, h is the mean distance between them.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(*, features) -> (*, features, size + 1)"""
        centres = self.edges.to(x).mT.contiguous()
        width = (centres[-1] - centres[0]) / self.size
        return self.shape((x[..., None, :] - centres) / width).mT

    @staticmethod
    def shape(u: Tensor) -> Tensor:
        """The function at centre 0 and width 1."""
        raise NotImplementedError("a located basis defines shape(u)")


class GaussianRBF(Located):
    """phi(u) = exp(-u^2). Source: Kolmogorov-Arnold Networks are Radial Basis Function Networks, arXiv 2405.06721."""

    @staticmethod
    def shape(u: Tensor) -> Tensor:
        """See the class."""
        return torch.exp(-u.square())


class RSWAF(Located):
    """phi(u) = 1 - tanh(u)^2, the reflectional switch activation of FasterKAN."""

    @staticmethod
    def shape(u: Tensor) -> Tensor:
        """See the class."""
        return 1 - torch.tanh(u).square()


class MexicanHat(Located):
    """phi(u) = 2 / (sqrt(3) pi^(1/4)) (1 - u^2) exp(-u^2 / 2). Source: Wav-KAN, arXiv 2405.12832."""

    @staticmethod
    def shape(u: Tensor) -> Tensor:
        """See the class."""
        square = u.square()
        return 2 / (math.sqrt(3) * math.pi**0.25) * (1 - square) * torch.exp(-square / 2)


class Morlet(Located):
    """phi(u) = cos(5 u) exp(-u^2 / 2). Source: Wav-KAN, arXiv 2405.12832."""

    @staticmethod
    def shape(u: Tensor) -> Tensor:
        """See the class."""
        return torch.cos(5 * u) * torch.exp(-u.square() / 2)


class ReLUPower(Located):
    """phi(u) = (relu(2 - u) relu(2 + u))^2 / 16, supported on four intervals, 1 at its centre.

    Source: ReLU-KAN, arXiv 2406.02075.
    """

    @staticmethod
    def shape(u: Tensor) -> Tensor:
        """See the class."""
        return (F.relu(2 - u) * F.relu(2 + u)).square() / 16


class Ranged(Basis):
    """Functions of u, where u = -1 and 1 at the ends of the grid; only the grid's ends matter."""

    def unit(self, x: Tensor) -> Tensor:
        """Map x so that the grid becomes [-1, 1]."""
        low, high = self.edges[:, 0].to(x), self.edges[:, -1].to(x)
        return (2 * x - low - high) / (high - low)


class Chebyshev(Ranged):
    """T_m(tanh u), m = 0 .. size: T_0 = 1, T_1 = v, T_m = 2 v T_{m-1} - T_{m-2}, with v = tanh(u) always in [-1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        """(*, features) -> (*, features, size + 1)"""
        v = torch.tanh(self.unit(x))
        terms = [torch.ones_like(v), v]
        for _ in range(self.size - 1):
            terms.append(2 * v * terms[-1] - terms[-2])
        return torch.stack(terms, -2).mT


class Gram(Ranged):
    """Gram polynomials of v = tanh(u), m = 0 .. size: orthonormal on ``size^2 + 1`` even points of [-1, 1].

    sqrt(b_{m+1}) G_{m+1} = v G_m - sqrt(b_m) G_{m-1},  b_m = m^2 (N^2 - m^2) / ((4 m^2 - 1) (N - 1)^2),  G_0 = 1,
    with N the number of points, so many that no polynomial grows steep at the ends.

    Source: Kolmogorov-Arnold Convolutions: Design Principles and Empirical Studies, arXiv 2407.01092.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(*, features) -> (*, features, size + 1)"""
        v, n = torch.tanh(self.unit(x)), self.size**2 + 1
        root = [math.sqrt(m**2 * (n**2 - m**2) / ((4 * m**2 - 1) * (n - 1) ** 2)) for m in range(self.size + 1)]
        terms = [torch.ones_like(v), v / root[1]]
        for m in range(1, self.size):
            terms.append((v * terms[-1] - root[m] * terms[-2]) / root[m + 1])
        return torch.stack(terms, -2).mT


class Rational(Ranged):
    """1, cos(m t), sin(m t), m = 1 .. size, with t = 2 arctan(u): rational functions of u of degree 2 size.

    cos t = (1 - u^2) / (1 + u^2) and sin t = 2 u / (1 + u^2). They have no poles, are orthogonal on the whole line
    under the weight 1 / (1 + u^2) and tend to constants.

    Source: Completeness and Basis Properties of Sets of Special Functions (Higgins, 1977).
    """

    per_interval = 2

    def forward(self, x: Tensor) -> Tensor:
        """(*, features) -> (*, features, 2 size + 1)"""
        return trigonometric(2 * torch.atan(self.unit(x)), self.size, constant=True)


def trigonometric(angle: Tensor, count: int, *, constant: bool = False) -> Tensor:
    """1 (if ``constant``), cos(m angle), sin(m angle), m = 1 .. count: (*) -> (*, 2 count + constant)"""
    angles = angle[..., None] * torch.arange(1, count + 1, device=angle.device).to(angle)
    ones = [torch.ones_like(angle)[..., None]] if constant else []
    return torch.cat([*ones, angles.cos(), angles.sin()], -1)


class Fourier(Ranged):
    """1, cos(m pi u / 2), sin(m pi u / 2), m = 1 .. size: the period is twice the grid, so the ends may differ."""

    per_interval = 2

    def forward(self, x: Tensor) -> Tensor:
        """(*, features) -> (*, features, 2 size + 1)"""
        return trigonometric(self.unit(x) * (math.pi / 2), self.size, constant=True)


BASES: dict[str, type[Basis]] = {
    "bspline": BSpline,
    "rbf": GaussianRBF,
    "rswaf": RSWAF,
    "chebyshev": Chebyshev,
    "gram": Gram,
    "fourier": Fourier,
    "rational": Rational,
    "relu_power": ReLUPower,
    "mexican_hat": MexicanHat,
    "morlet": Morlet,
}
"""Bases by name."""


def make_basis(
    name: str, features: int, size: int, low: float, high: float, *, k: int = 3, grid_eps: float = 0.02
) -> Basis:
    """A basis by name; ``k`` is the order of B-splines and left aside by the others."""
    if name not in BASES:
        raise unknown("basis", name, BASES)
    if name == "bspline":
        return BSpline(features, size, low, high, k=k, grid_eps=grid_eps)
    return BASES[name](features, size, low, high, grid_eps=grid_eps)


@torch.no_grad()
def fit_coefficients(basis: Basis, x: Tensor, y: Tensor) -> Tensor:
    """Least-squares coefficients c with sum_m c[o,i,m] B_m(x[p,i]) = y[p,o,i]; of least norm where x leaves them open.

    Args:
        x: (points, features).
        y: (points, outputs, features).

    Returns:
        (outputs, features, n_basis)
    """
    matrix = basis(x.double()).transpose(0, 1).cpu()  # solved on the CPU in float64: exact and rank-revealing
    target = y.double().permute(2, 0, 1).cpu()
    solution = torch.linalg.lstsq(matrix, target, driver="gelsd").solution
    return solution.permute(2, 0, 1).to(y).contiguous()  # torch's L-BFGS takes no strided gradients
