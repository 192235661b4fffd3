"""From the worth of single weights to whole units: neurons, channels and heads that go, and a smaller network.

Source: Ten Lessons We Have Learned in the New "Sparseland" (arXiv 2302.02596).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from scipy.optimize import brentq
from torch import Tensor, nn

from pomona.edit.edit import Edit
from pomona.edit.masks import prunable
from pomona.edit.operations import take
from pomona.edit.units import cut_once
from pomona.errors import PomonaError, unknown
from pomona.trace.axes import axes
from pomona.trace.axis import AxisSet

Pool = Literal["sum", "l2", "max"]
_POOLS = {
    "sum": lambda values: values.sum(1),
    "l2": lambda values: values.square().sum(1).sqrt(),
    "max": lambda values: values.amax(1),
}


def pooled_scores(traced: AxisSet, scores: Mapping[str, Tensor], pool: Pool = "sum") -> dict[str, Tensor]:
    """Scores of units by axis, pooled over all scored weights that produce a unit or read it.

    Args:
        traced: the network's axes.
        scores: of weights by parameter name, see :mod:`pomona.edit.criteria`.
        pool: ``sum``, ``l2`` or ``max``.

    Returns:
        ``(units,)`` float64 by name of the axis.
    """
    if pool not in _POOLS:
        raise unknown("pool", pool, _POOLS)
    found = {}
    for axis in traced:
        parts = [torch.zeros(axis.size, 1, dtype=torch.float64)]
        for place in axis.places:
            if place.name in scores:
                score = scores[place.name].detach().cpu().double().movedim(place.dim, 0)
                parts.append(score[place.index.flatten()].reshape(axis.size, -1))
        found[axis.name] = _POOLS[pool](torch.cat(parts[1:] or parts, 1))
    return found


def _size_at(traced: AxisSet, shapes: Mapping[str, torch.Size], keep: float) -> int:
    """Weights that are left when every axis keeps a share of its units."""
    left = {name: list(shape) for name, shape in shapes.items()}
    for name in cut_once(traced, keep):
        axis = traced[name]
        gone = axis.size - axis.groups * max(1, round(keep * (axis.size // axis.groups)))
        for place in axis.places:
            if place.name in left:
                left[place.name][place.dim] -= gone * place.index.shape[1]
    return sum(torch.Size(shape).numel() for shape in left.values())


def take_units(
    net: nn.Module, example: Tensor, scores: Mapping[str, Tensor], weights: float, pool: Pool = "sum"
) -> Edit:
    """Cut units, the same share of every axis, until the prunable weights number about ``weights``.

    Args:
        net: any network that can be traced; not changed.
        example: ``(batch, ...)``.
        scores: of its weights by name; the units whose weights are worth least go.
        weights: how many to keep, in whole units; the nearest share is taken.
        pool: see :func:`pooled_scores`.

    Raises:
        PomonaError: if there is nothing to cut, or not enough.
    """
    traced = axes(net, example)
    shapes = {name: weight.shape for name, weight in prunable(net).items()}
    if not len(traced):
        raise PomonaError(
            "structure='unit' finds no units that could go: every axis is fixed; see axes(net, example).fixed"
        )
    if weights >= _size_at(traced, shapes, 1.0):
        return take(net, traced, 1.0)
    least = _size_at(traced, shapes, 1e-9)
    if weights < least:
        raise PomonaError(f"one unit of every axis still has {least} weights; density must leave at least as many")
    keep = brentq(lambda share: _size_at(traced, shapes, share) - weights, 1e-9, 1.0, xtol=1e-6)
    return take(net, traced, keep, by=pooled_scores(traced, scores, pool))
