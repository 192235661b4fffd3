"""Filling slots: which layer a candidate puts where."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn, tensor

from pomona import options
from pomona.errors import PomonaError
from pomona.nets.specs import Outputs
from pomona.options import Option


class Fill:
    """The options that fill a backbone's slots, and the way to build them."""

    def __init__(self, slots: Mapping[str, str | Option]) -> None:
        self.slots = {slot: Option.parse(option) for slot, option in slots.items()}

    def make(self, slot: str, **sizes: Any) -> nn.Module:
        """The layer in ``slot`` for these sizes."""
        return options.make(slot, self.slots[slot], **sizes)

    def empty(self, slot: str) -> bool:
        """Whether nothing fills the slot."""
        return self.slots[slot].name == "none"

    def linear(self, in_features: int, out_features: int, bias: bool = True) -> nn.Module:
        """The layer in ``linear``."""
        return self.make("linear", in_features=in_features, out_features=out_features, bias=bias)

    def act(self, features: int, channel_dim: int = -1) -> nn.Module:
        """The activation."""
        return self.make("act", features=features, channel_dim=channel_dim)

    def widened_act(self, width: int, channel_dim: int = -1) -> tuple[nn.Module, int]:
        """An activation whose output has ``width`` features, and the width that it needs before it."""
        act = self.act(width, channel_dim)
        factor = getattr(act, "out_factor", 1)
        if factor == 1:
            return act, width
        before = round(width / factor)
        if round(before * factor) != width:
            name = self.slots["act"].name
            raise PomonaError(f"act={name} makes {factor:g} features of one, so width={width} cannot come out of it")
        return self.act(before, channel_dim), before

    def unit(
        self, make: Callable[[int], nn.Module], width: int, *, dims: int = 0, dropout: float = 0.0
    ) -> nn.Sequential:
        """``make(width)`` followed by norm, activation and dropout, leaving out what is empty; ``width`` features
        come out.
        """
        act, before = self.widened_act(width, -1 if dims == 0 else 1)
        layers = [make(before)]
        if not self.empty("norm"):
            layers.append(self.make("norm", features=before, dims=dims))
        layers.append(act)
        if dropout:
            layers.append(nn.Dropout(dropout))
        return nn.Sequential(*layers)


class Unscale(nn.Module):
    """y = mean + scale * x: from standardised outputs to the target's own units.

    Shapes:
        (B, targets) -> (B, targets)
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, outputs: Outputs) -> None:
        super().__init__()
        self.register_buffer("mean", tensor(outputs.mean or (0.0,) * outputs.size))
        self.register_buffer("scale", tensor(outputs.scale or (1.0,) * outputs.size))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.mean + self.scale * x


def make_head(fill: Fill, features: int, outputs: Outputs) -> nn.Module:
    """What fills ``head``, in the target's own units for numbers."""
    head = fill.make("head", in_features=features, out_features=outputs.size)
    return nn.Sequential(head, Unscale(outputs)) if outputs.kind == "number" else head


def make_memory(fill: Fill, features: int) -> nn.Module:
    """What fills ``memory``, or nothing."""
    return nn.Identity() if fill.empty("memory") else fill.make("memory", features=features)
