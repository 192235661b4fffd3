"""Convolutions whose kernel is a function of relative position: one set of parameters for a grid of any resolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, check_divisible, check_positive, unknown
from pomona.nn.check import check_input

METHODS = ("auto", "direct", "fft")
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d}
FFT_TAPS = {"depthwise": {1: 32, 2: 81}, "dense": {1: 24, 2: 144}}
"""Taps from which the Fourier transform was the faster one on a CPU thread, by number of axes."""


def relative_grid(size: Sequence[int], like: Tensor) -> Tensor:
    """linspace(-1, 1, k) along each axis, 0 where k = 1: (prod(size), axes), the last axis running fastest."""
    axes = [torch.linspace(-1.0, 1.0, k, device=like.device, dtype=torch.float64) for k in size]
    axes = [axis if len(axis) > 1 else torch.zeros_like(axis) for axis in axes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2).to(like.dtype)


def horizon_size(horizon: str | int, length: int, *, causal: bool = False) -> int:
    """Kernel size for sequences of ``length``: 'full' sees all of them from every step, 'same' is as long as they are.

    Raises:
        PomonaError: for another name, or an even number where the kernel is centred.
    """
    if isinstance(horizon, str):
        sizes = {"full": length if causal else 2 * length - 1, "same": length if causal else length | 1}
        if horizon not in sizes:
            raise unknown("kernel_size", horizon, sizes)
        return sizes[horizon]
    check_positive(kernel_size=horizon)
    if horizon % 2 == 0 and not causal:
        raise PomonaError(f"kernel_size={horizon} must be odd where the kernel is centred, such as {horizon + 1}")
    return horizon


def _fast(n: int) -> int:
    """The least of 5, 6 and 8 times a power of two that is at least n: a length that transforms fast."""
    power = 1 << max(0, (n - 1).bit_length() - 3)
    return next(m * power for m in (1, 2, 3, 4, 5, 6, 8) if m * power >= n)


def fft_convolve(x: Tensor, kernel: Tensor, stride: Sequence[int] = (1,), groups: int = 1) -> Tensor:
    """y[o, n] = sum_{i,m} kernel[o, i, m] x[i, n + m] through the Fourier transform, as F.conv1d and F.conv2d.

    Args:
        x: (B, C, *positions), padded already.
        kernel: (out, C / groups, *taps).
    """
    axes = tuple(range(2, x.dim()))
    sizes = [_fast(x.shape[axis]) for axis in axes]  # a circular product of this length wraps into no valid output
    dtype = torch.promote_types(x.dtype, torch.float32)
    spectrum = torch.fft.rfftn(x.to(dtype), sizes, axes).unflatten(1, (groups, -1))
    response = torch.fft.rfftn(kernel.to(dtype), sizes, axes).conj().unflatten(0, (groups, -1))
    if kernel.shape[1] == 1:
        product = spectrum * response.squeeze(2)
    else:
        product = torch.einsum("bgif,goif->bgof", spectrum.flatten(3), response.flatten(3))
    product = product.reshape(len(x), len(kernel), *spectrum.shape[3:])
    y = torch.fft.irfftn(product, sizes, axes)
    for axis, step in zip(axes, stride, strict=True):
        y = y.narrow(axis, 0, x.shape[axis] - kernel.shape[axis] + 1)
        y = y[(slice(None),) * axis + (slice(None, None, step),)] if step > 1 else y
    return y.to(x.dtype)


def convolve(
    x: Tensor,
    kernel: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1,),
    groups: int = 1,
    conv: str = "auto",
) -> Tensor:
    """The convolution (cross-correlation) of a padded input, direct or through the Fourier transform.

    Args:
        x: (B, C, L) or (B, C, H, W).
        kernel: (out, C / groups, *taps).
        conv: direct, fft, or auto, which chooses by the number of taps.
    """
    if conv == "auto":
        kind = FFT_TAPS["depthwise" if kernel.shape[1] == 1 else "dense"]
        conv = "fft" if kernel[0, 0].numel() >= kind[x.dim() - 2] else "direct"
    if conv == "direct" or not len(x):  # the transform takes no empty batch
        return CONVOLUTIONS[x.dim() - 2](x, kernel, bias, tuple(stride), groups=groups)
    y = fft_convolve(x, kernel, stride, groups)
    return y if bias is None else y + bias.view(-1, *(1,) * (x.dim() - 2))


class CoordKernel(nn.Module):
    """y = K * x,  K[o, i, m] = f(c_m)[o, i] with c the grid of relative positions on [-1, 1].

    Args:
        function: module, coordinates (points, axes) -> values (out_channels, in_channels / groups, points).
        in_channels, out_channels: sizes.
        kernel_size: taps along each axis; odd where the kernel is centred and the padding is left to the layer.
        dim: 1 for sequences, 2 for images.
        causal: for sequences: an output sees inputs up to its own step, which stands at coordinate 1.
        stride: of the outputs.
        padding: zeros on both sides of each axis; by default what keeps the size.
        groups: as in `torch.nn.Conv1d`; in_channels for a depthwise convolution.
        bias: add a learned number to each output channel.
        conv: auto, direct or fft.

    Shape:
        (B, in_channels, L) or (B, in_channels, H, W) -> (B, out_channels, ...)

    Raises:
        PomonaError: for sizes that do not fit, or an unknown way to convolve.

    Source: CKConv: Continuous Kernel Convolution For Sequential Data, arXiv 2102.02611.
    """

    def __init__(
        self,
        function: nn.Module,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        *,
        dim: int = 1,
        causal: bool = False,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | None = None,
        groups: int = 1,
        bias: bool = True,
        conv: str = "auto",
    ) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, out_channels=out_channels)
        check_divisible("in_channels", in_channels, "groups", groups)
        check_divisible("out_channels", out_channels, "groups", groups)
        if dim not in CONVOLUTIONS or (causal and dim != 1):
            raise PomonaError(f"dim={dim} must be {'1 where causal' if causal else '1 or 2'}")
        if conv not in METHODS:
            raise unknown("conv", conv, METHODS)
        self.function, self.in_channels, self.out_channels = function, in_channels, out_channels
        self.dim, self.causal, self.groups, self.conv = dim, causal, groups, conv
        self.stride = (stride,) * dim if isinstance(stride, int) else tuple(stride)
        self.padding = (padding,) * dim if isinstance(padding, int) else padding
        self.kernel_size, self.scale = self._sizes(kernel_size), 1.0
        if self.padding == tuple(k // 2 for k in self.kernel_size) and all(k % 2 for k in self.kernel_size):
            self.padding = None
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def _sizes(self, kernel_size: int | tuple[int, ...]) -> tuple[int, ...]:
        sizes = (kernel_size,) * self.dim if isinstance(kernel_size, int) else tuple(kernel_size)
        free = self.causal or self.padding is not None
        return tuple(horizon_size(size, size, causal=free) for size in sizes)

    def kernel(self) -> Tensor:
        """The dense kernel: (out_channels, in_channels / groups, *kernel_size)."""
        like = next(self.function.parameters())
        return self.scale * self.function(relative_grid(self.kernel_size, like)).unflatten(-1, self.kernel_size)

    def resample(self, kernel_size: int | tuple[int, ...], *, rescale: bool = False) -> None:
        """Other taps for the same span: the layer for inputs of another resolution.

        Args:
            kernel_size: along each axis.
            rescale: multiply the values by new over old spacing, so that sums over a finer grid keep their size.
        """
        before, self.kernel_size = self.kernel_size, self._sizes(kernel_size)
        if rescale:
            for old, new in zip(before, self.kernel_size, strict=True):
                self.scale *= (old - 1) / (new - 1) if min(old, new) > 1 else 1.0

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """See the class; with times ``t`` (B, L) or (L,) in steps, of a sequence, y_i = sum_j f(t_j - t_i) x_j."""
        if x.dim() != self.dim + 2:
            form = f"(batch, channels, {self.dim} positions)"
            raise PomonaError(f"{type(self).__name__} takes {form}; its input has shape {tuple(x.shape)}")
        check_input(self, x, self.in_channels, 1)
        if t is not None:
            return self._irregular(x, t)
        sides = [(k // 2, k // 2) for k in self.kernel_size]
        if self.causal:
            sides = [(self.kernel_size[0] - 1, 0)]
        if self.padding is not None:
            sides = [(p, p) for p in self.padding]
        x = F.pad(x, [side for pair in reversed(sides) for side in pair])
        return convolve(x, self.kernel().to(x.dtype), self.bias, self.stride, self.groups, self.conv)

    def _irregular(self, x: Tensor, t: Tensor) -> Tensor:
        """y_i = sum over j within the span of f(c_ij) x_j."""
        span = self.kernel_size[0] - 1
        if self.dim != 1 or span < 1 or self.stride != (1,) or self.padding is not None:
            raise PomonaError(
                f"t is for sequences, with stride=1, padding=None and kernel_size above 1, not dim={self.dim}, "
                f"stride={self.stride}, padding={self.padding}, kernel_size={self.kernel_size}"
            )
        if t.shape[-1] != x.shape[-1]:
            raise PomonaError(f"t has {t.shape[-1]} times; the sequence has {x.shape[-1]} steps")
        lag = t.to(x.dtype)[..., None, :] - t.to(x.dtype)[..., :, None]
        c = 1 + 2 * lag / span if self.causal else 2 * lag / span
        values = self.scale * self.function(c.reshape(-1, 1)).unflatten(-1, c.shape).movedim((0, 1), (-4, -3))
        values = torch.where((c.abs() <= 1 + 1e-6)[..., None, None, :, :], values, 0)
        values = values.unflatten(-4, (self.groups, -1))  # (..., groups, out / groups, in / groups, N, N)
        y = torch.einsum("...goinm,...gim->...gon", values, x.unflatten(1, (self.groups, -1))).flatten(-3, -2)
        return y if self.bias is None else y + self.bias[:, None]

    def extra_repr(self) -> str:
        """Sizes."""
        sizes = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, groups={self.groups}"
        return sizes + (", causal=True" if self.causal else "")
