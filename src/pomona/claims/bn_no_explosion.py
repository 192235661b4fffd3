"""Whether gradients of batch-normalised MLPs stay bounded at depth, and such nets of 100 layers train."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import nn

from pomona.claims.lab import Arm, compare_arms, grid, log
from pomona.claims.verdict import Bound, Scale
from pomona.data import load
from pomona.data.task import Task
from pomona.nets.iso_mlp import IsoMLP
from pomona.theory.bn_isometry import compare_depths, gradient_growth
from pomona.train.budget import Budget
from pomona.train.loop import Fit, predict
from pomona.train.settings import Training

SIZES: dict[Scale, dict[str, Any]] = {
    "smoke": {"depths": (2, 4, 8), "width": 16, "far": (), "depth": 2, "epochs": 1, "rates": (1e-2,)},
    "full": {"depths": (50, 100, 200), "width": 64, "far": (500, 1000), "depth": 100, "epochs": 5,
             "rates": (1e-2, 1e-3)},
    "gpu": {"depths": (50, 100, 200), "width": 64, "far": (500, 1000), "depth": 1000, "epochs": 30,
            "rates": (1e-2, 1e-3)},
}  # fmt: skip
NETS: dict[str, dict[str, Any]] = {
    "linear": {"act": "id"},
    "shaped sin": {"act": "sin", "gain_exponent": -0.5},
    "shaped tanh": {"act": "tanh", "gain_exponent": -1.0},
    "sin": {"act": "sin", "gain_exponent": 0.0},
    "relu": {"act": "relu", "gain_exponent": 0.0, "centre": True},
    "linear, gaussian": {"act": "id", "weights": "gaussian"},
}
TRAINED = ("shaped sin", "shaped tanh", "sin", "relu")
TRAINING = Training(
    optimizer="sgd", momentum=0, weight_decay=0, schedule="constant", warmup=0, clip=None, batch_size=56
)
# (what must not exceed, bound), means over the seeds; growth is the ratio of first-layer gradients at two depths
STATEMENTS: dict[str, float] = {
    "|log growth, linear, 50 to 200|": math.log(2),
    "log growth, shaped sin, 50 to 200": math.log(3),
    "log growth, shaped tanh, 50 to 200": math.log(3),
    "log 1000 - log growth, sin, 50 to 200": 0.0,
    "log 1000 - log growth, relu, 50 to 100": 0.0,
    "0.8 - accuracy, shaped sin": 0.0,
    "0.8 - accuracy, shaped tanh": 0.0,
    "accuracy, sin": 0.3,
    "accuracy, relu": 0.3,
}


def bn_no_explosion(scale: Scale, seeds: Sequence[int]) -> Bound:
    """Claimed: with orthogonal weights and shaped activations gradients do not grow with depth, and 100 layers train.

    Gradient norms of the first layer at initialisation, on 64 Gaussian examples of 64 numbers with random labels, width
    64, at 50, 100 and 200 layers. Then 100 layers of width 64 on digits, batches of 56, SGD without momentum, 5
    epochs, the rate of every net chosen out of two on validation; test accuracy. Nine statements must hold on the mean
    over seeds: bounded and trainable with orthogonal weights, BN without centring and no activation or a shaped
    one, exploding and untrainable with a plain sine or with ReLU and common BN. In the details: Gaussian
    weights (claimed to grow), and the linear net at 500 and 1000 layers.
    """
    size = SIZES[scale]
    logs: dict[str, list[np.ndarray]] = {name: [] for name in NETS}
    far: dict[str, list[float]] = {}
    for seed in seeds:
        for name, row in compare_depths(NETS, size["depths"], size["width"], seed=seed).items():
            logs[name].append(np.log(row["norms"]))
        if size["far"] and seed == seeds[0]:
            linear = compare_depths({"linear": NETS["linear"]}, size["far"], size["width"], seed=seed)["linear"]
            far = {"depths": list(size["far"]), "norms": linear["norms"], "gaps": linear["gaps"]}
    means = {name: np.mean(rows, axis=0) for name, rows in logs.items()}
    log.info("bn_no_explosion log gradients: %s", means)
    outcomes = compare_arms(
        {name: Arm(_net(name, size["depth"]), TRAINING) for name in TRAINED},
        load("digits"),
        seeds,
        budget=Budget("epochs", size["epochs"]),
        settings=grid(lr=size["rates"]),
        score=_accuracy,
    )
    trained = {name: outcome.summary() for name, outcome in outcomes.items()}
    growth = {name: (m[2] - m[0], m[1] - m[0]) for name, m in means.items()}
    values = (
        abs(growth["linear"][0]),
        growth["shaped sin"][0],
        growth["shaped tanh"][0],
        math.log(1000) - growth["sin"][0],
        math.log(1000) - growth["relu"][1],
        0.8 - trained["shaped sin"]["accuracy"],
        0.8 - trained["shaped tanh"]["accuracy"],
        trained["sin"]["accuracy"],
        trained["relu"]["accuracy"],
    )
    return Bound(
        values=[float(value) for value in values],
        bounds=list(STATEMENTS.values()),
        metric="nine statements about gradient norms at depth and about accuracy",
        method_name="batch-normalised MLPs",
        baseline_name="what the paper lets expect of them",
        paper="gradients of the linear net bounded at any depth up to 1000, exponential growth with Gaussian weights "
        "or plain activations; shaped tanh and sin nets of 1000 layers train on MNIST and CIFAR-10",
        note="Width and batch of 64, digits in place of MNIST and CIFAR-10, 100 layers.",
        details={
            "statements": dict(zip(STATEMENTS, map(float, values), strict=True)),
            "first-layer gradient": {
                name: dict(zip(map(str, size["depths"]), np.exp(m).tolist(), strict=True)) for name, m in means.items()
            },
            "growth per layer": {name: gradient_growth(size["depths"], np.exp(m)) for name, m in means.items()},
            "linear, deeper": far,
            "training": trained,
        },
    )


def _net(name: str, depth: int) -> Callable[[], nn.Module]:
    return lambda: IsoMLP(64, 64, depth, 10, **NETS[name])


def _accuracy(done: Fit, task: Task) -> dict[str, float]:
    """Test accuracy, and whether training diverged (the weights are then the first ones)."""
    x, y = task.splits["test"]
    right = predict(done.net, x).argmax(1) == y
    return {"accuracy": float(right.float().mean()), "diverged": float(done.stopped == "diverged")}
