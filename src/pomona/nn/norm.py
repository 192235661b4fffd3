"""Layer normalisation written out, and the norms it is compared with behind one ``Norm(kind, features, dims)``.

``dims`` is the number of positions after the channels: 0 for (*, features), 1 for (batch, features, length),
2 for (batch, features, height, width). What ``norm_analysis`` measures on them is in the file of that name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pomona.errors import PomonaError, check_divisible, check_positive, unknown
from pomona.nn.check import check_input


class _Standardize(torch.autograd.Function):
    """xhat = (x - mu) r with r = 1/sqrt(var + eps) over the axes ``dims``; also returns r.

    Backward in closed form, with m() the mean over ``dims``:

        dx = r (dy - m(dy) - xhat m(dy xhat)) - r^2 xhat m(dr)        with m(dr) = dr/n

    What backward saves are outputs, so that differentiating it again comes back through this formula.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dims: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor]:
        """f(x)."""
        centred = x - x.mean(dims, keepdim=True)
        r = torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
        return centred * r, r

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, ctx.dims, _ = inputs
        ctx.save_for_backward(*output)
        ctx.save_for_forward(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        dy, dr = grads
        xhat, r = ctx.saved_tensors
        n = xhat.numel() // max(1, r.numel())
        mean = dy.mean(ctx.dims, keepdim=True)
        along = (dy * xhat).mean(ctx.dims, keepdim=True)
        return r * (dy - mean - xhat * along) - xhat * (r.square() * dr / max(1, n)), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        dx = tangents[0]
        xhat, r = ctx.saved_tensors
        along = (dx * xhat).mean(ctx.dims, keepdim=True)
        return r * (dx - dx.mean(ctx.dims, keepdim=True) - xhat * along), -r.square() * along


def _upcast(x: Tensor) -> Tensor:
    """Statistics of half-precision inputs are taken in float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def standardize(x: Tensor, dims: int | Sequence[int] = -1, eps: float = 1e-5) -> Tensor:
    """(x - mean)/sqrt(var + eps) over the axes ``dims``, with the biased variance and a closed-form gradient.

    Works under ``vmap``, forward and double differentiation; half precision is computed in float32.
    """
    axes = (dims,) if isinstance(dims, int) else tuple(dims)
    if torch.compiler.is_compiling():
        # the compiler derives and fuses the backward itself, and does not take a custom jvp
        z = _upcast(x) - _upcast(x).mean(axes, keepdim=True)
        return (z * torch.rsqrt(z.square().mean(axes, keepdim=True) + eps)).to(x.dtype)
    return _Standardize.apply(_upcast(x), axes, eps)[0].to(x.dtype)


class _ChannelNorm(nn.Module):
    """Gain and bias per channel, and the axes a norm works on: the channels at each position, or the whole example."""

    def __init__(
        self, features: int | Sequence[int], dims: int, eps: float, affine: bool, bias: bool, over: str
    ) -> None:
        super().__init__()
        self.shape = (features,) if isinstance(features, int) else tuple(features)
        for size in self.shape:
            check_positive(features=size)
        check_positive(eps=eps)
        if dims not in (0, 1, 2, 3) or (dims and len(self.shape) > 1):
            raise PomonaError(f"dims={dims} must be 0, 1, 2 or 3, and 0 where features has several axes")
        if over not in ("channels", "all"):
            raise unknown("over", over, ("channels", "all"))
        self.dims, self.eps, self.over = dims, eps, over
        self.weight = nn.Parameter(torch.ones(self.shape)) if affine else None
        self.bias = nn.Parameter(torch.zeros(self.shape)) if affine and bias else None

    def axes(self) -> tuple[int, ...]:
        """Axes, counted from the end, that the statistics run over."""
        if self.dims == 0:
            return tuple(range(-len(self.shape), 0))
        return tuple(range(-self.dims - 1, 0)) if self.over == "all" else (-self.dims - 1,)

    def affine(self, xhat: Tensor) -> Tensor:
        """Gain and bias along the channels."""
        view = (*self.shape, *(1,) * self.dims)
        if self.weight is not None:
            xhat = xhat * self.weight.view(view)
        return xhat if self.bias is None else xhat + self.bias.view(view)

    def extra_repr(self) -> str:
        """The sizes and options, for `repr`."""
        shape = self.shape[0] if len(self.shape) == 1 else self.shape
        return f"{shape}, dims={self.dims}, over={self.over!r}, affine={self.weight is not None}"


class LayerNorm(_ChannelNorm):
    """Layer normalisation.

        y = g (x - mu)/sqrt(var + eps) + b

    with mean and biased variance over the features of one example, so that training and evaluation, and any
    batch size, give the same. Backward is dx = (g dy - mean(g dy) - xhat mean(g dy xhat))/sigma.

    Args:
        features: width, or the last axes to normalise over as a sequence (as in torch).
        dims: positions after the channels; with 1 or 2 the channels of (batch, features, ...) are normalised.
        eps: added to the variance.
        affine: learn a gain g (1 at first) and bias b (0 at first), one a channel.
        bias: with ``affine``, whether there is a b.
        over: for ``dims`` above 0, 'channels' takes statistics at each position, 'all' over channels and
            positions.

    Raises:
        PomonaError: for a size, ``eps``, ``dims`` or ``over`` outside these.

    Source: Layer Normalization (arXiv 1607.06450).
    """

    def __init__(
        self,
        features: int | Sequence[int],
        dims: int = 0,
        eps: float = 1e-5,
        affine: bool = True,
        bias: bool = True,
        over: str = "channels",
    ) -> None:
        super().__init__(features, dims, eps, affine, bias, over)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (*, features) or (batch, features, ...)."""
        check_input(self, x)
        return self.affine(standardize(x, self.axes(), self.eps))


class RMSNorm(_ChannelNorm):
    """Root mean square norm: y = g x / sqrt(mean(x^2) + eps), layer norm without the centring.

    Arguments as in ``LayerNorm``, without a bias. Source: Root Mean Square Layer Normalization (arXiv
    1910.07467).
    """

    def __init__(
        self,
        features: int | Sequence[int],
        dims: int = 0,
        eps: float = 1e-5,
        affine: bool = True,
        over: str = "channels",
    ) -> None:
        super().__init__(features, dims, eps, affine, False, over)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (*, features) or (batch, features, ...)."""
        check_input(self, x)
        z = _upcast(x)
        z = z * torch.rsqrt(z.square().mean(self.axes(), keepdim=True) + self.eps)
        return self.affine(z.to(x.dtype))


class ScaleNorm(nn.Module):
    """y = g x / max(||x||, eps) with one trained scalar g, sqrt(features) at first.

    Args:
        features: width.
        dims: positions after the channels; the norm is over the channels at each.
        eps: least length that is divided by.

    Source: Transformers without Tears (arXiv 1910.05895).
    """

    def __init__(self, features: int, dims: int = 0, eps: float = 1e-5) -> None:
        super().__init__()
        check_positive(features=features, eps=eps)
        self.dims, self.eps = dims, eps
        self.weight = nn.Parameter(torch.tensor(math.sqrt(features)))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (*, features) or (batch, features, ...)."""
        check_input(self, x)
        z = _upcast(x)
        length = torch.linalg.vector_norm(z, dim=-self.dims - 1, keepdim=True).clamp_min(self.eps)
        return self.weight * (z / length).to(x.dtype)


class DyT(_ChannelNorm):
    """Dynamic tanh, a norm without statistics: y = g tanh(alpha x) + b, with alpha one trained scalar.

    Args:
        features: width.
        dims: positions after the channels.
        alpha: first value of alpha.

    Source: Transformers without Normalization (arXiv 2503.10622).
    """

    def __init__(self, features: int, dims: int = 0, alpha: float = 0.5) -> None:
        super().__init__(features, dims, 1e-5, True, True, "channels")
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))

    def forward(self, x: Tensor) -> Tensor:
        """Squash (*, features) or (batch, features, ...)."""
        check_input(self, x)
        return self.affine(torch.tanh(self.alpha * x))


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm: statistics a channel over the batch (and positions) in training, running ones in evaluation.

    torch's, but also for (*, features), where all leading axes count as the batch.

    Source: Batch Normalization (arXiv 1502.03167).
    """

    def __init__(self, features: int, dims: int = 0, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(features, eps, momentum)
        self.dims = dims

    def _check_input_dim(self, input: Tensor) -> None:
        least = self.dims + 2
        if input.ndim < least or (self.dims and input.ndim > least):
            raise PomonaError(f"batch norm with dims={self.dims} takes {least} axes, got {input.ndim}")

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (*, features) or (batch, features, ...)."""
        check_input(self, x)
        if self.dims or x.ndim < 3:
            return super().forward(x)
        return super().forward(x.flatten(0, -2)).view(x.shape)


class GroupNorm(_ChannelNorm):
    """Group norm: statistics of an example over the channels of a group and all positions.

    Args:
        features: number of channels.
        dims: positions after the channels; with 0 a group is part of the feature axis.
        groups: number of groups; by default the most, up to 32, that leave at least 4 channels in each.
        eps: added to the variance.

    Raises:
        PomonaError: if ``groups`` does not divide ``features``.

    Source: Group Normalization (arXiv 1803.08494).
    """

    def __init__(self, features: int, dims: int = 0, groups: int | None = None, eps: float = 1e-5) -> None:
        super().__init__(features, dims, eps, True, True, "channels")
        if groups is None:
            most = min(32, max(1, features // 4))
            groups = max(g for g in range(1, most + 1) if features % g == 0)
        check_divisible("features", features, "groups", groups)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (*, features) or (batch, features, ...)."""
        check_input(self, x)
        channel = x.ndim - 1 - self.dims
        grouped = x.unflatten(channel, (self.groups, x.shape[channel] // self.groups))
        xhat = standardize(grouped, tuple(range(-self.dims - 1, 0)), self.eps)
        return self.affine(xhat.flatten(channel, channel + 1))


def InstanceNorm(features: int, dims: int = 1, eps: float = 1e-5) -> GroupNorm:
    """Instance norm: statistics of each channel of each example over positions; a group norm of one channel each.

    Raises:
        PomonaError: for ``dims=0``, where a channel has one value and nothing to normalise over.

    Source: Instance Normalization: The Missing Ingredient for Fast Stylization (arXiv 1607.08022).
    """
    if dims < 1:
        raise PomonaError("norm='instance' needs positions to average over, got dims=0; norm='layer' does without")
    return GroupNorm(features, dims, features, eps)


class NoNorm(nn.Identity):
    """No normalisation."""


class WeightNorm(nn.Module):
    """Weight norm as a parametrisation: w = g v/||v||, one g an output unit.

    ``weight_norm(layer)`` applies it. Source: Weight Normalization (arXiv 1602.07868).
    """

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        """The weight."""
        return g * v / self._length(v)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Give g and v for a weight that is set."""
        return self._length(weight), weight

    @staticmethod
    def _length(v: Tensor) -> Tensor:
        return torch.linalg.vector_norm(v, dim=tuple(range(1, v.ndim)), keepdim=True)


def weight_norm(layer: nn.Module) -> nn.Module:
    """Put ``WeightNorm`` on ``layer.weight``, in place; the function of the layer stays the same.

    Raises:
        PomonaError: if ``layer`` has no weight of two or more axes.
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        raise PomonaError(f"weight norm needs a layer with a weight matrix, got {type(layer).__name__}")
    parametrize.register_parametrization(layer, "weight", WeightNorm())
    return layer


NORMS: dict[str, Callable[..., nn.Module]] = {
    "batch": BatchNorm,
    "layer": LayerNorm,
    "instance": InstanceNorm,
    "group": GroupNorm,
    "rms": RMSNorm,
    "scale": ScaleNorm,
    "dyt": DyT,
    "none": NoNorm,
}


def Norm(kind: str, features: int, dims: int = 0, **options: Any) -> nn.Module:
    """The norm called ``kind`` for ``features`` channels.

    On (*, features) with ``dims=0`` layer, rms, scale, group and dyt act on the last axis and batch pools all
    others. On (batch, features, ...) with ``dims=1`` or ``2`` layer, rms, scale and dyt act on the channels
    at each position (layer and rms on all of the example with ``over='all'``), group and instance on channels
    and positions of an example, batch on each channel over examples and positions.

    Raises:
        PomonaError: for an unknown kind or option.
    """
    if kind not in NORMS:
        raise unknown("norm", kind, NORMS)
    if kind == "none":
        return NoNorm()
    try:
        return NORMS[kind](features, dims, **options)
    except TypeError as error:
        raise PomonaError(f"norm={kind!r} does not take these options: {error}") from error


_NORM_TYPES = (
    _ChannelNorm,
    ScaleNorm,
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: ours, or torch's batch, layer, group, instance or RMS norm."""
    return isinstance(module, _NORM_TYPES)


class Affine(nn.Module):
    """y = weight * x + bias, feature by feature: the normalisation-free stand-in for a norm in ResMLP.

    Source: ResMLP: Feedforward networks for image classification with data-efficient training, arXiv 2105.03404.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(*, dim) -> (*, dim)"""
        return self.weight * x + self.bias
