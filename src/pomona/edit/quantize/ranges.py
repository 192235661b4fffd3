"""Which range of values the levels shall cover."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pomona.edit.quantize.quantizer import Quantizer

Range = Callable[[Tensor, "Quantizer"], tuple[Tensor, Tensor]]
"""``range(rows, quantizer) -> low, high`` of (rows, n) values, (rows, 1) each."""


def minmax(rows: Tensor, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """The least and the greatest value."""
    low, high = rows.aminmax(dim=1, keepdim=True)
    return low, high


def percentile(rows: Tensor, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """All but the most extreme values on either side."""
    rank = round(quantizer.percentile / 100 * (rows.shape[1] - 1)) + 1
    low = rows.kthvalue(rows.shape[1] + 1 - rank, dim=1, keepdim=True).values
    return low, rows.kthvalue(rank, dim=1, keepdim=True).values


def mse(rows: Tensor, quantizer: Quantizer, candidates: int = 100) -> tuple[Tensor, Tensor]:
    """The shrunk range, out of ``candidates`` equal steps, of least squared error."""
    low, high = minmax(rows, quantizer)
    least = torch.full_like(low, torch.inf)
    shrink = torch.ones_like(low)
    for factor in torch.linspace(1, 1 / candidates, candidates).tolist():
        grid = quantizer.uniform(low * factor, high * factor)
        error = (grid.decode(grid.encode(rows)) - rows).square().mean(1, keepdim=True)
        shrink = torch.where(error < least, factor, shrink)
        least = torch.minimum(error, least)
    return low * shrink, high * shrink


def entropy(rows: Tensor, quantizer: Quantizer, bins: int = 2048, candidates: int = 128) -> tuple[Tensor, Tensor]:
    """The clip of magnitudes whose quantised histogram has the least Kullback-Leibler divergence from the histogram."""
    low, high = minmax(rows, quantizer)
    most = torch.maximum(-low, high).clamp_min(torch.finfo(rows.dtype).tiny)
    index = (rows.abs() / most * bins).long().clamp_max(bins - 1)
    histogram = torch.zeros(len(rows), bins, dtype=torch.float64, device=rows.device)
    histogram.scatter_add_(1, index, torch.ones_like(rows, dtype=torch.float64))
    halves = 1 + bool(quantizer.signed if quantizer.symmetric else low.min() < 0)
    buckets = (quantizer.qmax - quantizer.qmin + 1) // halves
    least = torch.full_like(most, torch.inf, dtype=torch.float64)
    kept = torch.ones_like(most)
    for count in range(bins, min(buckets, bins) - 1, -max(1, (bins - buckets) // candidates)):
        inside = histogram[:, :count]
        reference = inside.clone()
        reference[:, -1] += histogram[:, count:].sum(1)
        bucket = (torch.arange(count, device=rows.device) * buckets // count).expand_as(inside)
        filled = (inside > 0).double()
        mass, number = (torch.zeros_like(histogram).scatter_add_(1, bucket, part) for part in (inside, filled))
        spread = filled * mass.gather(1, bucket) / number.gather(1, bucket).clamp_min(1)
        p, q = (part / part.sum(1, keepdim=True).clamp_min(1) for part in (reference, spread))
        divergence = torch.special.xlogy(p, p / q.clamp_min(1e-12)).sum(1, keepdim=True)
        kept = torch.where(divergence < least, count / bins, kept)
        least = torch.minimum(divergence, least)
    return torch.maximum(low, -most * kept), torch.minimum(high, most * kept)


RANGES: dict[str, Range] = {
    "minmax": minmax,
    "percentile": percentile,
    "mse": mse,
    "entropy": entropy,
    "ema": minmax,  # of one tensor; the average runs over batches
}
