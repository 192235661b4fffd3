"""From a candidate to a network: ``build("mlp linear=kan act=gelu width=64", task)``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from pomona.errors import PomonaError, unknown
from pomona.nets.convnet import ConvNet
from pomona.nets.cost import match_width, parameters
from pomona.nets.fill import Fill
from pomona.nets.mlp import MLP
from pomona.nets.resnet import ResNet
from pomona.nets.specs import Inputs, Outputs
from pomona.nets.tokens import Mixer, Sequence
from pomona.options import Option, check_options, parse_candidate, scalar

BACKBONES: dict[str, Any] = {
    "mlp": MLP,
    "convnet": ConvNet,
    "resnet": ResNet,
    "mixer": Mixer,
    "sequence": Sequence,
}


class Sized(Protocol):
    """Anything with the two specs, such as a task."""

    inputs: Inputs
    outputs: Outputs


def backbone(name: str) -> Any:
    """The class of a backbone.

    Raises:
        PomonaError: if there is none of that name.
    """
    if name not in BACKBONES:
        from pomona.catalog import short_names

        raise unknown("candidate", name, [*BACKBONES, *short_names()])
    return BACKBONES[name]


def keys(name: str) -> tuple[dict[str, str], list[str]]:
    """A backbone's slots with their defaults, and its other settings."""
    cls = backbone(name)
    settings = [p.name for p in inspect.signature(cls).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return dict(cls.slots), settings


def split_settings(name: str, given: Mapping[str, Any]) -> tuple[dict[str, Option], dict[str, Any]]:
    """What a candidate says, as filled slots and checked settings.

    Raises:
        PomonaError: for a key that the backbone has not, or a value of the wrong type.
    """
    defaults, settings = keys(name)
    filled = {slot: Option.parse(option) for slot, option in defaults.items()}
    checked: dict[str, Any] = {}
    for key, value in given.items():
        if key in defaults:
            filled[key] = Option.parse(value)
        elif key in settings:
            value = scalar(value) if isinstance(value, str) else value
            checked |= check_options(name, backbone(name), {key: value})
            if key in {"width", "expand", "patch", "longest", "blocks"} and value is not None and value <= 0:
                raise PomonaError(f"{key}={value!r} of {name} must be above 0")
            if key == "depth" and value < 0:
                raise PomonaError(f"depth={value!r} of {name} must be 0 or more")
            if key == "dropout" and not 0 <= value < 1:
                raise PomonaError(f"dropout={value!r} of {name} must be in [0, 1)")
        else:
            raise unknown(f"key of {name}", key, [*defaults, *settings])
    return filled, checked


def make(
    name: str, slots: Mapping[str, str | Option], settings: Mapping[str, Any], inputs: Inputs, outputs: Outputs
) -> nn.Module:
    """The network of a backbone, its filled slots and settings, for these inputs and outputs.

    Raises:
        PomonaError: if the backbone does not take such inputs, or a layer not such sizes.
    """
    cls = backbone(name)
    if inputs.kind not in cls.kinds:
        fits = [other for other, c in BACKBONES.items() if inputs.kind in c.kinds]
        raise PomonaError(f"{name} takes {' or '.join(cls.kinds)} input, not {inputs.kind}; use {', '.join(fits)}")
    filled = {**cls.slots, **slots}
    return cls(inputs, outputs, Fill(filled), **settings)


def build(candidate: str, task: Sized, *, seed: int = 0, match: int | None = None) -> nn.Module:
    """The untrained network that a candidate string describes, sized for ``task``.

    Args:
        candidate: ``backbone key=value ...`` or a short name; slots and the backbone's settings only.
        task: anything with ``inputs`` and ``outputs``.
        seed: of the initialisation; the global generator is left as it was.
        match: choose the width so that the network has this many parameters, within 2%.

    Raises:
        PomonaError: one sentence for whatever is wrong with the candidate.
    """
    name, given = parse_candidate(candidate)
    slots, settings = split_settings(name, given)

    def at(width: int | None) -> nn.Module:
        chosen = settings if width is None else {**settings, "width": width}
        return make(name, slots, chosen, task.inputs, task.outputs)

    width = None if match is None else match_width(at, match)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return at(width)


__all__ = ["BACKBONES", "backbone", "build", "keys", "make", "match_width", "parameters", "split_settings"]
