"""Kolmogorov-Arnold layers whose one-dimensional functions are made from an ordinary activation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, check_positive, unknown
from pomona.nn.activation import act as make_act
from pomona.nn.check import check_input

FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "quad1": lambda a, b: (a * b).square(),
    "quad2": lambda a, b: a * b + a.square() + b.square(),
    "sum": lambda a, b: a + b,
    "prod": lambda a, b: a * b,
    "sum_prod": lambda a, b: a + b + a * b,
    "cubic1": lambda a, b: (a + b) * (a.square() + b.square()),
    "cubic2": lambda a, b: (a * b) ** 3,
}
"""How the rising activation a = act(x - s) and the falling one b = act(e - x) are combined."""

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": nn.LayerNorm,
    "batch": nn.BatchNorm1d,
    "none": lambda features: nn.Identity(),
}
METHODS = ("global_attn", "multistep", "spatial_attn")


def windows(grid: int, k: int) -> tuple[Tensor, Tensor]:
    """Left and right ends of grid + k overlapping windows: s_m = (m - k) / grid, e_m = s_m + (k + 1) / grid."""
    check_positive(grid=grid)
    if k < 0:
        raise PomonaError(f"k={k} must be 0 or more: each window covers k + 1 intervals")
    low = torch.arange(-k, grid) / grid
    return low, low + (k + 1) / grid


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    return norm(x.reshape(-1, x.shape[-1])).view_as(x)  # batch norm wants two dimensions


class ReLUKANLayer(nn.Module):
    """y = W R(x) + b,  R_m(x_i) = (relu(e_im - x_i) relu(x_i - s_im))^2 16 grid^4 / (k + 1)^4: the ReLU-KAN layer.

    R_m is a bump of height 1 on [s_m, e_m] as long as e_m - s_m is what it was at first. Beyond [-k / grid,
    1 + k / grid] all are zero, so that inputs should lie in [0, 1] or be normalised.

    Args:
        in_features, out_features, bias: as in `torch.nn.Linear`.
        grid: intervals of [0, 1].
        k: each bump covers k + 1 intervals.
        trainable: whether the ends s and e of each input's bumps are trained.
        norm: of the input: layer, batch or none.

    Shape:
        (*, in_features) -> (*, out_features)

    Source: ReLU-KAN: New Kolmogorov-Arnold Networks that Only Need Matrix Addition, Dot Multiplication, and ReLU
    (arXiv 2406.02075); with a norm as the baseline of arXiv 2503.06112.
    """

    tunable = {"grid": [3, 5, 8], "norm": ["none", "layer"]}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        grid: int = 5,
        k: int = 3,
        trainable: bool = True,
        norm: str = "none",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_positive(in_features=in_features, out_features=out_features)
        if norm not in NORMS:
            raise unknown("norm", norm, NORMS)
        self.in_features, self.out_features, self.grid, self.k = in_features, out_features, grid, k
        low, high = windows(grid, k)
        self.low = nn.Parameter(low.repeat(in_features, 1), requires_grad=trainable)
        self.high = nn.Parameter(high.repeat(in_features, 1), requires_grad=trainable)
        self.norm = NORMS[norm](in_features)
        fan = in_features * (grid + k)

        def drawn(*shape: int) -> nn.Parameter:  # as in torch.nn.Linear
            return nn.Parameter(torch.empty(shape).uniform_(-(fan**-0.5), fan**-0.5, generator=generator))

        self.weight = drawn(out_features, fan)
        self.bias = drawn(out_features) if bias else None

    def basis(self, x: Tensor) -> Tensor:
        """R: (*, in_features) -> (*, in_features, grid + k)"""
        x = x[..., None]
        return (F.relu(self.high - x) * F.relu(x - self.low)).square() * (16 * (self.grid / (self.k + 1)) ** 4)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        check_input(self, x, self.in_features)
        return F.linear(self.basis(_normed(self.norm, x)).flatten(-2), self.weight, self.bias)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.in_features}, {self.out_features}, grid={self.grid}, k={self.k}"


class AFKANLayer(nn.Module):
    """y = W act(norm(z)): z_i is one number made from the grid + k functions f(act(x_i - s_m), act(e_m - x_i)).

    A linear layer's weights and little more: the functions are shared by all inputs, and reduced to one number
    an input before they meet W. With F (in, grid + k) their values and L a linear map from grid + k to 1:

    - global_attn: z_i = sum_m F_im w_i,  w = softmax over the inputs i of L(F_i) / T.
    - multistep: z_i = L(F_i).
    - spatial_attn: z_i = sum_m F_im w_im,  w = softmax over the functions m of C(F) / T, with C a convolution of
      width 3 over the inputs, for each m its own.

    T is trained, starts at sqrt(in_features) and acts as at least 1.

    Args:
        in_features, out_features: sizes; there is no bias, as in the paper.
        grid: intervals of [0, 1].
        k: each window [s_m, e_m] covers k + 1 intervals.
        act: name of the activation.
        func: quad1 (ab)^2, quad2 ab + a^2 + b^2, sum a + b, prod ab, sum_prod a + b + ab,
            cubic1 (a + b)(a^2 + b^2) or cubic2 (ab)^3.
        reduce: global_attn, multistep or spatial_attn.
        norm: of z: layer, batch or none.
        func_norm: range over which F is brought to [0, 1]: each sample's own, the whole batch's as in the
            authors' code (outputs then depend on the rest of the batch), or none. The paper divides by the L2
            norm first, which cancels here.
        trainable: whether s and e are trained.

    Shape:
        (*, in_features) -> (*, out_features)

    Source: AF-KAN: Activation Function-Based Kolmogorov-Arnold Networks for Efficient Representation Learning
    (arXiv 2503.06112).
    """

    tunable = {"grid": [3, 5], "reduce": list(METHODS)}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        grid: int = 3,
        k: int = 3,
        act: str = "silu",
        func: str = "quad1",
        reduce: str = "global_attn",
        norm: str = "layer",
        func_norm: Literal["sample", "batch", "none"] = "sample",
        trainable: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_positive(in_features=in_features, out_features=out_features)
        for name, value, known in (
            ("func", func, FUNCTIONS),
            ("reduce", reduce, METHODS),
            ("norm", norm, NORMS),
            ("func_norm", func_norm, ("sample", "batch", "none")),
        ):
            if value not in known:
                raise unknown(name, value, known)
        self.in_features, self.out_features, self.grid, self.k = in_features, out_features, grid, k
        self.func, self.reduce, self.func_norm = func, reduce, func_norm
        self.low, self.high = (nn.Parameter(end, requires_grad=trainable) for end in windows(grid, k))
        self.act = make_act(act)
        count = grid + k
        self.score: nn.Module = (
            nn.Conv1d(count, count, 3, padding=1, groups=count) if reduce == "spatial_attn" else nn.Linear(count, 1)
        )
        self.temperature = None if reduce == "multistep" else nn.Parameter(torch.tensor(math.sqrt(in_features)))
        self.norm = NORMS[norm](in_features)
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        bound = (3 if reduce == "spatial_attn" else count) ** -0.5
        for parameter in self.score.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5), generator=generator)

    def functions(self, x: Tensor) -> Tensor:
        """F: (*, in_features) -> (*, in_features, grid + k)"""
        x = x[..., None]
        values = FUNCTIONS[self.func](self.act(x - self.low), self.act(self.high - x))
        if self.func_norm == "none" or not values.numel():
            return values
        dims = (-2, -1) if self.func_norm == "sample" else tuple(range(values.dim()))
        least, most = values.amin(dims, keepdim=True), values.amax(dims, keepdim=True)
        return (values - least) / (most - least).clamp(min=torch.finfo(values.dtype).tiny)

    def attention(self, values: Tensor) -> Tensor:
        """The weights w of F: (*, in, grid + k) -> (*, in, 1) for global_attn, (*, in, grid + k) for spatial_attn."""
        temperature = self.temperature.clamp(min=1)  # type: ignore[union-attr]
        if self.reduce == "global_attn":
            return torch.softmax(self.score(values) / temperature, -2)
        rows = values.reshape(-1, *values.shape[-2:])
        return torch.softmax(self.score(rows.mT).mT.reshape(values.shape) / temperature, -1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        check_input(self, x, self.in_features)
        values = self.functions(x)
        if self.reduce == "multistep":
            z = self.score(values).squeeze(-1)
        else:
            z = (values * self.attention(values)).sum(-1)
        return F.linear(self.act(_normed(self.norm, z)), self.weight)

    def extra_repr(self) -> str:
        """Sizes and choices."""
        return (
            f"{self.in_features}, {self.out_features}, grid={self.grid}, k={self.k}, func={self.func}, "
            f"reduce={self.reduce}, func_norm={self.func_norm}"
        )
