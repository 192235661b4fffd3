"""Continuous convolution by points that move: a kernel is a few points with positions, radii and weights.

Source: SMPConv: Self-moving Point Representations for Continuous Convolution, arXiv 2304.02330.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, check_divisible, check_positive, unknown
from pomona.nn.check import check_input
from pomona.nn.coord_kernel import CoordKernel, horizon_size
from pomona.nn.mixing import hide

RADII = (1e-4, 1.0)


class SMPKernel(nn.Module):
    """K(x) = 1/|N(x)| sum_{j in N(x)} g_j(x) w_j,  g_j(x) = max(0, 1 - ||x - p_j||_1 / r_j),  N(x) = {j: g_j(x) > 0}.

    Each output channel owns its points; K is 0 where none reaches. Positions, radii and weights all train.

    Args:
        in_channels, out_channels: sizes.
        n_points: points of an output channel.
        dim: axes of the coordinates.
        radius: of every point at first, in half kernel widths; kept in [1e-4, 1] by `post_step`.
        coord_std: spread of the positions at first.
        groups: as in a convolution; in_channels for a depthwise one.
        causal: positions start near coordinate 1, the recent end, instead of the centre.
        shared: one set of positions and radii for all output channels.
        weight_std: spread of the weights at first, small where a norm follows.
        generator: source of the initial values.

    Shape:
        (points, dim) -> (out_channels, in_channels / groups, points);
        out n (in / groups + dim + 1) parameters, whatever the number of taps.

    Source: SMPConv: Self-moving Point Representations for Continuous Convolution, arXiv 2304.02330.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        n_points: int,
        *,
        dim: int = 1,
        radius: float = 0.1,
        coord_std: float = 0.2,
        groups: int = 1,
        causal: bool = False,
        shared: bool = False,
        weight_std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_positive(n_points=n_points, radius=radius, coord_std=coord_std, weight_std=weight_std)
        check_divisible("in_channels", in_channels, "groups", groups)
        owners = 1 if shared else out_channels
        positions = torch.empty(owners, n_points, dim)
        if causal:
            nn.init.trunc_normal_(positions, 0, coord_std, -1, 0, generator)
            positions = 1 + 2 * positions
        else:
            nn.init.trunc_normal_(positions, 0, coord_std, -1, 1, generator)
        self.positions = nn.Parameter(positions)
        self.radius = nn.Parameter(torch.full((owners, n_points), min(max(radius, RADII[0]), RADII[1])))
        self.weight = nn.Parameter(torch.empty(out_channels, n_points, in_channels // groups))
        nn.init.trunc_normal_(self.weight, 0, weight_std, -2 * weight_std, 2 * weight_std, generator)

    def influence(self, x: Tensor) -> Tensor:
        """g_j(x) / |N(x)|: (points, dim) -> (owners, n_points, points)."""
        distance = (self.positions[:, :, None] - x).abs().sum(-1)
        g = F.relu(1 - distance / self.radius[..., None])
        return g / (g > 0).sum(-2, keepdim=True).clamp(min=1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        check_input(self, x)
        influence = self.influence(x).expand(len(self.weight), -1, -1)
        return self.weight.mT @ influence.to(self.weight.dtype)

    def post_step(self) -> None:
        """Keep the radii in range."""
        with torch.no_grad():
            self.radius.clamp_(*RADII)

    def param_groups(self) -> list[dict[str, Any]]:
        """Positions and radii, which no decay should pull to 0."""
        return [{"params": [self.positions, self.radius], "weight_decay": 0.0}]

    def extra_repr(self) -> str:
        """Sizes."""
        owners, n_points, dim = self.positions.shape
        return f"n_points={n_points}, dim={dim}, shared={owners < len(self.weight)}"


class WeightNet(nn.Module):
    """K(x) = W_3 s(W_2 s(W_1 x + b_1) + b_2) + b_3: a kernel made by a network of the coordinates, the baseline.

    Args:
        in_channels, out_channels, dim, groups: as in `SMPKernel`.
        hidden: width.
        taps: kernel size that the first values are scaled for, to variance 1 / (taps in_channels / groups).
        act: sine, s(z) = sin(omega z) with SIREN's initialisation; or gelu.
        omega: frequency of the sine.

    Source: CKConv: Continuous Kernel Convolution For Sequential Data, arXiv 2102.02611.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dim: int = 1,
        hidden: int = 32,
        groups: int = 1,
        taps: int = 1,
        act: str = "sine",
        omega: float = 30.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_positive(hidden=hidden, taps=taps, omega=omega)
        if act not in ("sine", "gelu"):
            raise unknown("act", act, ("sine", "gelu"))
        check_divisible("in_channels", in_channels, "groups", groups)
        self.act, self.omega, self.shape = act, omega, (out_channels, in_channels // groups)
        sizes = (dim, hidden, hidden, math.prod(self.shape))
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(sizes))
        bounds = (1 / dim, math.sqrt(6 / hidden) / omega, math.sqrt(3 / hidden))
        if act == "gelu":
            bounds = (math.sqrt(6 / dim), math.sqrt(6 / hidden), math.sqrt(3 / hidden))
        for layer, bound in zip(self.layers, bounds, strict=True):
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)  # type: ignore[arg-type]
            nn.init.uniform_(layer.bias, -(layer.in_features**-0.5), layer.in_features**-0.5, generator=generator)  # type: ignore[arg-type,operator]
        with torch.no_grad():
            self.layers[2].weight.mul_(1 / math.sqrt(taps * self.shape[1] / 2))  # type: ignore[operator]  # E[sin^2] = 1/2
            self.layers[2].bias.zero_()  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        """(points, dim) -> (out_channels, in_channels / groups, points)"""
        check_input(self, x)
        for layer in self.layers[:2]:  # type: ignore[index]
            x = torch.sin(self.omega * layer(x)) if self.act == "sine" else F.gelu(layer(x))
        return self.layers[2](x).mT.unflatten(0, self.shape)


class SMPConv1d(CoordKernel):
    """A convolution over sequences with an `SMPKernel`.

    Args:
        in_channels, out_channels: sizes.
        kernel_size: odd taps; or 'full' or 'same' of sequences of ``length`` steps.
        n_points: points of an output channel.
        causal: an output sees its own and earlier inputs.
        depthwise: each channel has its own kernel of one input; out_channels is in_channels.
        radius: of the points at first; 2 / kernel_size by default, about the spacing of the taps.
        coord_std, shared, weight_std, generator: as in `SMPKernel`.
        length: steps of the sequences, for a named kernel_size.
        stride, padding, bias, conv: as in `CoordKernel`.

    Shape:
        (B, in_channels, L) -> (B, out_channels, L)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | str = "full",
        *,
        n_points: int = 16,
        causal: bool = True,
        depthwise: bool = False,
        radius: float | None = None,
        coord_std: float = 0.2,
        shared: bool = False,
        weight_std: float = 0.02,
        length: int | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        if isinstance(kernel_size, str) and length is None:
            raise PomonaError(f"kernel_size={kernel_size!r} needs length=, the steps of the sequences")
        size = horizon_size(kernel_size, length or 1, causal=causal)
        groups = in_channels if depthwise else 1
        kernel = SMPKernel(
            in_channels,
            out_channels,
            n_points,
            radius=2 / size if radius is None else radius,
            coord_std=coord_std,
            groups=groups,
            causal=causal,
            shared=shared,
            weight_std=weight_std,
            generator=generator,
        )
        super().__init__(kernel, in_channels, out_channels, size, causal=causal, groups=groups, **options)


class SMPConv2d(CoordKernel):
    """A convolution over images with an `SMPKernel`; sizes as in `torch.nn.Conv2d`.

    Args:
        n_points: points of an output channel; a quarter of the taps, at least 4, by default.
        depthwise: each channel has its own kernel of one input.
        radius: of the points at first; 2 / kernel_size by default.
        coord_std, shared, generator: as in `SMPKernel`.
        padding: zeros on both sides; by default what keeps the size.
        conv: auto, direct or fft.

    Shape:
        (B, in_channels, H, W) -> (B, out_channels, H', W')
    """

    tunable: ClassVar[dict[str, Any]] = {"coord_std": (0.1, 1.0)}

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | None = None,
        bias: bool = True,
        *,
        n_points: int | None = None,
        depthwise: bool = False,
        radius: float | None = None,
        coord_std: float = 0.2,
        shared: bool = False,
        conv: str = "auto",
        generator: torch.Generator | None = None,
    ) -> None:
        sizes = (kernel_size,) * 2 if isinstance(kernel_size, int) else kernel_size
        check_positive(kernel_size=min(sizes))
        groups = in_channels if depthwise else 1
        kernel = SMPKernel(
            in_channels,
            out_channels,
            max(4, math.prod(sizes) // 4) if n_points is None else n_points,
            dim=2,
            radius=2 / max(sizes) if radius is None else radius,
            coord_std=coord_std,
            groups=groups,
            shared=shared,
            generator=generator,
        )
        super().__init__(
            kernel,
            in_channels,
            out_channels,
            sizes,
            dim=2,
            stride=stride,
            padding=padding,
            groups=groups,
            bias=bias,
            conv=conv,
        )


class SMPMixer(nn.Module):
    """y_n = sum_j K(n - j) * x_j channel by channel: a depthwise `SMPConv1d` over all tokens, as a token mixer.

    Args:
        dim: D.
        tokens: N, which the kernel spans; other lengths are taken too.
        n_points: points of a channel.
        causal: a token sees only itself and earlier ones.
        radius: of the points at first; a tenth of the span by default, so that they cover it.
        coord_std: spread of the positions at first.

    Shape:
        (B, N, D) -> (B, N, D)
    """

    tunable: ClassVar[dict[str, Any]] = {"n_points": [8, 16, 32], "coord_std": (0.1, 1.0)}

    def __init__(
        self,
        dim: int,
        tokens: int,
        *,
        n_points: int = 16,
        causal: bool = False,
        radius: float = 0.1,
        coord_std: float = 0.2,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, tokens=tokens)
        self.conv = SMPConv1d(
            dim,
            dim,
            "full",
            length=tokens,
            n_points=n_points,
            causal=causal,
            depthwise=True,
            radius=radius,
            coord_std=coord_std,
            weight_std=tokens**-0.5,  # no norm follows it in a residual branch
            generator=generator,
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See the class."""
        return self.conv(hide(x, mask).mT).mT
