"""Feed-forward layers of many experts: routed by a hash of the token, and by learned routers to compare with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pomona.errors import PomonaError, check_divisible, check_positive
from pomona.nn.check import check_input
from pomona.nn.experts import ExpertBank, LastPass, Load, TokenContext, balance_loss, load, segments, top_gates
from pomona.nn.hash_tables import HashTable, hash_table


class MultiHashFFN(nn.Module):
    """y_t = sum_k W2_{k, e_k} act(W1_{k, e_k} h_t), e_k = hash_k(x_t): segments of hidden units, hashed one by one.

    Segment k of the hidden units comes from expert hash_k(x_t): as many operations as one expert of ``hidden`` units,
    but n_experts^n_hash combinations.

    Args:
        dim: features in and out.
        hidden: hidden units that a token uses, in all.
        n_experts: number of experts.
        vocab: number of token ids.
        n_hash: number of hash functions; divides ``hidden``.
        hash: a name (see `hash_tables.HASHES`) or a `HashTable`, or one of these for each segment.
        act: activation, by name.
        bias: biases in the experts.
        counts: occurrences of each token in the training text, (vocab,), which 'balanced' evens out.
        embeddings: trained token embeddings, (vocab, D), for 'clustered' and 'dispersed'.
        seed: of the first hash function; the others follow it.

    Shape:
        h (B, T, dim), token ids (B, S >= T) -> (B, T, dim); the last T ids are those of h

    Raises:
        PomonaError: if n_hash does not divide hidden, for hashes that cannot be made, and for missing token ids.

    Source: Hash Layers For Large Sparse Models, arXiv 2106.04426.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        n_experts: int,
        vocab: int,
        n_hash: int = 2,
        *,
        hash: str | HashTable | Sequence[str | HashTable] = "balanced",
        act: str = "relu",
        bias: bool = False,
        counts: Tensor | None = None,
        embeddings: Tensor | None = None,
        seed: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, hidden=hidden, n_experts=n_experts, vocab=vocab, n_hash=n_hash)
        check_divisible("hidden", hidden, "n_hash", n_hash)
        kinds = [hash] * n_hash if isinstance(hash, str | HashTable) else list(hash)
        if len(kinds) != n_hash:
            raise PomonaError(f"hash names {len(kinds)} functions, but n_hash={n_hash}")
        self.n_experts = n_experts
        self.tables = nn.ModuleList(
            kind
            if isinstance(kind, HashTable)
            else hash_table(kind, n_experts, vocab, counts=counts, embeddings=embeddings, seed=seed + k)
            for k, kind in enumerate(kinds)
        )
        if any(table.n_experts != n_experts for table in self.tables):
            raise PomonaError(f"every HashTable must be for n_experts={n_experts}")
        self.bank = ExpertBank(n_hash * n_experts, dim, hidden // n_hash, act=act, bias=bias, generator=generator)
        with torch.no_grad():  # the sum over segments starts as large as one layer of `hidden` units
            self.bank.down.mul_(n_hash**-0.5)
        self.context = TokenContext()

    def experts(self, tokens: Tensor) -> Tensor:
        """The expert of each segment: token ids (B, T) -> (B, T, n_hash)"""
        return torch.stack([table(tokens) for table in self.tables], -1)

    def forward(self, h: Tensor, tokens: Tensor | None = None) -> Tensor:
        """See the class; without ``tokens`` the ids are those that the language model has set."""
        check_input(self, h, self.bank.dim)
        if tokens is not None:
            self.context.set_tokens(tokens)
        index = self.experts(self.context(h))
        index = index[..., index.shape[-2] - h.shape[-2] :, :]
        shift = self.n_experts * torch.arange(len(self.tables), device=h.device)
        return self.bank(h, index + shift)

    def load(self, tokens: Tensor) -> list[Load]:
        """How evenly these tokens, (B, T), fall on the experts, for each hash function."""
        return [load(index, self.n_experts) for index in self.experts(tokens).unbind(-1)]

    def extra_repr(self) -> str:
        """Sizes."""
        return f"n_experts={self.n_experts}, n_hash={len(self.tables)}"


class HashFFN(MultiHashFFN):
    """y_t = W2_e act(W1_e h_t), e = hash(x_t): the token's id chooses the expert, nothing is learned or balanced.

    The arguments are those of `MultiHashFFN` with one hash function.

    Shape:
        h (B, T, dim), token ids (B, S >= T) -> (B, T, dim)

    Source: Hash Layers For Large Sparse Models, arXiv 2106.04426.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        n_experts: int,
        vocab: int,
        hash: str | HashTable = "balanced",
        act: str = "relu",
        *,
        bias: bool = False,
        counts: Tensor | None = None,
        embeddings: Tensor | None = None,
        seed: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            dim,
            hidden,
            n_experts,
            vocab,
            1,
            hash=hash,
            act=act,
            bias=bias,
            counts=counts,
            embeddings=embeddings,
            seed=seed,
            generator=generator,
        )


class SwitchFFN(nn.Module):
    """y = p_e expert_e(h), e = argmax p, p = softmax(W_r h): a learned router that sends a token to one expert.

    In training an expert takes at most ceil(capacity_factor * tokens / n_experts) tokens, the earliest ones; the
    others get 0 (and pass by on the residual path).

    Args:
        dim: features in and out.
        hidden: hidden units of an expert.
        n_experts: number of experts.
        act: activation, by name.
        capacity_factor: room of an expert over an even share; None: no limit.
        balance: weight in `aux_loss` of E sum_e f_e P_e, which even loads make least.
        bias: biases in the experts.

    Shape:
        (*, dim) -> (*, dim)

    Source: Switch Transformers, arXiv 2101.03961.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        n_experts: int,
        *,
        act: str = "relu",
        capacity_factor: float | None = 1.25,
        balance: float = 0.01,
        bias: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if capacity_factor is not None:
            check_positive(capacity_factor=capacity_factor)
        self.n_experts, self.capacity_factor, self.balance = n_experts, capacity_factor, balance
        self.bank = ExpertBank(n_experts, dim, hidden, act=act, bias=bias, generator=generator)
        self.router = nn.Linear(dim, n_experts, bias=False)
        std = math.sqrt(0.1 / dim)  # a tenth of the usual variance: even probabilities at the start
        nn.init.trunc_normal_(self.router.weight, std=std, a=-2 * std, b=2 * std, generator=generator)
        self.last = LastPass()

    def route(self, h: Tensor) -> Tensor:
        """The chosen experts: (*, dim) -> (*)"""
        return self.router(h).argmax(-1)

    def forward(self, h: Tensor) -> Tensor:
        """See the class."""
        check_input(self, h, self.bank.dim)
        index, gate, p = top_gates(self.router(h), 1, renormalise=False)
        if self.training:
            self.last.value = balance_loss(p, index)
            if self.capacity_factor is not None:
                capacity = math.ceil(self.capacity_factor * index.numel() / self.n_experts)
                late = segments(index, self.n_experts).rank().view(index.shape) >= capacity
                index = index.masked_fill(late, self.n_experts)
        return self.bank(h, index, gate)

    def aux_loss(self) -> Tensor:
        """The weighted balance loss of the last pass in training."""
        return self.balance * self.last.value


class BaseLayer(nn.Module):
    """y = sigmoid(h . a_e) expert_e(h): e by the best assignment with equal shares in training, by argmax otherwise.

    The assignment maximises the sum of h . a_e with ceil(tokens / n_experts) places an expert; it needs the values, so
    training does not run under ``vmap`` or whole-graph compilation. Its cost grows with the cube of the tokens.

    Args:
        dim: features in and out.
        hidden: hidden units of an expert.
        n_experts: number of experts.
        act: activation, by name.
        bias: biases in the experts.
        group: assign so many tokens at a time, each group for itself, which is cheaper; all at once by default.

    Shape:
        (*, dim) -> (*, dim)

    Source: BASE Layers: Simplifying Training of Large, Sparse Models, arXiv 2103.16716.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        n_experts: int,
        *,
        act: str = "relu",
        bias: bool = False,
        group: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if group is not None:
            check_positive(group=group)
        self.n_experts, self.group = n_experts, group
        self.bank = ExpertBank(n_experts, dim, hidden, act=act, bias=bias, generator=generator)
        self.centroids = nn.Parameter(torch.empty(n_experts, dim))
        nn.init.orthogonal_(self.centroids, gain=0.1, generator=generator)

    def assign(self, score: Tensor) -> Tensor:
        """The best assignment with equal shares: score (tokens, experts) -> (tokens,)"""
        from scipy.optimize import linear_sum_assignment

        places = -(-len(score) // self.n_experts)
        cost = score.detach().double().cpu().numpy().repeat(places, 1)
        return torch.from_numpy(linear_sum_assignment(cost, maximize=True)[1] // places).to(score.device)

    def forward(self, h: Tensor) -> Tensor:
        """See the class."""
        check_input(self, h, self.bank.dim)
        score = h @ self.centroids.mT
        if self.training and score.numel():
            flat = score.flatten(0, -2)
            groups = flat.split(self.group or len(flat))
            index = torch.cat([self.assign(part) for part in groups]).view(h.shape[:-1])[..., None]
        else:
            index = score.argmax(-1, keepdim=True)
        return self.bank(h, index, score.gather(-1, index).sigmoid())
