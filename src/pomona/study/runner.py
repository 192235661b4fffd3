"""Running a study unit by unit: every finished training is in the zoo before the next begins, so that a killed run
resumes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from pomona.data.task import Task
from pomona.errors import PomonaError
from pomona.recipe.execute import Trained, measure_cost, metrics_of, task_json, train_recipe, versions
from pomona.recipe.recipe import Recipe
from pomona.study.protocol import TUNING_SEED, Protocol
from pomona.study.tuning import tune
from pomona.zoo import Record, Zoo


@dataclass(frozen=True)
class Progress:
    """Where a study is.

    Attributes:
        done: trainings finished, of ``total``.
        total: trainings in all.
        candidate: the one being trained.
        phase: ``tune``, ``seed`` or ``reference``.
        best: label and validation score of the best candidate so far.
    """

    done: int
    total: int
    candidate: str
    phase: str
    best: tuple[str, float] | None = None


class Runner:
    """The trainings of one study.

    Args:
        task: the task.
        recipes: label -> recipe, already matched in size if the protocol says so.
        protocol: what every candidate gets.
        zoo: where each training is kept.
        study: id of the study in the zoo; units that it holds already are not run again.
        report: told before each training.
        device: where to train.
    """

    def __init__(
        self,
        task: Task,
        recipes: dict[str, Recipe],
        protocol: Protocol,
        zoo: Zoo,
        study: str,
        report: Callable[[Progress], None] | None = None,
        device: str = "auto",
    ) -> None:
        self.task, self.recipes, self.protocol, self.zoo, self.study = task, recipes, protocol, zoo, study
        self.report, self.device = report, device
        self.task_json = task_json(task)
        self.done = {(r.candidate, r.phase, r.index): r for r in zoo.records(study=study)}
        self.total = len(recipes) * (protocol.tuning_trials + len(protocol.seeds))
        self.finished = 0
        self.best: tuple[str, float] | None = None

    def run(self) -> None:
        """Tune every candidate, then train its chosen settings once a seed."""
        chosen: dict[str, Recipe] = {}
        tuning_seed = self.protocol.seeds[0] + TUNING_SEED
        for label, recipe in self.recipes.items():

            def run(index: int, tried: Recipe, label: str = label) -> float:
                return self.unit(label, tried, "tune", index, tuning_seed)

            values = tune(recipe, self.protocol.tuning_trials, tuning_seed, run)
            chosen[label] = recipe.with_values(values)
        # seeds outermost: a study that is stopped early has something of every candidate
        for index, seed in enumerate(self.protocol.seeds):
            for label, recipe in chosen.items():
                self.unit(label, recipe, "seed", index, seed)

    def unit(self, label: str, recipe: Recipe, phase: str, index: int, seed: int) -> float:
        """One training, from the zoo if it is there; returns its validation score, larger is better, -inf for a
        failure.
        """
        record = self.done.get((label, phase, index))
        if record is None:
            if self.report is not None:
                self.report(Progress(self.finished, self.total, label, phase, self.best))
            record, net = self.train(label, recipe, phase, index, seed)
            stored = self.zoo.add(record, net.state_dict() if net is not None else None)
            record = self.zoo.get(stored)  # another process on the same study may have been first: what is kept counts
            self.done[label, phase, index] = record
        self.finished += 1
        score = self.score(record)
        if math.isfinite(score) and (self.best is None or score > self.best[1]):
            self.best = (label, score)
        return score

    def score(self, record: Record) -> float:
        """The validation metric of a record, larger is better."""
        if record.status != "ok":
            return -math.inf
        value = record.metrics["valid"][self.protocol.metric]
        return value if self.task.higher_is_better else -value

    def train(self, label: str, recipe: Recipe, phase: str, index: int, seed: int) -> tuple[Record, nn.Module | None]:
        """Train a unit; whatever goes wrong in it becomes its record, and the study goes on."""
        record = Record(
            study=self.study,
            candidate=label,
            phase=phase,
            index=index,
            seed=seed,
            recipe=recipe.model_dump(mode="json"),
            task=self.task_json,
            versions=versions(),
        )
        start = time.perf_counter()
        try:
            trained = train_recipe(recipe, self.task, self.protocol.budget, seed=seed, device=self.device)
            return self.judge(record, trained, recipe)
        except Exception as error:  # a candidate may be broken in any way without harm to the others
            record.status, record.error = "error", f"{type(error).__name__}: {error}".splitlines()[0]
            if isinstance(error, PomonaError):
                record.error = str(error)
            record.cost = {"seconds": time.perf_counter() - start}
            return record, None

    def judge(self, record: Record, trained: Trained, recipe: Recipe) -> tuple[Record, nn.Module | None]:
        """Fill the record of a finished training; the test split is read once a final network."""
        fit = trained.fit
        record.cost, record.curve = dict(trained.cost), fit.curve
        record.extra = {"stopped": fit.stopped, "steps": fit.steps, "best": fit.best}
        if fit.stopped == "diverged" and fit.best < 0:
            record.status, record.error = "diverged", f"the loss became infinite or undefined after {fit.steps} steps"
            return record, None
        final = record.phase == "seed"
        record.metrics = metrics_of(fit.net, self.task, "valid", *(["test"] if final else []))
        if not math.isfinite(record.metrics["valid"]["loss"]):
            record.status, record.error = "diverged", "the outputs on validation are infinite or undefined"
            return record, None
        if final and record.index == 0:
            record.cost |= measure_cost(fit.net, self.task, recipe.train_settings().batch_size)
        return record, fit.net


def environment() -> dict[str, Any]:
    """What a report says of the machine."""
    return dict(versions())
