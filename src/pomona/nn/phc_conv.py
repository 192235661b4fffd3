"""Parameterised hypercomplex convolutions: kernels that are sums of n Kronecker products over the channels.

Source: PHNNs: Lightweight Neural Networks via Parameterized Hypercomplex Convolutions, arXiv 2110.04176.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, check_divisible, check_positive
from pomona.nn.check import check_input
from pomona.nn.phm import PHMLinear, initial_rules
from pomona.nn.structured import glorot_variance
from pomona.nn.swap import Swapped, swap

_CONV: dict[int, tuple[type[nn.Module], Callable[..., Tensor]]] = {
    1: (nn.Conv1d, F.conv1d),
    2: (nn.Conv2d, F.conv2d),
}


class _PHConv(nn.Module):
    """See `PHConv2d`; a subclass says over how many dimensions the kernel runs."""

    dims: ClassVar[int]
    tunable = {"n": [2, 4]}

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        n: int = 2,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        bias: bool = True,
        *,
        learn_rules: bool = True,
        rules: Tensor | str | None = None,
        shared_rules: nn.Parameter | None = None,
        pad: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(n=n, in_channels=in_channels, out_channels=out_channels)
        for field, size in (("in_channels", in_channels), ("out_channels", out_channels)):
            if size % n and not pad:
                raise PomonaError(f"{field}={size} is not divisible by n={n}; choose another n or set pad=True")
        self.in_channels, self.out_channels, self.n = in_channels, out_channels, n
        self.kernel_size = (kernel_size,) * self.dims if isinstance(kernel_size, int) else tuple(kernel_size)
        self.stride, self.padding, self.dilation = stride, padding, dilation
        area = math.prod(self.kernel_size)
        # whole channels are added where n does not divide them, so that each block has all positions of the kernel
        rows, columns = out_channels + -out_channels % n, (in_channels + -in_channels % n) * area
        options: dict[str, Any] = {"generator": generator, "device": device, "dtype": dtype}
        self.linear = PHMLinear(columns, rows, n, learn_rules, rules, shared_rules, bias=False, **options)
        with torch.no_grad():  # outputs of unit variance for such inputs
            self.linear.blocks.mul_((in_channels * area * glorot_variance(columns, rows)) ** -0.5)
        self.bias = nn.Parameter(torch.zeros(out_channels, device=device, dtype=dtype)) if bias else None

    def weight(self) -> Tensor:
        """H = sum_i A_i kron F_i, (out_channels, in_channels, *kernel_size)."""
        kernel = self.linear.weight().unflatten(1, (-1, *self.kernel_size))
        return kernel[: self.out_channels, : self.in_channels]

    def forward(self, x: Tensor) -> Tensor:
        """H * x + b."""
        check_input(self, x, self.in_channels, -self.dims - 1)
        convolve = _CONV[self.dims][1]
        return convolve(x, self.weight(), self.bias, self.stride, self.padding, self.dilation)

    @torch.no_grad()
    def project_(self, kernel: Tensor) -> Any:
        """Set A and F so that H is as near to ``kernel`` (out, in, *kernel_size) as it can be."""
        if tuple(kernel.shape) != tuple(self.weight().shape):
            raise PomonaError(f"kernel has shape {tuple(kernel.shape)}, not {tuple(self.weight().shape)}")
        area = math.prod(self.kernel_size)
        whole = kernel.new_zeros(self.linear.out_features, self.linear.in_features // area, *self.kernel_size)
        whole[: self.out_channels, : self.in_channels] = kernel
        self.linear.project_(whole.flatten(1))
        return self

    def n_params(self) -> int:
        """How many numbers are trained, bias included."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    @torch.no_grad()
    def fold(self) -> Any:
        """A plain convolution of torch that computes the same, for inference."""
        weight = self.weight()
        sizes = (self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation)
        has_bias = self.bias is not None
        conv: Any = _CONV[self.dims][0](*sizes, bias=has_bias, device=weight.device, dtype=weight.dtype)
        conv.weight.copy_(weight)
        if has_bias:
            conv.bias.copy_(self.bias)
        return conv

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, n={self.n}, "
            f"stride={self.stride}, padding={self.padding}, bias={self.bias is not None}"
        )


class PHConv2d(_PHConv):
    """A convolution with about 1/n of the parameters, whose rule of multiplication is learned.

    H[(a, o), (b, c), :, :] = sum_i A_i[a, b] F_i[o, c, :, :],  y = H * x + bias

    n = 3 suits the planes of a colour image, n = 2 stereo sound. With the rules of the quaternions it is the
    quaternion convolution; with a kernel of one pixel it is `PHMLinear` at each. Parameters: n^3 + in out k^2 / n
    (+ out). H is assembled once a step, so training is not faster than a real convolution; `fold` makes it one.

    Args:
        in_channels, out_channels: divisible by n unless ``pad``.
        kernel_size, stride, padding, dilation, bias: as in `torch.nn.Conv2d`, padding with zeros.
        n: number of blocks of channels and of Kronecker products.
        learn_rules, rules, shared_rules: of A, as in `PHMLinear`.
        pad: add channels of zeros up to a multiple of n, and leave surplus outputs out.
        generator: source of the initial values.

    F is normal with the variance that gives H one of 1 / (in k^2).

    Shape:
        (batch, in_channels, height, width) -> (batch, out_channels, height', width')

    Raises:
        PomonaError: if n does not divide the channels and ``pad`` is off.

    Source: PHNNs: Lightweight Neural Networks via Parameterized Hypercomplex Convolutions, arXiv 2110.04176.
    """

    dims = 2


class PHConv1d(_PHConv):
    """`PHConv2d` over one dimension, for sound and other series: (batch, in, length) -> (batch, out, length')."""

    dims = 1


def ph_conv2d(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    n: int = 2,
    stride: int = 1,
    padding: int | str = 0,
    bias: bool = True,
    *,
    learn_rules: bool = True,
    rules: str | None = None,
    pad: bool = False,
) -> nn.Module:
    """What fills ``conv``: a `PHConv2d` where n divides both channels (or ``pad``), else a real convolution, as on a
    gray image.
    """
    if not pad and (in_channels % n or out_channels % n):
        return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
    sizes = (in_channels, out_channels, kernel_size, n, stride, padding)
    return PHConv2d(*sizes, bias=bias, learn_rules=learn_rules, rules=rules, pad=pad)


class SplitBN(nn.Module):
    """Batch norm of hypercomplex channels: one scale for all n components of a number, a mean for each.

    y_{a,o} = gain_o (x_{a,o} - mean(x_{a,o})) / sqrt(mean_a var(x_{a,o}) + eps) + bias_{a,o}

    A real batch norm would scale the components apart and so change the directions of the numbers.

    Args:
        channels: divisible by n; component by component, as `PHConv2d` lays them out.
        n: components of a number.
        eps, momentum: as in `torch.nn.BatchNorm2d`.

    Shape:
        (batch, channels, ...) -> the same
    """

    mean: Tensor
    var: Tensor

    def __init__(self, channels: int, n: int = 2, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        check_divisible("channels", channels, "n", n)
        self.n, self.eps, self.momentum = n, eps, momentum
        self.gain = nn.Parameter(torch.ones(channels // n))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels // n))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        check_input(self, x, len(self.bias), 1)
        mean, var = self.mean, self.var
        if self.training:
            rest = (0, *range(2, x.dim()))
            mean = x.mean(rest)
            var = x.var(rest, correction=0).view(self.n, -1).mean(0)
            with torch.no_grad():
                count = x.numel() // x.shape[1]
                self.mean.lerp_(mean, self.momentum)
                self.var.lerp_(var * count / max(count - 1, 1), self.momentum)
        scale = (self.gain * (var + self.eps).rsqrt()).repeat(self.n)
        shape = (-1, *[1] * (x.dim() - 2))
        return x * scale.view(shape) + (self.bias - mean * scale).view(shape)

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        return f"{len(self.bias)}, n={self.n}"


@dataclass(frozen=True)
class PHSwapped(Swapped):
    """The new network, the table of what was replaced, and the names of convolutions and linear layers left real."""

    left: list[str]


def ph_net(
    net: nn.Module,
    n: int,
    *,
    project: bool = False,
    pad: bool = False,
    shared: bool = False,
    split_bn: bool = False,
    generator: torch.Generator | None = None,
    **options: Any,
) -> PHSwapped:
    """A copy of a network with hypercomplex layers for every Conv1d, Conv2d and Linear whose sizes n divides.

    Args:
        net: any network.
        n: number of Kronecker products.
        project: fit the new layers to the old weights; otherwise they start afresh.
        pad: also replace layers whose inputs (not outputs) n does not divide, such as the first one.
        shared: one learned rule A for all layers.
        split_bn: also put `SplitBN` in the place of batch norms.
        generator: source of the initial values.
        **options: further arguments of `PHConv2d` and `PHMLinear`, such as ``rules``.

    Raises:
        PomonaError: if nothing can be replaced.

    Source: arXiv 2110.04176; rules shared between layers as in arXiv 2106.04647.
    """
    if shared:
        options["shared_rules"] = nn.Parameter(initial_rules(n, options.pop("rules", None), generator, {}))
    options |= {"generator": generator, "pad": pad}

    def make(old: Any) -> nn.Module | None:
        if isinstance(old, (nn.BatchNorm1d, nn.BatchNorm2d)):
            return SplitBN(old.num_features, n, old.eps, old.momentum or 0.1) if old.num_features % n == 0 else None
        inputs, outputs = old.weight.shape[:2][::-1]
        if outputs % n or (inputs % n and not pad):
            return None
        new: PHMLinear | _PHConv
        if isinstance(old, nn.Linear):
            new = PHMLinear(inputs, outputs, n, bias=old.bias is not None, **options)
        elif old.groups > 1 or old.padding_mode != "zeros":
            return None
        else:
            kind = PHConv1d if isinstance(old, nn.Conv1d) else PHConv2d
            sizes = (inputs, outputs, old.kernel_size, n, old.stride, old.padding, old.dilation)
            new = kind(*sizes, bias=old.bias is not None, **options)
        if project:
            with torch.no_grad():
                new.project_(old.weight)
                if old.bias is not None and new.bias is not None:
                    new.bias.copy_(old.bias)
        return new

    layers = (nn.Conv1d, nn.Conv2d, nn.Linear)
    norms = (nn.BatchNorm1d, nn.BatchNorm2d) if split_bn else ()
    swapped = swap(net, (*layers, *norms), make)
    left = [name for name, module in swapped.net.named_modules() if isinstance(module, layers)]
    return PHSwapped(swapped.net, swapped.table, left)


def ph_vgg(
    in_channels: int,
    classes: int,
    n: int = 3,
    stages: tuple[tuple[int, ...], ...] = ((24, 24), (48, 48)),
    *,
    dims: int = 2,
    kernel_size: int = 3,
    **options: Any,
) -> PHSwapped:
    """Stages of hypercomplex convolutions, batch norm and ReLU with max pooling between, the mean, a real head.

    (batch, in_channels, height, width) -> (batch, classes); with ``dims=1`` a network for series,
    (batch, in_channels, length) -> (batch, classes).

    Args:
        in_channels, classes: sizes; the first layer is real where n does not divide the channels, unless ``pad``.
        n: number of Kronecker products.
        stages: channels of the layers of each stage.
        dims: 1 or 2.
        kernel_size: odd.
        **options: of `ph_net`.

    Source: PHVGG of arXiv 2110.04176. Residual networks: the backbone ``resnet conv=phc``.
    """
    conv, norm, pool = (
        (nn.Conv1d, nn.BatchNorm1d, nn.MaxPool1d) if dims == 1 else (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d)
    )
    layers: list[nn.Module] = []
    channels = in_channels
    for number, stage in enumerate(stages):
        layers += [pool(2)] if number else []
        for before, after in pairwise((channels, *stage)):
            layers += [conv(before, after, kernel_size, padding=kernel_size // 2, bias=False), norm(after), nn.ReLU()]
        channels = stage[-1]
    mean = nn.AdaptiveAvgPool1d(1) if dims == 1 else nn.AdaptiveAvgPool2d(1)
    body = ph_net(nn.Sequential(*layers, mean), n, **options)
    body.net.append(nn.Flatten()).append(nn.Linear(channels, classes))  # type: ignore[operator]
    return PHSwapped(body.net, body.table, [*body.left, str(len(layers) + 2)])
