"""Classical models that stand beside every network: what a table, image or series gives without any network."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.multioutput import MultiOutputRegressor
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

from pomona.data.metrics import probability_metrics, regression_metrics
from pomona.data.task import Task

NAMES = {
    "classes": ("majority", "logistic", "k-NN", "random forest", "gradient boosting"),
    "number": ("mean", "ridge", "k-NN", "random forest", "gradient boosting"),
}
ONE_HOT_LIMIT = 64
TREES = 200


@dataclass
class Reference:
    """A classical model's results, one entry a seed (deterministic models repeat theirs)."""

    name: str
    valid: list[dict[str, float]]
    test: list[dict[str, float]]
    seconds: float
    note: str = ""

    @classmethod
    def failed(cls, name: str, error: Exception) -> Reference:
        """A model that cannot be fitted to such data."""
        return cls(name, [], [], 0.0, f"{type(error).__name__}: {error}".splitlines()[0])


def features(task: Task) -> dict[str, np.ndarray]:
    """Each split as a plain matrix: categories one-hot (codes beyond a limit stay codes), text as token counts, the
    rest flat.
    """
    if task.inputs.kind != "table" or not task.inputs.columns:
        return {name: split.x.reshape(len(split), -1).numpy().astype(np.float64) for name, split in task.splits.items()}
    out: dict[str, list[np.ndarray]] = {name: [] for name in task.splits}
    start = 0
    for column in task.inputs.columns:
        for name, split in task.splits.items():
            block = split.x[:, start : start + column.width].numpy().astype(np.float64)
            if column.kind == "category" and column.cardinality <= ONE_HOT_LIMIT:
                block = np.eye(column.cardinality)[block[:, 0].astype(int)]
            elif column.kind == "text":
                counts = np.zeros((len(block), column.cardinality))
                np.add.at(counts, (np.arange(len(block))[:, None], block.astype(int)), 1.0)
                block = counts[:, 1:]
            out[name].append(block)
        start += column.width
    return {name: np.concatenate(blocks, axis=1) for name, blocks in out.items()}


def _probabilities(model: Any, x: np.ndarray, classes: int) -> np.ndarray:
    """Probabilities over all of the task's classes, also those that training did not have."""
    out = np.zeros((len(x), classes))
    out[:, np.asarray(model.classes_, int)] = model.predict_proba(x)
    return out


def _grow(model: Any, x: np.ndarray, y: np.ndarray, field: str, most: int, chunk: int, deadline: float) -> bool:
    """Fit an ensemble in chunks until it is whole or the time is over; returns whether it was cut short."""
    for size in range(chunk, most + chunk, chunk):
        model.set_params(**{field: min(size, most)})
        model.fit(x, y)
        if time.perf_counter() > deadline and size < most:
            return True
    return False


def run_references(task: Task, seeds: list[int], *, trials: int = 4, seconds: float = 60.0) -> list[Reference]:
    """Fit every classical reference on the training split, choosing on validation, and read test once.

    Args:
        task: the task.
        seeds: of the randomised models.
        trials: how many settings logistic/ridge and k-NN choose among, as many as each network has.
        seconds: after so long an ensemble stops growing; its note says so.
    """
    x, y = features(task), {name: split.y.numpy() for name, split in task.splits.items()}
    scale = np.maximum(x["train"].std(axis=0), 1e-9)
    centre = x["train"].mean(axis=0)
    standard = {name: (values - centre) / scale for name, values in x.items()}
    classes = task.outputs.kind == "classes"
    single = not classes and task.outputs.size == 1
    if single:
        y = {name: values[:, 0] for name, values in y.items()}

    def judge(model: Any, data: dict[str, np.ndarray], split: str) -> dict[str, float]:
        if classes:
            return probability_metrics(_probabilities(model, data[split], task.outputs.size), y[split])
        from torch import from_numpy

        predicted = np.asarray(model.predict(data[split]), np.float64).reshape(len(y[split]), -1)
        return regression_metrics(from_numpy(predicted), task.splits[split].y)

    def signed(metrics: dict[str, float]) -> float:
        value = metrics[task.metric]
        return value if task.higher_is_better else -value

    def chosen(name: str, makers: list[Callable[[], Any]], data: dict[str, np.ndarray]) -> Reference:
        """The deterministic model that does best on validation."""
        start, best = time.perf_counter(), None
        for make in makers:
            try:
                model = make().fit(data["train"], y["train"])
                score = judge(model, data, "valid")
            except ValueError as error:  # such as a training split of one class
                return Reference.failed(name, error)
            if best is None or signed(score) > signed(best[1]):
                best = (model, score)
            if time.perf_counter() - start > seconds:
                break
        assert best is not None
        test = judge(best[0], data, "test")
        return Reference(name, [best[1]] * len(seeds), [test] * len(seeds), time.perf_counter() - start)

    def grown(name: str, make: Callable[[int], Any], field: str, most: int, chunk: int) -> Reference:
        """A randomised ensemble, fitted once a seed."""
        start, valid, test, cut = time.perf_counter(), [], [], False
        for i, seed in enumerate(seeds):
            model = make(seed)
            try:
                cut |= _grow(model, x["train"], y["train"], field, most, chunk, start + seconds * (i + 1) / len(seeds))
                valid.append(judge(model, x, "valid"))
                test.append(judge(model, x, "test"))
            except ValueError as error:
                return Reference.failed(name, error)
        return Reference(name, valid, test, time.perf_counter() - start, "stopped at its time limit" if cut else "")

    strengths = [1.0, 0.01, 0.1, 10.0, 100.0, 0.001][: max(1, trials)]
    neighbours = [k for k in (5, 1, 15, 3, 31, 9)[: max(1, trials)] if k <= len(y["train"])] or [1]
    names = NAMES[task.outputs.kind]
    if classes:
        return [
            chosen(names[0], [lambda: DummyClassifier(strategy="prior")], x),
            chosen(names[1], [partial(LogisticRegression, C=c, max_iter=300) for c in strengths], standard),
            chosen(names[2], [partial(KNeighborsClassifier, k) for k in neighbours], standard),
            grown(
                names[3],
                lambda s: RandomForestClassifier(warm_start=True, random_state=s, n_jobs=2),
                "n_estimators",
                TREES,
                50,
            ),
            grown(
                names[4],
                lambda s: HistGradientBoostingClassifier(warm_start=True, random_state=s, early_stopping=False),
                "max_iter",
                100,
                10,
            ),
        ]
    boosted: Callable[[int], Any] = lambda s: HistGradientBoostingRegressor(  # noqa: E731
        warm_start=True, random_state=s, early_stopping=False
    )
    return [
        chosen(names[0], [DummyRegressor], x),
        chosen(names[1], [partial(Ridge, a) for a in strengths], standard),
        chosen(names[2], [partial(KNeighborsRegressor, k) for k in neighbours], standard),
        grown(
            names[3],
            lambda s: RandomForestRegressor(warm_start=True, random_state=s, n_jobs=2),
            "n_estimators",
            TREES,
            50,
        ),
        grown(names[4], boosted, "max_iter", 100, 10)
        if single
        else grown(names[4], lambda s: MultiOutputRegressor(boosted(s).set_params(max_iter=100)), "n_jobs", 1, 1),
    ]
