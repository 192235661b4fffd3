"""A causal transformer language model whose parts can be replaced one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, check_divisible, check_positive, unknown
from pomona.nn.activation import act as make_activation
from pomona.nn.check import check_longest
from pomona.nn.feedforward import FeedForward
from pomona.nn.mixing import AttentionMixer
from pomona.nn.residual import Add

NORMS = ("pre", "none")


class CausalAttention(AttentionMixer):
    """Causal `AttentionMixer` with optional biases that also gives its attention weights.

    Shape:
        (B, T, D) -> (B, T, D)
    """

    def __init__(self, dim: int, heads: int, bias: bool = True) -> None:
        super().__init__(dim, heads=heads, causal=True)
        if not bias:
            self.qkv.register_parameter("bias", None)
            self.out.register_parameter("bias", None)

    def pattern(self, x: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(d)) over the present and earlier tokens: (B, T, D) -> (B, heads, T, T)."""
        q, k, _ = self.qkv(x).unflatten(-1, (3, self.heads, -1)).movedim((-3, -2), (0, -3))
        later = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool, device=x.device).triu(1)
        return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(later, float("-inf")).softmax(-1)


class DecoderBlock(nn.Module):
    """x = residual(x, c attention(norm(x)));  x = residual(x, c s ffn(norm(x)))

    c is the model's ``branch_scale``, s the learned ``ffn_scale`` where there is one.

    Shape:
        (B, T, D) -> (B, T, D)
    """

    def __init__(
        self,
        attention: nn.Module,
        ffn: nn.Module,
        norms: tuple[nn.Module, nn.Module],
        residuals: tuple[nn.Module, nn.Module],
        branch_scale: float,
        ffn_scale: float | None,
        dropout: float,
    ) -> None:
        super().__init__()
        self.norm_attention, self.norm_ffn = norms
        self.attention, self.ffn = attention, ffn
        self.join_attention, self.join_ffn = residuals
        self.branch_scale = branch_scale
        self.ffn_scale = None if ffn_scale is None else nn.Parameter(torch.tensor(float(ffn_scale)))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.join_attention(x, self.branch_scale * self.dropout(self.attention(self.norm_attention(x))))
        branch = self.branch_scale * self.dropout(self.ffn(self.norm_ffn(x)))
        return self.join_ffn(x, branch if self.ffn_scale is None else self.ffn_scale * branch)


class DecoderLM(nn.Module):
    """Embeddings of tokens and positions, causal blocks, a last norm and a linear map to the vocabulary.

    Args:
        vocab: number of tokens.
        dim, layers, heads: width D, number of blocks, attention heads; heads divides dim.
        hidden: width inside the feed-forward part, 4 dim by default.
        max_len: longest sequence.
        norm: 'pre' for a norm before each branch and before the head, 'none' for no norm anywhere.
        act: activation of the feed-forward part: a name (see `pomona.nn.activation.act`), or (features) -> module.
        tie: the head's weight is that of the token embedding.
        make_ffn: (dim, hidden, layer index) -> feed-forward part; `FeedForward` with ``act`` by default.
        make_norm: (dim) -> norm.
        make_residual: (dim) -> what joins a branch to its input, called as module(x, branch); two a block.
        make_attention: (dim, heads, layer index) -> token mixer, which must be causal; `CausalAttention` by default.
        bias: biases in attention and the feed-forward part.
        branch_scale: fixed factor on every branch; 1 with norms, 1 / sqrt(2 layers) without by default.
        ffn_scale: start of a learned factor on each feed-forward branch; none by default.
        init_std: standard deviation of all weights that are made here; by default 1 / sqrt(inputs) for linear maps and
            1 / sqrt(dim) for embeddings and head. What a ``make_`` argument makes keeps its own initial values.
        embed_std: standard deviation of the embeddings, where it is another.
        dropout: probability on each branch.

    A part that needs the token ids themselves, not their features, has a method ``set_tokens(tokens)``: before each
    forward pass the model calls it with tokens (B, T) on every submodule that has one.

    Shape:
        tokens (B, T) int64 -> logits (B, T, vocab)

    Raises:
        PomonaError: if heads does not divide dim, ``norm`` is unknown, or a sequence is longer than ``max_len``.

    Source:
        Language Models are Unsupervised Multitask Learners (GPT-2, 2019), over Attention Is All You Need,
        arXiv 1706.03762.
    """

    def __init__(
        self,
        vocab: int,
        dim: int = 64,
        layers: int = 2,
        heads: int = 4,
        hidden: int | None = None,
        max_len: int = 64,
        *,
        norm: Literal["pre", "none"] = "pre",
        act: str | Callable[[int], nn.Module] = "gelu",
        tie: bool = True,
        make_ffn: Callable[[int, int, int], nn.Module] | None = None,
        make_norm: Callable[[int], nn.Module] = nn.LayerNorm,
        make_residual: Callable[[int], nn.Module] = lambda dim: Add(),
        make_attention: Callable[[int, int, int], nn.Module] | None = None,
        bias: bool = True,
        branch_scale: float | None = None,
        ffn_scale: float | None = None,
        init_std: float | None = None,
        embed_std: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        hidden = 4 * dim if hidden is None else hidden
        check_positive(vocab=vocab, dim=dim, layers=layers, heads=heads, hidden=hidden, max_len=max_len)
        check_divisible("dim", dim, "heads", heads)
        if norm not in NORMS:
            raise unknown("norm", norm, NORMS)
        super().__init__()
        self.max_len = max_len
        activation = (lambda features: make_activation(act, features=features)) if isinstance(act, str) else act

        def linear(in_features: int, out_features: int) -> nn.Module:
            return nn.Linear(in_features, out_features, bias)

        def attention(index: int) -> nn.Module:
            if make_attention:
                return make_attention(dim, heads, index)
            return init_linear_(CausalAttention(dim, heads, bias), init_std)

        def ffn(index: int) -> nn.Module:
            if make_ffn:
                return make_ffn(dim, hidden, index)
            return init_linear_(FeedForward(dim, hidden, linear, activation), init_std)

        def new_norm() -> nn.Module:
            return make_norm(dim) if norm == "pre" else nn.Identity()

        std = dim**-0.5 if init_std is None else init_std
        self.token, self.position = nn.Embedding(vocab, dim), nn.Embedding(max_len, dim)
        for table in (self.token, self.position):
            nn.init.normal_(table.weight, std=std if embed_std is None else embed_std)
        scale = ((2 * layers) ** -0.5 if norm == "none" else 1.0) if branch_scale is None else branch_scale
        self.blocks = nn.ModuleList(
            DecoderBlock(
                attention(index),
                ffn(index),
                (new_norm(), new_norm()),
                (make_residual(dim), make_residual(dim)),
                scale,
                ffn_scale,
                dropout,
            )
            for index in range(layers)
        )
        self.norm = new_norm()
        self.head = nn.Linear(dim, vocab, bias=False)
        if tie:
            self.head.weight = self.token.weight
        else:
            nn.init.normal_(self.head.weight, std=std)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token and position embeddings, (B, T, D); also hands the ids to the parts that want them."""
        if tokens.is_floating_point() or tokens.dim() != 2:
            raise PomonaError(
                f"DecoderLM takes integer tokens (batch, time), not {tokens.dtype} of shape {tuple(tokens.shape)}"
            )
        check_longest(self, tokens.shape[1], self.max_len, "max_len")
        for module in self.modules():
            if hasattr(module, "set_tokens"):
                module.set_tokens(tokens)  # type: ignore[operator]
        return self.token(tokens) + self.position.weight[: tokens.shape[1]]

    def states(self, tokens: Tensor) -> list[Tensor]:
        """The embedding and the output of each block: layers + 1 tensors (B, T, D)."""
        states = [self.embed(tokens)]
        for block in self.blocks:
            states.append(block(states[-1]))
        return states

    def attention(self, tokens: Tensor) -> Tensor:
        """The attention weights, rows for queries: (layers, B, heads, T, T).

        Raises:
            PomonaError: if some mixer has no method ``pattern``.
        """
        patterns = []
        blocks: Iterable[Any] = self.blocks
        for block, x in zip(blocks, self.states(tokens), strict=False):
            mixer = block.attention
            if not hasattr(mixer, "pattern"):
                raise PomonaError(f"{type(mixer).__name__} has no attention weights; a mixer with .pattern(x) has")
            patterns.append(mixer.pattern(block.norm_attention(x)))
        return torch.stack(patterns)

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.head.weight)


def init_linear_(net: nn.Module, std: float | None = None) -> nn.Module:
    """Draw every linear weight of ``net`` from N(0, std^2), 1 / sqrt(inputs) by default; biases 0. Returns ``net``."""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5 if std is None else std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return net
