"""Does permuting units take the barrier between two independently trained networks away?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pomona.claims.lab import log, seeded
from pomona.claims.verdict import Comparison, Scale
from pomona.data import Task, load
from pomona.data.task import Split
from pomona.edit.git_rebasin import Method, apply, interpolation, match, merge, merge_models, repair
from pomona.trace.axes import axes
from pomona.trace.axis import AxisSet
from pomona.train import Budget, Training, evaluate, fit

# widths, the last of which decides; other ways of matching are tried at the middle one
SIZES: dict[str, dict[str, Any]] = {
    "smoke": {"data": 600, "epochs": 1.0, "widths": (8, 16, 32), "points": 3, "ste": 2},
    "full": {"data": 30_000, "epochs": 4.0, "widths": (32, 128, 512), "points": 11, "ste": 60},
    "gpu": {"data": 60_000, "epochs": 20.0, "widths": (32, 128, 512, 2048), "points": 25, "ste": 500},
}
SHARE = 0.25
"""Of the naive barrier; what matching leaves must be below."""
TRAINING = Training(optimizer="adam", lr=1e-3, weight_decay=0.0, batch_size=128, patience=None)


def git_rebasin(scale: Scale, seeds: Sequence[int]) -> Comparison:
    """Between wide MLPs trained apart, matching the weights leaves less than a quarter of the barrier.

    Two MLPs with two hidden layers of equal width learn Fashion-MNIST from different initialisations and batches. The
    barrier is the largest excess of the test loss over the straight line between the two ends. Narrower networks, the
    other ways of matching, and networks that saw five classes each (merged, and repaired) are in the details.
    """
    size = SIZES[scale]
    task = load("fashion_mnist", limit=size["data"])
    head = task.splits["train"].x[:4000], task.splits["train"].y[:4000]
    table: dict[str, dict[str, list[float]]] = {}

    def note(width: int, **values: float) -> None:
        row = table.setdefault(f"width {width}", {})
        for name, value in values.items():
            row.setdefault(name, []).append(value)

    for seed in seeds:
        for width in size["widths"]:
            a, b = (_trained(width, task, 2 * seed + i, size["epochs"]) for i in (0, 1))
            trace = axes(a, task.example[:2])
            ends = _accuracy(a, task), _accuracy(b, task)
            naive = _barrier(a, b, task, size["points"])
            matched = apply(b, trace, match(a, b, trace, seed=seed))
            left = _barrier(a, matched, task, size["points"])
            note(
                width,
                naive_barrier=naive["barrier"],
                matched_barrier=left["barrier"],
                ends_accuracy=sum(ends) / 2,
                naive_accuracy=_accuracy(merge([a, b]), task),
                matched_accuracy=_accuracy(merge([a, matched]), task),
            )
            if width == size["widths"][1]:
                methods: tuple[Method, ...] = ("activations", "ste", "sinkhorn")
                for method in methods:
                    found = match(a, b, trace, method, data=head, steps=size["ste"], seed=seed)
                    note(width, **{f"{method}_barrier": _barrier(a, apply(b, trace, found), task, 3)["barrier"]})
                note(width, **_halves(task, width, seed, size["epochs"], trace))
        last = table[f"width {size['widths'][-1]}"]
        log.info("seed %d: naive %.3f, matched %.3f", seed, last["naive_barrier"][-1], last["matched_barrier"][-1])
    last = table[f"width {size['widths'][-1]}"]
    return Comparison(
        method=last["matched_barrier"],
        baseline=[SHARE * value for value in last["naive_barrier"]],
        metric=f"loss barrier on test at width {size['widths'][-1]} (nats)",
        method_name="after weight matching",
        baseline_name="a quarter of the barrier without it",
        paper="Wide MLPs trained apart are connected without a barrier after matching; narrow ones less so.",
        better="lower",
        details={width: {name: _mean(values) for name, values in row.items()} for width, row in table.items()},
    )


def _mlp(width: int) -> nn.Module:
    hidden = [nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))


def _trained(width: int, task: Task, seed: int, epochs: float) -> nn.Module:
    return fit(
        seeded(lambda: _mlp(width), seed), task, TRAINING, budget=Budget("epochs", epochs), seed=seed, keep="last"
    ).net


def _barrier(a: nn.Module, b: nn.Module, task: Task, points: int) -> dict[str, Any]:
    return interpolation(a, b, lambda net: evaluate(net, task, "test")["loss"], points)


def _accuracy(net: nn.Module, task: Task) -> float:
    return evaluate(net, task, "test")["accuracy"]


def _halves(task: Task, width: int, seed: int, epochs: float, trace: AxisSet) -> dict[str, float]:
    """Two networks that saw five classes each, from one initialisation: they, their merger and its repair, on all."""
    ends = []
    for low in (True, False):
        kept = {name: (split.y < 5) == low for name, split in task.splits.items()}
        part = replace(task, splits={n: Split(s.x[kept[n]], s.y[kept[n]]) for n, s in task.splits.items()})
        net = seeded(lambda: _mlp(width), seed)
        ends.append(fit(net, part, TRAINING, budget=Budget("epochs", epochs), seed=seed, keep="last").net)
    a, b = ends
    moved = apply(b, trace, match(a, b, trace, seed=seed))
    merged = merge_models([a, b], trace, seed=seed)
    inputs = task.splits["train"].x[:1000]
    mended = repair(merged, inputs, (a, moved), trace)
    parents = max(_accuracy(a, task), _accuracy(b, task))
    return {
        "half_parents": parents,
        "half_merged": _accuracy(merged, task),
        "half_repaired": _accuracy(mended, task),
    }


def _mean(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).mean())
