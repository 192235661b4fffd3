"""Generalised block-low-rank weights, whose blocks learn where they lie and how large they are.

Source: Differentiable Learning of Generalized Structured Matrices for Efficient Deep Neural Networks, arXiv 2310.18882.
"""

from __future__ import annotations

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import check_positive, unknown
from pomona.nn.banded import BandedLinear
from pomona.nn.structured import StructuredLinear

NEGLIGIBLE = 1e-3
"""Entries of a mask below this are zero in evaluation."""


def gaudi_mask(width: Tensor, location: Tensor, n: int, sigma: Tensor | float = math.inf) -> Tensor:
    """Gaussian-Dirichlet masks: circular boxes on n points, smoothed by a Gaussian of width n / (2 pi sigma) points.

    M_f = w sinc(f w) / sinc(f / n) exp(-f^2 / (2 sigma^2)) exp(-2 pi i f l + pi i f (1 / n - w)),  m = n irfft(M)

    With sigma = inf and n w, n l whole numbers, m is 1 at the n w points from n l on and 0 elsewhere. The mean of m
    is w for every sigma.

    Args:
        width: w (...), as a fraction of n.
        location: l (...), where the box starts, as a fraction of n.
        n: points.
        sigma: in cycles a circle; inf for sharp boxes.

    Returns:
        (..., n)
    """
    dtype = torch.promote_types(width.dtype, torch.float32)  # no half-precision Fourier transform on every device
    f = math.pi * torch.arange(1, n // 2 + 1, device=width.device, dtype=dtype)
    w, start = width.to(dtype)[..., None], location.to(dtype)[..., None]
    smooth = torch.exp(-(f / math.pi).square() / (2 * sigma**2)) / (n * torch.sin(f / n))
    size = torch.sin(f * w) * smooth  # w sinc(f w) / sinc(f / n), without the slow gradient of sinc
    angle = f * (1 / n - w - 2 * start)
    real, imaginary = torch.cat([w, size * angle.cos()], -1), F.pad(size * angle.sin(), (1, 0))
    spectrum = torch.complex(real, imaginary)
    return torch.fft.irfft(spectrum, n, norm="forward").to(width.dtype)


class GaudiGBLR(StructuredLinear):
    """A linear layer made of K blocks of rank r on boxes of rows and columns that are learned and may overlap.

    W = sum_k (m_out,k * U_k)(m_in,k * V_k)^T,  m = gaudi_mask(width, location)

    The class contains low rank (all boxes full), block-diagonal, block-sparse and block-low-rank matrices. Widths and
    locations are rounded to whole points, gradients passing straight through. After each step of the optimiser
    `post_step` shrinks the widths until the blocks cost what ``cost`` says, and makes the masks sharper. In evaluation
    the masks are fixed, and what is narrower than a point or below 0.001 is zero; `compact` multiplies by the rest.

    Args:
        in_features, out_features, bias: as in `StructuredLinear`.
        r: rank of a block.
        rank_ratio: K r over the smaller side of W.
        cost: FLOPs aimed at, over those of a dense layer.
        sigma: sharpness of the masks at the start.
        sigma_end, anneal_steps: it rises to this, linearly over so many steps (0: not at all), and is inf from then on.
        width_init: 'splr' (sparse plus low rank: half of the cost in full boxes, the rest narrow ones alike),
            'uniform', or a number.
        loc_init: 'spread' (even over both sides, paired at random), 'linspace' (even, along the diagonal), 'uniform',
            or a number.
        shrink: most that a step takes off a width.
        lr_scale: learning rate of widths and locations over that of the rest. In the paper these have a rate of 0.005
            by Adam without momentum.
        generator: source of the initial values.

    U and V are normal; for inputs of unit variance outputs have a mean square of 1.

    Shape:
        (*, in_features) -> (*, out_features)

    Raises:
        PomonaError: for a size out of range or an unknown initialisation.

    Source: Differentiable Learning of Generalized Structured Matrices for Efficient Deep Neural Networks, arXiv
    2310.18882.
    """

    sigma: Tensor
    tunable = {"cost": [0.125, 0.25, 0.5]}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 1,
        rank_ratio: float = 1.0,
        cost: float = 0.5,
        bias: bool = True,
        *,
        sigma: float = 1.0,
        sigma_end: float = 100.0,
        anneal_steps: int = 1000,
        width_init: str | float = "splr",
        loc_init: str | float = "spread",
        shrink: float = 1e-3,
        lr_scale: float = 2.5,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive(r=r, rank_ratio=rank_ratio, cost=cost, sigma=sigma, sigma_end=sigma_end, lr_scale=lr_scale)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.r, self.cost, self.shrink, self.lr_scale = r, cost, shrink, lr_scale
        self.sigma_end = sigma_end
        self.anneal = (sigma_end - sigma) / anneal_steps if anneal_steps else 0.0
        self.blocks = max(1, int(rank_ratio * min(in_features, out_features) / r))
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.register_buffer("sigma", torch.tensor(float(sigma), **factory))
        self.width = nn.Parameter(self._widths(width_init, factory, generator))
        self.location = nn.Parameter(self._locations(loc_init, factory, generator))
        with torch.no_grad():
            m_out, m_in = (m.square().sum(-1) for m in self._hard_masks(0.0))
            # mean over outputs of sum_k r Var(U) Var(V) |m_out,k|^2 |m_in,k|^2
            total = r * (m_out @ m_in) / out_features
            std = total.clamp(min=1e-12).item() ** -0.25 if not total.is_meta else 1.0
        self.u = nn.Parameter(torch.empty(self.blocks, r, out_features, **factory).normal_(0, std, generator=generator))
        self.v = nn.Parameter(torch.empty(self.blocks, r, in_features, **factory).normal_(0, std, generator=generator))

    @property
    def full_cost(self) -> float:
        """FLOPs with all boxes full, over those of a dense layer."""
        sides = (self.in_features, self.out_features)
        return self.blocks * self.r * sum(sides) / math.prod(sides)

    def _widths(self, init: str | float, factory: dict[str, Any], generator: torch.Generator | None) -> Tensor:
        """(2, K), of rows and of columns, in whole points."""
        width = torch.empty(2, self.blocks, **factory)
        if init == "splr":
            mean = min(1.0, self.cost / self.full_cost)
            full = int(self.blocks * mean / 2)
            width.fill_((mean * self.blocks - full) / (self.blocks - full))
            width[:, :full] = 1
        elif init == "uniform":
            width.uniform_(generator=generator)
        elif isinstance(init, str):
            raise unknown("width_init", init, ("splr", "uniform"))
        else:
            width.fill_(init)
        return self._whole(width)

    def _locations(self, init: str | float, factory: dict[str, Any], generator: torch.Generator | None) -> Tensor:
        location = torch.empty(2, self.blocks, **factory)
        even = torch.arange(self.blocks, **factory) / self.blocks
        if init == "uniform":
            location.uniform_(generator=generator)
        elif init in ("linspace", "spread"):
            location[:] = even
            if init == "spread":
                order = torch.randperm(self.blocks, generator=generator, device=None if generator else even.device)
                location[1] = even[order.to(even.device)]
        elif isinstance(init, str):
            raise unknown("loc_init", init, ("spread", "linspace", "uniform"))
        else:
            location.fill_(init)
        return self._whole(location)

    def _points(self) -> Tensor:
        """(2, 1): how many rows and columns W has."""
        return self.sigma.new_tensor([[self.out_features], [self.in_features]])

    def _whole(self, fraction: Tensor) -> Tensor:
        points = self._points()
        return (fraction * points).round() / points

    def _hard_masks(self, negligible: float) -> tuple[Tensor, Tensor]:
        """Masks of rows (K, out) and columns (K, in) with what is narrow or small set to 0; without gradient."""
        width, location = self.width.detach(), self._whole(self.location.detach())
        # rounding keeps the slack of a box of one point from turning on the last bit
        width = self._whole(width) * (width * self._points() > 1 - 1e-3)
        sides = (self.out_features, self.in_features)
        masks = (gaudi_mask(w, at, n, self.sigma) for w, at, n in zip(width, location, sides, strict=True))
        m_out, m_in = (torch.where(mask.abs() < negligible, 0, mask) for mask in masks)
        return m_out, m_in

    def masks(self) -> tuple[Tensor, Tensor]:
        """Masks of rows (K, out_features) and of columns (K, in_features)."""
        if not self.training:
            return self._hard_masks(NEGLIGIBLE)
        width, location = (p + (self._whole(p) - p).detach() for p in (self.width, self.location))
        m_out = gaudi_mask(width[0], location[0], self.out_features, self.sigma)
        return m_out, gaudi_mask(width[1], location[1], self.in_features, self.sigma)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Masked U (K r, out_features) and V (K r, in_features)."""
        m_out, m_in = self.masks()
        return (m_out[:, None] * self.u).flatten(0, 1), (m_in[:, None] * self.v).flatten(0, 1)

    def weight(self) -> Tensor:
        """sum_k (m_out,k * U_k)(m_in,k * V_k)^T."""
        u, v = self.factors()
        return u.T @ v

    def product(self, x: Tensor) -> Tensor:
        """U (V^T x), or through the dense W where the batch is so large that this costs less."""
        u, v = self.factors()
        rows, dense = x.numel() // self.in_features, self.in_features * self.out_features
        if rows * self.full_cost * dense > len(u) * dense + rows * dense:
            return F.linear(x, u.T @ v)
        return F.linear(x, v) @ u

    @torch.no_grad()
    def project_(self, matrix: Tensor) -> Self:
        """All boxes full, and U V^T the nearest matrix of rank K r (truncated SVD); `post_step` then shrinks."""
        self.check_matrix(matrix)
        self.width.fill_(1)
        rank = min(self.blocks * self.r, *matrix.shape)
        left, s, right = torch.linalg.svd(matrix, full_matrices=False)
        root = s[:rank].sqrt()
        self.u.zero_().flatten(0, 1)[:rank] = (left[:, :rank] * root).T
        self.v.zero_().flatten(0, 1)[:rank] = root[:, None] * right[:rank]
        return self

    @torch.no_grad()
    def post_step(self) -> None:
        """Shrink, w <- clip(softshrink(w, t), 0, 1), by ``shrink`` or as much as the cost asks; l <- l mod 1."""
        self.width.clamp_(0, 1)
        weight = self._points().expand_as(self.width).flatten()
        order = self.width.flatten().argsort(descending=True)
        price, width = weight[order].cumsum(0), (weight * self.width.flatten())[order].cumsum(0)
        # the threshold if the k widest stay: they then cost as much as they may
        allowed = self.cost * self.in_features * self.out_features / self.r
        threshold = ((width - allowed) / price).max().clamp(0, self.shrink)
        self.width.copy_((self.width - threshold).clamp(min=0))
        self.location.remainder_(1)
        sharper = self.sigma + self.anneal
        self.sigma.copy_(torch.where(sharper > self.sigma_end, math.inf, sharper) if self.anneal else sharper)

    def param_groups(self) -> list[dict[str, Any]]:
        """Widths and locations: their own rate, no decay."""
        return [{"params": [self.width, self.location], "lr_scale": self.lr_scale, "weight_decay": 0.0}]

    @torch.no_grad()
    def usage(self) -> dict[str, Any]:
        """Where the boxes lie: first points and sizes (K, 2) of rows and columns, and the cost over a dense layer's."""
        points = self._points()
        return {
            "start": (self._whole(self.location) * points).T.round().long(),
            "size": (self._whole(self.width) * points).T.round().long(),
            "cost": self.flops() / (2 * self.in_features * self.out_features),
        }

    @torch.no_grad()
    def flops(self, batch: int = 1) -> int:
        """Two for each entry of U and V that the masks of evaluation leave, a row."""
        m_out, m_in = self._hard_masks(NEGLIGIBLE)
        there = (m_out != 0).any(-1) & (m_in != 0).any(-1)
        return 2 * batch * self.r * int((m_out[there] != 0).sum() + (m_in[there] != 0).sum())

    @torch.no_grad()
    def compact(self) -> BandedLinear:
        """The layer for inference: the entries under the masks only, gathered into few small dense products."""
        training = self.training
        u, v = self.eval().factors()
        self.train(training)
        return BandedLinear(u, v, self.bias)

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        return f"{super().extra_repr()}, blocks={self.blocks}, r={self.r}, cost={self.cost}"
