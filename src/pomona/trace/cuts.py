"""Where an exported graph can be cut, and the graphs between the cuts."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

SIZE = (torch.SymInt, torch.SymBool, torch.SymFloat, int, float)
Node = fx.Node


@dataclass
class Piece:
    """A pure graph (*state, *inputs) -> outputs.

    Attributes:
        graph: the operations.
        state: names of its state in the network; with the tensor, if it is a constant of the forward pass.
        first: whether its inputs are the network's own, in their structure.
        out_spec: the structure of the network's outputs, for the last piece.
    """

    graph: fx.GraphModule
    state: dict[str, Tensor | None]
    first: bool
    out_spec: pytree.TreeSpec | None

    def __deepcopy__(self, memo: Any) -> Piece:
        """Itself: it holds no state that changes."""
        return self


class Cuts:
    """An exported graph, and which of its values are activations, sizes, or made from parameters alone.

    ``label`` marks the names of the graph's constants, which another trace of the network may use as well.
    """

    def __init__(self, program: ExportedProgram, label: str = "") -> None:
        self.program = program
        graph, signature = program.graph, program.graph_signature
        specs = {spec.arg.name: spec for spec in signature.input_specs}
        self.inputs: list[Node] = []
        self.state: dict[Node, str] = {}
        self.constants: dict[str, Tensor] = {}
        for node in graph.find_nodes(op="placeholder"):
            spec = specs[node.name]
            if spec.kind == InputKind.USER_INPUT:
                self.inputs.append(node)
                continue
            self.state[node] = name = str(spec.target or node.name)
            if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER):
                self.state[node] = constant = f"{name.replace('.', '_')}{label}"
                self.constants[constant] = program.constants[name]
        values: Any = graph.output_node().args[0]
        kinds = [spec.kind for spec in signature.output_specs]
        self.outputs = [value for value, kind in zip(values, kinds, strict=True) if kind == OutputKind.USER_OUTPUT]
        self.nodes = [
            n for n in graph.nodes if n.op not in ("placeholder", "output") and "_assert" not in str(n.target)
        ]
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.storages = {node: _storages(node) for node in graph.nodes}
        self._overwrite_less()
        self.sizes = {node for node in self.nodes if isinstance(node.meta.get("val"), SIZE)}
        self.active = self._active()
        self.keys = self._keys()
        self.twins = {key: node for node, key in self.keys.items()}
        self.alone = self._alone()

    def _keys(self) -> dict[Node, tuple[str, str, int]]:
        """What names a node's like in another trace of the network: module, operation, how many before it."""
        seen, keys = Counter[tuple[str, str]](), {}
        for node in self.nodes:
            kind = (path(node), str(node.target))
            keys[node] = (*kind, seen[kind])
            seen[kind] += 1
        return keys

    def _overwrite_less(self) -> None:
        """Turn ``relu_`` into ``relu`` where nothing looks at the overwritten tensor by another name, so that
        pieces leave their inputs alone.
        """
        for at, node in enumerate(self.nodes):
            target = mutated(node)
            if target is None or target in self.state:
                continue
            operation: Any = node.target
            packet = getattr(torch.ops.aten, operation._opname.removesuffix("_"), None)
            pure = getattr(packet, operation._overloadname, None)
            aliases = [n for n, s in self.storages.items() if s & self.storages[target] and n not in (node, target)]
            before = [n for n in aliases if self.position.get(n, -1) < at]
            if pure in (None, operation) or any(self._used_after(n, at) for n in before):
                continue
            node.target = pure
            self.storages[node] = {("copied", node)}
            for alias in aliases:  # views of the result
                if alias not in before:
                    self.storages[alias] = self.storages[node]
            target.replace_all_uses_with(node, lambda user, at=at: self._place(user) > at)  # type: ignore[misc]
            self.outputs = [node if value is target else value for value in self.outputs]

    def _place(self, node: Node) -> int:
        return self.position.get(node, len(self.nodes))

    def _used_after(self, node: Node, at: int) -> bool:
        return any(self._place(user) > at for user in node.users if "_assert" not in str(user.target))

    def _active(self) -> set[Node]:
        """Values from the inputs, from chance or from something overwritten: they cannot be made a second time."""
        overwritten = set[Any]().union(*(self.storages[t] for n in self.nodes if (t := mutated(n)) is not None))
        overwritten -= set[Any]().union(*(self.storages[n] for n in self.state))
        active = set(self.inputs)
        for node in self.nodes:
            random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
            fleeting = random or mutated(node) is not None or self.storages[node] & overwritten
            if node not in self.sizes and (fleeting or active & set(node.all_input_nodes)):
                active.add(node)
        return active

    def _alone(self) -> dict[Node, int]:
        """The activations that are alone at some time, and from which place on, in order."""
        end = len(self.nodes)
        last = dict.fromkeys([*self.inputs, *self.nodes], -1)
        for node in reversed([*self.inputs, *self.nodes]):
            uses = [u for u in node.users if u.op == "output" or u in self.position]
            if node in self.sizes:  # a size lives as long as the sizes made from it
                last[node] = max((last[u] if u in self.sizes else self._place(u) for u in uses), default=-1)
            else:
                last[node] = max((self._place(u) for u in uses if u not in self.sizes), default=-1)
        last |= {value: end for value in self.outputs if isinstance(value, Node)}
        measured = [n for n in self.sizes if any(a not in self.sizes for a in n.all_input_nodes)]
        live, found = {node for node in self.inputs if last[node] >= 0}, dict[Node, int]()
        for i, node in enumerate(self.nodes):
            live = {n for n in live | ({node} & self.active) if last[n] > i}
            if len(live) != 1:
                continue
            (one,) = live
            if one in self.inputs or [one] == self.outputs or one in found or not isinstance(one.meta["val"], Tensor):
                continue
            if all(_solve(n, one) for n in measured if self.position[n] <= i < last[n]):
                found[one] = i
        return found

    def parts(self, cuts: Sequence[Node]) -> list[list[Node]]:
        """The nodes between the cuts."""
        ends = [0, *(self.alone[cut] + 1 for cut in cuts), len(self.nodes)]
        return [self.nodes[a:b] for a, b in pairwise(ends)]

    def pieces(self, cuts: Sequence[Node]) -> list[Piece]:
        """A graph for each part between the cuts."""
        heads = [self.inputs, *([cut] for cut in cuts)]
        tails = [*([cut] for cut in cuts), self.outputs]
        return [self._piece(*ends) for ends in zip(heads, self.parts(cuts), tails, strict=True)]

    def _piece(self, heads: list[Node], part: list[Node], tails: list[Any]) -> Piece:
        here, kept = {*part, *heads}, set[Node]()
        overwriting = [n for n in part if mutated(n) is not None]
        wanted = [n for n in [*tails, *overwriting] if isinstance(n, Node)]
        foreign = {n for n in self.sizes if any(a not in self.sizes and a not in here for a in n.all_input_nodes)}
        while wanted:
            node = wanted.pop()
            if node not in kept and node not in heads:
                kept.add(node)
                wanted += () if node in foreign else node.all_input_nodes
        graph, made = fx.Graph(), dict[Node, Any]()
        state = [node for node in self.state if node in kept]
        for node in [*state, *heads]:
            made[node] = graph.placeholder(node.name)
        if any(mutated(n) not in self.state for n in overwriting):  # the caller's tensor shall stay as it is
            for node in heads:
                if isinstance(node.meta.get("val"), Tensor):
                    made[node] = graph.call_function(torch.ops.aten.clone.default, (made[node],))
        for node in self.nodes:
            if node in foreign & kept:
                made[node] = _size(graph, node, heads[0], made)
            elif node in kept:
                made[node] = graph.node_copy(node, made.__getitem__)
        graph.output(tuple(made[value] if isinstance(value, Node) else value for value in tails))
        return Piece(
            fx.GraphModule(self.program.graph_module, graph),
            {self.state[node]: self.constants.get(self.state[node]) for node in state},
            first=heads is self.inputs,
            out_spec=self.program.call_spec.out_spec if tails is self.outputs else None,
        )

    def name(self, part: Sequence[Node]) -> str:
        """The submodule that a part lies in, or the first and last of the several that it spans."""
        paths = [p.split(".") for n in part if n in self.active and (p := path(n))]
        if not paths:
            return next((str(n.target).split(".")[-2] for n in part if n in self.active), "empty")
        common = _common(paths)
        return ".".join(common) if common else f"{paths[0][0]}..{paths[-1][0]}"

    def signature(self, part: Sequence[Node]) -> tuple[Any, ...]:
        """The part's operations and edges without its widths: equal for isomorphic parts."""
        own = [n for n in part if n in self.active]
        order = {node: i for i, node in enumerate(own)}

        def sign(value: Any, sized: bool) -> Any:
            if isinstance(value, Node):
                if value in self.state:
                    shape = value.meta["val"].shape
                    return ("state", len(shape), *shape[2:])
                return order.get(value, "size" if value in self.sizes else "in" if value in self.active else "made")
            if isinstance(value, list | tuple):
                return tuple(sign(one, sized) for one in value)
            return "size" if sized and isinstance(value, int) and not isinstance(value, bool) else value

        signs = []
        for node in own:
            name = str(node.target)
            sized = "conv" not in name and "pool" not in name
            options = tuple((key, str(sign(value, sized))) for key, value in sorted(node.kwargs.items()))
            signs.append((name, sign(node.args, sized), options))
        return tuple(signs)

    def trained(self, part: Iterable[Node]) -> bool:
        """Whether an activation meets parameters in the part."""
        parameters = {s.target for s in self.program.graph_signature.input_specs if s.kind == InputKind.PARAMETER}
        return any(self.state.get(a) in parameters for n in part if n in self.active for a in n.all_input_nodes)

    def depth(self, before: Sequence[Node], after: Sequence[Node]) -> int:
        """How many modules a boundary lies in."""
        ends = [path(n).split(".") for n in (before[-1], after[0])]
        return len(_common(ends))


def path(node: Node) -> str:
    """The submodule whose forward made the node."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    name = stack[-1][0] if stack else ""
    return "" if name.startswith("_empty") else name.split("@")[0]


def _common(paths: Sequence[Sequence[str]]) -> Sequence[str]:
    """What all the paths begin with."""
    shortest = min(paths, key=len)
    return next((shortest[:i] for i, name in enumerate(shortest) if any(p[i] != name for p in paths)), shortest)


def mutated(node: Node) -> Node | None:
    """What an in-place operation overwrites."""
    if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
        for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Node):
                return value
    return None


def _storages(node: Node) -> set[Any]:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return {leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, Tensor)}


def _solve(size: Node, tensor: Node) -> tuple[int, int, int] | None:
    """(dim, p, q) such that the size is shape[dim] * p / q of the tensor; q = 0 for the constant p."""
    wanted = size.meta["val"]
    if not isinstance(wanted, torch.SymInt):
        return None if isinstance(wanted, torch.SymBool | torch.SymFloat) else (0, wanted, 0)
    for dim, length in enumerate(tensor.meta["val"].shape):
        ratio = wanted.node.expr / (length.node.expr if isinstance(length, torch.SymInt) else length or 1)
        if ratio.is_Rational:
            return dim, int(ratio.p), int(ratio.q)
    return None


def _size(graph: fx.Graph, size: Node, head: Node, made: dict[Node, Any]) -> Any:
    """The size from the shape of the piece's own input."""
    dim, p, q = _solve(size, head) or (0, 0, 0)
    if q == 0:
        return p
    length = graph.call_function(torch.ops.aten.sym_size.int, (made[head], dim))
    if p != 1:
        length = graph.call_function(operator.mul, (length, p))
    return length if q == 1 else graph.call_function(operator.floordiv, (length, q))
