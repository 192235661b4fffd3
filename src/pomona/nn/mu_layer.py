"""Mu-layers: a product of two linear maps, one of low rank, plus the first; no activation (arXiv 2401.17992)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pomona.errors import PomonaError, check_positive
from pomona.nn.check import check_input
from pomona.nn.mixing import Branch, hide


def spatial_shift(x: Tensor) -> Tensor:
    """Channels in two groups an axis, moved one place forth and back along it; the border keeps its own values.

    (B, *sides, C) -> the same: four groups for (B, H, W, C), in the order +H, -H, +W, -W.
    """
    axes = range(1, x.dim() - 1)
    size = x.shape[-1] // (2 * len(axes))
    *groups, last = x.split([size] * (2 * len(axes) - 1) + [x.shape[-1] - size * (2 * len(axes) - 1)], -1)
    moved = []
    for index, group in enumerate([*groups, last]):
        axis, n = axes[index // 2], x.shape[axes[index // 2]]
        if index % 2 == 0:
            parts = [group.narrow(axis, 0, 1), group.narrow(axis, 0, n - 1)]
        else:
            parts = [group.narrow(axis, 1, n - 1), group.narrow(axis, n - 1, 1)]
        moved.append(torch.cat(parts, axis))
    return torch.cat(moved, -1)


class MuLayer(nn.Module):
    """y = C (u + alpha u * v) with u = N(S A x), v = N(D S B x): the first and second order of x.

    A: in -> hidden, B: in -> rank, D: rank -> hidden, C: hidden -> out; N is layer norm, S the spatial shift.

    Args:
        in_features: features of x.
        hidden: features of u and v; as many as come in by default.
        out_features: features of y; as many as come in by default.
        rank: of D B; an eighth of ``hidden`` by default.
        shift: `spatial_shift`; x then is (B, *sides, in_features).
        norm: layer norms; without them y is a polynomial of degree 2.
        bias: constants of the four maps, those of A, B and D 1 at the start.

    Shape:
        (*, in_features) -> (*, out_features)

    Source: Multilinear Operator Networks, arXiv 2401.17992.
    """

    def __init__(
        self,
        in_features: int,
        hidden: int | None = None,
        out_features: int | None = None,
        *,
        rank: int | None = None,
        shift: bool = False,
        norm: bool = True,
        bias: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        hidden, out = hidden or in_features, out_features or in_features
        rank = rank or max(1, hidden // 8)
        check_positive(in_features=in_features, hidden=hidden, out_features=out, rank=rank)
        self.in_features, self.shift = in_features, shift
        self.a, self.b = nn.Linear(in_features, hidden, bias), nn.Linear(in_features, rank, bias)
        self.d, self.c = nn.Linear(rank, hidden, bias), nn.Linear(hidden, out, bias)
        self.alpha = nn.Parameter(torch.ones(()))
        self.norm_u, self.norm_v = (nn.LayerNorm(hidden, eps=1e-6) if norm else nn.Identity() for _ in range(2))
        for linear in (self.a, self.b, self.d, self.c):
            nn.init.kaiming_normal_(linear.weight, generator=generator)
            if bias:
                nn.init.constant_(linear.bias, 0.0 if linear is self.c else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        check_input(self, x, self.in_features)
        u, v = self.a(x), self.b(x)
        if self.shift:
            u, v = spatial_shift(u), spatial_shift(v)
        u, v = self.norm_u(u), self.norm_v(self.d(v))
        return self.c(u + self.alpha * (u * v))

    def extra_repr(self) -> str:
        """Options."""
        return f"shift={self.shift}"


class Coefficients(NamedTuple):
    """y = constant + linear x + x^T quadratic x: (out,), (out, in) and (out, in, in), the last symmetric."""

    constant: Tensor
    linear: Tensor
    quadratic: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """(*, in) -> (*, out)"""
        return self.constant + x @ self.linear.T + torch.einsum("...i,oij,...j->...o", x, self.quadratic, x)


def coefficients(layer: MuLayer) -> Coefficients:
    """The polynomial that a Mu-layer without norms and shift is.

    Raises:
        PomonaError: for a layer with norms or a shift.
    """
    if layer.shift or not isinstance(layer.norm_u, nn.Identity):
        raise PomonaError(
            "coefficients needs a Mu-layer with norm=False and shift=False; others are no such polynomial"
        )

    def constant(linear: nn.Linear) -> Tensor:
        return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias

    a, b, d, c = (m.weight for m in (layer.a, layer.b, layer.d, layer.c))
    v, v0, u0 = layer.alpha * (d @ b), layer.alpha * (d @ constant(layer.b) + constant(layer.d)), constant(layer.a)
    forms = torch.einsum("oh,hi,hj->oij", c, a, v)
    return Coefficients(
        c @ (u0 + u0 * v0) + constant(layer.c),
        c @ (a + v0[:, None] * a + u0[:, None] * v),
        (forms + forms.mT) / 2,
    )


@torch.no_grad()
def degree_along_line(
    net: Callable[[Tensor], Tensor], start: Tensor, direction: Tensor, *, most: int = 32, tolerance: float = 1e-8
) -> int:
    """Degree in t of net(start + t direction) for t in [-1, 1], if it is a polynomial of at most ``most``.

    From the coefficients of the Chebyshev interpolant, of which those above the degree vanish.

    Args:
        net: (B, ...) -> (B, outputs); give it float64.
        start: (...), a point.
        direction: (...), of the line.
        most: largest degree that can be told.
        tolerance: a coefficient below so many times the largest counts as none.

    Raises:
        PomonaError: if no degree up to ``most`` fits.
    """
    count = most + 2
    nodes = np.cos(np.pi * (np.arange(count) + 0.5) / count)
    t = torch.as_tensor(nodes, dtype=start.dtype, device=start.device).view(-1, *[1] * start.dim())
    values = net(start + t * direction).flatten(1).cpu().numpy()
    found = np.abs(np.linalg.solve(np.polynomial.chebyshev.chebvander(nodes, count - 1), values)).max(1)
    degree = int(np.flatnonzero(found > tolerance * found.max()).max(initial=0))
    if degree > most:
        raise PomonaError(f"no polynomial of degree most={most} fits; the network has norms or a larger degree")
    return degree


class PolyBlock(nn.Module):
    """y = x + Mu_1(LN x),  z = y + Mu_2(LN y), the first with spatial shift, the second ``expansion`` times as wide.

    Args:
        dim: channels C.
        expansion: hidden width of the second Mu-layer, in C.
        shift: of the first; False mixes channels only.
        norm: layer norms; without them z is a polynomial of degree 4.
        drop_path: probability of leaving a branch out for an example.
        options: further arguments of `MuLayer`.

    Shape:
        (B, *sides, C) -> (B, *sides, C)

    Source: Multilinear Operator Networks, arXiv 2401.17992.
    """

    def __init__(
        self,
        dim: int,
        expansion: int = 3,
        *,
        shift: bool = True,
        norm: bool = True,
        drop_path: float = 0.0,
        **options: object,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, expansion=expansion)
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) if norm else nn.Identity() for _ in range(2))
        self.first = MuLayer(dim, dim, dim, shift=shift, norm=norm, **options)  # type: ignore[arg-type]
        self.second = MuLayer(dim, expansion * dim, dim, norm=norm, **options)  # type: ignore[arg-type]
        self.branch = Branch(dim, drop=drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        check_input(self, x)
        for norm, layer in zip(self.norms, (self.first, self.second), strict=True):
            change = layer(norm(x))
            x = x + self.branch(change.unsqueeze(1).flatten(1, -2)).reshape(x.shape)
        return x


class MuMixer(nn.Module):
    """``mixer=mu``: a Mu-layer with spatial shift on the squarest grid that the tokens fill.

    Args:
        dim: D.
        tokens: N.
        hidden: features of the Mu-layer; D by default.
        rank: of its product; an eighth of ``hidden`` by default.
        grid: (height, width), or (N,) for a sequence.

    Shape:
        (B, N, D), mask (B, N) or None -> (B, N, D)

    Source: Multilinear Operator Networks, arXiv 2401.17992.
    """

    def __init__(
        self,
        dim: int,
        tokens: int,
        *,
        hidden: int | None = None,
        rank: int | None = None,
        grid: tuple[int, ...] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_positive(tokens=tokens)
        if grid is None:
            height = next(h for h in range(math.isqrt(tokens), 0, -1) if tokens % h == 0)
            grid = (height, tokens // height)
        if math.prod(grid) != tokens:
            raise PomonaError(f"grid={tuple(grid)} does not hold tokens={tokens}")
        self.grid = tuple(grid)
        self.mu = MuLayer(dim, hidden, dim, rank=rank, shift=True, generator=generator)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See the class."""
        check_input(self, x, self.mu.in_features)
        if x.shape[-2] != math.prod(self.grid):
            raise PomonaError(f"x has {x.shape[-2]} tokens, but this mixer was made for the grid {self.grid}")
        return self.mu(hide(x, mask).unflatten(-2, self.grid)).flatten(1, -2)


def mu_ffn(dim: int, hidden: int, *, rank: int | None = None, norm: bool = True) -> MuLayer:
    """``ffn=mu``: a Mu-layer instead of two linear layers and an activation."""
    return MuLayer(dim, hidden, dim, rank=rank, norm=norm)


class PolyODE(nn.Module):
    """dx/dt = f(x), f a Mu-layer without norms: a vector field of degree 2 whose `coefficients` can be read.

    Integrated by the classical Runge-Kutta method of fourth order. C starts at 0, hence at rest: random fields of
    degree 2 send most paths to infinity.

    Args:
        dim: size of x.
        hidden: of the Mu-layer; 4 ``dim`` by default.
        rank: of its product; ``dim`` by default.
        field: another f in place of the Mu-layer, (B, dim) -> (B, dim).
        steps: Runge-Kutta steps between two times.

    Shape:
        x (B, dim), times (T,) -> (T, B, dim), the first being x

    Source: Multilinear Operator Networks, arXiv 2401.17992.
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        rank: int | None = None,
        field: nn.Module | None = None,
        steps: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, steps=steps)
        if field is None:
            field = MuLayer(dim, hidden or 4 * dim, dim, rank=rank or dim, norm=False, generator=generator)
            nn.init.zeros_(field.c.weight)
        self.field = field
        self.steps = steps

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        """See the class."""
        path = [x]
        for span in times.diff():
            h = span / self.steps
            for _ in range(self.steps):
                k1 = self.field(x)
                k2 = self.field(x + h / 2 * k1)
                k3 = self.field(x + h / 2 * k2)
                x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + self.field(x + h * k3))
            path.append(x)
        return torch.stack(path)
