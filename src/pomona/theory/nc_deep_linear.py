"""Neural collapse in deep linear networks: the exact global minimiser of the unconstrained-features model.

Source: "Neural Collapse in Deep Linear Networks: From Balanced to Imbalanced Data" (arXiv 2301.00437).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor, nn
from torch.nn import functional as F

from pomona.errors import PomonaError, check_positive, unknown

Loss = Literal["mse", "ce"]
LOSSES = ("mse", "ce")


def _check(counts: Sequence[int], lams: Sequence[float] | float, depth: int, loss: str) -> tuple[float, ...]:
    """The M + 1 decays, after the arguments have been checked."""
    check_positive(M=depth)
    if loss not in LOSSES:
        raise unknown("loss", loss, LOSSES)
    if len(counts) < 2 or min(counts) < 1:
        raise PomonaError(f"counts={tuple(counts)} must give at least 2 classes one example or more each")
    decays = (float(lams),) * (depth + 1) if isinstance(lams, (int, float)) else tuple(map(float, lams))
    if len(decays) != depth + 1 or min(decays) <= 0:
        raise PomonaError(f"lams={lams!r} must be one number above 0, or M+1={depth + 1} of them (W_1..W_M, then H)")
    return decays


class DeepLinearUFM(nn.Module):
    """Free features under a deep linear classifier, both with weight decay.

    ``min  loss(W_M ... W_1 H [+ b 1^T], Y) + sum_l lam_l/2 ||W_l||_F^2 + lam_H/2 ||H||_F^2`` with
    ``loss = ||P - Y||_F^2 / (2 N)`` or the mean cross-entropy; the bias has no decay.

    Args:
        counts: examples of each of the K classes; N is their sum.
        dims: width of the features, then of each hidden layer: M numbers for M layers.
        lams: decays of W_1..W_M and H; one number for all.
        loss: ``mse`` or ``ce``.
        bias: a free last bias.
        std: standard deviation of the initial entries, times ``1/sqrt(width)`` for the weights.
        generator: of the initial entries.
        dtype: of the parameters.

    Raises:
        PomonaError: for widths, decays or counts that do not fit together.
    """

    labels: Tensor

    def __init__(
        self,
        counts: Sequence[int],
        dims: Sequence[int],
        lams: Sequence[float] | float,
        *,
        loss: Loss = "mse",
        bias: bool = False,
        std: float = 1.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        check_positive(**{f"dims[{i}]": dim for i, dim in enumerate(dims)})
        self.lams = _check(counts, lams, len(dims), loss)
        self.loss, classes, n = loss, len(counts), sum(counts)

        def normal(rows: int, columns: int, scale: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns, generator=generator, dtype=dtype) * scale)

        sizes = [*dims, classes]
        self.weights = nn.ParameterList(normal(b, a, std / math.sqrt(a)) for a, b in pairwise(sizes))
        self.features = normal(dims[0], n, std)
        self.bias = nn.Parameter(torch.zeros(classes, dtype=dtype)) if bias else None
        self.register_buffer("labels", torch.arange(classes).repeat_interleave(torch.tensor(counts)))

    def classifier(self) -> Tensor:
        """``W_M ... W_1``, ``(classes, features)``."""
        product = self.weights[0]
        for weight in list(self.weights)[1:]:
            product = weight @ product
        return product

    def forward(self) -> Tensor:
        """Outputs ``(classes, N)``."""
        out = self.classifier() @ self.features
        return out if self.bias is None else out + self.bias[:, None]

    def objective(self) -> Tensor:
        """The regularised loss."""
        out = self()
        if self.loss == "ce":
            fit = F.cross_entropy(out.mT, self.labels)
        else:
            target = F.one_hot(self.labels, len(out)).to(out).mT
            fit = (out - target).square().sum() / (2 * len(self.labels))
        return fit + self.balance().sum() / 2

    def balance(self) -> Tensor:
        """``lam_l ||W_l||_F^2`` of each layer, then of H: equal at every stationary point. ``(M + 1,)``."""
        parts = [*self.weights, self.features]
        return torch.stack([lam * part.square().sum() for lam, part in zip(self.lams, parts, strict=True)])

    def singular_values(self) -> Tensor:
        """Singular values of ``W_M ... W_1 H``, largest first, ``(classes,)``."""
        return torch.linalg.svdvals((self.classifier() @ self.features).detach())

    def fit(self, steps: int = 2000) -> float:
        """Minimise the objective by L-BFGS; returns its last value."""
        optimiser = torch.optim.LBFGS(
            self.parameters(),
            max_iter=steps,
            history_size=50,
            tolerance_grad=1e-11,
            tolerance_change=1e-16,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimiser.zero_grad()
            value = self.objective()
            value.backward()
            return value

        optimiser.step(closure)
        return float(self.objective().detach())


@dataclass(frozen=True)
class NCSolution:
    """A global minimiser, up to rotations.

    Attributes:
        sigma: ``(K,)`` singular values of ``W_M ... W_1 H``: of class k without bias, largest first otherwise.
        W_gram: ``(K, K)`` Gram matrix of the rows of the classifier ``W_M ... W_1``.
        H_gram: ``(K, K)`` Gram matrix of the class means of H; its diagonal holds their squared lengths.
        loss: the minimum of the objective.
        collapsed: ``(K,)`` singular values that are exactly 0.
        unique: False where a narrow layer chooses among equal singular values (the Grams are then one choice).
    """

    sigma: Tensor
    W_gram: Tensor
    H_gram: Tensor
    loss: float
    collapsed: Tensor
    unique: bool = True


def shrink(target: float, n: int, decay: float, depth: int) -> tuple[float, float]:
    """Minimise ``(s - target)^2 / (2 n) + (M+1)/2 * decay^(1/(M+1)) * s^(2/(M+1))`` over ``s >= 0``.

    Args:
        target: singular value of the target.
        n: number of examples N.
        decay: product of all M + 1 decays.
        depth: number of linear layers M.

    Returns:
        ``(s, minimum)``.  M = 1 is soft thresholding; for M >= 2 the larger stationary point is compared with 0,
        so that s jumps.
    """
    c = decay ** (1 / (depth + 1))

    def value(s: float) -> float:
        return (s - target) ** 2 / (2 * n) + (depth + 1) / 2 * c * s ** (2 / (depth + 1))

    if depth == 1:
        s = max(target - n * c, 0.0)
        return s, value(s)
    power = (depth - 1) / (depth + 1)

    def slope(s: float) -> float:  # N times the derivative; convex, least at `lowest`
        return s - target + n * c * s**-power

    lowest = (n * c * power) ** (1 / (1 + power))
    if lowest >= target or slope(lowest) >= 0:
        return 0.0, value(0.0)
    s = brentq(slope, lowest, target, xtol=1e-14, rtol=4 * torch.finfo(torch.float64).eps)
    return (s, value(s)) if value(s) < value(0.0) else (0.0, value(0.0))


def _cross_entropy_scale(n: int, classes: int, decay: float, depth: int) -> tuple[float, float]:
    """Balanced CE: the K - 1 equal singular values s of a simplex ETF, and the objective, by a scalar search."""
    c = decay ** (1 / (depth + 1))
    root = math.sqrt(n / classes)

    def value(s: float) -> float:
        fit = math.log1p((classes - 1) * math.exp(-s / root))
        return fit + (classes - 1) * (depth + 1) / 2 * c * s ** (2 / (depth + 1))

    # the penalty alone exceeds log K, the value at 0, beyond this scale
    top = (2 * math.log(classes) / ((classes - 1) * (depth + 1) * c)) ** ((depth + 1) / 2)
    grid = [top * 10 ** (-8 * i / 400) for i in range(401)]
    best = min(range(len(grid)), key=lambda i: value(grid[i]))
    low, high = grid[min(best + 1, 400)], grid[max(best - 1, 0)]
    s = float(minimize_scalar(value, bounds=(low, high), method="bounded", options={"xatol": 1e-12 * high}).x)
    return (s, value(s)) if value(s) < value(0.0) else (0.0, value(0.0))


def nc_deep_linear(
    counts: Sequence[int],
    lams: Sequence[float] | float,
    M: int,
    *,
    loss: Loss = "mse",
    bias: bool = False,
    width: int | None = None,
) -> NCSolution:
    """The global minimum of ``DeepLinearUFM`` in closed form (M = 1) or by one scalar equation a singular value.

    At a minimum ``lam_l W_l W_l^T = lam_{l+1} W_{l+1}^T W_{l+1}``, so the problem splits over the singular pairs
    ``(u_i, v_i)`` of the target Y, ``sigma_i = sqrt(n_i)``, into ``shrink``.  With ``c_i = (L s_i^2)^{1/(M+1)}``,
    L the product of the decays, every layer's i-th squared singular value is ``c_i / lam_l``.  Without bias u_i is
    class i: class means form an orthogonal frame with lengths ``c_i / (lam_H n_i)``.  A free bias removes the mean
    of every row of Y, which for balanced classes leaves a simplex ETF; so does cross-entropy.

    Args:
        counts: examples of each class.
        lams: decays of W_1..W_M and H, or one number for all.
        M: number of linear layers.
        loss: ``mse``; ``ce`` for balanced counts.
        bias: a free last bias (without effect on balanced ``ce``).
        width: smallest width r of features and hidden layers (default: wide); only the r largest values survive.

    Raises:
        PomonaError: for cross-entropy with unequal counts or with ``width < K - 1``, where no such form is known.
    """
    decays = _check(counts, lams, M, loss)
    k, n = len(counts), sum(counts)
    width = k if width is None else width
    check_positive(width=width)
    size = torch.tensor(counts, dtype=torch.float64)
    decay = math.prod(decays)
    if loss == "ce":
        if len(set(counts)) > 1:
            raise PomonaError(f"counts={tuple(counts)} must be equal for loss='ce'; use loss='mse' for imbalance")
        if width < k - 1:
            raise PomonaError(f"width={width} must be at least K-1={k - 1} for loss='ce'; use loss='mse'")
    if loss == "ce" or bias:
        # target without its row means: left vectors and values of Y J, from Y J Y^T = diag(n) - n n^T / N
        squares, u = torch.linalg.eigh(torch.diag(size) - torch.outer(size, size) / n)
        squares, u = squares.flip(0).clamp(min=0), u.flip(1)
        squares[-1] = 0
        # v_i at an example of class k: (Y J)^T u_i / sigma_i; the last pair is 0
        v = (u - (size / n) @ u) / squares.sqrt()
        v[:, -1] = 0
    else:
        squares, u, v = size, torch.eye(k, dtype=torch.float64), torch.diag(size.rsqrt())
    target = squares.sqrt()
    kept = torch.zeros(k, dtype=torch.bool)
    kept[target.argsort(descending=True, stable=True)[:width]] = True
    if loss == "ce":
        s, total = _cross_entropy_scale(n, k, decay, M)
        sigma = torch.full((k,), s, dtype=torch.float64)
        sigma[-1] = 0
    else:
        pairs = [
            shrink(float(t), n, decay, M) if use else (0.0, float(t) ** 2 / (2 * n))
            for t, use in zip(target, kept, strict=True)
        ]
        sigma = torch.tensor([s for s, _ in pairs], dtype=torch.float64)
        total = sum(minimum for _, minimum in pairs)
    c = (decay * sigma.square()) ** (1 / (M + 1))
    unique = not bool(
        torch.isclose(target[~kept, None], target[kept], rtol=1e-9, atol=1e-9).logical_and(sigma[kept] > 0).any()
    )
    return NCSolution(
        sigma,
        (u * (c**M / math.prod(decays[:M]))) @ u.mT,
        (v * (c / decays[M])) @ v.mT,
        float(total),
        sigma == 0,
        unique,
    )
