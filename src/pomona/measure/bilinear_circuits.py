"""Circuits of a transformer with bilinear feed-forward parts: its logits as a sum over paths, each a matrix or tensor.

Source: A technical note on bilinear layers for interpretability, arXiv 2305.03452.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pomona.errors import PomonaError, check_positive
from pomona.nets.bilinear_transformer import BilinearTransformer
from pomona.nets.decoder import CausalAttention
from pomona.nn.bilinear import GLUMLP, Bilinear


def hadamard_to_tensor(w: Tensor, v: Tensor, p: Tensor) -> Tensor:
    """T[o, i, j] = sum_m P[o, m] W[m, i] V[m, j], so that P (W x * V y) = T x y.

    Args:
        w, v: (hidden, in) and (hidden, in').
        p: (out, hidden).

    Returns:
        (out, in, in')
    """
    return torch.einsum("om,mi,mj->oij", p, w, v)


class Hadamard(NamedTuple):
    """The three maps of P (W x * V x), and the relative error of the tensor that they make."""

    w: Tensor
    v: Tensor
    p: Tensor
    error: float


@torch.no_grad()
def tensor_to_hadamard(
    tensor: Tensor,
    hidden: int,
    *,
    iterations: int = 500,
    restarts: int = 5,
    tolerance: float = 1e-10,
    generator: torch.Generator | None = None,
) -> Hadamard:
    """W, V and P whose tensor is nearest to the given one: canonical decomposition by alternating least squares.

    Where the decomposition is unique it is so up to the order and the scales of the hidden units; here the rows of W
    and V have length 1.

    Args:
        tensor: (out, in, in').
        hidden: number of hidden units.
        iterations: of each start at most.
        restarts: random starts, of which the best is kept.
        tolerance: relative error at which no more are tried.
        generator: of the starts.

    Raises:
        PomonaError: if ``tensor`` has not three dimensions.
    """
    check_positive(hidden=hidden, iterations=iterations, restarts=restarts)
    if tensor.dim() != 3:
        raise PomonaError(f"tensor has shape {tuple(tensor.shape)}; the decomposition is of (out, in, in')")
    flat = [tensor.movedim(axis, 0).flatten(1) for axis in range(3)]
    size = tensor.norm()
    best: Hadamard | None = None
    for _ in range(restarts):
        # factors (size, hidden) of the axes out, in, in'
        factors = [torch.randn(n, hidden, generator=generator).to(tensor) for n in tensor.shape]
        error = float("inf")
        for _ in range(iterations):
            for axis in range(3):
                a, b = (factors[other] for other in range(3) if other != axis)
                rows = torch.einsum("im,jm->ijm", a, b).flatten(0, 1)
                factors[axis] = torch.linalg.lstsq(rows, flat[axis].mT).solution.mT
                if axis < 2:  # scales gather in the last factor
                    factors[axis] = nn.functional.normalize(factors[axis], dim=0)
            p, w, v = factors
            error = float((hadamard_to_tensor(w.mT, v.mT, p) - tensor).norm() / size)
            if error < tolerance:
                break
        scale = v.norm(dim=0).clamp_min(torch.finfo(v.dtype).tiny)
        found = Hadamard(w.mT, (v / scale).mT, p * scale, error)
        best = found if best is None or error < best.error else best
        if error < tolerance:
            break
    assert best is not None
    return best


def append_one(layer: Bilinear) -> Bilinear:
    """The layer without biases, on inputs (*, in_features + 1) whose last coordinate is 1: the biases are its columns.

    Raises:
        PomonaError: if the layer has a gate.
    """
    _check_no_gate(layer)
    weight = layer.both.weight
    bias = weight.new_zeros(len(weight)) if layer.both.bias is None else layer.both.bias
    new = Bilinear(layer.in_features + 1, layer.out_features, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        new.both.weight.copy_(torch.cat([weight, bias[:, None]], 1))
    return new


class LinearForm(NamedTuple):
    """y_o = x^T Q_o x + L_o x + c_o. quadratic: (out, in, in), symmetric. linear: (out, in). constant: (out,)."""

    quadratic: Tensor
    linear: Tensor
    constant: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """(*, in) -> (*, out)"""
        return torch.einsum("oij,...i,...j->...o", self.quadratic, x, x) + x @ self.linear.mT + self.constant


@torch.no_grad()
def linear_form(mlp: GLUMLP) -> LinearForm:
    """P ((W x + b) * (V x + c)) + d as quadratic, linear and constant parts.

    Raises:
        PomonaError: if the layer has a gate.
    """
    full = append_one(mlp.product)
    tensor = hadamard_to_tensor(full.w, full.v, mlp.project.weight)
    tensor = (tensor + tensor.mT) / 2
    constant = tensor[:, -1, -1]
    if mlp.project.bias is not None:
        constant = constant + mlp.project.bias
    return LinearForm(tensor[:, :-1, :-1], 2 * tensor[:, :-1, -1], constant)


class Superposition(NamedTuple):
    """Input pairs by falling magnitude. pairs: (out, k, 2), i <= j. values: (out, k), the coefficient of x_i x_j."""

    pairs: Tensor
    values: Tensor


def superposition_table(layer: Bilinear | GLUMLP, k: int = 10) -> Superposition:
    """The k products of two inputs that count most for each output.

    Raises:
        PomonaError: if the layer has a gate or a bias.
    """
    check_positive(k=k)
    product = layer.product if isinstance(layer, GLUMLP) else layer
    _check_no_gate(product)
    if product.both.bias is not None:
        raise PomonaError("bias=True has linear terms beside the products; see append_one")
    weight = layer.project.weight if isinstance(layer, GLUMLP) else torch.eye(layer.out_features).to(product.w)
    with torch.no_grad():
        tensor = hadamard_to_tensor(product.w, product.v, weight)
        i, j = torch.triu_indices(tensor.shape[1], tensor.shape[1], device=tensor.device)
        values = torch.where(i == j, 1.0, 2.0) * ((tensor + tensor.mT) / 2)[:, i, j]
        top = values.abs().topk(min(k, len(i)), dim=1).indices
        return Superposition(torch.stack([i, j], 1)[top], values.gather(1, top))


Leg = Callable[[Tensor, Tensor], Tensor]
"""(embedding (B, T, D), attention weights (B, heads, T, T)) -> (B, T, D), or (D + 1) wide with a constant."""


@dataclass
class Path:
    """One summand of the logits of a one-layer transformer.

    Attributes:
        name: 'direct', 'head h', 'mlp(a, b)' with legs 'embedding', 'head h' or 'constant', or 'bias'.
        factors: for 'direct' and 'head h' the one matrix M (D, D) from embeddings to the stream; for 'mlp(a, b)' P
            (D, hidden), W M_a and V M_b (hidden, D; one column for a constant leg); for 'bias' the vector (D, 1).
        evaluate: (tokens (B, T), attention weights or None for the model's own) -> its logits (B, T, vocab).
    """

    name: str
    factors: tuple[Tensor, ...]
    evaluate: Callable[..., Tensor]

    @property
    def tensor(self) -> Tensor:
        """M (D, D), or the third-order T[o, i, j] of the legs' embeddings (D, D, D)."""
        if len(self.factors) == 1:
            return self.factors[0]
        p, w, v = self.factors
        return hadamard_to_tensor(w, v, p)

    def pair_logits(self, model: BilinearTransformer, left: Tensor, right: Tensor) -> Tensor:
        """What the path adds to the logits for tokens at the ends of its two legs: U T (E left) (E right).

        Args:
            left, right: tokens (*), ignored for a leg that is constant.

        Returns:
            (*, vocab)

        Raises:
            PomonaError: for a path without two legs.
        """
        if len(self.factors) == 1:
            raise PomonaError(f"path {self.name!r} has not two legs; only paths through the feed-forward part have")
        p, w, v = self.factors
        legs = [
            factor[:, 0].expand(*tokens.shape, -1) if factor.shape[1] == 1 else model.token(tokens) @ factor.mT
            for factor, tokens in ((w, left), (v, right))
        ]
        return legs[0] * legs[1] @ (model.head.weight @ p).mT

    @torch.no_grad()
    def norm(self, model: BilinearTransformer) -> float:
        """Frobenius norm of the path from tokens to logits, without forming it: of U M E or of U T (E, E)."""
        first, *legs = self.factors
        out = model.head.weight @ first
        inside = [leg if leg.shape[1] == 1 else leg @ model.token.weight.mT for leg in legs]
        if not legs:
            return float((out if first.shape[1] == 1 else out @ model.token.weight.mT).norm())
        gram = out.mT @ out
        for leg in inside:
            gram = gram * (leg @ leg.mT)
        return float(gram.sum().clamp(min=0).sqrt())


@torch.no_grad()
def expand_paths(model: BilinearTransformer) -> list[Path]:
    """The paths whose logits add up to those of a one-layer model: direct, through each head, and through the
    feed-forward part with each of its legs fed by the embedding or by a head.

    With h heads these are 1 + h + (1 + h)^2; biases add a constant leg and, for the last one, a path without legs.

    Raises:
        PomonaError: if the model has not one layer, or has norms or gates.
    """
    if len(model.blocks) != 1:
        raise PomonaError(f"layers={len(model.blocks)}: the paths of one layer are expanded; use layers=1")
    if not isinstance(model.norm, nn.Identity):
        raise PomonaError("norm='rms' makes the logits no sum over paths; take it out with fold_norms")
    attention, ffn = model.blocks[0].attention, model.blocks[0].ffn
    assert isinstance(attention, CausalAttention) and isinstance(ffn, GLUMLP)
    _check_no_gate(ffn.product)
    heads = attention.heads
    values = attention.qkv.weight.detach().chunk(3)[2].unflatten(0, (heads, -1))
    outs = attention.out.weight.detach().unflatten(1, (heads, -1)).movedim(1, 0)
    maps = {"embedding": torch.eye(values.shape[-1]).to(values)}
    maps |= {f"head {h}": outs[h] @ values[h] for h in range(heads)}

    def stream(name: str, tokens: Tensor, pattern: Tensor | None) -> Tensor:
        """What a leg is fed with: (B, T, D)."""
        x = model.embed(tokens)
        if name == "embedding":
            return x
        weights = model.attention(tokens)[0] if pattern is None else pattern
        return weights[:, int(name.split()[1])] @ x @ maps[name].mT

    def single(name: str) -> Callable[..., Tensor]:
        @torch.no_grad()
        def evaluate(tokens: Tensor, pattern: Tensor | None = None) -> Tensor:
            return model.head(stream(name, tokens, pattern))

        return evaluate

    def double(a: str, b: str) -> Callable[..., Tensor]:
        @torch.no_grad()
        def evaluate(tokens: Tensor, pattern: Tensor | None = None) -> Tensor:
            legs = [
                bias if name == "constant" else stream(name, tokens, pattern) @ weight.mT
                for name, weight, bias in ((a, w, biases[0]), (b, v, biases[1]))
            ]
            logits = model.head((legs[0] * legs[1]) @ p.mT)
            return logits.expand(*tokens.shape, -1)

        return evaluate

    w, v, p = ffn.product.w.detach(), ffn.product.v.detach(), ffn.project.weight.detach()
    paths = [Path("direct" if name == "embedding" else name, (m,), single(name)) for name, m in maps.items()]
    left, right = ({name: weight @ m for name, m in maps.items()} for weight in (w, v))
    bias = ffn.product.both.bias
    biases = w.new_zeros(2, len(w)) if bias is None else bias.detach().view(2, -1)
    if bias is not None:
        left["constant"], right["constant"] = biases[0, :, None], biases[1, :, None]
    paths += [Path(f"mlp({a}, {b})", (p, wa, vb), double(a, b)) for a, wa in left.items() for b, vb in right.items()]
    if ffn.project.bias is not None:
        offset = ffn.project.bias.detach()

        @torch.no_grad()
        def constant(tokens: Tensor, pattern: Tensor | None = None) -> Tensor:
            return model.head(offset).expand(*tokens.shape, -1)

        paths.append(Path("bias", (offset[:, None],), constant))
    return paths


def _check_no_gate(layer: Bilinear) -> None:
    if layer.gate is not None:
        raise PomonaError(f"gate={layer.gate!r} makes the layer no product of linear maps; circuits need gate=None")
