"""Networks for functions X(t): scores against basis functions that are learned, or fixed ones to compare them with.

A basis is a module that maps times (*,) to the values of its ``n_basis`` functions there, (n_basis, *).

Source: Deep Learning for Functional Data Analysis with Adaptive Basis Layers (arXiv 2106.10414).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, check_positive, unknown
from pomona.nn.basis import BSpline
from pomona.nn.check import check_input
from pomona.nn.norm import standardize

Grid = int | Sequence[float] | Tensor
"""Sorted times in [0, 1], or how many evenly spaced ones."""


def trapezoid_weights(t: Tensor, mask: Tensor | None = None) -> Tensor:
    """Weights w with sum_j w_j f(t_j) the trapezoidal rule on sorted times: (*, J) -> (*, J).

    Times where ``mask`` is False weigh 0, and their neighbours are joined over them.
    """
    before, after = t.roll(1, -1), t.roll(-1, -1)
    if mask is not None:
        before = torch.where(mask, t, -torch.inf).cummax(-1).values.roll(1, -1)
        after = torch.where(mask, t, torch.inf).flip(-1).cummin(-1).values.flip(-1).roll(-1, -1)
    place = torch.arange(t.shape[-1], device=t.device)
    before = torch.where((place > 0) & before.isfinite(), before, t)
    after = torch.where((place < t.shape[-1] - 1) & after.isfinite(), after, t)
    weights = (after - before) / 2
    return weights if mask is None else weights * mask


class MicroMLPs(nn.Module):
    """``n_basis`` functions of t, each a small MLP of its own; all are computed at once.

    h <- dropout(selu(u + LN(u))), u = W h + b, for each hidden layer; then a linear map to one number.

    Args:
        n_basis: number of functions.
        hidden: widths.
        norm: with the layer norm and its skip connection; otherwise h <- dropout(selu(u)).
        dropout: probability.
        generator: source of the initial values, U(-1, 1) / sqrt(fan in).

    Shape:
        (*,) -> (n_basis, *)
    """

    def __init__(
        self,
        n_basis: int,
        hidden: Sequence[int] = (64, 64, 64),
        norm: bool = True,
        dropout: float = 0.1,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_positive(n_basis=n_basis)
        self.n_basis, self.norm, self.dropout = n_basis, norm, dropout
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for i, o in pairwise([1, *hidden, 1]):
            for parameters, shape in ((self.weights, (n_basis, i, o)), (self.biases, (n_basis, 1, o))):
                parameters.append(nn.init.uniform_(torch.empty(shape), -(i**-0.5), i**-0.5, generator=generator))
        sizes = list(hidden) if norm else []
        self.gains = nn.ParameterList(torch.ones(n_basis, 1, size) for size in sizes)
        self.shifts = nn.ParameterList(torch.zeros(n_basis, 1, size) for size in sizes)

    def forward(self, t: Tensor) -> Tensor:
        """See the class."""
        check_input(self, t)
        h = t.reshape(1, -1, 1).expand(self.n_basis, -1, 1)
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(bias, h, weight)
            if layer < last:
                if self.norm:
                    h = h + standardize(h) * self.gains[layer] + self.shifts[layer]
                h = F.dropout(F.selu(h), self.dropout, self.training)
        return h.reshape(self.n_basis, *t.shape)


class SplineBasis(nn.Module):
    """B-splines of order ``k`` on even knots in [0, 1]; not learned.

    Shape:
        (*,) -> (n_basis, *)
    """

    def __init__(self, n_basis: int, k: int = 3) -> None:
        super().__init__()
        if n_basis <= k:
            raise PomonaError(f"n_basis={n_basis} must be above the order k={k} of the splines")
        self.n_basis = n_basis
        self.splines = BSpline(1, n_basis - k, 0.0, 1.0, k=k)

    def forward(self, t: Tensor) -> Tensor:
        """See the class."""
        return self.splines(t[..., None])[..., 0, :].movedim(-1, 0)


class GridBasis(nn.Module):
    """Functions given by their values (n_basis, J) on a grid (J,), linear between; not learned.

    Shape:
        (*,) -> (n_basis, *)
    """

    grid: Tensor
    values: Tensor

    def __init__(self, grid: Tensor, values: Tensor) -> None:
        super().__init__()
        self.n_basis = len(values)
        self.register_buffer("grid", grid)
        self.register_buffer("values", values)

    def forward(self, t: Tensor) -> Tensor:
        """See the class."""
        above = torch.searchsorted(self.grid, t.contiguous()).clamp(1, len(self.grid) - 1)
        left, right = self.grid[above - 1], self.grid[above]
        return torch.lerp(self.values[:, above - 1], self.values[:, above], (t - left) / (right - left))


def fpca(x: Tensor, grid: Grid, share: float = 0.95, n_basis: int | None = None) -> GridBasis:
    """The principal functions of curves: orthonormal in L2, largest variance first.

    Args:
        x: (curves, J).
        grid: where they were observed.
        share: of the variance; as many functions are kept as reach it.
        n_basis: how many are kept, in place of ``share``.
    """
    t = _grid(grid).to(x)
    root = trapezoid_weights(t).sqrt()
    _, values, functions = torch.linalg.svd((x - x.mean(0)) * root, full_matrices=False)
    if n_basis is None:
        explained = values.square().cumsum(0) / values.square().sum()
        n_basis = min(int((explained < share).sum()) + 1, len(values))
    return GridBasis(t, functions[:n_basis] / root)


def _grid(grid: Grid) -> Tensor:
    t = torch.linspace(0, 1, grid) if isinstance(grid, int) else torch.as_tensor(grid)
    if t.dim() != 1 or len(t) < 2 or not (t.diff() > 0).all() or t[0] < 0 or t[-1] > 1:
        raise PomonaError("grid must be two or more increasing times in [0, 1], or their number")
    return t if t.is_floating_point() else t.float()


class BasisLayer(nn.Module):
    """Scores of a function against basis functions: c_i = int beta_i(t) X(t) dt, by the trapezoidal rule.

    Args:
        n_basis: functions for each channel.
        grid: where X is observed, unless `forward` is told otherwise.
        hidden: widths of the `MicroMLPs`.
        micro: a basis that all channels share; by default `MicroMLPs`, functions of its own for each channel.
        norm, dropout: of the `MicroMLPs`.
        channels: number of functions X that are observed together.
        lambda1: weight of mean_i |b_i|_1 in `aux_loss`, b_i = beta_i / |beta_i|_2: few t matter.
        lambda2: weight of the mean over pairs of |<b_i, b_j>|: orthogonal functions.
        sample: how many functions, and how many pairs, are drawn for the two at each step; all by default.
        normalise: 'penalty': the norms count in `aux_loss` only, and no gradient goes through them; 'forward': the
            scores are those of b_i.
        generator: source of the initial values.

    Shape:
        (*, J), or (*, channels, J) for more than one channel -> (*, channels n_basis)

    Raises:
        PomonaError: for a grid that does not increase in [0, 1], a negative weight, or an unknown name.

    Source: Deep Learning for Functional Data Analysis with Adaptive Basis Layers (arXiv 2106.10414).
    """

    grid: Tensor
    weights: Tensor

    def __init__(
        self,
        n_basis: int = 4,
        grid: Grid = 51,
        hidden: Sequence[int] = (64, 64, 64),
        micro: nn.Module | None = None,
        norm: bool = True,
        dropout: float = 0.1,
        channels: int = 1,
        lambda1: float = 0.0,
        lambda2: float = 0.0,
        sample: int | None = None,
        normalise: str = "penalty",
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_positive(n_basis=n_basis, channels=channels)
        if lambda1 < 0 or lambda2 < 0:
            raise PomonaError(f"lambda1={lambda1} and lambda2={lambda2} must be 0 or more")
        if normalise not in ("penalty", "forward"):
            raise unknown("normalise", normalise, ("penalty", "forward"))
        if micro is None:
            micro = MicroMLPs(channels * n_basis, hidden, norm, dropout, generator=generator)
        else:
            n_basis = getattr(micro, "n_basis", n_basis)
        self.n_basis, self.channels, self.micro = n_basis, channels, micro
        self.lambda1, self.lambda2, self.sample, self.normalise = lambda1, lambda2, sample, normalise
        self.register_buffer("grid", _grid(grid).to(torch.get_default_dtype()))
        self.register_buffer("weights", trapezoid_weights(self.grid))

    def bases(self, t: Tensor | None = None) -> Tensor:
        """The functions as they act, at times (*,) or on the grid: (channels, n_basis, *)"""
        values = self._values(self.grid if t is None else t)
        if self.normalise == "penalty":
            return values
        norms = self._norms(values if t is None else self._values(self.grid))
        return values / norms.reshape(self.channels, self.n_basis, *(1 for _ in range(values.dim() - 2)))

    def _values(self, t: Tensor) -> Tensor:
        values = self.micro(t).unflatten(0, (-1, self.n_basis))
        return values.expand(self.channels, *values.shape[1:])

    def _norms(self, values: Tensor) -> Tensor:
        """|beta_i|_2 from values on the grid: (*, J) -> (*)"""
        return (values.square() @ self.weights).clamp_min(torch.finfo(values.dtype).tiny).sqrt()

    def forward(self, x: Tensor, t: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Scores; ``t`` (J,) or (*, J) in the place of the grid, ``mask`` False where X was not seen."""
        length = self.grid if t is None else t
        check_input(self, x, length.shape[-1])
        if self.channels == 1:
            x = x[..., None, :]
        elif x.dim() < 2 or x.shape[-2] != self.channels:
            raise PomonaError(f"BasisLayer takes channels={self.channels} on axis -2; x has shape {tuple(x.shape)}")
        if mask is not None:
            x = torch.where(mask[..., None, :], x, 0)  # what was not observed may be nan
        weights = self.weights if t is None and mask is None else trapezoid_weights(length, mask)
        if length.dim() == 1:
            bases = self.bases(t)
            return torch.einsum("...cj,ckj->...ck", x * weights[..., None, :], bases).flatten(-2)
        bases = self.bases(t).movedim((0, 1), (-3, -2))
        return torch.einsum("...cj,...ckj->...ck", x * weights[..., None, :], bases).flatten(-2)

    def penalties(self) -> tuple[Tensor, Tensor]:
        """Mean |b_i|_1, and the mean of |<b_i, b_j>| over the pairs of a channel (0 for a single function)."""
        values = self._values(self.grid)
        norms = self._norms(values)
        b = values / (norms if self.normalise == "forward" else norms.detach())[..., None]
        i, j = torch.triu_indices(self.n_basis, self.n_basis, 1, device=b.device)
        single, pairs = (b.abs() @ self.weights).flatten(), ((b * self.weights) @ b.mT)[:, i, j].abs().flatten()
        chosen = [v if self.sample is None else v[torch.randperm(len(v))[: self.sample]] for v in (single, pairs)]
        return chosen[0].mean(), chosen[1].sum() / max(1, len(chosen[1]))

    def aux_loss(self) -> Tensor:
        """lambda1 and lambda2 times the `penalties`."""
        if not (self.lambda1 or self.lambda2):
            return self.weights.new_zeros(())
        sparse, similar = self.penalties()
        return self.lambda1 * sparse + self.lambda2 * similar

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        return f"n_basis={self.n_basis}, points={len(self.grid)}, channels={self.channels}"


class FunctionalNet(nn.Module):
    """A `BasisLayer`, and a ReLU network on its scores; without hidden layers, the functional linear model.

    Args:
        basis: the first layer.
        hidden: widths of the network.
        out: outputs.
        dropout: probability after each hidden layer.

    Shape:
        as of the `BasisLayer` -> (*, out)
    """

    spread: Tensor

    def __init__(self, basis: BasisLayer, hidden: Sequence[int], out: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.basis = basis
        sizes = [basis.channels * basis.n_basis, *hidden]
        self.register_buffer("spread", torch.ones(sizes[0]))
        self.net = feedforward(sizes, out, dropout)

    @torch.no_grad()
    def scale_(self, x: Tensor) -> FunctionalNet:
        """From now on divide the scores by their standard deviations over ``x``, as for fixed functions one should."""
        self.spread.copy_(self.basis(x).flatten(0, -2).std(0).clamp_min(1e-12))
        return self

    def forward(self, x: Tensor, t: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """See the class, and `BasisLayer.forward`."""
        return self.net(self.basis(x, t, mask) / self.spread)


class AdaFNN(FunctionalNet):
    """The network with a learned basis.

    y = f(c),  c_i = int beta_i(t) X(t) dt,  each beta_i a small MLP of t

    Args:
        n_basis, grid, channels, lambda1, lambda2, sample, normalise, generator: of the `BasisLayer`.
        base_hidden, base_dropout: of the small MLPs.
        sub_hidden: widths of f.
        out: outputs.
        dropout: in f.

    Shape:
        (*, J), or (*, channels, J) for more than one channel -> (*, out)

    Source: Deep Learning for Functional Data Analysis with Adaptive Basis Layers (arXiv 2106.10414).
    """

    def __init__(
        self,
        n_basis: int = 4,
        grid: Grid = 51,
        base_hidden: Sequence[int] = (64, 64, 64),
        sub_hidden: Sequence[int] = (128, 128, 128),
        lambda1: float = 0.0,
        lambda2: float = 0.0,
        out: int = 1,
        channels: int = 1,
        *,
        base_dropout: float = 0.1,
        dropout: float = 0.1,
        sample: int | None = None,
        normalise: str = "penalty",
        generator: torch.Generator | None = None,
    ) -> None:
        layer = BasisLayer(
            n_basis, grid, base_hidden, dropout=base_dropout, channels=channels, lambda1=lambda1, lambda2=lambda2,
            sample=sample, normalise=normalise, generator=generator,
        )  # fmt: skip
        super().__init__(layer, sub_hidden, out, dropout)


def feedforward(sizes: Sequence[int], out: int, dropout: float = 0.0) -> nn.Sequential:
    """ReLU layers of these sizes and a linear one; on the observed values themselves, the network without a basis."""
    layers: list[nn.Module] = []
    for i, o in pairwise(sizes):
        layers += [nn.Linear(i, o), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], out))
