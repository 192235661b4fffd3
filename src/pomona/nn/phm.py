"""Parameterised hypercomplex multiplication: a weight that is a sum of n Kronecker products."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, check_divisible, check_positive
from pomona.nn.algebra import CAYLEY_DICKSON, algebra, rule_similarity
from pomona.nn.structured import StructuredLinear, glorot_variance


class PHMLinear(StructuredLinear):
    """A linear layer with about 1/n of the parameters, whose rule of multiplication is learned.

    W = sum_i A_i kron S_i,  y = W x + b

    A_i (n, n) says how the n blocks of x are mixed and S_i (out / n, in / n) what is done inside a block.
    With the rules of the quaternions W x is the Hamilton product. Parameters: n^3 + in out / n (+ out).

    Args:
        in_features, out_features: sizes, both divisible by n unless `pad`.
        n: number of blocks and of Kronecker products.
        learn_rules: train A; otherwise it is a buffer.
        rules: initial A: a tensor (n, n, n), the name of an algebra of dimension n (see `algebra`), or None
            for U(-1/sqrt(n), 1/sqrt(n)).
        shared_rules: an nn.Parameter (n, n, n) used as A together with other layers; overrides the two above.
        bias: add a learned b.
        pad: pad the input with zeros and cut the output where n does not divide a size.
        generator: source of the initial values.

    S is normal with the variance that gives W the variance of Glorot's initialisation.

    Shape:
        (*, in_features) -> (*, out_features)

    Raises:
        PomonaError: if n does not divide both sizes and `pad` is off, or the rules are not (n, n, n).

    Source:
        Beyond Fully-Connected Layers with Quaternions: Parameterization of Hypercomplex Multiplications
        with 1/n Parameters, arXiv 2102.08597.
    """

    rules: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n: int = 4,
        learn_rules: bool = True,
        rules: Tensor | str | None = None,
        shared_rules: nn.Parameter | None = None,
        bias: bool = True,
        *,
        pad: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive(n=n)
        for field, size in (("in_features", in_features), ("out_features", out_features)):
            if size % n and not pad:
                raise PomonaError(f"{field}={size} is not divisible by n={n}; choose another n or set pad=True")
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.n = n
        self._own_rules = learn_rules and shared_rules is None
        self.pad = pad
        self._padding = (-in_features % n, -out_features % n)
        block = (n, (out_features + self._padding[1]) // n, (in_features + self._padding[0]) // n)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if shared_rules is not None:
            self.rules = shared_rules
        else:
            initial = initial_rules(n, rules, generator, factory)
            if learn_rules:
                self.rules = nn.Parameter(initial)
            else:
                self.register_buffer("rules", initial)
        if self.rules.shape != (n, n, n):
            raise PomonaError(f"rules have shape {tuple(self.rules.shape)}; n={n} needs ({n}, {n}, {n})")
        # Var(W) = Var(S) sum(A^2) / n^2 on average over the blocks of W
        rules_size = n**2 if self.rules.is_meta else float(self.rules.detach().square().sum())
        std = n * math.sqrt(glorot_variance(in_features, out_features) / rules_size) if rules_size else 1.0
        self.blocks = nn.Parameter(torch.empty(block, **factory).normal_(0, std, generator=generator))

    def weight(self) -> Tensor:
        """sum_i A_i kron S_i, (out_features, in_features)."""
        return self._padded_weight()[: self.out_features, : self.in_features]

    def _padded_weight(self) -> Tensor:
        return torch.einsum("iab,ioc->aobc", self.rules, self.blocks).flatten(2).flatten(0, 1)

    def product(self, x: Tensor) -> Tensor:
        """W x, by blocks for small batches and through the dense W for large ones, whichever costs less.

        The product itself costs the same; assembling W takes n^2 in out / n operations, mixing the blocks
        of the batch n^2 times the narrower side of the batch.
        """
        rows = x.numel() // self.in_features
        return self.by_blocks(x) if rows < max(self.blocks.shape[1:]) else F.linear(x, self.weight())

    def by_blocks(self, x: Tensor) -> Tensor:
        """W x without forming W: y_k = sum_{i,j} A_i[k, j] S_i x_j, with the rules on the narrower side."""
        n, (_, out_block, in_block) = self.n, self.blocks.shape
        x = F.pad(x, (0, self._padding[0])).unflatten(-1, (n, in_block))
        if out_block < in_block:
            inner = torch.einsum("...jc,ioc->...jio", x, self.blocks)
            y = torch.einsum("...jio,ikj->...ko", inner, self.rules)
        else:
            mixed = torch.einsum("...jc,ikj->...kic", x, self.rules)
            y = torch.einsum("...kic,ioc->...ko", mixed, self.blocks)
        return y.flatten(-2)[..., : self.out_features]

    def flops(self, batch: int = 1) -> int:
        """The product, and the cheaper of assembling W and mixing blocks."""
        _, out_block, in_block = self.blocks.shape
        mixing = self.n**3 * min(out_block * in_block, batch * min(out_block, in_block))
        return 2 * (batch * self.n**2 * out_block * in_block + mixing)

    @torch.no_grad()
    def project_(self, matrix: Tensor, iterations: int = 200) -> Self:
        """The nearest sum of n Kronecker products (Van Loan and Pitsianis).

        Rearranged to one row per entry of A and one column per entry of S, W becomes sum_i vec(A_i) vec(S_i)^T, so
        a truncated SVD is the exact minimiser. Rules that are fixed or shared stay, and S is a least-squares fit.
        Entries that padding adds are free: they are filled from the last fit, ``iterations`` times.
        """
        self.check_matrix(matrix)
        n, (_, out_block, in_block) = self.n, self.blocks.shape
        whole = matrix.new_zeros(n * out_block, n * in_block)
        for _ in range(iterations if any(self._padding) else 1):
            whole[: self.out_features, : self.in_features] = matrix
            rearranged = whole.view(n, out_block, n, in_block).transpose(1, 2).reshape(n * n, -1)
            if self._own_rules:
                u, s, vh = torch.linalg.svd(rearranged, full_matrices=False)
                root = s[:n].sqrt()
                self.rules.zero_()[: len(root)] = (u[:, :n] * root).T.unflatten(1, (n, n))
                self.blocks.zero_()[: len(root)] = (root[:, None] * vh[:n]).unflatten(1, (out_block, in_block))
            else:
                self.blocks.copy_((torch.linalg.pinv(self.rules.flatten(1).T) @ rearranged).view_as(self.blocks))
            whole = self._padded_weight()
        return self

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        return f"{super().extra_repr()}, n={self.n}"


def initial_rules(
    n: int, rules: Tensor | str | None, generator: torch.Generator | None, factory: dict[str, Any]
) -> Tensor:
    """A fresh A (n, n, n): given, of a named algebra, or uniform in +-1/sqrt(n)."""
    if rules is None:
        return torch.empty(n, n, n, **factory).uniform_(-1 / math.sqrt(n), 1 / math.sqrt(n), generator=generator)
    return (algebra(rules, n) if isinstance(rules, str) else rules.detach()).to(**factory, copy=True)


class QuaternionLinear(PHMLinear):
    """A linear layer by Hamilton products: `PHMLinear` with the fixed rules of the quaternions, S = (R, X,
    Y, Z).

    Takes the arguments of `PHMLinear` except n and the rules. Parameters: in out / 4 (+ out).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **options: Any) -> None:
        super().__init__(in_features, out_features, 4, False, "quaternion", bias=bias, **options)


def learned_rules(layer: PHMLinear, *, basis_change: bool = True, seed: int = 0) -> dict[str, float]:
    """How near the learned A comes to each known algebra of its dimension; 1 is the same up to a change of
    basis.

    Args:
        layer: the trained layer.
        basis_change: also search rotations of the input and output blocks (see `rule_similarity`).
        seed: of the search.

    Returns:
        {name of algebra: similarity in [0, 1]}, best first.
    """
    names = [name for name, dimension in CAYLEY_DICKSON.items() if dimension == layer.n] + ["cyclic"]
    found = {
        name: rule_similarity(layer.rules, algebra(name, layer.n), basis_change=basis_change, seed=seed)
        for name in names
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def split_parts(y: Tensor, n: int, parts: int) -> tuple[Tensor, ...]:
    """Cut (*, parts * d) into ``parts`` tensors (*, d), each with its share of all n blocks."""
    return tuple(part.flatten(-2) for part in y.unflatten(-1, (n, parts, -1)).unbind(-2))


class PHMLSTMCell(nn.Module):
    """A long short-term memory cell whose two maps are PHM layers.

    i, f, g, o = W x + U h + b;  c' = sigmoid(f) c + sigmoid(i) tanh(g);  h' = sigmoid(o) tanh(c')

    Args:
        input_size, hidden_size: sizes, divisible by n.
        n: number of Kronecker products.
        **options: further arguments of both `PHMLinear`.

    Shape:
        x (batch, input_size) and state (h, c), each (batch, hidden_size) -> (h', c')

    Source:
        PHM-LSTM of arXiv 2102.08597.
    """

    def __init__(self, input_size: int, hidden_size: int, n: int = 4, **options: Any) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.n = n
        check_divisible("hidden_size", hidden_size, "n", n)
        self.input_map = PHMLinear(input_size, 4 * hidden_size, n, **options)
        self.hidden_map = PHMLinear(hidden_size, 4 * hidden_size, n, bias=False, **options)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """One step; the state starts at zero."""
        h, c = state if state is not None else (x.new_zeros(*x.shape[:-1], self.hidden_size),) * 2
        i, f, g, o = split_parts(self.input_map(x) + self.hidden_map(h), self.n, 4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class PHMAttention(nn.Module):
    """Multi-head softmax attention with PHM layers for queries, keys, values and output.

    q, k, v = W x;  y = W_out softmax(q k^T / sqrt(d)) v

    Args:
        dim: width, divisible by heads and, unless `linear` is given, by n.
        heads: number of heads.
        n: number of Kronecker products.
        causal: let a token see itself and earlier ones only.
        linear: makes the two maps, ``linear(in_features, out_features)``, in the place of `PHMLinear`; a
            control of another structure is then the same network.
        **options: further arguments of `PHMLinear`.

    Shape:
        x (batch, tokens, dim), mask (batch, tokens) true where there is a token -> (batch, tokens, dim)
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        n: int = 4,
        causal: bool = False,
        *,
        linear: Callable[[int, int], nn.Module] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        check_divisible("dim", dim, "heads", heads)
        make = linear or phm_maker(n, **options)
        self.heads = heads
        self.parts = n if linear is None else 1
        self.causal = causal
        self.qkv = make(dim, 3 * dim)
        self.out = make(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend over the tokens."""
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in split_parts(self.qkv(x), self.parts, 3))
        allowed = None
        if mask is not None:
            tokens = x.shape[1]
            square = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device)
            allowed = mask.bool()[:, None, None, :] & (square.tril() if self.causal else square)
            allowed = allowed | torch.eye(tokens, dtype=torch.bool, device=x.device)  # a softmax over nothing is nan
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=self.causal and allowed is None)
        return self.out(y.transpose(1, 2).flatten(2))


def phm(in_features: int, out_features: int, bias: bool = True, n: int = 4, learn_rules: bool = True) -> PHMLinear:
    """`PHMLinear` for sizes of any kind: what n does not divide is padded."""
    return PHMLinear(in_features, out_features, n, learn_rules, bias=bias, pad=True)


def quaternion(in_features: int, out_features: int, bias: bool = True) -> QuaternionLinear:
    """`QuaternionLinear` for sizes of any kind: what 4 does not divide is padded."""
    return QuaternionLinear(in_features, out_features, bias, pad=True)


def phm_maker(n: int, **options: Any) -> Callable[[int, int], nn.Module]:
    """``linear(in_features, out_features)`` that makes a `PHMLinear` with these options."""
    return lambda in_features, out_features: PHMLinear(in_features, out_features, n, **options)


class PHMTransformer(nn.Module):
    """A pre-norm transformer over tokens; attention and feed-forward maps come from ``linear``.

    See `phm_transformer` for the arguments.
    """

    def __init__(
        self,
        vocabulary: int,
        dim: int,
        depth: int,
        heads: int,
        hidden: int,
        max_tokens: int,
        n: int,
        causal: bool,
        linear: Callable[[int, int], nn.Module] | None,
        **options: Any,
    ) -> None:
        super().__init__()
        make = linear or phm_maker(n, **options)
        self.token = nn.Embedding(vocabulary, dim)
        self.position = nn.Parameter(torch.zeros(max_tokens, dim))
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position, std=0.02)
        self.attention = nn.ModuleList(
            PHMAttention(dim, heads, n, causal, linear=linear, **options) for _ in range(depth)
        )
        self.ffn = nn.ModuleList(nn.Sequential(make(dim, hidden), nn.GELU(), make(hidden, dim)) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * depth + 1))
        self.head = nn.Linear(dim, vocabulary)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (batch, tokens, vocabulary) for tokens (batch, tokens)."""
        x = self.token(tokens) + self.position[: tokens.shape[1]]
        for layer, (attention, ffn) in enumerate(zip(self.attention, self.ffn, strict=True)):
            x = x + attention(self.norms[2 * layer](x), mask)
            x = x + ffn(self.norms[2 * layer + 1](x))
        return self.head(self.norms[-1](x))


def phm_transformer(
    vocabulary: int,
    dim: int = 96,
    depth: int = 2,
    heads: int = 4,
    n: int = 4,
    *,
    hidden: int | None = None,
    max_tokens: int = 256,
    causal: bool = True,
    shared: bool = False,
    linear: Callable[[int, int], nn.Module] | None = None,
    **options: Any,
) -> PHMTransformer:
    """A transformer whose linear maps are all PHM layers, embeddings and the last map to tokens excepted.

    Args:
        vocabulary: number of tokens.
        dim, depth, heads: width, number of blocks, attention heads.
        n: number of Kronecker products; divides dim and hidden.
        hidden: width inside the feed-forward part, 4 dim by default.
        max_tokens: longest sequence.
        causal: predict the next token.
        shared: one learned rule A for all layers.
        linear: another maker of linear maps (dense, low rank), for a control.
        **options: further arguments of `PHMLinear`.

    Source:
        PHM-Transformer of arXiv 2102.08597; shared rules as in Compacter, arXiv 2106.04647.
    """
    if shared and linear is None:
        factory: dict[str, Any] = {str(key): options[key] for key in ("device", "dtype") if key in options}
        initial = initial_rules(n, options.pop("rules", None), options.get("generator"), factory)
        options["shared_rules"] = nn.Parameter(initial)
    hidden = 4 * dim if hidden is None else hidden
    return PHMTransformer(vocabulary, dim, depth, heads, hidden, max_tokens, n, causal, linear, **options)
