"""Network in network: an MLP slid over the input in the place of a convolution, and class maps averaged into logits.

Source: Network In Network (arXiv 1312.4400).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, check_positive
from pomona.nn.check import check_input
from pomona.nn.swap import swap

CONV: dict[int, type[nn.Conv1d] | type[nn.Conv2d]] = {1: nn.Conv1d, 2: nn.Conv2d}
POOL: dict[tuple[str, int], type[nn.Module]] = {
    ("max", 1): nn.MaxPool1d,
    ("max", 2): nn.MaxPool2d,
    ("avg", 1): nn.AvgPool1d,
    ("avg", 2): nn.AvgPool2d,
}
Widths = Sequence[int]


class MLPConv(nn.Sequential):
    """A k x k convolution and 1x1 convolutions after it, each with ReLU: one MLP applied to every patch.

    Args:
        in_channels: of the input.
        widths: output channels of the k x k convolution and of each 1x1 convolution.
        kernel_size: k, or a pair.
        stride: of the k x k convolution.
        padding: of it; half the kernel by default.
        last_relu: whether ReLU follows the last convolution, too.
        bias: of the last convolution.
        init_std: standard deviation of Gaussian weights (0.05 in the paper); None for He weights.
        dims: 2 for images, 1 for series.

    Shapes: (batch, in_channels, height, width) -> (batch, widths[-1], height', width').

    Source: Network In Network (arXiv 1312.4400).
    """

    def __init__(
        self,
        in_channels: int,
        widths: Widths,
        kernel_size: Any = 3,
        stride: Any = 1,
        padding: Any = None,
        last_relu: bool = True,
        bias: bool = True,
        init_std: float | None = None,
        dims: int = 2,
    ) -> None:
        if not widths or dims not in CONV:
            raise PomonaError(f"widths={tuple(widths)} must name a width or more, and dims={dims} be 1 or 2")
        check_positive(in_channels=in_channels, **{f"widths[{i}]": width for i, width in enumerate(widths)})
        if padding is None:
            padding = kernel_size // 2 if isinstance(kernel_size, int) else tuple(k // 2 for k in kernel_size)
        layers: list[nn.Module] = []
        for n, (i, o) in enumerate(pairwise((in_channels, *widths))):
            geometry = (
                {"kernel_size": kernel_size, "stride": stride, "padding": padding} if n == 0 else {"kernel_size": 1}
            )
            layer = CONV[dims](i, o, **geometry, bias=bias or n + 1 < len(widths))
            if init_std is None:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            else:
                nn.init.normal_(layer.weight, std=init_std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
            layers += [layer, nn.ReLU()]
        super().__init__(*layers[: None if last_relu else -1])
        self.in_channels = in_channels

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        check_input(self, x, self.in_channels, 1)
        return super().forward(x)


def mlp_conv(
    in_channels: int,
    out_channels: int,
    kernel_size: Any,
    stride: Any = 1,
    padding: Any = 0,
    bias: bool = True,
    depth: int = 2,
    expand: int = 2,
) -> MLPConv:
    """``MLPConv`` with ``depth`` 1x1 convolutions and ``expand`` times as many hidden channels as come out.

    The last ReLU is left to the network: ``convnet conv=mlpconv``. Source: Network In Network (arXiv 1312.4400).
    """
    widths = [*[expand * out_channels] * depth, out_channels]
    return MLPConv(in_channels, widths, kernel_size, stride, padding, last_relu=False, bias=bias)


class MaxoutConv(nn.Module):
    """y_c = max_p (W_{c,p} * x + b_{c,p}): the largest of ``pieces`` convolutions for every output channel.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, bias: as in ``torch.nn.Conv2d``.
        pieces: linear pieces a channel.

    Shapes: (batch, in_channels, height, width) -> (batch, out_channels, height', width').

    Source: Maxout Networks (arXiv 1302.4389), which Network In Network (arXiv 1312.4400) is compared with.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        bias: bool = True,
        pieces: int = 2,
    ) -> None:
        super().__init__()
        check_positive(out_channels=out_channels, pieces=pieces)
        self.pieces = pieces
        self.conv = nn.Conv2d(in_channels, out_channels * pieces, kernel_size, stride, padding, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        check_input(self, x, self.conv.in_channels, 1)
        return self.conv(x).unflatten(1, (-1, self.pieces)).amax(2)


class CascadedCrossChannelPool(nn.Sequential):
    """A 1x1 convolution and ReLU: weighted sums across channels at each position. Source: arXiv 1312.4400."""

    def __init__(self, in_channels: int, out_channels: int, dims: int = 2) -> None:
        super().__init__(CONV[dims](in_channels, out_channels, 1), nn.ReLU())


class GlobalAvgPool2d(nn.Module):
    """Mean over all positions: (batch, channels, height, width) -> (batch, channels); of series, too.

    Args:
        keep_size: keep the positions' axes, of size 1.

    Source: Network In Network (arXiv 1312.4400).
    """

    def __init__(self, keep_size: bool = False) -> None:
        super().__init__()
        self.keep_size = keep_size

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        check_input(self, x)
        if x.ndim < 3:
            raise PomonaError(f"GlobalAvgPool2d averages over positions; its input has shape {tuple(x.shape)}")
        return x.mean(tuple(range(2, x.ndim)), keepdim=self.keep_size)

    def extra_repr(self) -> str:
        """The option, for `repr`."""
        return f"keep_size={self.keep_size}"


class NIN(nn.Sequential):
    """Three mlpconv blocks, pooling and dropout between them, and the mean of each class map as its logit.

    Takes inputs of any size.

    Args:
        in_channels: of the input.
        classes: number of logits; it stands for None in ``widths``.
        widths: of each block.
        kernels: of each block's first convolution.
        pool: after each block but the last, kind, size and stride as in 'max3s2'.
        dropout: probability after each pooling.
        scale: multiplies all widths but the last.
        last_relu: ReLU on the class maps, too, as in the paper.
        init_std, dims: as in ``MLPConv``.

    Raises:
        PomonaError: for lists of unequal lengths, or a pool that is not written so.

    Source: Network In Network (arXiv 1312.4400).
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        widths: Sequence[Sequence[int | None]] = ((192, 160, 96), (192, 192, 192), (192, 192, None)),
        kernels: Sequence[int] = (5, 5, 3),
        pool: Sequence[str] = ("max3s2", "avg3s2"),
        dropout: float = 0.5,
        scale: float = 1.0,
        last_relu: bool = True,
        init_std: float | None = None,
        dims: int = 2,
    ) -> None:
        if not len(widths) == len(kernels) == len(pool) + 1:
            raise PomonaError(
                f"widths, kernels and pool have {len(widths)}, {len(kernels)} and {len(pool)} entries; a network of n "
                "blocks needs n, n and n - 1"
            )
        layers: list[nn.Module] = []
        for i, (block, kernel) in enumerate(zip(widths, kernels, strict=True)):
            sizes = [classes if w is None else max(1, round(scale * w)) for w in block]
            relu = last_relu or i + 1 < len(widths)
            layers.append(MLPConv(in_channels, sizes, kernel, last_relu=relu, init_std=init_std, dims=dims))
            in_channels = sizes[-1]
            if i < len(pool):
                layers += [_pool(pool[i], dims), nn.Dropout(dropout)]
        super().__init__(*layers, GlobalAvgPool2d())


def _pool(text: str, dims: int) -> nn.Module:
    found = re.fullmatch(r"(max|avg)(\d+)s(\d+)", text)
    if found is None:
        raise PomonaError(f"pool={text!r} is not a kind, size and stride such as max3s2 or avg3s2")
    return POOL[found[1], dims](int(found[2]), int(found[3]), ceil_mode=True)


@torch.no_grad()
def cam(net: nn.Module, x: Tensor, size: tuple[int, ...] | None = None) -> Tensor:
    """Class maps: what the last ``GlobalAvgPool2d`` of a network averages into its logits.

    Args:
        net: any network with that layer.
        x: (batch, channels, height, width).
        size: (height, width) to interpolate to; bilinear, so that the mean is no longer exactly the logit.

    Returns:
        (batch, classes, height', width')

    Raises:
        PomonaError: if ``net`` has no such layer.

    Source: Network In Network (arXiv 1312.4400).
    """
    pools = [m for m in net.modules() if isinstance(m, GlobalAvgPool2d)]
    if not pools:
        raise PomonaError("net has no GlobalAvgPool2d, so no class maps; gap_head(net, example) gives it one")
    seen: list[Tensor] = []
    hook = pools[-1].register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    try:
        net(x)
    finally:
        hook.remove()
    maps = seen[-1]
    return maps if size is None else F.interpolate(maps, size, mode="bilinear" if maps.ndim == 4 else "linear")


def gap_head(net: nn.Module, example: Tensor) -> nn.Module:
    """A copy of a convolutional network whose fully connected head is a 1x1 convolution to class maps and their mean.

    The head is everything that runs from the first ``nn.Linear`` on; hidden layers in it go. Where an ``nn.Flatten``
    stands before it, the network then takes inputs of any size.

    Args:
        net: any network in which a feature map is flattened into ``nn.Linear``.
        example: an input, (batch, channels, height, width).

    Raises:
        PomonaError: if no linear layer follows a feature map.

    Source: Network In Network (arXiv 1312.4400).
    """
    order: list[tuple[str, nn.Module, torch.Size]] = []
    hooks = [
        module.register_forward_hook(lambda m, _i, out, name=name: order.append((name, m, out.shape)))  # type: ignore[misc]
        for name, module in net.named_modules()
        if not list(module.children())
    ]
    training = net.training
    try:
        with torch.no_grad():
            net.eval()(example)
    finally:
        net.train(training)
        for hook in hooks:
            hook.remove()
    linear = [i for i, (_, m, _) in enumerate(order) if isinstance(m, nn.Linear)]
    before = order[: linear[0]] if linear else []
    maps = [shape for _, _, shape in before if len(shape) > 2]
    if not maps or maps[-1][1:].numel() != order[linear[0]][1].in_features:
        raise PomonaError("net has no nn.Linear on a flattened feature map whose place class maps could take")
    head, gone = order[linear[0]][0], {name for name, _, _ in order[linear[0] + 1 : linear[-1] + 1]}
    if shared := gone & {name for name, _, _ in before}:
        raise PomonaError(
            f"net uses {sorted(shared)[0]!r} both before and in its head; give the head layers of its own"
        )
    channels, *positions = maps[-1][1:]
    last = order[linear[-1]][1]
    layers: list[nn.Module] = [CONV[len(positions)](channels, last.out_features, 1), GlobalAvgPool2d()]  # type: ignore[arg-type]
    if flatten := [name for name, m, _ in before if isinstance(m, nn.Flatten)][-1:]:
        gone |= set(flatten)
    else:
        layers.insert(0, nn.Unflatten(1, (channels, *positions)))
    net = swap(net, lambda name, _: name == head, lambda _: nn.Sequential(*layers)).net
    return swap(net, lambda name, _: name in gone, lambda _: nn.Identity()).net if gone else net
