"""Whether a network that loses no information until its last layer classifies as well as one that does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.claims.lab import Arm, Maker, compare_arms, grid, log
from pomona.claims.verdict import Comparison, Scale, t_interval
from pomona.data import load
from pomona.data.task import Split, Task
from pomona.measure.invertible import contraction, saved_activations
from pomona.nets.cost import match_width, parameters
from pomona.nets.fill import Fill
from pomona.nets.irevnet import IRevNet
from pomona.nets.resnet import ResNet
from pomona.train.budget import Budget
from pomona.train.loop import Fit, evaluate
from pomona.train.settings import Training

SIZES: dict[Scale, dict[str, Any]] = {
    "smoke": {"limit": 250, "blocks": 1, "examples": 32, "rates": [3e-3], "probed": 100, "deep": (1, 2)},
    "full": {"limit": 3000, "blocks": 2, "examples": 10_000, "rates": [3e-3, 1e-2], "probed": 600, "deep": (6, 24)},
    "gpu": {"limit": 10_000, "blocks": 6, "examples": 120_000, "rates": [1e-3, 3e-3], "probed": 2000, "deep": (6, 24)},
}
# three stages whose streams have 8, 32 and 128 channels in both, so that their functions have equal sizes
VARIANTS: dict[str, dict[str, Any]] = {
    "bijective": {"strides": (2, 2, 2)},
    "injective": {"strides": (1, 2, 2), "init": "injective-pad", "width": 8},
}


def irevnet(scale: Scale, seeds: Sequence[int]) -> Comparison:
    """Claimed: the injective i-RevNet is no more than 1.5 points below a residual network of equal parameters.

    Fashion-MNIST padded to 32 x 32, three stages, equal examples, learning rates chosen on validation. In the details:
    the bijective variant; the largest relative error of reconstructed training, test and noise images (claimed: below
    1e-5); accuracy of a linear and a nearest-neighbour classifier on the features of every depth, at the first seed
    (claimed: growing throughout); and bytes of activations that training stores with recomputation and without, at two
    depths (claimed: constant in depth, and at least 4 times fewer at the larger).
    """
    sizes = SIZES[scale]
    task = _padded(load("fashion_mnist", limit=sizes["limit"]))
    makers: dict[str, Maker] = {name: partial(_make, name, sizes["blocks"]) for name in VARIANTS}
    target = parameters(makers["injective"]())
    width = match_width(lambda width: _resnet(task, width, sizes["blocks"]), target, tolerance=0.3)
    makers["resnet"] = partial(_resnet, task, width, sizes["blocks"])
    arms = {name: Arm(make, Training(batch_size=64)) for name, make in makers.items()}
    budget, settings = Budget("examples", sizes["examples"]), grid(lr=sizes["rates"])
    outcomes = compare_arms(arms, task, seeds, budget=budget, settings=settings, score=_score, keep_fits=True)
    details: dict[str, Any] = {name: outcome.summary() for name, outcome in outcomes.items()}
    accuracy = {name: outcome.values("accuracy") for name, outcome in outcomes.items()}
    pairs = [a - b for a, b in zip(accuracy["bijective"], accuracy["resnet"], strict=True)]
    details["bijective minus resnet"] = t_interval(pairs)  # type: ignore[arg-type]
    for name in VARIANTS:
        net, count = outcomes[name].fits[0].net, sizes["probed"]
        assert isinstance(net, IRevNet)
        fitted, judged = (Split(*(t[:count] for t in task.splits[part])) for part in ("train", "test"))
        details[f"{name}, by depth"] = contraction(net, fitted, judged).values
    rows = task.splits["train"].x[:8]
    details["bytes stored"] = {
        f"{blocks} blocks a stage, {kind}": saved_activations(_make("injective", blocks, reversible=flag), rows)
        for blocks in sizes["deep"]
        for kind, flag in (("stored", False), ("recomputed", True))
    }
    log.info("bytes stored: %s", details["bytes stored"])
    return Comparison(
        method=accuracy["injective"],
        baseline=accuracy["resnet"],
        metric="accuracy on test",
        method_name="injective i-RevNet",
        baseline_name="residual network of equal parameters",
        margin=-0.015,
        paper="ImageNet top-1 error 24.7 and 26.7 % against 24.7 of ResNet-50, relative error of reconstruction 5e-6 "
        "(figures from memory)",
        note="Small networks, a few thousand images.",
        details=details,
    )


def _make(variant: str, blocks: int, reversible: bool = False) -> IRevNet:
    return IRevNet(1, 10, blocks=(blocks,) * 3, reversible=reversible, **VARIANTS[variant])


def _resnet(task: Task, width: int, blocks: int) -> nn.Module:
    return ResNet(task.inputs, task.outputs, Fill(ResNet.slots), width=width, depth=3, blocks=blocks)


def _padded(task: Task) -> Task:
    splits = {name: Split(F.pad(split.x, (2, 2, 2, 2)), split.y) for name, split in task.splits.items()}
    return replace(task, inputs=replace(task.inputs, shape=(1, 32, 32)), splits=splits)


def _score(fit: Fit, task: Task) -> dict[str, float]:
    result = {"accuracy": evaluate(fit.predict, task, "test")["accuracy"]}
    if isinstance(fit.net, IRevNet):
        images = {name: task.splits[name].x[:500] for name in ("train", "test")}
        images["noise"] = torch.randn(images["test"].shape, generator=torch.Generator().manual_seed(0))
        result |= {f"error on {name}": _relative_error(fit.net, x) for name, x in images.items()}
    return result


def _relative_error(net: IRevNet, x: Tensor) -> float:
    """The largest ||x - reconstructed|| / ||x|| of an image."""
    return float(((net.reconstruct(x) - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)).max())
