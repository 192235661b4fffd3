"""Kolmogorov-Arnold networks: fitting, pruning, and reading them as formulas."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, require, unknown
from pomona.nn.kan import KANLayer, penalty

SYMBOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "x": lambda x: x,
    "x^2": torch.square,
    "x^3": lambda x: x**3,
    "sqrt": torch.sqrt,
    "exp": torch.exp,
    "log": torch.log,
    "sin": torch.sin,
    "tanh": torch.tanh,
    "abs": torch.abs,
    "1/x": torch.reciprocal,
    "gaussian": lambda x: torch.exp(-x.square()),
}
"""Functions that an edge can be fixed to."""


@dataclass(frozen=True)
class Suggestion:
    """How well c f(a x + b) + d describes an edge: its share of variance explained and the four numbers."""

    name: str
    r2: float
    affine: tuple[float, float, float, float]


class SymbolicEdge(nn.Module):
    """phi(x) = c f(a x + b) + d, with trained a, b, c, d.

    Shape:
        (*) -> (*)
    """

    def __init__(self, name: str, affine: Sequence[float]) -> None:
        super().__init__()
        if name not in SYMBOLS:
            raise unknown("name", name, SYMBOLS)
        self.name = name
        self.affine = nn.Parameter(torch.tensor(tuple(affine)))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        a, b, c, d = self.affine
        return c * SYMBOLS[self.name](a * x + b) + d


class KAN(nn.Module):
    """A chain of Kolmogorov-Arnold layers, y = L_n(... L_1(x)), some of whose edges may be fixed to formulas.

    Args:
        widths: features of the input, of each hidden layer and of the output.
        options: keyword arguments of `KANLayer`.

    Shape:
        (*, widths[0]) -> (*, widths[-1])

    Source: KAN: Kolmogorov-Arnold Networks, arXiv 2404.19756.
    """

    def __init__(self, widths: Sequence[int], **options: Any) -> None:
        super().__init__()
        if len(widths) < 2:
            raise PomonaError(f"widths={list(widths)} needs at least an input and an output width")
        self.layers = nn.ModuleList(KANLayer(n, m, **options) for n, m in pairwise(widths))
        self.symbolic = nn.ModuleList(nn.ModuleDict() for _ in self.layers)  # "output,input" -> SymbolicEdge

    @property
    def widths(self) -> list[int]:
        """Features of the input and after each layer."""
        layers = self._layers()
        return [layers[0].in_features, *(layer.out_features for layer in layers)]

    def _layers(self) -> list[KANLayer]:
        return list(self.layers)  # type: ignore[arg-type]

    def _fixed(self, index: int) -> list[tuple[int, int, SymbolicEdge]]:
        """(output, input, edge) of a layer's fixed edges."""
        return [(*map(int, key.split(",")), edge) for key, edge in self.symbolic[index].items()]  # type: ignore

    def _layer(self, index: int, x: Tensor) -> Tensor:
        y = self.layers[index](x)
        fixed = self._fixed(index)
        if not fixed:
            return y
        rows = torch.tensor([o for o, _, _ in fixed], device=x.device)
        return y.index_add(-1, rows, torch.stack([edge(x[..., i]) for _, i, edge in fixed], -1).to(y.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(*, widths[0]) -> (*, widths[-1])"""
        for index in range(len(self.layers)):
            x = self._layer(index, x)
        return x

    def inputs(self, x: Tensor) -> list[Tensor]:
        """What each layer receives."""
        received = [x]
        for index in range(len(self.layers) - 1):
            received.append(self._layer(index, received[-1]))
        return received

    def edges(self, index: int, x: Tensor) -> Tensor:
        """The edge functions of a layer on its own input: (*, in) -> (*, out, in)."""
        values = self._layers()[index].edges(x)
        for o, i, edge in self._fixed(index):
            spot = torch.zeros_like(self._layers()[index].mask)
            spot[o, i] = 1
            values = values + edge(x[..., i])[..., None, None] * spot
        return values

    def edge_norms(self, x: Tensor) -> list[Tensor]:
        """The mean |phi_oi| over the batch ``x``, (out, in) a layer."""
        received = self.inputs(x.reshape(-1, x.shape[-1]))
        return [self.edges(index, given).abs().mean(0) for index, given in enumerate(received)]

    def regularisation(self, x: Tensor, l1: float = 1.0, entropy: float = 1.0) -> Tensor:
        """The sum over layers of l1 * |layer| + entropy * H(layer).

        |layer| is the sum of its edges' mean |phi| over the batch, H the entropy of their shares of it.
        """
        return torch.stack([penalty(norm, l1, entropy) for norm in self.edge_norms(x)]).sum()

    def fit(
        self,
        x: Tensor,
        y: Tensor,
        *,
        opt: Literal["lbfgs", "adam"] = "lbfgs",
        steps: int = 100,
        lr: float | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
        lamb: float = 0.0,
        l1: float = 1.0,
        entropy: float = 2.0,
        grid_updates: int = 10,
        grid_until: int = 50,
    ) -> list[float]:
        """Train on the whole batch, in place.

        Args:
            x: (samples, widths[0]).
            y: (samples, widths[-1]).
            opt: lbfgs (strong Wolfe line search) or adam.
            steps: optimiser steps.
            lr: step size; 1 for lbfgs and 0.01 for adam by default.
            loss: (prediction, target) -> scalar.
            lamb: weight of `regularisation` with ``l1`` and ``entropy``.
            grid_updates: how often to move the grids to the activations, spread over the first ``grid_until`` steps.

        Returns:
            The loss before each step.
        """
        if opt not in ("lbfgs", "adam"):
            raise unknown("opt", opt, ["lbfgs", "adam"])
        update_at = {round(n * grid_until / grid_updates) for n in range(grid_updates)}
        parameters = [p for p in self.parameters() if p.requires_grad]

        def make() -> torch.optim.Optimizer:
            if opt == "adam":
                return torch.optim.Adam(parameters, lr=lr or 1e-2)
            return torch.optim.LBFGS(
                parameters,
                lr=lr or 1.0,
                line_search_fn="strong_wolfe",
                tolerance_grad=1e-32,  # the default stops at an RMSE of about 1e-5
                tolerance_change=1e-32,
            )

        optimizer, losses = make(), []

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss(self(x), y)
            if lamb:
                value = value + lamb * self.regularisation(x, l1, entropy)
            value.backward()
            return value

        for step in range(steps):
            if step in update_at:
                self.update_grid(x)
                optimizer = make()  # curvature and moments belong to the old coefficients
            losses.append(float(optimizer.step(closure).detach()))  # type: ignore
        return losses

    @torch.no_grad()
    def update_grid(self, x: Tensor) -> None:
        """Move every layer's grid to its activations on ``x``; see `KANLayer.update_grid`."""
        for index, layer in enumerate(self._layers()):
            layer.update_grid(x)
            x = self._layer(index, x)

    def refine(self, grid: int, x: Tensor | None = None) -> None:
        """Grid extension of every layer; see `KANLayer.refine`. Make a new optimiser afterwards.

        Args:
            grid: new number of intervals.
            x: inputs to move the grids to beforehand, since what lies beyond a grid is not carried over.
        """
        if x is not None:
            self.update_grid(x)
        for layer in self._layers():
            layer.refine(grid)

    @torch.no_grad()
    def prune(self, x: Tensor, threshold: float = 1e-2) -> KAN:
        """A smaller network without the hidden nodes whose largest incoming or outgoing norm is below ``threshold``.

        A layer keeps at least its best node. The norms are those of `edge_norms` on ``x``.
        """
        norms = self.edge_norms(x)
        keep = [torch.arange(self.widths[0])]
        for incoming, outgoing in pairwise(norms):
            score = torch.minimum(incoming.amax(1), outgoing.amax(0))
            kept = (score >= threshold).nonzero().flatten()
            keep.append(kept if len(kept) else score.argmax()[None])
        keep.append(torch.arange(self.widths[-1]))
        new = copy.deepcopy(self)
        for index, layer in enumerate(self._layers()):
            columns, rows = keep[index].tolist(), keep[index + 1].tolist()
            new.layers[index] = layer.take(keep[index + 1].to(x.device), keep[index].to(x.device))
            new.symbolic[index] = nn.ModuleDict(
                {
                    f"{rows.index(o)},{columns.index(i)}": copy.deepcopy(edge)
                    for o, i, edge in self._fixed(index)
                    if o in rows and i in columns
                }
            )
        return new

    @torch.no_grad()
    def suggest_symbolic(self, layer: int, i: int, o: int, x: Tensor, samples: int = 200) -> list[Suggestion]:
        """How well each known function describes the edge from input ``i`` to output ``o``, best first.

        Args:
            layer: index of the layer.
            x: (batch, widths[0]) inputs of the network, which say where the edge is used.
            samples: at most so many of them are looked at.
        """
        self._check_edge(layer, i, o)
        given = self.inputs(x)[layer]
        values = self.edges(layer, given)[:, o, i]
        every = max(1, len(x) // samples)
        u, v = given[::every, i].double(), values[::every].double()
        found = [fit_symbol(name, u, v) for name in SYMBOLS]
        return sorted(found, key=lambda s: -s.r2)

    def fix_symbolic(self, layer: int, i: int, o: int, name: str, affine: Sequence[float] = (1, 0, 1, 0)) -> None:
        """Replace the edge from ``i`` to ``o`` by c f(a x + b) + d, ``affine`` = (a, b, c, d), in place."""
        self._check_edge(layer, i, o)
        mask = self._layers()[layer].mask
        self.symbolic[layer][f"{o},{i}"] = SymbolicEdge(name, [float(v) for v in affine]).to(mask)  # type: ignore
        mask[o, i] = 0

    def auto_symbolic(self, x: Tensor, least_r2: float = 0.99) -> list[tuple[int, int, int, Suggestion]]:
        """Fix every free edge to its best function where that explains at least ``least_r2`` of its variance.

        Returns:
            What was fixed, as (layer, i, o, suggestion).
        """
        done = []
        for index, layer in enumerate(self._layers()):
            for o, i in layer.mask.nonzero().tolist():
                best = self.suggest_symbolic(index, i, o, x)[0]
                if best.r2 >= least_r2:
                    self.fix_symbolic(index, i, o, best.name, best.affine)
                    done.append((index, i, o, best))
        return done

    def formula(self, names: Sequence[str] | None = None, digits: int = 4) -> list[Any]:
        """The outputs as sympy expressions; an edge that is still a spline is an unknown function phi_layer_i_o.

        Raises:
            MissingExtra: if sympy is not installed.
        """
        sympy = require("sympy", "symbolic")
        symbols: dict[str, Callable[[Any], Any]] = {
            "x": lambda z: z,
            "x^2": lambda z: z**2,
            "x^3": lambda z: z**3,
            "sqrt": sympy.sqrt,
            "exp": sympy.exp,
            "log": sympy.log,
            "sin": sympy.sin,
            "tanh": sympy.tanh,
            "abs": sympy.Abs,
            "1/x": lambda z: 1 / z,
            "gaussian": lambda z: sympy.exp(-(z**2)),
        }
        values = [sympy.Symbol(name) for name in names or [f"x{n}" for n in range(self.widths[0])]]
        for index, layer in enumerate(self._layers()):
            outputs = [sympy.Integer(0)] * layer.out_features
            for o, i, edge in self._fixed(index):
                a, b, c, d = (sympy.Float(round(v, digits)) for v in edge.affine.tolist())
                outputs[o] += c * symbols[edge.name](a * values[i] + b) + d
            for o, i in layer.mask.nonzero().tolist():
                outputs[o] += sympy.Function(f"phi_{index}_{i}_{o}")(values[i])
            values = outputs
        return [sympy.nsimplify(value, rational=False) if value.is_number else value for value in values]

    def _check_edge(self, layer: int, i: int, o: int) -> None:
        if not 0 <= layer < len(self.layers):
            raise PomonaError(f"layer={layer} is not one of the {len(self.layers)} layers, counted from 0")
        n, m = self.widths[layer : layer + 2]
        if not (0 <= i < n and 0 <= o < m):
            raise PomonaError(f"edge i={i}, o={o} does not exist: layer {layer} has {n} inputs and {m} outputs")


def fit_symbol(name: str, u: Tensor, v: Tensor, reach: float = 10.0, rounds: int = 8, points: int = 41) -> Suggestion:
    """Best c f(a u + b) + d for v, (samples,) each: a search over a and b that zooms in, c and d by least squares."""
    f = SYMBOLS[name]
    centre_a, centre_b, span = u.new_zeros(()), u.new_zeros(()), reach
    best = Suggestion(name, float("-inf"), (1.0, 0.0, 0.0, float(v.mean())))
    centred = v - v.mean()
    total = centred.square().sum().clamp(min=1e-30)
    if name == "x":  # a and b do nothing that c and d do not
        points, rounds, centre_a, span = 1, 1, u.new_ones(()), 0.0
    for _ in range(rounds):
        step = torch.linspace(-span, span, points, dtype=u.dtype, device=u.device) if points > 1 else u.new_zeros(1)
        a, b = centre_a + step, centre_b + step
        value = f(a[:, None, None] * u + b[None, :, None])
        mean = value.mean(-1, keepdim=True)
        spread = (value - mean).square().sum(-1)
        slope = ((value - mean) * centred).sum(-1) / spread
        r2 = slope.square() * spread / total
        r2 = torch.where(torch.isfinite(r2) & (spread > 1e-20), r2, -torch.inf)
        row, column = divmod(int(r2.argmax()), points)
        score = float(r2[row, column])
        if score > best.r2:
            c = float(slope[row, column])
            d = float(v.mean() - c * mean[row, column, 0])
            best = Suggestion(name, score, (float(a[row]), float(b[column]), c, d))
            centre_a, centre_b = a[row], b[column]
        span /= 5
    return best
