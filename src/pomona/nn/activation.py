"""The activation catalogue: a class for every name, and ``act(name)``.

Names whose class torch already has (ReLU, ELU, ...) are torch's; plain formulas are in
``activation_functions``; gated, fitted and mixed activations are here. The facts about each (minimum,
Lipschitz constant, ...) are in ``activation_table``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import (
    CELU,
    ELU,
    SELU,
    Hardswish,
    Identity,
    LeakyReLU,
    Mish,
    ReLU,
    Sigmoid,
    SiLU,
    Softplus,
    Tanh,
)

from pomona.errors import PomonaError, check_positive, unknown
from pomona.nn.activation_functions import (
    GCU,
    GELU,
    Activation,
    CReLU,
    Maxout,
    ReLUSquared,
    RReLU,
    Sine,
    Snake,
    Squareplus,
    StochasticGELU,
    Swish,
)
from pomona.nn.gain import gauss_hermite
from pomona.nn.prelu import PReLU, along_channels


class GLU(Activation):
    """Gated linear unit: f([u, v]) = u g(v) for the two halves of the channels, so the width halves.

    Args:
        gate: name of g in the activation catalogue, 'sigmoid' in the paper.
        channel_dim: axis of the channels.

    Raises:
        PomonaError: if the number of channels of an input is odd, or ``gate`` changes the width.

    Source: Language Modeling with Gated Convolutional Networks (arXiv 1612.08083); the other gates are from
    GLU Variants Improve Transformer (arXiv 2002.05202).
    """

    out_factor = 0.5

    def __init__(self, gate: str = "sigmoid", channel_dim: int = -1) -> None:
        super().__init__()
        self.gate, self.channel_dim = _same_width("gate", gate), channel_dim
        self.kinks = tuple(getattr(self.gate, "kinks", None) or ((0.0,) if gate == "relu" else ()))

    def forward(self, x: Tensor) -> Tensor:
        """f(x)."""
        if x.shape[self.channel_dim] % 2:
            raise PomonaError(f"a gated unit needs an even number of channels, got {x.shape[self.channel_dim]}")
        u, v = x.chunk(2, self.channel_dim)
        return u * self.gate(v)


class ReGLU(GLU):
    """f([u, v]) = u max(0, v). Source: arXiv 2002.05202."""

    def __init__(self, channel_dim: int = -1) -> None:
        super().__init__("relu", channel_dim)


class GEGLU(GLU):
    """f([u, v]) = u GELU(v). Source: arXiv 2002.05202."""

    def __init__(self, channel_dim: int = -1) -> None:
        super().__init__("gelu", channel_dim)


class SwiGLU(GLU):
    """f([u, v]) = u SiLU(v). Source: arXiv 2002.05202."""

    def __init__(self, channel_dim: int = -1) -> None:
        super().__init__("silu", channel_dim)


class Polynomial(Activation):
    """f(x) = sum_i c_i x^i with trained coefficients, one set a layer.

    Starts as the polynomial nearest to ``init`` in mean square under z ~ N(0, 1).

    Args:
        degree: highest power.
        init: name of the activation to start from.
    """

    def __init__(self, degree: int = 3, init: str = "gelu") -> None:
        super().__init__()
        check_positive(degree=degree)
        z, weights = gauss_hermite(64)
        root = weights.sqrt()[:, None]
        powers = z[:, None] ** torch.arange(degree + 1)
        start = torch.linalg.lstsq(root * powers, root * _sample(init, z)[:, None]).solution[:, 0]
        # the solver's last digits depend on where its memory lies
        self.coefficients = nn.Parameter(start.round(decimals=12).to(torch.get_default_dtype()))

    def forward(self, x: Tensor) -> Tensor:
        """f(x)."""
        y = torch.zeros_like(x)
        for c in self.coefficients.flip(0):
            y = y * x + c
        return y


class Rational(Activation):
    """Trainable rational function (Pade activation unit), one a layer.

        f(x) = (p_0 + p_1 x + ... + p_5 x^5) / (1 + |q_1 x + ... + q_4 x^4|)

    The bar keeps the denominator at 1 or more. Starts as a least-squares fit of ``init`` on [-reach, reach]
    with an even denominator, found by linear fits that are weighted with the previous denominator.

    Args:
        numerator: degree of the numerator.
        denominator: degree of the denominator, even.
        init: name of the activation to start from.
        reach: half-width of the interval of that fit.

    Raises:
        PomonaError: if a degree or ``reach`` is not above 0 or ``denominator`` is odd.

    Source: Pade Activation Units (arXiv 1907.06732).
    """

    def __init__(self, numerator: int = 5, denominator: int = 4, init: str = "leaky_relu", reach: float = 3.0) -> None:
        super().__init__()
        check_positive(numerator=numerator, denominator=denominator, reach=reach)
        if denominator % 2:
            raise PomonaError(f"denominator={denominator} must be even, or the function has poles to start from")
        x = torch.linspace(-reach, reach, 401, dtype=torch.float64)
        y = _sample(init, x)
        top = x[:, None] ** torch.arange(numerator + 1)
        bottom = x[:, None] ** torch.arange(2, denominator + 1, 2)
        weight, q = torch.ones_like(x), torch.zeros(bottom.shape[1], dtype=torch.float64)
        for _ in range(10):
            system = torch.cat([top, -y[:, None] * bottom], 1) / weight[:, None]
            solution = torch.linalg.lstsq(system, (y / weight)[:, None]).solution[:, 0]
            q = solution[numerator + 1 :].clamp_min(0)
            weight = 1 + bottom @ q
        p = torch.linalg.lstsq(top / weight[:, None], y[:, None]).solution[:, 0]
        full = torch.zeros(denominator, dtype=torch.float64)
        full[1::2] = q
        self.numerator = nn.Parameter(p.to(torch.get_default_dtype()))
        self.denominator = nn.Parameter(full.to(torch.get_default_dtype()))

    def forward(self, x: Tensor) -> Tensor:
        """f(x)."""
        top, bottom = torch.zeros_like(x), torch.zeros_like(x)
        for p in self.numerator.flip(0):
            top = top * x + p
        for q in self.denominator.flip(0):
            bottom = (bottom + q) * x
        return top / (1 + bottom.abs())


class Spline(Activation):
    """Trainable piecewise-linear spline, one a layer: knots equally spaced, outer pieces extended.

    Args:
        knots: number of knots.
        reach: the knots lie on [-reach, reach].
        init: name of the activation whose values at the knots it starts from.

    Raises:
        PomonaError: for fewer than 2 knots or ``reach`` not above 0.

    Source: Deep Neural Networks with Trainable Activations and Controlled Lipschitz Constant (arXiv
    2001.06263), linear B-splines without its regulariser.
    """

    def __init__(self, knots: int = 21, reach: float = 3.0, init: str = "relu") -> None:
        super().__init__()
        check_positive(reach=reach)
        if knots < 2:
            raise PomonaError(f"knots={knots} must be at least 2")
        at = torch.linspace(-reach, reach, knots, dtype=torch.float64)
        self.reach, self.kinks = reach, tuple(at.tolist())
        self.values = nn.Parameter(_sample(init, at).to(torch.get_default_dtype()))

    def forward(self, x: Tensor) -> Tensor:
        """f(x)."""
        last = len(self.values) - 2
        position = (x + self.reach) * ((last + 1) / (2 * self.reach))
        piece = position.detach().nan_to_num().clamp(0, last).floor()
        left, right = self.values[piece.long()], self.values[piece.long() + 1]
        return left + (position - piece) * (right - left)


class MetaActivation(Activation):
    """Per-channel mixture of activations: f_c(x) = sum_k softmax(logits_c)_k f_k(x), the weights trained.

    Args:
        features: number of channels; 1 for one mixture shared by the layer.
        bases: names of the f_k.
        channel_dim: axis of the channels.

    Raises:
        PomonaError: for no bases, an unknown one, or one that changes the width.
    """

    def __init__(
        self,
        features: int = 1,
        bases: Sequence[str] = ("identity", "relu", "tanh", "gelu"),
        channel_dim: int = -1,
    ) -> None:
        super().__init__()
        check_positive(features=features)
        if not bases:
            raise PomonaError("bases=() must name at least one activation, such as 'relu'")
        self.features, self.channel_dim = features, channel_dim
        self.bases = nn.ModuleList(_same_width("bases", name) for name in bases)
        self.kinks = (0.0,)
        self.logits = nn.Parameter(torch.zeros(len(bases), features))

    def forward(self, x: Tensor) -> Tensor:
        """f(x)."""
        weights = torch.softmax(self.logits, 0)
        mixed = torch.zeros_like(x)
        for k, base in enumerate(self.bases):
            w = weights[k] if self.features == 1 else along_channels(weights[k], x, self.channel_dim)
            mixed = mixed + w * base(x)
        return mixed


CLASSES: dict[str, Callable[..., nn.Module]] = {
    "gelu": GELU,
    "stochastic_gelu": StochasticGELU,
    "relu": ReLU,
    "leaky_relu": LeakyReLU,
    "prelu": PReLU,
    "rrelu": RReLU,
    "elu": ELU,
    "selu": SELU,
    "celu": CELU,
    "softplus": Softplus,
    "mish": Mish,
    "silu": SiLU,
    "swish": Swish,
    "hardswish": Hardswish,
    "tanh": Tanh,
    "sigmoid": Sigmoid,
    "sine": Sine,
    "snake": Snake,
    "gcu": GCU,
    "relu2": ReLUSquared,
    "squareplus": Squareplus,
    "crelu": CReLU,
    "maxout": Maxout,
    "glu": GLU,
    "reglu": ReGLU,
    "geglu": GEGLU,
    "swiglu": SwiGLU,
    "polynomial": Polynomial,
    "rational": Rational,
    "spline": Spline,
    "meta": MetaActivation,
    "identity": Identity,
}


def act(name: str, **options: Any) -> nn.Module:
    """The activation called ``name`` as a module.

    ``features`` and ``channel_dim`` may always be given; functions that do not need them ignore them.

    >>> act("gelu", approximate="tanh")
    GELU(approximate='tanh', mu=0.0, sigma=1.0)

    Raises:
        PomonaError: for an unknown name or option.
    """
    if name not in CLASSES:
        raise unknown("act", name, CLASSES)
    known = [key for key in inspect.signature(CLASSES[name]).parameters if key not in ("args", "kwargs")]
    for key in options:
        if key not in known and key not in ("features", "channel_dim"):
            takes = ", ".join(known) if known else "none"
            raise PomonaError(f"act={name!r} has no option {key!r}; its options are: {takes}")
    return CLASSES[name](**{key: value for key, value in options.items() if key in known})


def _same_width(field: str, name: str) -> nn.Module:
    module = act(name)
    if getattr(module, "out_factor", 1.0) != 1.0:
        raise PomonaError(f"{field}={name!r} changes the width; use one that keeps it, such as 'relu'")
    return module


def _sample(name: str, x: Tensor) -> Tensor:
    """Values of a catalogue activation at float64 points."""
    with torch.no_grad():
        return _same_width("init", name).double().eval()(x)


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation of the catalogue (torch's own count, ``nn.Identity`` does not)."""
    return isinstance(module, _TYPES) and not isinstance(module, nn.Identity)


_TYPES = (
    Activation,
    PReLU,
    *(cls for cls in CLASSES.values() if isinstance(cls, type)),
    *(nn.GELU, nn.PReLU, nn.RReLU, nn.ReLU6, nn.GLU, nn.Hardtanh, nn.Hardsigmoid, nn.LogSigmoid),
    *(nn.Softsign, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink),
)
