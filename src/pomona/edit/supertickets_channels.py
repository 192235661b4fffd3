"""Channels with a factor: what each costs, which are worth least, and the network without them."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pomona.edit.edit import Edit
from pomona.edit.operations import drop, grow
from pomona.errors import PomonaError
from pomona.nets.cost import flops
from pomona.nets.supernet import Branches
from pomona.trace.axis import AxisSet
from pomona.weights.space import NORM_LAYERS, Patterns, matches


def proximal(factor: Tensor, amount: Tensor | float) -> Tensor:
    """``sign(g) max(|g| - amount, 0)``, the proximal step of an absolute value; any shape."""
    return factor.sign() * F.relu(factor.abs() - amount)


def axis_of(axes: AxisSet, factor: str) -> str:
    """Name of the axis along which a norm's scale lies.

    Raises:
        PomonaError: its channels cannot be cut.
    """
    found = axes.at(factor, 0)
    return found[0].name if found else axes.require(factor).name


def channel_flops(net: nn.Module, axes: AxisSet, factors: Patterns) -> dict[str, float]:
    """FLOPs that one channel adds to the forward pass of an example, by name of the factor; none where all must stay.

    Args:
        net: the traced network.
        axes: its trace.
        factors: names of norms' scales.

    Raises:
        PomonaError: two of these scales along one axis, or one whose channels cannot be cut.
    """
    scales = [f"{name}.weight" for name, module in net.named_modules() if isinstance(module, NORM_LAYERS)]
    names = [name for name in scales if matches(name, factors)]
    single = [name for name in names if not axes.at(name, 0) and len(net.get_parameter(name)) == 1]
    axis = {name: axis_of(axes, name) for name in names if name not in single}
    if len(set(axis.values())) < len(axis):
        raise PomonaError(f"factors={factors!r} fits several norms along one axis; name one of them")
    now, x = flops(net, axes.example[0]), axes.example[0]
    cost = {name: float(flops(grow(net, axes, {at: 1}, verify=False).net, x) - now) for name, at in axis.items()}
    for name in single:  # one channel is no axis, but it may go with its branch
        home = branch_of(net, name)
        if home is not None and len(branches := net.get_submodule(home[0])) > branches.required:  # type: ignore[arg-type, operator]
            cost[name] = float(now - flops(remove(net, axes, {name: torch.tensor([0])}).net, x))
    return cost


def branch_of(net: nn.Module, factor: str) -> tuple[str, str] | None:
    """Name of the innermost :class:`pomona.nets.supernet.Branches` around a factor, and the branch's key there."""
    path = factor.split(".")
    for end in range(len(path) - 2, 0, -1):
        name = ".".join(path[:end])
        if isinstance(net.get_submodule(name), Branches):
            return name, path[end]
    return None


@torch.no_grad()
def smallest(net: nn.Module, cost: Mapping[str, float], excess: float, threshold: float = 0.0) -> dict[str, Tensor]:
    """Channels to cut, those of least ``|factor|``: all up to the threshold, and more until ``excess`` is saved.

    Where all would go, the best stays, unless it is in a branch beside which the network has another way.

    Args:
        net: the network.
        cost: FLOPs of a channel by name of the factor.
        excess: FLOPs to save.
        threshold: of factors that are worth nothing.

    Returns:
        Indices by name of the factor.
    """
    if not cost:
        return {}
    sizes = {name: net.get_parameter(name).detach().abs() for name in cost}
    groups: dict[str, list[str]] = {}
    for name in cost:
        home = branch_of(net, name)
        if home is None or net.get_submodule(home[0]).required:
            groups.setdefault(home[0] if home else name, []).append(name)
    for names in groups.values():
        best = max(names, key=lambda name: float(sizes[name].max()))
        sizes[best] = sizes[best].index_fill(0, sizes[best].argmax(), torch.inf)
    values = torch.cat(list(sizes.values()))
    costs = torch.cat([torch.full(size.shape, cost[name], dtype=torch.float64) for name, size in sizes.items()])
    order = values.argsort(stable=True)
    enough = int((costs[order].cumsum(0) < excess).sum()) + (excess > 0)
    count = min(max(int((values <= threshold).sum()), enough), int(values.isfinite().sum()))
    chosen = torch.zeros(len(values), dtype=torch.bool).index_fill(0, order[:count].cpu(), True)
    parts = zip(sizes, chosen.split([len(size) for size in sizes.values()]), strict=True)
    return {name: part.nonzero()[:, 0] for name, part in parts if part.any()}


def remove(net: nn.Module, axes: AxisSet, gone: Mapping[str, Tensor]) -> Edit:
    """Cut channels, and branches of which none is left; exact where their norm's scale and shift are zero.

    Args:
        net: the traced network; it is not changed.
        axes: its trace.
        gone: indices of channels by name of the factor.
    """
    parts, whole = {}, []
    for name, units in gone.items():
        home = branch_of(net, name)
        if home is not None and len(units) == len(net.get_parameter(name)):
            whole.append(home)
        else:
            parts[axis_of(axes, name)] = units
    edit = drop(net, axes, parts) if parts else Edit(copy.deepcopy(net))
    for branches, key in whole:
        del edit.net.get_submodule(branches)[key]  # type: ignore[operator]
    return edit
