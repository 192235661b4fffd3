"""Measures around Hopfield networks: separation, storage, what heads do; the classical network; bags of instances."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pomona.errors import PomonaError, check_positive, unknown
from pomona.implicit.hopfield import Hopfield, HopfieldPooling, hopfield_retrieve


def separation(patterns: Tensor) -> Tensor:
    """Delta_i = x_i . x_i - max_{j != i} x_i . x_j: (*, N, d) -> (*, N)."""
    gram = patterns @ patterns.mT
    own = gram.diagonal(dim1=-2, dim2=-1)
    diagonal = torch.eye(patterns.shape[-2], dtype=torch.bool, device=patterns.device)
    return own - gram.masked_fill(diagonal, -torch.inf).amax(-1)


def retrieval_bound(patterns: Tensor, distance: Tensor, beta: float) -> Tensor:
    """|f(xi) - x_i| <= 2 M (N - 1) exp(-beta (Delta_i - 2 M |xi - x_i|)) after one update, M = max |x_i|.

    Args:
        patterns: (N, d).
        distance: |xi - x_i|, (N).
        beta: inverse temperature.
    """
    largest = patterns.norm(dim=-1).max()
    return 2 * largest * (len(patterns) - 1) * torch.exp(-beta * (separation(patterns) - 2 * largest * distance))


def sphere(n: int, d: int, radius: float, generator: torch.Generator | None = None) -> Tensor:
    """``n`` random points on the sphere of that radius, (n, d)."""
    x = torch.randn(n, d, generator=generator)
    return radius * x / x.norm(dim=-1, keepdim=True)


def storage_test(
    d: int,
    n: int,
    radius: float | None = None,
    *,
    beta: float = 1.0,
    noise: float = 0.25,
    tolerance: float = 0.1,
    queries: int = 512,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """How many of ``n`` random sphere patterns one update retrieves from noisy versions of them.

    Args:
        d: dimension.
        n: stored patterns.
        radius: of the sphere; sqrt(d) by default.
        beta: inverse temperature.
        noise: distance of a query from its pattern, in radii.
        tolerance: distance, in radii, below which the pattern counts as retrieved.
        queries: at most so many patterns are asked for.

    Returns:
        ``retrieved`` (share), ``error`` (mean distance after the update, in radii), ``separation`` (mean Delta).
    """
    check_positive(d=d, n=n, beta=beta, queries=queries)
    radius = radius or math.sqrt(d)
    patterns = sphere(n, d, radius, generator)
    asked = torch.randperm(n, generator=generator)[:queries]
    query = patterns[asked] + sphere(len(asked), d, noise * radius, generator)
    error = (hopfield_retrieve(query, patterns, beta) - patterns[asked]).norm(dim=-1) / radius
    dots = patterns[asked] @ patterns.mT
    own = dots.gather(1, asked[:, None])[:, 0]
    nearest = dots.scatter(1, asked[:, None], -torch.inf).amax(1)
    return {
        "retrieved": float((error < tolerance).float().mean()),
        "error": float(error.mean()),
        "separation": float((own - nearest).mean()),
    }


class ClassicalHopfield(nn.Module):
    """s <- sign(W s) with W = (1 / d) sum_i x_i x_i^T and no self-coupling; holds about 0.14 d binary patterns.

    Args:
        patterns: (N, d) of -1 and 1.

    Shape:
        (B, d) -> (B, d)

    Source: Neural networks and physical systems with emergent collective computational abilities (Hopfield, 1982).
    """

    weight: Tensor

    def __init__(self, patterns: Tensor) -> None:
        super().__init__()
        if patterns.dim() != 2 or not (patterns.abs() == 1).all():
            raise PomonaError(
                f"patterns of shape {tuple(patterns.shape)} must be a matrix of -1 and 1, one pattern a row"
            )
        weight = patterns.mT @ patterns / patterns.shape[1]
        self.register_buffer("weight", weight - torch.diag(weight.diagonal()))

    def energy(self, state: Tensor) -> Tensor:
        """E = -s^T W s / 2: (B, d) -> (B)."""
        return -torch.einsum("bi,ij,bj->b", state, self.weight, state) / 2

    def forward(self, state: Tensor, sweeps: int = 1, update: Literal["async", "sync"] = "async") -> Tensor:
        """``sweeps`` updates of every unit, one after another (async, the energy never rises) or together (sync)."""
        if update not in ("async", "sync"):
            raise unknown("update", update, ["async", "sync"])
        for _ in range(sweeps):
            if update == "sync":
                state = _sign(state @ self.weight, state)
                continue
            state = state.clone()
            for unit in range(state.shape[-1]):
                state[:, unit] = _sign(state @ self.weight[unit], state[:, unit])
        return state


def _sign(field: Tensor, old: Tensor) -> Tensor:
    """The field's sign; the old state where the field is zero."""
    return torch.where(field == 0, old, field.sign())


@dataclass(frozen=True)
class HeadReport:
    """What one association head does on the data.

    Attributes:
        layer: name of the Hopfield module.
        head: index.
        k: median number of patterns that hold 0.9 of a state's association.
        patterns: number of stored patterns.
        kind: averaging (more than half of the patterns), single (one pattern) or metastable (a group).
    """

    layer: str
    head: int
    k: float
    patterns: int
    kind: Literal["averaging", "metastable", "single"]


def mass_count(weight: Tensor, mass: float = 0.9) -> Tensor:
    """The least number of entries that hold ``mass`` of each distribution: (*, N) -> (*)."""
    held = weight.sort(-1, descending=True).values.cumsum(-1)
    return (held < mass).sum(-1).clamp(max=weight.shape[-1] - 1) + 1


@torch.no_grad()
def head_report(model: nn.Module, *data: Any, mass: float = 0.9) -> list[HeadReport]:
    """What every head of every `Hopfield` module in ``model`` does when the model is called with ``data``."""
    counts: dict[str, list[tuple[Tensor, int]]] = {}

    def record(name: str) -> Any:
        def hook(module: Hopfield, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            weight = module.attend(*args, **kwargs)[1]
            by_head = mass_count(weight, mass).movedim(-2, 0).flatten(1)
            counts.setdefault(name, []).append((by_head, weight.shape[-1]))

        return hook

    handles = [
        module.register_forward_pre_hook(record(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, Hopfield)
    ]
    if not handles:
        raise PomonaError(f"{type(model).__name__} holds no Hopfield module to report on")
    training = model.training
    try:
        model.eval()(*data)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    reports = []
    for name, seen in counts.items():
        patterns = max(n for _, n in seen)
        for head, k in enumerate(torch.cat([by_head for by_head, _ in seen], 1).double().median(1).values.tolist()):
            kind: Any = "single" if k <= 1 else "averaging" if k > patterns / 2 else "metastable"
            reports.append(HeadReport(name, head, k, patterns, kind))
    return reports


class GatedAttentionPooling(nn.Module):
    """z = sum_i a_i x_i, a = softmax_i(w^T (tanh(V x_i) * sigmoid(U x_i))): (B, N, D) -> (B, D).

    Source: Attention-based Deep Multiple Instance Learning, arXiv 1802.04712.
    """

    def __init__(self, features: int, hidden: int = 64) -> None:
        super().__init__()
        self.content, self.gate = nn.Linear(features, hidden), nn.Linear(features, hidden)
        self.score = nn.Linear(hidden, 1)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """See the class."""
        score = self.score(torch.tanh(self.content(x)) * torch.sigmoid(self.gate(x)))[..., 0]
        if padding is not None:
            score = score.masked_fill(~padding.bool(), -torch.inf)
        return (score.softmax(-1)[..., None, :] @ x)[..., 0, :]


class PlainPooling(nn.Module):
    """The mean or the maximum over the real members of a bag: (B, N, D), padding (B, N) or None -> (B, D)."""

    def __init__(self, how: Literal["mean", "max"]) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """See the class."""
        real = torch.ones_like(x[..., :1], dtype=torch.bool) if padding is None else padding[..., None].bool()
        if self.how == "max":
            return x.masked_fill(~real, -torch.inf).amax(-2)
        return x.masked_fill(~real, 0).sum(-2) / real.sum(-2).clamp(min=1)


class MILNet(nn.Module):
    """Multiple-instance learning: bag -> instance network -> pooling -> linear head.

    Args:
        in_features: of an instance.
        out_features: outputs for a bag.
        hidden: features of an encoded instance.
        pooling: hopfield, gated, mean or max; or a module (B, N, hidden), padding -> (B, hidden).
        dropout: probability after pooling.
        options: keyword arguments of `HopfieldPooling`.

    Shape:
        (B, N, in_features), padding (B, N) True at real instances or None -> (B, out_features)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int = 1,
        *,
        hidden: int = 64,
        pooling: str | nn.Module = "hopfield",
        dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        self.instance = nn.Sequential(nn.Linear(in_features, hidden), nn.ReLU())
        pooled = hidden
        if isinstance(pooling, nn.Module):
            self.pooling = pooling
        elif pooling == "hopfield":
            self.pooling = HopfieldPooling(hidden, **options)
            pooled = hidden * options.get("quantity", 1)
        elif pooling == "gated":
            self.pooling = GatedAttentionPooling(hidden)
        elif pooling in ("mean", "max"):
            self.pooling = PlainPooling(pooling)  # type: ignore[arg-type]
        else:
            raise unknown("pooling", pooling, ["hopfield", "gated", "mean", "max"])
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(pooled, out_features))

    def forward(self, bags: Tensor, padding: Tensor | None = None) -> Tensor:
        """See the class."""
        return self.head(self.pooling(self.instance(bags), padding))
