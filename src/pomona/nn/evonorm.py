"""EvoNorm: layers found by search that normalise and activate in one, and how to put them into a given network.

In a recipe they fill ``norm`` and the activation goes: ``convnet norm=evonorm_s0 act=identity``.

Source: Evolving Normalization-Activation Layers (arXiv 2004.02967).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from pomona.errors import PomonaError, check_divisible
from pomona.nn.activation import is_activation
from pomona.nn.check import check_input
from pomona.nn.layer_order import _trace, _Walk
from pomona.nn.norm import _ChannelNorm, _upcast, is_norm

Make = Callable[[int, int], nn.Module]
"""(features, dims) -> the layer that takes the place of a norm and its activation."""


def _variance(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Biased variance; 0 over no axes, where every group has one value."""
    if not axes or not x.numel():
        return torch.zeros_like(x)
    return x.var(axes, correction=0, keepdim=True)


def _mean_square(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return x.square().mean(axes, keepdim=True) if axes else x.square()


class EvoNormB0(_ChannelNorm):
    """EvoNorm-B0, of the series with batch statistics.

        y = g x / max(sqrt(var_batch(x) + eps), v x + sqrt(var_instance(x) + eps)) + b

    var_batch is a channel's variance over batch and positions, a running estimate in evaluation; var_instance is over
    the positions of one example, also in evaluation. Both are biased and nothing is centred.

    Args:
        features: channels.
        dims: positions after the channels: 0 for (*, features), where var_instance is 0; 1 or 2 for (batch, features,
            ...).
        momentum: of the running estimate.
        eps: added to variances.

    Source: Evolving Normalization-Activation Layers (arXiv 2004.02967).
    """

    running_var: Tensor

    def __init__(self, features: int, dims: int = 0, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__(features, dims, eps, True, True, "channels")
        if not 0 <= momentum <= 1:
            raise PomonaError(f"momentum={momentum} must be in [0, 1]")
        self.momentum = momentum
        self.register_buffer("running_var", torch.ones(features))
        self._add_slope()

    def _add_slope(self) -> None:
        self.v = nn.Parameter(torch.ones(self.shape))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and activate (*, features) or (batch, features, ...)."""
        check_input(self, x, self.shape[0], -self.dims - 1)
        z, channel = _upcast(x), x.ndim - self.dims - 1
        var = self.running_var.view(-1, *(1,) * self.dims)
        if self.training and z.numel():
            var = z.var([axis for axis in range(z.ndim) if axis != channel], correction=0, keepdim=True)
            with torch.no_grad():
                self.running_var.mul_(1 - self.momentum).add_(self.momentum * var.flatten().to(self.running_var.dtype))
        spread = torch.maximum((var + self.eps).sqrt(), self.instance(z, tuple(range(-self.dims, 0))))
        return self.affine((z / spread).to(x.dtype))

    def instance(self, z: Tensor, positions: tuple[int, ...]) -> Tensor:
        """What the batch's deviation is compared with."""
        return self.v.view(-1, *(1,) * self.dims) * z + (_variance(z, positions) + self.eps).sqrt()


class EvoNormB1(EvoNormB0):
    """y = g x / max(sqrt(var_batch(x) + eps), (x + 1) sqrt(mean_instance(x^2) + eps)) + b.

    Arguments as in ``EvoNormB0``. Source: arXiv 2004.02967.
    """

    def _add_slope(self) -> None:
        """It has none."""

    def instance(self, z: Tensor, positions: tuple[int, ...]) -> Tensor:
        """What the batch's deviation is compared with."""
        return (z + 1) * (_mean_square(z, positions) + self.eps).sqrt()


class EvoNormB2(EvoNormB1):
    """y = g x / max(sqrt(var_batch(x) + eps), sqrt(mean_instance(x^2) + eps) - x) + b.

    Arguments as in ``EvoNormB0``. Source: arXiv 2004.02967.
    """

    def instance(self, z: Tensor, positions: tuple[int, ...]) -> Tensor:
        """What the batch's deviation is compared with."""
        return (_mean_square(z, positions) + self.eps).sqrt() - z


class EvoNormS0(_ChannelNorm):
    """EvoNorm-S0, of the series without batch statistics.

        y = g x sigmoid(v x) / sqrt(var_group(x) + eps) + b

    with the biased variance of an example over the positions and channels of a group, nothing centred.

    Args:
        features: channels.
        dims: positions after the channels, as in ``EvoNormB0``.
        groups: number of groups; by default the most, up to 32, that leave at least 4 channels in each.
        eps: added to the variance.

    Raises:
        PomonaError: if ``groups`` does not divide ``features``.

    Source: Evolving Normalization-Activation Layers (arXiv 2004.02967).
    """

    statistic = staticmethod(_variance)

    def __init__(self, features: int, dims: int = 0, groups: int | None = None, eps: float = 1e-5) -> None:
        super().__init__(features, dims, eps, True, True, "channels")
        if groups is None:
            groups = max(g for g in range(1, min(32, max(1, features // 4)) + 1) if features % g == 0)
        check_divisible("features", features, "groups", groups)
        self.groups = groups
        self._add_slope()

    def _add_slope(self) -> None:
        self.v: Tensor = nn.Parameter(torch.ones(self.shape))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and activate (*, features) or (batch, features, ...)."""
        check_input(self, x, self.shape[0], -self.dims - 1)
        z, channel = _upcast(x), x.ndim - self.dims - 1
        grouped = z.unflatten(channel, (self.groups, self.shape[0] // self.groups))
        spread = (self.statistic(grouped, tuple(range(-self.dims - 1, 0))) + self.eps).sqrt()
        gate = torch.sigmoid(self.v.view(-1, *(1,) * self.dims) * z)
        y = z * gate / spread.expand_as(grouped).flatten(channel, channel + 1)
        return self.affine(y.to(x.dtype))


class EvoNormS1(EvoNormS0):
    """y = g x sigmoid(x) / sqrt(var_group(x) + eps) + b; arguments as in ``EvoNormS0``. Source: arXiv 2004.02967."""

    def _add_slope(self) -> None:
        self.register_buffer("v", torch.ones(self.shape), persistent=False)


class EvoNormS2(EvoNormS1):
    """y = g x sigmoid(x) / sqrt(mean_group(x^2) + eps) + b; arguments as in ``EvoNormS0``. Source: arXiv 2004.02967."""

    statistic = staticmethod(_mean_square)


def replace_norm_act(net: nn.Module, make: Make, dims: int = 0) -> nn.Module:
    """A copy of a network with ``make(features, dims)`` in the place of each norm and the activation behind it.

    Pairs are found in every ``nn.Sequential`` and, with activations called as functions or shared between places, on
    the graph that ``torch.fx`` traces; where pairs come from the graph the result is an ``fx.GraphModule``. A norm
    without an activation behind it stays.

    Args:
        net: any network.
        make: such as ``EvoNormS0``.
        dims: positions after the channels where torch's norm does not tell (``BatchNorm1d``, ``GroupNorm``).

    Raises:
        PomonaError: if there is no such pair.

    Source: Evolving Normalization-Activation Layers (arXiv 2004.02967).
    """
    net, count = copy.deepcopy(net), 0
    for block in [m for m in net.modules() if type(m) is nn.Sequential]:
        for i in range(len(block) - 1):
            size = _norm_size(block[i], dims)
            if size and _is_plain(block[i + 1]):
                block[i], block[i + 1] = _like(make(*size), block[i]), nn.Identity()
                count += 1
    graph = _trace(net)
    if graph is not None:
        walk, found = _Walk(net, graph), 0
        calls = Counter(node.target for node in walk.nodes if node.op == "call_module")
        for node in walk.nodes:
            norm, users = walk.module(node), list(node.users)
            size = None if norm is None else _norm_size(norm, dims)
            function = walk.activation(users[0]) if len(users) == 1 else None
            if norm is None or size is None or calls[node.target] > 1 or not _is_plain(function):
                continue
            net.set_submodule(str(node.target), _like(make(*size), norm))
            users[0].replace_all_uses_with(node)
            graph.erase_node(users[0])
            found += 1
        if found:
            net, count = fx.GraphModule(net, graph), count + found
    if not count:
        raise PomonaError(
            "net has no norm that an activation follows, in an nn.Sequential or in a graph torch.fx traces"
        )
    return net


def _like(new: nn.Module, old: nn.Module) -> nn.Module:
    """In the old module's mode, and on its device."""
    like = next(old.parameters(), next(old.buffers(), None))
    return (new if like is None else new.to(like.device, like.dtype)).train(old.training)


def _is_plain(module: nn.Module | None) -> bool:
    """Whether it is an activation that keeps the width."""
    keeps = not isinstance(module, nn.GLU) and getattr(module, "out_factor", 1) == 1
    return module is not None and is_activation(module) and keeps


def _norm_size(norm: nn.Module, dims: int) -> tuple[int, int] | None:
    """(features, dims) of a norm over single channels, or None."""
    if not is_norm(norm):
        return None
    shape = getattr(norm, "shape", getattr(norm, "normalized_shape", None))
    features = shape[0] if shape else getattr(norm, "num_features", getattr(norm, "num_channels", None))
    if features is None or (shape and len(shape) > 1):
        return None
    told = {"2d": 2, "3d": 3}.get(type(norm).__name__[-2:], 0 if isinstance(norm, (nn.LayerNorm, nn.RMSNorm)) else dims)
    return features, getattr(norm, "dims", told)
