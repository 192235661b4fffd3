"""At half the operations, is a network that chooses its channels for each input better than one pruned for good?"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pomona.claims.lab import TUNING_SEED, log, seeded
from pomona.claims.verdict import Comparison, Scale
from pomona.data import Task, load
from pomona.edit.ftwt import DynamicChannels
from pomona.edit.operations import take
from pomona.nets.cost import flops
from pomona.trace.axes import axes
from pomona.train import Budget, Training, evaluate, fit

SIZES: dict[str, dict[str, Any]] = {
    "smoke": {"data": 300, "epochs": 1.0, "tune": 1.0, "widths": (4, 6, 8, 8), "rates": (1e-3,)},
    "full": {"data": 6000, "epochs": 4.0, "tune": 2.0, "widths": (16, 32, 64, 64), "rates": (5e-4, 2e-3)},
    "gpu": {"data": 60_000, "epochs": 20.0, "tune": 10.0, "widths": (32, 64, 128, 128), "rates": (5e-4, 2e-3)},
}
BUDGET = 0.5
"""Share of the operations, for which tau is chosen before any training of masks."""
ADAM: dict[str, Any] = {"optimizer": "adam", "weight_decay": 0.0, "batch_size": 64, "patience": None}
Tuned = Callable[[nn.Module, float], nn.Module]


def ftwt(scale: Scale, seeds: Sequence[int]) -> Comparison:
    """At equal operations, predicted masks test better than units cut by the scale of their batch norm.

    A network of four convolutions learns Fashion-MNIST. For the method tau is chosen on training images so that the
    targets would leave half the operations; network and predictors are then fine-tuned. What that takes on validation
    images, predictors included, is what the static network may take: the same layers are cut to equal shares, to no
    fewer operations, and it is fine-tuned as long. Both choose their learning rate on validation. Masks that are drawn
    at random for each input, of the same density, are in the details, with the estimated and the realised saving.
    """
    size = SIZES[scale]
    task = load("fashion_mnist", limit=size["data"])
    rates = _rates(size, task, seeds[0] + TUNING_SEED)
    rows = []
    for seed in seeds:
        net, tuned = _pretrained(size, task, seed)
        start = _dynamic(net, task, seed)
        head = task.splits["train"].x[:500]
        dynamic: Any = tuned(start, rates["dynamic"])
        spent = _spent(dynamic, task, "valid")
        dynamic(task.splits["valid"].x[:500])
        kept = dynamic.kept()
        static, share = _static(net, task, start, spent)
        static = tuned(static, rates["static"])
        noisy = DynamicChannels(net, task.example, tau=start.tau, seed=seed)
        noisy.masks = _random(kept, seed)
        random = tuned(noisy, rates["dynamic"])
        row = {
            "whole": evaluate(net, task, "test")["accuracy"],
            "dynamic": evaluate(dynamic, task, "test")["accuracy"],
            "static": evaluate(static, task, "test")["accuracy"],
            "random": evaluate(random, task, "test")["accuracy"],
            "tau": start.tau,
            "static_width": share,
            "flops": spent / start.total,
            "test_flops": _spent(dynamic, task, "test") / start.total,
            "static_flops": flops(static, task.example) / start.total,
            "estimated_flops": start.estimate_flops(head) / start.total,
        }
        rows.append(row)
        log.info("seed %d: %s", seed, {name: round(value, 4) for name, value in row.items()})
    return Comparison(
        method=[row["dynamic"] for row in rows],
        baseline=[row["static"] for row in rows],
        metric="test accuracy at about half the operations",
        method_name="channels chosen for each input",
        baseline_name="channels cut for good by the scale of their batch norm, as many operations",
        paper="VGG16 on CIFAR-10 loses 0.1 points at 56% fewer operations, static pruning of equal size more.",
        note="Fashion-MNIST and four convolutions in the place of CIFAR-10 and VGG16.",
        details={"rates": rates, **{name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}},
    )


def _pretrained(size: dict[str, Any], task: Task, seed: int) -> tuple[nn.Module, Tuned]:
    """A trained network, and what fine-tunes one."""
    net = seeded(lambda: _net(size["widths"]), seed)

    def trained(one: nn.Module, rate: float, epochs: float, seed: int) -> nn.Module:
        budget, settings = Budget("epochs", epochs), Training(lr=rate, **ADAM)
        return fit(one, task, settings, budget=budget, seed=seed, validations=1, keep="last").net

    return trained(net, 2e-3, size["epochs"], seed), lambda one, rate: trained(one, rate, size["tune"], seed + 1)


def _rates(size: dict[str, Any], task: Task, seed: int) -> dict[str, float]:
    """The learning rate of either method that does best on validation, at a seed of its own."""
    net, tuned = _pretrained(size, task, seed)
    start = _dynamic(net, task, seed)
    static, _ = _static(net, task, start, BUDGET * start.total + start.overhead)
    return {
        name: max(size["rates"], key=lambda rate, one=one: evaluate(tuned(one, rate), task, "valid")["accuracy"])  # type: ignore[misc]
        for name, one in (("dynamic", start), ("static", static))
    }


def _dynamic(net: nn.Module, task: Task, seed: int) -> DynamicChannels:
    model = DynamicChannels(net, task.example, seed=seed)
    model.choose_tau(task.splits["train"].x[:500], BUDGET * model.total)
    return model


@torch.no_grad()
def _spent(model: DynamicChannels, task: Task, split: str) -> float:
    return float(model.active_flops(task.splits[split].x).mean()) + model.overhead


def _static(net: nn.Module, task: Task, start: DynamicChannels, budget: float) -> tuple[nn.Module, float]:
    """The same layers cut to the smallest equal share that takes no fewer operations; and the share."""
    trace = axes(net, task.example[:2])
    only = [f"{layer.key}.weight" for layer in start.layers() if layer.key is not None]
    shares = torch.linspace(0.2, 1, 81).tolist()

    def cut(share: float) -> nn.Module:
        return take(net, trace, share, "bn", only=only).net

    share = shares[min(bisect_left(shares, budget, key=lambda share: flops(cut(share), task.example)), 80)]
    return cut(share), share


def _random(kept: dict[str, float], seed: int) -> Callable[[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda key, logits: (torch.rand(logits.shape, generator=generator) < kept[key]).to(logits.device)


def _net(widths: Sequence[int]) -> nn.Module:
    layers: list[nn.Module] = []
    channels = 1
    for i, width in enumerate(widths):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if i < 2 else []
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
