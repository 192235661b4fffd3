"""Assignments of one network's units to another's, axis by axis: the algorithm under :mod:`pomona.edit.git_rebasin`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pomona.trace.axis import Axis, AxisSet
from pomona.trace.check import permuted

Orders = dict[str, Tensor]
"""Axis name -> at each position of network a the unit of network b that goes there."""
State = Mapping[str, Tensor]
Gains = Callable[[Axis, State, State], Tensor]
"""(axis, state of a, state of b as permuted so far) -> (units, units) gain of putting b's unit j at a's unit i."""


def arrange(state: State, axes: AxisSet, orders: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State of b with its units in ``orders``: whole blocks first, then the units within them."""
    blocks = [axis for axis in axes if axis.kind == "block" and axis.name in orders]
    units = [axis for axis in axes if axis.kind == "unit" and axis.name in orders]
    return permuted(permuted(state, blocks, orders), units, orders)


def rows(state: State, axis: Axis, place_of: Callable[[str], bool] = lambda name: True) -> Tensor:
    """(units, features): all that belongs to each unit of an axis, one after the other, in float64."""
    parts = []
    for place in axis.places:
        if place_of(place.name):
            tensor = state[place.name].movedim(place.dim, 0).double()
            parts.append(tensor[place.index.to(tensor.device)].reshape(axis.size, -1))
    return torch.cat(parts, 1) if parts else torch.zeros(axis.size, 0, dtype=torch.float64)


def weight_gains(learned: Callable[[str], bool]) -> Gains:
    r"""Inner products of what belongs to the units: :math:`A_{ij} = \langle w^a_i, w^b_j \rangle`."""
    return lambda axis, a, b: rows(a, axis, learned) @ rows(b, axis, learned).T


def inner_of(axes: AxisSet, block: Axis) -> list[Axis]:
    """The axes whose runs lie inside the bundles of ``block``."""
    own = {(p.name, p.dim): p.index for p in block.places}

    def inside(axis: Axis) -> bool:
        run = axis.size // axis.groups
        return axis.kind == "unit" and axis.groups == block.size and all(
            (p.name, p.dim) in own
            and all(
                torch.isin(p.index[g * run : (g + 1) * run], own[p.name, p.dim][g]).all() for g in range(block.size)
            )
            for p in axis.places
        )  # fmt: skip

    return [axis for axis in axes if inside(axis)]


def assign(gain: Tensor) -> tuple[Tensor, float]:
    """The best permutation for a gain matrix, and its total."""
    index, order = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
    return torch.as_tensor(order), float(gain[torch.as_tensor(index), torch.as_tensor(order)].sum())


def assign_runs(gain: Tensor, groups: int) -> Tensor:
    """The best permutation that stays within each of ``groups`` equal runs."""
    run = len(gain) // groups
    parts = [assign(gain[g * run : (g + 1) * run, g * run : (g + 1) * run])[0] + g * run for g in range(groups)]
    return torch.cat(parts)


def assign_block(block: Axis, inner: list[Axis], gains: Gains, a: State, b: State) -> Orders:
    """Whole bundles assigned by the gain that the best order within them gives, and that order with them."""
    count = block.size
    covered = {(p.name, p.dim) for axis in inner for p in axis.places}
    rest = Axis(block.name, "block", count, tuple(p for p in block.places if (p.name, p.dim) not in covered))
    total = gains(rest, a, b) if rest.places else torch.zeros(count, count, dtype=torch.float64)
    within: dict[str, dict[tuple[int, int], Tensor]] = {}
    for axis in inner:
        run, gain = axis.size // count, gains(axis, a, b)
        within[axis.name] = {}
        for g, h in product(range(count), repeat=2):
            order, value = assign(gain[g * run : (g + 1) * run, h * run : (h + 1) * run])
            within[axis.name][g, h] = order
            total[g, h] += value
    bundles, _ = assign(total)
    orders = {block.name: bundles}
    for axis in inner:
        run = axis.size // count
        orders[axis.name] = torch.cat(
            [within[axis.name][g, int(h)] + g * run for g, h in enumerate(bundles)]
        )  # after the bundles have moved, run g holds what was run h
    return orders


def assign_once(axes: AxisSet, gains: Gains, a: State, b: State) -> Orders:
    """One assignment an axis, for gains that do not depend on the other axes' orders."""
    orders: Orders = {}
    bundles = {axis.name: inner_of(axes, axis) for axis in axes if axis.kind == "block"}
    members = {axis.name for inner in bundles.values() for axis in inner}
    for axis in axes:
        if axis.kind == "block":
            orders |= assign_block(axis, bundles[axis.name], gains, a, b)
        elif axis.name not in members:
            orders[axis.name] = assign_runs(gains(axis, a, b), axis.groups)
    return orders


def coordinate_ascent(
    axes: AxisSet,
    a: State,
    b: State,
    gains: Gains,
    objective: Callable[[State, State], float],
    sweeps: int,
    generator: torch.Generator,
) -> tuple[Orders, list[float]]:
    """Assign one axis after another, in random order, until none gains.

    A step that would lower the objective (an axis that lies along both sides of one matrix makes the true problem
    quadratic) is not taken, so the objective never falls.

    Returns:
        The orders, and the objective before the first step and after each one taken.
    """
    orders = {axis.name: torch.arange(axis.size) for axis in axes}
    bundles = {axis.name: inner_of(axes, axis) for axis in axes if axis.kind == "block"}
    members = {axis.name for inner in bundles.values() for axis in inner}
    todo = [axis for axis in axes if axis.name not in members]
    now = dict(b)
    history = [objective(a, now)]
    for _ in range(sweeps):
        gained = False
        for at in torch.randperm(len(todo), generator=generator).tolist():
            axis = todo[at]
            if axis.kind == "block":
                step = assign_block(axis, bundles[axis.name], gains, a, now)
            else:
                step = {axis.name: assign_runs(gains(axis, a, now), axis.groups)}
            tried = arrange(now, axes, step)
            value = objective(a, tried)
            if value > history[-1] + 1e-12 * max(1.0, abs(history[-1])):
                now, gained = tried, True
                history.append(value)
                _follow(orders, step, axes)
        if not gained:
            break
    return orders, history


def _follow(orders: Orders, step: Orders, axes: AxisSet) -> None:
    """Compose a step with what was done before.

    Units inside moved bundles were in the bundles' old places, so their orders move along before they are composed.
    """
    for name, order in step.items():
        if axes[name].kind == "block":
            for axis in inner_of(axes, axes[name]):
                run = axis.size // axis.groups
                offset = orders[axis.name].view(axis.groups, run) - torch.arange(axis.groups).unsqueeze(1) * run
                moved = offset[order] + torch.arange(axis.groups).unsqueeze(1) * run
                orders[axis.name] = moved.flatten()
    for name, order in step.items():
        orders[name] = orders[name][order]
