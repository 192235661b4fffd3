"""How to judge an architecture search: against the average architecture of its own space, over seeds, with costs.

Source: "NAS evaluation is frustratingly hard" (arXiv 1912.12522).
"""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import kendalltau

from pomona.errors import PomonaError, check_positive, unknown
from pomona.search.strategies import Arch, RandomSearch, Strategy, Variables, run_search

Array = NDArray[np.float64]
Train = Callable[..., float]
"""``train(arch, seed, **settings) -> accuracy``."""


class Bench(Protocol):
    """A table of trained architectures, or live training behind the same face (``Live``)."""

    variables: Variables

    def score(self, arch: Mapping[str, Any], *, split: str = "test", seed: int | None = None) -> float: ...


class Live:
    """Training on demand as a bench; each (architecture, seed) is trained once.

    Args:
        variables: options of each variable.
        train: ``train(arch, seed) -> {"valid": accuracy, "test": accuracy}``.
    """

    def __init__(self, variables: Variables, train: Callable[[Arch, int], Mapping[str, float]]) -> None:
        self.variables, self.train = variables, train
        self.trained: dict[tuple[Any, ...], Mapping[str, float]] = {}

    def score(self, arch: Mapping[str, Any], *, split: str = "test", seed: int | None = None) -> float:
        """Accuracy of one training; ``seed=None`` is seed 0."""
        key = (*(arch[name] for name in self.variables), seed or 0)
        if key not in self.trained:
            self.trained[key] = self.train(dict(arch), seed or 0)
        return self.trained[key][split]


class Improvement(NamedTuple):
    """Relative improvement in percent, its bootstrap interval, and the percentile among random architectures."""

    value: float
    low: float
    high: float
    percentile: float


def relative_improvement(
    acc_method: ArrayLike, acc_random: ArrayLike, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Improvement:
    """``RI = 100 (mean acc_method - mean acc_random) / mean acc_random``.

    The baseline is the MEAN of uniformly sampled architectures of the method's own space, trained by the method's
    own protocol.  The interval resamples seeds, and sampled architectures, with replacement.

    Args:
        acc_method: ``(seeds,)``.
        acc_random: ``(architectures,)`` or ``(architectures, seeds)``.
        level: of the interval.
        resamples: bootstrap draws.
        seed: of the draws.
    """
    method = np.atleast_1d(np.asarray(acc_method, dtype=np.float64))
    baseline = np.atleast_1d(np.asarray(acc_random, dtype=np.float64))
    baseline = baseline.mean(axis=tuple(range(1, baseline.ndim)))
    if not method.size or not baseline.size or baseline.mean() <= 0:
        raise PomonaError("acc_random must hold at least one accuracy above 0, and acc_method one accuracy")

    def ratio(m: Array, r: Array) -> Array:
        return 100 * (m - r) / r

    rng = np.random.default_rng(seed)
    means = [x[rng.integers(len(x), size=(resamples, len(x)))].mean(1) for x in (method, baseline)]
    low, high = np.quantile(ratio(*means), [(1 - level) / 2, (1 + level) / 2])
    below = 100 * float(np.mean((baseline < method.mean()) + 0.5 * (baseline == method.mean())))
    return Improvement(float(ratio(method.mean(), baseline.mean())), float(low), float(high), below)


def kendall_tau(a: ArrayLike, b: ArrayLike) -> float:
    """Kendall's tau-b of two score lists: 1 for the same ranking, -1 for the reverse."""
    return float(kendalltau(a, b).statistic)


def variance_components(scores: ArrayLike, factors: Sequence[str]) -> dict[str, float]:
    """Variance of each factor of an additive crossed design, and the residual, from mean squares.

    ``y = m + sum_f a_f + e``:  ``E[MS_f] = var_e + (cells / levels_f) var_f``; estimates may be below 0.

    Args:
        scores: one axis a factor, one value a cell, at least two levels each.
        factors: name of each axis.
    """
    y = np.asarray(scores, dtype=np.float64)
    if y.ndim != len(factors) or min(y.shape) < 2:
        raise PomonaError(f"scores of shape {y.shape} need {len(factors)} axes with at least 2 levels each")
    means = {f: y.mean(axis=tuple(j for j in range(y.ndim) if j != i)) for i, f in enumerate(factors)}
    effects = {f: mean - y.mean() for f, mean in means.items()}
    fitted = y.mean() + sum(
        effect.reshape([-1 if j == i else 1 for j in range(y.ndim)]) for i, effect in enumerate(effects.values())
    )
    freedom = y.size - 1 - sum(n - 1 for n in y.shape)
    residual = float(((y - fitted) ** 2).sum() / freedom)
    return {f: float(effect.var(ddof=1) - residual * len(effect) / y.size) for f, effect in effects.items()} | {
        "residual": residual
    }


class Ladder(NamedTuple):
    """Accuracies ``(protocols, architectures, seeds)`` under cumulative training tricks."""

    steps: list[str]
    scores: Array

    @property
    def means(self) -> dict[str, float]:
        """Mean accuracy at each step."""
        return dict(zip(self.steps, self.scores.mean((1, 2)).tolist(), strict=True))

    @property
    def components(self) -> dict[str, float]:
        """Variance due to protocol, architecture and seed."""
        return variance_components(self.scores, ["protocol", "architecture", "seed"])


def protocol_ladder(
    archs: Sequence[Arch], tricks: Mapping[str, Mapping[str, Any]], train: Train, *, seeds: Sequence[int] = (0, 1, 2)
) -> Ladder:
    """Train the same architectures under protocols that add one trick after another.

    Args:
        archs: usually random ones.
        tricks: step name -> settings that it adds to those before (the first is the base, often ``{}``).
        train: ``train(arch, seed, **settings) -> accuracy``.
        seeds: trainings of each architecture.
    """
    settings: dict[str, Any] = {}
    rows = []
    for change in tricks.values():
        settings = {**settings, **change}
        rows.append([[train(arch, seed, **settings) for seed in seeds] for arch in archs])
    return Ladder(list(tricks), np.array(rows, dtype=np.float64))


class SeedSensitivity(NamedTuple):
    """How much of a ranking is luck.

    Attributes:
        tau: mean Kendall tau between the rankings of two seeds.
        spread: largest minus smallest mean accuracy over architectures.
        seed_std: standard deviation over seeds, averaged over architectures.
    """

    tau: float
    spread: float
    seed_std: float


def seed_sensitivity(scores: ArrayLike) -> SeedSensitivity:
    """Compare the rankings of different seeds; ``scores`` is ``(architectures, seeds)``."""
    y = np.asarray(scores, dtype=np.float64)
    if y.ndim != 2 or min(y.shape) < 2:
        raise PomonaError(f"scores of shape {y.shape} must be (architectures, seeds), two of each at least")
    taus = [kendall_tau(y[:, i], y[:, j]) for i, j in itertools.combinations(range(y.shape[1]), 2)]
    return SeedSensitivity(float(np.mean(taus)), float(np.ptp(y.mean(1))), float(y.std(1, ddof=1).mean()))


def ablate_space(
    variables: Variables, *, empty: Any = "none", keep: int = 2, draws: int = 3, seed: int = 0
) -> dict[str, dict[str, tuple[Any, ...]]]:
    """Smaller spaces that tell operations from wiring; all variables must offer the same options.

    Args:
        variables: the space.
        empty: the option that carries nothing.
        keep: operations in a random subset.
        draws: random subsets.
        seed: of the subsets.

    Returns:
        ``one_op=X`` (X everywhere), ``random_ops=X+Y`` (random subset everywhere), ``wiring=X`` (X or nothing).
    """
    options = next(iter(variables.values()))
    if any(tuple(other) != tuple(options) for other in variables.values()):
        raise PomonaError("variables must all offer the same options to be ablated together; give the edges only")
    operations = [option for option in options if option != empty]
    if not 1 <= keep <= len(operations):
        raise PomonaError(f"keep={keep} must be between 1 and the {len(operations)} operations")
    rng = random.Random(seed)
    subsets = list(itertools.combinations(operations, keep))
    spaces: dict[str, tuple[Any, ...]] = {f"one_op={op}": (op,) for op in operations}
    spaces |= {f"random_ops={'+'.join(map(str, s))}": s for s in rng.sample(subsets, min(draws, len(subsets)))}
    spaces |= {f"wiring={op}": (empty, op) for op in operations}
    return {name: dict.fromkeys(variables, chosen) for name, chosen in spaces.items()}


def depth_gap(archs: Sequence[Arch], train: Train, search: Mapping[str, Any], evaluation: Mapping[str, Any]) -> float:
    """Kendall tau between the rankings of the same architectures in the search and the evaluation setting.

    Args:
        archs: the architectures.
        train: ``train(arch, 0, **settings) -> accuracy``.
        search: settings during search, such as ``{"cells": 1}``.
        evaluation: settings of the final training, such as ``{"cells": 3}``.
    """
    first, second = ([train(arch, 0, **settings) for arch in archs] for settings in (search, evaluation))
    return kendall_tau(first, second)


@dataclass
class Result:
    """One method on one data set.

    Attributes:
        method: name.
        dataset: name.
        accuracies: ``(seeds,)`` test accuracy of the chosen architecture, trained anew each time.
        random: accuracies of uniformly sampled architectures of the same space, same protocol.
        evaluations: architectures trained during each search (``None``: unknown).
        protocol: how all of them were trained, in words.
    """

    method: str
    dataset: str
    accuracies: list[float]
    random: list[float] = field(default_factory=list)
    evaluations: float | None = None
    protocol: str = ""

    @property
    def improvement(self) -> Improvement:
        """Relative improvement over the average random architecture."""
        return relative_improvement(self.accuracies, self.random)


def checklist(result: Result) -> list[str]:
    """What is missing for a fair judgement."""
    wants = {
        "fewer than 3 seeds of the search": len(result.accuracies) < 3,
        "fewer than 8 random architectures as the baseline": len(result.random) < 8,
        "no description of the training protocol, which may matter more than the architecture": not result.protocol,
    }
    return [text for text, missing in wants.items() if missing]


def report(result: Result) -> str:
    """One line with accuracy, relative improvement, percentile, seeds and cost; warnings for what is weak.

    Raises:
        PomonaError: without random baseline, seeds or search cost: a single accuracy is not a result.
    """
    if not result.random:
        raise PomonaError("random=[] is missing; add accuracies of random architectures of the same space")
    if len(result.accuracies) < 2:
        raise PomonaError(f"accuracies has {len(result.accuracies)} entries; repeat the search with another seed")
    if result.evaluations is None:
        raise PomonaError("evaluations=None is missing; add how many architectures each search trained")
    for text in checklist(result):
        warnings.warn(f"{result.method} on {result.dataset}: {text}", stacklevel=2)
    gain, acc = result.improvement, np.asarray(result.accuracies)
    return (
        f"{result.method} on {result.dataset}: {acc.mean():.2f} +- {acc.std(ddof=1):.2f} % ({len(acc)} seeds, "
        f"{result.evaluations:g} trainings a search); {gain.value:+.2f} % [{gain.low:+.2f}, {gain.high:+.2f}] "
        f"over {len(result.random)} random architectures (mean {np.mean(result.random):.2f} %), "
        f"percentile {gain.percentile:.0f}"
    )


Method = Callable[[Bench, int], Strategy]
"""``method(bench, seed) -> strategy``."""


@dataclass(frozen=True)
class Trial:
    """A method for ``benchmark``: how to make its strategy, and how many architectures it may train.

    ``budget=1`` returns the first proposal untested, as a training-free method does.
    """

    make: Method
    budget: int = 20


def benchmark(
    methods: Mapping[str, Trial],
    datasets: Mapping[str, Bench],
    *,
    n_random: int = 8,
    seeds: Sequence[int] = (0, 1, 2),
    trainings: int = 3,
    protocol: str = "",
) -> list[Result]:
    """Run every method on every data set and set each beside the average random architecture of the same space.

    The search sees validation accuracies of one training seed; its choice is then judged by the test accuracy of
    another training seed, and so are ``n_random`` uniform architectures a seed.

    Args:
        methods: name -> trial.
        datasets: name -> table or live bench.
        n_random: random architectures for each seed of the search.
        seeds: of the searches.
        trainings: training seeds that the benches hold; at least 2.
        protocol: how architectures are trained, in words.
    """
    check_positive(n_random=n_random)
    if trainings < 2:
        raise PomonaError(f"trainings={trainings} must be at least 2: one to search on, another to judge by")
    results = []
    for (method, trial), (dataset, bench) in itertools.product(methods.items(), datasets.items()):
        result = Result(method, dataset, [], [], trial.budget if trial.budget > 1 else 0, protocol)
        for seed in seeds:
            seen, judged = seed % trainings, (seed + 1) % trainings

            def valid(arch: Arch, bench: Bench = bench, seen: int = seen) -> float:
                return bench.score(arch, split="valid", seed=seen)

            strategy = trial.make(bench, seed)
            best = run_search(strategy, valid, trial.budget).best if trial.budget > 1 else strategy.ask()
            result.accuracies.append(bench.score(best, split="test", seed=judged))
            uniform = RandomSearch(bench.variables, seed=seed + 10_007)
            result.random += [bench.score(uniform.ask(), split="test", seed=judged) for _ in range(n_random)]
        results.append(result)
    return results


def table(results: Sequence[Result], *, by: str = "value") -> list[dict[str, Any]]:
    """Rows ready for a data frame, best relative improvement (or percentile) first."""
    if by not in Improvement._fields:
        raise unknown("by", by, Improvement._fields)
    rows = [
        {"method": r.method, "dataset": r.dataset, "accuracy": float(np.mean(r.accuracies)), **r.improvement._asdict(),
         "evaluations": r.evaluations}
        for r in results
    ]  # fmt: skip
    return sorted(rows, key=lambda row: -row[by])
