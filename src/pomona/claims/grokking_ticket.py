"""Does a mask read off a generalising network spare the next training the delay, when other masks do not?"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pomona.claims.lab import TUNING_SEED, grid, log
from pomona.claims.verdict import Comparison, Scale
from pomona.data.grokking import GrokTask
from pomona.edit.full_batch import FullBatchRun, Weights, train_full_batch
from pomona.edit.grokking_ticket import GrokMLP, norm_matched, shuffled, ticket_mask
from pomona.edit.masks import Masks

SIZES: dict[str, dict[str, Any]] = {
    "smoke": {
        "task": {"p": 11, "frac": 0.6}, "net": {"dim": [16], "hidden": [12]}, "lr": [1e-2], "weight_decay": [1.0],
        "prune_rate": [0.4, 0.6], "moment": ["grok"], "exclude": ["", "embed"], "steps": 120,
    },
    "full": {
        "task": {"p": 47, "frac": 0.5}, "net": {"dim": [128], "hidden": [48]}, "lr": [1e-3, 3e-3, 1e-2],
        "weight_decay": [0.3, 1.0, 3.0], "prune_rate": [0.2, 0.4, 0.6], "moment": ["generalize", "grok"],
        "exclude": ["", "embed"], "steps": 4000,
    },
    "gpu": {
        "task": {"p": 67, "frac": 0.4}, "net": {"dim": [128, 500], "hidden": [48, 96]}, "lr": [3e-4, 1e-3, 3e-3],
        "weight_decay": [0.3, 1.0, 3.0], "prune_rate": [0.2, 0.4, 0.6], "moment": ["generalize", "grok"],
        "exclude": ["", "embed"], "steps": 12_000,
    },
}  # fmt: skip
AT_INIT = ("snip", "grasp", "synflow")
STACK = 16
"""Networks trained at once: what they work on stays in the caches."""

Setting = dict[str, Any]


def grokking_ticket(scale: Scale, seeds: Sequence[int]) -> Comparison:
    """A grokked ticket tests better at the cap than a random mask and than a ticket read at memorisation.

    (i + j) mod p by the paper's network. One tuning seed searches width, learning rate, weight decay, pruning rate,
    moment of the mask and whether the embedding is masked; only dense networks that generalise give tickets. The cell
    is the one where the ticket gains most over the dense network of the same learning rate and decay, in validation
    accuracy averaged over the training: no control is looked at. Then, on fresh seeds, all share that cell and the
    cap, and the better of the two controls counts. In the details: the dense network with settings tuned for itself,
    norm-matched dense networks, transition tickets, pruning at initialisation and the ticket without weight decay,
    each with its steps to 95 % (null: not by the cap).
    """
    size = SIZES[scale]
    cell, tuned, searched = search(size, seeds[0] + TUNING_SEED)
    log.info("best cell %s, dense alone %s", cell, tuned)
    runs: dict[str, list[FullBatchRun]] = {}
    for seed in seeds:
        for name, run in final(size, cell, tuned, seed).items():
            runs.setdefault(name, []).append(run)
        log.info("seed %d: %s", seed, {name: round(r[-1].final["test_accuracy"], 3) for name, r in runs.items()})
    at_cap = {name: [run.final["test_accuracy"] for run in of_name] for name, of_name in runs.items()}
    return Comparison(
        method=at_cap["ticket"],
        baseline=[max(pair) for pair in zip(at_cap["random mask"], at_cap["memorization ticket"], strict=True)],
        metric=f"test accuracy after {size['steps']} steps",
        method_name="ticket of the generalised network",
        baseline_name="random mask or memorization ticket, the better one",
        paper="Tickets of the generalised solution shorten the delay dramatically; norm-matched dense networks, "
        "memorization tickets and pruning at initialization do not.",
        note=f"p = {size['task']['p']} and {size['steps']} steps in place of 67 and 50 thousand; the cell was searched "
        "on one other seed.",
        censored=any(run.reached("test") is None for run in runs["ticket"]),
        details={
            "cell": cell,
            "dense tuned": tuned,
            **searched,
            "test accuracy": at_cap,
            "mean test accuracy over steps": {name: [mean(r, "test") for r in rs] for name, rs in runs.items()},
            "steps to 95 % train": {name: [r.reached("train") for r in rs] for name, rs in runs.items()},
            "steps to 95 % test": {name: [r.reached("test") for r in rs] for name, rs in runs.items()},
        },
    )


def search(size: dict[str, Any], seed: int) -> tuple[Setting, Setting, dict[str, Any]]:
    """The ticket's cell, the dense network's own best settings, and the gain by cell, from one seed by validation."""
    task = GrokTask(**size["task"], seed=seed)
    found: list[tuple[float, Setting]] = []
    alone: list[tuple[float, Setting]] = []
    for width in grid(**size["net"]):
        net, trainings = make(task, width, seed), grid(lr=size["lr"], weight_decay=size["weight_decay"])
        dense = train([net] * len(trainings), task, trainings, size["steps"])
        alone += [(mean(run, "valid"), {**width, **how}) for how, run in zip(trainings, dense, strict=True)]
        able = [pair for pair in zip(trainings, dense, strict=True) if pair[1].reached("valid") is not None]
        jobs = [
            ({**width, **training, **how}, run)
            for training, run in able or zip(trainings, dense, strict=True)
            for how in grid(prune_rate=size["prune_rate"], moment=size["moment"], exclude=size["exclude"])
        ]
        nets = [masked(net, ticket_mask(net, weights_at(run, how["moment"]), how["prune_rate"], exclude=how["exclude"]))
                for how, run in jobs]  # fmt: skip
        tickets = train(nets, task, [how for how, _ in jobs], size["steps"])
        found += [(mean(t, "valid") - mean(run, "valid"), how) for t, (how, run) in zip(tickets, jobs, strict=True)]
    cell, tuned = (max(pairs, key=lambda pair: pair[0])[1] for pairs in (found, alone))
    gains = {" ".join(f"{key}={value}" for key, value in how.items()): gain for gain, how in found}
    return cell, tuned, {"gain over dense, validation, by cell": gains}


def final(size: dict[str, Any], cell: Setting, tuned: Setting, seed: int) -> dict[str, FullBatchRun]:
    """Every arm at one fresh seed, judged on its test split."""
    task, steps = GrokTask(**size["task"], seed=seed), size["steps"]
    net = make(task, cell, seed)
    dense = train([net], task, [cell], steps)[0]

    def mask(moment: str, criterion: str = "magnitude") -> Weights:
        return ticket_mask(
            net, weights_at(dense, moment), cell["prune_rate"], criterion, task, seed, exclude=cell["exclude"]
        )

    ticket = mask(cell["moment"])
    start = masked(net, ticket)
    arms: dict[str, tuple[nn.Module, float]] = {
        "ticket": (start, cell["weight_decay"]),
        "random mask": (masked(net, shuffled(ticket, seed)), cell["weight_decay"]),
        "memorization ticket": (masked(net, mask("memorize")), cell["weight_decay"]),
        "transition ticket": (masked(net, mask("transition")), cell["weight_decay"]),
        **{f"{name} at initialization": (masked(net, mask("init", name)), cell["weight_decay"]) for name in AT_INIT},
        "ticket without weight decay": (start, 0.0),
        **{f"dense of the ticket's L{order} norm": (norm_matched(net, start, order), 0.0) for order in (1, 2)},
    }
    settings = [{**cell, "weight_decay": decay} for _, decay in arms.values()]
    done = dict(zip(arms, train([net for net, _ in arms.values()], task, settings, steps), strict=True))
    like = {f"dense of the grokked ticket's L{k} norm": norm_matched(net, done["ticket"].net, k) for k in (1, 2)}
    done |= zip(like, train(list(like.values()), task, [{**cell, "weight_decay": 0.0}] * 2, steps), strict=True)
    alone = train([make(task, tuned, seed)], task, [tuned], steps)[0]
    return {**done, "dense": dense, "dense, tuned for itself": alone}


def train(
    nets: Sequence[nn.Module], task: GrokTask, settings: Sequence[Mapping[str, Any]], steps: int
) -> list[FullBatchRun]:
    """All for the same number of steps, in stacks."""
    runs: list[FullBatchRun] = []
    for at in range(0, len(nets), STACK):
        part = slice(at, at + STACK)
        rates, decays = ([s[key] for s in settings[part]] for key in ("lr", "weight_decay"))
        runs += train_full_batch(nets[part], task, steps=steps, lr=rates, weight_decay=decays)
    return runs


def make(task: GrokTask, width: Mapping[str, Any], seed: int) -> GrokMLP:
    """The initial network of a seed."""
    generator = torch.Generator().manual_seed(seed)
    net = GrokMLP(task.p, width["dim"], width["hidden"], generator=generator)
    return net.cuda() if torch.cuda.is_available() else net


def masked(net: nn.Module, mask: Weights) -> nn.Module:
    """A masked copy."""
    return Masks(copy.deepcopy(net), mask).net


def weights_at(run: FullBatchRun, moment: str) -> Weights:
    """Weights of a moment, or those at the end if it did not come."""
    return run.kept.get(moment, run.kept["grok"])[1]


def mean(run: FullBatchRun, split: str) -> float:
    """Accuracy averaged over the training: 1 minus the share of it that was spent before generalising, roughly."""
    return sum(entry[f"{split}_accuracy"] for entry in run.curve) / len(run.curve)
