"""Steps of a sequence to one vector."""

from __future__ import annotations

import torch
from torch import Tensor

from pomona.errors import unknown

REDUCTIONS = ("sum", "mean", "max", "last", "none")


def reduce_steps(x: Tensor, how: str, present: Tensor | None = None) -> Tensor:
    """(B, T, D) to (B, D) by sum, mean, max or last over the steps where ``present`` (B, T); 0 where there is none."""
    if present is None:
        present = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    weight = present.unsqueeze(-1).to(x.dtype)
    if how == "max":
        highest = x.masked_fill(~present.unsqueeze(-1), torch.finfo(x.dtype).min).amax(1)
        return highest * present.any(1, keepdim=True).to(x.dtype)
    if how == "last":
        steps = torch.arange(1, x.shape[1] + 1, device=x.device)
        last = (present * steps).amax(1, keepdim=True)  # 0 where no step is there
        return (x * (steps == last).unsqueeze(-1).to(x.dtype)).sum(1)
    total = (x * weight).sum(1)
    return total / weight.sum(1).clamp(min=1) if how == "mean" else total


def reduction(field: str, how: str | None) -> str:
    """The name of a reduction, ``none`` for None.

    Raises:
        PomonaError: for one that there is none of.
    """
    if (how or "none") not in REDUCTIONS:
        raise unknown(field, how, REDUCTIONS)
    return how or "none"
