"""Search for layers that normalise and activate in one: graphs of primitive operations, evolved over several networks.

Source: Evolving Normalization-Activation Layers (arXiv 2004.02967).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pomona.data.task import Task
from pomona.errors import PomonaError, check_positive, unknown
from pomona.nets.convnet import global_mean
from pomona.nn.norm_act_graph import ARITY, LEAVES, Genome, GraphNormAct, Node, used
from pomona.train.budget import Budget
from pomona.train.loop import fit
from pomona.train.settings import Training

LayerMaker = Callable[[int, int], nn.Module]
"""(features, dims) -> a layer."""
NetMaker = Callable[[LayerMaker, Task], nn.Module]


# -- networks to judge a layer in --------------------------------------------------------------------------------


class _Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        """The input plus the branch."""
        return x + super().forward(x)


class _GlobalMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return global_mean(x)


def _conv(i: int, o: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Module:
    return nn.Conv2d(i, o, size, stride, size // 2, groups=groups, bias=False)


def plain_net(make: LayerMaker, task: Task, width: int = 8) -> nn.Module:
    """Three convolutions, each followed by the layer."""
    sizes = [task.inputs.shape[0], width, 2 * width, 2 * width]
    layers = [m for i, o in pairwise(sizes) for m in (_conv(i, o, stride=1 + (o > i > 1)), make(o, 2))]
    return nn.Sequential(*layers, _GlobalMean(), nn.Linear(sizes[-1], task.outputs.size))


def residual_net(make: LayerMaker, task: Task, width: int = 12) -> nn.Module:
    """A stem and two residual blocks (layer, convolution, layer, convolution)."""

    def block() -> nn.Module:
        return _Residual(make(width, 2), _conv(width, width), make(width, 2), _conv(width, width))

    head = (make(width, 2), _GlobalMean(), nn.Linear(width, task.outputs.size))
    return nn.Sequential(_conv(task.inputs.shape[0], width, stride=2), block(), block(), *head)


def bottleneck_net(make: LayerMaker, task: Task, width: int = 8, expand: int = 3) -> nn.Module:
    """A stem and two inverted bottlenecks (1x1, layer, depthwise 3x3, layer, 1x1), as in mobile networks."""
    wide = expand * width

    def block() -> nn.Module:
        inner = (_conv(width, wide, 1), make(wide, 2), _conv(wide, wide, groups=wide), make(wide, 2))
        return _Residual(*inner, _conv(wide, width, 1))

    head = (make(width, 2), _GlobalMean(), nn.Linear(width, task.outputs.size))
    return nn.Sequential(_conv(task.inputs.shape[0], width, stride=2), block(), block(), *head)


NETS: tuple[NetMaker, ...] = (plain_net, residual_net, bottleneck_net)


# -- rejection and evolution -------------------------------------------------------------------------------------


def worst_gradient_norm(
    net: nn.Module, task: Task, steps: int = 10, lr: float = 0.1, limit: float = 1e8, batch: int = 32
) -> float:
    """The largest ||dL/dw|| on the way of gradient ascent on it over the weights, on one training batch.

    Each step moves the weights by ``lr`` along the unit vector of the ascent direction; it ends early above ``limit``
    or where a number is not finite (inf).
    """
    names = [name for name, _ in net.named_parameters()]
    weights = [p.detach().clone() for p in net.parameters()]
    x, y = (part[:batch] for part in task.splits["train"])
    worst = 0.0
    net.train()
    for step in range(steps + 1):
        weights = [w.requires_grad_() for w in weights]
        loss = task.loss(functional_call(net, dict(zip(names, weights, strict=True)), (x,)), y)
        grads = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
        square = torch.stack([g.square().sum() for g in grads]).sum()
        norm = float(square.detach().sqrt())
        if norm != norm:
            return float("inf")
        worst = max(worst, norm)
        if worst > limit or step == steps or not square.requires_grad:
            break
        up = torch.autograd.grad(square, weights, materialize_grads=True)
        length = torch.stack([g.square().sum() for g in up]).sum().sqrt()
        weights = [(w + lr * g / (length + 1e-12)).detach() for w, g in zip(weights, up, strict=True)]
    return worst


def pareto_front(scores: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the entries that no other one dominates; larger is better."""
    table = torch.tensor(scores, dtype=torch.float64)
    better = (table[:, None] >= table[None]).all(-1) & (table[:, None] > table[None]).any(-1)
    return (~better.any(0)).nonzero().flatten().tolist()


@dataclass
class Tried:
    """A graph and what became of it.

    Attributes:
        genome: the graph.
        verdict: ``kept``, or the protocol that rejected it.
        scores: validation accuracy in each network, where kept.
        random: whether it was drawn afresh rather than mutated.
    """

    genome: Genome
    verdict: Literal["kept", "quality", "stability"]
    scores: tuple[float, ...] = ()
    random: bool = True


@dataclass
class NormActSearch:
    """Tournament evolution of norm-activation layers over several networks, with two ways to be rejected.

    Quality: after ``quality_steps`` of training some network is below ``threshold`` in validation accuracy. Stability:
    in some network gradient ascent on the weights takes the gradient's norm above ``limit``. What passes is trained for
    ``steps`` in each network. A tournament's winner is drawn from its Pareto front over the networks (``pareto``), or
    is the best on average (``average``); the oldest member leaves a full population.

    Args:
        task: images with classes.
        nets: makers of the networks, called with the layer's maker and the task.
        nodes: of a graph, the five leaves included.
        population: members kept; the first that many are random graphs.
        tournament: members drawn at random to compete.
        threshold: least accuracy after ``quality_steps``.
        training: settings of every training.
        seed: of the graphs and trainings.

    Source: Evolving Normalization-Activation Layers (arXiv 2004.02967).
    """

    task: Task
    nets: Sequence[NetMaker] = NETS
    nodes: int = 14
    population: int = 20
    tournament: int = 5
    winner: Literal["pareto", "average"] = "pareto"
    quality_steps: int = 100
    threshold: float = 0.2
    stability_steps: int = 10
    limit: float = 1e8
    steps: int = 300
    training: Training = field(default_factory=lambda: Training(batch_size=32, lr=5e-3))
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(population=self.population, tournament=self.tournament, steps=self.steps)
        if self.nodes <= len(LEAVES):
            raise PomonaError(f"nodes={self.nodes} must be above {len(LEAVES)}, the number of leaves")
        if self.winner not in ("pareto", "average"):
            raise unknown("winner", self.winner, ("pareto", "average"))
        self.rng = random.Random(self.seed)
        self.members: deque[Tried] = deque(maxlen=self.population)
        self.tried: list[Tried] = []

    def random_node(self, position: int) -> Node:
        """A uniform operation on earlier nodes."""
        return Node(self.rng.choice(tuple(ARITY)), self.rng.randrange(position), self.rng.randrange(position))

    def random_genome(self) -> Genome:
        """Uniform operations on uniform earlier nodes."""
        return tuple(self.random_node(position) for position in range(len(LEAVES), self.nodes))

    def mutate(self, genome: Genome) -> Genome:
        """Another operation and other inputs for one node."""
        at = self.rng.randrange(len(genome))
        return (*genome[:at], self.random_node(len(LEAVES) + at), *genome[at + 1 :])

    def ask(self) -> tuple[Genome, bool]:
        """A random graph until the population is full, then a mutated winner; and whether it is random."""
        if len(self.members) < self.population:
            return self.random_genome(), True
        drawn = self.rng.sample(list(self.members), min(self.tournament, self.population))
        scores = [member.scores for member in drawn]
        if self.winner == "average":
            best = max(range(len(drawn)), key=lambda i: sum(scores[i]))
        else:
            best = self.rng.choice(pareto_front(scores))
        return self.mutate(drawn[best].genome), False

    def judge(self, genome: Genome, random: bool = True) -> Tried:
        """Both protocols and, for what passes, its accuracies."""
        if 0 not in used(genome):  # constant in x
            return Tried(genome, "quality", random=random)
        for make in self.nets:
            if self._accuracy(make, genome, self.quality_steps) < self.threshold:
                return Tried(genome, "quality", random=random)
        for make in self.nets:
            if (
                worst_gradient_norm(self._net(make, genome), self.task, self.stability_steps, limit=self.limit)
                > self.limit
            ):
                return Tried(genome, "stability", random=random)
        return Tried(genome, "kept", tuple(self._accuracy(make, genome, self.steps) for make in self.nets), random)

    def step(self) -> Tried:
        """Ask for a graph, judge it, and let it join where it is kept."""
        done = self.judge(*self.ask())
        self.tried.append(done)
        if done.verdict == "kept":
            self.members.append(done)
        return done

    @property
    def best(self) -> Tried | None:
        """The kept graph with the best mean accuracy, if any was kept."""
        return max((t for t in self.tried if t.verdict == "kept"), key=lambda t: sum(t.scores), default=None)

    def shares(self) -> Mapping[str, float]:
        """The share of random graphs with each verdict."""
        drawn = [done.verdict for done in self.tried if done.random]
        return {name: drawn.count(name) / max(1, len(drawn)) for name in ("kept", "quality", "stability")}

    def _net(self, make: NetMaker, genome: Genome) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return make(lambda features, dims: GraphNormAct(genome, features, dims), self.task)

    def _accuracy(self, make: NetMaker, genome: Genome, steps: int) -> float:
        budget = Budget("examples", steps * self.training.batch_size)
        done = fit(self._net(make, genome), self.task, self.training, budget=budget, seed=self.seed, validations=1)
        return done.valid.get("accuracy", 0.0)
