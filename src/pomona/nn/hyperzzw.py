"""Slow networks that make kernels from coordinates, multiplied with the activations that fast networks carry.

Source: HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction, arXiv 2401.17948.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, check_divisible, check_positive, unknown
from pomona.nn.check import check_input, check_odd
from pomona.nn.coord_kernel import relative_grid
from pomona.nn.norm import standardize

HOW = ("matmul", "conv", "elementwise")


class SlowNet(nn.Module):
    """z_0 = sin(A_0 c + a_0);  z_i = sin(A_i c + a_i) * (B_i z_{i-1} + b_i) + p_i;  K = C z_L at the coordinates c.

    Args:
        channels: of the kernel.
        size: positions along each axis, on linspace(-1, 1).
        hidden: width.
        layers: L + 1.
        omega: A_i's rows are scaled by 2 pi omega times a sample of Gamma(6 / (i + 1), 1).
        generator: source of the initial values.

    Shape:
        () -> (channels, *size): the kernel depends on the parameters alone

    Source: HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction, arXiv 2401.17948.
    """

    def __init__(
        self,
        channels: int,
        size: Sequence[int],
        *,
        hidden: int = 16,
        layers: int = 3,
        omega: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_positive(channels=channels, hidden=hidden, layers=layers, omega=omega, size=min(size))
        self.size, positions = tuple(size), math.prod(size)

        def uniform(*shape: int) -> nn.Parameter:
            return nn.Parameter((2 * torch.rand(shape, generator=generator) - 1) * shape[-1] ** -0.5)

        self.rate = nn.ParameterList(uniform(hidden, len(self.size)) for _ in range(layers))
        self.phase = nn.ParameterList(torch.zeros(hidden) for _ in range(layers))
        self.weight = nn.ParameterList(uniform(hidden, hidden) for _ in range(layers - 1))
        self.bias = nn.ParameterList(torch.ones(hidden) for _ in range(layers - 1))
        self.position = nn.ParameterList(torch.zeros(positions, 1) for _ in range(layers - 1))
        self.out = uniform(channels, hidden)
        with torch.no_grad():
            self.out.mul_(positions**-0.5)
            for index, rate in enumerate(self.rate):
                shape = torch.full((hidden, 1), 6 / (index + 1))
                rate.mul_(2 * math.pi * omega * torch._standard_gamma(shape, generator=generator))

    def forward(self) -> Tensor:
        """See the class."""
        c = relative_grid(self.size, self.out)
        waves = [torch.sin(F.linear(c, a, b)) for a, b in zip(self.rate, self.phase, strict=True)]
        z = waves[0]
        for wave, weight, bias, p in zip(waves[1:], self.weight, self.bias, self.position, strict=True):
            z = wave * F.linear(z, weight, bias) + p
        return F.linear(z, self.out).mT.unflatten(-1, self.size)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"channels={len(self.out)}, size={self.size}"


def hyper_zzw(
    kernel: Tensor, z: Tensor, fast: Tensor | None = None, *, how: str = "matmul", context: bool = True
) -> Tensor:
    """Y = (K * z) o f(z): a kernel that the context z modulates meets activations.

    Args:
        kernel: K, broadcast to z.
        z: (B, C, H, W) or (B, C, L).
        fast: f(z), of z's shape; z itself by default.
        how: o is 'matmul' over the last two axes (square maps), 'conv' over the last (y_n = sum_m (K z)_m f_{n-m},
            causal, by the Fourier transform), or 'elementwise' (with f(z) = z: the 2E operator).
        context: False takes K in place of K * z.

    Raises:
        PomonaError: for a map that is not square with 'matmul', or an unknown ``how``.
    """
    if how not in HOW:
        raise unknown("how", how, HOW)
    fast = z if fast is None else fast
    contextual = kernel * z if context else kernel.expand_as(z)
    if how == "elementwise":
        return contextual * fast
    if how == "matmul":
        if z.shape[-1] != z.shape[-2]:
            raise PomonaError(
                f"how='matmul' takes square maps; z has shape {tuple(z.shape)}: use 'conv' or 'elementwise'"
            )
        return contextual @ fast
    length, dtype = z.shape[-1], torch.promote_types(z.dtype, torch.float32)
    if not z.numel():  # the transform takes no empty batch
        return contextual * fast
    spectra = [torch.fft.rfft(part.to(dtype), 2 * length) for part in (contextual, fast)]
    return torch.fft.irfft(spectra[0] * spectra[1], 2 * length)[..., :length].to(z.dtype)


class HyperZZWLocal(nn.Module):
    """Depthwise convolution with the kernel K * gelu(W pool(z)): slow, modulated by activations pooled to k x k.

    Args:
        channels: C.
        k: side of the kernel, odd.
        context: 'sample' pools each example for itself; 'batch' averages over the batch, as published, which makes an
            output depend on the examples beside it; None takes K alone.
        hidden, generator: of the `SlowNet`.

    Shape:
        (B, C, H, W) -> (B, C, H, W)

    Raises:
        PomonaError: for an even k or an unknown context.
    """

    def __init__(
        self,
        channels: int,
        k: int = 3,
        *,
        context: str | None = "sample",
        hidden: int = 16,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_positive(channels=channels)
        check_odd(k=k)
        if context not in ("sample", "batch", None):
            raise unknown("context", context, ("sample", "batch", None))
        self.channels, self.k, self.context = channels, k, context
        self.slow = SlowNet(channels, (k, k), hidden=hidden, generator=generator)
        self.mix = nn.Conv2d(channels, channels, 1) if context else None

    def kernel(self, z: Tensor) -> Tensor:
        """The kernels that act on z: (B, C, k, k)."""
        kernel = self.slow()
        if self.mix is None:
            return kernel.expand(len(z), -1, -1, -1)
        pooled = F.adaptive_avg_pool2d(z, self.k)
        if self.context == "batch":
            pooled = pooled.mean(0, keepdim=True).expand_as(pooled)
        return kernel * F.gelu(self.mix(pooled))

    def forward(self, z: Tensor) -> Tensor:
        """See the class."""
        check_input(self, z, self.channels, 1)
        if not len(z):
            return z
        together = z.reshape(1, -1, *z.shape[2:])  # every example has its own kernels, so all are groups of one
        kernel = self.kernel(z).flatten(0, 1)[:, None]
        return F.conv2d(together, kernel, padding=self.k // 2, groups=len(kernel)).reshape(z.shape)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.channels}, k={self.k}, context={self.context!r}"


class RGU(nn.Module):
    """y = W_y (gelu(IN(W_k z * W_q W_v z)) + p): the gated unit of the fast network; IN standardises each map.

    Args:
        channels: C.
        size: (H, W), of the learned bias p.

    Shape:
        (B, C, H, W) -> (B, C, H, W)
    """

    def __init__(self, channels: int, size: Sequence[int]) -> None:
        super().__init__()
        self.k, self.q, self.v, self.y = (nn.Conv2d(channels, channels, 1, bias=False) for _ in range(4))
        self.position = nn.Parameter(torch.zeros(*size))

    def forward(self, z: Tensor) -> Tensor:
        """See the class."""
        check_input(self, z)
        return self.y(F.gelu(standardize(self.k(z) * self.q(self.v(z)), (-2, -1))) + self.position)


class HyperChannelInteraction(nn.Module):
    """z * sigmoid((K * s) * s), s the mean of each map: a gate a channel, from a kernel along the channels.

    Shape:
        (B, C, H, W) -> (B, C, H, W)
    """

    def __init__(
        self, channels: int, *, context: bool = True, hidden: int = 16, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.context = context
        self.slow = SlowNet(1, (channels,), hidden=hidden, generator=generator)

    def gate(self, z: Tensor) -> Tensor:
        """(B, C, 1, 1)"""
        s = z.mean((-2, -1))
        return hyper_zzw(self.slow(), s, how="elementwise", context=self.context).sigmoid()[..., None, None]

    def forward(self, z: Tensor) -> Tensor:
        """See the class."""
        check_input(self, z)
        return z * self.gate(z)


class HyperInteraction(HyperChannelInteraction):
    """z * channel gate * sigmoid((K * m) * m), m the mean over channels: a gate a channel and one a position.

    Shape:
        (B, C, H, W) -> (B, C, H, W)
    """

    def __init__(
        self,
        channels: int,
        size: Sequence[int],
        *,
        context: bool = True,
        hidden: int = 16,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(channels, context=context, hidden=hidden, generator=generator)
        self.slow_space = SlowNet(1, size, hidden=hidden, generator=generator)

    def forward(self, z: Tensor) -> Tensor:
        """See the class."""
        check_input(self, z)
        m = z.mean(1, keepdim=True)
        space = hyper_zzw(self.slow_space(), m, how="elementwise", context=self.context).sigmoid()
        return z * self.gate(z) * space


class SiGLU(nn.Module):
    """u sigmoid(u), u = W z: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, z: Tensor) -> Tensor:
        """See the class."""
        return F.silu(self.mix(z))


class GIBS(nn.Module):
    """Each channel standardised over the batch, then each group of channels of an example: no gain, no bias.

    Shape:
        (B, C, H, W) -> (B, C, H, W), of mean 0 in every group of an example
    """

    def __init__(self, channels: int, groups: int = 1) -> None:
        super().__init__()
        check_divisible("channels", channels, "groups", groups)
        self.groups = groups
        self.batch = nn.BatchNorm2d(channels, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return F.group_norm(self.batch(x), self.groups)


BRANCHES = (
    *("global_rgu", "global_mixed", "global_gated", "fast", "siglu", "interaction"),
    *("local3", "local5", "local7", "local9"),
)
FAST: dict[str, Callable[[int, Sequence[int], bool], nn.Module]] = {
    "rgu": lambda channels, size, context: RGU(channels, size),
    "mixed": lambda channels, size, context: nn.Conv2d(channels, channels, 1),
    "gated": lambda channels, size, context: HyperChannelInteraction(channels, context=context),
}


class SFNEBlock(nn.Module):
    """Slow-fast encoder: all branches of z beside one another -> 1x1 convolution -> GIBS -> GELU -> + bias -> dropout.

    There is no residual connection.

    Args:
        channels, out: C of input and output.
        size: (H, W), square for the global branches.
        branches: any of `BRANCHES`: global_* are (K * z) @ f(z) with f a gated unit, a 1x1 convolution or a channel
            gate, and one K for all; local{k} are `HyperZZWLocal`.
        context: False takes every kernel as the slow network makes it, without z.
        repeat: channels of an earlier input that are joined to the branches.
        groups: of `GIBS`.
        dropout: probability.
        hidden: width of the slow network of K.

    Shape:
        (B, C, H, W) -> (B, out, H, W)

    Raises:
        PomonaError: for an unknown branch, global branches of maps that are not square, maps of another size, or an
            earlier input that is not what ``repeat`` says.

    Source: HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction, arXiv 2401.17948.
    """

    def __init__(
        self,
        channels: int,
        out: int,
        size: Sequence[int],
        *,
        branches: Sequence[str] = BRANCHES,
        context: bool = True,
        repeat: int = 0,
        groups: int = 1,
        dropout: float = 0.0,
        hidden: int = 16,
    ) -> None:
        super().__init__()
        check_positive(channels=channels, out=out, branches=len(branches))
        self.channels, self.size, self.names, self.context = channels, tuple(size), tuple(branches), context

        def make(name: str) -> nn.Module:
            if name.startswith("local") and name[5:].isdigit():
                return HyperZZWLocal(channels, int(name[5:]), context="sample" if context else None)
            if name.startswith("global_") and name[7:] in FAST:
                return FAST[name[7:]](channels, self.size, context)
            makers = {"fast": lambda: RGU(channels, self.size), "siglu": lambda: SiGLU(channels)}
            makers |= {"interaction": lambda: HyperInteraction(channels, self.size, context=context)}
            if name not in makers:
                raise unknown("branches", name, BRANCHES)
            return makers[name]()

        self.branches = nn.ModuleList(make(name) for name in self.names)
        slow = any(name.startswith("global_") for name in self.names)
        if slow and len(set(self.size)) > 1:
            raise PomonaError(f"size={self.size} must be square for global branches; leave them out of branches")
        self.repeat = repeat
        self.slow = SlowNet(channels, self.size, hidden=hidden) if slow else None
        self.bottleneck = nn.Conv2d(len(self.names) * channels + repeat, out, 1, bias=False)
        self.norm = GIBS(out, groups)
        self.bias = nn.Parameter(torch.zeros(out, 1, 1))
        self.dropout = nn.Dropout(dropout)

    def forward(self, z: Tensor, earlier: Tensor | None = None) -> Tensor:
        """See the class; ``earlier`` is what ``repeat`` makes room for."""
        check_input(self, z, self.channels, 1)
        if tuple(z.shape[-2:]) != self.size:
            raise PomonaError(f"size={self.size} is what this block was made for; its input has shape {tuple(z.shape)}")
        if (0 if earlier is None else earlier.shape[1]) != self.repeat:
            raise PomonaError(f"repeat={self.repeat} is how many channels the earlier input must have, 0 for none")
        kernel = self.slow() if self.slow is not None else z
        parts = []
        for name, branch in zip(self.names, self.branches, strict=True):
            y = branch(z)
            parts.append(hyper_zzw(kernel, z, y, context=self.context) if name.startswith("global_") else y)
        joined = torch.cat(parts if earlier is None else [*parts, earlier], 1)
        return self.dropout(F.gelu(self.norm(self.bottleneck(joined))) + self.bias)

    def extra_repr(self) -> str:
        """Which branches."""
        return f"size={self.size}, branches={self.names}, context={self.context}"


def slow_loss(kernels: Sequence[Tensor]) -> Tensor:
    """Sum over pairs of the mean squared difference of kernels (C, H, W), channels of the smaller one tiled."""
    total = kernels[0].new_zeros(())
    for a, b in itertools.combinations(kernels, 2):
        small, large = sorted((a, b), key=len)
        tiled = small.repeat(-(-len(large) // len(small)), 1, 1)[: len(large)]
        total = total + F.mse_loss(tiled, large)
    return total
