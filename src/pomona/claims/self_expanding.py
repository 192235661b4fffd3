"""Does a network that grew while it trained test as well as its final shape trained from scratch?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from pomona.claims.lab import TUNING_SEED, log, seeded
from pomona.claims.verdict import Comparison, Scale
from pomona.data import Task, load
from pomona.edit.self_expanding import Choose, ExpandableConvNet, Expansion, Growth, SelfExpanding
from pomona.nets import cost
from pomona.train import Training, evaluate

SIZES: dict[str, dict[str, Any]] = {
    "smoke": {"data": 300, "epochs": 3, "cooldown": 1, "rows": 16, "rates": (1e-2,)},
    "full": {"data": 4_000, "epochs": 12, "cooldown": 2, "rows": 64, "rates": (3e-3, 1e-2)},
    "gpu": {"data": 60_000, "epochs": 60, "cooldown": 5, "rows": 256, "rates": (1e-3, 3e-3, 1e-2)},
}
MARGIN = -0.01


def self_expanding(scale: Scale, seeds: Sequence[int]) -> Comparison:
    """Grown from 3 blocks of 4 channels, a network tests less than a point below its final shape from scratch.

    Both train for 12 epochs of Fashion-MNIST at a constant rate that is chosen on validation for each. Growth at the
    same moments and of the same kinds, but in random blocks, and the start as it is for all epochs; the operations
    that growth used as a share of those of the final shape; and the largest fall of the validation accuracy at an
    expansion are in the details.
    """
    size = SIZES[scale]
    task = load("fashion_mnist", limit=size["data"])
    rates = _rates(task, size, seeds[0] + TUNING_SEED)
    table: dict[str, list[float]] = {}
    for seed in seeds:
        start = seeded(ExpandableConvNet, seed)
        grown = _grow(start, task, size, rates["grown"], seed)
        chance = _grow(start, task, size, rates["grown"], seed, _like(grown, seed))
        scratch = _fixed(seeded(partial(_fresh, grown.net), seed), task, size, rates["scratch"], seed)
        small = _fixed(start, task, size, rates["scratch"], seed)
        nets = [*grown.checkpoints, grown.net]
        steps = [i for i, entry in enumerate(grown.history) if "kind" in entry]
        ends = [-1, *steps, len(grown.history) - 1]
        used = [(b - a) * cost.flops(net, task.example) for a, b, net in zip(ends, ends[1:], nets, strict=False)]
        row = {
            "grown": _test(grown, task),
            "random growth": _test(chance, task),
            "scratch": _test(scratch, task),
            "fixed small": _test(small, task),
            "parameters": float(cost.parameters(grown.net)),
            "expansions": float(len(steps)),
            "share of operations": sum(used) / (size["epochs"] * cost.flops(grown.net, task.example)),
            "largest fall": max((grown.history[i]["accuracy"] - grown.history[i]["after"] for i in steps), default=0.0),
        }
        for name, value in row.items():
            table.setdefault(name, []).append(value)
        log.info("seed %d: %s", seed, {name: round(value, 4) for name, value in row.items()})
    return Comparison(
        method=table["grown"],
        baseline=table["scratch"],
        metric="test accuracy",
        method_name="grown where the natural expansion score says",
        baseline_name="the final architecture from scratch",
        paper="Expansions do not dent accuracy: 84.1% on CIFAR-10 with 62.7k parameters, mean of five runs.",
        margin=MARGIN,
        details={
            **{name: float(torch.tensor(values, dtype=torch.float64).mean()) for name, values in table.items()},
            "score minus random": [a - b for a, b in zip(table["grown"], table["random growth"], strict=True)],
            "rates": rates,
        },
    )


def _grow(
    net: nn.Module, task: Task, size: dict[str, Any], rate: float, seed: int, choose: Choose | None = None
) -> Growth:
    training = Training(optimizer="adam", lr=rate, weight_decay=0.0, patience=None)
    options: dict[str, Any] = {"cooldown": size["cooldown"], "rows": size["rows"]}
    return SelfExpanding(net, task, choose=choose, training=training, seed=seed, **options).run(size["epochs"])


def _fixed(net: nn.Module, task: Task, size: dict[str, Any], rate: float, seed: int) -> Growth:
    return _grow(net, task, {**size, "cooldown": size["epochs"]}, rate, seed)


def _fresh(net: nn.Module) -> nn.Module:
    """The architecture with new weights."""
    fresh = copy.deepcopy(net)
    for module in fresh.modules():
        reset: Callable[[], None] | None = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
    return fresh


def _like(grown: Growth, seed: int) -> Choose:
    """A random block for each expansion of ``grown``, at its moment and of its kind."""
    kinds = {epoch: entry.get("kind") for epoch, entry in enumerate(grown.history, start=1)}
    generator = torch.Generator().manual_seed(seed)

    def choose(epoch: int, found: Sequence[Expansion]) -> int | None:
        fitting = [i for i, one in enumerate(found) if one.kind == kinds[epoch]]
        return fitting[int(torch.randint(len(fitting), (), generator=generator))] if fitting else None

    return choose


def _rates(task: Task, size: dict[str, Any], seed: int) -> dict[str, float]:
    """The learning rate of each way that is best on validation."""
    start = seeded(ExpandableConvNet, seed)
    runs = {rate: _grow(start, task, size, rate, seed) for rate in size["rates"]}
    grown = max(runs, key=lambda rate: _valid(runs[rate]))
    net = seeded(partial(_fresh, runs[grown].net), seed)
    scratch = {rate: _valid(_fixed(net, task, size, rate, seed)) for rate in size["rates"]}
    return {"grown": grown, "scratch": max(scratch, key=scratch.__getitem__)}


def _valid(run: Growth) -> float:
    return float(run.history[-1]["accuracy"])


def _test(run: Growth, task: Task) -> float:
    return evaluate(run.net, task, "test")["accuracy"]
