"""Other pooling functions in a given network, and how well a network bears moved images.

Source: Generalizing Pooling Functions in Convolutional Neural Networks: Mixed, Gated, and Tree, arXiv 1509.08985.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, unknown
from pomona.nn.pool import POOLS, Pool2d
from pomona.nn.swap import swap

POOLING_LAYERS = (nn.MaxPool2d, nn.AvgPool2d, Pool2d)


def replace_pooling(
    net: nn.Module, kinds: str | Sequence[str], *, example: Tensor | None = None, **options: Any
) -> nn.Module:
    """A copy of a network with other functions in its pooling layers, of the same geometry.

    Args:
        net: its `torch.nn.MaxPool2d`, `torch.nn.AvgPool2d` and `Pool2d` modules are replaced, in their order.
        kinds: a name of `POOLS` for all of them, or one for each.
        example: an input, needed where ``share`` asks for the sizes of the layers.
        **options: ``share`` and whatever else the kinds take.

    Raises:
        PomonaError: if there is nothing to replace, a kind is unknown, or there are more or fewer kinds
            than layers.
    """
    old: list[nn.Module] = [m for m in net.modules() if isinstance(m, POOLING_LAYERS)]
    names = [kinds] * len(old) if isinstance(kinds, str) else list(kinds)
    if not old or len(names) != len(old):
        raise PomonaError(f"kinds has {len(names)} names; the net has {len(old)} pooling layers")
    for kind in names:
        if kind not in POOLS:
            raise unknown("kinds", kind, POOLS)
    layers = zip(names, _output_shapes(net, old, example), strict=True)

    def make(layer: nn.Module) -> nn.Module:
        kind, shape = next(layers)
        geometry = {"ceil_mode": layer.ceil_mode} if kind not in ("lp", "gem") else {}
        learned = dict(options) if kind in ("mixed", "gated", "tree") else {}
        if learned and shape is not None:
            learned |= {"channels": shape[1], "out_size": (shape[2], shape[3])}
        return POOLS[kind](layer.kernel_size, layer.stride, layer.padding, **geometry, **learned)

    return swap(net, POOLING_LAYERS, make).net


def tree_gated_max_avg(net: nn.Module, **options: Any) -> nn.Module:
    """The combination of the paper's best results: tree pooling first, gated max-average pooling after it."""
    layers = sum(isinstance(m, POOLING_LAYERS) for m in net.modules())
    return replace_pooling(net, ["tree", *["gated"] * (layers - 1)], **options)


@torch.no_grad()
def invariance(
    net: nn.Module, inputs: Tensor, labels: Tensor, transform: str, amounts: Iterable[float]
) -> dict[float, float]:
    """Accuracy on images that were moved, for each amount of the movement.

    Args:
        net: (batch, channels, height, width) -> logits; evaluated as it is, so call ``net.eval()`` first.
        inputs, labels: held-out images and their classes.
        transform: 'rotate' (degrees), 'shift_x', 'shift_y' (pixels) or 'scale' (factor).
        amounts: of the movement; bilinear interpolation, zeros from outside.

    Returns:
        {amount: accuracy}
    """
    return {
        amount: float((net(move(inputs, transform, amount)).argmax(1) == labels).float().mean())
        for amount in map(float, amounts)
    }


def move(images: Tensor, transform: str, amount: float) -> Tensor:
    """Images (batch, channels, height, width) moved about their centre; see `invariance`."""
    height, width = images.shape[-2:]
    turn = torch.deg2rad(torch.tensor(amount, dtype=torch.float64))
    cos, sin = float(turn.cos()), float(turn.sin())
    # rows of the map from output to input coordinates, each axis running from -1 to 1
    maps = {
        "rotate": lambda: ((cos, -sin * height / width, 0), (sin * width / height, cos, 0)),
        "shift_x": lambda: ((1, 0, -2 * amount / width), (0, 1, 0)),
        "shift_y": lambda: ((1, 0, 0), (0, 1, -2 * amount / height)),
        "scale": lambda: ((1 / amount, 0, 0), (0, 1 / amount, 0)),
    }
    if transform not in maps:
        raise unknown("transform", transform, maps)
    theta = torch.tensor(maps[transform](), dtype=images.dtype, device=images.device)
    grid = F.affine_grid(theta.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _output_shapes(net: nn.Module, layers: list[nn.Module], example: Tensor | None) -> list[torch.Size | None]:
    """The shape of each layer's output for the example, or None without one."""
    shapes: dict[int, torch.Size] = {}

    def note(module: nn.Module, _inputs: Any, output: Tensor) -> None:
        shapes[id(module)] = output.shape

    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        if example is not None:
            with torch.no_grad():
                net(example)
    finally:
        for hook in hooks:
            hook.remove()
    return [shapes.get(id(layer)) for layer in layers]
