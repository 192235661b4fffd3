"""Scalable neural network kernels: a layer f(W x + b) as a product of random features of x and of its weights.

Source: Scalable Neural Network Kernels, arXiv 2310.13225.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, check_positive, unknown
from pomona.nn.check import check_input

Draw = Callable[[int, torch.Generator | None], tuple[Tensor, Tensor]]


def _signs(m: int, generator: torch.Generator | None) -> Tensor:
    return torch.randint(2, (m,), generator=generator, dtype=torch.float64) * 2 - 1


def _sine(m: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    sign = _signs(m, generator)
    return 1j * sign, -1j * sign


def _cosine(m: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    sign = _signs(m, generator)
    return 1j * sign, torch.ones_like(sign)


def _gaussian(m: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    frequency = torch.randn(m, generator=generator, dtype=torch.float64)
    return 1j * frequency, torch.ones_like(frequency)


def _exponential(m: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    return torch.ones(m, dtype=torch.float64), torch.ones(m, dtype=torch.float64)


FUNCTIONS: dict[str, Draw] = {"sin": _sine, "cos": _cosine, "gauss": _gaussian, "exp": _exponential}
"""f as an average of exponentials, f(z) = E[weight exp(a z)]: draws of a = 2 pi i s and of weight = tau(s) / p(s),
where tau is the Fourier transform of f and p the density of s. 'gauss' is exp(-z^2 / 2)."""
LARGEST_EXPONENT = 30.0
"""Exponents are cut here: features of so large a variance say nothing, but must not overflow."""


def gaussian_directions(
    rows: int, columns: int, orthogonal: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """Random g (rows, columns), each row N(0, I); in blocks of ``columns`` rows orthogonal where asked for."""
    if not orthogonal:
        return torch.randn(rows, columns, generator=generator)
    blocks = -(-rows // columns)
    q, r = torch.linalg.qr(torch.randn(blocks, columns, columns, generator=generator))
    square = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]  # the signs make q uniform over the rotations
    lengths = torch.randn(rows, columns, generator=generator).norm(dim=1, keepdim=True)
    return square.mT.flatten(0, 1)[:rows] * lengths


class SNNK(nn.Module):
    """A layer f(W x + b) whose cost and trained weights do not depend on the product of its sizes.

    y_o = Re <Phi(x), Psi(w_o, b_o)>, an unbiased estimate of f(w_o x + b_o) from random features:

    Phi_j(x) = m^(-1/2) exp(c_j g_j x - c_j^2 |x|^2 / 2),  c_j^2 = a_j,  g_j ~ N(0, I)
    Psi_j(w, b) = weight_j exp(a_j b) Phi_j(w),  f(z) = E[weight exp(a z)]

    For f = 'relu' Phi(x) = relu(G x) / sqrt(m) and Psi the same of w, plus b: the arc-cosine kernel of order 1,
    |x| |w| (sin t + (pi - t) cos t) / (2 pi) for the angle t between them, in the place of relu itself. The others
    need inputs of norm about 1; their variance grows exponentially with it.

    Args:
        in_features, out_features: sizes.
        m: real features; of 'sin', 'cos' and 'gauss' two come from each draw, so that m is even. By default half of
            in_features, at least 2.
        f: 'relu', 'sin', 'cos', 'gauss' or 'exp'.
        bias: whether the layer that is replaced has a b.
        mode: 'trainable' (Psi is a parameter, and W only its start) or 'frozen' (a constant).
        orthogonal: orthogonal g by blocks, for less variance.
        positive: A >= 0, features (1 + 4 A)^(d/4) exp(-A |g|^2 + sqrt(1 + 4 A) c g x - c^2 |x|^2 / 2) with a variance
            that a good A lowers.
        normalize: divide x (and w) by its norm first.
        generator: source of the random numbers.

    Without a layer to replace (see `like`) W is drawn so that W x has unit variance for such x; for 'relu' Psi is
    drawn so that the outputs do.

    Shape:
        (*, in_features) -> (*, out_features)

    Raises:
        PomonaError: for an unknown f or mode, an odd m where it must be even, or a negative A.

    Source: Scalable Neural Network Kernels, arXiv 2310.13225.
    """

    directions: Tensor
    exponent: Tensor
    strength: Tensor
    psi: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        m: int | None = None,
        f: str = "relu",
        bias: bool = True,
        *,
        mode: str = "trainable",
        orthogonal: bool = True,
        positive: float = 0.0,
        normalize: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        m = max(2, in_features // 4 * 2) if m is None else m
        check_positive(in_features=in_features, out_features=out_features, m=m)
        if f not in ("relu", *FUNCTIONS):
            raise unknown("f", f, ("relu", *FUNCTIONS))
        if mode not in ("trainable", "frozen"):
            raise unknown("mode", mode, ("trainable", "frozen"))
        self.complex = f in ("sin", "cos", "gauss")
        if self.complex and m % 2:
            raise PomonaError(f"m={m} must be even for f={f!r}, which has two features a draw")
        if positive < 0:
            raise PomonaError(f"positive={positive} must be at least 0")
        self.in_features, self.out_features, self.m, self.f = in_features, out_features, m, f
        self.mode, self.positive, self.normalize = mode, positive, normalize
        draws = m // 2 if self.complex else m
        self.register_buffer("directions", gaussian_directions(draws, in_features, orthogonal, generator))
        if f != "relu":
            a, strength = FUNCTIONS[f](draws, generator)
            # real and imaginary part as rows, since buffers must be real to take part in .to(dtype)
            self.register_buffer("exponent", torch.view_as_real(a + 0j).T.float())
            self.register_buffer("strength", torch.view_as_real(strength + 0j).T.float())
        psi = torch.empty(out_features, m)
        if f == "relu":
            psi.normal_(0, math.sqrt(2) if normalize else math.sqrt(2 / in_features), generator=generator)
        else:
            weight = torch.empty(out_features, in_features).normal_(0, in_features**-0.5, generator=generator)
            psi = self.weight_features(weight, torch.zeros(out_features))
        own_bias = torch.zeros(out_features) if bias and f == "relu" else None
        if mode == "trainable":
            self.psi = nn.Parameter(psi)
            self.bias = None if own_bias is None else nn.Parameter(own_bias)
        else:
            self.register_buffer("psi", psi)
            self.register_buffer("bias", own_bias)

    @classmethod
    @torch.no_grad()
    def like(cls, linear: nn.Linear, m: int | None = None, f: str = "relu", **options: Any) -> Self:
        """The layer f(linear(x)) as random features: what `swap` wants as ``make``."""
        layer = cls(linear.in_features, linear.out_features, m, f, linear.bias is not None, **options)
        layer.to(linear.weight.device, linear.weight.dtype)
        bias = linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
        layer.psi.copy_(layer.weight_features(linear.weight, bias))
        if layer.bias is not None:
            layer.bias.copy_(bias)
        return layer.train(linear.training)

    def _parts(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        """Real and imaginary parts (*, 2, draws) of the features of x times exp(a factor).

        The exponent is c g x sqrt(1 + 4 A) - a |x|^2 / 2 - A |g|^2 + (d / 4) log(1 + 4 A) + a factor.
        """
        a_real, a_imag = self.exponent
        size = torch.hypot(a_real, a_imag)
        # the principal root of a
        c_real, c_imag = ((size + a_real) / 2).sqrt(), a_imag.sign() * ((size - a_real) / 2).sqrt()
        along = F.linear(x, self.directions) * math.sqrt(1 + 4 * self.positive)
        half = x.square().sum(-1, keepdim=True) / 2
        shift = self.in_features / 4 * math.log1p(4 * self.positive)
        shrink = shift - self.positive * self.directions.square().sum(-1)
        real, imag = c_real * along - a_real * half + shrink, c_imag * along - a_imag * half
        if factor is not None:
            real, imag = real + factor * a_real, imag + factor * a_imag
        size = real.clamp(max=LARGEST_EXPONENT).exp() / math.sqrt(len(self.directions))
        return torch.stack([size * imag.cos(), size * imag.sin()], -2)

    def _scaled(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if self.normalize else x

    def features(self, x: Tensor) -> Tensor:
        """Phi(x): (*, in_features) -> (*, m), real parts first."""
        x = self._scaled(x)
        if self.f == "relu":
            return F.relu(F.linear(x, self.directions)) / math.sqrt(self.m)
        parts = self._parts(x)
        return parts.flatten(-2) if self.complex else parts[..., 0, :]

    def weight_features(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Psi(w, b): weight (out, in_features), bias (out,) -> (out, m), so that <Phi, Psi> is the real part."""
        weight = self._scaled(weight)
        if self.f == "relu":
            return F.relu(F.linear(weight, self.directions)) / math.sqrt(self.m)
        real, imag = self._parts(weight, bias[..., None]).unbind(-2)
        s_real, s_imag = self.strength
        real, imag = real * s_real - imag * s_imag, real * s_imag + imag * s_real
        return torch.cat([real, -imag], -1) if self.complex else real

    def forward(self, x: Tensor) -> Tensor:
        """<Phi(x), Psi> (+ b)."""
        check_input(self, x, self.in_features)
        return F.linear(self.features(x), self.psi, self.bias)

    def n_params(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def flops(self, batch: int = 1) -> int:
        """The projection and the product with Psi, a multiply-add counting as two."""
        return 2 * batch * (self.directions.numel() + self.psi.numel())

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        return f"{self.in_features}, {self.out_features}, m={self.m}, f={self.f!r}, mode={self.mode!r}"


class SNNKAdapter(nn.Module):
    """A residual adapter x + SNNK(x), the identity at the start; it trains d m + d numbers.

    Args:
        features: d.
        m: random features.
        **options: of `SNNK`.

    Shape:
        (*, features) -> (*, features)

    Source: Scalable Neural Network Kernels, arXiv 2310.13225.
    """

    def __init__(self, features: int, m: int, **options: Any) -> None:
        super().__init__()
        self.layer = SNNK(features, features, m, **options)
        nn.init.zeros_(self.layer.psi)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x + self.layer(x)


class Bundle(nn.Module):
    """k layers of ReLU features in one: y = Phi_k(x) W^T + b, with the maps between the layers merged.

    Phi_1(x) = relu(G_1 x) / sqrt(m),  Phi_{l+1} = relu(M_l Phi_l + c_l) / sqrt(m),  M_l = G_{l+1} Psi_l (m x m)

    Args:
        maps: (G_1, zeros), (M_1, c_1), ...: pairs of a matrix (m, m or in_features) and a vector (m,).
        weight, bias: W (out, m) and b (out,).
        train_maps: whether the maps are trained beside W and b.

    Shape:
        (*, in_features) -> (*, out)

    Source: Scalable Neural Network Kernels, arXiv 2310.13225.
    """

    def __init__(
        self, maps: list[tuple[Tensor, Tensor]], weight: Tensor, bias: Tensor, train_maps: bool = False
    ) -> None:
        super().__init__()
        self.maps = nn.ParameterList(nn.Parameter(m, train_maps) for m, _ in maps)
        self.shifts = nn.ParameterList(nn.Parameter(c, train_maps) for _, c in maps)
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def features(self, x: Tensor) -> Tensor:
        """Phi_k(x), (*, m)."""
        check_input(self, x, self.maps[0].shape[1])
        for m, c in zip(self.maps, self.shifts, strict=True):
            x = F.relu(F.linear(x, m, c)) / math.sqrt(len(c))
        return x

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return F.linear(self.features(x), self.weight, self.bias)

    @torch.no_grad()
    def fit_closed_form(self, x: Tensor, y: Tensor, ridge: float = 1e-3) -> Self:
        """Set W and b to the minimum of ||Phi_k(x) W^T + b - y||^2 + ridge ||W||^2; nothing else is trained.

        Args:
            x: (n, in_features).
            y: (n, out), or class indices (n,), which become one-hot.
            ridge: above 0.
        """
        check_positive(ridge=ridge)
        if y.dim() == 1:
            y = F.one_hot(y, len(self.bias))
        phi, target = self.features(x).double(), y.double()
        phi_mean, target_mean = phi.mean(0), target.mean(0)
        phi, target = phi - phi_mean, target - target_mean
        gram = phi.T @ phi
        gram.diagonal().add_(ridge)
        weight = torch.cholesky_solve(phi.T @ target, torch.linalg.cholesky(gram))
        self.weight.copy_(weight.T)
        self.bias.copy_(target_mean - phi_mean @ weight)
        return self


@torch.no_grad()
def bundle(
    net: nn.Sequential,
    layers: int,
    m: int,
    *,
    train_maps: bool = False,
    orthogonal: bool = True,
    generator: torch.Generator | None = None,
) -> nn.Sequential:
    """A perceptron whose first ``layers`` pairs of Linear and ReLU are one `Bundle`; what follows is copied as it is.

    Args:
        net: Linear, ReLU, Linear, ...; with ``layers`` as many as there are ReLUs, a last Linear is merged in, too.
        m: features of each layer.
        train_maps: also train the merged maps.
        orthogonal, generator: of the random directions.

    Raises:
        PomonaError: if the network does not start with so many pairs.

    Source: Scalable Neural Network Kernels, arXiv 2310.13225.
    """
    modules = list(net)
    pairs = list(zip(modules[0 : 2 * layers : 2], modules[1 : 2 * layers : 2], strict=False))
    if (
        layers < 1
        or len(pairs) < layers
        or not all(isinstance(a, nn.Linear) and isinstance(b, nn.ReLU) for a, b in pairs)
    ):
        raise PomonaError(f"layers={layers}: the network must start with so many pairs of nn.Linear and nn.ReLU")
    maps: list[tuple[Tensor, Tensor]] = []
    ends: list[tuple[Tensor, Tensor]] = []
    for linear, _ in pairs:
        one = SNNK.like(linear, m, orthogonal=orthogonal, generator=generator)  # type: ignore[arg-type]
        g, bias = one.directions, one.psi.new_zeros(one.out_features) if one.bias is None else one.bias
        maps.append((g @ ends[-1][0], g @ ends[-1][1]) if ends else (g, g.new_zeros(m)))
        ends.append((one.psi.detach(), bias.detach()))
    rest = modules[2 * layers :]
    weight, shift = ends[-1]
    if len(rest) == 1 and isinstance(last := rest[0], nn.Linear):
        rest, shift = [], F.linear(shift, last.weight, last.bias)
        weight = last.weight @ weight
    return nn.Sequential(Bundle(maps, weight, shift, train_maps), *copy.deepcopy(rest))


def fully_bundled(net: nn.Sequential, m: int, **options: Any) -> Bundle:
    """A whole perceptron Linear, ReLU, ..., Linear as one `Bundle`; arguments as in `bundle`.

    Source: Scalable Neural Network Kernels, arXiv 2310.13225.
    """
    whole = bundle(net, len(net) // 2, m, **options)
    if len(whole) > 1:
        raise PomonaError(f"net must be pairs of nn.Linear and nn.ReLU and a last nn.Linear, not {net}")
    return whole[0]  # type: ignore[return-value]
