"""The survey's map of quantisation: what is free, what breaks, and what repairs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from pomona.claims.lab import log, seeded
from pomona.claims.verdict import Bound, Scale
from pomona.data import Task, load
from pomona.edit.batchnorm import fold_batch_norms
from pomona.edit.quantize import AdaRound, Quantizer, allocate, hessian_traces, stored_bytes
from pomona.edit.quantize import quantize as quantized
from pomona.train import Budget, Training, evaluate, fit

SIZES: dict[str, dict[str, Any]] = {
    "smoke": {"data": 200, "series": 200, "epochs": 1, "bits": (8, 3, 2), "acts": (32, 8), "rounding": 10,
              "samples": 1, "shown": 64},
    "full": {"data": 12_500, "series": None, "epochs": 4, "bits": (8, 4, 3, 2), "acts": (32, 8, 4), "rounding": 500,
             "samples": 16, "shown": 512},
    "gpu": {"data": 60_000, "series": None, "epochs": 20, "bits": (8, 4, 3, 2), "acts": (32, 8, 4), "rounding": 5000,
            "samples": 64, "shown": 1024},
}  # fmt: skip
RATES = (1e-3, 3e-4)
TRAINING = Training(device="cpu", precision="float32", patience=None)
# (what must not exceed, bound) in points of accuracy, means over the seeds on images
STATEMENTS: dict[str, float] = {
    "float - W8A8": 0.5,
    "5 - (float - W3A32 by tensor)": 0.0,
    "loss of W3A32 by channel - half that by tensor": 0.0,
    "float, one more epoch - W2A8 trained": 4.0,
    "10 - (float - W2A8 after training)": 0.0,
    "W3A8 - mixed precision of 3 bits, range mse": 0.0,
}


def quantize(scale: Scale, seeds: Sequence[int]) -> Bound:
    """Eight bits are free, three by tensor are not and by channel half repaired, two need training, bits can be mixed.

    A convolutional network with batch norm on Fashion-MNIST (and an MLP on MNIST-1D, in the details) is trained, then
    quantised throughout, first and last layer included. Accuracy on test for weights of 8, 4, 3 and 2 bits and inputs
    of 32, 8 and 4: by tensor, by channel, with the range of least squared error, and, for inputs of 8 bits, with
    AdaRound and with one epoch of learned steps. The same epoch is given to the float network; both choose their
    rate on validation. Six statements must hold on the mean over seeds; the images decide.
    """
    size = SIZES[scale]
    tasks = {"images": load("fashion_mnist", limit=size["data"]), "series": load("mnist1d", limit=size["series"])}
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in tasks}
    sizes: dict[str, dict[str, float]] = {}
    for seed in seeds:
        for name, task in tasks.items():
            table, bytes_ = _run(task, convnet if name == "images" else mlp, size, seed)
            rows[name].append(table)
            sizes[name] = bytes_
            log.info("quantize %s seed %d: %s", name, seed, {k: round(v, 1) for k, v in table.items()})
    means = {name: _means(tables) for name, tables in rows.items()}
    values = {name: statements(table) for name, table in means.items()}
    return Bound(
        values=list(values["images"].values()),
        bounds=list(STATEMENTS.values()),
        metric="points of test accuracy, six statements about losses",
        method_name="losses of the quantised networks",
        baseline_name="what the survey lets expect of them",
        paper="INT8 after training is nearly free; below 4 bits it fails and training with quantisation is needed; "
        "ranges by channel beat those by tensor; mixed precision beats uniform bits at equal size.",
        note="A small network on small images. Levels are 2^n (full range), so that 2 bits are four of them.",
        details={"statements": values, "accuracy": means, "bytes": sizes, "seeds": rows},
    )


def statements(accuracy: dict[str, float]) -> dict[str, float]:
    """The left-hand sides of the statements, from accuracies in percent."""
    loss = {name: accuracy["float"] - value for name, value in accuracy.items()}
    found = (
        loss["W8A8 channel"],
        5 - loss["W3A32 tensor"],
        loss["W3A32 channel"] - loss["W3A32 tensor"] / 2,
        loss["W2A8 trained"] - loss["float, one more epoch"],
        10 - loss["W2A8 channel"],
        loss["mixed precision of 3 bits"] - loss["W3A8 channel mse"],
    )
    return dict(zip(STATEMENTS, found, strict=True))


def _run(task: Task, make: Any, size: dict[str, Any], seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """Accuracy in percent and bytes, by network."""
    budget = Budget("epochs", size["epochs"])
    trained = fit(seeded(make, seed), task, TRAINING, budget=budget, seed=seed, keep="last").net
    x, y = task.splits["train"]
    shown = x[: size["shown"]]
    folded = fold_batch_norms(trained, x[:2]).net
    nets = {"float": trained, "float, one more epoch": _more(trained, task, seed)}
    ways = {
        "tensor": {"granularity": "tensor"},
        "channel": {"granularity": "channel"},
        "channel mse": {"granularity": "channel", "range": "mse"},
    }
    for bits in size["bits"]:
        for act in size["acts"]:
            for way, options in ways.items():
                nets[f"W{bits}A{act} {way}"] = quantized(folded, shown, _weights(bits, **options), _acts(act))
        best = _weights(bits, granularity="channel", range="mse")
        if bits < 8 and 8 in size["acts"]:
            learned = replace(best, rounding="ada")
            rounding = AdaRound(iterations=size["rounding"])
            nets[f"W{bits}A8 AdaRound"] = quantized(folded, shown, learned, _acts(8), adaround=rounding, seed=seed)
            nets[f"W{bits}A8 trained"] = _more(quantized(folded, shown, best, _acts(8), "qat"), task, seed)
    batches = list(zip(x[: 2 * size["shown"]].split(256), y[: 2 * size["shown"]].split(256), strict=True))
    traces = hessian_traces(folded, task.loss, batches, samples=size["samples"], seed=seed)
    mixed = allocate(folded, 3.0, traces, (2, 3, 4, 8), _weights(3, granularity="channel", range="mse"))
    nets["mixed precision of 3 bits"] = quantized(folded, shown, mixed, _acts(8))
    accuracy = {name: 100 * evaluate(net, task, "test")["accuracy"] for name, net in nets.items()}
    return accuracy, {name: stored_bytes(net) for name, net in nets.items()}


def _weights(bits: int, **options: Any) -> Quantizer:
    return Quantizer(bits, restricted=False, **options)


def _acts(bits: int) -> Quantizer | None:
    return None if bits == 32 else Quantizer(bits, symmetric=False, signed=False)


def _more(net: nn.Module, task: Task, seed: int) -> nn.Module:
    """One more epoch, at the rate that is best on validation."""
    fits = [
        fit(net, task, TRAINING.model_copy(update={"lr": rate}), budget=Budget("epochs", 1), seed=seed + 1, keep="last")
        for rate in RATES
    ]
    return max(fits, key=lambda one: one.valid["accuracy"]).net


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def convnet() -> nn.Module:
    """Three convolutions of 3 x 3 with batch norm, ReLU and pooling, and a linear layer."""
    layers: list[nn.Module] = []
    for a, b in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(576, 10))


def mlp() -> nn.Module:
    """Two hidden layers of 128 units."""
    hidden = [nn.Linear(40, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(128, 10))
