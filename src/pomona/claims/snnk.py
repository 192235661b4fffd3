"""Whether adapters of random features do as well as bottleneck adapters with as many parameters."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pomona.claims.lab import TUNING_SEED, Arm, compare_arms, grid, log, seeded
from pomona.claims.verdict import Comparison, Scale
from pomona.data import load
from pomona.data.task import Split, Task
from pomona.nn.snnk import SNNK, SNNKAdapter, fully_bundled
from pomona.nn.structured import LowRankLinear
from pomona.train.budget import Budget
from pomona.train.loop import evaluate, fit
from pomona.train.settings import Training

SIZES: dict[Scale, dict[str, Any]] = {
    "smoke": {"limit": 400, "adapt": 100, "epochs": 1, "width": 32, "m": 8, "rates": [3e-3], "draws": 3},
    "full": {
        "limit": 5000,
        "adapt": 1000,
        "epochs": 12,
        "width": 512,
        "m": 64,
        "rates": [1e-2, 3e-3, 1e-3],
        "draws": 30,
    },
    "gpu": {
        "limit": 20000,
        "adapt": 5000,
        "epochs": 30,
        "width": 512,
        "m": 64,
        "rates": [1e-2, 3e-3, 1e-3],
        "draws": 99,
    },
}


def snnk(scale: Scale, seeds: Sequence[int]) -> Comparison:
    """Claimed: on new classes, a random-feature adapter is no more than 0.3 points below a bottleneck adapter.

    A perceptron 784-512-512-5 is trained on five classes of Fashion-MNIST and frozen; adapters with as many
    trained numbers after both hidden layers, and a new head, learn the other five from 1,000 images. In the details:
    the head alone; pointwise errors of sin, cos and the arc-cosine kernel (claimed to fall with m, and to be less with
    orthogonal directions); one layer 512-512 of a perceptron for ten classes as 64 ReLU features (claimed to lose less
    than 1.5 points), with a low-rank layer of as many trained numbers; and the whole perceptron as one bundle, its last
    map in closed form (claimed within 3 points in less than a second).
    """
    sizes = SIZES[scale]
    width, m, settings = sizes["width"], sizes["m"], grid(lr=sizes["rates"])
    images = load("fashion_mnist", limit=sizes["limit"])
    old, new = (some_classes(images, classes) for classes in (range(5), range(5, 10)))
    few = Split(*(t[: sizes["adapt"]] for t in new.splits["train"]))
    new = replace(new, splits=new.splits | {"train": few})
    adam = Training(optimizer="adam", batch_size=64)

    @cache
    def trunk(seed: int) -> nn.Module:
        start = seeded(lambda: perceptron(width, 5), seed)
        return fit(start, old, adam, budget=Budget("epochs", sizes["epochs"] // 3 or 1), seed=seed).net

    adapters: dict[str, Callable[[], nn.Module]] = {
        "random features": lambda: SNNKAdapter(width, m),
        "bottleneck": lambda: Bottleneck(width, m // 2),
        "head alone": nn.Identity,
    }
    arms = {
        # the trunk belongs to the seed that the laboratory has set
        name: Arm(lambda make=make: adapted(trunk(torch.initial_seed()), make, 5), adam)  # type: ignore[misc]
        for name, make in adapters.items()
    }
    budget = Budget("epochs", sizes["epochs"])
    outcomes = compare_arms(arms, new, seeds, budget=budget, settings=settings)
    trained = {name: sum(p.numel() for p in make().parameters() if p.requires_grad) for name, make in adapters.items()}
    details: dict[str, Any] = {
        "adapters": {name: o.summary() | {"trained in an adapter": trained[name]} for name, o in outcomes.items()},
        "pointwise": pointwise(sizes["draws"], seeds[0]),
        "layer and bundle": whole_networks(images, sizes, seeds),
    }
    log.info("%s", details)
    return Comparison(
        method=outcomes["random features"].values("accuracy"),
        baseline=outcomes["bottleneck"].values("accuracy"),
        metric="test accuracy on the new classes",
        method_name=f"SNNK adapters, {m} features",
        baseline_name=f"bottleneck adapters of width {m // 2}, as many trained parameters",
        margin=-0.003,
        paper="SNNK adapters match or beat bottleneck and LoRA adapters on GLUE and on images",
        note="A perceptron pre-trained on five classes of small images in the place of a pre-trained transformer.",
        details=details,
    )


class Bottleneck(nn.Module):
    """x + U relu(V x + a) + b, with U zero at the start."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(features, width), nn.Linear(width, features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.relu(self.down(x)))


def perceptron(width: int, classes: int) -> nn.Sequential:
    """784-width-width-classes."""
    first, second = nn.Linear(784, width), nn.Linear(width, width)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), nn.Linear(width, classes))


def adapted(trunk: Any, make: Callable[[], nn.Module], classes: int) -> nn.Sequential:
    """A frozen copy of the trunk with an adapter after each hidden layer and a new head."""
    flatten, first, _, second, _, head = copy.deepcopy(trunk).requires_grad_(False)
    new_head = nn.Linear(head.in_features, classes)
    return nn.Sequential(flatten, first, nn.ReLU(), make(), second, nn.ReLU(), make(), new_head)


def some_classes(task: Task, classes: Sequence[int]) -> Task:
    """The examples of some classes, numbered anew."""
    splits = {}
    for name, (x, y) in task.splits.items():
        there = torch.isin(y, torch.tensor(list(classes)))
        splits[name] = Split(x[there], y[there] - min(classes))
    return replace(task, splits=splits, outputs=replace(task.outputs, size=len(classes), names=()))


def pointwise(draws: int, seed: int, d: int = 16) -> dict[str, Any]:
    """Root mean square error of the estimates for x and w of norm 1, over draws of the directions."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(d, 32, bias=False).double()
    linear.weight.data = F.normalize(torch.randn(32, d, generator=generator, dtype=torch.float64), dim=1)
    x = F.normalize(torch.randn(32, d, generator=generator, dtype=torch.float64), dim=1)
    t = torch.acos((x @ linear.weight.T).clamp(-1, 1))
    kernel = (t.sin() + (torch.pi - t) * t.cos()) / (2 * torch.pi)
    exact = {"sin": linear(x).sin(), "cos": linear(x).cos(), "relu": kernel}
    found: dict[str, Any] = {}
    for f, target in exact.items():
        for orthogonal in (True, False):
            name = f"{f}, {'orthogonal' if orthogonal else 'independent'}"
            found[name] = {}
            for m in (16, 64, 256, 1024):
                estimates = [
                    SNNK.like(linear, m, f, orthogonal=orthogonal, generator=generator)(x) for _ in range(draws)
                ]
                found[name][m] = float((torch.stack(estimates) - target).detach().square().mean().sqrt())
    return found


def whole_networks(task: Task, sizes: dict[str, Any], seeds: Sequence[int]) -> dict[str, list[float]]:
    """Test accuracy of a perceptron, with its second layer replaced, and fitted in closed form as one bundle."""
    width, m = sizes["width"], sizes["m"]
    budget, adam = Budget("epochs", sizes["epochs"] // 2 or 1), Training(optimizer="adam", batch_size=64)
    makers: dict[str, Callable[[], nn.Module]] = {
        "dense": lambda: perceptron(width, 10),
        "64 features for a layer": lambda: _second(SNNK(width, width, m)),
        "low rank, as many trained": lambda: _second(LowRankLinear(width, width, m // 2)),
    }

    def _second(layer: nn.Module) -> nn.Module:
        net = perceptron(width, 10)
        net[3] = layer
        return net

    found: dict[str, list[float]] = {name: [] for name in [*makers, "bundle in closed form", "seconds of the bundle"]}
    train, valid, test = (task.splits[name] for name in ("train", "valid", "test"))
    for seed in seeds:
        for name, make in makers.items():
            tried = [
                fit(seeded(make, seed), task, adam.model_copy(update={"lr": lr}), budget=budget, seed=seed)
                for lr in sizes["rates"][1:] or sizes["rates"]
            ]
            best = max(tried, key=lambda done: done.valid["accuracy"])
            found[name].append(evaluate(best.predict, task, "test")["accuracy"])
        start = time.perf_counter()
        net: Any = seeded(lambda: perceptron(width, 10)[1:], seed)
        merged = fully_bundled(net, 16 * m, generator=torch.Generator().manual_seed(seed + TUNING_SEED))
        x, fits = train.x.flatten(1), []
        for ridge in (1e-2, 1e-1, 1.0):
            merged.fit_closed_form(x, train.y, ridge)
            right = (merged(valid.x.flatten(1)).argmax(1) == valid.y).float().mean()
            fits.append((float(right), copy.deepcopy(merged.state_dict())))
        merged.load_state_dict(max(fits, key=lambda entry: entry[0])[1])
        found["seconds of the bundle"].append(time.perf_counter() - start)
        found["bundle in closed form"].append(float((merged(test.x.flatten(1)).argmax(1) == test.y).float().mean()))
    return found
