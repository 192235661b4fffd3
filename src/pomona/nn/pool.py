"""Pooling of k x k regions: mixed, gated, tree and the other functions in use, behind one geometry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, check_positive, unknown
from pomona.nn.check import check_input

Pair = int | tuple[int, int]
SHARES = ("layer", "channel", "region", "region_channel")


class Pool2d(nn.Module):
    """What every pooling has in common: the regions, as `torch.nn.MaxPool2d` and `AvgPool2d` lay them out.

    A subclass defines `forward` from `max`, `average`, `respond` (learned linear filters) and `regions` (the
    values themselves).

    Args:
        kernel_size: height and width of a region.
        stride: steps between regions, the kernel size by default.
        padding: of the border; never the maximum of a region, zero elsewhere.
        ceil_mode: also pool the regions that run over the right and lower border.
        count_include_pad: whether averages count the padding.

    Shape:
        (batch, channels, height, width) -> (batch, channels, height', width')
    """

    def __init__(
        self,
        kernel_size: Pair,
        stride: Pair | None = None,
        padding: Pair = 0,
        *,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
    ) -> None:
        super().__init__()
        self.kernel_size = _pair(kernel_size)
        self.stride = self.kernel_size if stride is None else _pair(stride)
        self.padding = _pair(padding)
        check_positive(kernel_size=min(self.kernel_size), stride=min(self.stride))
        if any(2 * p > k for p, k in zip(self.padding, self.kernel_size, strict=True)):
            raise PomonaError(f"padding={self.padding} is more than half of kernel_size={self.kernel_size}")
        self.ceil_mode = ceil_mode
        self.count_include_pad = count_include_pad
        self.area = self.kernel_size[0] * self.kernel_size[1]

    def max(self, x: Tensor) -> Tensor:
        """The largest value of each region."""
        return F.max_pool2d(x, self.kernel_size, self.stride, self.padding, 1, self.ceil_mode)

    def average(self, x: Tensor) -> Tensor:
        """The mean of each region."""
        return F.avg_pool2d(x, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad)

    def pad(self, x: Tensor, value: float = 0.0) -> Tensor:
        """The input with its padding, and with what the last regions need beyond it in `ceil_mode`."""
        around: list[int] = []
        for size, k, s, p in zip(x.shape[-2:], self.kernel_size, self.stride, self.padding, strict=True):
            steps = (size + 2 * p - k + (s - 1) * self.ceil_mode) // s
            # a region must start inside the input or its left padding
            steps -= self.ceil_mode and steps * s >= size + p
            around = [p, max(p, steps * s + k - size - p), *around]
        return F.pad(x, around, value=value)

    def regions(self, x: Tensor, value: float = 0.0) -> Tensor:
        """Every region's values, (batch, channels, height', width', area), with ``value`` as padding."""
        (kh, kw), (sh, sw) = self.kernel_size, self.stride
        return self.pad(x, value).unfold(-2, kh, sh).unfold(-2, kw, sw).flatten(-2)

    def respond(self, x: Tensor, filters: Tensor) -> Tensor:
        """Learned filters over each region, zero padded.

        Args:
            x: (batch, channels, height, width).
            filters: (M, area) for all channels, (channels, M, area), or with one set a region
                (1 or channels, height', width', M, area).

        Returns:
            (batch, channels, M, height', width')
        """
        if filters.dim() == 5:
            filters = filters.expand(x.shape[1], -1, -1, -1, -1)
            return torch.einsum("bchwk,chwmk->bcmhw", self.regions(x), filters)
        filters = filters if filters.dim() == 3 else filters.expand(x.shape[1], -1, -1)
        kernel = filters.reshape(-1, 1, *self.kernel_size)
        return F.conv2d(self.pad(x), kernel, stride=self.stride, groups=x.shape[1]).unflatten(1, filters.shape[:2])

    def extra_repr(self) -> str:
        """The geometry, for `repr`."""
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class _Learned(Pool2d):
    """A pooling with parameters for the layer, for each channel, for each region, or for each of both."""

    def __init__(
        self,
        kernel_size: Pair,
        stride: Pair | None = None,
        padding: Pair = 0,
        *,
        share: str = "layer",
        channels: int | None = None,
        out_size: Pair | None = None,
        **geometry: Any,
    ) -> None:
        super().__init__(kernel_size, stride, padding, **geometry)
        if share not in SHARES:
            raise unknown("share", share, SHARES)
        if "channel" in share and channels is None:
            raise PomonaError(f"share={share!r} needs channels, the number of feature maps")
        if "region" in share and out_size is None:
            raise PomonaError(f"share={share!r} needs out_size, the height and width of the output")
        self.share = share
        sets = (channels or 1,) if "channel" in share else (1,) if "region" in share else ()
        self.sets: tuple[int, ...] = (*sets, *(_pair(out_size or 1) if "region" in share else ()))

    def extra_repr(self) -> str:
        """The geometry and what shares parameters, for `repr`."""
        return f"{super().extra_repr()}, share={self.share!r}"


class MixedPool2d(_Learned):
    """A learned mixture of maximum and average.

    y = a max + (1 - a) average

    Args:
        kernel_size, stride, padding, ceil_mode, count_include_pad: as in `Pool2d`.
        share: one a for the 'layer', each 'channel', each 'region' or each 'region_channel'.
        channels: number of feature maps, where each has its own.
        out_size: height and width of the output, where each region has its own.
        initial: a at the start.
        sigmoid: learn a = sigmoid(t), so that it stays between 0 and 1; the paper leaves it free.

    Shape:
        (batch, channels, height, width) -> (batch, channels, height', width')

    Raises:
        PomonaError: if share is unknown or lacks its size.

    Source:
        Generalizing Pooling Functions in Convolutional Neural Networks: Mixed, Gated, and Tree, arXiv
            1509.08985.
    """

    def __init__(
        self,
        kernel_size: Pair,
        stride: Pair | None = None,
        padding: Pair = 0,
        *,
        initial: float = 0.5,
        sigmoid: bool = False,
        share: str = "layer",
        channels: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(kernel_size, stride, padding, share=share, channels=channels, **options)
        if sigmoid and not 0 < initial < 1:
            raise PomonaError(f"initial={initial} must lie between 0 and 1 with sigmoid=True")
        self.sigmoid = sigmoid
        start = torch.full(self.sets, float(initial))
        self.mixture = nn.Parameter(start.logit() if sigmoid else start)

    def forward(self, x: Tensor) -> Tensor:
        """A max + (1 - a) average."""
        check_input(self, x)
        a = self.mixture.sigmoid() if self.sigmoid else self.mixture
        a = a[:, None, None] if self.share == "channel" else a
        return a * self.max(x) + (1 - a) * self.average(x)


class GatedPool2d(_Learned):
    """A mixture of maximum and average that depends on what is in the region.

    a = sigmoid(w . region),  y = a max + (1 - a) average

    Args:
        as in `MixedPool2d`, without ``initial`` and ``sigmoid``; w starts at zero, so a at 1/2.

    Source:
        arXiv 1509.08985.
    """

    def __init__(
        self,
        kernel_size: Pair,
        stride: Pair | None = None,
        padding: Pair = 0,
        *,
        share: str = "layer",
        channels: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(kernel_size, stride, padding, share=share, channels=channels, **options)
        self.mask = nn.Parameter(torch.zeros(*self.sets, 1, self.area))

    def forward(self, x: Tensor) -> Tensor:
        """A max + (1 - a) average, a = sigmoid(w . region)."""
        check_input(self, x)
        a = self.respond(x, self.mask).squeeze(2).sigmoid()
        return a * self.max(x) + (1 - a) * self.average(x)


class TreePool2d(_Learned):
    """A binary tree of learned pooling filters, combined by learned gates.

    A leaf is f_m = v_m . region; an inner node f_m = g f_left + (1 - g) f_right with g = sigmoid(w_m .
    region).

    Args:
        kernel_size, stride, padding, share, channels, out_size: as in `MixedPool2d`.
        depth: levels of the tree; 2^(depth - 1) leaves.
        noise: standard deviation of what the leaves' start adds to average pooling; the gates start at 1/2.
        generator: source of that noise.

    Source:
        arXiv 1509.08985.
    """

    def __init__(
        self,
        kernel_size: Pair,
        stride: Pair | None = None,
        padding: Pair = 0,
        *,
        depth: int = 2,
        noise: float = 0.01,
        generator: torch.Generator | None = None,
        share: str = "layer",
        channels: int | None = None,
        **options: Any,
    ) -> None:
        check_positive(depth=depth)
        super().__init__(kernel_size, stride, padding, share=share, channels=channels, **options)
        leaves = 2 ** (depth - 1)
        start = torch.randn(*self.sets, leaves, self.area, generator=generator)
        self.leaves = nn.Parameter(1 / self.area + noise * start)
        self.gates = nn.Parameter(torch.zeros(*self.sets, leaves - 1, self.area))

    def forward(self, x: Tensor) -> Tensor:
        """The value of the root."""
        check_input(self, x)
        leaves = self.leaves.shape[-2]
        f, g = self.respond(x, torch.cat([self.leaves, self.gates], dim=-2)).split([leaves, leaves - 1], dim=2)
        g = g.sigmoid()
        while f.shape[2] > 1:  # the gates of a level follow those of the level below
            pairs = f.shape[2] // 2
            gate, g = g[:, :, :pairs], g[:, :, pairs:]
            f = gate * f[:, :, 0::2] + (1 - gate) * f[:, :, 1::2]
        return f.squeeze(2)


class PowerPool2d(Pool2d):
    """A norm or generalised mean of each region.

    y = (sum |x|^p)^(1/p), or with ``mean`` y = (mean max(x, eps)^p)^(1/p), which is the average at p = 1
    and tends to the maximum as p grows.

    Args:
        kernel_size, stride, padding, ceil_mode, count_include_pad: as in `Pool2d`.
        p: the power at the start.
        mean: generalised mean of values kept above ``eps``, in the place of the norm.
        learn: train p.
        eps: keeps the root differentiable at zero.

    Source:
        Fine-tuning CNN image retrieval with no human annotation, arXiv 1711.02512, for the learned mean.
    """

    def __init__(
        self,
        kernel_size: Pair,
        stride: Pair | None = None,
        padding: Pair = 0,
        *,
        p: float = 2.0,
        mean: bool = False,
        learn: bool = False,
        eps: float = 1e-6,
        **geometry: Any,
    ) -> None:
        check_positive(p=p, eps=eps)
        super().__init__(kernel_size, stride, padding, **geometry)
        self.mean = mean
        self.eps = eps
        self.p = nn.Parameter(torch.tensor(float(p)), requires_grad=learn)

    def forward(self, x: Tensor) -> Tensor:
        """The p-norm or the p-mean."""
        check_input(self, x)
        if self.mean:
            return self.average(x.clamp_min(self.eps) ** self.p) ** (1 / self.p)
        powers = F.avg_pool2d(
            x.abs().clamp_min(self.eps) ** self.p, self.kernel_size, self.stride, self.padding, self.ceil_mode, True, 1
        )
        return powers ** (1 / self.p)


class LpPool2d(PowerPool2d):
    """The p-norm of each region, y = (sum |x|^p)^(1/p); arguments as in `PowerPool2d`."""

    def __init__(self, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0, p: float = 2.0) -> None:
        super().__init__(kernel_size, stride, padding, p=p)


class GeMPool2d(PowerPool2d):
    """The generalised mean with a learned power, y = (mean x^p)^(1/p); arguments as in `PowerPool2d`."""

    def __init__(self, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0, p: float = 3.0) -> None:
        super().__init__(kernel_size, stride, padding, p=p, mean=True, learn=True, count_include_pad=False)


class SoftPool2d(Pool2d):
    """An average of each region weighted by its own softmax.

    y = sum_i softmax(x)_i x_i

    Source:
        Refining activation downsampling with SoftPool, arXiv 2101.00440.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The softmax-weighted average; padding has no weight."""
        check_input(self, x)
        weights = self.regions(x, value=torch.finfo(x.dtype).min).softmax(-1)
        return (weights * self.regions(x)).sum(-1)


class StochasticPool2d(Pool2d):
    """A value of each region drawn with probability in proportion to it; for activations that are not
    negative.

    Training: y = x_i with probability p_i = x_i / sum x. Evaluation: y = sum_i p_i x_i. Negative values are
    taken as zero, and a region of zeros gives zero.

    Args:
        kernel_size, stride, padding, ceil_mode: as in `Pool2d`.
        generator: source of the draws; torch's default one otherwise.

    Source:
        Stochastic Pooling for Regularization of Deep Convolutional Neural Networks, arXiv 1301.3557.
    """

    def __init__(
        self,
        kernel_size: Pair,
        stride: Pair | None = None,
        padding: Pair = 0,
        *,
        generator: torch.Generator | None = None,
        **geometry: Any,
    ) -> None:
        super().__init__(kernel_size, stride, padding, **geometry)
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        """A draw while training, its expectation otherwise."""
        check_input(self, x)
        values = self.regions(x.relu())
        total = values.sum(-1, keepdim=True)
        if not self.training:
            return (values.square().sum(-1, keepdim=True) / total.clamp_min(torch.finfo(x.dtype).tiny)).squeeze(-1)
        if self.generator is None:
            draw = torch.rand_like(total)
        else:
            draw = torch.rand(total.shape, generator=self.generator, dtype=x.dtype, device=x.device)
        index = (values.cumsum(-1) <= draw * total).sum(-1, keepdim=True).clamp_max(self.area - 1)
        return values.gather(-1, index).squeeze(-1)


POOLS: dict[str, Callable[..., nn.Module]] = {
    "max": nn.MaxPool2d,
    "avg": nn.AvgPool2d,
    "mixed": MixedPool2d,
    "gated": GatedPool2d,
    "tree": TreePool2d,
    "lp": LpPool2d,
    "gem": GeMPool2d,
    "soft": SoftPool2d,
    "stochastic": StochasticPool2d,
}


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
