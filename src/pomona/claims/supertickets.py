"""Is a ticket that is drawn while the supernet trains better than one pruned after the search?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pomona.claims.lab import TUNING_SEED, log, seeded
from pomona.claims.verdict import Comparison, Scale
from pomona.data import Task, load
from pomona.data.task import Split
from pomona.edit.supertickets import SuperTicket, Ticket
from pomona.nets.cost import flops
from pomona.nets.supernet import Supernet
from pomona.train import Budget, Training, evaluate

# a tenth of the small supernet's 3000 weights would leave a few in each layer, and every pipeline near chance
SIZES: dict[str, dict[str, Any]] = {
    "smoke": {"limit": 600, "epochs": 1.0, "channels": 8, "density": 0.3, "moved_epochs": 1.0, "lr": (1e-2,)},
    "full": {"limit": 12_000, "epochs": 3.0, "channels": 16, "density": 0.3, "moved_epochs": 8.0, "lr": (3e-3, 1e-2)},
    "gpu": {"limit": 60_000, "epochs": 30.0, "channels": 64, "density": 0.1, "moved_epochs": 60.0, "lr": (3e-3, 1e-2)},
}
FLOPS = 0.5
"""Of every pipeline's result, as a share of the supernet's."""
MARGIN = 0.005
"""Half a point of accuracy, the lower end of what is expected."""
LAMBDA = 0.1
"""Ranks the channels, while ``FLOPS`` says how many go: the rates of one search add up to one or two."""
TRAINING = Training(optimizer="adam", weight_decay=0.0, batch_size=64, patience=None)
SEARCH_THEN_PRUNE = ((0.0, 0.65), (1.0, 1.0))
Pipeline = Callable[[Task, dict[str, Any], float, int, float], Ticket]


def supertickets(scale: Scale, seeds: Sequence[int]) -> Comparison:
    """Without retraining, joint search and progressive pruning tests half a point above pruning after the search.

    Three blocks of 3x3 and 5x5 branches beside a shortcut learn Fashion-MNIST at 14x14; every pipeline trains for as
    many epochs in all, ends at half the supernet's FLOPs and 30 % of the weights left, takes its norms' statistics
    anew, and has its rate chosen on validation. In the details: nested masks; masks lifted between rounds;
    pruning after the search with half of the epochs for retraining; a network of 3x3 branches as wide as the FLOPs
    allow, pruned gradually; and the ticket's accuracy on digits, with a new head, beside that of a search on them.
    """
    size = SIZES[scale]
    task, digits = (_sized(load(name, limit=size["limit"])) for name in ("fashion_mnist", "digits"))
    rates = {name: _rate(name, task, size, seeds[0] + TUNING_SEED) for name in PIPELINES}
    table: dict[str, list[float]] = {name: [] for name in PIPELINES}
    moved: dict[str, list[float]] = {"ticket": [], "search": []}
    reports: dict[str, dict[str, float]] = {}
    for seed in seeds:
        tickets = {
            name: pipeline(task, size, rates[name], seed, size["epochs"]) for name, pipeline in PIPELINES.items()
        }
        for name, ticket in tickets.items():
            table[name].append(evaluate(ticket.net, task, "test")["accuracy"])
            reports[name] = ticket.report(task.example)
        rate, epochs = rates["joint"], size["moved_epochs"]
        head = seeded(lambda: nn.Linear(size["channels"], 10), seed)
        settings, budget = TRAINING.model_copy(update={"lr": rate}), Budget("epochs", epochs)
        again = tickets["joint"].for_task(head).retrain(digits, settings, budget=budget, seed=seed, keep="last")
        fresh = _drawn()(digits, size, rate, seed, epochs)
        moved["ticket"].append(evaluate(again.net, digits, "test")["accuracy"])
        moved["search"].append(evaluate(fresh.net, digits, "test")["accuracy"])
        log.info("supertickets seed %d: %s", seed, {name: round(values[-1], 4) for name, values in table.items()})
    return Comparison(
        method=table["joint"],
        baseline=table["search, then prune"],
        metric="test accuracy without retraining at half the FLOPs and equal density",
        method_name="search and progressive pruning at once",
        baseline_name="search, then magnitude pruning",
        paper="SuperTickets beat searching and then pruning in accuracy at equal FLOPs, with retraining or without.",
        margin=MARGIN,
        note="Fashion-MNIST and a few epochs in the place of ImageNet and hundreds of them.",
        details={
            "accuracy": {name: _mean(values) for name, values in table.items()},
            "digits": {name: _mean(values) for name, values in moved.items()},
            "learning rate": rates,
            "last seed": reports,
        },
    )


def _rate(name: str, task: Task, size: dict[str, Any], seed: int) -> float:
    """The learning rate that does best on validation."""

    def accuracy(rate: float) -> float:
        return evaluate(PIPELINES[name](task, size, rate, seed, size["epochs"]).net, task, "valid")["accuracy"]

    return max(size["lr"], key=accuracy) if len(size["lr"]) > 1 else size["lr"][0]


def _supernet(size: dict[str, Any], hidden: int | None = None, kinds: Sequence[int] = (3, 5)) -> Supernet:
    channels = size["channels"]
    return Supernet(1, 10, ((channels, 1), (channels, 1), (channels, 2)), hidden or channels, kinds)


def _drawn(**options: Any) -> Pipeline:
    """A ticket from a supernet, used as it is."""
    given = {"flops": FLOPS, "arch_reg": LAMBDA, "regrow": "straight_through", **options}

    def draw(task: Task, size: dict[str, Any], rate: float, seed: int, epochs: float) -> Ticket:
        return _ticket(seeded(lambda: _supernet(size), seed), task, size, rate, seed, epochs, **given)

    return draw


def _retrained(task: Task, size: dict[str, Any], rate: float, seed: int, epochs: float) -> Ticket:
    """Half of the epochs to search, then pruning, and the other half to retrain."""
    ticket = _drawn(order=SEARCH_THEN_PRUNE)(task, size, rate, seed, epochs / 2)
    settings = TRAINING.model_copy(update={"lr": rate})
    return ticket.retrain(task, settings, budget=Budget("epochs", epochs / 2), seed=seed, keep="last")


def _made_by_hand(task: Task, size: dict[str, Any], rate: float, seed: int, epochs: float) -> Ticket:
    """3x3 branches alone, as many channels as the FLOPs allow, pruned gradually."""
    allowed = FLOPS * flops(_supernet(size), task.example)
    widths = range(1, 2 * size["channels"] + 1)
    fits = [n for n in widths if flops(_supernet(size, n, (3,)), task.example) <= allowed]
    net = seeded(lambda: _supernet(size, max(fits), (3,)), seed)
    return _ticket(net, task, size, rate, seed, epochs, arch_reg=0.0, regrow="straight_through")


def _ticket(
    net: nn.Module, task: Task, size: dict[str, Any], rate: float, seed: int, epochs: float, **options: Any
) -> Ticket:
    return SuperTicket(
        net,
        task,
        weight_prune=1 - size["density"],
        training=TRAINING.model_copy(update={"lr": rate}),
        budget=Budget("epochs", epochs),
        seed=seed,
        **options,
    ).ticket()


PIPELINES: dict[str, Pipeline] = {
    "joint": _drawn(),
    "joint, masks lifted between rounds": _drawn(regrow="reactivate"),
    "joint, nested masks": _drawn(progressive=False),
    "search, then prune": _drawn(order=SEARCH_THEN_PRUNE),
    "search, then prune, then retrain": _retrained,
    "made by hand": _made_by_hand,
}


def _sized(task: Task, side: int = 14) -> Task:
    """Its images at another size."""
    splits = {
        name: Split(F.interpolate(x, (side, side), mode="bilinear", antialias=True), y)
        for name, (x, y) in task.splits.items()
    }
    return replace(task, inputs=replace(task.inputs, shape=(1, side, side)), splits=splits)


def _mean(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).mean())
