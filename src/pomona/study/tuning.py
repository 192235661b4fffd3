"""Choosing settings on validation: the same number of trials for every candidate."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator
from typing import Any

from pomona import catalog
from pomona.nets.build import keys
from pomona.options import Option
from pomona.recipe.recipe import Recipe

RATES = {"sgd": (1e-3, 1.0), "nesterov": (1e-3, 1.0), "lion": (5e-5, 5e-3)}
"""Learning rates by optimiser, where they are not Adam's."""


def space(recipe: Recipe) -> dict[str, Any]:
    """What is tuned: learning rate and weight decay unless the recipe fixes them, and what its layers declare.

    A slot's factory declares ``tunable = {"grid": [3, 5, 8]}`` (choices) or ``{"beta": (0.1, 10.0)}`` (a range, on a
    logarithmic scale). A range is a (low, high) pair, a choice is a list.
    """
    found: dict[str, Any] = {}
    if "lr" not in recipe.training:
        found["lr"] = RATES.get(recipe.training.get("optimizer", ""), (2e-4, 2e-2))
    if "weight_decay" not in recipe.training:
        found["weight_decay"] = (1e-5, 1e-1)
    for slot, default in keys(recipe.backbone)[0].items():
        option = Option.parse(recipe.slots.get(slot, default))
        factory = catalog.load(catalog.entry(slot, option.name).make)
        for name, values in getattr(factory, "tunable", {}).items():
            if name not in option.options:
                found[f"{slot}.{name}"] = values
    return found


class Tuner:
    """Optuna's TPE over a recipe's space, asked and told in order, so that a resumed study proposes the same again.

    The first trial is the recipe's own settings.
    """

    def __init__(self, recipe: Recipe, seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.space = space(recipe)
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.study = optuna.create_study(sampler=sampler, direction="maximize")
        self.told: list[tuple[dict[str, Any], float]] = []
        self.asked = False

    def suggest(self) -> tuple[Any, dict[str, Any]]:
        """An Optuna trial (``None`` for the recipe's own settings) and the values to try."""
        if not self.told and not self.asked:
            self.asked = True
            return None, {}
        trial = self.study.ask()
        values = {
            name: trial.suggest_categorical(name, list(values))
            if isinstance(values, list)
            else trial.suggest_float(name, *values, log=True)
            for name, values in self.space.items()
        }
        return trial, values

    def tell(self, trial: Any, values: dict[str, Any], score: float) -> None:
        """How it went: larger is better, nan or infinite for a failure."""
        self.told.append((values, score if math.isfinite(score) else -math.inf))
        if trial is None:
            return
        from optuna.trial import TrialState

        if math.isfinite(score):
            self.study.tell(trial, score)
        else:
            self.study.tell(trial, state=TrialState.FAIL)

    @property
    def best(self) -> dict[str, Any]:
        """The values that did best; the recipe's own before any trial or when all failed."""
        if not self.told or max(score for _, score in self.told) == -math.inf:
            return {}
        return max(self.told, key=lambda pair: pair[1])[0]


STARTUP, BATCH = 6, 4
"""Trials asked for at once: the recipe's own settings and the random ones at first, then so many a batch."""


Batch = list[tuple[int, Recipe]]


def proposals(recipe: Recipe, trials: int, seed: int) -> Generator[Batch, list[float] | None, dict[str, Any]]:
    """Batches of (index, recipe), each answered by the scores of its trainings; returns the best values.

    What is proposed depends on the scores alone.

    Args:
        recipe: what to tune.
        trials: how many trainings.
        seed: of the proposals.
    """
    tuner = Tuner(recipe, seed)
    start = 0
    while start < trials:
        indices = range(start, min(trials, start + (BATCH if start else STARTUP)))
        asked = [tuner.suggest() for _ in indices]
        scores = yield [(index, recipe.with_values(values)) for index, (_, values) in zip(indices, asked, strict=True)]
        for (trial, values), score in zip(asked, scores or [], strict=True):
            tuner.tell(trial, values, score)
        start = indices.stop
    return tuner.best


def tune_batches(recipe: Recipe, trials: int, seed: int, run: Callable[[Batch], list[float]]) -> dict[str, Any]:
    """Run :func:`proposals` through ``run(batch) -> scores``, larger is better, and return the best values."""
    asking = proposals(recipe, trials, seed)
    scores: list[float] | None = None
    while True:
        try:
            batch = asking.send(scores)
        except StopIteration as end:
            return end.value
        scores = run(batch)


def tune(recipe: Recipe, trials: int, seed: int, run: Callable[[int, Recipe], float]) -> dict[str, Any]:
    """:func:`tune_batches` through ``run(index, recipe) -> score``, one training at a time."""
    return tune_batches(recipe, trials, seed, lambda batch: [run(index, tried) for index, tried in batch])
