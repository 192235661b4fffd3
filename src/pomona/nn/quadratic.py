"""Quadratic neurons, and the strategy that lets deep networks of them train."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, check_positive, unknown
from pomona.nn.check import check_input

# which of the terms (W_g x + b_g), W_b x^2 + c and x^T Q x a neuron has beside W_r x + b_r
VARIANTS = {"fan": ("g", "b"), "product": ("g",), "square": ("b",), "full": ("q",)}
STRATEGIES = ("sgd", "shrink", "clip")


@dataclass(frozen=True)
class ReLinear:
    """How the quadratic terms are held near the linear neuron while they train.

    Combines with residual branches that start closed (`pomona.nn.residual.ReZero`).

    Args:
        strategy: 'sgd' gives the quadratic terms a small learning rate only; 'shrink' also multiplies their
            distance from the linear neuron (W_g = 0, b_g = 1, W_b = 0, c = 0) by `shrink` at each step;
            'clip' also keeps every entry of that distance within +-`limit`.
        lr_scale: learning rate of the quadratic terms over that of W_r. The authors' runs use 1e-4 and search
            between 1 and 1e-4.
        shrink: factor below 1.
        limit: bound of 'clip'.

    Raises:
        PomonaError: if the strategy is unknown or a number is out of range.
    """

    strategy: str = "sgd"
    lr_scale: float = 0.1
    shrink: float = 0.99
    limit: float = 0.1

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise unknown("strategy", self.strategy, STRATEGIES)
        check_positive(lr_scale=self.lr_scale, shrink=self.shrink, limit=self.limit)
        if self.shrink > 1:
            raise PomonaError(f"shrink={self.shrink} must be at most 1")

    @torch.no_grad()
    def step_(self, value: Tensor, reference: float) -> None:
        """Bring a parameter nearer to its value in the linear neuron, as the strategy asks."""
        if self.strategy == "shrink":
            value.lerp_(torch.full_like(value, reference), 1 - self.shrink)
        elif self.strategy == "clip":
            value.clamp_(reference - self.limit, reference + self.limit)


class _Quadratic(nn.Module):
    """What dense and convolutional quadratic neurons share: sets of weights r, g, b and their training."""

    weight_r: nn.Parameter
    weight_g: nn.Parameter | None
    weight_b: nn.Parameter | None
    weight_q: nn.Parameter | None

    def __init__(
        self,
        out_features: int,
        shape: tuple[int, ...],
        variant: str,
        bias: bool,
        init: str,
        relinear: ReLinear | str,
        generator: torch.Generator | None,
        factory: dict[str, Any],
    ) -> None:
        if variant not in VARIANTS:
            raise unknown("variant", variant, VARIANTS)
        if init not in ("relinear", "kaiming"):
            raise unknown("init", init, ("relinear", "kaiming"))
        super().__init__()
        self.variant = variant
        self.relinear = ReLinear(relinear) if isinstance(relinear, str) else relinear
        terms = VARIANTS[variant]

        def zeros(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(size, **factory))

        self.weight_r = zeros(out_features, *shape)
        self.bias_r = zeros(out_features) if bias else None
        self.weight_g = zeros(out_features, *shape) if "g" in terms else None
        # kept without `bias` too: the linear neuron is the one whose second factor is b_g = 1
        self.bias_g = nn.Parameter(torch.ones(out_features, **factory)) if "g" in terms else None
        self.weight_b = zeros(out_features, *shape) if "b" in terms else None
        self.bias_b = zeros(out_features) if bias and variant == "fan" else None
        self.weight_q = zeros(out_features, *shape, *shape) if "q" in terms else None

        random = [self.weight_r]
        if init == "kaiming":
            random += [w for w in (self.weight_g, self.weight_b, self.weight_q) if w is not None]
        for weight in random:
            nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator)
        if init == "kaiming" and self.bias_g is not None:
            nn.init.zeros_(self.bias_g)

    def apply_map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The linear map behind every term."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(W_r x + b_r) * (W_g x + b_g) + W_b x^2 + c."""
        check_input(self, x)
        y = self.apply_map(x, self.weight_r, self.bias_r)
        if self.weight_g is not None:
            y = y * self.apply_map(x, self.weight_g, self.bias_g)
        if self.weight_b is not None:
            y = y + self.apply_map(x * x, self.weight_b, self.bias_b)
        if self.weight_q is not None:
            y = y + torch.einsum("...i,oij,...j->...o", x, self.weight_q, x)
        return y

    def quadratic_parameters(self) -> list[tuple[nn.Parameter, float]]:
        """The parameters of the quadratic terms, each with its value in the linear neuron."""
        pairs = (
            (self.weight_g, 0.0),
            (self.bias_g, 1.0),
            (self.weight_b, 0.0),
            (self.bias_b, 0.0),
            (self.weight_q, 0.0),
        )
        return [(parameter, reference) for parameter, reference in pairs if parameter is not None]

    def param_groups(self) -> list[dict[str, Any]]:
        """The quadratic terms, with their smaller learning rate."""
        own = [parameter for parameter, _ in self.quadratic_parameters()]
        return [{"params": own, "lr_scale": self.relinear.lr_scale}]

    def post_step(self) -> None:
        """Shrink or clip the quadratic terms, if the strategy asks."""
        for parameter, reference in self.quadratic_parameters():
            self.relinear.step_(parameter, reference)

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        out, inner = self.weight_r.shape[:2]
        return f"{inner}, {out}, variant={self.variant!r}, bias={self.bias_r is not None}"


class QuadraticLinear(_Quadratic):
    """A layer of quadratic neurons; the activation follows outside.

    y = (W_r x + b_r) * (W_g x + b_g) + W_b (x * x) + c, products elementwise

    Args:
        in_features, out_features: sizes.
        variant: 'fan' as above; 'product' without W_b and c; 'square' is W_r x + b_r + W_b (x * x); 'full' is
            W_r x + b_r + x^T Q_k x for neuron k, with in_features^2 numbers each.
        bias: False leaves b_r and c out (b_g stays: it is the 1 of the linear neuron).
        init: 'relinear' starts as the linear neuron with Kaiming W_r; 'kaiming' draws every weight so, with
            zero biases, which collapses in deep networks.
        relinear: a `ReLinear`, or the name of its strategy, for `param_groups` and `post_step`.
        generator: source of the initial values.

    Shape:
        (*, in_features) -> (*, out_features); 3 in out + 3 out parameters for 'fan'.

    Raises:
        PomonaError: if variant, init or strategy is unknown.

    Source:
        On Expressivity and Trainability of Quadratic Networks, arXiv 2110.06081.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        variant: str = "fan",
        bias: bool = True,
        *,
        init: str = "relinear",
        relinear: ReLinear | str = "sgd",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive(in_features=in_features, out_features=out_features)
        factory = {"device": device, "dtype": dtype}
        super().__init__(out_features, (in_features,), variant, bias, init, relinear, generator, factory)

    def apply_map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """W x + b."""
        return F.linear(x, weight, bias)


class QuadraticConv2d(_Quadratic):
    """A convolution of quadratic neurons: `QuadraticLinear` on every patch.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as in
            `torch.nn.Conv2d`.
        variant: 'fan', 'product' or 'square'.
        init, relinear, generator: as in `QuadraticLinear`.

    Shape:
        (batch, in_channels, height, width) -> (batch, out_channels, height', width')
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        *,
        variant: str = "fan",
        init: str = "relinear",
        relinear: ReLinear | str = "sgd",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if variant == "full":
            raise PomonaError("variant='full' is for QuadraticLinear only; use 'fan', 'product' or 'square'")
        # a convolution without values checks the arguments and knows how to pad
        conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            False,
            padding_mode,
            "meta",
        )
        shape = tuple(conv.weight.shape[1:])
        factory = {"device": device, "dtype": dtype}
        super().__init__(out_channels, shape, variant, bias, init, relinear, generator, factory)
        self.stride, self.padding, self.dilation, self.groups = (
            conv.stride,
            conv.padding,
            conv.dilation,
            groups,
        )
        self.padding_mode = padding_mode
        self._around = conv._reversed_padding_repeated_twice

    def apply_map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """W * x + b, a convolution."""
        padding = self.padding if self.padding_mode == "zeros" else 0
        if self.padding_mode != "zeros":
            x = F.pad(x, self._around, mode=self.padding_mode)
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)


class QuadActivation(nn.Module):
    """Squaring as an activation: the paper's comparison, a linear neuron before a quadratic function."""

    def forward(self, x: Tensor) -> Tensor:
        """The square."""
        return x * x


def quadratize(net: nn.Module, *, where: Callable[[str, nn.Module], bool] | None = None, **options: Any) -> nn.Module:
    """A copy of a network whose linear and convolutional layers are quadratic and compute the same.

    Args:
        net: any network; its `torch.nn.Linear` and `torch.nn.Conv2d` modules are replaced (not subclasses,
            whose owners may use the weights directly).
        where: ``where(name, module)`` chooses among them; all by default.
        **options: of `QuadraticLinear` and `QuadraticConv2d` (variant, relinear).

    Raises:
        PomonaError: if nothing was replaced.
    """
    # deepcopy with the old layers already mapped to the new ones keeps shared layers and tied weights shared
    memo: dict[int, Any] = {}
    for name, module in list(net.named_modules()):
        if type(module) in (nn.Linear, nn.Conv2d) and (where is None or where(name, module)):
            memo[id(module)] = _lift(module, options, memo)
    if not memo:
        raise PomonaError(f"net={type(net).__name__} has no linear or convolutional layer to make quadratic")
    return copy.deepcopy(net, memo)


def _lift(layer: nn.Module, options: dict[str, Any], memo: dict[int, Any]) -> nn.Module:
    """The quadratic layer that starts as ``layer``."""
    options = {**options, "bias": layer.bias is not None, "init": "relinear"}
    if isinstance(layer, nn.Linear):
        new: _Quadratic = QuadraticLinear(layer.in_features, layer.out_features, **options)
    else:
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        geometry = {name: getattr(layer, name) for name in (*names, "padding_mode")}
        new = QuadraticConv2d(**geometry, **options)
    weight = layer.get_parameter("weight")
    new.to(weight)
    new.weight_r = copy.deepcopy(weight, memo)
    new.bias_r = copy.deepcopy(layer.bias, memo)  # type: ignore[assignment]
    return new.train(layer.training)


@torch.no_grad()
def count_pieces_1d(
    net: nn.Module,
    lo: float | Tensor = -1.0,
    hi: float | Tensor = 1.0,
    *,
    samples: int = 4097,
    kinks: tuple[type[nn.Module], ...] = (nn.ReLU, nn.LeakyReLU),
) -> int:
    """How many polynomial pieces a piecewise activated network has along a line.

    Between the points where an activation changes sign the network is one polynomial, of degree 2^depth if
    its neurons are quadratic. A new piece is counted wherever the signs of two neighbouring samples differ,
    so that more samples find more (never fewer, on a grid that contains the old one) and a kink that later
    layers hide is counted too.

    Args:
        net: maps (samples, features) to anything.
        lo, hi: ends of the line: numbers for a network of one input, else points (features,).
        samples: points on the line.
        kinks: the modules whose sign changes part the pieces.

    Raises:
        PomonaError: if the network has no module of ``kinks``.
    """
    signs: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _module, inputs: signs.append((inputs[0] > 0).flatten(1)))
        for module in net.modules()
        if isinstance(module, kinks)
    ]
    if not hooks:
        raise PomonaError(f"net={type(net).__name__} has no {' or '.join(kind.__name__ for kind in kinks)} module")
    example = next(net.parameters())
    start, end = (torch.as_tensor(p, dtype=example.dtype, device=example.device).reshape(1, -1) for p in (lo, hi))
    t = torch.linspace(0, 1, samples, dtype=example.dtype, device=example.device)[:, None]
    try:
        net(start + t * (end - start))
    finally:
        for hook in hooks:
            hook.remove()
    pattern = torch.cat(signs, 1)
    return 1 + int((pattern[1:] != pattern[:-1]).any(1).sum())
