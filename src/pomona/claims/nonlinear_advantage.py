"""Is nonlinearity needed early in training only?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pomona.claims.lab import log, seeded
from pomona.claims.verdict import Comparison, Scale
from pomona.data import Task, load
from pomona.edit.nonlinear_advantage import Linearize, core_network, linearize_units, make_linear
from pomona.train import Budget, Training, evaluate, fit

SIZES: dict[str, dict[str, Any]] = {
    "smoke": {"epochs": 2.0, "depth": 3, "width": 16, "shares": (0.2,)},
    "full": {"epochs": 60.0, "depth": 8, "width": 64, "shares": (0.5, 0.2, 0.1)},
    "gpu": {"epochs": 400.0, "depth": 8, "width": 256, "shares": (0.5, 0.2, 0.1, 0.05)},
}
DECIDES = 0.2
WEIGHT, RATE = 100.0, 10.0
"""Of the penalty, and of the slopes' learning rate against the weights': the target is met long before the end."""
RAMP = 0.1
"""Share of the training over which the penalty grows by its full weight; it grows on until the target is met."""
TRAINING = Training(
    optimizer="adam", lr=1e-3, weight_decay=0.0, batch_size=100, schedule="constant", warmup=0.0, patience=None
)


def nonlinear_advantage(scale: Scale, seeds: Sequence[int]) -> Comparison:
    """With a fifth of the units left nonlinear, a network linearised after it has learned tests better than one
    linearised from the start.

    A residual MLP with eight blocks learns MNIST-1D. The penalty on its slopes begins at step 0 or in the middle of
    the training, grows until the wanted share of channels is linear, and then ends; both trainings are equally long.
    Where a training ends before that, the channels nearest to linear are made so. Other shares, the plain network, the
    wholly linear one and the cores' depth, width and path length are in the details.
    """
    size = SIZES[scale]
    task = load("mnist1d")
    budget = Budget("epochs", size["epochs"])
    steps = round(size["epochs"] * (len(task.splits["train"]) // TRAINING.batch_size))
    table: dict[str, dict[str, list[float]]] = {}

    def note(kind: str, net: nn.Module, **more: float) -> float:
        values = {"accuracy": evaluate(net, task, "test")["accuracy"], **core_network(net, task.example), **more}
        for name, value in values.items():
            table.setdefault(kind, {}).setdefault(name, []).append(value)
        return values["accuracy"]

    for seed in seeds:
        net = seeded(lambda: _Residual(task, size["width"], size["depth"]), seed)
        start = linearize_units(net, task.example, lr_scale=RATE)
        note("plain", _train(start, task, budget, seed, ()))
        linear = linearize_units(net, task.example)
        make_linear(linear, 1.0)
        note("wholly linear", _train(linear, task, budget, seed, ()))
        for share in size["shares"]:
            for kind, first in (("early", 0), ("late", steps // 2)):
                callback = Linearize(WEIGHT, start=first, ramp=max(1, round(RAMP * steps)), target=1 - share)
                net = _train(start, task, budget, seed, (callback,))
                reached = core_network(net, task.example)["share"]
                if reached > share:  # the training ended before the target was met
                    make_linear(net, 1 - share)
                note(f"{kind} {share}", net, reached=reached)
        late, early = (table[f"{kind} {DECIDES}"]["accuracy"][-1] for kind in ("late", "early"))
        log.info("seed %d: late %.4f, early %.4f", seed, late, early)
    return Comparison(
        method=table[f"late {DECIDES}"]["accuracy"],
        baseline=table[f"early {DECIDES}"]["accuracy"],
        metric="test accuracy with a fifth of the units nonlinear",
        method_name="linearised from the middle of the training on",
        baseline_name="linearised from the start",
        paper="Most units of a trained network can be made linear at little cost; doing so early costs much more.",
        note="MNIST-1D and a residual MLP in the place of CIFAR-10 and ResNet-56.",
        details={
            kind: {name: float(torch.tensor(v, dtype=torch.float64).mean()) for name, v in row.items()}
            for kind, row in table.items()
        },
    )


def _train(net: nn.Module, task: Task, budget: Budget, seed: int, callbacks: Sequence[Any]) -> nn.Module:
    return fit(net, task, TRAINING, budget=budget, seed=seed, callbacks=callbacks, keep="last").net


class _Residual(nn.Module):
    """x + W2 relu(norm(W1 x)), ``depth`` times."""

    def __init__(self, task: Task, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Flatten(), nn.Linear(task.example[0].numel(), width))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
            for _ in range(depth)
        )
        self.head = nn.Linear(width, task.outputs.size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)
