"""Running a study unit by unit: every finished training is in the zoo before the next begins, so that a killed run
resumes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from pomona.data.task import Task
from pomona.errors import PomonaError
from pomona.recipe.execute import Trained, measure_cost, metrics_of, task_json, train_population, train_recipe, versions
from pomona.recipe.recipe import Recipe
from pomona.study.protocol import TUNING_SEED, Protocol
from pomona.study.tuning import tune_batches
from pomona.zoo import Record, Zoo


@dataclass(frozen=True)
class Progress:
    """Where a study is.

    Attributes:
        done: trainings finished, of ``total``.
        total: trainings in all.
        candidate: the one being trained.
        phase: ``tune``, ``seed`` or ``reference``.
        best: label and validation score of the best candidate so far, larger is better.
        members: how many networks are trained together now.
        candidates: candidates finished, and all.
        left: seconds left by the pace so far; ``None`` before anything is finished.
    """

    done: int
    total: int
    candidate: str
    phase: str
    best: tuple[str, float] | None = None
    members: int = 1
    candidates: tuple[int, int] = (0, 0)
    left: float | None = None


class Unit(NamedTuple):
    """One training of a study."""

    label: str
    recipe: Recipe
    phase: str
    number: int
    seed: int


def structure(recipe: Recipe) -> str:
    """What a recipe's members must have in common: all but the settings that each may have for itself."""
    own = {"lr", "weight_decay", "momentum", "schedule", "warmup", "clip", "patience", "transform"}
    data = recipe.model_dump(mode="json")
    data["training"] = {key: value for key, value in data["training"].items() if key not in own}
    return json.dumps(data, sort_keys=True)


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
        population: whether trials and seeds of a candidate are trained as one stacked network where that is possible.

    Attributes:
        notes: which candidates could not be stacked, and why.
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
        population: bool = True,
    ) -> None:
        self.task, self.recipes, self.protocol, self.zoo, self.study = task, recipes, protocol, zoo, study
        self.report, self.device, self.population = report, device, population
        self.notes: list[str] = []
        self.task_json = task_json(task)
        self.done = {(r.candidate, r.phase, r.index): r for r in zoo.records(study=study)}
        self.total = len(recipes) * (protocol.tuning_trials + len(protocol.seeds))
        self.finished = 0
        self.best: tuple[str, float] | None = None
        self.told: set[tuple[str, str, int]] = set()
        self.single: set[str] = set()  # candidates that turned out not to stack
        self.start, self.ready = time.perf_counter(), len(self.done)

    def tell(self, label: str, phase: str, done: int, members: int = 1) -> None:
        """Tell where the study is."""
        if self.report is None:
            return
        trained = len(self.done) - self.ready  # what the zoo had at first took no time
        pace = (time.perf_counter() - self.start) / trained if trained else None
        each = self.protocol.tuning_trials + len(self.protocol.seeds)
        counts = {name: sum(key[0] == name for key in self.done) for name in self.recipes}
        over = sum(count >= each for count in counts.values())
        left = None if pace is None else pace * (self.total - len(self.done))
        self.report(Progress(done, self.total, label, phase, self.best, members, (over, len(self.recipes)), left))

    def run(self) -> None:
        """Tune every candidate, then train its chosen settings once a seed."""
        chosen: dict[str, Recipe] = {}
        tuning_seed = self.protocol.seeds[0] + TUNING_SEED
        for label, recipe in self.recipes.items():

            def run(batch: list[tuple[int, Recipe]], label: str = label) -> list[float]:
                return self.units([Unit(label, tried, "tune", index, tuning_seed) for index, tried in batch])

            values = tune_batches(recipe, self.protocol.tuning_trials, tuning_seed, run)
            chosen[label] = recipe.with_values(values)
        seeds = list(enumerate(self.protocol.seeds))
        if self.population:
            for label, recipe in chosen.items():
                self.units([Unit(label, recipe, "seed", index, seed) for index, seed in seeds])
            return
        # seeds outermost: a study that is stopped early has something of every candidate
        for index, seed in seeds:
            for label, recipe in chosen.items():
                self.units([Unit(label, recipe, "seed", index, seed)])

    def units(self, units: list[Unit]) -> list[float]:
        """Trainings of one candidate, together where that is possible; their scores, in order."""
        if self.population:
            groups: dict[str, list[Unit]] = {}
            for unit in units:
                if (unit.label, unit.phase, unit.number) not in self.done:
                    groups.setdefault(structure(unit.recipe), []).append(unit)
            for group in groups.values():
                if len(group) > 1 and group[0].label not in self.single:
                    self.stack(group)
        return [self.unit(*unit) for unit in units]

    def stack(self, group: list[Unit]) -> None:
        """Train units as one and keep each; where that fails a note says why, and they are left to be done singly."""
        label = group[0].label
        for i, unit in enumerate(group):
            self.tell(label, unit.phase, self.finished + i, len(group))
            self.told.add((label, unit.phase, unit.number))
        try:
            trained = train_population(
                [(unit.recipe, unit.seed) for unit in group], self.task, self.protocol.budget, device=self.device
            )
        except Exception as error:  # what is wrong with the candidate itself shows when it is trained alone
            reason = str(error) if isinstance(error, PomonaError) else f"{type(error).__name__}: {error}"
            note = f"{label} was trained one network at a time: {reason.splitlines()[0]}"
            if note not in self.notes:
                self.notes.append(note)
            self.single.add(label)
            return
        for unit, one in zip(group, trained, strict=True):
            record, net = self.blank(*unit), None
            try:
                record, net = self.judge(record, one, unit.recipe)
            except Exception as error:
                self.broken(record, error)
            self.keep(unit.label, unit.phase, unit.number, record, net)

    def unit(self, label: str, recipe: Recipe, phase: str, index: int, seed: int) -> float:
        """One training, from the zoo if it is there; returns its validation score, larger is better, -inf for a
        failure.
        """
        record = self.done.get((label, phase, index))
        if record is None:
            if (label, phase, index) not in self.told:  # before a stack that came to nothing
                self.tell(label, phase, self.finished)
            record, net = self.train(label, recipe, phase, index, seed)
            record = self.keep(label, phase, index, record, net)
        self.finished += 1
        score = self.score(record)
        if math.isfinite(score) and (self.best is None or score > self.best[1]):
            self.best = (label, score)
        return score

    def keep(self, label: str, phase: str, index: int, record: Record, net: nn.Module | None) -> Record:
        """Put a finished unit into the zoo."""
        stored = self.zoo.add(record, net.state_dict() if net is not None else None)
        record = self.zoo.get(stored)  # another process on the same study may have been first: what is kept counts
        self.done[label, phase, index] = record
        return record

    def score(self, record: Record) -> float:
        """The validation metric of a record, larger is better."""
        if record.status != "ok":
            return -math.inf
        value = record.metrics["valid"][self.protocol.metric]
        return value if self.task.higher_is_better else -value

    def blank(self, label: str, recipe: Recipe, phase: str, index: int, seed: int) -> Record:
        """The record of a unit before its training."""
        return Record(
            study=self.study,
            candidate=label,
            phase=phase,
            index=index,
            seed=seed,
            recipe=recipe.model_dump(mode="json"),
            task=self.task_json,
            versions=versions(),
        )

    def train(self, label: str, recipe: Recipe, phase: str, index: int, seed: int) -> tuple[Record, nn.Module | None]:
        """Train a unit; whatever goes wrong in it becomes its record, and the study goes on."""
        record = self.blank(label, recipe, phase, index, seed)
        start = time.perf_counter()
        try:
            trained = train_recipe(recipe, self.task, self.protocol.budget, seed=seed, device=self.device)
            return self.judge(record, trained, recipe)
        except Exception as error:  # a candidate may be broken in any way without harm to the others
            self.broken(record, error)
            record.cost = {"seconds": time.perf_counter() - start}
            return record, None

    def broken(self, record: Record, error: Exception) -> None:
        """Enter what went wrong in one sentence."""
        record.status, record.error = "error", f"{type(error).__name__}: {error}".splitlines()[0]
        if isinstance(error, PomonaError):
            record.error = str(error)

    def judge(self, record: Record, trained: Trained, recipe: Recipe) -> tuple[Record, nn.Module | None]:
        """Fill the record of a finished training; the test split is read once a final network."""
        fit = trained.fit
        record.cost, record.curve = dict(trained.cost), fit.curve
        record.extra = trained.extra()
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
