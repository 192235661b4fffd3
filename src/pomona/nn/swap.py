"""Another layer in the place of every layer of a kind, in any network, and what that changes in cost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pomona import options
from pomona.errors import PomonaError, unknown
from pomona.nn.activation import is_activation

Where = str | type[nn.Module] | tuple[type[nn.Module], ...] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Change:
    """One layer that was replaced: its name, both layers' classes, and their costs as (before, after).

    ``flops`` is of one forward pass of one example, None where no example was given.
    """

    name: str
    old: str
    new: str
    parameters: tuple[int, int]
    flops: tuple[int, int] | None = None


@dataclass(frozen=True)
class Swapped:
    """The new network and the table of what was replaced in it."""

    net: nn.Module
    table: list[Change]

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "was", "is", "parameters", "FLOPs")]
        rows += [(c.name or "net", c.old, c.new, _pair(c.parameters), _pair(c.flops)) for c in self.table]
        total = [
            (sum(a for a, _ in pairs), sum(b for _, b in pairs)) if pairs else None
            for pairs in ([c.parameters for c in self.table], [c.flops for c in self.table if c.flops])
        ]
        rows.append(("all", "", "", *map(_pair, total)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _pair(values: tuple[int, int] | None) -> str:
    return "" if values is None else f"{values[0]:,} -> {values[1]:,}"


def swap(
    net: nn.Module,
    where: Where,
    make: str | Callable[[nn.Module], nn.Module | None],
    *,
    example: Tensor | tuple[Any, ...] | None = None,
) -> Swapped:
    """A copy of a network with other layers in chosen places.

    >>> swap(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), "linear", "low_rank:rank=2").net[0].rank
    2

    Args:
        net: any network; it stays as it is.
        where: a slot (``linear``, ``conv``, ``act``, ``norm``, ``pool``), a class or several, a pattern of names such
            as ``blocks.*.fc1``, or ``where(name, module)``.
        make: ``make(old)`` gives the new layer, or None to leave the old one; or the name of an option of the slot, as
            in a candidate: ``kan:grid=8``. The new layer is put on the old one's device, dtype and mode.
        example: an input, or a tuple of them, by which FLOPs are counted and the new network is tried.

    A layer with two names is replaced once. A weight that was tied between a replaced layer and another stays with the
    other.

    Raises:
        PomonaError: if nothing is replaced, a name is no option of the slot, or the new network fails on the example.
    """
    build = _maker(where, make) if isinstance(make, str) else make
    new_net, made, table = copy.deepcopy(net), {}, []
    names = dict(new_net.named_modules(remove_duplicate=False))
    done: list[str] = []
    for name, old in names.items():
        if any(name == outer or name.startswith(f"{outer}.") for outer in done) or not _chosen(where, name, old):
            continue
        if id(old) not in made:
            new = build(old)
            if new is None:
                continue
            like = next(old.parameters(), next(net.parameters(), None))
            new = new if like is None else new.to(like.device, like.dtype)
            made[id(old)] = new.train(old.training)
            table.append(Change(name, type(old).__name__, type(new).__name__, (_parameters(old), _parameters(new))))
        new_net = _set(new_net, name, made[id(old)])
        done.append(name)
    if not table:
        raise PomonaError(f"where={where!r}: no layer of {type(net).__name__} was replaced; it holds {_classes(net)}")
    if example is not None:
        inputs = example if isinstance(example, tuple) else (example,)
        before, after = _flops(net, inputs), _flops(new_net, inputs)
        table = [Change(c.name, c.old, c.new, c.parameters, (before[c.name], after[c.name])) for c in table]
    return Swapped(new_net, table)


def _set(net: nn.Module, name: str, new: nn.Module) -> nn.Module:
    if not name:
        return new
    net.set_submodule(name, new)
    return net


def _classes(net: nn.Module) -> str:
    return ", ".join(sorted({type(m).__name__ for m in net.modules()}))


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


KINDS: dict[str, Callable[[nn.Module], bool]] = {
    "linear": lambda m: type(m) is nn.Linear,  # subclasses' owners may use the weights directly
    "conv": lambda m: type(m) is nn.Conv2d,
    "act": is_activation,
    "norm": lambda m: isinstance(m, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)),
    "pool": lambda m: isinstance(m, (nn.MaxPool2d, nn.AvgPool2d)),
}
"""Slots whose layers can be told in a network that is not of ours."""


def _chosen(where: Where, name: str, module: nn.Module) -> bool:
    if isinstance(where, str):
        return KINDS[where](module) if where in KINDS else fnmatch(name, where)
    if isinstance(where, (type, tuple)):
        return isinstance(module, where)
    return where(name, module)


def _maker(where: Where, name: str) -> Callable[[nn.Module], nn.Module]:
    """What makes an option of the slot with the sizes of the old layer."""
    if not isinstance(where, str) or where not in KINDS:
        raise unknown(f"where, with make={name!r} given by name", where, KINDS)
    option = options.Option.parse(name)
    return lambda old: options.make(where, option, **_sizes(where, old))


def _sizes(slot: str, old: nn.Module) -> dict[str, Any]:
    """The size arguments of a slot's factories, as the old layer has them."""

    def take(*names: str) -> dict[str, Any]:
        return {name: getattr(old, name) for name in names}

    if slot == "linear":
        return {**take("in_features", "out_features"), "bias": old.bias is not None}
    if slot == "conv":
        geometry = take("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        if geometry.pop("groups") != 1 or geometry.pop("dilation") != (1, 1):
            raise PomonaError(f"{old} has groups or dilation, which options of the slot conv do not know; give where")
        return {**geometry, "bias": old.bias is not None}
    if slot == "pool":
        return {**take("kernel_size", "stride"), "channels": None}
    if slot == "act":
        known = {key: getattr(old, key) for key in ("features", "channel_dim") if hasattr(old, key)}
        return {"features": old.num_parameters, "channel_dim": 1} if isinstance(old, nn.PReLU) else known
    if isinstance(old, (nn.LayerNorm, nn.RMSNorm)):
        if len(old.normalized_shape) != 1:
            raise PomonaError(f"{old} normalizes several axes, which options of the slot norm do not know; give where")
        return {"features": old.normalized_shape[0], "dims": 0}
    dims = next((d for d in (1, 2) if type(old).__name__.endswith(f"{d}d")), 2)
    features = old.num_channels if isinstance(old, nn.GroupNorm) else old.num_features
    # BatchNorm1d serves (N, C) and (N, C, L) alike; the former is by far the commoner
    return {"features": features, "dims": 0 if isinstance(old, nn.BatchNorm1d) else dims}


@torch.no_grad()
def _flops(net: nn.Module, example: tuple[Any, ...]) -> dict[str, int]:
    """Floating-point operations of every module, for one example."""
    counts: dict[str, int] = {}
    counter = FlopCounterMode(display=False)
    handles = []
    for name, module in net.named_modules():

        def start(_m: nn.Module, _i: Any, name: str = name) -> None:
            counts[name] = counts.get(name, 0) - counter.get_total_flops()

        def end(_m: nn.Module, _i: Any, _o: Any, name: str = name) -> None:
            counts[name] += counter.get_total_flops()

        handles += [module.register_forward_pre_hook(start), module.register_forward_hook(end)]
    training = net.training
    try:
        with counter:
            net.eval()(*example)
    except (RuntimeError, ValueError, TypeError) as error:
        raise PomonaError(f"the network fails on the example: {str(error).splitlines()[0]}") from error
    finally:
        net.train(training)
        for handle in handles:
            handle.remove()
    rows = next((len(t) for t in example if isinstance(t, Tensor) and t.dim()), 1)
    return {name: counts.get(name, 0) // max(rows, 1) for name in dict(net.named_modules())}
