"""Do units that are alike merge at little cost, where removing as many units is dear?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from pomona.claims.lab import log, seeded
from pomona.claims.verdict import Comparison, Scale
from pomona.data import Task, load
from pomona.edit.batchnorm import fold_batch_norms
from pomona.edit.ifm import find_groups
from pomona.edit.operations import merge, take
from pomona.trace.axes import axes as trace_axes
from pomona.trace.axis import AxisSet
from pomona.train import Budget, Training, evaluate, fit

# widths of the MLPs, the one that decides, and the shares of units that go
SIZES: dict[str, dict[str, Any]] = {
    "smoke": {"data": 600, "epochs": 1.0, "widths": (8, 16), "decides": 16, "channels": 4, "shares": (0.5,)},
    "full": {
        "data": 20_000,
        "epochs": 5.0,
        "widths": (64, 256, 1024),
        "decides": 256,
        "channels": 16,
        "shares": (0.3, 0.5, 0.7),
    },
    "gpu": {
        "data": 60_000,
        "epochs": 20.0,
        "widths": (64, 256, 1024, 4096),
        "decides": 256,
        "channels": 64,
        "shares": (0.3, 0.5, 0.7, 0.9),
    },
}
BETA = 0.1
MARGIN = 0.05
TRAINING = Training(optimizer="adam", lr=1e-3, weight_decay=5e-4, batch_size=128, patience=None)


def ifm(scale: Scale, seeds: Sequence[int]) -> Comparison:
    """With half of the units of every layer gone, merging tests more than five points above removal.

    An MLP with two hidden layers of 256 units learns Fashion-MNIST with weight decay 5e-4; then, without data or
    further training, either the closest units merge until half are left, or as many units are removed, by the better on
    validation of two scores (norm of what produces a unit; that norm times the norm of what reads it). Other shares,
    widths, a small VGG, random merging, and the feature complexity at beta 0.1 are in the details.
    """
    size = SIZES[scale]
    task = load("fashion_mnist", limit=size["data"])
    table: dict[str, dict[str, list[float]]] = {}
    makers: dict[str, Callable[[], nn.Module]] = {f"width {w}": partial(_mlp, w) for w in size["widths"]}
    makers["vgg"] = partial(_vgg, size["channels"])
    for seed in seeds:
        for name, make in makers.items():
            budget = Budget("epochs", size["epochs"])
            net = fit(seeded(make, seed), task, TRAINING, budget=budget, seed=seed, keep="last").net
            net = fold_batch_norms(net, task.example).net
            row = table.setdefault(name, {})
            for key, value in _measured(net, trace_axes(net, task.example), task, size["shares"], seed).items():
                row.setdefault(key, []).append(value)
        decides = table[f"width {size['decides']}"]
        log.info("seed %d: merged %.4f, removed %.4f", seed, decides["merge 0.5"][-1], decides["remove 0.5"][-1])
    decides = table[f"width {size['decides']}"]
    return Comparison(
        method=decides["merge 0.5"],
        baseline=decides["remove 0.5"],
        metric="test accuracy with half of the hidden units",
        method_name="closest units merged",
        baseline_name="units of least norm removed",
        paper="Many units of trained networks merge with almost no loss, without data or further training.",
        margin=MARGIN,
        details={
            name: {key: float(torch.tensor(values, dtype=torch.float64).mean()) for key, values in row.items()}
            for name, row in table.items()
        },
    )


def _measured(net: nn.Module, axes: AxisSet, task: Task, shares: Sequence[float], seed: int) -> dict[str, float]:
    """Test accuracy whole, merged, removed and randomly merged at each share, and the complexity at ``BETA``."""
    complexity = find_groups(net, axes, BETA)
    units = sum(axis.size for axis in axes)
    found = {
        "whole": _accuracy(net, task),
        "complexity": sum(map(len, complexity.values())) / units,
        "features": float(sum(map(len, complexity.values()))),
    }
    generator = torch.Generator().manual_seed(seed)
    for share in shares:
        groups = find_groups(net, axes, 1.0, share)
        found[f"merge {share}"] = _accuracy(merge(net, axes, _joined(groups)).net, task)
        removed = [take(net, axes, 1 - share, by=by).net for by in ("l2", "in_out")]
        best = max(removed, key=lambda small: _accuracy(small, task, "valid"))
        found[f"remove {share}"] = _accuracy(best, task)
        chance = {name: _random_groups(len(found_), axes[name].size, generator) for name, found_ in groups.items()}
        found[f"random merge {share}"] = _accuracy(merge(net, axes, _joined(chance)).net, task)
    return found


def _joined(groups: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
    return {name: [g for g in found if len(g) > 1] for name, found in groups.items()}


def _random_groups(count: int, units: int, generator: torch.Generator) -> list[list[int]]:
    """``units`` in ``count`` random groups, none empty."""
    order = torch.randperm(units, generator=generator)
    labels = torch.cat([torch.arange(count), torch.randint(count, (units - count,), generator=generator)])
    return [sorted(order[labels == label].tolist()) for label in range(count)]


def _mlp(width: int) -> nn.Module:
    hidden = [nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))


def _vgg(channels: int) -> nn.Module:
    parts: list[nn.Module] = []
    before = 1
    for width in (channels, 2 * channels, 4 * channels):
        parts += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        before = width
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(before * 9, 10))


def _accuracy(net: nn.Module, task: Task, split: str = "test") -> float:
    return evaluate(net, task, split)["accuracy"]
