"""Simulated functional data: random curves, and numbers that depend on them through one or two integrals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pomona.data.task import Split, Task
from pomona.errors import PomonaError, unknown
from pomona.nets.specs import Inputs, Outputs

TERMS = 50


def phi(t: Tensor) -> Tensor:
    """phi_1 = 1, phi_k = sqrt(2) cos((k - 1) pi t), k = 1..50; orthonormal on [0, 1]: (*,) -> (50, *)"""
    k = torch.arange(TERMS, device=t.device).to(t).reshape(-1, *(1 for _ in t.shape))
    return torch.where(k == 0, 1.0, math.sqrt(2) * torch.cos(k * math.pi * t))


def hats(t: Tensor) -> Tensor:
    """Two triangles: 4 - 16 t on [0, 1/4], and 4 - 16 |t - 1/2| on [1/4, 3/4]: (*,) -> (2, *)"""
    return torch.stack([4 - 16 * t.abs(), 4 - 16 * (t - 0.5).abs()]).clamp_min(0)


class _Case(NamedTuple):
    scale: dict[int, float]
    """z_k where it is not 1."""
    answer: Callable[[Tensor], Tensor]
    """Coefficients (n, 50) to y (n,)."""


def _by_hats(c: Tensor) -> Tensor:
    t = torch.linspace(0, 1, 4001, dtype=c.dtype)  # the hats' corners lie on this grid
    first, second = torch.trapezoid(hats(t)[:, None] * phi(t), t) @ c.T
    return second + first.square()


def _square_of(k: int) -> Callable[[Tensor], Tensor]:
    return lambda c: c[:, k - 1].square()


_SPREAD = {1: 5.0, 3: 5.0, 5: 3.0, 10: 3.0}
CASES = {
    1: _Case({1: 20.0, 2: 5.0, 3: 5.0}, _square_of(3)),
    2: _Case(_SPREAD, _square_of(5)),
    3: _Case(_SPREAD, _square_of(5)),
    4: _Case({}, _by_hats),
}
"""The paper's four cases; the third is the second with more noise."""


class FDATask(Task):
    """Curves X(t) = sum_{k<=50} c_k phi_k(t) with noise, and y with noise, both divided by their training deviation.

    c_k = z_k r_k, r_k ~ U(-sqrt 3, sqrt 3). Case 1: z = (20, 5, 5, 1, ...), y = <phi_3, X>^2; cases 2 and 3:
    z_1 = z_3 = 5, z_5 = z_10 = 3, others 1, y = <phi_5, X>^2; case 4: z = 1, y = <b_2, X> + <b_1, X>^2 with
    the triangles of `hats`. Synthetic: drawn by rule, nothing is measured.

    Args:
        case: 1 to 4.
        points: J evenly spaced times in [0, 1].
        noise_x: standard deviation of the noise on every observation.
        noise_y: standard deviation of the noise on y; the test's y has none.
        sizes: curves for training, validation and test.
        seed: of everything.

    Inputs (n, J), targets (n, 1); ``extra`` holds the ``grid`` and, in order of the splits, the ``coefficients``.

    Raises:
        PomonaError: for an unknown case or negative noise.

    Source: Deep Learning for Functional Data Analysis with Adaptive Basis Layers (arXiv 2106.10414).
    """

    def __init__(
        self,
        case: int = 1,
        points: int = 51,
        noise_x: float = 0.0,
        noise_y: float = 0.0,
        sizes: tuple[int, int, int] = (400, 200, 400),
        seed: int = 0,
    ) -> None:
        if case not in CASES:
            raise unknown("case", case, CASES)
        if noise_x < 0 or noise_y < 0:
            raise PomonaError(f"noise_x={noise_x} and noise_y={noise_y} must be 0 or more")
        generator = torch.Generator().manual_seed(seed)
        c = (torch.rand(sum(sizes), TERMS, generator=generator, dtype=torch.float64) * 2 - 1) * math.sqrt(3)
        for k, z in CASES[case].scale.items():
            c[:, k - 1] *= z
        grid = torch.linspace(0, 1, points, dtype=torch.float64)
        x = c @ phi(grid)
        x = x + noise_x * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        y = CASES[case].answer(c)[:, None]
        trained = len(y) - sizes[2]
        y[:trained] += noise_y * torch.randn(trained, 1, generator=generator, dtype=y.dtype)
        first = slice(sizes[0])
        x, y = x / x[first].std(), (y - y[first].mean()) / y[first].std()
        parts = zip(x.float().split(sizes), y.float().split(sizes), strict=True)
        splits = {name: Split(*part) for name, part in zip(("train", "valid", "test"), parts, strict=True)}
        extra = {"grid": grid, "coefficients": c}
        super().__init__(f"case {case}", Inputs("table", (points,)), Outputs("number", 1, ("y",)), splits, extra=extra)
