"""How much of a recurrent network can be pruned, how soon is accuracy back, and does a graph's shape foretell it?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from pomona.claims.lab import TUNING_SEED, log, seeded
from pomona.claims.verdict import Comparison, Scale
from pomona.data.reber import reber_task
from pomona.data.task import Task
from pomona.edit.rnn_sparsity import graph_properties, predict_performance, prune_rnn, regain_epochs
from pomona.errors import require
from pomona.seq.sparse_rnn import CELLS, SparseRNN
from pomona.train import Budget, Training, evaluate, fit

SIZES: dict[str, dict[str, Any]] = {
    "smoke": {"strings": 120, "hidden": 6, "epochs": 1, "rates": (1e-2,), "graphs": 10, "graph_epochs": 1},
    "full": {"strings": 3000, "hidden": 50, "epochs": 16, "rates": (1e-3, 3e-3, 1e-2), "graphs": 40, "graph_epochs": 8},
    "gpu": {"strings": 9000, "hidden": 50, "epochs": 16, "rates": (1e-3, 3e-3, 1e-2), "graphs": 200, "graph_epochs": 8},
}
SPARSITIES = tuple(round(0.1 * i, 1) for i in range(1, 10))
RETRAINED = (0.6, 0.8, 0.9)
DECIDES, RETRAINING, LOSS = 0.8, 2, 0.02
"""80 % of the weights pruned, 2 epochs of retraining, and at most 2 points of accuracy lost: fixed before any run."""
GRAPH_RATE = 3e-3
NODES = (30, 50)
"""The learning rate of networks built from graphs, and how many nodes these have."""


def rnn_sparsity(scale: Scale, seeds: Sequence[int]) -> Comparison:
    """With 80 % of the recurrent layers' weights pruned, 2 epochs of retraining bring accuracy back within 2 points.

    Embedded Reber strings, valid or one letter off; three layers of tanh, relu, GRU and LSTM units, the learning rate
    of each tuned on validation at one other seed. The dense network is trained for the same two epochs more. Test
    accuracy, averaged over the four kinds. In the details: accuracy at once after pruning 10 to 90 % of input,
    recurrent or both matrices; after retraining; epochs to regain validation accuracy within a point; and the R^2 by
    which properties of random graphs foretell, for graphs left out, the accuracy of tanh networks built from them (one
    training a graph).
    """
    size = SIZES[scale]
    tuning = seeds[0] + TUNING_SEED
    tune_on = reber_task(size["strings"], seed=tuning)
    rates = {}
    for kind in CELLS:
        scores = {lr: evaluate(base(kind, tune_on, lr, size, tuning), tune_on, "valid")["accuracy"]
                  for lr in size["rates"]}  # fmt: skip
        rates[kind] = max(scores, key=scores.__getitem__)
    dense: list[list[float]] = []
    pruned: list[list[float]] = []
    table: dict[str, dict[str, list[Any]]] = {}

    def note(kind: str, column: str, value: Any) -> Any:
        table.setdefault(kind, {}).setdefault(column, []).append(value)
        return value

    for seed in seeds:
        task = reber_task(size["strings"], seed=seed)
        dense.append([])
        pruned.append([])
        for kind in CELLS:
            settings = training(rates[kind])
            net = base(kind, task, rates[kind], size, seed)
            before = note(kind, "dense", evaluate(net, task, "test")["accuracy"])
            target = evaluate(net, task, "valid")["accuracy"] - 0.01
            longer = regain_epochs(net, task, target, training=settings, most=RETRAINING, seed=seed)[1]
            dense[-1].append(note(kind, "dense, trained on", evaluate(longer, task, "test")["accuracy"]))
            for what in ("i2h", "h2h", "both"):
                for sparsity in SPARSITIES:
                    sparse = copy.deepcopy(net)
                    prune_rnn(sparse, 1 - sparsity, what)  # type: ignore[arg-type]
                    note(kind, f"{what} {sparsity:.0%} at once", evaluate(sparse, task, "test")["accuracy"])
                    if what != "both" or sparsity not in RETRAINED:
                        continue
                    epochs, again, _ = regain_epochs(
                        sparse, task, target, training=settings, most=RETRAINING, seed=seed
                    )
                    note(kind, f"{what} {sparsity:.0%} epochs to regain", epochs)
                    after = note(kind, f"{what} {sparsity:.0%} retrained", evaluate(again, task, "test")["accuracy"])
                    if sparsity == DECIDES:
                        pruned[-1].append(after)
            log.info("%s seed %d: dense %.3f, %.0f %% pruned and retrained %.3f", kind, seed, before, 100 * DECIDES,
                     pruned[-1][-1])  # fmt: skip
    return Comparison(
        method=np.mean(pruned, axis=1).tolist(),
        baseline=np.mean(dense, axis=1).tolist(),
        metric="test accuracy, mean of tanh, relu, GRU and LSTM",
        method_name=f"{DECIDES:.0%} of the recurrent layers' weights pruned, {RETRAINING} epochs of retraining",
        baseline_name=f"dense network, {RETRAINING} epochs more",
        margin=-LOSS,
        paper="60 to 80 % of the weights can go with little loss, and accuracy is back after 1 or 2 epochs.",
        note=f"{size['strings']} synthetic strings.",
        details={"lr": rates, **table, "graphs": structure(size, seeds[0])},
    )


def structure(size: dict[str, Any], seed: int) -> dict[str, Any]:
    """Accuracies of networks built from random graphs, half Watts-Strogatz and half Barabasi-Albert, and the R^2."""
    nx, task = require("networkx", "graphs"), reber_task(size["strings"], seed=seed)
    rng = np.random.default_rng(seed)
    properties, accuracy = [], []
    for i in range(size["graphs"]):
        n = int(rng.integers(NODES[0], NODES[1] + 1))
        if i % 2:
            graph = nx.barabasi_albert_graph(n, max(1, n // 10), seed=i)
        else:
            graph = nx.connected_watts_strogatz_graph(n, max(2, n // 5), 1.0, tries=1000, seed=i)
        make = partial(SparseRNN, graph, 7, 2, "tanh")
        net = trained(make, task, GRAPH_RATE, size["graph_epochs"], seed + i)
        properties.append(graph_properties(graph))
        accuracy.append(evaluate(net, task, "test")["accuracy"])
    found = predict_performance(properties, accuracy)
    leading = list(found["importance"].items())[:5]
    return {"accuracy": accuracy, "r2": found["r2"], "most important": dict(leading)}


class _TimeFirst(nn.Module):
    """Series (n, channels, time) to a network that reads (n, time, channels)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.transpose(1, 2))


class _Last(nn.Module):
    """Recurrent layers, and a linear layer on the last state."""

    def __init__(self, rnn: nn.RNNBase, classes: int) -> None:
        super().__init__()
        self.rnn, self.out = rnn, nn.Linear(rnn.hidden_size, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0][:, -1])


def base(kind: str, task: Task, lr: float, size: dict[str, Any], seed: int) -> nn.Module:
    """A trained dense network of three recurrent layers."""
    make = partial(CELLS[kind][0], 7, size["hidden"], num_layers=3, batch_first=True)
    return trained(lambda: _Last(make(), 2), task, lr, size["epochs"], seed)


def trained(make: Callable[[], nn.Module], task: Task, lr: float, epochs: int, seed: int) -> nn.Module:
    """Train to the end of its epochs."""
    net = seeded(lambda: _TimeFirst(make()), seed)
    return fit(net, task, training(lr), budget=Budget("epochs", epochs), seed=seed, keep="last").net


def training(lr: float) -> Training:
    """Adam with a cosine schedule."""
    return Training(optimizer="adam", lr=lr, weight_decay=0.0, batch_size=64, patience=None)
