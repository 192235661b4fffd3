"""Whether trained matrix activations fit oscillating functions better than ReLU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from pomona.claims.lab import Arm, compare_arms, grid, log
from pomona.claims.verdict import Comparison, Scale, t_interval
from pomona.data import load
from pomona.data.task import Split, Task
from pomona.nets.cost import parameters
from pomona.nets.specs import Inputs, Outputs
from pomona.nn.activation import act
from pomona.nn.matrix_activation import DiagTMAF, TridiagTMAF
from pomona.train.budget import Budget
from pomona.train.loop import Fit, evaluate
from pomona.train.settings import Training

SIZES: dict[Scale, dict[str, Any]] = {
    "smoke": {"steps": 20, "plane_steps": 10, "epochs": 1},
    "full": {"steps": 2500, "plane_steps": 1000, "epochs": 20},
    "gpu": {"steps": 8000, "plane_steps": 8000, "epochs": 60},
}
BATCH = 128
MARGIN = math.log10(2)
Make = Callable[[int], nn.Module]
ACTS: dict[str, Make] = {
    "diag": DiagTMAF,
    "tridiag": TridiagTMAF,
    "relu": lambda n: act("relu"),
    "prelu": lambda n: act("prelu", features=n),
}


def matrix_activation(scale: Scale, seeds: Sequence[int]) -> Comparison:
    """Claimed: a diagonal TMAF at least halves the test error of ReLU in a network of the same shape.

    The error is the mean square on held-out points of sin(pi x) + sin(2 pi x) + sin(3 pi x) on [-pi, pi], two hidden
    layers of 50, Adam, the learning rate chosen on validation out of two for each; differences are of its decimal
    logarithm. In the details: tridiagonal TMAF, PReLU, a ReLU network of as many parameters as the tridiagonal one, a
    function of two variables with three hidden layers of 20, and digits (claimed: within half a point).
    """
    sizes = SIZES[scale]
    details: dict[str, Any] = {}

    def run(name: str, layers: list[int], task: Any, budget: Budget) -> dict[str, list[float]]:
        training = Training(optimizer="adam", weight_decay=0, batch_size=BATCH)
        arms = {kind: Arm(lambda make=make: mlp(make, layers), training) for kind, make in ACTS.items()}  # type: ignore[misc]
        wide = wider(layers)
        arms["relu, as many parameters"] = Arm(lambda: mlp(ACTS["relu"], wide), training)
        outcomes = compare_arms(arms, task, seeds, budget=budget, settings=grid(lr=[1e-3, 1e-2]), score=_score)
        values = {kind: outcome.values("result") for kind, outcome in outcomes.items()}
        details[name] = {
            kind: {**outcome.summary(), "over relu": t_interval(np.subtract(values[kind], values["relu"]))}
            for kind, outcome in outcomes.items()
        }
        log.info("%s: %s", name, details[name])
        return values

    line = run("line", [1, 50, 50, 1], lambda seed: waves(1, seed), Budget("examples", sizes["steps"] * BATCH))
    run("plane", [2, 20, 20, 20, 1], lambda seed: waves(2, seed), Budget("examples", sizes["plane_steps"] * BATCH))
    run("digits", [64, 64, 64, 10], load("digits"), Budget("epochs", sizes["epochs"]))
    return Comparison(
        method=line["diag"],
        baseline=line["relu"],
        metric="log10 of the mean squared error on test points",
        method_name="diagonal TMAF",
        baseline_name="ReLU, same shape",
        better="lower",
        margin=MARGIN,
        paper="lower errors than ReLU networks of equal shape on functions of 1 to 6 variables",
        note="The tridiagonal form and a ReLU network of as many parameters stand in the details.",
        details=details,
    )


def mlp(make: Make, sizes: Sequence[int]) -> nn.Sequential:
    """Layers of these sizes with activations between them."""
    hidden = [layer for i, o in pairwise(sizes[:-1]) for layer in (nn.Linear(i, o), make(o))]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-2], sizes[-1]))


def wider(sizes: Sequence[int]) -> list[int]:
    """Hidden layers scaled so that ReLU has the parameters that tridiagonal TMAF has at ``sizes``."""
    target = parameters(mlp(TridiagTMAF, sizes))

    def at(width: int) -> list[int]:
        return [sizes[0], *[width] * (len(sizes) - 2), sizes[-1]]

    counts = {w: parameters(mlp(ACTS["relu"], at(w))) for w in range(sizes[1], 3 * sizes[1])}
    return at(min(counts, key=lambda w: abs(counts[w] - target)))


def waves(inputs: int, seed: int) -> Task:
    """sum_n sin(n pi (x_1 + ... + x_d)) for n = 1, 2, 3 (1 and 2 in the plane) at uniform points, without noise."""
    generator = torch.Generator().manual_seed(seed)
    x = math.pi * (2 * torch.rand(5000, inputs, generator=generator) - 1)
    y = torch.sin(math.pi * x.sum(1, keepdim=True) * torch.arange(1, 5 - inputs)).sum(1, keepdim=True)
    parts = zip(("train", "valid", "test"), x.tensor_split((2000, 3000)), y.tensor_split((2000, 3000)), strict=True)
    outputs = Outputs("number", 1, scale=(float(y[:2000].std()),))
    return Task("waves", Inputs("table", (inputs,)), outputs, {name: Split(x, y) for name, x, y in parts})


def _score(done: Fit, task: Task) -> dict[str, float]:
    """log10 of the mean squared error, or the accuracy."""
    found = evaluate(done.net, task, "test")
    return {"result": 2 * math.log10(found["rmse"]) if "rmse" in found else found["accuracy"]}
