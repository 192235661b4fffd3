"""Does a policy trained by rewards find better small networks than as many random trials?"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import nn

from pomona.claims.lab import log, seeded
from pomona.claims.verdict import Comparison, Scale
from pomona.data import Task, load
from pomona.edit.n2n import N2N, Distillation, N2NReward, Rollout
from pomona.nets.cost import parameters
from pomona.train import Budget, Training, evaluate, fit

SIZES: dict[str, dict[str, Any]] = {
    "smoke": {"data": 400, "epochs": 1.0, "widths": (16, 8, 8), "episodes": (2, 2), "steps": 5, "final": 10},
    "full": {"data": 8000, "epochs": 10.0, "widths": (96, *[64] * 5), "episodes": (12, 28), "steps": 64, "final": 800},
    "gpu": {"data": 60_000, "epochs": 20.0, "widths": (256,) * 8, "episodes": (60, 140), "steps": 200, "final": 8000},
}
ROLLOUTS = 5
TRAINING = Training(optimizer="adam", lr=1e-3, weight_decay=0.0, batch_size=64, patience=None)


def n2n(scale: Scale, seeds: Sequence[int]) -> Comparison:
    """After equal final training the policies' student has a larger reward on test than the best random one.

    The teacher is an MLP on Fashion-MNIST. Students learn from 64 batches; both searches get the same 200 of them (60
    that remove layers, 140 that set widths), judged on validation. The best of each, and the teacher narrowed evenly to
    the found student's size, are then distilled alike for 800 batches, and the reward is computed anew with test
    accuracies. In the details: sizes, accuracies, the best rewards of the searches, and the mean reward of the first
    and last fifteen students of the second stage.
    """
    size = SIZES[scale]
    task = load("fashion_mnist", limit=size["data"])
    rows = []
    for seed in seeds:
        teacher = seeded(lambda: _mlp(size["widths"]), seed)
        budget = Budget("epochs", size["epochs"])
        teacher = fit(teacher, task, TRAINING, budget=budget, seed=seed, validations=1, keep="last").net
        reward = N2NReward(parameters(teacher), evaluate(teacher, task, "test")["accuracy"])
        row: dict[str, float] = {"teacher_parameters": reward.parameters, "teacher_accuracy": reward.accuracy}
        found: dict[str, nn.Module] = {}
        methods: tuple[Literal["reinforce", "random"], ...] = ("reinforce", "random")
        for method in methods:
            search = _search(teacher, task, size, method, seed)
            edit, history = search.compress()
            found[method] = edit.net
            row |= {f"{method}_{name}": value for name, value in _course(history).items()}
        found["even"] = _even(search, parameters(found["reinforce"]))
        final = Distillation(steps=size["final"], training=TRAINING)
        for name, net in found.items():
            student = final(copy.deepcopy(net), search.logits, task, seed)
            accuracy = evaluate(student, task, "test")["accuracy"]
            row |= {f"{name}_parameters": parameters(net), f"{name}_accuracy": accuracy}
            row[f"{name}_test_reward"] = reward(parameters(net), accuracy)
        rows.append(row)
        log.info("seed %d: %s", seed, {name: round(value, 4) for name, value in row.items()})
    return Comparison(
        method=[row["reinforce_test_reward"] for row in rows],
        baseline=[row["random_test_reward"] for row in rows],
        metric="reward with test accuracy, after final training",
        method_name="REINFORCE",
        baseline_name="random search with as many students",
        paper="Students of a tenth of the size at similar accuracy; the policy's rewards rise as it is trained.",
        note="An MLP on Fashion-MNIST in the place of convolutional teachers on CIFAR-10, fewer students.",
        details={name: sum(row[name] for row in rows) / len(rows) for name in rows[0]},
    )


def _search(
    teacher: nn.Module, task: Task, size: dict[str, Any], method: Literal["reinforce", "random"], seed: int
) -> N2N:
    return N2N(
        teacher,
        task,
        episodes=size["episodes"],
        rollouts=ROLLOUTS,
        method=method,
        distillation=Distillation(steps=size["steps"], training=TRAINING),
        seed=seed,
    )


def _course(history: Sequence[Rollout]) -> dict[str, float]:
    """The best reward on validation, and the mean of the second stage's first and last students."""
    rewards = torch.tensor([rollout.reward for rollout in history if rollout.stage == "shrink"])
    count = min(15, len(rewards) // 2)
    return {
        "best_reward": max(rollout.reward for rollout in history),
        "first_rewards": float(rewards[:count].mean()),
        "last_rewards": float(rewards[-count:].mean()),
    }


def _even(search: N2N, target: int) -> nn.Module:
    """The teacher with all widths cut by one ratio, the smallest of no fewer parameters than the target."""
    keep = [1] * len(search.layers)
    axes = len(search.widths(keep))
    ratios = torch.linspace(0.01, 1, 100).tolist()
    enough = bisect_left(ratios, target, key=lambda ratio: parameters(search.student(keep, [ratio] * axes).net))
    return search.student(keep, [ratios[min(enough, 99)]] * axes).net


def _mlp(widths: Sequence[int]) -> nn.Module:
    sizes = [784, *widths]
    hidden = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], 10))
