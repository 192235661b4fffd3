"""Do two networks that no line of low loss joins have a barrier in any single layer?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pomona.claims.lab import log, seeded
from pomona.claims.verdict import Comparison, Scale
from pomona.data import load
from pomona.data.task import Split, Task
from pomona.measure.layerwise_lmc import (
    LayerBarrier,
    barrier,
    cumulative_barriers,
    layers,
    layerwise_barriers,
    perturb_layer,
)
from pomona.measure.linear_path import Evaluator
from pomona.train import Budget, Training, fit

SIZES: dict[Scale, dict[str, Any]] = {
    "smoke": {"data": 600, "epochs": 1, "width": 32, "depth": 3, "eval": 200, "draws": 1},
    "full": {"data": 20_000, "epochs": 6, "width": 256, "depth": 6, "eval": 4000, "draws": 3},
    "gpu": {"data": 60_000, "epochs": 30, "width": 1024, "depth": 6, "eval": 10_000, "draws": 5},
}
N = 5
"""Points of each path."""
ORDERS: tuple[Literal["bottom_up"], Literal["top_down"]] = ("bottom_up", "top_down")
SHARE = 0.1
"""A single layer's barrier must stay under this share of the whole network's."""
TRAINING = Training(optimizer="adam", lr=1e-3, weight_decay=0.0, batch_size=64, patience=None)


def layerwise_lmc(scale: Scale, seeds: Sequence[int]) -> Comparison:
    """The largest barrier of any single layer is less than a tenth of the whole network's.

    Two ReLU MLPs of six layers from different initialisations on Fashion-MNIST. The barrier is the paper's: loss
    on test data with the layer at the midpoint, minus the mean loss of the two networks; the larger of both ways
    to leave the rest, over all layers. In the details: the barriers of each layer against the ends of its own path,
    errors, cumulative barriers from both ends, two networks from one initialisation on different halves of the
    data, and single layers moved towards the other network or as far in random directions.
    """
    size = SIZES[scale]
    task = load("fashion_mnist", limit=size["data"])
    x, y = task.splits["test"]
    data = x[: size["eval"]], y[: size["eval"]]
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        a, b = (_trained(task, seed + shift, size) for shift in (0, 500_009))
        halves = [_half(task, i) for i in (0, 1)]
        c, d = (_trained(half, seed, size) for half in halves)
        one, same = layerwise_barriers(a, b, data, n=N), layerwise_barriers(c, d, data, n=N)
        row: dict[str, Any] = {
            "whole": _row(barrier(a, b, data, n=N)),
            "single layers": {layer: _row(found) for layer, found in one.items()},
            "whole, error": _row(barrier(a, b, data, n=N, metric="error")),
            **{
                f"cumulative, {order}": {
                    layer: _row(found) for layer, found in cumulative_barriers(a, b, data, order=order, n=N).items()
                }
                for order in ORDERS
            },
            "one initialisation, whole": _row(barrier(c, d, data, n=N)),
            "one initialisation, single layers": {layer: _row(found) for layer, found in same.items()},
            "perturbed": _perturbed(a, b, data, size["draws"], seed),
        }
        rows.append(row)
        log.info("layerwise_lmc seed %d: whole %.3f, worst layer %.3f", seed, row["whole"]["network"], _worst(row))
    return Comparison(
        method=[_worst(row) for row in rows],
        baseline=[SHARE * row["whole"]["network"] for row in rows],
        metric="loss at the midpoint above the mean loss of the two networks, on test",
        method_name="the single layer with the largest barrier",
        baseline_name="a tenth of the whole network's barrier",
        paper="High barriers between whole deep networks, practically none in any single layer.",
        better="lower",
        note="Fully connected networks on Fashion-MNIST in the place of residual networks on CIFAR-10.",
        details=_mean(rows),
    )


def _make(width: int, depth: int) -> nn.Module:
    sizes = [784, *[width] * (depth - 1), 10]
    parts: list[nn.Module] = [nn.Flatten()]
    for i, o in pairwise(sizes):
        parts += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def _trained(task: Task, seed: int, size: dict[str, Any]) -> nn.Module:
    net = seeded(lambda: _make(size["width"], size["depth"]), seed)
    return fit(net, task, TRAINING, budget=Budget("epochs", size["epochs"]), seed=seed, keep="last").net


def _half(task: Task, which: int) -> Task:
    x, y = task.splits["train"]
    return Task(task.name, task.inputs, task.outputs, {**task.splits, "train": Split(x[which::2], y[which::2])})


def _row(found: LayerBarrier) -> dict[str, float]:
    """The larger of the two ways to leave the rest."""
    return {"network": max(found.network), "segment": max(found.segment)}


def _worst(row: dict[str, Any]) -> float:
    return max(found["network"] for found in row["single layers"].values())


def _perturbed(
    a: nn.Module, b: nn.Module, data: tuple[Tensor, Tensor], draws: int, seed: int
) -> dict[str, dict[str, float]]:
    """Rise of the loss when a layer of a goes half the way to b, or as far in random directions."""
    evaluate, generator = Evaluator(a, data), torch.Generator().manual_seed(seed)
    out = {}
    for layer, names in layers(a).items():
        states = [dict(net.named_parameters()) for net in (a, b)]
        norm = 0.5 * float(torch.cat([(states[1][n] - states[0][n]).detach().flatten() for n in names]).norm())
        nets = [perturb_layer(a, layer, norm, towards=b)]
        nets += [perturb_layer(a, layer, norm, generator=generator) for _ in range(draws)]
        loss, _ = evaluate([net.state_dict() for net in (a, *nets)])
        rise = loss[1:] - loss[0]
        out[layer] = {"towards the other network": float(rise[0]), "random": float(rise[1:].mean())}
    return out


def _mean(rows: Sequence[Any]) -> Any:
    """Mean over seeds, through nested dicts."""
    if isinstance(rows[0], dict):
        return {key: _mean([row[key] for row in rows]) for key in rows[0]}
    return sum(rows) / len(rows)
