"""Layers that add, subtract and multiply exactly once their weights are -1, 0 or 1, and the units they improve on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, check_positive, unknown
from pomona.nn.check import check_input

Net = TypeVar("Net", bound=nn.Module)


class _Arithmetic(nn.Module):
    """Sizes, and what every unit says about how far its ``weights()`` are from -1, 0 and 1."""

    def __init__(self, in_features: int, out_features: int) -> None:
        check_positive(in_features=in_features, out_features=out_features)
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    def weights(self) -> list[Tensor]:
        """The matrices W, (out_features, in_features), as they act."""
        raise NotImplementedError

    def sparsity_error(self) -> Tensor:
        """The largest min(|W|, 1 - |W|): 0 where all weights are -1, 0 or 1, 1/2 at worst."""
        return torch.stack([_distance(w).max() for w in self.weights()]).max()

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        return f"{self.in_features}, {self.out_features}"


def _distance(weight: Tensor) -> Tensor:
    size = weight.abs()
    return torch.minimum(size, 1 - size).abs()


class _Regularised(_Arithmetic):
    """Weights held in [low, 1] by `post_step` and drawn to the integers by `aux_loss`."""

    low: float
    step: Tensor

    def __init__(self, in_features: int, out_features: int, strength: float, ramp: tuple[int, int]) -> None:
        super().__init__(in_features, out_features)
        if strength < 0:
            raise PomonaError(f"strength={strength} must be 0 or more")
        if not 0 <= ramp[0] < ramp[1]:
            raise PomonaError(f"ramp={ramp} must be the step at which the regulariser sets in and a later one")
        self.strength, self.ramp = strength, ramp
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def weights(self) -> list[Tensor]:
        """See the base class."""
        return [self.weight]

    def regulariser(self) -> Tensor:
        """R = mean min(|W|, 1 - |W|)"""
        return _distance(self.weight).mean()

    def aux_loss(self) -> Tensor:
        """R strength clip((t - t_0) / (t_1 - t_0), 0, 1), t being the steps that `post_step` counted."""
        start, end = self.ramp
        return self.strength * ((self.step - start) / (end - start)).clamp(0, 1).to(self.weight) * self.regulariser()

    def post_step(self) -> None:
        """Bring the weights back into their range, and count the step."""
        self.weight.copy_(self.weight.clamp(self.low, 1))
        self.step.add_(1)


class NAU(_Regularised):
    """Neural addition unit: y = W x, W in [-1, 1].

    Args:
        in_features, out_features: sizes.
        strength: the largest weight of the regulariser.
        ramp: steps t_0, t_1 between which that weight rises; see `set_steps`.
        generator: source of the initial values, U(-r, r) with r = min(1/2, sqrt(6 / (in + out))).

    Shape:
        (*, in_features) -> (*, out_features)

    Raises:
        PomonaError: for a size, strength or ramp out of range.

    Source: Neural Arithmetic Units (arXiv 2001.05016).
    """

    low = -1.0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        strength: float = 0.01,
        ramp: tuple[int, int] = (2000, 3500),
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(in_features, out_features, strength, ramp)
        reach = min(0.5, (6 / (in_features + out_features)) ** 0.5)
        nn.init.uniform_(self.weight, -reach, reach, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """W x"""
        check_input(self, x, self.in_features)
        return F.linear(x, self.weight)


class NMU(_Regularised):
    """Neural multiplication unit: y_o = prod_i (W_oi x_i + 1 - W_oi), W in [0, 1].

    A weight of 1 takes the factor, a weight of 0 leaves it out.

    Args:
        in_features, out_features: sizes.
        strength: the largest weight of the regulariser.
        ramp: steps t_0, t_1 between which that weight rises; see `set_steps`.
        generator: source of the initial values, U(1/4, 3/4).

    Shape:
        (*, in_features) -> (*, out_features); memory of in_features out_features an example.

    Raises:
        PomonaError: for a size, strength or ramp out of range.

    Source: Neural Arithmetic Units (arXiv 2001.05016).
    """

    low = 0.0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        strength: float = 10.0,
        ramp: tuple[int, int] = (2000, 3500),
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(in_features, out_features, strength, ramp)
        nn.init.uniform_(self.weight, 0.25, 0.75, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """prod_i (W_oi x_i + 1 - W_oi)"""
        check_input(self, x, self.in_features)
        # 1 - W first: with W = 1 the factor is then x to the last bit
        return (self.weight * x[..., None, :] + (1 - self.weight)).prod(-1)


class NAC(_Arithmetic):
    """Neural accumulator: y = W x,  W = tanh(What) sigmoid(Mhat), both Glorot uniform at first.

    Shape:
        (*, in_features) -> (*, out_features)

    Source: Neural Arithmetic Logic Units (arXiv 1808.00508).
    """

    def __init__(self, in_features: int, out_features: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(in_features, out_features)
        self.w_hat = nn.Parameter(torch.empty(out_features, in_features))
        self.m_hat = nn.Parameter(torch.empty(out_features, in_features))
        for matrix in (self.w_hat, self.m_hat):
            nn.init.xavier_uniform_(matrix, generator=generator)

    @property
    def weight(self) -> Tensor:
        """W"""
        return self.w_hat.tanh() * self.m_hat.sigmoid()

    def weights(self) -> list[Tensor]:
        """See the base class."""
        return [self.weight]

    def forward(self, x: Tensor) -> Tensor:
        """W x"""
        check_input(self, x, self.in_features)
        return F.linear(x, self.weight)


class NACMul(NAC):
    """The accumulator on logarithms: y = exp(W log(|x| + eps)). It loses the sign and is steep near 0.

    Shape:
        (*, in_features) -> (*, out_features)

    Source: Neural Arithmetic Logic Units (arXiv 1808.00508).
    """

    def __init__(
        self, in_features: int, out_features: int, eps: float = 1e-7, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(in_features, out_features, generator=generator)
        check_positive(eps=eps)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """exp(W log(|x| + eps))"""
        check_input(self, x, self.in_features)
        return super().forward(torch.log(x.abs() + self.eps)).exp()


class _Gated(_Arithmetic):
    """g(x) add(x) + (1 - g(x)) multiply(x),  g = sigmoid(G x)"""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        add: _Arithmetic,
        multiply: _Arithmetic,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__(in_features, out_features)
        self.add, self.multiply = add, multiply
        self.gate = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.xavier_uniform_(self.gate, generator=generator)

    def weights(self) -> list[Tensor]:
        """See the base class."""
        return self.add.weights() + self.multiply.weights()

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        check_input(self, x, self.in_features)
        g = F.linear(x, self.gate).sigmoid()
        return g * self.add(x) + (1 - g) * self.multiply(x)


class NALU(_Gated):
    """Neural arithmetic logic unit: an accumulator and its logarithmic form, mixed by a gate.

    y = g a + (1 - g) m,  a = W x,  m = exp(W log(|x| + eps)),  g = sigmoid(G x)

    Args:
        in_features, out_features: sizes.
        eps: beside |x|.
        shared: a and m have one W, as published; otherwise each its own.
        generator: source of the initial values, Glorot uniform.

    Shape:
        (*, in_features) -> (*, out_features)

    Source: Neural Arithmetic Logic Units (arXiv 1808.00508).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-7,
        shared: bool = True,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        add = NAC(in_features, out_features, generator=generator)
        multiply = NACMul(in_features, out_features, eps, generator=generator)
        if shared:
            multiply.w_hat, multiply.m_hat = add.w_hat, add.m_hat
        super().__init__(in_features, out_features, add, multiply, generator)


class GatedNMU(_Gated):
    """A `NAU` and a `NMU` mixed by the gate of `NALU`: y = g NAU(x) + (1 - g) NMU(x).

    Shape:
        (*, in_features) -> (*, out_features)

    Source: a baseline of Neural Arithmetic Units (arXiv 2001.05016).
    """

    def __init__(self, in_features: int, out_features: int, *, generator: torch.Generator | None = None) -> None:
        add, multiply = (kind(in_features, out_features, generator=generator) for kind in (NAU, NMU))
        super().__init__(in_features, out_features, add, multiply, generator)


UNITS: dict[str, Callable[[int, int], _Arithmetic]] = {
    "nau": NAU,
    "nmu": NMU,
    "nac": NAC,
    "nac_mul": NACMul,
    "nalu": NALU,
    "gated_nmu": GatedNMU,
}
"""Units by name."""


def arithmetic_net(first: str, second: str, in_features: int, hidden: int = 2, steps: int = 10_000) -> nn.Sequential:
    """Two units, the first to choose the operands and the second to combine them: (*, in_features) -> (*, 1).

    Args:
        first, second: names of units; 'nau' and 'nmu' to multiply, 'nau' and 'nau' to add and subtract.
        in_features: numbers given.
        hidden: operands.
        steps: of the training, for the ramps of the regularisers.

    Raises:
        PomonaError: for an unknown unit.
    """
    for unit in (first, second):
        if unit not in UNITS:
            raise unknown("unit", unit, UNITS)
    return set_steps(nn.Sequential(UNITS[first](in_features, hidden), UNITS[second](hidden, 1)), steps)


def set_steps(net: Net, steps: int) -> Net:
    """Let the regularisers of all NAUs and NMUs rise from 20 % to 35 % of a training of ``steps``, in place."""
    check_positive(steps=steps)
    start = steps // 5
    for module in net.modules():
        if isinstance(module, _Regularised):
            module.ramp = (start, max(start + 1, steps * 7 // 20))
    return net


def sparsity_error(net: nn.Module) -> float:
    """The largest `sparsity_error` of the units in a network.

    Raises:
        PomonaError: if it has none.
    """
    units = [module for module in net.modules() if isinstance(module, _Arithmetic)]
    if not units:
        raise PomonaError("net has no arithmetic unit whose weights could be near an integer")
    return max(unit.sparsity_error().item() for unit in units)
