"""Key-value memories of very many slots, of which a token reads a few: product-key memory, Memory+, PEER.

Source: Memory Layers at Scale, arXiv 2412.09764; product keys: Large Memory Layers with Product Keys, arXiv 1907.05242.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, check_divisible, check_positive
from pomona.nn.check import check_input
from pomona.nn.experts import shapes_may_depend_on_values
from pomona.nn.feedforward import FeedForward


class ProductKeys(nn.Module):
    """The k best of n_keys^2 keys [K1_i, K2_j] for queries [q1, q2]: score = q1 . K1_i + q2 . K2_j.

    The best sums are made of the best halves: k of each table, then k of their k^2 sums. The cost is n_keys k_dim
    products and k^2 sums a query, that is, it grows with the square root of the number of slots.

    Args:
        n_keys: entries of each half table; slot i * n_keys + j has the key [K1_i, K2_j].
        heads: number of heads, each with its own keys.
        k_dim: size of a query, even.
        qk_norm: queries and keys of unit mean square, scores over sqrt(k_dim / 2) times a learned factor.

    Shape:
        (*, heads, k_dim) -> scores and slots, (*, heads, topk)

    Raises:
        PomonaError: if k_dim is odd or a size is not positive.
    """

    halves = 2

    def __init__(
        self,
        n_keys: int,
        heads: int,
        k_dim: int,
        *,
        qk_norm: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_positive(n_keys=n_keys, heads=heads, k_dim=k_dim)
        check_divisible("k_dim", k_dim, "halves", self.halves)
        self.n_keys, self.slots = n_keys, n_keys**2
        rows = self.slots if self.halves == 1 else n_keys
        self.keys = nn.Parameter(torch.empty(heads, self.halves, rows, k_dim // self.halves))
        nn.init.uniform_(self.keys, -(k_dim**-0.5), k_dim**-0.5, generator=generator)
        self.scale = nn.Parameter(torch.ones(())) if qk_norm else None

    def half_scores(self, q: Tensor) -> Tensor:
        """Scores of every row of the half tables: (*, heads, k_dim) -> (*, heads, 2, n_keys)"""
        q, keys = q.unflatten(-1, (self.halves, -1)), self.keys
        if self.scale is not None:
            size = keys.shape[-1:]
            q, keys = F.rms_norm(q, size), F.rms_norm(keys, size) * (self.scale * size[0] ** -0.5)
        return torch.einsum("...hsd,hsnd->...hsn", q, keys)

    def forward(self, q: Tensor, topk: int) -> tuple[Tensor, Tensor]:
        """See the class."""
        check_input(self, q)
        best, row = self.half_scores(q).topk(min(topk, self.n_keys), -1)
        (s1, s2), (i1, i2) = best.unbind(-2), row.unbind(-2)
        sums = (s1[..., :, None] + s2[..., None, :]).flatten(-2)
        slot = (i1[..., :, None] * self.n_keys + i2[..., None, :]).flatten(-2)
        score, at = sums.topk(topk, -1)
        return score, slot.gather(-1, at)


class FlatKeys(ProductKeys):
    """The k best of n_keys^2 keys by computing all scores: the oracle of `ProductKeys`, at the cost of every slot."""

    halves = 1

    def forward(self, q: Tensor, topk: int) -> tuple[Tensor, Tensor]:
        """See the class."""
        return self.half_scores(q).squeeze(-2).topk(topk, -1)

    @torch.no_grad()
    def copy_(self, keys: ProductKeys) -> FlatKeys:
        """Take the keys [K1_i, K2_j] of product keys, without qk_norm."""
        n = keys.n_keys
        first, second = keys.keys.unbind(1)
        full = torch.cat([first[:, :, None].expand(-1, -1, n, -1), second[:, None].expand(-1, n, -1, -1)], -1)
        self.keys.copy_(full.flatten(1, 2)[:, None])
        return self


class MemoryValues(nn.Module):
    """A pool of values V (slots, v_dim), to be shared by giving the same object to several memory layers.

    Args:
        slots: number of values.
        v_dim: size of a value.
        in_features: size of the inputs; with it each slot has an input vector u as well, for PEER.
        lr_scale: learning rate of the values over that of the rest (the paper keeps the values' own at 1e-3).
        sparse: gradients as sparse tensors of the rows that were read, for an optimiser that takes them (SGD,
            Adagrad, SparseAdam).

    Raises:
        PomonaError: for sizes that are not positive.
    """

    def __init__(
        self,
        slots: int,
        v_dim: int,
        *,
        in_features: int | None = None,
        lr_scale: float = 1.0,
        sparse: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_positive(slots=slots, v_dim=v_dim, lr_scale=lr_scale)
        self.lr_scale, self.sparse = lr_scale, sparse
        self.weight = nn.Parameter(torch.empty(slots, v_dim))
        nn.init.normal_(self.weight, std=v_dim**-0.5, generator=generator)
        self.inputs = None
        if in_features is not None:
            self.inputs = nn.Parameter(torch.empty(slots, in_features))
            nn.init.normal_(self.inputs, std=in_features**-0.5, generator=generator)

    def forward(self, slot: Tensor, share: Tensor) -> Tensor:
        """sum_k share_k V[slot_k]: (n, k), (n, k) -> (n, v_dim)"""
        share = share.to(self.weight.dtype)
        if not (torch.compiler.is_compiling() or shapes_may_depend_on_values()):  # vmap knows no batched fused sum
            return (share[:, None] @ F.embedding(slot, self.weight))[:, 0]
        return F.embedding_bag(slot, self.weight, per_sample_weights=share, mode="sum", sparse=self.sparse)

    def activations(self, slot: Tensor, x: Tensor) -> Tensor:
        """gelu(u_slot . x): (n, k), (n, in_features) -> (n, k)"""
        if self.inputs is None:
            raise PomonaError("peer=True needs shared=MemoryValues(..., in_features=dim)")
        return F.gelu((F.embedding(slot, self.inputs, sparse=self.sparse) @ x[..., None])[..., 0])

    def param_groups(self) -> list[dict[str, Any]]:
        """The values have their own learning rate and are not decayed."""
        return [{"params": list(self.parameters()), "lr_scale": self.lr_scale, "weight_decay": 0.0}]

    def extra_repr(self) -> str:
        """Sizes."""
        return f"slots={self.weight.shape[0]}, v_dim={self.weight.shape[1]}"


@dataclass(frozen=True)
class Usage:
    """How data use the slots.

    Attributes:
        hit: share of the slots that were read at all.
        kl: Kullback-Leibler divergence of the distribution of reading weight over slots from the uniform one, nats.
        weight: that distribution, (slots,).
    """

    hit: float
    kl: float
    weight: Tensor


class MemoryLayer(nn.Module):
    """y = sum_heads sum_{k in topk} s_k V[slot_k], s = softmax(scores); Memory+: out = (y * silu(x W1)) W2.

    N = n_keys^2 slots; see `ProductKeys` for how the best are found. With ``peer`` s_k is multiplied by
    gelu(u_k . x), so that each slot is an expert of one hidden unit (Mixture of A Million Experts, arXiv 2407.04153).
    With ``topk`` = N it is attention over all slots. Differentiable once in the values outside ``torch.func``.

    Args:
        dim: features in and out.
        n_keys: rows of each half table of keys.
        heads: queries of a token.
        k_dim: size of a query; half of ``dim``, made even, by default.
        topk: slots that a head reads.
        v_dim: size of a value; ``dim`` by default, or that of ``shared``.
        shared: values to use; an own pool by default.
        plus: the gated output of Memory+; otherwise y itself, or y W where v_dim is not dim.
        peer: slots are one-unit experts.
        qk_norm: see `ProductKeys`.
        query_batch_norm: batch normalisation of the queries.
        flat: keys that are not products, all of them scored (`FlatKeyMemory`).
        lr_scale, sparse: of an own pool, see `MemoryValues`.

    Shape:
        (*, dim) -> (*, dim)

    Raises:
        PomonaError: if topk exceeds the slots, k_dim is odd, or ``shared`` has another number of slots.

    Source: Memory Layers at Scale, arXiv 2412.09764.
    """

    tunable = {"n_keys": [16, 32, 64], "topk": [8, 16, 32]}

    def __init__(
        self,
        dim: int,
        n_keys: int = 32,
        heads: int = 4,
        k_dim: int | None = None,
        topk: int = 32,
        v_dim: int | None = None,
        shared: MemoryValues | None = None,
        plus: bool = True,
        *,
        peer: bool = False,
        qk_norm: bool = False,
        query_batch_norm: bool = False,
        flat: bool = False,
        lr_scale: float = 1.0,
        sparse: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, heads=heads, topk=topk)
        k_dim = 2 * max(1, dim // 4) if k_dim is None else k_dim
        kind = FlatKeys if flat else ProductKeys
        self.keys = kind(n_keys, heads, k_dim, qk_norm=qk_norm, generator=generator)
        slots = self.keys.slots
        if topk > slots:
            raise PomonaError(f"topk={topk} must be at most the {slots} slots of n_keys={n_keys}")
        if shared is not None and len(shared.weight) != slots:
            raise PomonaError(f"shared has {len(shared.weight)} slots, but n_keys={n_keys} makes {slots}")
        self.dim, self.heads, self.topk, self.peer = dim, heads, topk, peer
        v_dim = shared.weight.shape[1] if shared is not None else v_dim or dim
        self.query = nn.Linear(dim, heads * k_dim)
        nn.init.xavier_uniform_(self.query.weight, generator=generator)
        nn.init.zeros_(self.query.bias)
        self.query_norm = nn.BatchNorm1d(heads * k_dim) if query_batch_norm else None
        self.values = shared or MemoryValues(
            slots, v_dim, in_features=dim if peer else None, lr_scale=lr_scale, sparse=sparse, generator=generator
        )
        self.gate = nn.Linear(dim, v_dim, bias=False) if plus else None
        self.out = nn.Linear(v_dim, dim, bias=False) if plus or v_dim != dim else None
        for linear in (self.gate, self.out):
            if linear is not None:
                nn.init.normal_(linear.weight, std=dim**-0.5, generator=generator)

    def queries(self, x: Tensor) -> Tensor:
        """(*, dim) -> (*, heads, k_dim)"""
        q = self.query(x)
        if self.query_norm is not None:
            q = self.query_norm(q.reshape(-1, q.shape[-1])).view(q.shape)
        return q.unflatten(-1, (self.heads, -1))

    def read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The slots that each head reads, and their softmax weights: (*, dim) -> (*, heads, topk) twice."""
        score, slot = self.keys(self.queries(x), self.topk)
        return slot, score.softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        check_input(self, x, self.dim)
        slot, share = (t.reshape(-1, self.heads * self.topk) for t in self.read(x))
        if self.peer:
            share = share * self.values.activations(slot, x.reshape(-1, self.dim))
        y = self.values(slot, share).reshape(*x.shape[:-1], self.values.weight.shape[1])
        if self.gate is not None:
            y = y * F.silu(self.gate(x))
        return y if self.out is None else self.out(y)

    @torch.no_grad()
    def usage(self, x: Tensor) -> Usage:
        """How the inputs ``x``, (*, dim), use the slots."""
        slot, share = self.read(x)
        flat = share.double().flatten()
        weight = flat.new_zeros(self.keys.slots).index_add_(0, slot.flatten(), flat) / flat.sum()
        kl = float((torch.special.entr(weight).sum() - torch.tensor(float(len(weight))).log()).neg())
        return Usage(len(slot.unique()) / len(weight), kl, weight)

    @torch.no_grad()
    def reset_dead(self, x: Tensor, generator: torch.Generator | None = None) -> int:
        """Turn the keys that no input reads towards random queries of ``x``, (*, dim); returns how many rows moved.

        They get the mean length of the others. Of product keys a row of a half table is dead when none of its slots is
        read.
        """
        q = self.queries(x).flatten(0, -3)
        slot = self.keys(q, self.topk)[1]
        halves, n = self.keys.halves, self.keys.keys.shape[2]
        rows = [slot] if halves == 1 else [slot // n, slot % n]
        moved = 0
        for h in range(self.heads):
            for half, row in enumerate(rows):
                keys, dead = self.keys.keys[h, half], row[:, h].flatten().bincount(minlength=n) == 0
                count = int(dead.sum())
                chosen = torch.randint(len(q), (count,), generator=generator).to(q.device)
                towards = F.normalize(q[chosen, h].unflatten(-1, (halves, -1))[:, half], dim=-1)
                keys[dead] = towards * keys[~dead].norm(dim=-1).mean()
                moved += count
        return moved

    def extra_repr(self) -> str:
        """Sizes."""
        return f"dim={self.dim}, slots={self.keys.slots}, heads={self.heads}, topk={self.topk}"


class ResidualMemory(MemoryLayer):
    """y = x + MemoryLayer(x): a memory beside the stream.

    Args:
        features: of input and output.
        n_keys, heads, topk, plus, peer, qk_norm: see `MemoryLayer`.

    Shape:
        (*, features) -> (*, features)
    """

    def __init__(
        self,
        features: int,
        *,
        n_keys: int = 32,
        heads: int = 4,
        topk: int = 32,
        plus: bool = True,
        peer: bool = False,
        qk_norm: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(features, n_keys, heads, topk=topk, plus=plus, peer=peer, qk_norm=qk_norm, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x + super().forward(x)


class FlatKeyMemory(MemoryLayer):
    """A `MemoryLayer` with one full key a slot, all scored: exact, and as costly as there are slots.

    Shape:
        (*, dim) -> (*, dim)
    """

    def __init__(self, dim: int, n_keys: int = 32, **options: Any) -> None:
        super().__init__(dim, n_keys, flat=True, **options)


def memory_ffns(
    layers: int,
    places: int = 1,
    *,
    n_keys: int,
    make_ffn: Callable[[int, int], nn.Module] = FeedForward,
    lr_scale: float = 1.0,
    **options: Any,
) -> Callable[[int, int, int], nn.Module]:
    """A ``make_ffn`` for a language model: memory layers over one pool at ``places`` equally spaced middle blocks.

    Args:
        layers: blocks of the model.
        places: how many of them get a memory in place of their feed-forward part (1 or 3 in the paper).
        n_keys: rows of a half table.
        make_ffn: (dim, hidden) -> feed-forward part of the other blocks.
        lr_scale: see `MemoryValues`.
        options: further arguments of `MemoryLayer`.

    Returns:
        (dim, hidden, layer index) -> feed-forward part; call it for one model only, since the pool is shared.
    """
    if not 1 <= places <= layers:
        raise PomonaError(f"places={places} must be between 1 and layers={layers}")
    where = {layers * (2 * i + 1) // (2 * places) for i in range(places)}
    pool: list[MemoryValues] = []

    def make(dim: int, hidden: int, index: int) -> nn.Module:
        if index not in where:
            return make_ffn(dim, hidden)
        layer = MemoryLayer(dim, n_keys, shared=pool[0] if pool else None, lr_scale=lr_scale, **options)
        pool.append(layer.values)
        return layer

    return make
