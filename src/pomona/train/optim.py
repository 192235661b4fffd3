"""Optimisers over parameter groups, as layers ask for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pomona.train.lion import Lion
from pomona.train.rule import with_hook
from pomona.train.settings import Training


def parameter_groups(net: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups with ``lr_scale`` and ``weight_decay``: what modules claim by ``param_groups()``, matrices, then the rest.

    Vectors and scalars (biases, norms, scales) are not decayed.
    """
    groups: list[dict[str, Any]] = []
    claimed: set[int] = set()
    for module in with_hook(net, "param_groups"):
        for group in module.param_groups():  # type: ignore[operator]
            own = [p for p in group["params"] if id(p) not in claimed and p.requires_grad]
            claimed.update(map(id, own))
            scale = group.get("lr_scale", 1.0)
            if "weight_decay" in group:
                groups.append({"params": own, "lr_scale": scale, "weight_decay": group["weight_decay"]})
            else:
                groups += _by_dimension(own, weight_decay, scale)
    rest = [p for p in net.parameters() if p.requires_grad and id(p) not in claimed]
    return [group for group in groups + _by_dimension(rest, weight_decay, 1.0) if group["params"]]


def _by_dimension(params: list[nn.Parameter], weight_decay: float, scale: float) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in params if p.ndim > 1], "lr_scale": scale, "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "lr_scale": scale, "weight_decay": 0.0},
    ]


def make_optimizer(net: nn.Module, training: Training) -> torch.optim.Optimizer:
    """The optimiser that ``training`` names; each group's rate is ``lr * lr_scale``."""
    groups = parameter_groups(net, training.weight_decay)
    for group in groups:
        group["lr"] = training.lr * group["lr_scale"]
    fused = all(p.is_floating_point() and p.device.type in {"cpu", "cuda"} for g in groups for p in g["params"])
    match training.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, fused=fused)
        case "adam":
            return torch.optim.Adam(groups, fused=fused)
        case "rmsprop":
            return torch.optim.RMSprop(groups)
        case "lion":
            return Lion(groups)
        case "sgd":
            return torch.optim.SGD(groups, momentum=training.momentum, fused=fused)
        case "nesterov":
            nesterov = training.momentum > 0
            return torch.optim.SGD(groups, momentum=training.momentum, nesterov=nesterov, fused=fused)
