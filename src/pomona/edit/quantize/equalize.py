"""Cross-layer equalisation: channels of neighbouring layers scaled to equal ranges, the function unchanged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pomona.edit.operations import rescale
from pomona.edit.reweigh import HOMOGENEOUS
from pomona.edit.units import batch_norms
from pomona.trace.axes import axes as trace
from pomona.trace.axis import Axis


def equalize(net: nn.Module, *example: Any, iterations: int = 20, tolerance: float = 1e-4) -> nn.Module:
    r"""Scale every unit between homogeneous functions (ReLU) so that the weights before and after it have one range.

    .. math:: s_i = \sqrt{r^{(1)}_i / r^{(2)}_i}, \qquad W^{(1)}_i \leftarrow W^{(1)}_i / s_i, \quad
              W^{(2)}_{:i} \leftarrow W^{(2)}_{:i} s_i

    with ``r`` the greatest magnitude of the unit's weights; repeated over all axes until nothing moves.

    Args:
        net: any network that can be traced, batch norms folded; it is not changed.
        example: the arguments of one forward pass.
        iterations: sweeps over the axes at most.
        tolerance: relative change of the scales that ends it.

    Source: Data-Free Quantization Through Weight Equalization and Bias Correction (arXiv 1906.04721).
    """
    found = trace(net, *example)
    chosen = [axis for axis in found if _can_scale(net, axis)]
    if not chosen:
        return net
    weights = {name: p.detach().clone() for name, p in net.named_parameters() if p.ndim > 1}
    scales = {axis.name: torch.ones(axis.size, dtype=torch.float64) for axis in chosen}
    for _ in range(iterations):
        moved = 0.0
        for axis in chosen:
            before, behind = (_reach(weights, axis, role) for role in ("out", "in"))
            dead = (before == 0) | (behind == 0)  # a unit without weights on one side has no range to share
            factor = torch.where(dead, 1.0, (behind / before.masked_fill(dead, 1)).sqrt())
            for role, by in (("out", factor), ("in", 1 / factor)):
                _scale(weights, axis, role, by)
            scales[axis.name] *= factor.double().cpu()
            moved = max(moved, float((factor - 1).abs().max()))
        if moved < tolerance:
            break
    return rescale(net, found, scales).net


def _can_scale(net: nn.Module, axis: Axis) -> bool:
    roles = {place.role for place in axis.places}
    free = not axis.tied and not axis.coupled and set(axis.between) <= HOMOGENEOUS
    return free and {"out", "in"} <= roles and not batch_norms(net, axis)


def _reach(weights: dict[str, Tensor], axis: Axis, role: str) -> Tensor:
    """(units,) the greatest magnitude of the weights in that role."""
    parts = [
        weights[place.name].movedim(place.dim, 0)[place.index].abs().flatten(1).amax(1)
        for place in axis.places
        if place.role == role and place.name in weights
    ]
    return torch.stack(parts).amax(0)


def _scale(weights: dict[str, Tensor], axis: Axis, role: str, factor: Tensor) -> None:
    for place in axis.places:
        if place.role == role and place.name in weights:
            weight = weights[place.name].movedim(place.dim, 0)  # a view: written in place
            index = place.index.to(weight.device)
            weight[index] *= factor.to(weight).view(-1, *[1] * weight.ndim)
