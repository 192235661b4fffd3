"""Whether kernels that the activations modulate beat fixed ones, in networks without residual connections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import nn

from pomona.claims.lab import Arm, Maker, compare_arms, grid
from pomona.claims.verdict import Comparison, Scale, t_interval
from pomona.data import load
from pomona.data.task import Split, Task
from pomona.nets.convnet import ConvNet
from pomona.nets.cost import match_width, parameters
from pomona.nets.fill import Fill
from pomona.nets.resnet import ResNet
from pomona.nets.terminator import Terminator
from pomona.nn.hyperzzw import BRANCHES
from pomona.train.budget import Budget
from pomona.train.settings import Training

SIZES: dict[Scale, dict[str, Any]] = {
    "smoke": {"limit": 120, "pool": 4, "width": 3, "examples": 32, "rates": [3e-3]},
    "full": {"limit": 2000, "pool": 2, "width": 8, "examples": 4500, "rates": [3e-3, 1e-2]},
    "gpu": {"limit": 10_000, "pool": 1, "width": 24, "examples": 100_000, "rates": [1e-3, 3e-3]},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "no context": {"context": False},
    "no global branch": {"branches": [name for name in BRANCHES if not name.startswith("global_")]},
    "no slow loss": {"slow_weight": 0.0},
}


def hyperzzw(scale: Scale, seeds: Sequence[int]) -> Comparison:
    """Claimed: kernels multiplied with the activations gain more than a point over the same kernels without them.

    Two slow-fast blocks on Fashion-MNIST, averaged to 14 x 14 pixels; equal examples, learning rates chosen on
    validation. In the details: no global branch, no loss between the slow networks, a residual network and a deep plain
    convolutional one of the full network's parameters, paired differences from the full network, validation accuracy
    after the first tenth of the training (claimed: higher than the residual network's), and time against the residual
    network (claimed: 3 to 8 times slower).
    """
    sizes = SIZES[scale]
    task = _smaller(load("fashion_mnist", limit=sizes["limit"]), sizes["pool"])
    shape = task.inputs.shape[1], task.inputs.shape[2]
    makers: dict[str, Maker] = {
        name: partial(Terminator, 1, 10, shape, width=sizes["width"], **options) for name, options in VARIANTS.items()
    }
    target = parameters(makers["full"]())
    for name, make in {"resnet": partial(_resnet, task), "plain convolutions": partial(_plain, task)}.items():
        width = match_width(make, target, tolerance=0.5)
        makers[name] = partial(make, width)
    arms = {name: Arm(make, Training(batch_size=32)) for name, make in makers.items()}
    budget, settings = Budget("examples", sizes["examples"]), grid(lr=sizes["rates"])
    outcomes = compare_arms(arms, task, seeds, budget=budget, settings=settings)
    accuracy = {name: outcome.values("accuracy") for name, outcome in outcomes.items()}
    details: dict[str, Any] = {}
    for name, outcome in outcomes.items():
        early = [fit.curve[0]["accuracy"] for fit in outcome.fits]
        pairs = [a - b for a, b in zip(accuracy["full"], accuracy[name], strict=True)]
        details[name] = outcome.summary() | {"early validation accuracy": sum(early) / len(early)}
        details[name]["full minus this"] = t_interval(pairs)  # type: ignore[arg-type]
    details["time over resnet"] = outcomes["full"].seconds / outcomes["resnet"].seconds
    return Comparison(
        method=accuracy["full"],
        baseline=accuracy["no context"],
        metric="accuracy on test",
        method_name="kernels multiplied with the activations",
        baseline_name="the same kernels without them",
        margin=0.01,
        paper="CIFAR-10 93 to 94 % with about 1.2 million parameters and no residual connections (figures from memory)",
        note="Small networks, small images, a few thousand of them.",
        details=details,
    )


def _resnet(task: Task, width: int) -> nn.Module:
    return ResNet(task.inputs, task.outputs, Fill(ResNet.slots), width=width, depth=2, blocks=2)


def _plain(task: Task, width: int) -> nn.Module:
    return ConvNet(task.inputs, task.outputs, Fill(ConvNet.slots), width=width, depth=8)


def _smaller(task: Task, k: int) -> Task:
    """The task with images averaged over k x k pixels."""
    splits = {name: Split(F.avg_pool2d(split.x, k), split.y) for name, split in task.splits.items()}
    return replace(task, inputs=replace(task.inputs, shape=tuple(splits["train"].x.shape[1:])), splits=splits)
