"""Heads for ordered bins: the Fourier head, which learns a density on [-1, 1], and what it is compared with.

Every head maps features to the logits of ``out_features`` bins that divide [-1, 1] evenly. `Binning` brings real values
there and back; `smoothness` says how rough a head's distributions are.

Source: Fourier Head: Helping Large Language Models Learn Complex Probability Distributions (arXiv 2410.22269).
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, check_positive, unknown
from pomona.nn.check import check_input

FFT_FROM = 64
"""Frequencies above which the autocorrelation is computed by FFT."""


def autocorrelation(a: Tensor, method: str = "auto") -> Tensor:
    """c_k = sum_{l=0}^{N-k} a_l conj(a_{l+k}), k = 0..N.

    Complex numbers are pairs of real ones, so that half precision works: (*, 2, N + 1) -> (*, 2, N + 1).

    Args:
        a: real parts a[..., 0, :] and imaginary parts a[..., 1, :].
        method: 'direct', 'fft', or 'auto', which is 'fft' for more than 64 frequencies.

    Raises:
        PomonaError: if the method is unknown.
    """
    n = a.shape[-1]
    if method == "auto":
        method = "fft" if n - 1 > FFT_FROM else "direct"
    if method == "fft":
        power = torch.fft.fft(torch.complex(*a.unbind(-2)), 2 * n).abs().square()
        return torch.view_as_real(torch.fft.fft(power)[..., :n] / (2 * n)).movedim(-1, -2)
    if method != "direct":
        raise unknown("method", method, ("direct", "fft", "auto"))
    shifted = F.pad(a, (0, n - 1)).unfold(-1, n, 1)  # [..., k, l] = a_{l+k}
    (re, im), (re_k, im_k) = a[..., None, :].unbind(-3), shifted.unbind(-3)
    return torch.stack([(re * re_k + im * im_k).sum(-1), (im * re_k - re * im_k).sum(-1)], -2)


class BinHead(nn.Module):
    """Features to the logits of bins with centres z_j = -1 + (2j + 1) / out_features."""

    centres: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        check_positive(in_features=in_features, out_features=out_features)
        self.in_features, self.out_features = in_features, out_features
        centres = (2 * torch.arange(out_features, dtype=torch.float64) + 1) / out_features - 1
        self.register_buffer("centres", centres.to(torch.get_default_dtype()), persistent=False)

    def pmf(self, x: Tensor) -> Tensor:
        """Probabilities of the bins: (*, in_features) -> (*, out_features)"""
        return self(x).softmax(-1)

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        return f"{self.in_features}, {self.out_features}"


class FourierHead(BinHead):
    """A density on [-1, 1] by its Fourier series, read off at the bins.

    p(z) = 1/2 + Re sum_{k=1}^N (c_k / c_0) e^{i k pi z},  c the autocorrelation of a_0..a_N = W x + b (complex)

    This is |sum_l a_l e^{-i l pi z}|^2 / (2 c_0), never negative and of integral 1. The logits are log(p_j + eps) of
    the values at the centres, normalised over the bins, so that cross-entropy takes them as it takes any others. The
    bins must have an order; p(-1) = p(1).

    Args:
        in_features: size of the last axis of the input.
        out_features: number of bins.
        n_freq: N, below half the bins (Nyquist); by default the most that are, up to 12, and 1 at least.
        gamma: weight of the penalty 4 pi^2 mean sum_k k^2 |c_k|^2 in `aux_loss`.
        eps: added to the probabilities.
        penalty: 'normalised' takes c_k / c_0, which makes it 4 gamma times the integral of p'(z)^2; 'raw' takes c_k
            as they are.

    Shape:
        (*, in_features) -> (*, out_features); 2 (N + 1) (in_features + 1) parameters.

    Raises:
        PomonaError: for a number out of range or an unknown penalty.

    Source: Fourier Head: Helping Large Language Models Learn Complex Probability Distributions (arXiv 2410.22269).
    """

    at_centres: Tensor
    tunable = {"n_freq": [4, 8, 12, 16]}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n_freq: int | None = None,
        gamma: float = 0.0,
        eps: float = 1e-5,
        penalty: str = "normalised",
    ) -> None:
        super().__init__(in_features, out_features)
        n_freq = max(1, min(12, (out_features - 1) // 2)) if n_freq is None else n_freq
        if n_freq < 0 or gamma < 0:
            raise PomonaError(f"n_freq={n_freq} and gamma={gamma} must be 0 or more")
        check_positive(eps=eps)
        if penalty not in ("normalised", "raw"):
            raise unknown("penalty", penalty, ("normalised", "raw"))
        if n_freq > 1 and 2 * n_freq >= out_features:
            warnings.warn(f"n_freq={n_freq} is not below half of {out_features} bins: frequencies alias", stacklevel=2)
        self.n_freq, self.gamma, self.eps, self.penalty = n_freq, gamma, eps, penalty
        self.linear = nn.Linear(in_features, 2 * (n_freq + 1))
        with torch.no_grad():
            for parameter in self.linear.parameters():
                parameter.div_(100)
        at_centres = self._matrix(self.centres.double()).to(self.centres)
        self.register_buffer("at_centres", at_centres, persistent=False)
        self._penalty: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        # the penalty of the last batch hangs on its graph, which cannot be copied
        return {**self.__dict__, "_penalty": None}

    def _wave(self, z: Tensor) -> Tensor:
        """The cosine and sine of k pi z: (*, m) -> (2, *, N + 1, m)"""
        angle = math.pi * torch.arange(self.n_freq + 1, device=z.device).to(z)[:, None] * z[..., None, :]
        return torch.stack([angle.cos(), angle.sin()])

    def amplitudes(self, x: Tensor) -> Tensor:
        """a, real and imaginary: (*, in_features) -> (*, 2, N + 1)"""
        check_input(self, x, self.in_features)
        return self.linear(x).unflatten(-1, (2, self.n_freq + 1))

    def coefficients(self, x: Tensor, normalised: bool = True) -> Tensor:
        """c_k, real and imaginary: (*, in_features) -> (*, 2, N + 1); divided by c_0 if ``normalised``."""
        return self._coefficients(self.amplitudes(x), normalised)

    @staticmethod
    def _coefficients(a: Tensor, normalised: bool) -> Tensor:
        c = autocorrelation(a)
        return c / _positive(c[..., :1, :1]) if normalised else c

    def _matrix(self, z: Tensor) -> Tensor:
        """What maps a to sum_l a_l e^{-i l pi z}, real and imaginary parts one after the other."""
        cos, sin = self._wave(z)
        return torch.cat([torch.cat([cos, -sin], -1), torch.cat([sin, cos], -1)], -2)

    @staticmethod
    def _power(a: Tensor, matrix: Tensor) -> Tensor:
        """|sum_l a_l e^{-i l pi z}|^2"""
        return (a.flatten(-2)[..., None, :] @ matrix).squeeze(-2).square().unflatten(-1, (2, -1)).sum(-2)

    def forward(self, x: Tensor) -> Tensor:
        """log(p_j + eps): (*, in_features) -> (*, out_features)"""
        a = self.amplitudes(x)
        if self.gamma:
            self._penalty = self._energy(a) if self.training else None
        power = self._power(a, self.at_centres)
        return torch.log(power / _positive(power.sum(-1, keepdim=True)) + self.eps)

    def _energy(self, a: Tensor) -> Tensor:
        c = self._coefficients(a, self.penalty == "normalised")
        k = torch.arange(self.n_freq + 1, device=c.device)
        return (4 * math.pi**2 * k.square() * c.square().sum(-2)).sum(-1).mean()

    def aux_loss(self) -> Tensor:
        """The penalty of the last batch in training, times gamma."""
        if self._penalty is None:
            return self.linear.weight.new_zeros(())
        return self.gamma * self._penalty

    def pdf(self, x: Tensor, z: Tensor) -> Tensor:
        """p(z): x (*, in_features) and z (m,) or (*, m) -> (*, m)"""
        a = self.amplitudes(x)
        return self._power(a, self._matrix(z)) / _positive(2 * a.square().sum((-2, -1)))[..., None]

    def nll(self, x: Tensor, z: Tensor) -> Tensor:
        """Mean of -log p(z) for targets z (*,) in [-1, 1]: maximum likelihood without bins."""
        density = self.pdf(x, z[..., None])
        return -_positive(density).log().mean()

    def cdf(self, x: Tensor, z: Tensor) -> Tensor:
        """Probability below z: (z + 1)/2 + sum_k (Re c_k sin(k pi z) + Im c_k (cos(k pi z) - (-1)^k)) / (k pi)."""
        return self._cdf(self.coefficients(x), z)

    def _cdf(self, c: Tensor, z: Tensor) -> Tensor:
        k, sign = self._signs(c)
        cos, sin = self._wave(z)[..., 1:, :]
        re, im = (c[..., None, :, 1:] / (math.pi * k)).unbind(-2)
        return (z + 1) / 2 + (re @ sin + im @ (cos - sign[:, None])).squeeze(-2)

    def _signs(self, like: Tensor) -> tuple[Tensor, Tensor]:
        k = torch.arange(1, self.n_freq + 1, device=like.device).to(like)
        return k, torch.cos(math.pi * k).round()

    def mean(self, x: Tensor) -> Tensor:
        """Expected z = sum_k 2 (-1)^k Im c_k / (k pi): (*, in_features) -> (*)"""
        c = self.coefficients(x)
        k, sign = self._signs(c)
        return (c[..., 1, 1:] * 2 * sign / (math.pi * k)).sum(-1)

    @torch.no_grad()
    def sample(self, x: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws by bisecting the cdf: (*, in_features) -> (*, count)"""
        c = self.coefficients(x)
        u = torch.rand(*x.shape[:-1], count, generator=generator, dtype=x.dtype, device=x.device)
        low, high = -torch.ones_like(u), torch.ones_like(u)
        for _ in range(32):
            middle = (low + high) / 2
            below = self._cdf(c, middle) < u
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def extra_repr(self) -> str:
        """The sizes and options, for `repr`."""
        return f"{super().extra_repr()}, n_freq={self.n_freq}, gamma={self.gamma}"


def _positive(x: Tensor) -> Tensor:
    """``x`` where it can divide; an input that gives a = 0 thus gets equal logits."""
    return x.clamp_min(torch.finfo(x.dtype).tiny)


class LinearHead(BinHead):
    """The usual head; ``laplace`` adds a constant to every probability: log(softmax(W x + b) + laplace)."""

    def __init__(self, in_features: int, out_features: int, laplace: float = 0.0) -> None:
        super().__init__(in_features, out_features)
        if laplace < 0:
            raise PomonaError(f"laplace={laplace} must be 0 or more")
        self.laplace = laplace
        self.linear = nn.Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(*, in_features) -> (*, out_features)"""
        check_input(self, x, self.in_features)
        logits = self.linear(x)
        return torch.log(logits.softmax(-1) + self.laplace) if self.laplace else logits


class GMMHead(BinHead):
    """A mixture of Gaussians, read off at the bins' centres.

    p_j ~ sum_m w_m N(z_j; tanh(mu_m(x)), s_m),  logits log(p_j + eps)

    Args:
        in_features, out_features: sizes.
        n_components: Gaussians.
        full: weights and standard deviations are functions of x too; otherwise the weights are equal and the
            deviations learned constants, 2 / out_features at first.
        eps: as in `FourierHead`.

    Shape:
        (*, in_features) -> (*, out_features)

    Source: the baseline of arXiv 2410.22269; mixture density networks (Bishop, 1994).
    """

    def __init__(
        self, in_features: int, out_features: int, n_components: int = 2, full: bool = False, eps: float = 1e-5
    ) -> None:
        super().__init__(in_features, out_features)
        check_positive(n_components=n_components, eps=eps)
        self.n_components, self.full, self.eps = n_components, full, eps
        self.linear = nn.Linear(in_features, n_components * (3 if full else 1))
        start = math.log(math.expm1(2 / out_features))  # softplus gives 2 / out_features
        self.scale = nn.Parameter(torch.full((n_components,), start))

    def forward(self, x: Tensor) -> Tensor:
        """(*, in_features) -> (*, out_features)"""
        check_input(self, x, self.in_features)
        mean, *more = self.linear(x).split(self.n_components, -1)
        weight, width = more if more else (torch.zeros_like(mean), torch.zeros_like(mean))
        std = F.softplus(self.scale + width) + 1e-3  # narrower ones would fall between the bins
        z = (self.centres - mean.tanh()[..., None]) / std[..., None]
        logits = (-z.square() / 2 + (weight.log_softmax(-1) - std.log())[..., None]).logsumexp(-2)
        return torch.log(logits.softmax(-1) + self.eps)


class PointHead(BinHead):
    """Pointwise regression in the place of a distribution: one number tanh(w x + b), and logits -(z_j - it)^2 / 2 s^2.

    Cross-entropy on them is the squared error up to the bins' width; s = 2 / out_features is a bin's width.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.linear = nn.Linear(in_features, 1)

    def mean(self, x: Tensor) -> Tensor:
        """The predicted z: (*, in_features) -> (*)"""
        check_input(self, x, self.in_features)
        return self.linear(x)[..., 0].tanh()

    def forward(self, x: Tensor) -> Tensor:
        """(*, in_features) -> (*, out_features)"""
        return -(self.out_features * (self.centres - self.mean(x)[..., None]) / 2).square() / 2


class Binning:
    """Values to bins, and to z in [-1, 1], where the bins are equally wide.

    Args:
        values: training values.
        n_bins: how many bins.
        mix: 0 cuts the range evenly, 1 at the quantiles; between, mixed precision: narrow bins where the values are,
            wide ones elsewhere.

    Raises:
        PomonaError: for values that are all equal, or ``mix`` outside [0, 1].
    """

    def __init__(self, values: Tensor, n_bins: int, mix: float = 0.0) -> None:
        check_positive(n_bins=n_bins)
        values = values.flatten().double()
        if not 0 <= mix <= 1:
            raise PomonaError(f"mix={mix} must lie between 0 and 1")
        if not len(values) or values.min() == values.max():
            raise PomonaError("values are all equal; bins need at least two different ones")
        share = torch.linspace(0, 1, n_bins + 1, dtype=values.dtype, device=values.device)
        uniform = torch.lerp(values.min(), values.max(), share)
        self.n_bins = n_bins
        self.edges = (1 - mix) * uniform + mix * torch.quantile(values, share)

    def tokens(self, values: Tensor) -> Tensor:
        """Indices of the bins; what lies beyond the ends goes into the end bins."""
        return torch.bucketize(values.to(self.edges), self.edges[1:-1], right=True)

    def z(self, values: Tensor) -> Tensor:
        """Position in [-1, 1], linear within each bin."""
        values, bins = values.to(self.edges), self.tokens(values)
        low, high = self.edges[bins], self.edges[bins + 1]
        inside = ((values - low) / (high - low).clamp_min(torch.finfo(low.dtype).tiny)).clamp(0, 1)
        return 2 * (bins + inside) / self.n_bins - 1

    def values(self, z: Tensor) -> Tensor:
        """The inverse of `z`."""
        place = (z.to(self.edges) + 1) / 2 * self.n_bins
        bins = place.floor().clamp(0, self.n_bins - 1).long()
        return torch.lerp(self.edges[bins], self.edges[bins + 1], place - bins)


def smoothness(pmf: Tensor) -> Tensor:
    """sum_{s=1}^{100} 6 / (pi s)^2 |p - G_s * p|_2, G_s the circular Gaussian filter of s bins; lower is smoother.

    Shape:
        (*, bins) -> (*)
    """
    n = pmf.shape[-1]
    s = torch.arange(1, 101, dtype=pmf.dtype, device=pmf.device)[:, None]
    at = torch.arange(n // 2 + 1, device=pmf.device).to(pmf) / n
    # Poisson: the sampled Gaussian's spectrum is that of the continuous one, folded
    folded = torch.stack([torch.exp(-2 * (math.pi * s * (at + m)).square()) for m in range(-2, 3)]).sum(0)
    kept = folded / folded[:, :1]
    rough = torch.fft.irfft((1 - kept) * torch.fft.rfft(pmf)[..., None, :], n)
    return (6 / (math.pi * s[:, 0]).square() * rough.norm(dim=-1)).sum(-1)
