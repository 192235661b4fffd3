"""Layers that normalise and activate in one, written as graphs of primitive operations.

Source: Evolving Normalization-Activation Layers (arXiv 2004.02967).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pomona.errors import PomonaError, unknown
from pomona.nn.check import check_input
from pomona.nn.norm import _ChannelNorm

LEAVES = ("x", "0", "1", "v0", "v1")
ELEMENTWISE: dict[str, tuple[int, Callable[..., Tensor]]] = {
    "add": (2, torch.add),
    "mul": (2, torch.mul),
    "div": (2, torch.div),
    "max": (2, torch.maximum),
    "neg": (1, torch.neg),
    "sigmoid": (1, torch.sigmoid),
    "tanh": (1, torch.tanh),
    "exp": (1, torch.exp),
    "log": (1, lambda x: torch.sign(x) * torch.log(x.abs() + 1e-12)),
    "abs": (1, torch.abs),
    "square": (1, torch.square),
    "sqrt": (1, lambda x: torch.sign(x) * torch.sqrt(x.abs() + 1e-12)),
}
"""Operation -> number of inputs, function; log and square root keep the sign."""
OVER = ("bhw", "hw", "chw", "ghw")
"""Axes of a statistic: b batch, c channels, g channels of a group, hw positions."""
AGGREGATES = tuple(f"{kind}_{over}" for kind in ("mean", "std") for over in OVER)
ARITY = {name: arity for name, (arity, _) in ELEMENTWISE.items()} | dict.fromkeys(AGGREGATES, 1)


class Node(NamedTuple):
    """One operation and the nodes it takes: the leaves are 0 to 4, the first operation is 5. A second input that the
    operation has no use for is kept for mutations.
    """

    op: str
    a: int
    b: int


Genome = tuple[Node, ...]


def formula(genome: Genome) -> str:
    """The graph's output as an expression."""
    terms = list(LEAVES)
    for op, a, b in genome:
        terms.append(f"{op}({terms[a]})" if ARITY[op] == 1 else f"{op}({terms[a]}, {terms[b]})")
    return terms[-1]


def used(genome: Genome) -> set[int]:
    """The nodes that the output is computed from, leaves included."""
    found: set[int] = set()
    open_nodes = [len(LEAVES) + len(genome) - 1]
    while open_nodes:
        node = open_nodes.pop()
        if node not in found:
            found.add(node)
            if node >= len(LEAVES):
                op, a, b = genome[node - len(LEAVES)]
                open_nodes += [a, b][: ARITY[op]]
    return found


class GraphNormAct(_ChannelNorm):
    """y = g graph(x) + b, with the last node of a graph of primitive operations.

    v0 and v1 are trained, one number a channel, from 0 and 1. Statistics over the batch are running averages in
    evaluation.

    Args:
        genome: the graph's operations.
        features: channels.
        dims: positions after the channels.
        groups: of the statistics over groups; by default the most, up to 32, that leave at least 4 channels in each.
        momentum: of the running averages.
        eps: added to variances.

    Source: Evolving Normalization-Activation Layers (arXiv 2004.02967).
    """

    running: Tensor

    def __init__(
        self,
        genome: Genome,
        features: int,
        dims: int = 0,
        groups: int | None = None,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(features, dims, eps, True, True, "channels")
        for node, (op, a, b) in enumerate(genome, len(LEAVES)):
            if op not in ARITY:
                raise unknown("op", op, ARITY)
            if not (0 <= a < node and 0 <= b < node):
                raise PomonaError(f"node {node} takes {a} and {b}; it can take the nodes 0 to {node - 1} only")
        if groups is None:
            groups = max(g for g in range(1, min(32, max(1, features // 4)) + 1) if features % g == 0)
        self.genome, self.groups, self.momentum = tuple(genome), groups, momentum
        self.active = used(self.genome)
        self.v0, self.v1 = nn.Parameter(torch.zeros(features)), nn.Parameter(torch.ones(features))
        start = torch.tensor([0.0 if op.startswith("mean") else 1.0 for op, _, _ in genome])
        self.register_buffer("running", start[:, None].repeat(1, features))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and activate (*, features) or (batch, features, ...)."""
        check_input(self, x, self.shape[0], -self.dims - 1)
        view = (-1, *(1,) * self.dims)
        nodes = [x, torch.zeros_like(x), torch.ones_like(x)]
        nodes += [v.view(view).expand_as(x).to(x.dtype) for v in (self.v0, self.v1)]
        for i, (op, a, b) in enumerate(self.genome):
            if len(LEAVES) + i not in self.active:
                nodes.append(x)
            elif op in ELEMENTWISE:
                arity, function = ELEMENTWISE[op]
                nodes.append(function(nodes[a], nodes[b]) if arity == 2 else function(nodes[a]))
            else:
                kind, over = op.split("_")
                nodes.append(self._batch(kind, nodes[a], i) if over == "bhw" else self._own(kind, nodes[a], over))
        return self.affine(nodes[-1])

    def _batch(self, kind: str, x: Tensor, i: int) -> Tensor:
        channel = x.ndim - self.dims - 1
        if self.training:
            value = self._statistic(kind, x, tuple(axis for axis in range(x.ndim) if axis != channel))
            with torch.no_grad():
                kept = value.flatten() if kind == "mean" else value.flatten().square()
                self.running[i].mul_(1 - self.momentum).add_(self.momentum * kept.to(self.running.dtype))
        else:
            kept = self.running[i].to(x.dtype).view(-1, *(1,) * self.dims)
            value = kept if kind == "mean" else kept.sqrt()
        return value.expand_as(x)

    def _own(self, kind: str, x: Tensor, over: str) -> Tensor:
        channel = x.ndim - self.dims - 1
        if over == "hw":
            value = self._statistic(kind, x, tuple(range(-self.dims, 0)))
        else:
            groups = 1 if over == "chw" else self.groups
            grouped = x.unflatten(channel, (groups, x.shape[channel] // groups))
            value = self._statistic(kind, grouped, tuple(range(-self.dims - 1, 0))).expand_as(grouped)
            value = value.flatten(channel, channel + 1)
        return value.expand_as(x)

    def _statistic(self, kind: str, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        mean = x.mean(axes, keepdim=True) if axes else x
        if kind == "mean":
            return mean
        square = (x - mean).square()
        return ((square.mean(axes, keepdim=True) if axes else square) + self.eps).sqrt()

    def extra_repr(self) -> str:
        """The expression, for `repr`."""
        return f"{self.shape[0]}, dims={self.dims}, {formula(self.genome)}"
