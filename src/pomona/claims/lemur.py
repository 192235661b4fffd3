"""Whether a corpus of networks is quick to ask, worth tuning in, and says something of networks it lacks."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from sklearn.ensemble import RandomForestRegressor

from pomona.claims.lab import log
from pomona.claims.verdict import Comparison, Scale
from pomona.data import Split, Task, load
from pomona.zoo import Corpus, Record, Zoo
from pomona.zoo.code import op_counts

NETS = (
    *("mlp", "batchnorm_mlp", "residual_mlp", "gated_mlp", "highway", "maxout"),
    *("quadratic", "factorization", "convnet", "all_conv", "mixer", "gru"),
)
ALL = ("digits", "mnist1d", "breast_cancer")
SIZES: dict[Scale, dict[str, Any]] = {
    "smoke": {"nets": ("mlp", "quadratic"), "data": ALL[::2], "rows": 100, "trials": 2, "epochs": 2},
    "full": {"nets": NETS, "data": ALL, "rows": 400, "trials": 6, "epochs": 4},
    "gpu": {"nets": NETS, "data": ALL, "rows": 4000, "trials": 20, "epochs": 8},
}
FOLDS = 4


def lemur(scale: Scale, seeds: Sequence[int]) -> Comparison:
    """Claimed: the corpus's search beats default hyperparameters for at least 70% of pairs (network, data set).

    For each pair, TPE has a number of trials over hyperparameters, batch size and input transform; the default
    (0.5 for each hyperparameter, batches of 32, inputs as they are) is trained as many times with different
    seeds. Of either, the trial best on validation after its last epoch is judged on test; a tie counts half.
    In the details: whether one ``data()`` call gives all rows within 0.2 s; Spearman's correlation of first- and
    last-epoch accuracy over the trials of a data set (claimed: at least 0.6); Kendall's tau between accuracy and
    what a random forest on hyperparameters and operation counts, fitted on the first two data sets, predicts for
    networks held out (claimed: at least 0.3).
    """
    sizes, results = SIZES[scale], []
    for seed in seeds:
        tasks = [_smaller(load(name, seed=seed), sizes["rows"], seed) for name in sizes["data"]]
        with tempfile.TemporaryDirectory() as folder, Zoo(folder) as zoo, Corpus(zoo) as corpus:
            results.append(_populate(corpus, tasks, sizes, 1000 * seed))
        log.info("seed %d: %s", seed, results[-1])
    frame = pd.DataFrame(results)
    checks = {
        "data() within 0.2 s": bool((frame["query seconds"] < 0.2).all()),
        "first epoch predicts last": bool(frame["spearman"].mean() >= 0.6),
        "held-out networks predicted": bool(frame["kendall"].mean() >= 0.3),
    }
    return Comparison(
        method=[result["wins"] for result in results],
        baseline=[0.7] * len(results),
        metric="share of pairs (network, data set) in which the tuned network is better on test; ties count half",
        method_name=f"TPE, {sizes['trials']} trials",
        baseline_name=f"the claimed share, against the default hyperparameters at {sizes['trials']} seeds",
        paper="an open corpus of runnable networks with uniform records of tuning by Optuna, given by one request",
        note="Small networks and data sets; the share to exceed is ours, since the paper reports no such figure.",
        details={"checks": checks, "seeds": results},
    )


def _smaller(task: Task, rows: int, seed: int) -> Task:
    """The task with at most so many training examples; validation and test are left whole."""
    x, y = task.splits["train"]
    chosen = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[:rows]
    return replace(task, splits=task.splits | {"train": Split(x[chosen], y[chosen])})


def _populate(corpus: Corpus, tasks: Sequence[Task], sizes: dict[str, Any], seed: int) -> dict[str, float]:
    wins, gains = [], []
    for task, nn in product(tasks, sizes["nets"]):
        options: dict[str, Any] = {"trials": sizes["trials"], "epochs": sizes["epochs"], "seed": seed}
        tuned = corpus.run(None, task, "acc", nn, **options)
        default = corpus.run(None, task, "acc", nn, prm=dict.fromkeys(corpus.supported(nn), 0.5), **options)
        gain = _chosen(tuned) - _chosen(default)
        wins.append(float(np.sign(gain) + 1) / 2)
        gains.append(gain)
    start = time.perf_counter()
    rows = corpus.data()
    seconds = time.perf_counter() - start
    return {
        "wins": float(np.mean(wins)),
        "mean gain on test": float(np.mean(gains)),
        "rows": len(rows),
        "failed trials": int(corpus.stats()["failed"].sum()),
        "query seconds": seconds,
        "spearman": _early_against_late(rows, sizes["epochs"]),
        **_held_out(rows[rows["epoch"] == sizes["epochs"]], [task.name for task in tasks], seed),
    }


def _chosen(records: Sequence[Record]) -> float:
    """Test accuracy of the trial that is best on validation; 0 when all failed."""
    good = [record for record in records if record.status == "ok"]
    if not good:
        return 0.0
    return float(max(good, key=lambda record: record.metrics["valid"]["acc"]).metrics["test"]["acc"])


def _early_against_late(rows: pd.DataFrame, epochs: int) -> float:
    """Spearman's correlation of accuracy after the first and the last epoch, averaged over data sets."""
    wide = (
        rows[rows["epoch"].isin([1, epochs])]
        .pivot(index=["dataset", "id"], columns="epoch", values="accuracy")
        .dropna()
    )
    return float(np.mean([stats.spearmanr(part[1], part[epochs])[0] for _, part in wide.groupby("dataset")]))


def _held_out(last: pd.DataFrame, names: Sequence[str], seed: int) -> dict[str, float]:
    """Kendall's tau on networks that the regressor has not seen, by cross-validation over networks.

    ``kendall``: on the first two data sets, which it is fitted on; ``kendall, other data``: on the others.
    """
    last = last.reset_index(drop=True)
    x, y = _features(last, names), last["accuracy"].to_numpy()
    known = last["dataset"].isin(names[:2]).to_numpy()
    nets = np.random.default_rng(seed).permutation(last["nn"].unique())
    predicted = np.full(len(last), np.nan)
    for held in np.array_split(nets, min(FOLDS, len(nets))):
        test = last["nn"].isin(held).to_numpy()
        model = RandomForestRegressor(100, min_samples_leaf=2, max_features=0.5, random_state=seed)
        predicted[test] = model.fit(x[known & ~test], y[known & ~test]).predict(x[test])
    taus = {
        name: stats.kendalltau(predicted[rows], y[rows])[0]
        for name in names
        for rows in [(last["dataset"] == name).to_numpy()]
    }
    found = {"kendall": float(np.mean([taus[name] for name in names[:2]]))}
    return found | {f"kendall, {name}": float(taus[name]) for name in names}


def _features(rows: pd.DataFrame, names: Sequence[str]) -> np.ndarray:
    """Hyperparameters (-1 where the network has none), transform, operation counts and data set as columns."""
    prm = pd.DataFrame(list(rows["prm"]))
    settings = prm.drop(columns="transform").fillna(-1.0)
    transform = pd.get_dummies(prm["transform"])
    counts = pd.DataFrame([op_counts(code) for code in rows["nn_code"]]).fillna(0)
    data = pd.DataFrame({name: rows["dataset"] == name for name in names[:2]})
    return np.concatenate([part.to_numpy(float) for part in (settings, transform, counts, data)], axis=1)
