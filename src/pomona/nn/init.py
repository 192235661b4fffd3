"""Initialisations behind one call, the report that shows what they do, and the plain deep nets that need them.

With weights of variance v and n inputs a layer multiplies the mean square of its signal by n v E[f(z)^2], f
being the activation its input comes from; n v = 1/E[f(z)^2] keeps it constant at any depth.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init
from torch.nn.utils.parametrize import is_parametrized

from pomona.errors import PomonaError, check_positive, unknown
from pomona.nn.activation import act as make_activation
from pomona.nn.gain import derivative_second_moment, gain, second_moment
from pomona.nn.layer_order import WeightedLayer, layer_neighbours, residual_branches

MODES = ("fan_in", "fan_out")
DISTRIBUTIONS = ("normal", "uniform")


def fans(layer: WeightedLayer) -> tuple[int, int]:
    """(fan_in, fan_out) = (k c_in, k c_out) for k taps, per group."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    taps = math.prod(layer.kernel_size)
    return taps * layer.in_channels // layer.groups, taps * layer.out_channels // layer.groups


@dataclass(frozen=True)
class _Draw:
    """Everything a scheme needs to draw the weight of one layer."""

    layer: WeightedLayer
    gain: float
    mode: str
    distribution: str
    generator: torch.Generator | None

    def with_variance(self, variance: float) -> Tensor:
        weight = torch.empty_like(self.layer.weight)
        if self.distribution == "normal":
            return nn.init.normal_(weight, 0.0, math.sqrt(variance), generator=self.generator)
        bound = math.sqrt(3 * variance)
        return nn.init.uniform_(weight, -bound, bound, generator=self.generator)


def _he(draw: _Draw) -> Tensor:
    return draw.with_variance(draw.gain**2 / fans(draw.layer)[MODES.index(draw.mode)])


def _glorot(draw: _Draw) -> Tensor:
    return draw.with_variance(2 / sum(fans(draw.layer)))


def _lecun(draw: _Draw) -> Tensor:
    return draw.with_variance(1 / fans(draw.layer)[0])


def _orthogonal(draw: _Draw) -> Tensor:
    return nn.init.orthogonal_(torch.empty_like(draw.layer.weight), draw.gain, generator=draw.generator)


def _delta_orthogonal(draw: _Draw) -> Tensor:
    """An orthogonal matrix at the centre tap, zero elsewhere: the convolution keeps the norm of its input."""
    layer = draw.layer
    if isinstance(layer, nn.Linear):
        return _orthogonal(draw)
    if layer.transposed or layer.groups != 1 or layer.in_channels > layer.out_channels:
        raise PomonaError(
            f"scheme='delta_orthogonal' needs plain convolutions that do not narrow, got {layer.in_channels} -> "
            f"{layer.out_channels} channels in {layer.groups} groups; scheme='orthogonal' takes any"
        )
    weight = torch.zeros_like(layer.weight)
    centre = weight
    for taps in reversed(layer.kernel_size):
        centre = centre[..., (taps - 1) // 2]
    matrix = torch.empty(centre.shape, dtype=weight.dtype, device=weight.device)
    centre.copy_(nn.init.orthogonal_(matrix, draw.gain, generator=draw.generator))
    return weight


_SCHEMES: dict[str, Callable[[_Draw], Tensor]] = {
    "he": _he,
    "glorot": _glorot,
    "lecun": _lecun,
    "orthogonal": _orthogonal,
    "delta_orthogonal": _delta_orthogonal,
    "lsuv": _orthogonal,
    "fixup": _he,
}
SCHEMES = tuple(_SCHEMES)


def _set_weight(layer: WeightedLayer, weight: Tensor) -> None:
    if is_parametrized(layer, "weight"):
        layer.weight = weight
    else:
        layer.weight.copy_(weight)


@torch.no_grad()
def init_(
    net: nn.Module,
    scheme: str = "he",
    mode: str = "fan_in",
    act: str | nn.Module | None = None,
    *,
    distribution: str = "normal",
    batch: Tensor | None = None,
    branches: Sequence[Sequence[str]] | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Initialise every ``nn.Linear`` and convolution of ``net`` in place; biases become 0. Returns ``net``.

    - ``he``: Var(w) = g^2/n with g^2 = 1/E[f(z)^2] (2/(1 + a^2) for a rectifier of slope a) and n = fan_in; with
      ``mode='fan_out'`` n = fan_out and g^2 = 1/E[f'(z)^2], which keeps gradients constant.
    - ``glorot``: Var(w) = 2/(fan_in + fan_out).   ``lecun``: Var(w) = 1/fan_in.
    - ``orthogonal``: g times a (semi-)orthogonal matrix.   ``delta_orthogonal``: the same at the centre tap.
    - ``lsuv``: orthogonal, then each layer divided by the standard deviation of its output on ``batch``, in the order
      they run, in one pass.
    - ``fixup``: He, with the layers of a residual branch times L^(-1/(2m-2)) (L branches, m layers on this one), the
      last layer of each branch and of the network 0. ``FixupBranch`` adds the scalar biases and multiplier.

    f is the activation before the layer for 'fan_in' and after it for 'fan_out', found by
    ``layer_neighbours``; a layer with none there (the first; the last; one behind a norm) gets g = 1.

    Args:
        scheme: one of ``SCHEMES``.
        mode: 'fan_in' or 'fan_out'; for the schemes that have a choice.
        act: overrides the activation that was found, in the places where one was found.
        distribution: 'normal' or 'uniform', of the variance given above.
        batch: input of ``net`` for 'lsuv'.
        branches: names of the layers of each residual branch for 'fixup', else found by
            ``residual_branches``.
        generator: source of the random numbers, on the device of the weights.

    Raises:
        PomonaError: for an unknown scheme, mode, activation or distribution; for 'lsuv' without ``batch`` or
            with a layer whose output does not vary on it; for 'fixup' where no residual branch is found; for
            'delta_orthogonal' with a convolution that narrows.

    Source: Delving Deep into Rectifiers (arXiv 1502.01852); Understanding the Difficulty of Training Deep
    Feedforward Neural Networks (Glorot and Bengio, 2010); Efficient BackProp (LeCun et al., 1998); Exact
    Solutions to the Nonlinear Dynamics of Learning in Deep Linear Neural Networks (arXiv 1312.6120); All You
    Need Is a Good Init (arXiv 1511.06422); Fixup Initialization (arXiv 1901.09321); Dynamical Isometry and a
    Mean Field Theory of CNNs (arXiv 1806.05393).
    """
    for field, value, choices in (
        ("scheme", scheme, SCHEMES),
        ("mode", mode, MODES),
        ("distribution", distribution, DISTRIBUTIONS),
    ):
        if value not in choices:
            raise unknown(field, value, choices)
    if scheme == "lsuv" and batch is None:
        raise PomonaError("scheme='lsuv' measures outputs on data: give batch=, an input of the network")
    override = make_activation(act) if isinstance(act, str) else act
    layers = {name: module for name, module in net.named_modules() if isinstance(module, WeightedLayer)}
    neighbours = layer_neighbours(net)
    for name, layer in layers.items():
        near = neighbours.get(name)
        found = None if near is None else near.before if mode == "fan_in" else near.after
        factor = 1.0
        if found is not None:
            f = found if override is None else override
            factor = gain(f) if mode == "fan_in" else derivative_second_moment(f) ** -0.5
        _set_weight(layer, _SCHEMES[scheme](_Draw(layer, factor, mode, distribution, generator)))
        if layer.bias is not None:
            layer.bias.zero_()
    if scheme == "lsuv":
        assert batch is not None
        _unit_variance_(net, layers, batch)
    if scheme == "fixup":
        _fixup_(net, layers, branches if branches is not None else residual_branches(net))
    return net


def _unit_variance_(net: nn.Module, layers: dict[str, WeightedLayer], batch: Tensor) -> None:
    """LSUV: a hook divides each layer by the deviation of its output, so that later layers already see it scaled."""
    done: set[nn.Module] = set()

    def rescale(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if layer in done:
            return None
        done.add(layer)
        deviation = output.std()
        if not deviation > 0:
            raise PomonaError(f"scheme='lsuv': the output of {layer} does not vary on this batch; use more data")
        assert isinstance(layer, WeightedLayer)
        _set_weight(layer, layer.weight / deviation)
        return output / deviation

    handles = [layer.register_forward_hook(rescale) for layer in layers.values()]
    try:
        net(batch)
    finally:
        for handle in handles:
            handle.remove()


def _fixup_(net: nn.Module, layers: dict[str, WeightedLayer], branches: Sequence[Sequence[str]]) -> None:
    if not branches:
        raise PomonaError("scheme='fixup' found no residual branch; name the layers of each with branches=[[...], ...]")
    for branch in branches:
        for name in branch:
            if name not in layers:
                raise unknown("branches", name, layers)
        for name in branch[:-1]:
            factor = len(branches) ** (-1 / (2 * len(branch) - 2))
            _set_weight(layers[name], layers[name].weight * factor)
        _set_weight(layers[branch[-1]], torch.zeros_like(layers[branch[-1]].weight))
    last = layers[list(layers)[-1]]
    _set_weight(last, torch.zeros_like(last.weight))


class FixupBranch(nn.Module):
    """A residual branch that trains without norms: scale * layer_k(... layer_1(x + bias_1) ... + bias_k).

    One scalar bias before every layer and activation (0 at first), one scalar multiplier for the branch (1 at
    first).

    Args:
        layers: the modules of the branch, in order.

    Source: Fixup Initialization (arXiv 1901.09321).
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.biases = nn.Parameter(torch.zeros(len(layers)))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """The value of the branch, without the skip connection."""
        for k, layer in enumerate(self.layers):
            x = layer(x + self.biases[k])
        return self.scale * x


@dataclass(frozen=True)
class LayerSignal:
    """One layer: mean square of its output and of the gradient there, growth over the layer before, and theory's."""

    name: str
    forward: float
    backward: float
    ratio: float
    predicted: float


@dataclass(frozen=True)
class SignalReport:
    """What ``signal_report`` measured, layer by layer in the order they ran."""

    layers: list[LayerSignal]
    tolerance: float

    def _flag(self, last: float, first: float) -> str:
        ratio = last / first if first > 0 else 0.0
        if not math.isfinite(ratio) or ratio > self.tolerance:
            return "exploding"
        return "vanishing" if ratio < 1 / self.tolerance else "steady"

    @property
    def forward(self) -> str:
        """'steady', 'exploding' or 'vanishing': the signal from the first layer to the last."""
        return self._flag(self.layers[-1].forward, self.layers[0].forward)

    @property
    def backward(self) -> str:
        """The same for the gradient, from the last layer to the first."""
        return self._flag(self.layers[0].backward, self.layers[-1].backward)

    def __str__(self) -> str:
        rows = [f"{'layer':<24} {'forward':>10} {'backward':>10} {'ratio':>8} {'theory':>8}"]
        rows += [
            f"{s.name:<24} {s.forward:>10.3g} {s.backward:>10.3g} {s.ratio:>8.3f} {s.predicted:>8.3f}"
            for s in self.layers
        ]
        return "\n".join([*rows, f"forward {self.forward}, backward {self.backward}"])


def signal_report(
    net: nn.Module, x: Tensor, *, tolerance: float = 1e3, generator: torch.Generator | None = None
) -> SignalReport:
    """Mean square of signal and gradient through the layers of a copy of ``net``, beside theory.

    The gradient is that of <output, noise> with unit Gaussian noise. ``predicted`` is n mean(w^2) E[f(s
    z)^2]/s^2, s^2 being the mean square of the layer before and f the activation between (identity if none is
    found): 0.5 n Var(w) for ReLU. It leaves out biases, norms, pooling and padding.

    Args:
        net: a network that returns one tensor.
        x: a batch of its input.
        tolerance: growth from end to end beyond this, or below its inverse, is flagged.
        generator: source of the noise.

    Raises:
        PomonaError: if ``net`` has no linear or convolutional layer or ``tolerance`` is not above 0.
    """
    check_positive(tolerance=tolerance)
    net = copy.deepcopy(net)
    names = {module: name for name, module in net.named_modules() if isinstance(module, WeightedLayer)}
    if not names:
        raise PomonaError("net has no nn.Linear or convolution whose signal could be measured")
    outputs: dict[str, Tensor] = {}

    def record(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        outputs[names[layer]] = output  # type: ignore[index]

    handles = [layer.register_forward_hook(record) for layer in names]
    with torch.enable_grad():
        y = net(x)
        noise = torch.randn(y.shape, generator=generator, dtype=y.dtype, device=y.device)
        grads = torch.autograd.grad(y, list(outputs.values()), noise, allow_unused=True)
    for handle in handles:
        handle.remove()
    modules = dict(net.named_modules())
    neighbours = layer_neighbours(net)
    signals: list[LayerSignal] = []
    previous = float(x.square().mean())
    for (name, output), grad in zip(outputs.items(), grads, strict=True):
        layer = modules[name]
        assert isinstance(layer, WeightedLayer)
        before = neighbours[name].before if name in neighbours else None
        predicted = fans(layer)[0] * float(layer.weight.detach().square().mean())
        if before is not None and previous > 0:
            predicted *= second_moment(before, scale=math.sqrt(previous)) / previous
        forward = float(output.detach().square().mean())
        backward = 0.0 if grad is None else float(grad.square().mean())
        ratio = forward / previous if previous > 0 else math.nan
        signals.append(LayerSignal(name, forward, backward, ratio, predicted))
        previous = forward
    return SignalReport(signals, tolerance)


def deep_plain(
    depth: int = 30,
    width: int = 64,
    act: str = "relu",
    init: str = "he",
    *,
    in_features: int,
    out_features: int,
    kind: str = "mlp",
    generator: torch.Generator | None = None,
) -> nn.Sequential:
    """A plain net of ``depth`` weighted layers without shortcuts or norms, which needs a good initialisation.

    'mlp': Linear and activation, (batch, in_features) -> (batch, out_features). 'conv': 3x3 convolutions of
    ``width`` channels, halving the image after each third of them, then the mean over positions and a Linear;
    (batch, in_features, height, width) -> (batch, out_features).

    Raises:
        PomonaError: for a depth below 2, an unknown kind, activation or scheme, or an activation that changes
            the width.

    Source: Delving Deep into Rectifiers (arXiv 1502.01852), the 22 and 30 layer models.
    """
    if depth < 2:
        raise PomonaError(f"depth={depth} must be at least 2")
    if kind not in ("mlp", "conv"):
        raise unknown("kind", kind, ("mlp", "conv"))
    check_positive(width=width, in_features=in_features, out_features=out_features)
    layers: list[nn.Module] = []
    for index in range(depth - 1):
        inputs = width if index else in_features
        if kind == "mlp":
            layers.append(skip_init(nn.Linear, inputs, width))
        else:
            stride = 2 if index and index % max(1, (depth - 1) // 3) == 0 else 1
            layers.append(skip_init(nn.Conv2d, inputs, width, 3, stride, 1))
        layers.append(make_activation(act, features=width, channel_dim=-1 if kind == "mlp" else 1))
    if getattr(layers[-1], "out_factor", 1.0) != 1.0:
        raise PomonaError(f"act={act!r} changes the width; use one that keeps it, such as 'relu'")
    if kind == "conv":
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    net = nn.Sequential(*layers, skip_init(nn.Linear, width, out_features))
    init_(net, init, generator=generator)
    return net
