"""Mixtures of multilayer perceptrons and Kolmogorov-Arnold networks, routed token by token.

Source: MLP-KAN: Unifying Deep Representation and Function Learning, arXiv 2410.03027.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, check_positive, unknown
from pomona.nn.basis import BASES, Located
from pomona.nn.check import check_input
from pomona.nn.experts import (
    ExpertBank,
    Experts,
    LastPass,
    Segments,
    balance_loss,
    segment_matmul,
    top_gates,
)
from pomona.nn.mixing import AttentionMixer, MixerBlock

SHAPES = {name: kind.shape for name, kind in BASES.items() if issubclass(kind, Located)}
"""Basis functions that a KAN expert may have, at centre 0 and width 1."""


class KANExpertBank(Experts):
    """Stacks of FasterKAN layers y = W phi((LN(x) - c_m) / h), m = 1 .. centres, over widths [dim, hidden, dim].

    The centres stand evenly in [-2, 2] and are fixed; each expert has its own LayerNorm gains and biases and its own
    W, without bias, Xavier uniform.

    Args:
        n_experts: E.
        dim: features in and out.
        hidden: features between.
        kan: shape of the functions: rswaf (1 - tanh^2), rbf, mexican_hat or relu_power.
        centres: functions a feature.
        width: h.

    Shape:
        x (*, dim), index (*) or (*, choices), gate as index or None -> (*, dim)

    Raises:
        PomonaError: for an unknown shape or sizes that are not positive.
    """

    centre: Tensor

    def __init__(
        self,
        n_experts: int,
        dim: int,
        hidden: int,
        *,
        kan: str = "rswaf",
        centres: int = 8,
        width: float = 0.33,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(n_experts, dim)
        check_positive(hidden=hidden, centres=centres, width=width)
        if kan not in SHAPES:
            raise unknown("kan", kan, SHAPES)
        self.kan, self.width = kan, width
        self.register_buffer("centre", torch.linspace(-2, 2, centres))
        sizes = [(dim, hidden), (hidden, dim)]
        self.gains = nn.ParameterList(torch.ones(n_experts, n) for n, _ in sizes)
        self.shifts = nn.ParameterList(torch.zeros(n_experts, n) for n, _ in sizes)
        self.weights = nn.ParameterList(torch.empty(n_experts, n * centres, m) for n, m in sizes)
        for weight in self.weights:
            bound = (6 / (weight.shape[1] + weight.shape[2])) ** 0.5
            nn.init.uniform_(weight, -bound, bound, generator=generator)

    def basis(self, x: Tensor) -> Tensor:
        """phi((x - c_m) / h): (*,) -> (*, centres)"""
        return SHAPES[self.kan]((x[..., None] - self.centre.to(x.dtype)) / self.width)

    def run(self, rows: Tensor, at: Segments) -> Tensor:
        """See `Experts`."""
        for gain, shift, weight in zip(self.gains, self.shifts, self.weights, strict=True):
            own = torch.cat([gain, shift], -1)[:, None]
            a, b = segment_matmul(rows.new_ones(len(rows), 1), own, at.bounds).chunk(2, -1)
            rows = a * F.layer_norm(rows, rows.shape[-1:]) + b
            rows = segment_matmul(self.basis(rows).flatten(-2), weight, at.bounds)
        return rows


class MLPKANMoE(nn.Module):
    """y = sum_e p_e expert_e(x) over the top_k of p = softmax(W_r x), renormalised; the first experts are MLPs, the
    rest KANs.

    ``router='soft'`` (Soft MoE, arXiv 2308.00951): slot inputs are means of the tokens, weighted by a softmax over
    tokens of x Phi; each expert runs on its slots; a softmax over slots mixes back. A token then depends on the others
    of its sequence (axis -2; an input of one axis beside the features is a batch of sequences of one token).

    Args:
        dim: features in and out.
        hidden: hidden units of an MLP expert, GELU, with biases.
        n_experts: experts of both kinds.
        top_k: experts of a token.
        kan: shape of the KAN experts' functions, see `KANExpertBank`.
        kan_hidden: their hidden features; half of ``hidden`` by default.
        router: topk or soft.
        n_kan: how many of the experts are KANs; half of them, rounded down, by default.
        slots: slots of an expert under ``router='soft'``.
        balance: weight in `aux_loss` of E sum_e f_e P_e, f_e the share of choices and P_e the mean of p_e.

    Shape:
        (*, dim) -> (*, dim)

    Raises:
        PomonaError: if top_k or n_kan is more than n_experts, or a name is unknown.

    Source: MLP-KAN: Unifying Deep Representation and Function Learning, arXiv 2410.03027.
    """

    tunable = {"n_experts": [4, 8], "top_k": [1, 2]}

    def __init__(
        self,
        dim: int,
        hidden: int,
        n_experts: int = 8,
        top_k: int = 2,
        kan: str = "rswaf",
        kan_hidden: int | None = None,
        router: Literal["topk", "soft"] = "topk",
        *,
        n_kan: int | None = None,
        slots: int = 1,
        balance: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, hidden=hidden, n_experts=n_experts, top_k=top_k, slots=slots)
        if router not in ("topk", "soft"):
            raise unknown("router", router, ("topk", "soft"))
        n_kan = n_experts // 2 if n_kan is None else n_kan
        for field, value in (("top_k", top_k), ("n_kan", n_kan)):
            if not 0 <= value <= n_experts:
                raise PomonaError(f"{field}={value} must be at most n_experts={n_experts}")
        self.dim, self.n_experts, self.n_mlp, self.top_k = dim, n_experts, n_experts - n_kan, top_k
        self.router_kind, self.slots, self.balance = router, slots, balance
        self.mlps = (
            ExpertBank(self.n_mlp, dim, hidden, act="gelu", bias=True, generator=generator) if self.n_mlp else None
        )
        kan_hidden = max(1, hidden // 2) if kan_hidden is None else kan_hidden
        self.kans = KANExpertBank(n_kan, dim, kan_hidden, kan=kan, generator=generator) if n_kan else None
        self.router = nn.Linear(dim, n_experts * (slots if router == "soft" else 1), bias=False)
        nn.init.uniform_(self.router.weight, -(dim**-0.5), dim**-0.5, generator=generator)
        self.last = LastPass()

    def experts(self, x: Tensor, index: Tensor, gate: Tensor | None = None) -> Tensor:
        """The chosen experts' outputs, added: x (*, dim), index and gate (*, choices) -> (*, dim)"""
        out = x.new_zeros(())
        if self.mlps is not None:
            out = out + self.mlps(x, index.clamp(max=self.n_mlp), gate)
        if self.kans is not None:
            own = index - self.n_mlp
            out = out + self.kans(x, own.masked_fill(own < 0, self.kans.n_experts), gate)
        return out

    def _soft(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of tokens for slots, and the tokens with an axis of their own: (*, tokens, ...)"""
        x = x if x.dim() > 2 else x[..., None, :]
        return self.router(x).to(torch.promote_types(x.dtype, torch.float32)), x

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        check_input(self, x, self.dim)
        if self.router_kind == "soft":
            logits, tokens = self._soft(x)
            means = logits.softmax(-2).mT.to(x.dtype) @ tokens
            index = torch.arange(self.n_experts, device=x.device).repeat_interleave(self.slots)
            y = self.experts(means, index.expand(means.shape[:-1])[..., None])
            return (logits.softmax(-1).to(x.dtype) @ y).reshape(x.shape)
        index, gate, p = top_gates(self.router(x), self.top_k)
        if self.training and self.balance:
            self.last.value = balance_loss(p, index)
        return self.experts(x, index, gate)

    def aux_loss(self) -> Tensor:
        """The weighted balance loss of the last pass in training; 0 for the soft router, which is always even."""
        return self.balance * self.last.value

    @torch.no_grad()
    def expert_usage(self, x: Tensor) -> dict[str, Any]:
        """Share of the routing mass of ``x``, (*, dim), that goes to each kind and to each expert."""
        if self.router_kind == "soft":
            mass = self._soft(x)[0].softmax(-1).unflatten(-1, (self.n_experts, self.slots)).sum(-1)
            share = mass.reshape(-1, self.n_experts).mean(0)
        else:
            index, gate, _ = top_gates(self.router(x), self.top_k)
            share = gate.new_zeros(self.n_experts).index_add_(0, index.flatten(), gate.flatten())
            share = share / gate.sum()
        mlp = float(share[: self.n_mlp].sum())
        return {"mlp": mlp, "kan": float(share[self.n_mlp :].sum()), "experts": share.tolist()}

    def extra_repr(self) -> str:
        """Sizes."""
        return f"dim={self.dim}, n_experts={self.n_experts}, top_k={self.top_k}, router={self.router_kind}"


class MLPKANBlock(MixerBlock):
    """u = x + attention(norm(x)), y = u + MLPKANMoE(norm(u)): the mixture in the place of the feed-forward part.

    Args:
        dim: D.
        hidden: see `MLPKANMoE`.
        heads: of the attention; by default the divisor of D nearest below D / 16.
        causal: a token sees only itself and earlier ones.
        options: further arguments of `MLPKANMoE`.

    Shape:
        (B, N, D), mask (B, N) or None -> (B, N, D)
    """

    def __init__(self, dim: int, hidden: int, *, heads: int | None = None, causal: bool = False, **options: Any):
        super().__init__(dim, AttentionMixer(dim, heads=heads, causal=causal), MLPKANMoE(dim, hidden, **options))


class MLPKANNet(nn.Module):
    """x = W x + b, then ``depth`` times x = x + MLPKANMoE(norm(x)), then norm and a linear head: for plain vectors.

    Args:
        in_features: of the input.
        out_features: of the output.
        dim: features of the blocks.
        hidden: see `MLPKANMoE`; 2 dim by default.
        depth: blocks.
        options: further arguments of `MLPKANMoE`.

    Shape:
        (B, *input shape with in_features numbers) -> (B, out_features)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        dim: int = 32,
        hidden: int | None = None,
        depth: int = 2,
        **options: Any,
    ) -> None:
        super().__init__()
        check_positive(in_features=in_features, out_features=out_features, depth=depth)
        self.in_features = in_features
        self.embed = nn.Linear(in_features, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))
        self.blocks = nn.ModuleList(MLPKANMoE(dim, hidden or 2 * dim, **options) for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, out_features))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = x.flatten(1)
        check_input(self, x, self.in_features)
        x = self.embed(x)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return self.head(x)


@torch.no_grad()
def expert_usage(net: nn.Module, data: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Share of the routing mass that goes to KAN and to MLP experts, the mean over a network's mixtures.

    Args:
        net: any network with `MLPKANMoE` layers.
        data: name of a data set -> inputs of the network.

    Returns:
        {data set: {"mlp": share, "kan": share}}

    Raises:
        PomonaError: if the network has no such layer.
    """
    layers = [module for module in net.modules() if isinstance(module, MLPKANMoE)]
    if not layers:
        raise PomonaError("net has no MLPKANMoE layer whose experts could be used")
    found: list[dict[str, Any]] = []
    handles = [
        layer.register_forward_pre_hook(lambda module, args: found.append(module.expert_usage(args[0])))
        for layer in layers
    ]
    result, training = {}, net.training
    try:
        net.eval()
        for name, x in data.items():
            found.clear()
            net(x)
            result[name] = {kind: sum(usage[kind] for usage in found) / len(found) for kind in ("mlp", "kan")}
    finally:
        net.train(training)
        for handle in handles:
            handle.remove()
    return result
