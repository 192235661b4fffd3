"""Optimiser state and masks carried along with an edit."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pomona.edit.apply import tensors
from pomona.edit.edit import Edit
from pomona.edit.masks import Masks
from pomona.errors import PomonaError


def carried(value: Tensor, dims: Mapping[int, Tensor], shape: torch.Size, new: float = 0.0) -> Tensor:
    """``value`` with its entries where an edit put them, and ``new`` where there was none.

    Args:
        value: a tensor beside a parameter: of the parameter's shape, or with single entries along some dimensions.
        dims: ``edit.maps`` of the parameter.
        shape: of the parameter before the edit.
        new: what the new entries hold.
    """
    for dim, index in dims.items():
        if value.ndim == len(shape) and value.shape[dim] == shape[dim]:
            index = index.to(value.device)
            value = value.index_select(dim, index.clamp(min=0)).index_fill(dim, (index < 0).nonzero()[:, 0], new)
    return value.clone()


def transport(optimizer: torch.optim.Optimizer, net: nn.Module, edit: Edit) -> torch.optim.Optimizer:
    """An optimiser of the edited network that goes on where that of the old one was.

    Moments (Adam, momentum, RMSprop, ...) follow their entries, copies get copies, and new entries begin at zero.
    Groups and their settings stay. Parameters that the old network had not (learnable gates, untied copies) join the
    last group.

    Args:
        optimizer: any of ``torch.optim``, over parameters of ``net``.
        net: the network before the edit.
        edit: what was done to it.

    Raises:
        PomonaError: the optimiser holds parameters that are not the network's.

    Example:
        >>> edit = take(net, axes, 0.5)                     # doctest: +SKIP
        >>> optimizer = transport(optimizer, net, edit)     # doctest: +SKIP
    """
    names = {id(p): name for name, p in reversed(list(net.named_parameters(remove_duplicate=False)))}
    after = {key: find(edit.net, name) for key, name in names.items()}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        strangers = [tuple(p.shape) for p in group["params"] if id(p) not in names]
        if strangers:
            raise PomonaError(f"the optimizer holds a parameter of shape {strangers[0]} that the network has not")
        groups.append({**group, "params": [new for p in group["params"] if (new := after[id(p)]) is not None]})
    known = {id(p) for p in after.values()}
    groups[-1]["params"] += [p for p in edit.net.parameters() if id(p) not in known]
    moved = copy.copy(optimizer)
    state: dict[Any, dict[str, Any]] = defaultdict(dict)
    for p, old in optimizer.state.items():
        dims = edit.maps.get(names[id(p)], {})
        if after[id(p)] is not None:
            state[after[id(p)]] = {
                key: carried(value, dims, p.shape) if isinstance(value, Tensor) else copy.deepcopy(value)
                for key, value in old.items()
            }
    moved.__setstate__({"defaults": dict(optimizer.defaults), "state": state, "param_groups": groups})
    return moved


def find(net: nn.Module, name: str) -> Tensor | None:
    """The parameter or buffer of that name, also where a parametrization holds it by now."""
    every = tensors(net)
    return every.get(name, every.get(_within(name)))


def _within(name: str) -> str:
    """What a parameter is called once a parametrization holds it."""
    prefix, _, leaf = name.rpartition(".")
    return f"{prefix}.parametrizations.{leaf}.original".lstrip(".")


def transport_masks(masks: Masks | Mapping[str, Tensor], edit: Edit) -> dict[str, Tensor]:
    """Masks by parameter name for the edited network; new entries are kept (True).

    Raises:
        PomonaError: a mask has not the shape of the parameter that was edited.
    """
    moved = {}
    for name, mask in (masks.state() if isinstance(masks, Masks) else masks).items():
        dims = edit.maps.get(name) or edit.maps.get(_within(name), {})
        moved[name] = carried(mask, dims, mask.shape, True)
        wanted = find(edit.net, name)
        if wanted is None or wanted.shape != moved[name].shape:
            shape = None if wanted is None else tuple(wanted.shape)
            raise PomonaError(f"mask of {name!r} would have shape {tuple(moved[name].shape)}; the network has {shape}")
    return moved
