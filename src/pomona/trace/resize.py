"""The exported graph with its literal sizes rewritten, so that it runs with more or fewer units."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from pomona.errors import PomonaError
from pomona.trace.classes import Classes, Ints
from pomona.trace.labels import Value, dims_of

if TYPE_CHECKING:
    from pomona.trace.axis import AxisSet


@dataclass(eq=False)
class Sizes:
    """What the trace knows of sizes: every node's labels, the constants that follow units, and the axes' classes.

    ``owners`` lists the parameters' atoms: first atom, number of atoms, parameter, dimension.
    """

    values: dict[str, Any]
    owners: list[tuple[int, int, str, int]]
    follows: list[tuple[Tensor, Tensor]]
    classes: Classes
    units: dict[str, list[int]]


class Refusal(Exception):
    """An operation cannot be rewritten, with the reason."""


def resized(axes: AxisSet, units: Mapping[str, Tensor]) -> fx.GraphModule:
    """The network as a plain graph module whose literal sizes fit after an edit; the parameters are still the old ones.

    Args:
        axes: the trace.
        units: for each edited axis, the old unit at every new position, -1 for a new one.

    Raises:
        PomonaError: a literal size cannot be rewritten; names the operation.
    """
    counts = Counts(axes, units)
    module = axes.program.module(check_guards=False)
    for node in list(module.graph.nodes):
        try:
            if node.op == "get_attr":
                _constant(module, node, axes, counts)
            elif node.op == "call_function":
                _rewrite(node, axes.sizes.values.get(node.name), counts, axes.sizes.values)
        except Refusal as error:
            why = f"{error}{_held_by(node, axes, units)}"
            raise PomonaError(f"{node.name} ({node.target}) cannot be rewritten to the new sizes: {why}") from error
    module.graph.lint()
    module.recompile()
    for mode in ("train", "eval"):  # torch.export's refuse; the graph computes as in evaluation in either mode
        vars(module).pop(mode, None)
    return module


class _Located(fx.Interpreter):
    """Runs a graph and remembers where it is."""

    node: Any = None

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        return super().run_node(n)


def failure(module: fx.GraphModule, example: Sequence[Any], axes: AxisSet, units: Iterable[str]) -> str:
    """Which operation of a resized graph with its new tensors does not run, why, and which edited axes it holds."""
    located = _Located(module)
    try:
        with torch.no_grad():
            located.run(*example)
    except Exception as error:  # whatever an operation may raise
        why = (str(error).strip() or repr(error)).splitlines()[0]
        return f"{located.node.name} ({located.node.target}) does not run: {why}{_held_by(located.node, axes, units)}"
    return "it runs"


def _held_by(node: fx.Node, axes: AxisSet, units: Iterable[str]) -> str:
    """Those of the edited axes that lie along what an operation reads and makes."""
    sizes = axes.sizes
    values = [sizes.values.get(n.name) for n in (node, *node.all_input_nodes)]
    found = [
        f for v in values for one in (v if isinstance(v, list) else [v]) if isinstance(one, Value) for f in one.factors
    ]
    here = np.unique(np.concatenate([sizes.classes.of[f.numpy().ravel()] for f in found] or [np.zeros(0, np.int64)]))
    above = set(sizes.classes.member[here].indices.tolist())
    names = [name for name in units if not above.isdisjoint(sizes.units[name])]
    return f"; it holds {', '.join(names)}" if names else ""


class Counts:
    """How often each class occurs after an edit, and the sizes that follow."""

    def __init__(self, axes: AxisSet, units: Mapping[str, Tensor]) -> None:
        self.of = axes.sizes.classes.of
        member = axes.sizes.classes.member
        self.weight: dict[int, int] = {}
        for name, positions in units.items():
            axis = axes.require(name)
            amount = np.bincount(_assigned(positions, axis.size // axis.groups, axis.groups), minlength=axis.size)
            for c, times in zip(axes.sizes.units[name], amount.tolist(), strict=True):
                if times != 1:
                    self.weight[c] = times
        self.member = member
        self.axis_of = {c: name for name, units_ in axes.sizes.units.items() for c in units_}
        self.leader: dict[int, int] = {}
        for constant, leader in axes.sizes.follows:
            pair = (self._classes(one).ravel().tolist() for one in (constant, leader))
            self.leader.update(zip(*pair, strict=True))
        self.bundles: dict[int, frozenset[int]] = {}
        self.known: dict[Any, list[int] | None] = {}

    def _classes(self, factor: Tensor) -> Ints:
        return self.of[factor.numpy()]

    def along(self, value: Value, dim: int) -> list[int] | None:
        """How often each index along ``dim`` occurs; None if nothing changes.

        Raises:
            Refusal: different rows would get different sizes.
        """
        factor = value.along(dim)
        if factor is None or not self.weight:
            return None
        key = (factor.data_ptr(), tuple(factor.shape), factor.stride(), dim)
        if key not in self.known:
            self.known[key] = self._line(self._classes(factor), dim % value.ndim)
        return self.known[key]

    def above(self, c: int) -> frozenset[int]:
        """A class and all bundles it lies in."""
        if c not in self.bundles:
            c = self.leader.get(c, c)
            row = self.member.indices[self.member.indptr[c] : self.member.indptr[c + 1]]
            self.bundles[c] = frozenset(row.tolist())
        return self.bundles[c]

    def kind(self, bundles: frozenset[int]) -> frozenset[str]:
        """The axes that a unit, by its bundles, belongs to."""
        return frozenset(self.axis_of[c] for c in bundles if c in self.axis_of)

    def _line(self, found: Ints, dim: int) -> list[int] | None:
        """Occurrences along ``dim``: of bundles where the other dimensions lie inside them, else of the units."""
        sets = np.empty(found.shape, object)
        for at in np.ndindex(*found.shape):
            sets[at] = self.above(int(found[at]))
        if not any(self.weight.keys() & one for one in sets.flat):
            return None
        others = [d for d in range(found.ndim) if d != dim and found.shape[d] > 1]
        inner = [d for d in others if self._inside(sets, dim, d)]
        rows = np.moveaxis(sets, [dim, *inner], range(1 + len(inner)))
        size = found.shape[dim]
        rows = rows.reshape(size, math.prod(found.shape[d] for d in inner), -1)
        lines = []
        if others and not inner and any(1 < len({*map(self.kind, row)}) == len({*row}) for row in rows[:, 0].T):
            return None  # one unit of each of several axes side by side, as q, k and v: their number stays
        for row in rows.transpose(2, 0, 1):
            mine = [frozenset.intersection(*elements) for elements in row]
            shared = frozenset.intersection(*mine)
            if all(self.weight.get(b, 1) for b in shared):
                lines.append([math.prod(self.weight.get(b, 1) for b in one - shared) for one in mine])
        if not lines:
            raise Refusal("nothing would be left of it")
        if len({sum(line) for line in lines}) > 1:
            raise Refusal("its rows would be of different lengths; keep equally many units in every group")
        return lines[0] if any(times != 1 for times in lines[0]) else None

    @staticmethod
    def _inside(sets: Any, dim: int, other: int) -> bool:
        """Whether elements along ``other`` lie in one bundle for each index of ``dim``, which tells these apart."""
        plane = np.moveaxis(sets, [dim, other], [0, 1]).reshape(sets.shape[dim], sets.shape[other], -1)[:, :, 0]
        mine = [frozenset.intersection(*row) for row in plane]
        apart = len({*mine}) == len({*map(tuple, plane)})
        return all(mine) and apart and bool(mine[0] - frozenset.intersection(*mine))

    def size(self, value: Value, dim: int) -> int:
        """The new size of a dimension."""
        line = self.along(value, dim)
        return value.shape[dim] if line is None else sum(line)

    def shape(self, value: Value) -> list[int]:
        """The new shape of a tensor."""
        return [self.size(value, d) for d in range(value.ndim)]


def _assigned(positions: Tensor, run: int, groups: int) -> Ints:
    """New units counted with an old unit of their run: that of the position before, else after, them."""
    old = positions.cpu().numpy().astype(np.int64)
    if (old < 0).any():
        known = old >= 0
        if groups == 1 or not known.any():
            return np.where(known, old, old[known][0] if known.any() else 0)
        per = len(old) // groups if len(old) % groups == 0 else run
        return np.where(known, old, np.minimum(np.arange(len(old)) // per, groups - 1) * run)
    return old


# --- rewriting, by operation ---

Rewrite = Callable[[Any, Any, list[Any], Counts], None]  # the node, its old labels, its arguments' labels
REWRITES: dict[str, Rewrite] = {}


def _for(*names: str) -> Callable[[Rewrite], Rewrite]:
    def register(rule: Rewrite) -> Rewrite:
        REWRITES.update(dict.fromkeys((f"aten.{name}" for name in names), rule))
        return rule

    return register


def _rewrite(node: Any, value: Any, counts: Counts, values: Mapping[str, Any]) -> None:
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    inputs = [values.get(a.name) if isinstance(a, fx.Node) else a for a in node.args]
    name = node.target._schema.name.replace("::", ".")
    for rule in (REWRITES.get(name), REWRITES.get(name.removesuffix("_"))):
        if rule is not None:
            rule(node, value, inputs, counts)
            return


def _put(node: Any, at: int, new: Any) -> None:
    args = list(node.args)
    args[at] = new
    node.args = tuple(args)


@_for("view", "reshape", "_unsafe_view", "expand", "new_zeros", "new_ones", "new_full", "new_empty")
def _whole_shape(node: Any, value: Any, inputs: list[Any], counts: Counts) -> None:
    old, new = list(value.shape), counts.shape(value)
    if old != new:
        literal = node.args[1]
        keep = node.target._schema.name == "aten::expand"  # -1 keeps a size that exists
        size = [-1 if keep and one == -1 else n for one, n in zip(literal, new, strict=True)] if keep else new
        _put(node, 1, size)


@_for("zeros", "ones", "full", "empty")
def _created(node: Any, value: Any, inputs: list[Any], counts: Counts) -> None:
    if list(value.shape) != counts.shape(value):
        _put(node, 0, counts.shape(value))


@_for("flatten", "view_as", "expand_as")
def _derived(node: Any, value: Any, inputs: list[Any], counts: Counts) -> None:
    """Sizes that the operation computes itself."""


@_for("unflatten")
def _unflatten(node: Any, value: Any, inputs: list[Any], counts: Counts) -> None:
    if list(value.shape) != counts.shape(value):
        node.target = torch.ops.aten.reshape.default
        node.args = (node.args[0], counts.shape(value))


@_for("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes")
def _split(node: Any, value: Any, inputs: list[Any], counts: Counts) -> None:
    x = inputs[0]
    dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    if not isinstance(x, Value) or counts.along(x, dim) is None:
        return
    node.target = torch.ops.aten.split_with_sizes.default
    node.args = (node.args[0], _parts(counts.along(x, dim), [v.shape[dim % x.ndim] for v in value]), dim)
    node.kwargs = {}


def _parts(line: Sequence[int] | None, sizes: Sequence[int]) -> list[int]:
    assert line is not None
    ends = np.cumsum([0, *sizes])
    return [sum(line[a:b]) for a, b in pairwise(ends.tolist())]


@_for("slice", "narrow")
def _slice(node: Any, value: Any, inputs: list[Any], counts: Counts) -> None:
    x = inputs[0]
    if not isinstance(x, Value):
        return
    narrow = node.target._schema.name == "aten::narrow"
    dim, start, end, step = [*node.args[1:], *[None] * 4][:4]
    dim = dim or 0
    line = counts.along(x, dim)
    if line is None:
        return
    size = x.shape[dim % x.ndim]
    if narrow:
        end = start + end
    elif step not in (None, 1):
        raise Refusal("it takes every other unit")
    first, last, _ = slice(start, end).indices(size)
    first, last = sum(line[:first]), sum(line[:last])
    node.args = (node.args[0], dim, first, last - first if narrow else last)


@_for("select")
def _select(node: Any, value: Any, inputs: list[Any], counts: Counts) -> None:
    x = inputs[0]
    line = counts.along(x, node.args[1]) if isinstance(x, Value) else None
    if line is not None:
        at = node.args[2] % x.shape[node.args[1]]
        if line[at] != 1:
            raise Refusal("the unit that it selects is gone or doubled")
        _put(node, 2, sum(line[:at]))


@_for("unbind", "unfold", "roll", "flip", "pixel_shuffle", "pixel_unshuffle", "repeat_interleave")
def _held(node: Any, value: Any, inputs: list[Any], counts: Counts) -> None:
    x = inputs[0]
    name = node.target._schema.name.removeprefix("aten::")
    if isinstance(x, Value) and name in {"unbind", "roll"}:
        dims = node.args[-1 if name == "roll" else 1] if len(node.args) > 1 + (name == "roll") else 0
        for dim in [dims] if isinstance(dims, int) else dims:
            if counts.size(x, dim) != x.shape[dim]:
                raise Refusal(f"dimension {dim} must keep its size")


@_for("layer_norm", "rms_norm")
def _normalized_shape(node: Any, value: Any, inputs: list[Any], counts: Counts) -> None:
    _put(node, 1, counts.shape(value)[value.ndim - len(node.args[1]) :])


@_for("group_norm")
def _group_norm(node: Any, value: Any, inputs: list[Any], counts: Counts) -> None:
    _put(node, 1, _groups(inputs[0], node.args[1], counts))


def _groups(x: Any, groups: int, counts: Counts) -> int:
    """The new number of groups of the channels."""
    factor = x.along(1)
    if groups == 1 or factor is None:
        return groups
    parts = tuple(f.expand([x.shape[d] if d in dims_of(f) else 1 for d in range(x.ndim)]) for f in (factor,))
    split = parts[0].unflatten(1, (groups, -1))
    if split.shape[2] == 1:
        return counts.size(Value((x.shape[0], groups, *x.shape[2:]), (split.squeeze(2),)), 1)
    return counts.size(Value((x.shape[0], *split.shape[1:3], *x.shape[2:]), (split,)), 1)


@_for("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution")
def _conv(node: Any, value: Any, inputs: list[Any], counts: Counts) -> None:
    name = node.target._schema.name
    at = 8 if name == "aten::convolution" else 7 if "transpose" in name else 6
    if len(node.args) > at and isinstance(node.args[at], int) and node.args[at] > 1:
        _put(node, at, _groups(inputs[0], node.args[at], counts))


@_for("constant_pad_nd", "pad")
def _pad(node: Any, value: Any, inputs: list[Any], counts: Counts) -> None:
    x = inputs[0]
    pads = list(node.args[1])
    for d in range(value.ndim - len(pads) // 2, value.ndim):
        line = counts.along(value, d)
        left = 2 * (value.ndim - 1 - d)
        if line is not None:
            before, end = pads[left], pads[left] + x.shape[d]
            pads[left], pads[left + 1] = sum(line[:before]), sum(line[end:])
    _put(node, 1, pads)


@_for("scaled_dot_product_attention")
def _attention(node: Any, value: Any, inputs: list[Any], counts: Counts) -> None:
    q = inputs[0]
    if counts.size(q, q.ndim - 1) != q.shape[-1] and node.kwargs.get("scale") is None:
        node.kwargs = {**node.kwargs, "scale": q.shape[-1] ** -0.5}  # as it was trained


def _constant(module: fx.GraphModule, node: Any, axes: AxisSet, counts: Counts) -> None:
    """A constant whose elements are all equal takes the new size."""
    value = axes.sizes.values.get(node.target)
    if not isinstance(value, Value) or value.kind != "uniform" or counts.shape(value) == list(value.shape):
        return
    owner, _, name = str(node.target).rpartition(".")
    old = operator.attrgetter(str(node.target))(module)
    holder = module.get_submodule(owner)
    setattr(holder, name, old.flatten()[0].expand(counts.shape(value)).clone())
