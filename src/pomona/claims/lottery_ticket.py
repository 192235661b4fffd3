"""Are the first weights of a winning ticket what lets it train?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from pomona.claims.lab import log
from pomona.claims.verdict import Comparison, Scale
from pomona.data import load
from pomona.edit.lottery_ticket import LotteryTicket, Ticket, early_stop, fitting
from pomona.train import Training, evaluate

# rounds of pruning at 20 %, those at which controls are trained, and the one that decides (0.8^9 = 13.4 %)
SIZES: dict[str, dict[str, Any]] = {
    "smoke": {"data": 600, "steps": 20, "rounds": 2, "controls": (2,), "decides": 2},
    "full": {"data": 12_000, "steps": 480, "rounds": 11, "controls": (5, 9, 11), "decides": 9},
    "gpu": {"data": 60_000, "steps": 8000, "rounds": 15, "controls": (3, 5, 7, 9, 11, 13, 15), "decides": 9},
}


def lottery_ticket(scale: Scale, seeds: Sequence[int]) -> Comparison:
    """At 13.4 % of the weights, a ticket with its own first weights tests better than the same mask with new
    ones.

    LeNet-300-100 on Fashion-MNIST, Adam at 1.2e-3, batches of 60, 20 % of the survivors pruned each round
    (half as much in the output layer), rewound to the first weights; every training has the same number of
    steps, and accuracy on test is taken at its end. Tickets, the same masks with fresh weights, and shuffled
    masks with the old weights are in the details, with the step of least validation loss.
    """
    size = SIZES[scale]
    task = load("fashion_mnist", limit=size["data"])
    training = Training(
        optimizer="adam",
        lr=1.2e-3,
        weight_decay=0.0,
        batch_size=60,
        schedule="constant",
        warmup=0.0,
        clip=None,
        patience=None,
    )
    train = fitting(task, training, size["steps"], validations=16)
    table: dict[str, dict[str, list[dict[str, float]]]] = {}

    def record(kind: str, ticket: Ticket, net: nn.Module, curve: list[dict[str, float]]) -> float:
        accuracy = evaluate(net, task, "test")["accuracy"]
        row = {"accuracy": accuracy, "early_stop_step": early_stop(curve)["step"]}
        table.setdefault(kind, {}).setdefault(f"round {ticket.round}", []).append(row)
        return accuracy

    method, baseline, densities = [], [], {}
    for seed in seeds:
        tickets = LotteryTicket(lenet, train, rounds=size["rounds"], seed=seed).run()
        for ticket in tickets:
            own = record("ticket", ticket, ticket.net, ticket.history)
            densities[f"round {ticket.round}"] = ticket.density
            if ticket.round not in size["controls"]:
                continue
            fresh, shuffled = ticket.train(init="reinit"), ticket.train(mask="shuffle")
            other = record("new weights", ticket, fresh.net, fresh.curve)
            record("shuffled mask", ticket, shuffled.net, shuffled.curve)
            if ticket.round == size["decides"]:
                method.append(own)
                baseline.append(other)
        log.info("lottery_ticket seed %d: ticket %.4f, new weights %.4f", seed, method[-1], baseline[-1])
    return Comparison(
        method=method,
        baseline=baseline,
        metric=f"test accuracy after {size['decides']} rounds of pruning a fifth",
        method_name="winning ticket: mask and first weights",
        baseline_name="the same mask with new weights",
        paper="With their own weights tickets match the dense network at 10-20 % of it; with new ones they do not.",
        note="Fashion-MNIST in the place of MNIST, and far fewer steps than the paper's 50 thousand.",
        details={
            "density": densities,
            **{kind: {key: _means(rows) for key, rows in by_round.items()} for kind, by_round in table.items()},
        },
    )


def lenet() -> nn.Module:
    """LeNet-300-100 with Glorot weights and zero biases, as in the paper."""
    layers = [nn.Linear(784, 300), nn.Linear(300, 100), nn.Linear(100, 10)]
    for layer in layers:
        nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.Flatten(), layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
