"""Are nested sub-networks, trained together, as good as networks trained apart?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pomona.claims.lab import log, seeded
from pomona.claims.verdict import Comparison, Scale
from pomona.data import Task, load
from pomona.edit.sortednet import SortedNet
from pomona.train import Budget, Training, evaluate, fit

SIZES: dict[str, dict[str, Any]] = {
    "smoke": {"data": 600, "steps": 20, "width": 16, "sizes": 2},
    "full": {"data": 20_000, "steps": 1200, "width": 256, "sizes": 8},
    "gpu": {"data": 60_000, "steps": 20_000, "width": 256, "sizes": 8},
}
MARGIN = -0.01
"""The claim: at most a point of accuracy below networks of their own."""
DRAWN = 2
TRAINING = Training(optimizer="adam", lr=1e-3, weight_decay=0.0, batch_size=128, patience=None)


def sortednet(scale: Scale, seeds: Sequence[int]) -> Comparison:
    """Eight widths in one network test within a point of eight networks that share the same number of gradients.

    An MLP with two hidden layers of 256 units on Fashion-MNIST; two widths are drawn a step, so that n steps cost 2n
    gradients. The separate networks share the 2n gradients evenly. Also at 2n gradients: sub-networks of random units
    that are not nested, and plain training whose prefixes are taken afterwards.
    """
    size = SIZES[scale]
    task = load("fashion_mnist", limit=size["data"])
    shares = [(i + 1) / size["sizes"] for i in range(size["sizes"])]
    table: dict[str, list[list[float]]] = {}

    for seed in seeds:
        net = seeded(lambda: _mlp(size["width"]), seed)
        ways = {
            "sorted": _nested(net, task, shares, size["steps"], seed),
            "random": _nested(net, task, shares, size["steps"], seed, nested=False),
            "sliced": _sliced(net, task, shares, DRAWN * size["steps"], seed),
            "separate": _separate(size["width"], task, shares, DRAWN * size["steps"] // len(shares), seed),
        }
        for name, nets in ways.items():
            table.setdefault(name, []).append([evaluate(one, task, "test")["accuracy"] for one in nets])
        log.info("seed %d: %s", seed, {name: round(sum(rows[-1]) / len(shares), 4) for name, rows in table.items()})
    means = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in table.items()}
    return Comparison(
        method=means["sorted"].mean(1).tolist(),
        baseline=means["separate"].mean(1).tolist(),
        metric=f"mean test accuracy over {len(shares)} widths",
        method_name="one sorted network",
        baseline_name="a network for each width, sharing the same number of gradients",
        paper="Many sub-networks trained at once keep about 96 % of the whole network's quality.",
        margin=MARGIN,
        details={
            name: {f"width {share:g}": float(v) for share, v in zip(shares, rows.mean(0), strict=True)}
            for name, rows in means.items()
        },
    )


def _nested(
    net: nn.Module, task: Task, shares: Sequence[float], steps: int, seed: int, nested: bool = True
) -> list[nn.Module]:
    many = SortedNet(net, task.example, grid=shares, accumulate=DRAWN, nested=nested, seed=seed)
    done = _fit(many, task, steps, seed, loss=many.loss(task.loss))
    return [done.extract(share) for share in shares]  # type: ignore[operator]


def _sliced(net: nn.Module, task: Task, shares: Sequence[float], steps: int, seed: int) -> list[nn.Module]:
    many = SortedNet(_fit(net, task, steps, seed), task.example, grid=shares)
    return [many.extract(share).eval() for share in shares]


def _separate(width: int, task: Task, shares: Sequence[float], steps: int, seed: int) -> list[nn.Module]:
    return [_fit(seeded(lambda s=share: _mlp(round(s * width)), seed), task, steps, seed) for share in shares]  # type: ignore[misc]


def _fit(net: nn.Module, task: Task, steps: int, seed: int, **options: Any) -> nn.Module:
    budget = Budget("examples", steps * TRAINING.batch_size)
    return fit(net, task, TRAINING, budget=budget, seed=seed, keep="last", validations=1, **options).net


def _mlp(width: int) -> nn.Module:
    hidden = [nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))
