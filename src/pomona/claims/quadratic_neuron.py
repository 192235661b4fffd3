"""Whether quadratic networks train deep, and better than linear ones, when they start as linear ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from sklearn.datasets import make_circles
from torch import Tensor, nn

from pomona.claims.lab import Arm, compare_arms, grid, log
from pomona.claims.verdict import Comparison, Scale
from pomona.data import load
from pomona.data.task import Split, Task
from pomona.nets.specs import Inputs, Outputs
from pomona.nn.quadratic import QuadraticLinear, ReLinear
from pomona.train.budget import Budget
from pomona.train.loop import Fit
from pomona.train.settings import Training

SIZES: dict[Scale, dict[str, Any]] = {
    "smoke": {"depths": [3], "epochs": 1, "rings": 400},
    "full": {"depths": [3, 6, 10], "epochs": 20, "rings": 4000},
    "gpu": {"depths": [3, 6, 10, 20], "epochs": 40, "rings": 4000},
}
WIDTH = 32
QUADRATIC = ("weight_g", "bias_g", "weight_b", "bias_b")
Linear = Callable[[int, int], nn.Module]


def quadratic_neuron(scale: Scale, seeds: Sequence[int]) -> Comparison:
    """Claimed: at the greatest depth, quadratic neurons with ReLinear beat linear ones of the same width.

    Digits, an MLP of ReLU layers of width 32; SGD with momentum, gradients clipped to norm 1 separately for
    the linear and the quadratic terms. In the details: smaller depths, quadratic neurons with Kaiming
    initialisation (claimed to collapse), a ten times smaller rate for the quadratic terms, one clip for all
    gradients, a linear network of as many parameters, and two noisy rings with one hidden layer of four.
    """
    sizes = SIZES[scale]
    task = load("digits")
    details: dict[str, Any] = {}
    for depth in sizes["depths"]:
        arms = _arms(64, 10, depth, WIDTH)
        if depth < sizes["depths"][-1]:
            arms = {name: arms[name] for name in ("linear", "relinear", "kaiming")}
        outcomes = compare_arms(
            arms,
            task,
            seeds,
            budget=Budget("epochs", sizes["epochs"]),
            settings=grid(lr=[0.01, 0.03]),
            score=_score,
        )
        details[f"depth {depth}"] = {name: outcome.summary() for name, outcome in outcomes.items()}
        log.info("depth %d: %s", depth, details[f"depth {depth}"])
    rings = compare_arms(
        {name: arm for name, arm in _arms(2, 2, 1, 4).items() if name in ("relinear", "linear")},
        lambda seed: _rings(seed, sizes["rings"]),
        seeds,
        budget=Budget("epochs", sizes["epochs"]),
        settings=grid(lr=[0.01, 0.03]),
        score=_score,
    )
    details["rings"] = {name: outcome.summary() for name, outcome in rings.items()}
    return Comparison(
        method=outcomes["relinear"].values("accuracy"),
        baseline=outcomes["linear"].values("accuracy"),
        metric=f"test accuracy at depth {sizes['depths'][-1]}",
        method_name="quadratic neurons with ReLinear",
        baseline_name="linear neurons, same depth and width",
        paper="ReLinear quadratic ResNets gain about 0.5 to 1 point on CIFAR-10 over conventional ones as deep",
        note="Digits and a plain MLP in the place of CIFAR-10 and ResNets.",
        details=details,
    )


def _arms(inputs: int, outputs: int, depth: int, width: int) -> dict[str, Arm]:
    def kaiming(i: int, o: int) -> nn.Module:
        return QuadraticLinear(i, o, init="kaiming")

    def relinear(rate: float) -> Linear:
        return lambda i, o: QuadraticLinear(i, o, relinear=ReLinear(lr_scale=rate))

    def linear(i: int, o: int) -> nn.Module:
        layer = nn.Linear(i, o)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
        return layer

    def arm(make: Linear, joint: bool = False, size: int = width) -> Arm:
        clip = 1.0 if joint else None
        training = Training(optimizer="sgd", momentum=0.9, weight_decay=0, clip=clip, schedule="constant", warmup=0)
        options = {} if joint else {"transforms": lambda seed: [clip_by_group]}
        return Arm(lambda: mlp(make, [inputs, *[size] * depth, outputs]), training, options)

    return {
        "linear": arm(linear),
        "relinear": arm(relinear(0.1)),
        "relinear, rate / 10": arm(relinear(0.01)),
        "relinear, one clip": arm(relinear(0.1), joint=True),
        "kaiming": arm(kaiming),
        "linear, equal parameters": arm(linear, size=wider(inputs, outputs, depth, width)),
    }


def mlp(make: Linear, sizes: Sequence[int]) -> nn.Sequential:
    """Layers of the given sizes with ReLU between them, the last one linear in every arm."""
    layers: list[nn.Module] = [nn.Flatten()]
    for i, o in pairwise(sizes[:-1]):
        layers += [make(i, o), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


def wider(inputs: int, outputs: int, depth: int, width: int) -> int:
    """The width at which linear layers come nearest to the parameters of quadratic ones of ``width``."""

    def count(size: int, factor: int) -> int:
        sizes = [inputs, *[size] * depth]
        hidden = sum((i + 1) * o for i, o in pairwise(sizes))
        return factor * hidden + (size + 1) * outputs

    return min(range(width, 4 * width), key=lambda size: abs(count(size, 1) - count(width, 3)))


def clip_by_group(grads: dict[str, Tensor], step: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Clip the gradients of the linear and of the quadratic terms to norm 1, each by itself."""
    clipped: dict[str, Tensor] = {}
    for quadratic in (False, True):
        group = {name: g for name, g in grads.items() if name.endswith(QUADRATIC) is quadratic}
        if group:
            norm = torch.stack([g.norm() for g in group.values()]).norm()
            clipped |= {name: g * (1 / (norm + 1e-6)).clamp_max(1) for name, g in group.items()}
    return clipped


@torch.no_grad()
def _score(fit: Fit, task: Task) -> dict[str, float]:
    """Test accuracy, and whether training ended in numbers that are not finite."""
    x, y = task.splits["test"]
    accuracy = float((fit.net(x).argmax(1) == y).float().mean())
    return {"accuracy": accuracy, "diverged": float(fit.stopped == "diverged")}


def _rings(seed: int, count: int) -> Task:
    """Two noisy rings: a quarter of the points each to train and validate, half to test."""
    x, y = make_circles(count, noise=0.1, factor=0.5, random_state=seed)
    cuts = (count // 4, count // 2)
    parts = zip(torch.tensor(x).float().tensor_split(cuts), torch.tensor(y).tensor_split(cuts), strict=True)
    splits = {name: Split(*part) for name, part in zip(("train", "valid", "test"), parts, strict=True)}
    return Task("rings", Inputs("table", (2,)), Outputs("classes", 2), splits)
