"""FNet: tokens mixed by a Fourier transform instead of attention; and the mixers it is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, check_positive, unknown
from pomona.nn.feedforward import FeedForward
from pomona.nn.mixing import AttentionMixer, MixerBlock, NoMix, check_tokens, hide


def dft_matrices(n: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of exp(-2 pi i j k / n), (n, n) each."""
    index = torch.arange(n, device=like.device)
    angle = (index[:, None] * index % n).double() * (-2 * math.pi / n)
    return angle.cos().to(like), angle.sin().to(like)


class FourierMixer(nn.Module):
    """y = Re(F_N x F_D): the real part of the discrete Fourier transform over tokens and channels. No parameters.

    Padding is set to zero, but the transform spreads over all positions, so another length gives other outputs. A token
    sees every other one; there is no causal form.

    Args:
        dim: D; with ``tokens`` it lets matmul keep its matrices instead of making them at every call.
        tokens: N.
        method: fft, or matmul: products with the DFT matrices, which can be faster up to about 512 tokens.
        scale: backward (unnormalised, as in the paper, where a layer norm follows) or ortho (divided by sqrt(N D)).
        causal: must be False.

    Shape:
        (B, N, D), mask (B, N) or None -> (B, N, D)

    Source: FNet: Mixing Tokens with Fourier Transforms, arXiv 2105.03824.
    """

    imaginary = 0.0

    def __init__(
        self,
        dim: int | None = None,
        tokens: int | None = None,
        *,
        method: Literal["fft", "matmul"] = "fft",
        scale: Literal["backward", "ortho"] = "backward",
        causal: bool = False,
    ) -> None:
        super().__init__()
        if method not in ("fft", "matmul"):
            raise unknown("method", method, ["fft", "matmul"])
        if scale not in ("backward", "ortho"):
            raise unknown("scale", scale, ["backward", "ortho"])
        if causal:
            raise PomonaError(
                "causal=True is impossible: a Fourier transform over the tokens mixes later ones into earlier"
            )
        self.method, self.scale = method, scale
        if method == "matmul":
            for n in {n for n in (dim, tokens) if n is not None}:
                for part, matrix in zip(("real", "imag"), dft_matrices(n, torch.empty(0)), strict=True):
                    self.register_buffer(f"{part}_{n}", matrix, persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See the class."""
        x = hide(x, mask)
        if self.method == "fft":
            y = self._fft(x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).to(x.dtype)
        else:
            y = self._matmul(x)
        return y / math.sqrt(x.shape[-1] * x.shape[-2]) if self.scale == "ortho" else y

    def _fft(self, x: Tensor) -> Tensor:
        """From half of the channels: the transform of real x at (n, d) is the conjugate of that at (-n, -d)."""
        dim = x.shape[-1]
        if x.numel() == 0:
            return x
        half = torch.fft.rfft2(x, dim=(-2, -1))
        mirrored = half[..., 1 : (dim + 1) // 2].flip(-2, -1).roll(1, -2)
        y = torch.cat([half.real, mirrored.real], -1)
        if self.imaginary:
            y = y + self.imaginary * torch.cat([half.imag, -mirrored.imag], -1)
        return y

    def _matmul(self, x: Tensor) -> Tensor:
        (cn, sn), (cd, sd) = self._dft(x.shape[-2], x), self._dft(x.shape[-1], x)
        xc, xs = x @ cd, x @ sd
        y = cn @ xc - sn @ xs
        return y + self.imaginary * (cn @ xs + sn @ xc) if self.imaginary else y

    def _dft(self, n: int, x: Tensor) -> tuple[Tensor, Tensor]:
        if hasattr(self, f"real_{n}"):
            return getattr(self, f"real_{n}").to(x), getattr(self, f"imag_{n}").to(x)
        return dft_matrices(n, x)

    def extra_repr(self) -> str:
        """Options."""
        return f"method={self.method}, scale={self.scale}"


class HartleyMixer(FourierMixer):
    """y = Re(F_N x F_D) - Im(F_N x F_D): the Hartley transform, its own inverse up to a factor N D. No parameters."""

    imaginary = -1.0


def fourier_mixer(
    dim: int, tokens: int, *, method: Literal["fft", "matmul"] = "fft", scale: Literal["backward", "ortho"] = "ortho"
) -> FourierMixer:
    """``mixer=fourier``: orthonormal, since no norm follows in a pre-norm block (arXiv 2105.03824 is post-norm)."""
    return FourierMixer(dim, tokens, method=method, scale=scale)


def hartley_mixer(
    dim: int, tokens: int, *, method: Literal["fft", "matmul"] = "fft", scale: Literal["backward", "ortho"] = "ortho"
) -> HartleyMixer:
    """``mixer=hartley``: orthonormal, as :func:`fourier_mixer`."""
    return HartleyMixer(dim, tokens, method=method, scale=scale)


class DCTMixer(nn.Module):
    """y = C_N x C_D^T with orthonormal type-II cosine transforms over tokens and channels. No parameters.

    Shape:
        (B, N, D), mask (B, N) or None -> (B, N, D)
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See the class."""
        x = hide(x, mask)
        return dct_matrix(x.shape[-2], x) @ x @ dct_matrix(x.shape[-1], x).T


def dct_matrix(n: int, like: Tensor) -> Tensor:
    """Orthonormal DCT-II: C[k, j] = sqrt((2 - [k = 0]) / n) cos(pi k (2 j + 1) / (2 n)), (n, n)."""
    k = torch.arange(n, device=like.device, dtype=torch.float64)
    matrix = torch.cos(math.pi / (2 * n) * k[:, None] * (2 * k + 1)) * math.sqrt(2 / max(n, 1))
    scale = torch.ones_like(k).index_fill(0, torch.zeros(min(n, 1), dtype=torch.long, device=k.device), math.sqrt(0.5))
    return (matrix * scale[:, None]).to(like)


class MatrixMixer(nn.Module):
    """y = A x B with A (N, N) over the tokens and B (D, D) over the channels, learned or fixed as they were drawn.

    Entries start as N(0, 1 / N) and N(0, 1 / D), which keeps the size of y.

    Args:
        dim: D.
        tokens: N.
        learned: train A and B (the paper's Linear encoder), or leave them (its Random encoder).

    Shape:
        (B, N, D), mask (B, N) or None -> (B, N, D)
    """

    tokens_matrix: Tensor
    dim_matrix: Tensor

    def __init__(
        self, dim: int, tokens: int, *, learned: bool = True, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        check_positive(dim=dim, tokens=tokens)
        for name, n in (("tokens_matrix", tokens), ("dim_matrix", dim)):
            matrix = torch.randn(n, n, generator=generator) / math.sqrt(n)
            if learned:
                self.register_parameter(name, nn.Parameter(matrix))
            else:
                self.register_buffer(name, matrix)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See the class."""
        check_tokens(x, self.tokens_matrix.shape[0])
        return self.tokens_matrix @ hide(x, mask) @ self.dim_matrix


def linear_mixer(dim: int, tokens: int, *, generator: torch.Generator | None = None) -> MatrixMixer:
    """`MatrixMixer` with learned matrices."""
    return MatrixMixer(dim, tokens, generator=generator)


def random_mixer(dim: int, tokens: int, *, generator: torch.Generator | None = None) -> MatrixMixer:
    """`MatrixMixer` with matrices that stay as they were drawn."""
    return MatrixMixer(dim, tokens, learned=False, generator=generator)


ENCODER_MIXERS: dict[str, Callable[[int, int], nn.Module]] = {
    "fourier": FourierMixer,
    "hartley": HartleyMixer,
    "dct": lambda dim, tokens: DCTMixer(),
    "linear": linear_mixer,
    "random": random_mixer,
    "attention": lambda dim, tokens: AttentionMixer(dim),
    "none": lambda dim, tokens: NoMix(),
}
"""Mixers of the paper's encoders by name: (dim, tokens) -> module."""


class FNetBlock(MixerBlock):
    """u = LN(x + Re(F_N x F_D)),  y = LN(u + FFN(u)); with ``norm="pre"`` the norms stand before the branches.

    Args:
        dim: D.
        hidden: width of the feed-forward part; 4 D by default.
        norm: post (as in the paper) or pre.
        mixer: a token mixer; Fourier by default.
        dropout: probability after the feed-forward activation.

    Shape:
        (B, N, D), mask (B, N) or None -> (B, N, D)
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        norm: Literal["pre", "post"] = "post",
        mixer: nn.Module | None = None,
        dropout: float = 0.0,
    ) -> None:
        ffn = FeedForward(dim, hidden or 4 * dim, dropout=dropout)
        super().__init__(dim, mixer or FourierMixer(), ffn, norm=norm)


class FNet(nn.Module):
    """Word, position and type embeddings -> LN -> projection -> blocks -> pooler, masked-word head, next-sentence head.

    Args:
        vocab: number of words.
        dim: D.
        layers: blocks.
        max_len: most tokens; learned mixers (linear, random) need exactly so many.
        types: number of token types (sentence A, B).
        hidden: width of the feed-forward parts; 4 D by default.
        mixer: fourier, hartley, dct, linear, random, attention or none.
        hybrid: so many of the last blocks use attention; 2 is the paper's recommendation.
        norm: post or pre.
        pad: id of the padding word, whose embedding stays zero and which is hidden from the mixers; none by default.
        dropout: probability on the embeddings and in the feed-forward parts.
        init_std: standard deviation of all weights at the start; narrow networks train faster from about 1 / sqrt(D).

    Shape:
        ids (B, N), types (B, N) or None -> (B, N, D)

    Source: FNet: Mixing Tokens with Fourier Transforms, arXiv 2105.03824.
    """

    def __init__(
        self,
        vocab: int,
        dim: int = 64,
        layers: int = 4,
        max_len: int = 512,
        *,
        types: int = 2,
        hidden: int | None = None,
        mixer: str = "fourier",
        hybrid: int = 0,
        norm: Literal["pre", "post"] = "post",
        pad: int | None = None,
        dropout: float = 0.0,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        check_positive(vocab=vocab, dim=dim, layers=layers, max_len=max_len, types=types)
        if not 0 <= hybrid <= layers:
            raise PomonaError(f"hybrid={hybrid} must lie between 0 and layers={layers}")
        if mixer not in ENCODER_MIXERS:
            raise unknown("mixer", mixer, ENCODER_MIXERS)
        self.max_len, self.pad = max_len, pad
        self.word = nn.Embedding(vocab, dim, padding_idx=pad)
        self.position = nn.Embedding(max_len, dim)
        self.token_type = nn.Embedding(types, dim)
        self.norm = nn.LayerNorm(dim)
        self.projection = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        kinds = [mixer] * (layers - hybrid) + ["attention"] * hybrid
        self.blocks = nn.ModuleList(
            FNetBlock(dim, hidden, norm=norm, mixer=ENCODER_MIXERS[kind](dim, max_len), dropout=dropout)
            for kind in kinds
        )
        self.pool = nn.Linear(dim, dim)
        self.transform = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim))
        self.word_bias = nn.Parameter(torch.zeros(vocab))
        self.next_sentence = nn.Linear(dim, 2)
        for module in self.modules():
            if isinstance(module, (nn.Embedding, nn.Linear)):
                nn.init.normal_(module.weight, std=init_std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        if pad is not None:
            nn.init.zeros_(self.word.weight[pad : pad + 1].detach())

    def forward(self, ids: Tensor, types: Tensor | None = None) -> Tensor:
        """See the class."""
        if ids.shape[-1] > self.max_len:
            raise PomonaError(f"ids has {ids.shape[-1]} tokens, but max_len={self.max_len}")
        types = torch.zeros_like(ids) if types is None else types
        positions = torch.arange(ids.shape[-1], device=ids.device)
        x = self.word(ids) + self.position(positions) + self.token_type(types)
        x = self.dropout(self.projection(self.norm(x)))
        mask = None if self.pad is None else ids != self.pad
        for block in self.blocks:
            x = block(x, mask)
        return x

    def pooled(self, tokens: Tensor) -> Tensor:
        """A linear map of the first token, through tanh: (B, N, D) -> (B, D)."""
        return torch.tanh(self.pool(tokens[..., 0, :]))

    def masked_word_logits(self, tokens: Tensor) -> Tensor:
        """Scores of the words, weights tied to the embedding: (B, N, D) -> (B, N, vocab)."""
        return F.linear(self.transform(tokens), self.word.weight, self.word_bias)

    def next_sentence_logits(self, tokens: Tensor) -> Tensor:
        """Whether the second sentence follows the first: (B, N, D) -> (B, 2)."""
        return self.next_sentence(self.pooled(tokens))
