"""What most claims share: methods trained at equal budget, tuned alike on validation, tested once a seed."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pomona.data.task import Task
from pomona.errors import PomonaError
from pomona.train.budget import Budget
from pomona.train.loop import Fit, evaluate, fit
from pomona.train.settings import Training

log = logging.getLogger("pomona.claims")
Maker = Callable[[], nn.Module]
Score = Callable[[Fit, Task], dict[str, float]]
TUNING_SEED = 1_000_003
"""Added to the first seed for the tuning runs, so that no final run repeats one of them."""


def seeded(make: Maker, seed: int) -> nn.Module:
    """``make()`` with the global generator at ``seed``, and put back afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def grid(**choices: Sequence[Any]) -> list[dict[str, Any]]:
    """Every combination of the choices: ``grid(lr=[1e-3, 1e-2])`` -> ``[{"lr": 1e-3}, {"lr": 1e-2}]``."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


@dataclass
class Arm:
    """One method of a comparison.

    Attributes:
        make: builds an untrained network from the global generator.
        training: settings; the grid's entries replace their namesakes.
        options: further keyword arguments of :func:`pomona.train.fit` (rule, loss, transforms, callbacks). A
            callable value is called with the seed and must return the argument, for objects that hold state.
        grid: settings to choose among on validation, in place of the comparison's; keep their number equal.
    """

    make: Maker
    training: Training = field(default_factory=Training)
    options: dict[str, Callable[[int], Any]] = field(default_factory=dict)
    grid: Sequence[dict[str, Any]] | None = None


@dataclass
class Outcome:
    """What an arm came to: the settings chosen on validation, and one result a seed on test."""

    chosen: dict[str, Any]
    results: list[dict[str, float]]
    fits: list[Fit]
    parameters: int
    tuning: list[float]

    def values(self, metric: str) -> list[float]:
        """The metric at each seed."""
        return [result[metric] for result in self.results]

    def summary(self) -> dict[str, Any]:
        """Chosen settings and mean results, JSON-able."""
        names = self.results[0] if self.results else {}
        means = {name: sum(r[name] for r in self.results) / len(self.results) for name in names}
        return {"chosen": self.chosen, "parameters": self.parameters, "seconds": self.seconds, **means}

    @property
    def seconds(self) -> float:
        """Mean training time of a final run."""
        return sum(f.seconds for f in self.fits) / max(len(self.fits), 1)


def compare_arms(
    arms: Mapping[str, Arm],
    task: Task | Callable[[int], Task],
    seeds: Sequence[int],
    *,
    budget: Budget,
    settings: Sequence[dict[str, Any]] = ({},),
    metric: str = "",
    score: Score | None = None,
    tuning_runs: int = 1,
    keep: str = "best",
    keep_fits: bool = False,
) -> dict[str, Outcome]:
    """Train every arm at equal budget: choose settings on validation with tuning seeds, then test once a seed.

    Args:
        arms: method name -> arm.
        task: the task, or a function of the seed that gives it.
        seeds: of the final runs; initialisation, batches and dropout follow from each.
        budget: of each training, the same for all.
        settings: the grid (see :func:`grid`) that each arm is tuned over; entries are fields of ``Training``.
        metric: the validation metric to choose by; the task's own by default.
        score: (fit, task) -> results of a final run; the test metrics by default.
        tuning_runs: trainings per setting.
        keep: ``best`` or ``last`` weights.
        keep_fits: keep the trained networks (memory); otherwise only their curves.
    """
    make_task = task if callable(task) else (lambda seed: task)
    counts = {name: len(arm.grid if arm.grid is not None else settings) for name, arm in arms.items()}
    if (
        len({n for n in counts.values() if n > 1}) > 1
    ):  # one setting means that nothing is tuned, as the arm itself says
        raise PomonaError(f"arms must be tuned over equally many settings, not {counts}")
    outcomes = {}
    for name, arm in arms.items():
        choices = list(arm.grid if arm.grid is not None else settings)
        scores = []
        for choice in choices if len(choices) > 1 else []:
            trials = []
            for run in range(tuning_runs):
                seed = seeds[0] + TUNING_SEED + run
                here = make_task(seed)
                trials.append(_signed(_train(arm, choice, here, seed, budget, keep), here, metric))
            scores.append(sum(trials) / len(trials))
        best = choices[max(range(len(scores)), key=scores.__getitem__)] if scores else choices[0]
        results, fits = [], []
        for seed in seeds:
            here = make_task(seed)
            done = _train(arm, best, here, seed, budget, keep)
            results.append(score(done, here) if score else evaluate(done.predict, here, "test"))
            if not keep_fits:
                done.net = nn.Identity()
            fits.append(done)
            log.info("%s seed %d: %s", name, seed, {k: round(v, 4) for k, v in results[-1].items()})
        count = sum(p.numel() for p in seeded(arm.make, 0).parameters())
        outcomes[name] = Outcome(best, results, fits, count, scores)
    return outcomes


def _train(arm: Arm, choice: dict[str, Any], task: Task, seed: int, budget: Budget, keep: str) -> Fit:
    settings = Training(**{**arm.training.model_dump(), "patience": None, **choice})
    extra = {key: make(seed) for key, make in arm.options.items()}
    return fit(seeded(arm.make, seed), task, settings, budget=budget, seed=seed, keep=keep, **extra)  # type: ignore[arg-type]


def _signed(done: Fit, task: Task, metric: str) -> float:
    """The validation metric, larger is better, worst when the run diverged."""
    if done.stopped == "diverged" or not done.curve:
        return float("-inf")
    name = metric or task.metric
    lower = name.endswith("loss") or name in {"rmse", "mae", "ece"}
    value = done.valid["valid_loss" if name == "loss" else name]
    return -value if lower else value
