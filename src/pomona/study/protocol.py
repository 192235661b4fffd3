"""The fair protocol as data: what every candidate gets alike."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from pomona.errors import PomonaError
from pomona.train.budget import Budget, parse_duration

TUNING_SEED = 1_000_003
"""Added to the first seed for tuning runs, so that no final run repeats one of them."""


class Protocol(BaseModel):
    """Same splits, budget, tuning trials, seeds and batches for all.

    Attributes:
        candidates: label -> recipe, as data.
        seeds: of the final trainings.
        trials: tuning trainings each (0 or 1: the recipe's own settings are used).
        budget_kind: ``epochs``, ``examples``, ``seconds`` or ``flops`` of each training.
        budget_amount: how many.
        wall_clock: seconds of the whole study, when it was given so.
        reference: the candidate that the others are compared with.
        match: ``params`` to give all candidates the reference's number of parameters.
        fingerprint: of the task.
        metric: what is ranked by.
    """

    model_config = ConfigDict(extra="forbid")

    candidates: dict[str, dict[str, Any]]
    seeds: list[int]
    trials: int = Field(ge=0)
    budget_kind: str
    budget_amount: float
    wall_clock: float | None = None
    reference: str
    match: str | None = None
    fingerprint: str
    metric: str

    @property
    def budget(self) -> Budget:
        """Of one training."""
        return Budget(self.budget_kind, self.budget_amount)  # type: ignore[arg-type]

    @property
    def tuning_trials(self) -> int:
        """Tuning trainings that are really run: one trial leaves nothing to choose."""
        return self.trials if self.trials > 1 else 0

    def identity(self) -> str:
        """Twelve hexadecimal digits that two runs share when one may resume the other."""
        data = self.model_dump(exclude={"budget_amount"} if self.wall_clock else set())
        return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:12]


def choose_budget(
    *,
    budget: str | float | None,
    epochs: float | None,
    examples: float | None,
    seconds: float | None,
    flops: float | None,
    trainings: int,
    references: int,
) -> tuple[Budget, float | None]:
    """The budget of one training, and the wall-clock of the study if that was given.

    A wall-clock is shared equally: a tenth is kept for the classical references and for measuring, the rest is
    divided by the number of trainings.

    Raises:
        PomonaError: if more than one budget is given, or one is not above zero.
    """
    given = {
        name: value
        for name, value in {
            "budget": budget,
            "epochs": epochs,
            "examples": examples,
            "seconds": seconds,
            "flops": flops,
        }.items()
        if value is not None
    }
    if len(given) > 1:
        raise PomonaError(f"give one budget, not {' and '.join(given)}; budget is the wall-clock of the whole study")
    if not given:
        return Budget("epochs", 20), None
    name, value = next(iter(given.items()))
    if name != "budget":
        return Budget(name, value), None  # type: ignore[arg-type]
    whole = parse_duration(value)
    return Budget("seconds", 0.9 * whole / max(trainings, 1)), whole


def seed_list(seeds: int | list[int] | range) -> list[int]:
    """``5`` -> [0, 1, 2, 3, 4]; lists and ranges as they are.

    Raises:
        PomonaError: if there is none, or one twice.
    """
    counted = isinstance(seeds, int) and not isinstance(seeds, bool)
    if not counted and not isinstance(seeds, (list, tuple, range)):
        raise PomonaError(f"seeds={seeds!r} must be a number of seeds, such as 5, or a list of them")
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    for seed in chosen:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise PomonaError(f"seeds={seeds!r} must hold whole numbers, not {seed!r}")
    if not chosen:
        raise PomonaError(f"seeds={seeds!r} must name at least one seed")
    if len(set(chosen)) != len(chosen):
        raise PomonaError(f"seeds={seeds!r} names a seed twice")
    return chosen
