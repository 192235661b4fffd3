"""A trial of the corpus as a record, and the search for the next one."""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from pomona.zoo import settings
from pomona.zoo.record import Record
from pomona.zoo.runner import Outcome
from pomona.zoo.tables import dumps

if TYPE_CHECKING:
    import optuna

    from pomona.data.task import Task

STUDY = "corpus"
"""The study that all trials of the corpus belong to."""


def pipeline(base: dict[str, Any]) -> str:
    """``<task>_<dataset>_<metric>_<nn>``, such as ``img-classification_digits_acc_mlp-0123456789ab``."""
    return "_".join(base[key] for key in ("task", "dataset", "metric", "nn"))


class Search:
    """Optuna's tree-structured Parzen estimator over hyperparameters, batch exponent and input transform.

    Args:
        supported: names searched in [0, 1].
        past: trials that count as observations.
        trials: how many are to come; a third of them, three to ten, are drawn at random first.
        seed: of the draws.
        prune: whether :attr:`stop` ends a trial below the median of earlier ones.
    """

    def __init__(self, supported: set[str], past: Iterable[Record], trials: int, seed: int, prune: bool) -> None:
        import optuna

        self.space = space(supported)
        before = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            sampler = optuna.samplers.TPESampler(n_startup_trials=min(10, max(3, trials // 3)), seed=seed)
            self.study = optuna.create_study(
                direction="maximize", sampler=sampler, pruner=optuna.pruners.MedianPruner(3)
            )
        finally:
            optuna.logging.set_verbosity(before)
        for record in past:
            prm = dict(record.recipe["prm"])
            prm["batch"] = round(math.log2(prm["batch"]))
            known = prm.keys() == self.space.keys() and record.status == "ok" and not record.extra.get("pruned")
            if known and prm["batch"] in range(settings.EXPONENTS[0], settings.EXPONENTS[1] + 1):
                value = record.curve[-1]["accuracy"]
                self.study.add_trial(optuna.create_trial(params=prm, distributions=self.space, value=value))
        self.prune = prune

    def ask(self) -> dict[str, Any]:
        """The next values to try."""
        self.trial = self.study.ask(self.space)
        return {**self.trial.params, "batch": 2 ** self.trial.params["batch"]}

    @property
    def stop(self) -> Callable[[int, float], bool] | None:
        """Whether to end the current trial, given an epoch and its accuracy."""

        def below_median(epoch: int, accuracy: float) -> bool:
            self.trial.report(accuracy, epoch)
            return self.trial.should_prune()

        return below_median if self.prune else None

    def tell(self, record: Record) -> None:
        """How the current trial went."""
        from optuna.trial import TrialState

        if record.status != "ok":
            self.study.tell(self.trial, state=TrialState.FAIL)
        elif record.extra["pruned"]:
            self.study.tell(self.trial, state=TrialState.PRUNED)
        else:
            self.study.tell(self.trial, record.curve[-1]["accuracy"])


def space(supported: set[str]) -> dict[str, optuna.distributions.BaseDistribution]:
    """What is searched: each supported name in [0, 1], the exponent of the batch size, the transform."""
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

    chosen: dict[str, BaseDistribution] = {name: FloatDistribution(0, 1) for name in sorted(supported)}
    chosen["batch"] = IntDistribution(*settings.EXPONENTS)
    chosen["transform"] = CategoricalDistribution(tuple(settings.TRANSFORMS))
    return chosen


def as_record(
    outcome: Outcome, data: Task, base: dict[str, Any], prm: dict[str, Any], seed: int, epochs: int
) -> Record:
    """The outcome as a record whose unit is the pipeline with ``prm``, seed and length, so that equals meet."""
    from pomona.nets.specs import to_json

    fingerprint = data.fingerprint()
    unit = dumps([sorted(prm.items()), seed, epochs, fingerprint])
    metrics = {"valid": {base["metric"]: outcome.curve[-1]["accuracy"]}} if outcome.curve else {}
    if "test" in outcome.result:
        metrics["test"] = {base["metric"]: outcome.result["test"]}
    cost = {name: outcome.result[name] for name in ("parameters", "latency") if name in outcome.result}
    return Record(
        study=STUDY,
        candidate=pipeline(base),
        phase="trial",
        index=int(hashlib.sha256(unit.encode()).hexdigest()[:10], 16),
        seed=seed,
        recipe={**base, "prm": prm},
        task={
            "name": data.name,
            "fingerprint": fingerprint,
            "inputs": to_json(data.inputs),
            "outputs": to_json(data.outputs),
        },
        metrics=metrics,
        curve=outcome.curve,
        cost=cost | {"seconds": sum(point["duration"] for point in outcome.curve)},
        versions={"python": platform.python_version()} | {name: _version(name) for name in ("pomona", "torch")},
        status=outcome.status,
        error=outcome.error,
        extra={"epochs": epochs, "pruned": outcome.pruned},
    )


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
