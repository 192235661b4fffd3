"""Hypernetworks whose weights do not scale with the size of their inputs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from pomona.errors import PomonaError, unknown
from pomona.weights.reparametrized import Reparametrized
from pomona.weights.space import Patterns, WeightSpace

Encoding = Callable[[Tensor], Tensor]
Context = Tensor | Mapping[str, Tensor]


def identity(g: Tensor) -> Tensor:
    """The inputs as they are; also for one-hot categories, whose norm is one already."""
    return g


def z_1mz(g: Tensor) -> Tensor:
    """``[g, 1 - g]``: constant 1-norm."""
    return torch.cat([g, 1 - g], dim=-1)


def cos_sin(g: Tensor) -> Tensor:
    """``[cos(pi g/2), sin(pi g/2)]``: squared norm equal to the number of inputs, one-to-one on [0, 1]."""
    angle = g * (math.pi / 2)
    return torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)


def fourier(g: Tensor, bands: int = 4) -> Tensor:
    """Cosines and sines of ``pi g / 2`` times 1, 2, 4, ..., scaled to the norm of ``cos_sin``."""
    angles = torch.cat([g * (math.pi / 2 * 2**band) for band in range(bands)], dim=-1)
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1) / math.sqrt(bands)


ENCODINGS: dict[str | None, Encoding] = {None: identity, "z_1mz": z_1mz, "cos_sin": cos_sin, "fourier": fourier}

# activation and the nonlinearity whose Kaiming gain goes with it
ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], Literal["leaky_relu", "relu", "tanh"]]] = {
    "leaky_relu": (nn.LeakyReLU, "leaky_relu"),
    "relu": (nn.ReLU, "relu"),
    "gelu": (nn.GELU, "relu"),
    "silu": (nn.SiLU, "relu"),
    "tanh": (nn.Tanh, "tanh"),
}


class MIPHyperNet(nn.Module):
    r"""A hypernetwork in magnitude invariant parametrisation.

    .. math:: \theta = \theta_0 + h(E(\gamma); \omega), \qquad E(g) = [\cos(\pi g / 2), \sin(\pi g / 2)]

    An ordinary hypernetwork with zero biases and a positively homogeneous activation obeys ``h(a g) = a
    h(g)``: the size of the weights it makes, and of its gradients, follows the size of its input. Here the
    input's encoding has constant norm, and the weights have a part of their own, ``theta_0``, which starts
    as the network's present weights.

    Args:
        in_shapes: shape of each input, by name. Inputs are flattened and joined in the order of their names.
        space: the weights to generate; ``theta_0`` is read from its network.
        hidden: sizes of the hidden layers.
        act: leaky_relu, relu, gelu, silu or tanh.
        encode: ``"cos_sin"``, ``"z_1mz"``, ``"fourier"`` or None; or one of these for each input by name
            (None for one-hot categories).
        residual: ``True`` holds ``theta_0`` as a parameter of its own, ``"bias"`` as the bias of the last
            layer, ``False`` leaves it out (the ordinary parametrisation).
        split_init: initialise the last matrix as if each tensor of the space had its own head; otherwise as
            one matrix, whose fan-out, and hence scale, is far off.
        dropout: after each activation.
        norm: ``"layer"`` for layer norm before each activation, or None.
        bounds: ``{name: (low, high)}``, values that are mapped to [0, 1] first (min-max scaling).
        warn: warn about inputs outside [0, 1] (not under ``vmap`` or ``compile``, and only on the CPU).

    Call it with a dict of tensors ``(*lead, *shape)``, or one tensor where there is one input; it gives
    ``(*lead, P)``.

    Initialisation: Kaiming normal with fan-out, biases zero.

    Raises:
        PomonaError: for an unknown option, or inputs that do not fit ``in_shapes``.

    Source: Magnitude Invariant Parametrizations Improve Hypernetwork Learning (arXiv 2304.07645).
    """

    def __init__(
        self,
        in_shapes: Mapping[str, Sequence[int]],
        space: WeightSpace,
        hidden: Sequence[int] = (16, 128),
        *,
        act: str = "leaky_relu",
        encode: str | Mapping[str, str | None] | None = "cos_sin",
        residual: bool | Literal["bias"] = True,
        split_init: bool = True,
        dropout: float = 0.0,
        norm: Literal["layer"] | None = None,
        bounds: Mapping[str, tuple[float, float]] | None = None,
        warn: bool = True,
    ) -> None:
        super().__init__()
        if not in_shapes:
            raise PomonaError("in_shapes={} names no input; give at least one, such as {'gamma': (1,)}")
        if act not in ACTIVATIONS:
            raise unknown("act", act, ACTIVATIONS)
        if norm not in (None, "layer"):
            raise unknown("norm", norm, ("layer",))
        if residual not in (True, False, "bias"):
            raise unknown("residual", residual, ("True", "False", "bias"))
        self.in_shapes = {name: tuple(in_shapes[name]) for name in sorted(in_shapes)}
        self.encodings = {name: encode[name] if isinstance(encode, Mapping) else encode for name in self.in_shapes}
        for name in self.encodings.values():
            if name not in ENCODINGS:
                raise unknown("encode", name, ENCODINGS)
        self.bounds = {} if bounds is None else dict(bounds)
        self.act, self.split_init, self.warn = act, split_init, warn
        self.sizes = [spec.numel for spec in space.specs]

        theta0 = space.read()
        probe = {name: torch.zeros(shape) for name, shape in self.in_shapes.items()}
        widths = [self.encode(probe).shape[-1], *hidden]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers.append(nn.Linear(fan_in, fan_out))
            if norm == "layer":
                layers.append(nn.LayerNorm(fan_out))
            layers.append(ACTIVATIONS[act][0]())
            if dropout:
                layers.append(nn.Dropout(dropout))
        self.body = nn.Sequential(*layers)
        self.last = nn.Linear(widths[-1], space.numel)
        self.to(theta0)
        self.theta0 = nn.Parameter(theta0.clone()) if residual is True else None
        self.reset_parameters()
        if residual == "bias":
            with torch.no_grad():
                self.last.bias.copy_(theta0)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Kaiming normal with fan-out, the last matrix head by head; zero biases. ``theta_0`` stays."""
        kind = ACTIVATIONS[self.act][1]
        slope = 0.01 if kind == "leaky_relu" else 0.0
        for layer in self.body:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, a=slope, mode="fan_out", nonlinearity=kind)
                nn.init.zeros_(layer.bias)
        heads = self.last.weight.split(self.sizes) if self.split_init else (self.last.weight,)
        for head in heads:
            nn.init.kaiming_normal_(head, a=slope, mode="fan_out", nonlinearity=kind)
        nn.init.zeros_(self.last.bias)

    def encode(self, inputs: Context) -> Tensor:
        """The encoded inputs ``(*lead, features)``, joined in the order of their names."""
        if isinstance(inputs, Tensor):
            if len(self.in_shapes) > 1:
                raise PomonaError(f"inputs is one tensor; give a dict with {', '.join(self.in_shapes)}")
            inputs = {next(iter(self.in_shapes)): inputs}
        parts = []
        for name, shape in self.in_shapes.items():
            if name not in inputs:
                raise PomonaError(f"inputs lacks {name!r}; give a dict with {', '.join(self.in_shapes)}")
            g = inputs[name]
            if g.shape[g.ndim - len(shape) :] != shape:
                raise PomonaError(f"{name} has shape {tuple(g.shape)}; it must end with {shape}")
            g = g.reshape(*g.shape[: g.ndim - len(shape)], math.prod(shape))
            if name in self.bounds:
                low, high = self.bounds[name]
                g = (g - low) / (high - low)
            if self.warn and self.encodings[name] is not None:
                _warn_outside(name, g)
            parts.append(ENCODINGS[self.encodings[name]](g))
        return torch.cat(parts, dim=-1)

    def forward(self, inputs: Context) -> Tensor:
        """The weight vector ``(*lead, P)``."""
        theta = self.last(self.body(self.encode(inputs)))
        return theta if self.theta0 is None else self.theta0 + theta


def _warn_outside(name: str, g: Tensor) -> None:
    watched = torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(g)
    if not watched and g.device.type == "cpu" and ((g < 0) | (g > 1)).any():
        warnings.warn(f"{name} lies outside [0, 1]; rescale it or pass bounds={{{name!r}: (low, high)}}", stacklevel=3)


def mip_convert(
    net: nn.Module,
    in_shapes: Mapping[str, Sequence[int]],
    select: Patterns = "*.weight",
    *,
    space_norm: Literal["learn", "free", "batch"] = "free",
    **options: object,
) -> Reparametrized:
    """Turn any network into a hypernetwork's target, called as ``net(x, gamma)``.

    The selected weights are generated from ``gamma`` (by ``MIPHyperNet``, which takes the ``options``) and
    start near their present values; the rest, such as biases and norms, stays trainable as it is. ``gamma``
    is one condition for the whole batch, or with a leading dimension one for each example.

    Args:
        net: any module; it is copied.
        in_shapes: shape of each input of the hypernetwork, by name.
        select: glob patterns over parameter names.
        space_norm: what happens to normalisation layers, as ``norm`` of ``WeightSpace``.

    Source: Magnitude Invariant Parametrizations Improve Hypernetwork Learning (arXiv 2304.07645).
    """
    space = WeightSpace(net, select, norm=space_norm)
    return Reparametrized(net, MIPHyperNet(in_shapes, space, **options), space)  # type: ignore[arg-type]
