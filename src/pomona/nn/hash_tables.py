"""Fixed hash functions from tokens to experts, made before training and never changed.

Source: Hash Layers For Large Sparse Models, arXiv 2106.04426.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, check_positive, unknown
from pomona.nn.experts import Load, load


def _mixed(tokens: Tensor) -> Tensor:
    """A number below 2^31 for each pair (x_{t-1}, x_t), spread evenly."""
    mix = KEYS["previous"](tokens) * 0x9E3779B1 + tokens * 0x85EBCA77
    mix = (mix ^ (mix >> 15)) * 0x2C1B3C6D
    return (mix ^ (mix >> 17)) & 0x7FFFFFFF


KEYS: dict[str, Callable[[Tensor], Tensor]] = {
    "token": lambda tokens: tokens,
    "previous": lambda tokens: F.pad(tokens[..., :-1], (1, 0), value=-1),
    "next": lambda tokens: F.pad(tokens[..., 1:], (0, 1), value=-1),
    "bigram": _mixed,
    "position": lambda tokens: torch.arange(tokens.shape[-1], device=tokens.device).expand(tokens.shape),
}
"""What is looked up for each place of (*, T) token ids; -1 stands where the sequence has no such neighbour."""


class HashTable(nn.Module):
    """expert_t = table[key_t], and key_t mod n_experts where the table has no such key (or -1 there).

    Args:
        table: expert of each token id, (vocab,) integers; -1 for ids that were not seen.
        n_experts: number of experts.
        key: token, previous, next, bigram (a hash of the last two ids) or position.

    Shape:
        token ids (*, T) -> experts (*, T)

    Raises:
        PomonaError: for an unknown key, or a table that names an expert that is not there.

    Source: Hash Layers For Large Sparse Models, arXiv 2106.04426.
    """

    table: Tensor

    def __init__(self, table: Tensor, n_experts: int, *, key: str = "token") -> None:
        super().__init__()
        check_positive(n_experts=n_experts)
        if key not in KEYS:
            raise unknown("key", key, KEYS)
        if len(table) and not -1 <= int(table.min()) <= int(table.max()) < n_experts:
            raise PomonaError(f"table must hold experts 0 .. {n_experts - 1}, or -1 for unseen tokens")
        self.n_experts, self.key = n_experts, key
        ids = torch.arange(len(table))
        self.register_buffer("table", torch.where(table < 0, ids % n_experts, table.long()))

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        key = KEYS[self.key](tokens)
        other = key.remainder(self.n_experts)
        if not len(self.table):
            return other
        known = (key >= 0) & (key < len(self.table))
        return torch.where(known, self.table[key.clamp(0, len(self.table) - 1)], other)

    def load(self, tokens: Tensor) -> Load:
        """How evenly these tokens, (*, T), fall on the experts."""
        return load(self(tokens), self.n_experts)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"vocab={len(self.table)}, n_experts={self.n_experts}, key={self.key}"


def random_table(n_experts: int, vocab: int, *, seed: int = 0) -> Tensor:
    """Each token to an expert drawn uniformly: (vocab,)"""
    return torch.randint(n_experts, (vocab,), generator=torch.Generator().manual_seed(seed))


def balanced_table(n_experts: int, counts: Tensor, *, seed: int = 0) -> Tensor:
    """Tokens in the order of falling counts, each to the expert with the fewest tokens of text so far: (vocab,)

    Args:
        n_experts: number of experts.
        counts: occurrences of each token in the training text, (vocab,); tokens without any get -1.
        seed: 0 for the exact order; others jitter it a little, for a table as even but otherwise unlike.
    """
    order = counts.double().clone()
    if seed:
        order *= 1 + torch.rand(len(order), dtype=order.dtype, generator=torch.Generator().manual_seed(seed))
    table, heap = torch.full((len(counts),), -1), [(0.0, e) for e in range(n_experts)]
    for token in torch.argsort(order, descending=True, stable=True).tolist():
        if counts[token] > 0:
            carried, e = heap[0]
            heapq.heapreplace(heap, (carried + float(counts[token]), e))
            table[token] = e
    return table


def clustered_table(n_experts: int, embeddings: Tensor, *, seed: int = 0) -> Tensor:
    """The k-means cluster of each token's embedding, (vocab, D) -> (vocab,): like tokens share an expert."""
    from sklearn.cluster import KMeans

    means = KMeans(n_experts, n_init=1, random_state=seed).fit(embeddings.detach().double().cpu().numpy())
    return torch.from_numpy(means.labels_.astype(np.int64))


def dispersed_table(n_experts: int, embeddings: Tensor, counts: Tensor, *, seed: int = 0) -> Tensor:
    """Clusters as above, but the members of each spread evenly over the experts: like tokens are kept apart."""
    cluster = clustered_table(n_experts, embeddings, seed=seed)
    table, carried = torch.zeros_like(cluster), np.zeros(n_experts)
    order = torch.argsort(counts.double(), descending=True, stable=True)
    members = np.zeros((n_experts, n_experts))
    for token in order.tolist():
        here = members[int(cluster[token])]
        e = np.lexsort((carried, here))[0]  # fewest of this cluster first, then the lightest
        here[e] += 1
        carried[e] += float(counts[token])
        table[token] = int(e)
    return table


def snapshot_table(n_experts: int, vocab: int, tokens: Tensor, index: Tensor) -> Tensor:
    """The expert that a trained router chose most often for each token: (vocab,), -1 for tokens that did not occur.

    Args:
        n_experts: number of experts.
        vocab: number of token ids.
        tokens: ids (*, T).
        index: the router's choices (*, T) or (*, T, 1).
    """
    votes = torch.zeros(vocab * n_experts, dtype=torch.int64)
    votes += torch.bincount(tokens.flatten() * n_experts + index.flatten(), minlength=len(votes))
    most, expert = votes.view(vocab, n_experts).max(-1)
    return torch.where(most > 0, expert, -1)


HASHES = ("random", "balanced", "bigram", "previous", "position", "oracle_future", "clustered", "dispersed")
"""Hash functions that `hash_table` makes by name."""


def hash_table(
    kind: str,
    n_experts: int,
    vocab: int,
    *,
    counts: Tensor | None = None,
    embeddings: Tensor | None = None,
    seed: int = 0,
) -> HashTable:
    """A hash function by name; see `HASHES`. The future token's hash is an upper bound, not a usable model.

    Args:
        kind: random, balanced, bigram, previous, position, oracle_future, clustered or dispersed.
        n_experts: number of experts.
        vocab: number of token ids.
        counts: occurrences of each token in the training text, (vocab,); all alike by default.
        embeddings: a trained model's token embeddings, (vocab, D), for clustered and dispersed.
        seed: of random choices.

    Raises:
        PomonaError: for an unknown kind, counts of another length, or missing embeddings.
    """
    if kind not in HASHES:
        raise unknown("hash", kind, HASHES)
    counts = torch.ones(vocab) if counts is None else counts
    if len(counts) != vocab:
        raise PomonaError(f"counts has {len(counts)} entries; vocab={vocab} needs one for each token")
    if kind in {"clustered", "dispersed"}:
        if embeddings is None or len(embeddings) != vocab:
            raise PomonaError(f"hash={kind!r} needs embeddings=, one row for each of the {vocab} tokens")
        if kind == "clustered":
            return HashTable(clustered_table(n_experts, embeddings, seed=seed), n_experts)
        return HashTable(dispersed_table(n_experts, embeddings, counts, seed=seed), n_experts)
    if kind in {"bigram", "position"}:
        return HashTable(torch.empty(0, dtype=torch.int64), n_experts, key=kind)
    if kind == "random":
        return HashTable(random_table(n_experts, vocab, seed=seed), n_experts)
    key = {"balanced": "token", "previous": "previous", "oracle_future": "next"}[kind]
    return HashTable(balanced_table(n_experts, counts, seed=seed), n_experts, key=key)
