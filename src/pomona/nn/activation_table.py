"""Facts about the activations of the catalogue, and what uses them: curves, swapping, recalibrated weights.

Source: Gaussian Error Linear Units (GELUs), arXiv 1606.08415.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pomona.errors import PomonaError, unknown
from pomona.nn.activation import CLASSES, act, is_activation
from pomona.nn.gain import derivative_second_moment, gain
from pomona.nn.init import fans
from pomona.nn.layer_order import WeightedLayer, layer_neighbours
from pomona.nn.swap import swap


@dataclass(frozen=True)
class ActivationFacts:
    """What is known about one activation with its default options (a trainable one: as it starts).

    Attributes:
        name: key in the catalogue.
        formula: f(x); [u, v] are the halves of the channels.
        derivative: f'(x), where it exists; for gated ones the two partial derivatives.
        minimum: greatest lower bound of f, -inf if there is none.
        lipschitz: largest |f'|, inf if there is none.
        homogeneous: f(c x) = c f(x) for c > 0.
        monotone: f never falls.
        trainable: whether it has parameters.
        out_factor: output width over input width.
    """

    name: str
    formula: str
    derivative: str
    minimum: float
    lipschitz: float
    homogeneous: bool
    monotone: bool
    trainable: bool
    out_factor: float = 1.0

    @property
    def gain(self) -> float:
        """1/sqrt(E[f(z)^2]) for z ~ N(0, 1)."""
        return gain(act(self.name))

    @property
    def derivative_second_moment(self) -> float:
        """E[f'(z)^2] for z ~ N(0, 1)."""
        return derivative_second_moment(act(self.name))


_INF = math.inf
_SELU = 1.0507009873554805 * 1.6732632423543772
_GELU = (-0.1699712, 1.1289043, False, False)
_SILU = (-0.2784645, 1.0998393, False, False)
# name: formula, derivative, minimum, Lipschitz constant, homogeneous, monotone, trainable[, out_factor]
_ROWS: dict[str, tuple[Any, ...]] = {
    "gelu": ("x Phi(x)", "Phi(x) + x phi(x)", *_GELU, False),
    "stochastic_gelu": ("x m, m ~ Bernoulli(Phi(x)); in eval x Phi(x)", "m; in eval Phi(x) + x phi(x)", *_GELU, False),
    "relu": ("max(0, x)", "1 if x > 0 else 0", 0.0, 1.0, True, True, False),
    "leaky_relu": ("x if x > 0 else 0.01 x", "1 if x > 0 else 0.01", -_INF, 1.0, True, True, False),
    "prelu": ("x if x > 0 else a x, a = 1/4", "1 if x > 0 else a", -_INF, 1.0, True, True, True),
    "rrelu": (
        "x if x > 0 else a x, a ~ U(1/8, 1/3); in eval 11/48",
        "1 if x > 0 else a",
        -_INF,
        1.0,
        True,
        True,
        False,
    ),
    "elu": ("x if x > 0 else exp(x) - 1", "1 if x > 0 else exp(x)", -1.0, 1.0, False, True, False),
    "selu": (
        "1.0507 (x if x > 0 else 1.6733 (exp(x) - 1))",
        "1.0507 (1 if x > 0 else 1.6733 exp(x))",
        -_SELU,
        _SELU,
        False,
        True,
        False,
    ),
    "celu": ("max(0, x) + min(0, exp(x) - 1)", "1 if x > 0 else exp(x)", -1.0, 1.0, False, True, False),
    "softplus": ("log(1 + exp(x))", "sigmoid(x)", 0.0, 1.0, False, True, False),
    "mish": (
        "x tanh s, s = softplus(x)",
        "tanh s + x sigmoid(x)/cosh(s)^2",
        -0.3088434,
        1.0884977,
        False,
        False,
        False,
    ),
    "silu": ("x sigmoid(x)", "s + x s (1 - s), s = sigmoid(x)", *_SILU, False),
    "swish": ("x sigmoid(beta x), beta = 1", "s + beta x s (1 - s), s = sigmoid(beta x)", *_SILU, True),
    "hardswish": ("x min(max(x + 3, 0), 6)/6", "0, (2 x + 3)/6 on [-3, 3], 1", -0.375, 1.5, False, False, False),
    "tanh": ("tanh(x)", "1 - tanh(x)^2", -1.0, 1.0, False, True, False),
    "sigmoid": ("s = 1/(1 + exp(-x))", "s (1 - s)", 0.0, 0.25, False, True, False),
    "sine": ("sin(w0 x), w0 = 1", "w0 cos(w0 x)", -1.0, 1.0, False, False, False),
    "snake": ("x + sin(a x)^2/a, a = 1", "1 + sin(2 a x)", -_INF, 2.0, False, True, True),
    "gcu": ("x cos(x)", "cos(x) - x sin(x)", -_INF, _INF, False, False, False),
    "relu2": ("max(0, x)^2", "2 max(0, x)", 0.0, _INF, False, True, False),
    "squareplus": ("(x + sqrt(x^2 + 4))/2", "(1 + x/sqrt(x^2 + 4))/2", 0.0, 1.0, False, True, False),
    "crelu": ("[max(0, x), max(0, -x)]", "[1 if x > 0 else 0, -1 if x < 0 else 0]", 0.0, 1.0, True, False, False, 2.0),
    "maxout": ("max(u, v) of neighbours", "1 at the larger, 0 at the other", -_INF, 1.0, True, True, False, 0.5),
    "glu": ("u sigmoid(v)", "sigmoid(v), u sigmoid(v) sigmoid(-v)", -_INF, _INF, False, False, False, 0.5),
    "reglu": ("u max(0, v)", "max(0, v), u (1 if v > 0 else 0)", -_INF, _INF, False, False, False, 0.5),
    "geglu": ("u v Phi(v)", "v Phi(v), u (Phi(v) + v phi(v))", -_INF, _INF, False, False, False, 0.5),
    "swiglu": ("u v sigmoid(v)", "v s, u (s + v s (1 - s)), s = sigmoid(v)", -_INF, _INF, False, False, False, 0.5),
    "polynomial": ("c0 + c1 x + c2 x^2 + c3 x^3", "c1 + 2 c2 x + 3 c3 x^2", -0.2248852, _INF, False, False, True),
    "rational": (
        "P5(x)/(1 + |q1 x + ... + q4 x^4|)",
        "(P' - f Q')/Q",
        -_INF,
        1.0644212,
        False,
        False,
        True,
    ),
    "spline": ("piecewise linear on 21 knots in [-3, 3]", "slope of the piece", 0.0, 1.0, True, True, True),
    "meta": ("sum_k w_k f_k(x), w = softmax(logits)", "sum_k w_k f_k'(x)", -_INF, 0.9146536, False, True, True),
    "identity": ("x", "1", -_INF, 1.0, True, True, False),
}
ACTIVATIONS: dict[str, ActivationFacts] = {name: ActivationFacts(name, *row) for name, row in _ROWS.items()}


def curve(
    name: str, low: float = -4.0, high: float = 4.0, points: int = 401, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """x, f(x) and f'(x) as float64 tensors of shape (points,), for plotting; stochastic ones show their mean.

    Raises:
        PomonaError: for an unknown activation, one that changes the width, or ``low`` not below ``high``.
    """
    module = act(name, **options).double().eval()
    if getattr(module, "out_factor", 1.0) != 1.0:
        raise PomonaError(f"act={name!r} changes the width, so it has no single curve")
    if not low < high:
        raise PomonaError(f"low={low} must be below high={high}")
    x = torch.linspace(low, high, points, dtype=torch.float64, requires_grad=True)
    # a column is a batch of one-channel rows, which suits activations with a parameter a channel
    y = module(x[:, None])[:, 0]
    (slope,) = torch.autograd.grad(y.sum(), x)
    return x.detach(), y.detach(), slope


def swap_activation(
    net: nn.Module, name: str, where: Callable[[str, nn.Module], bool] | None = None, **options: Any
) -> nn.Module:
    """A copy of ``net`` with every activation module replaced by ``act(name, **options)``.

    Activations called as functions cannot be seen and stay; so does what is inside a composed activation. Channel axis
    and number of channels carry over from an activation that had them.

    Args:
        net: any network.
        name: activation to put in.
        where: (module name, module) -> whether to replace it; all by default.
        options: of the new activation.

    Raises:
        PomonaError: if the new activation changes the width in another way than the one it replaces, or none is found.
    """
    if name not in CLASSES:
        raise unknown("act", name, CLASSES)

    def replace(old: nn.Module) -> nn.Module:
        sizes = {key: getattr(old, key) for key in ("features", "channel_dim") if hasattr(old, key)}
        if isinstance(old, nn.PReLU):
            sizes = {"features": old.num_parameters, "channel_dim": 1}
        new = act(name, **(sizes | options))
        widths = [0.5 if isinstance(m, nn.GLU) else getattr(m, "out_factor", 1.0) for m in (old, new)]
        if widths[0] != widths[1]:
            raise PomonaError(
                f"act={name!r} multiplies the width by {widths[1]:g} and {type(old).__name__} by {widths[0]:g}; the "
                "layer after it would not fit: build the network with it instead"
            )
        return new

    return swap(net, lambda path, m: is_activation(m) and (where is None or where(path, m)), replace).net


@torch.no_grad()
def calibrate_gain(net: nn.Module, name: str | None = None) -> nn.Module:
    """A copy of ``net`` whose weights are rescaled to keep the mean square of a Gaussian signal.

    Every linear or convolutional layer behind an activation gets mean(w^2) = gain(f)^2/fan_in with f that activation,
    or ``name`` in its stead; every other layer stays. Directions of the weights are kept, so an orthogonal layer stays
    orthogonal up to scale.

    Raises:
        PomonaError: for an unknown activation.
    """
    override = None if name is None else act(name)
    net = copy.deepcopy(net)
    modules = dict(net.named_modules())
    for path, near in layer_neighbours(net).items():
        layer = modules[path]
        if near.before is None or not isinstance(layer, WeightedLayer):
            continue
        root_mean_square = layer.weight.square().mean().sqrt()
        target = gain(near.before if override is None else override) / math.sqrt(fans(layer)[0])
        layer.weight.mul_(target / root_mean_square.clamp_min(torch.finfo(layer.weight.dtype).tiny))
    return net
