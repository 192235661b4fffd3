"""LAuReL: learned augmented residual layers, in the place of the residual sum.

Source: LAuReL: Learned Augmented Residual Layer, arXiv 2411.07501.
"""

from __future__ import annotations

import copy
import logging
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pomona.errors import PomonaError, check_positive, unknown
from pomona.nn.check import check_input
from pomona.nn.residual import Add

log = logging.getLogger("pomona.nn")
WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "free": lambda s: 1 + s,
    "sigmoid": lambda s: 2 * s.sigmoid(),
    "softmax": lambda s: 2 * s.softmax(0),
}
"""(alpha, beta) from two learned numbers; all are (1, 1) at zero."""
_PARTS = ("rw", "lr", "pa")


class LaurelResidual(nn.Module):
    """How a branch joins its input, with learned weights, a low-rank map and earlier inputs.

        y = alpha branch + beta (I + B A) (x + sum_j gamma_j x_j)

    RW learns alpha and beta, LR the matrices A and B, PA the gamma_j of the inputs x_j of earlier blocks, the latest
    first; a part that is left out is at its initial value, at which y = x + branch: alpha = beta = 1, B = 0, gamma = 0.

    Args:
        features: D, of x and of the branch.
        kind: 'rw', 'lr', 'pa' or several of them joined by '+'.
        rank: r of A (r, D) and B (D, r).
        history: number of earlier inputs that count, for 'pa'.
        dims: positions after the channels: 0 for (*, D), 2 for (B, D, H, W), where A and B are 1 x 1 convolutions.
        weighting: 'free' learns alpha and beta themselves, 'sigmoid' gives each the range (0, 2), 'softmax' makes
            their sum 2.
        post_norm: an RMS norm on B A x, as in Gemma 3n.

    Rows of A start orthonormal. Parameters: 2 for RW, 2 r D for LR (+ D for the norm), ``history`` for PA.

    Shape:
        x, branch and each of previous alike -> the same

    Raises:
        PomonaError: for an unknown kind or weighting, or 'pa' without history.
    """

    def __init__(
        self,
        features: int,
        kind: str = "rw+lr",
        rank: int = 32,
        history: int = 0,
        dims: int = 0,
        *,
        weighting: str = "free",
        post_norm: bool = False,
    ) -> None:
        super().__init__()
        check_positive(features=features, rank=rank)
        self.kind = kind
        parts = kind.split("+")
        for part in parts:
            if part not in _PARTS:
                raise unknown("kind", part, _PARTS)
        if weighting not in WEIGHTINGS:
            raise unknown("weighting", weighting, WEIGHTINGS)
        if ("pa" in parts) != (history > 0):
            raise PomonaError(f"kind={kind!r} and history={history} disagree; earlier inputs need 'pa' and history > 0")
        self.features, self.dims, self.weighting = features, dims, weighting
        self.weights = nn.Parameter(torch.zeros(2)) if "rw" in parts else None
        self.down = self.up = self.norm = None
        if "lr" in parts:
            self.down = nn.Parameter(nn.init.orthogonal_(torch.empty(rank, features)))
            self.up = nn.Parameter(torch.zeros(features, rank))
            self.norm = nn.RMSNorm(features, eps=1e-6) if post_norm else None
        self.gamma = nn.Parameter(torch.zeros(history)) if history else None

    @property
    def alpha_beta(self) -> Tensor | tuple[float, float]:
        """The factors of the branch and of the skip connection."""
        return (1.0, 1.0) if self.weights is None else WEIGHTINGS[self.weighting](self.weights)

    def forward(self, x: Tensor, branch: Tensor, previous: Sequence[Tensor] = ()) -> Tensor:
        """See the class; ``previous`` holds earlier blocks' inputs, the latest last."""
        check_input(self, x, self.features, self._axis)
        if self.gamma is not None:
            for gamma, earlier in zip(self.gamma, reversed(previous), strict=False):
                x = x + gamma * earlier
        if self.down is not None and self.up is not None:
            low = F.linear(F.linear(x.movedim(self._axis, -1), self.down), self.up)
            x = x + (low if self.norm is None else self.norm(low)).movedim(-1, self._axis)
        if self.weights is None:
            return x + branch
        alpha, beta = self.alpha_beta
        return beta * x + alpha * branch

    @property
    def _axis(self) -> int:
        return -1 - self.dims

    def overhead(self, positions: int) -> dict[str, int]:
        """What it costs beyond the plain sum at this many tokens or pixels.

        Returns:
            ``parameters``; ``flops`` of the matrix products, forward; ``stored`` numbers that training keeps for the
            backward pass: x and branch for RW, x and A x for LR, and the earlier inputs
        """
        rank = 0 if self.down is None else len(self.down)
        history = 0 if self.gamma is None else len(self.gamma)
        kept = 2 * self.features * (self.weights is not None) + (self.features + rank) * (rank > 0)
        return {
            "parameters": sum(p.numel() for p in self.parameters()),
            "flops": 4 * rank * self.features * positions,
            "stored": (kept + history * self.features) * positions,
        }

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"{self.features}, kind={self.kind!r}, dims={self.dims}"


class LaurelRW(LaurelResidual):
    """`LaurelResidual` with learned weights of branch and input."""

    tunable: ClassVar[dict[str, Any]] = {"weighting": list(WEIGHTINGS)}

    def __init__(self, features: int, dims: int = 0, weighting: str = "free") -> None:
        super().__init__(features, "rw", dims=dims, weighting=weighting)


class LaurelLR(LaurelResidual):
    """`LaurelResidual` with a low-rank map of the input."""

    tunable: ClassVar[dict[str, Any]] = {"rank": [4, 8, 16, 32]}

    def __init__(self, features: int, dims: int = 0, rank: int = 8, post_norm: bool = False) -> None:
        super().__init__(features, "lr", rank, dims=dims, post_norm=post_norm)


class LaurelRWLR(LaurelResidual):
    """`LaurelResidual` with learned weights and a low-rank map."""

    tunable: ClassVar[dict[str, Any]] = {"rank": [4, 8, 16, 32]}

    def __init__(
        self, features: int, dims: int = 0, rank: int = 8, weighting: str = "free", post_norm: bool = False
    ) -> None:
        super().__init__(features, "rw+lr", rank, dims=dims, weighting=weighting, post_norm=post_norm)


class Laurel(nn.Module):
    """A branch with its augmented residual connection: y = alpha f(x) + beta (I + B A) (s(x) + sum_j gamma_j x_j).

    Args:
        f: the branch.
        features: width of f's output.
        kind, rank, history, **options: as in `LaurelResidual`.
        shortcut: s, the projection of x where f changes its shape.

    Shape:
        x, and earlier inputs of the shape of s(x) -> f(x)
    """

    def __init__(
        self,
        f: nn.Module,
        features: int,
        kind: str = "rw+lr",
        rank: int = 32,
        history: int = 0,
        *,
        shortcut: nn.Module | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.f, self.shortcut = f, shortcut
        self.join = LaurelResidual(features, kind, rank, history, **options)

    def forward(self, x: Tensor, previous: Sequence[Tensor] = ()) -> Tensor:
        """See the class."""
        check_input(self, x)
        return self.join(x if self.shortcut is None else self.shortcut(x), self.f(x), previous)


class LaurelStack(nn.ModuleList):
    """Laurel blocks one after another, each told the inputs of those before it that have the shape of its own.

    Shape:
        input of the first block -> output of the last
    """

    def forward(self, x: Tensor) -> Tensor:
        """x_{i+1} = block_i(x_i, (x_0, ..., x_{i-1}))"""
        previous: list[Tensor] = []
        for block in self:
            y = block(x, [p for p in previous if p.shape == x.shape])
            previous.append(x)
            x = y
        return x


class _History:
    """The inputs of a network's residual connections in the current pass; emptied when the last one has been called."""

    def __init__(self, joins: int) -> None:
        self.joins = joins
        self.inputs: list[Tensor] = []


class _Remembering(nn.Module):
    """A `LaurelResidual` at place ``index`` of a network whose connections share a history."""

    def __init__(self, join: LaurelResidual, history: _History, index: int) -> None:
        super().__init__()
        self.join, self.history, self.index = join, history, index

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        inputs = self.history.inputs[: self.index]
        y = self.join(x, branch, [p for p in inputs if p.shape == x.shape])
        self.history.inputs = [] if self.index == self.history.joins - 1 else [*inputs, x]
        return y


def laurelize(
    net: nn.Module,
    example: Tensor,
    kind: str = "rw+lr",
    rank: int = 32,
    history: int = 0,
    *,
    channel_dim: int | None = None,
    **options: Any,
) -> nn.Module:
    """A copy of ``net`` with each of its residual sums replaced by a `LaurelResidual`; it computes the same at first.

    Connections made by a module `pomona.nn.residual.Add` are replaced as they are. Sums in the forward pass of a module
    are found by tracing that module with ``torch.fx`` and taken for residual where one operand is computed from the
    other, or both from something else, the branch by more layers than the shortcut; such a module becomes a
    ``torch.fx.GraphModule``, without its other methods. A module that cannot be traced is left as it is and logged.

    Args:
        net: any network.
        example: an input, which shows the width of every connection.
        kind, rank, history, **options: as in `LaurelResidual`; rank is cut to the width where that is smaller.
        channel_dim: axis of the features; by default 1 for inputs of four or more dimensions, else -1.

    Raises:
        PomonaError: if no residual connection is found.
    """
    net = expose_residuals(net)
    widths: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        widths.setdefault(name, inputs[0])

    handles = [
        module.register_forward_pre_hook(partial(note, name))
        for name, module in net.named_modules()
        if isinstance(module, Add)
    ]
    training = net.training
    try:
        with torch.no_grad():
            net.eval()(example)
    finally:
        net.train(training)
        for handle in handles:
            handle.remove()
    if not widths:
        raise PomonaError(
            f"{type(net).__name__} has no residual connection that laurelize can find; join branches with "
            "pomona.nn.residual.Add"
        )
    memory = _History(len(widths))
    for index, (name, x) in enumerate(widths.items()):
        axis = (1 if x.dim() >= 4 else -1) if channel_dim is None else channel_dim
        features, dims = x.shape[axis], x.dim() - 1 - axis % x.dim()
        join = LaurelResidual(features, kind, min(rank, features), history, dims, **options).to(x)
        net.set_submodule(name, _Remembering(join, memory, index) if history else join)
    return net


class _Shallow(fx.Tracer):
    """Traces the forward pass of one module, not those of the modules in it."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def expose_residuals(net: nn.Module) -> nn.Module:
    """A copy of ``net`` in which residual sums in a forward pass are calls of `Add` modules (see `laurelize`)."""
    net = copy.deepcopy(net)
    for name, module in reversed(list(net.named_modules())):
        if next(module.children(), None) is None or isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            continue
        try:
            graph = _Shallow().trace(module)
        except Exception as error:  # a forward pass may raise anything when it is given symbols for tensors
            log.info("%s %s is left as it is, since torch.fx cannot trace it: %s", type(module).__name__, name, error)
            continue
        found = {node: side for node in graph.nodes if (side := _skip(module, node)) is not None}
        if not found:
            continue
        for index, (node, side) in enumerate(found.items()):
            module.add_module(f"residual_{index}", Add())
            with graph.inserting_before(node):
                sides = (node.args[side], node.args[1 - side])
                node.replace_all_uses_with(graph.call_module(f"residual_{index}", sides))
            graph.erase_node(node)
        exposed = fx.GraphModule(module, graph, type(module).__name__)
        if not name:
            return exposed
        net.set_submodule(name, exposed)
    return net


def _skip(module: nn.Module, node: fx.Node) -> int | None:
    """Which operand of a residual sum is the skip connection, None for any other node."""
    if node.target not in (operator.add, operator.iadd, torch.add, "add", "add_"):
        return None
    sides = node.all_input_nodes
    if len(sides) != 2 or len(node.args) != 2 or node.kwargs:
        return None
    above = [_above(side) for side in sides]
    shared = above[0] & above[1]
    first, second = (_size(module, nodes - shared) for nodes in above)
    if not shared or first == second:
        return None
    return int(second < first)


def _size(module: nn.Module, nodes: set[fx.Node]) -> tuple[int, int]:
    """Layers with weights, then modules, that these nodes call."""
    called = [module.get_submodule(str(node.target)) for node in nodes if node.op == "call_module"]
    weighted = sum(next(m.parameters(recurse=False), None) is not None for c in called for m in c.modules())
    return weighted, len(called)


def _above(node: fx.Node) -> set[fx.Node]:
    """What a node is computed from; that something has a certain shape does not count."""
    seen, todo = {node}, [node]
    while todo:
        last = todo.pop()
        new = set() if last.target in (getattr, "size") else set(last.all_input_nodes) - seen
        seen |= new
        todo += new
    return seen
