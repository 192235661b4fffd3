"""Static hypernetworks: one small network makes the kernels of a large one from layer embeddings."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pomona.errors import PomonaError, check_divisible, check_positive


class KernelHyperNet(nn.Module):
    r"""A two-layer linear network from an embedding to a block of a convolution kernel.

    .. math:: a_i = W_i z + B_i, \qquad K_i = W_{out} a_i + B_{out}, \qquad i = 1..n_{in}

    Every input channel ``i`` has its own first layer, and all share the second, which keeps the count of
    parameters low.

    Args:
        z_dim: size of an embedding.
        d: size of the hidden vector; ``z_dim`` if left out.
        n_in, n_out: channels of a block.
        kernel_size: side of the (square) kernel.

    Shape: ``z (*, z_dim)`` to ``(*, n_out, n_in, kernel_size, kernel_size)``.

    Initialisation: biases zero, weights scaled so that a kernel entry has the standard deviation of an entry
    of ``z``; the layers set the scale of their embeddings. (The paper draws everything with standard
    deviation 0.01 and relies on batch norm.)

    Source: HyperNetworks, section 3.1 (arXiv 1609.09106).
    """

    def __init__(
        self, z_dim: int = 64, d: int | None = None, n_in: int = 16, n_out: int = 16, kernel_size: int = 3
    ) -> None:
        super().__init__()
        d = z_dim if d is None else d
        check_positive(z_dim=z_dim, d=d, n_in=n_in, n_out=n_out, kernel_size=kernel_size)
        self.z_dim, self.d, self.n_in, self.n_out, self.kernel_size = z_dim, d, n_in, n_out, kernel_size
        self.w_in = nn.Parameter(torch.empty(n_in, d, z_dim))
        self.b_in = nn.Parameter(torch.empty(n_in, d))
        self.w_out = nn.Parameter(torch.empty(n_out * kernel_size * kernel_size, d))
        self.b_out = nn.Parameter(torch.empty(n_out * kernel_size * kernel_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        nn.init.normal_(self.w_in, std=self.z_dim**-0.5)
        nn.init.normal_(self.w_out, std=self.d**-0.5)
        nn.init.zeros_(self.b_in)
        nn.init.zeros_(self.b_out)

    def forward(self, z: Tensor) -> Tensor:
        """Kernel blocks for embeddings."""
        a = torch.einsum("idz,...z->...id", self.w_in, z) + self.b_in
        k = F.linear(a, self.w_out, self.b_out)
        return k.unflatten(-1, (self.n_out, self.kernel_size, self.kernel_size)).transpose(-4, -3)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"z_dim={self.z_dim}, d={self.d}, block={self.n_out}x{self.n_in}, k={self.kernel_size}"


class HyperConv2d(nn.Module):
    """A 2d convolution whose kernel a (shared) hypernetwork makes from learned embeddings.

    The kernel is tiled by ``(out / base) * (in / base)`` blocks, each made from an embedding of its own. The
    layer owns the embeddings and a bias if asked for; there is no kernel parameter.

    Args:
        in_channels, out_channels: multiples of the hypernetwork's ``n_in`` and ``n_out``.
        kernel_size: side of the (square) kernel.
        hyper: the hypernetwork, shared by giving the same one to several layers; a new one if left out.
        z_dim, base: embedding size and block size of a new hypernetwork.
        stride, padding, dilation, padding_mode, bias: as for ``nn.Conv2d``.

    Shape: ``(batch, in_channels, height, width)`` to ``(batch, out_channels, height', width')``.

    Raises:
        PomonaError: if the channels are not multiples of the block, or the hypernetwork has another kernel
            size.

    Source: HyperNetworks, section 3.1 (arXiv 1609.09106).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        hyper: KernelHyperNet | None = None,
        z_dim: int = 64,
        base: int = 16,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        padding_mode: str = "zeros",
        bias: bool = True,
    ) -> None:
        super().__init__()
        if hyper is None:
            hyper = KernelHyperNet(z_dim, n_in=base, n_out=base, kernel_size=kernel_size)
        check_divisible("in_channels", in_channels, "n_in", hyper.n_in)
        check_divisible("out_channels", out_channels, "n_out", hyper.n_out)
        if hyper.kernel_size != kernel_size:
            raise PomonaError(f"kernel_size={kernel_size} must be the hypernetwork's, {hyper.kernel_size}")
        self.hyper = hyper
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        # a convolution without parameters does the padding and stepping
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            padding_mode=padding_mode,  # type: ignore[arg-type]
            bias=False,
            device="meta",
        )
        del self.conv._parameters["weight"]
        tiles = (out_channels // hyper.n_out, in_channels // hyper.n_in)
        self.z = nn.Parameter(torch.empty(*tiles, hyper.z_dim))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the embeddings anew, scaled so that the kernel has the variance of He's initialisation."""
        fan_in = self.in_channels * self.kernel_size**2
        nn.init.normal_(self.z, std=math.sqrt(2 / fan_in))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def kernel(self) -> Tensor:
        """The generated kernel ``(out_channels, in_channels, kernel_size, kernel_size)``."""
        blocks = self.hyper(self.z)  # (out tiles, in tiles, n_out, n_in, k, k)
        return blocks.transpose(1, 2).flatten(2, 3).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with the generated kernel."""
        return self.conv._conv_forward(x, self.kernel(), self.bias)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"


def hyperize(
    net: nn.Module,
    *,
    z_dim: int = 64,
    d: int | None = None,
    base: int = 16,
    kernel_size: int = 3,
    keep_first: bool = True,
) -> nn.Module:
    """A copy of a convolutional network whose kernels all come from one shared hypernetwork.

    Square ungrouped convolutions of the given kernel size whose channels are multiples of ``base`` are
    replaced; the first convolution (unless ``keep_first=False``), 1x1 shortcuts, norms and the head stay
    ordinary, as in the paper. The kernels start fresh; biases are carried over.

    Args:
        net: a network holding ``nn.Conv2d`` layers.
        z_dim, d, base: of the hypernetwork.
        kernel_size: of the convolutions to replace.
        keep_first: leave the first convolution as it is.

    Raises:
        PomonaError: if no convolution can be replaced.

    Source: HyperNetworks, sections 3.1 and 4.2 (arXiv 1609.09106).
    """
    net = copy.deepcopy(net)
    convs = [(name, conv) for name, conv in net.named_modules() if isinstance(conv, nn.Conv2d)]
    chosen = [(name, conv) for name, conv in convs[int(keep_first) :] if _fits(conv, base, kernel_size)]
    if not chosen or not chosen[0][0]:
        raise PomonaError(
            f"base={base}, kernel_size={kernel_size} fit no replaceable convolution of {type(net).__name__}; "
            "choose a base that divides its channels"
        )
    hyper = KernelHyperNet(z_dim, d, n_in=base, n_out=base, kernel_size=kernel_size)
    hyper = hyper.to(chosen[0][1].weight)
    for name, conv in chosen:
        layer = HyperConv2d(
            conv.in_channels,
            conv.out_channels,
            kernel_size,
            hyper=hyper,
            stride=conv.stride,  # type: ignore[arg-type]
            padding=conv.padding,  # type: ignore[arg-type]
            dilation=conv.dilation,  # type: ignore[arg-type]
            padding_mode=conv.padding_mode,
            bias=conv.bias is not None,
        ).to(conv.weight)
        layer.bias = conv._parameters["bias"]
        parent, _, leaf = name.rpartition(".")
        setattr(net.get_submodule(parent), leaf, layer.train(conv.training))
    return net


def _fits(conv: nn.Conv2d, base: int, kernel_size: int) -> bool:
    same_size = tuple(conv.kernel_size) == (kernel_size, kernel_size)
    return same_size and conv.groups == 1 and conv.in_channels % base == 0 and conv.out_channels % base == 0
