"""What an edit returns: a new network, and where each of its entries was in the old one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Maps = Mapping[str, Mapping[int, Tensor]]
"""``maps[parameter][dim]``: for each index of the new tensor along ``dim`` the old one, -1 where it is new."""


@dataclass(frozen=True)
class Edit:
    """A new network; the one it was made from is as it was.

    Attributes:
        net: the user's own module with new tensors, or the graph of its operations where its code holds sizes that
            cannot be changed from outside (``notes`` say so).
        maps: for each tensor and dimension that changed, the old index of every new one (-1: new).
        notes: what the edit only approximates, and what could not be kept.
        gates: the learnable gate of each axis, where ``mask(..., learnable=True)`` made them.
    """

    net: nn.Module
    maps: Maps = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    gates: Mapping[str, nn.Parameter] = field(default_factory=dict)

    def then(self, second: Edit) -> Edit:
        """One edit from the first network to the last: ``self``, then a second one made on ``self.net``."""
        maps = {name: dict(dims) for name, dims in self.maps.items()}
        for name, dims in second.maps.items():
            mine = maps.setdefault(name, {})
            for dim, index in dims.items():
                mine[dim] = chain(mine[dim], index) if dim in mine else index
        return Edit(second.net, maps, (*self.notes, *second.notes), {**self.gates, **second.gates})


def chain(first: Tensor, second: Tensor) -> Tensor:
    """The old index behind each index of ``second``, which counts in ``first``; -1 stays -1."""
    return torch.where(second >= 0, first[second.clamp(min=0)], -1)
