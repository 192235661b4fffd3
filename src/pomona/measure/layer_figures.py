"""What layers have learned, as Plotly figures: eigenvectors, kernels, blocks, slots in use; edge functions of a KAN are
in :mod:`pomona.measure.kan_figures`.

Sources: Bilinear MLPs enable weight-based mechanistic interpretability, arXiv 2410.08417; SMPConv: Self-moving Point
Representations for Continuous Convolution, arXiv 2304.02330; Differentiable Learning of Generalized Structured
Matrices for Efficient Deep Neural Networks, arXiv 2310.18882; Memory Layers at Scale, arXiv 2412.09764.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pomona import catalog
from pomona.errors import PomonaError, check_positive
from pomona.nn.bilinear import Bilinear, BilinearNet
from pomona.nn.bilinear_analysis import Eigen, eig, eig_features, svd_tensor
from pomona.nn.gaudi_gblr import GaudiGBLR
from pomona.nn.kan import KANLayer

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def image_grid(images: Tensor, titles: Sequence[str], columns: int = 8) -> Figure:
    """Matrices (n, height, width) side by side, zero in the middle of each one's colours."""
    from plotly import graph_objects, subplots

    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    figure = subplots.make_subplots(rows, columns, subplot_titles=list(titles), vertical_spacing=0.3 / max(rows, 2))
    for i, image in enumerate(images.detach().float().cpu()):
        reach = float(image.abs().max()) or 1.0
        heat = graph_objects.Heatmap(
            z=image.flip(0).tolist(), zmin=-reach, zmax=reach, colorscale="RdBu", reversescale=True, showscale=False
        )
        figure.add_trace(heat, i // columns + 1, i % columns + 1)
    figure.update_xaxes(visible=False, constrain="domain")
    figure.update_yaxes(visible=False, scaleanchor="x", constrain="domain")
    figure.update_layout(height=60 + 150 * rows, margin={"l": 10, "r": 10, "t": 40, "b": 10})
    return figure


def _as_images(vectors: Tensor) -> Tensor:
    """(n, features) -> (n, side, side) where that is a square, else (n, 1, features)."""
    side = math.isqrt(vectors.shape[-1])
    return vectors.unflatten(-1, (side, side) if side * side == vectors.shape[-1] else (1, -1))


def eigenvector_figure(net: BilinearNet | Bilinear, *, directions: int = 5, pairs: int = 4) -> Figure:
    """The eigenvectors of largest eigenvalues, as images: of each class's logit in a `BilinearNet`, of the most
    important output directions of a lone `Bilinear` layer. What biases add, linear and constant terms, is left out.

    Args:
        net: without gate.
        directions: how many classes or directions.
        pairs: eigenvectors of each.
    """
    check_positive(directions=directions, pairs=pairs)
    with torch.no_grad():
        if isinstance(net, BilinearNet):
            name, found = "class", eig_features(net)
        else:
            forms = Bilinear(net.in_features, net.out_features, gate=net.gate).to(net.both.weight)
            forms.both.weight.copy_(net.both.weight)
            name, found = "direction", eig(forms, svd_tensor(forms).outputs[:directions])
    some = Eigen(*(part[:directions, :pairs] for part in found))
    titles = [f"{name} {i}: {value:+.2g}" for i, row in enumerate(some.values) for value in row.tolist()]
    return image_grid(_as_images(some.features.flatten(0, 1)), titles, columns=some.values.shape[1])


def kernel_figure(layer: nn.Module, *, most: int = 16) -> Figure:
    """The kernels of a convolution: of a layer with `kernel()`, or with a ``weight`` (out, in, height, width)."""
    with torch.no_grad():
        kernel: Any = getattr(layer, "kernel", None)
        weight = kernel() if callable(kernel) else getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() not in (3, 4):
        raise PomonaError(f"{type(layer).__name__} has no kernels to draw; give a convolution")
    images = weight.flatten(0, 1)[:most] if weight.dim() == 4 else weight.flatten(0, 1)[:most, None]
    return image_grid(images, [str(i) for i in range(len(images))])


def block_figure(layer: GaudiGBLR) -> Figure:
    """How many of the learned blocks cover each entry of the matrix."""
    from plotly import graph_objects

    boxes = layer.usage()
    rows, columns = torch.zeros(2, len(boxes["start"]), max(layer.out_features, layer.in_features))
    for i, (start, size) in enumerate(zip(boxes["start"].tolist(), boxes["size"].tolist(), strict=True)):
        for marks, first, count, total in zip(
            (rows[i], columns[i]), start, size, (layer.out_features, layer.in_features), strict=True
        ):
            marks[torch.arange(first, first + count) % total] = 1  # boxes go on at the other end
    cover = rows[:, : layer.out_features].T @ columns[:, : layer.in_features]
    figure = graph_objects.Figure(graph_objects.Heatmap(z=cover.tolist(), colorscale="Blues", colorbar_title="blocks"))
    figure.update_layout(xaxis_title="input", yaxis_title="output", yaxis_autorange="reversed")
    figure.update_yaxes(scaleanchor="x")
    return figure


def usage_figure(counts: Tensor) -> Figure:
    """Slots of a memory by how often they were read, most often first, on logarithmic axes."""
    from plotly import graph_objects

    ranked = counts.flatten().float().sort(descending=True).values
    ranked = ranked[ranked > 0]
    figure = graph_objects.Figure(graph_objects.Scatter(x=list(range(1, len(ranked) + 1)), y=ranked.tolist()))
    figure.update_xaxes(type="log", title=f"slot, of {counts.numel():,}; {len(ranked):,} were read")
    figure.update_yaxes(type="log", title="share of the reads")
    return figure


def edge_functions_figure(layer: KANLayer, *, most: int = 16, points: int = 101) -> Figure:
    """The edge functions of a KAN layer over its grid, those that vary most first.

    `pomona.measure.kan_figures.edge_figure` draws them over the inputs that a network really sees.
    """
    from plotly import graph_objects, subplots

    check_positive(most=most, points=points)
    edges = layer.basis.edges
    with torch.no_grad():
        x = torch.lerp(edges[:, 0], edges[:, -1], torch.linspace(0, 1, points).to(edges)[:, None])
        curves = layer.edges(x)
    ranked = curves.std(0).flatten().argsort(descending=True, stable=True)[:most].tolist()
    columns = math.ceil(math.sqrt(len(ranked)))
    rows = math.ceil(len(ranked) / columns)
    chosen = [divmod(index, layer.in_features) for index in ranked]
    figure = subplots.make_subplots(rows, columns, subplot_titles=[f"{i} → {o}" for o, i in chosen])
    for place, (o, i) in enumerate(chosen):
        curve = graph_objects.Scatter(x=x[:, i].tolist(), y=curves[:, o, i].tolist(), showlegend=False)
        figure.add_trace(curve, place // columns + 1, place % columns + 1)
    figure.update_layout(height=80 + 170 * rows)
    return figure


DRAWN: dict[str, Callable[..., Figure]] = {
    "pomona.nn.kan:KANLayer": edge_functions_figure,
    "pomona.nn.bilinear:BilinearNet": eigenvector_figure,
    "pomona.nn.bilinear:Bilinear": eigenvector_figure,
    "pomona.nn.coord_kernel:CoordKernel": kernel_figure,
    "pomona.nn.gaudi_gblr:GaudiGBLR": block_figure,
}
"""What can be drawn of a network without data, by class."""


def figures(net: nn.Module) -> Iterator[tuple[str, Figure]]:
    """The name and picture of every layer of a network that has one; a layer's picture holds its parts'."""
    drawn: list[str] = []
    for name, module in net.named_modules():
        if any(name.startswith(f"{outer}." if outer else "") for outer in drawn):
            continue
        for path, draw in DRAWN.items():
            if isinstance(module, catalog.load(path)) and not (
                isinstance(module, Bilinear) and module.gate is not None
            ):
                drawn.append(name)
                yield f"{name or 'net'} ({type(module).__name__})", draw(module)
                break
