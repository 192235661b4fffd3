"""What surrounds each linear or convolutional layer: activations before and after, residual branches.

Found on the graph that ``torch.fx`` traces. A network it cannot trace (control flow on data, for one) is read
in the order of ``named_modules`` instead, which is right for chains; residual branches then have to be named
by the caller.
"""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass

import torch
from torch import fx, nn

from pomona.nn.activation import CLASSES, act, is_activation
from pomona.nn.norm import is_norm

WeightedLayer = nn.Linear | nn.modules.conv._ConvNd
# modules and functions that hand a signal on with its mean square nearly unchanged
_PASSING = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.modules.dropout._DropoutNd,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)
# fmt: off
_PASSING_NAMES = frozenset([
    "flatten", "unflatten", "view", "reshape", "permute", "transpose", "contiguous", "squeeze", "unsqueeze", "dropout",
    "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
])
_NORM_NAMES = frozenset(["layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm"])
# fmt: on
_ADD = (operator.add, operator.iadd, torch.add, "add", "add_")


@dataclass(frozen=True)
class Neighbours:
    """The activation a layer's input comes from and the one its output goes to; None where there is none."""

    before: nn.Module | None
    after: nn.Module | None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_leaf(m)


def _is_leaf(module: nn.Module) -> bool:
    no_children = next(module.children(), None) is None
    return is_activation(module) or is_norm(module) or isinstance(module, WeightedLayer) or no_children


def _trace(net: nn.Module) -> fx.Graph | None:
    if _is_leaf(net):
        return None
    try:
        return _Tracer().trace(net)
    except Exception:
        # tracing runs the caller's own forward on proxies, which may fail in any way; module order is the fallback
        return None


class _Walk:
    """Steps along a traced graph from layer to layer."""

    def __init__(self, net: nn.Module, graph: fx.Graph) -> None:
        self.modules = dict(net.named_modules())
        self.nodes = list(graph.nodes)
        # all that a node is computed from, parameters left out; empty where it does not depend on the input
        self.upstream: dict[fx.Node, set[fx.Node]] = {}
        for node in self.nodes:
            above = set().union(*(self.upstream[source] for source in node.all_input_nodes))
            self.upstream[node] = above | {node} if above or node.op == "placeholder" else set()

    def sources(self, node: fx.Node) -> list[fx.Node]:
        return [source for source in node.all_input_nodes if self.upstream[source]]

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def is_layer(self, node: fx.Node) -> bool:
        return isinstance(self.module(node), WeightedLayer)

    @staticmethod
    def name(node: fx.Node) -> str:
        target = node.target
        return (target if isinstance(target, str) else getattr(target, "__name__", "")).rstrip("_")

    def activation(self, node: fx.Node) -> nn.Module | None:
        module = self.module(node)
        if module is not None:
            return module if is_activation(module) else None
        name = self.name(node)
        if node.op not in ("call_function", "call_method") or name not in CLASSES:
            return None
        options = {}
        if inspect.isfunction(node.target):
            given = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
            takes = inspect.signature(CLASSES[name]).parameters
            options = {key: value for key, value in given.items() if key in takes}
        return act(name, **options)

    def is_norm(self, node: fx.Node) -> bool:
        module = self.module(node)
        return is_norm(module) if module is not None else self.name(node) in _NORM_NAMES

    def is_passing(self, node: fx.Node) -> bool:
        module = self.module(node)
        if module is not None:
            return isinstance(module, _PASSING)
        if node.target in _ADD:  # of a bias
            return len(self.sources(node)) == 1
        return node.op in ("call_function", "call_method") and self.name(node) in _PASSING_NAMES

    def before(self, node: fx.Node) -> nn.Module | None:
        # a norm brings the mean square to 1 whatever came before it, so the walk back ends there
        source = self.sources(node)[0]
        while self.is_passing(source):
            source = self.sources(source)[0]
        return self.activation(source)

    def after(self, node: fx.Node) -> nn.Module | None:
        for user in node.users:
            found = self.activation(user)
            if found is None and (self.is_passing(user) or self.is_norm(user)):
                found = self.after(user)
            if found is not None:
                return found
        return None


def _in_module_order(net: nn.Module) -> dict[str, Neighbours]:
    leaves: list[tuple[str, nn.Module]] = []

    def visit(prefix: str, module: nn.Module) -> None:
        if _is_leaf(module):
            leaves.append((prefix, module))
            return
        for name, child in module.named_children():
            visit(f"{prefix}.{name}" if prefix else name, child)

    visit("", net)
    before: dict[str, nn.Module | None] = {}
    after: dict[str, nn.Module | None] = {}
    latest: nn.Module | None = None
    open_layer: str | None = None
    for name, module in leaves:
        if isinstance(module, WeightedLayer):
            before[name], after[name] = latest, None
            latest, open_layer = None, name
        elif is_activation(module):
            latest = module
            if open_layer is not None:
                after[open_layer], open_layer = module, None
        elif is_norm(module):
            latest = None
        elif not isinstance(module, _PASSING):
            latest, open_layer = None, None
    return {name: Neighbours(before[name], after[name]) for name in before}


def layer_neighbours(net: nn.Module) -> dict[str, Neighbours]:
    """For each ``nn.Linear`` and convolution, by name, the activation before it and the one after it.

    The graph of ``torch.fx`` is walked through dropout, pooling, reshaping, added biases and (forwards only) norms.
    Where the network cannot be traced the order of ``named_modules`` stands in. Activations called as functions are
    recognised by name in the graph. A layer that is called more than once counts by its first call.
    """
    in_order = _in_module_order(net)
    graph = _trace(net)
    if graph is None:
        return in_order
    walk = _Walk(net, graph)
    found: dict[str, Neighbours] = {}
    for node in walk.nodes:
        if walk.is_layer(node):
            found.setdefault(str(node.target), Neighbours(walk.before(node), walk.after(node)))
    return found or in_order


def residual_branches(net: nn.Module) -> list[list[str]]:
    """Names of the layers on each residual branch, in order; [] if there is none or ``net`` is not traceable.

    A branch is what feeds one operand of an addition (or of a two-input module) but not the other, when both
    operands share an ancestor; with layers on both sides the longer side is the branch and the shorter the
    projection.
    """
    graph = _trace(net)
    if graph is None:
        return []
    walk = _Walk(net, graph)
    branches: list[list[str]] = []
    for node in walk.nodes:
        inputs = walk.sources(node)
        if len(inputs) != 2 or not (node.op == "call_module" or node.target in _ADD):
            continue
        shared = walk.upstream[inputs[0]] & walk.upstream[inputs[1]]
        sides = [
            [str(n.target) for n in walk.nodes if n in walk.upstream[source] - shared and walk.is_layer(n)]
            for source in inputs
        ]
        branch = sides[0] if len(sides[0]) > len(sides[1]) else sides[1]
        if shared and branch:
            branches.append(branch)
    return branches
