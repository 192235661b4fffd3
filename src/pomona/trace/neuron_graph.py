"""A network's parameters as a graph: units are nodes, weights are edges; permuting units permutes nodes.

Source: Graph Neural Networks for Learning Equivariant Representations of Neural Networks, arXiv 2403.12143.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pomona.errors import unknown
from pomona.trace.axes import axes
from pomona.trace.axis import AxisSet


@dataclass(frozen=True, eq=False)
class NeuronGraph:
    """Every parameter of a network exactly once, on a node or an edge.

    ``x`` (nodes, features): what belongs to one unit (biases, norm scales); ``edge_index`` (2, edges): from the
    unit that a weight reads to the unit that it feeds; ``edge_attr`` (edges, width): the kernel between the two;
    ``edge_type`` (edges,): the parameter's number. ``node_ref`` and ``edge_ref`` hold each entry's position in the
    concatenation of all parameters, -1 where a row is filled up. Units without an axis (inputs, outputs) are nodes
    too: ``fixed`` (nodes,) marks them.
    """

    x: Tensor
    edge_index: Tensor
    edge_attr: Tensor
    edge_type: Tensor
    node_ref: Tensor
    edge_ref: Tensor
    fixed: Tensor
    shapes: dict[str, tuple[int, ...]]

    def write_back(self, x: Tensor | None = None, edge_attr: Tensor | None = None) -> dict[str, Tensor]:
        """Parameters by name from (new) node and edge features; the inverse of building the graph."""
        x = self.x if x is None else x
        edge_attr = self.edge_attr if edge_attr is None else edge_attr
        flat = x.new_zeros(sum(torch.Size(shape).numel() for shape in self.shapes.values()))
        for ref, values in ((self.node_ref, x), (self.edge_ref, edge_attr)):
            flat = flat.index_put((ref[ref >= 0],), values[ref >= 0])
        parts = flat.split([torch.Size(shape).numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


def neuron_graph(
    net: nn.Module | AxisSet,
    *example: Any,
    edges: Literal["vector", "multi"] = "vector",
    bias: Literal["node", "edge"] = "node",
) -> NeuronGraph:
    """The graph of a network's parameters.

    Args:
        net: a network with its example, or its trace.
        example: the arguments of one forward pass.
        edges: one edge for each kernel, with a vector; or one for each number.
        bias: what belongs to one unit as node features, or as edges from one more node (the last).

    Raises:
        PomonaError: an unknown option, or the network cannot be traced.
    """
    for field, value, choices in (("edges", edges, ("vector", "multi")), ("bias", bias, ("node", "edge"))):
        if value not in choices:
            raise unknown(field, value, choices)
    found = net if isinstance(net, AxisSet) else axes(net, *example)
    parameters = dict(found.net.named_parameters())
    roles = {(p.name, p.dim): p.role for axis in found for p in axis.places}
    roles |= {(one.name, one.dim): "out" for one in found.fixed if (one.name, one.dim) not in roles}
    of = found.sizes.classes.of
    atoms = {(name, dim): of[start : start + size] for start, size, name, dim in found.sizes.owners}
    used = np.unique(np.concatenate([atoms[key] for key in roles] or [np.zeros(0, np.int64)]))
    movable = {c for units in found.sizes.units.values() for c in units}
    member = found.sizes.classes.member
    free = [bool(movable & set(member.indices[member.indptr[c] : member.indptr[c + 1]].tolist())) for c in used]

    own: list[tuple[Tensor, Tensor]] = []  # node, position
    between: list[tuple[Tensor, Tensor, int]] = []  # (2, edges), (edges, width), parameter
    start = 0
    for number, (name, tensor) in enumerate(parameters.items()):
        where = torch.arange(start, start + tensor.numel()).reshape(tensor.shape)
        start += tensor.numel()
        dims = [d for d in range(tensor.ndim) if (name, d) in roles]
        nodes = {d: torch.from_numpy(np.searchsorted(used, atoms[name, d])) for d in dims}
        reads = [d for d in dims if roles[name, d] == "in"]
        source = reads[0] if reads else dims[-1] if len(dims) > 1 else None
        feeds = [d for d in dims if d != source]
        if not feeds:
            feeds, source = ([source] if source is not None else []), None
        if not feeds:
            own.append((torch.full((tensor.numel(),), len(used)), where.flatten()))
        elif source is None:
            own.append((_along(nodes[feeds[0]], tensor, feeds[0]), where.flatten()))
        else:
            rows = (
                where.movedim((feeds[0], source), (0, 1)).flatten(2)
                if tensor.ndim > 2
                else where.movedim((feeds[0], source), (0, 1)).unsqueeze(-1)
            )
            ends = torch.stack(torch.meshgrid(nodes[source], nodes[feeds[0]], indexing="xy")).flatten(1)
            between.append((ends, rows.flatten(0, 1), number))
    none = torch.zeros(0, dtype=torch.long)
    node, position = (torch.cat([none, *(pair[side] for pair in own)]) for side in (0, 1))
    if bias == "edge":
        ends = torch.stack([torch.full_like(node, len(used)), node])
        between.append((ends, position[:, None], len(parameters)))
        node, position = node[:0], position[:0]
    if edges == "multi":
        between = [(e.repeat_interleave(r.shape[1], 1), r.reshape(-1, 1), n) for e, r, n in between]
    count = len(used) + 1  # the last node owns what belongs to no unit
    flat = torch.cat([p.detach().flatten() for p in parameters.values()])
    node_ref = _filled(node, position, count)
    width = max((rows.shape[1] for _, rows, _ in between), default=1)
    edge_ref = torch.cat([nn.functional.pad(rows, (0, width - rows.shape[1]), value=-1) for _, rows, _ in between])
    return NeuronGraph(
        _values(flat, node_ref),
        torch.cat([ends for ends, _, _ in between], 1),
        _values(flat, edge_ref),
        torch.cat([torch.full((len(rows),), number) for _, rows, number in between]),
        node_ref,
        edge_ref,
        torch.tensor([*(not one for one in free), True]),
        {name: tuple(p.shape) for name, p in parameters.items()},
    )


def _along(index: Tensor, tensor: Tensor, dim: int) -> Tensor:
    return index.reshape([-1 if d == dim else 1 for d in range(tensor.ndim)]).expand(tensor.shape).flatten()


def _filled(node: Tensor, position: Tensor, count: int) -> Tensor:
    """Positions of each node's entries in one row, filled up with -1."""
    order = torch.argsort(node, stable=True)
    node, position = node[order], position[order]
    first = torch.searchsorted(node, node)
    column = torch.arange(len(node)) - first
    ref = torch.full((count, int(column.max()) + 1 if len(column) else 0), -1)
    ref[node, column] = position
    return ref


def _values(flat: Tensor, ref: Tensor) -> Tensor:
    return torch.where(ref >= 0, flat[ref.clamp(min=0)], flat.new_zeros(()))
