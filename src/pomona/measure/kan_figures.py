"""Pictures of Kolmogorov-Arnold networks: what their edges have learned, and the network that pruning leaves.

Source: KAN: Kolmogorov-Arnold Networks, arXiv 2404.19756.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pomona.errors import PomonaError, check_positive
from pomona.nn.kan_net import KAN, SYMBOLS

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

POINTS = 101


@torch.no_grad()
def edge_figure(net: KAN, x: Tensor, layer: int = 0, *, most: int = 16) -> Figure:
    """The edge functions of one layer, each over the range of its input: the ``most`` of largest mean size first.

    Args:
        net: the network.
        x: its inputs, (batch, features), which say where the edges are used.
        layer: index of the layer.
        most: edges to draw.
    """
    from plotly import graph_objects, subplots

    check_positive(most=most)
    if not 0 <= layer < len(net.layers):
        raise PomonaError(f"layer={layer} is not one of the {len(net.layers)} layers, counted from 0")
    given, norms = net.inputs(x)[layer], net.edge_norms(x)[layer]
    low, high = given.amin(0), given.amax(0)
    points = torch.lerp(low, high, torch.linspace(0, 1, POINTS, dtype=given.dtype, device=given.device)[:, None])
    curves = net.edges(layer, points)
    ranked = norms.flatten().argsort(descending=True, stable=True)[:most].tolist()
    edges = [divmod(index, norms.shape[1]) for index in ranked]
    columns = min(4, math.ceil(math.sqrt(len(edges))))
    figure = subplots.make_subplots(
        math.ceil(len(edges) / columns), columns, subplot_titles=[f"{i} → {o}" for o, i in edges]
    )
    for place, (o, i) in enumerate(edges):
        row, column = divmod(place, columns)
        figure.add_trace(
            graph_objects.Scatter(x=points[:, i].tolist(), y=curves[:, o, i].tolist(), mode="lines", showlegend=False),
            row + 1,
            column + 1,
        )
    return figure.update_layout(title=f"Edge functions of layer {layer}")


@torch.no_grad()
def diagram_figure(
    net: KAN, x: Tensor, *, threshold: float = 1e-2, names: Sequence[str] | None = None, suggest: bool = True
) -> Figure:
    """The network without its idle nodes: edges as dark as their mean size, with the formula that fits each best.

    Args:
        net: the network; it is not changed.
        x: its inputs, (batch, features).
        threshold: nodes whose largest incoming or outgoing size is below it are left out, as are such edges.
        names: of the inputs; x0, x1, ... by default.
        suggest: look for formulas, which takes a search for each edge.
    """
    from plotly import graph_objects

    small = net.prune(x, threshold)
    names = list(names) if names is not None else [f"x{i}" for i in range(small.widths[0])]
    if len(names) != small.widths[0]:
        raise PomonaError(f"names has {len(names)} entries for {small.widths[0]} inputs")
    places = [[(n - (width - 1) / 2, depth) for n in range(width)] for depth, width in enumerate(small.widths)]
    figure, middles, texts = graph_objects.Figure(), [], []
    for index, norms in enumerate(small.edge_norms(x)):
        largest = norms.max().clamp(min=torch.finfo(norms.dtype).tiny)
        for o, i in (norms >= threshold).nonzero().tolist():
            (x0, y0), (x1, y1) = places[index][i], places[index + 1][o]
            dark = 0.15 + 0.85 * float(norms[o, i] / largest)
            figure.add_trace(
                graph_objects.Scatter(
                    x=[x0, x1], y=[y0, y1], mode="lines", line_color=f"rgba(60, 60, 60, {dark:.2f})", hoverinfo="skip"
                )
            )
            middles.append(((x0 + 2 * x1) / 3, (y0 + 2 * y1) / 3))  # apart where edges cross
            texts.append(_label(small, index, i, o, x) if suggest else f"{float(norms[o, i]):.3g}")
    if middles:
        figure.add_trace(
            graph_objects.Scatter(
                x=[a for a, _ in middles],
                y=[b for _, b in middles],
                text=texts,
                mode="markers+text" if len(middles) <= 20 else "markers",
                textposition="middle right",
                marker_color="crimson",
                hoverinfo="text",
            )
        )
    outputs = [f"y{n}" for n in range(small.widths[-1])]
    labels = [*names, *[""] * sum(small.widths[1:-1]), *outputs]
    nodes = [place for row in places for place in row]
    figure.add_trace(
        graph_objects.Scatter(
            x=[a for a, _ in nodes],
            y=[b for _, b in nodes],
            text=labels,
            mode="markers+text",
            textposition="top center",
        )
    )
    return figure.update_layout(showlegend=False, xaxis_visible=False, yaxis_visible=False)


def _label(net: KAN, index: int, i: int, o: int, x: Tensor) -> str:
    """The simplest of an edge's best formulas and the share of variance it explains, or what it was fixed to."""
    fixed = net.symbolic[index]
    if f"{o},{i}" in fixed:  # type: ignore[operator]
        return f"{fixed[f'{o},{i}'].name} (fixed)"  # type: ignore[index]
    found = net.suggest_symbolic(index, i, o, x)
    best = min((s for s in found if s.r2 >= found[0].r2 - 1e-3), key=lambda s: list(SYMBOLS).index(s.name))
    return f"{best.name}, R² {best.r2:.3f}"
