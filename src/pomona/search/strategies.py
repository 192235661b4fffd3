"""Search strategies that ask for an architecture to train and are told its score."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

from pomona.errors import PomonaError, check_positive

Arch = dict[str, Any]
Variables = Mapping[str, tuple[Any, ...]]


class Strategy(Protocol):
    """``ask()`` for the next architecture, ``tell()`` its score; larger is better."""

    def ask(self) -> Arch: ...

    def tell(self, arch: Arch, score: float) -> None: ...


class RandomSearch:
    """Uniform choice of every variable.

    Args:
        variables: options of each variable.
        seed: of the draws.
    """

    def __init__(self, variables: Variables, *, seed: int = 0) -> None:
        self.variables, self.rng = variables, random.Random(seed)

    def ask(self) -> Arch:
        """A uniform architecture."""
        return {name: self.rng.choice(options) for name, options in self.variables.items()}

    def tell(self, arch: Arch, score: float) -> None:
        """Nothing is learnt."""


class RegularizedEvolution:
    """Aging evolution: the best of a random sample is mutated, and the oldest leaves.

    Args:
        variables: options of each variable.
        population: number kept; the first that many are uniform.
        sample: size of the tournament.
        seed: of the draws.

    Source: "Regularized Evolution for Image Classifier Architecture Search" (arXiv 1802.01548).
    """

    def __init__(self, variables: Variables, *, population: int = 10, sample: int = 3, seed: int = 0) -> None:
        check_positive(population=population, sample=sample)
        if sample > population:
            raise PomonaError(f"sample={sample} must be at most population={population}")
        self.random = RandomSearch(variables, seed=seed)
        self.rng, self.sample = self.random.rng, sample
        self.population: deque[tuple[Arch, float]] = deque(maxlen=population)

    def ask(self) -> Arch:
        """A uniform architecture until the population is full, then a mutated winner."""
        if len(self.population) < (self.population.maxlen or 0):
            return self.random.ask()
        parent, _ = max(self.rng.sample(list(self.population), self.sample), key=lambda member: member[1])
        return self.mutate(parent)

    def mutate(self, arch: Arch) -> Arch:
        """Another option for one variable."""
        free = [name for name, options in self.random.variables.items() if len(options) > 1]
        name = self.rng.choice(free)
        options = [option for option in self.random.variables[name] if option != arch[name]]
        return {**arch, name: self.rng.choice(options)}

    def tell(self, arch: Arch, score: float) -> None:
        """The architecture joins; when the population is full the oldest leaves."""
        self.population.append((arch, score))


class Ranked:
    """Architectures in the order of a score known without training, best first (``grad_sign`` top-1 and the like).

    Args:
        archs: candidates.
        proxy: architecture -> score.
    """

    def __init__(self, archs: Iterable[Arch], proxy: Callable[[Arch], float]) -> None:
        self.order = deque(sorted(archs, key=proxy, reverse=True))

    def ask(self) -> Arch:
        """The best not yet asked."""
        if not self.order:
            raise PomonaError("archs are used up; ask for no more than there are")
        return self.order.popleft()

    def tell(self, arch: Arch, score: float) -> None:
        """Nothing is learnt."""


class Search(NamedTuple):
    """What a search tried, in order, and the best of it by the scores it saw."""

    archs: list[Arch]
    scores: list[float]

    @property
    def best(self) -> Arch:
        """The architecture with the highest score; the first of equals."""
        return self.archs[max(range(len(self.scores)), key=self.scores.__getitem__)]


def run_search(strategy: Strategy, evaluate: Callable[[Arch], float], budget: int) -> Search:
    """Ask, evaluate and tell ``budget`` times."""
    check_positive(budget=budget)
    found = Search([], [])
    for _ in range(budget):
        arch = strategy.ask()
        score = evaluate(arch)
        strategy.tell(arch, score)
        found.archs.append(arch)
        found.scores.append(score)
    return found
