r"""Soft permutations that descend the squared distance of two networks' weights, and are rounded at the end.

.. math:: P = \lim_k \mathcal S^k(e^{X / \tau}), \qquad \min_X \lVert \theta_a - P(\theta_b) \rVert^2

Source: Re-basin via implicit Sinkhorn differentiation (arXiv 2212.12042).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pomona.edit.matching import Orders, State, assign
from pomona.errors import PomonaError
from pomona.trace.axis import Axis, AxisSet


def sinkhorn(scores: Tensor, tau: float, rounds: int = 20) -> Tensor:
    """A nearly doubly stochastic matrix (or a batch of them) from scores: rows and columns normalised in turn."""
    log = scores / tau
    for _ in range(rounds):
        log = log - log.logsumexp(-1, keepdim=True)
        log = log - log.logsumexp(-2, keepdim=True)
    return log.exp()


def soft_match(
    axes: AxisSet,
    a: State,
    b: State,
    learned: Callable[[str], bool],
    *,
    steps: int,
    generator: torch.Generator,
    tau: float = 1.0,
    lr: float = 0.1,
) -> Orders:
    """Orders of the units of every axis by gradient descent on soft permutations.

    Attention heads and other bundles keep their places: only the units within them are permuted.

    Args:
        axes, a, b, learned: as in :mod:`pomona.edit.matching`.
        steps: of Adam.
        generator: of the first scores.
        tau: temperature at the start; it falls to a tenth.
        lr: of the scores.

    Raises:
        PomonaError: no axis of units.
    """
    units = [axis for axis in axes if axis.kind == "unit"]
    if not units:
        raise PomonaError("the network has no axis of units to permute")
    wide = {name: (one.double(), b[name].double()) for name, one in a.items() if learned(name)}
    scores = {
        axis.name: (
            0.01 * torch.randn(axis.groups, *[axis.size // axis.groups] * 2, generator=generator, dtype=torch.float64)
        ).requires_grad_()
        for axis in units
    }
    optimizer = torch.optim.Adam(list(scores.values()), lr=lr)
    for step in range(steps):
        heat = tau * 0.1 ** (step / max(1, steps - 1))
        soft = {name: torch.block_diag(*sinkhorn(x, heat)) for name, x in scores.items()}
        moved = {name: other for name, (_, other) in wide.items()}
        for axis in units:
            moved = _mixed(moved, axis, soft[axis.name])
        distance = sum(((one - moved[name]) ** 2).sum() for name, (one, _) in wide.items())
        optimizer.zero_grad()
        distance.backward()  # type: ignore[union-attr]
        optimizer.step()
    orders = {axis.name: torch.arange(axis.size) for axis in axes}
    for axis in units:
        run = axis.size // axis.groups
        parts = [assign(x)[0] + g * run for g, x in enumerate(scores[axis.name].detach())]
        orders[axis.name] = torch.cat(parts)
    return orders


def _mixed(state: dict[str, Tensor], axis: Axis, soft: Tensor) -> dict[str, Tensor]:
    """Unit i of each tensor becomes sum_j P_ij of unit j."""
    state = dict(state)
    for place in axis.places:
        if place.name not in state:
            continue
        tensor = state[place.name].movedim(place.dim, 0)
        new = tensor.clone()
        new[place.index] = torch.einsum("ij,j...->i...", soft, tensor[place.index])
        state[place.name] = new.movedim(0, place.dim)
    return state
