"""Is a candidate of an architecture search worth more when it inherits weights than when it starts afresh?"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pomona.claims.lab import TUNING_SEED, log, seeded
from pomona.claims.verdict import Comparison, Scale
from pomona.data import Task, load
from pomona.edit.eas import EAS, Candidate, Search
from pomona.train import Budget, Training, evaluate, fit

# trainings of one epoch a search, networks a round, and trainings a rate is chosen by
SIZES: dict[str, dict[str, Any]] = {
    "smoke": {"data": 300, "evaluations": 3, "samples": 1, "tuning": 2, "rates": (3e-3, 1e-2)},
    "full": {"data": 3_000, "evaluations": 12, "samples": 4, "tuning": 4, "rates": (1e-3, 3e-3, 1e-2)},
    "gpu": {"data": 60_000, "evaluations": 100, "samples": 10, "tuning": 8, "rates": (1e-3, 3e-3, 1e-2)},
}
MARGIN = 0.02
WIDTHS = {"conv": (8, 16, 24, 32, 48, 64), "linear": (16, 32, 64)}
LARGEST = 50_000
EPOCH = Budget("epochs", 1)


def eas(scale: Scale, seeds: Sequence[int]) -> Comparison:
    """The best of 12 networks grown from each other tests over two points above the best of the same from scratch.

    A network of two convolutions (8 and 16 channels, on Fashion-MNIST halved to 14 x 14) grows: each candidate gets
    randomly or by policy wider and deeper, and one epoch. The same 12 architectures from fresh weights get one epoch
    each, too. Both choose among three learning rates in a small search, and their best network on validation. Random
    choice against the policy, the policy's best network trained from scratch for all the epochs of its ancestry, and
    the largest change of an output by any transformation are in the details.
    """
    size = SIZES[scale]
    task = load("fashion_mnist", limit=size["data"])
    rates = _rates(task, size, seeds[0] + TUNING_SEED)
    table: dict[str, list[float]] = {}
    for seed in seeds:
        grown = _search(task, "rl", rates["inherited"], size["evaluations"], size["samples"], seed)
        chance = _search(task, "random", rates["inherited"], size["evaluations"], size["samples"], seed)
        fresh = _afresh(grown, task, rates["scratch"], seed)
        best = grown.candidates.index(grown.best)
        epochs = len(grown.lineage(best))
        long = _scratch(grown.best.net, task, rates["scratch"], seed, Budget("epochs", epochs))
        row = {
            "rl": _test(grown.best, task),
            "random": _test(chance.best, task),
            "scratch": _test(max(fresh, key=lambda one: one.accuracy), task),
            "start": _test(grown.candidates[0], task),
            "same from scratch, all epochs": _test(long, task),
            "epochs of the best": float(epochs),
            "parameters of the best": float(grown.best.parameters),
            "mean gain on validation": _mean(
                [a.accuracy - b.accuracy for a, b in zip(grown.candidates[1:], fresh[1:], strict=True)]
            ),
            "largest drift": max(one.drift for one in (*grown.candidates, *chance.candidates)),
        }
        for name, value in row.items():
            table.setdefault(name, []).append(value)
        log.info("seed %d: %s", seed, {name: round(value, 4) for name, value in row.items()})
    return Comparison(
        method=table["rl"],
        baseline=table["scratch"],
        metric="test accuracy of the best candidate on validation, one epoch each",
        method_name="EAS with inherited weights",
        baseline_name="the same architectures from scratch",
        paper="Reused weights and a learned policy: 4.23% error on CIFAR-10 without skip connections, on 5 GPUs.",
        margin=MARGIN,
        details={
            **{name: _mean(values) for name, values in table.items()},
            "rl minus random": [a - b for a, b in zip(table["rl"], table["random"], strict=True)],
            "rates": rates,
        },
    )


def _start() -> nn.Module:
    blocks = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    blocks += [nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(nn.AvgPool2d(2), *blocks, nn.Flatten(), nn.Linear(16, 10))


def _training(rate: float) -> Training:
    return Training(optimizer="adam", lr=rate, weight_decay=1e-4, patience=None)


def _search(task: Task, controller: str, rate: float, evaluations: int, samples: int, seed: int) -> Search:
    return EAS(
        seeded(_start, seed),
        task,
        controller,
        evaluations=evaluations,
        samples=samples,
        wider=1,
        deeper=1,
        budget=EPOCH,
        training=_training(rate),
        widths=WIDTHS,
        max_parameters=LARGEST,
        seed=seed,
    ).run()


def _scratch(net: nn.Module, task: Task, rate: float, seed: int, budget: Budget = EPOCH) -> Candidate:
    """The architecture trained from fresh weights."""

    def make() -> nn.Module:
        fresh = copy.deepcopy(net)
        for module in fresh.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
        return fresh

    trained = fit(seeded(make, seed), task, _training(rate), budget=budget, seed=seed, keep="last").net
    return Candidate(trained, evaluate(trained, task, "valid")["accuracy"])


def _afresh(search: Search, task: Task, rate: float, seed: int) -> list[Candidate]:
    return [_scratch(one.net, task, rate, seed + 1000 * i) for i, one in enumerate(search.candidates)]


def _rates(task: Task, size: dict[str, Any], seed: int) -> dict[str, float]:
    """The learning rate of each way that is best on validation in a small random search."""
    grown = {rate: _search(task, "random", rate, size["tuning"], 1, seed) for rate in size["rates"]}
    inherited = {rate: search.best.accuracy for rate, search in grown.items()}
    best = max(inherited, key=inherited.__getitem__)
    scratch = {rate: max(one.accuracy for one in _afresh(grown[best], task, rate, seed)) for rate in size["rates"]}
    return {"inherited": best, "scratch": max(scratch, key=scratch.__getitem__)}


def _test(one: Candidate, task: Task) -> float:
    return evaluate(one.net, task, "test")["accuracy"]


def _mean(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).mean())
