"""Whether convolution needs only a graph of neighbours, found from data where the order of the pixels is lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pomona.claims.lab import TUNING_SEED, log, seeded
from pomona.claims.verdict import Comparison, Scale, t_interval
from pomona.data import load
from pomona.data.task import Split, Task
from pomona.nets.cost import training_memory
from pomona.nn.parametric_spans import ParametricSpan, SpanLayer, avg_pool, conv, dense, graph
from pomona.train.budget import Budget
from pomona.train.loop import evaluate, fit
from pomona.train.settings import Training

SIZES: dict[Scale, dict[str, Any]] = {
    "smoke": {"epochs": 2, "channels": 4, "rates": [1e-2], "repeats": 2},
    "full": {"epochs": 40, "channels": 16, "rates": [1e-2, 3e-3], "repeats": 20},
    "gpu": {"epochs": 200, "channels": 32, "rates": [1e-2, 3e-3, 1e-3], "repeats": 50},
}
SIDE, IMAGES, NEIGHBOURS = 8, 300, 8
Spans = dict[str, tuple[ParametricSpan, Callable[[Tensor, Tensor], Tensor]]]


def parametric_spans(scale: Scale, seeds: Sequence[int]) -> Comparison:
    """Claimed: on digits with shuffled pixels, a graph of correlated pixels is 3 points better than the wrong grid.

    300 training images, all with their pixels in one random order; networks of two span layers with nine weights a
    pair of channels, and a linear readout. The spans are convolutions on (a) the true grid, (b) the grid of the
    shuffled order, or (c) each pixel's eight most correlated ones in the training images, where the place in that
    order says which weight. Compared are (c) and (b); in the details: (a) (claimed: within 2 points of (c)), the
    errors of eight classical layers written as spans against torch (claimed: below 1e-4), and time and memory
    over those of torch (claimed: 5 to 50 times the time).
    """
    sizes = SIZES[scale]
    task = load("digits")
    results: dict[str, list[float]] = {}
    details: dict[str, Any] = {}
    for kind in ("true grid", "shuffled grid", "correlated pixels"):
        tried = [_accuracy(kind, task, sizes, rate, seeds[0] + TUNING_SEED, "valid") for rate in sizes["rates"]]
        rate = sizes["rates"][int(np.argmax(tried))]
        results[kind] = [_accuracy(kind, task, sizes, rate, seed, "test") for seed in seeds]
        details[kind] = {"lr": rate, "accuracy": results[kind]}
        log.info("%s: %s", kind, details[kind])
    for other in ("correlated pixels", "shuffled grid"):
        gap = np.subtract(results["true grid"], results[other])
        details[f"true grid minus {other}"] = {"mean": float(gap.mean()), "interval": t_interval(gap)}
    details["largest error against torch"] = {name: _errors(*pair) for name, pair in classical_layers().items()}
    details["over torch"] = _cost(sizes["repeats"])
    return Comparison(
        method=results["correlated pixels"],
        baseline=results["shuffled grid"],
        metric="accuracy on test",
        method_name="span layers over each pixel's eight most correlated ones",
        baseline_name="convolutions on the grid of the shuffled order",
        margin=0.03,
        paper="no numbers: classical layers are special cases, and derivatives follow by permuting the legs",
        note="The linear readout sees every place, so that the spans only have to make useful features.",
        details=details,
    )


def _shuffled(task: Task, seed: int) -> tuple[Task, Tensor]:
    """300 training images, (pixels, 1), all pixels in one random order; and the true place of each."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.randperm(SIDE**2, generator=generator)
    chosen = torch.randperm(len(task.splits["train"]), generator=generator)[:IMAGES]
    splits = {name: Split(x.flatten(1)[:, place, None], y) for name, (x, y) in task.splits.items()}
    splits["train"] = Split(splits["train"].x[chosen], splits["train"].y[chosen])
    return replace(task, splits=splits), place


def _span(kind: str, task: Task, place: Tensor) -> ParametricSpan:
    if kind == "correlated pixels":
        return correlated(task.splits["train"].x[..., 0])
    grid = conv((SIDE, SIDE), 3, padding=1)
    if kind == "shuffled grid":
        return grid
    now = place.argsort()  # where each place of the true grid is in the shuffled order
    return ParametricSpan(now[grid.source], now[grid.target], grid.weight, grid.n_x, grid.n_y, grid.n_w)


def correlated(x: Tensor, count: int = NEIGHBOURS) -> ParametricSpan:
    """Each pixel's ``count`` most correlated ones and itself, by rank of correlation: x (images, pixels)."""
    value = torch.corrcoef(x.T).nan_to_num(0.0).abs()  # a pixel that never changes is correlated with none
    value.fill_diagonal_(2.0)
    near = value.topk(count + 1, -1).indices
    pixels, ranks = torch.meshgrid(torch.arange(len(near)), torch.arange(count + 1), indexing="ij")
    return ParametricSpan(near.flatten(), pixels.flatten(), ranks.flatten(), len(near), len(near), count + 1)


def _net(span: ParametricSpan, channels: int) -> nn.Module:
    first, second = SpanLayer(span, 1, channels), SpanLayer(span, channels, channels)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(span.n_y * channels, 10))


def _accuracy(kind: str, task: Task, sizes: dict[str, Any], rate: float, seed: int, split: str) -> float:
    here, place = _shuffled(task, seed)
    net = seeded(partial(_net, _span(kind, here, place), sizes["channels"]), seed)
    training = Training(lr=rate, batch_size=50, patience=None)
    done = fit(net, here, training, budget=Budget("epochs", sizes["epochs"]), seed=seed)
    return evaluate(done.net, here, split)["accuracy"]


def classical_layers() -> Spans:
    """Name -> (span, torch's layer): x (batch, n_x), w (n_w) -> (batch, n_y)."""

    def conv2d(groups: int = 1, **options: Any) -> tuple[ParametricSpan, Callable[[Tensor, Tensor], Tensor]]:
        shape = (6, 4 // groups, 3, 3)
        return conv((7, 6), 3, **options).channels(4, 6, groups), lambda x, w: F.conv2d(
            x.view(-1, 4, 7, 6), w.view(shape), groups=groups, **options
        ).flatten(1)

    edges = torch.randint(9, (2, 20), generator=torch.Generator().manual_seed(0)).unique(dim=1)
    adjacency = torch.zeros(9, 9).index_put((edges[1], edges[0]), torch.ones(()))
    down = conv((7, 7), 3, stride=2).channels(3, 2)
    return {
        "linear": (dense(8, 5), lambda x, w: F.linear(x, w.view(5, 8))),
        "convolution in 1-d": (
            conv(9, 3, padding=1).channels(2, 3),
            lambda x, w: F.conv1d(x.view(-1, 2, 9), w.view(3, 2, 3), padding=1).flatten(1),
        ),
        "convolution in 2-d, stride 2": conv2d(stride=2, padding=1),
        "dilated convolution": conv2d(dilation=2, padding=2),
        "grouped convolution": conv2d(groups=2, padding=1),
        "transposed convolution": (
            down.reverse(),
            lambda x, w: F.conv_transpose2d(x.view(-1, 2, 3, 3), w.view(2, 3, 3, 3), stride=2).flatten(1),
        ),
        "average pooling": (avg_pool((6, 6), 2), lambda x, w: w * F.avg_pool2d(x.view(-1, 1, 6, 6), 2).flatten(1)),
        "graph": (graph(edges, 9), lambda x, w: w * x @ adjacency.T),
    }


def _errors(span: ParametricSpan, native: Callable[[Tensor, Tensor], Tensor]) -> dict[str, float]:
    """Largest differences of output and gradients on random numbers."""
    generator = torch.Generator().manual_seed(0)
    x, w, g = (
        torch.randn(*shape, generator=generator).requires_grad_()
        for shape in ((4, span.n_x), (span.n_w,), (4, span.n_y))
    )
    sides = [(y := layer(x, w), *torch.autograd.grad(y, (x, w), g)) for layer in (span, native)]
    return {
        name: float((a - b).detach().abs().max())
        for name, a, b in zip(("output", "gradient of x", "gradient of w"), *sides, strict=True)
    }


def _cost(repeats: int, channels: int = 16, batch: int = 64) -> dict[str, float]:
    """Time of a training step and memory of the span of a 3 x 3 convolution, over torch's."""
    x = torch.randn(batch, SIDE**2, channels, generator=torch.Generator().manual_seed(0))
    pairs: list[tuple[nn.Module, Tensor]] = [
        (SpanLayer(conv((SIDE, SIDE), 3, padding=1), channels, channels), x),
        (nn.Conv2d(channels, channels, 3, padding=1), x.mT.unflatten(-1, (SIDE, SIDE)).contiguous()),
    ]
    seconds = []
    for layer, rows in pairs:
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            layer(rows).square().mean().backward()
            times.append(time.perf_counter() - start)
        seconds.append(min(times[1:]))
    memory = [training_memory(layer, rows) for layer, rows in pairs]
    return {"time": seconds[0] / seconds[1], "memory": memory[0] / memory[1]}
