"""A transformer whose feed-forward parts are bilinear, so that all but its attention weights is tensor algebra.

Source: A technical note on bilinear layers for interpretability, arXiv 2305.03452.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from pomona.errors import unknown
from pomona.nets.decoder import CausalAttention, DecoderLM, init_linear_
from pomona.nn.bilinear import GLUMLP

NORMS = (None, "rms")


class BilinearTransformer(DecoderLM):
    """A causal transformer with bilinear feed-forward parts, x = x + P (W x * V x), and untied embeddings.

    Args:
        vocab, dim, heads, layers, max_len: as in `DecoderLM`.
        hidden: width of the product, 2 dim by default.
        norm: None, or 'rms' for an RMS norm before each branch and the head, which `fold_norms` takes out.
        gate: None, or a gate (see `pomona.nn.bilinear.Bilinear`) for a control that is no tensor algebra.
        bias: biases in the feed-forward parts; attention has none.
        init_std, embed_std: as in `DecoderLM`; embeddings of variance 1, without which products of two legs start near
            0 where there are no norms.

    Shape:
        tokens (B, T) int64 -> logits (B, T, vocab)

    Raises:
        PomonaError: as `DecoderLM`, and for an unknown norm or gate.
    """

    def __init__(
        self,
        vocab: int,
        dim: int = 64,
        heads: int = 4,
        layers: int = 1,
        hidden: int | None = None,
        max_len: int = 64,
        norm: Literal["rms"] | None = None,
        *,
        gate: str | None = None,
        bias: bool = False,
        init_std: float | None = None,
        embed_std: float = 1.0,
    ) -> None:
        if norm not in NORMS:
            raise unknown("norm", norm, NORMS)
        super().__init__(
            vocab,
            dim,
            layers,
            heads,
            2 * dim if hidden is None else hidden,
            max_len,
            norm="none" if norm is None else "pre",
            tie=False,
            make_norm=nn.RMSNorm,
            make_attention=lambda dim, heads, index: init_linear_(CausalAttention(dim, heads, False), init_std),
            make_ffn=lambda dim, hidden, index: init_linear_(GLUMLP(dim, hidden, gate, bias), init_std),
            branch_scale=1.0,
            init_std=init_std,
            embed_std=embed_std,
        )


@torch.no_grad()
def fold_norms(model: BilinearTransformer, tokens: Tensor) -> BilinearTransformer:
    """A copy without norms: each is frozen at its mean scale on ``tokens`` (B, T) and multiplied into what follows.

    A frozen RMS norm is the linear map x -> g x / s, with s the root mean square of x over all tokens and features.
    """
    new = copy.deepcopy(model)

    def fold(owner: nn.Module, name: str, x: Tensor, linear: nn.Module) -> None:
        norm = getattr(owner, name)
        if isinstance(norm, nn.RMSNorm):
            linear.weight *= norm.weight / x.square().mean().sqrt()  # type: ignore[operator]
            setattr(owner, name, nn.Identity())

    x = new.embed(tokens)
    for block in new.blocks:
        fold(block, "norm_attention", x, block.attention.qkv)  # type: ignore[union-attr, arg-type]
        middle = x + block.attention(block.norm_attention(x))  # type: ignore[operator]
        fold(block, "norm_ffn", middle, block.ffn.product.both)  # type: ignore[union-attr, arg-type]
        x = block(x)
    fold(new, "norm", x, new.head)
    return new
