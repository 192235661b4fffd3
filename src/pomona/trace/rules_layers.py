"""Rules of whole layers: products with weights, convolution, attention, norms, pooling, recurrence."""

from __future__ import annotations

import string
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from pomona.trace.labels import Labels, Value, dims_of, permute, positional
from pomona.trace.rules import axis_rule, cat, normalise, stack

LETTERS = string.ascii_letters


def biased(labels: Labels, out: Value, bias: Value | None, dim: int) -> Value:
    """A layer's bias belongs to the rows of its weight."""
    return out if bias is None else with_vectors(labels, out, [bias], dim, "out")


def with_vectors(labels: Labels, x: Value, vectors: Sequence[Value | None], dim: int, role: str = "elem") -> Value:
    """Elementwise with vectors that lie along ``dim``."""
    for vector in vectors:
        if vector is not None:
            labels.role(role, vector)
            at = [-1 if d == dim % x.ndim else 1 for d in range(x.ndim)]
            x = labels.tie(x, labels.shape(vector, partial(torch.reshape, shape=at)))
    return x


# --- products ---


@axis_rule("aten.linear")
def linear(labels: Labels, x: Value, weight: Value, bias: Value | None = None) -> Value:
    """``x W^T + b``."""
    *lead, i, o = list(LETTERS[: x.ndim + 1])
    rest = "".join(lead)
    out = labels.contract(x, rest + i, weight, o + i if weight.ndim == 2 else i, rest + o * (weight.ndim == 2))
    return biased(labels, out, bias, -1)


@axis_rule("aten.matmul", "aten.mm", "aten.bmm", "aten.mv", "aten.dot")
def matmul(labels: Labels, x: Value, y: Value, *_: Any) -> Value:
    """Batched product with broadcasting."""
    i, j, k, *rest = list(LETTERS)
    left = "".join(rest[: max(x.ndim - 2, 0)])[::-1]
    right = "".join(rest[: max(y.ndim - 2, 0)])[::-1]
    row, column = i * (x.ndim > 1), j * (y.ndim > 1)
    return labels.contract(x, left + row + k, y, right + k + column, max(left, right, key=len) + row + column)


@axis_rule("aten.addmm", "aten.baddbmm", "aten.addmv")
def addmm(labels: Labels, bias: Value, x: Value, y: Value, **_: Any) -> Value:
    """``b + x y``."""
    labels.role("out", bias) if bias.kind == "param" else None
    return labels.tie(matmul(labels, x, y), bias)


@axis_rule("aten.einsum")
def einsum(labels: Labels, equation: str, operands: Sequence[Value], **_: Any) -> Value:
    """Operands contracted from left to right, each letter summed once no later operand has it."""
    equation = equation.replace(" ", "")
    inputs, arrow, out = equation.partition("->")
    terms = inputs.split(",")
    dots = max(v.ndim - len(t.replace("...", "")) for v, t in zip(operands, terms, strict=True))
    spare = [c for c in LETTERS if c not in equation][:dots]
    if not arrow:
        out = "..." * ("..." in inputs) + "".join(
            sorted(c for c in set(inputs) if inputs.count(c) == 1 and c.isalpha())
        )
    full = []
    for value, term in zip(operands, terms, strict=True):
        many = value.ndim - len(term.replace("...", ""))
        full.append(term.replace("...", "".join(spare[dots - many :])))
    out = out.replace("...", "".join(spare))
    if any(len(set(term)) < len(term) for term in full):
        operands = [labels.fix_all(v) for v in operands]  # a diagonal
        sizes = {c: n for v, t in zip(operands, full, strict=True) for c, n in zip(t, v.shape, strict=True)}
        return positional([sizes[c] for c in out])
    result, letters = operands[0], full[0]
    if len(operands) == 1:
        summed = labels.reduce(result, [d for d, c in enumerate(letters) if c not in out])
        left = [c for c in letters if c in out]
        return permute(summed, [left.index(c) for c in out])
    for n, (value, term) in enumerate(zip(operands[1:], full[1:], strict=True), 2):
        later = set(out).union(*full[n:])
        target = out if n == len(full) else "".join(c for c in dict.fromkeys(letters + term) if c in later)
        result, letters = labels.contract(result, letters, value, term, target), target
    return result


@axis_rule("aten.bilinear")
def bilinear(labels: Labels, x: Value, y: Value, weight: Value, bias: Value | None = None) -> Value:
    """``x W_o y`` for every output o."""
    rest = LETTERS[3 : 3 + x.ndim - 1]
    half = labels.contract(x, rest + "a", weight, "bac", rest + "bc")
    return biased(labels, labels.contract(half, rest + "bc", y, rest + "c", rest + "b"), bias, -1)


@axis_rule("aten.scaled_dot_product_attention")
def attention(
    labels: Labels,
    q: Value,
    k: Value,
    v: Value,
    mask: Value | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    """``softmax(q k^T + mask) v``: the channels of q and k are units within each head, those of v others."""
    if enable_gqa:
        repeat = q.shape[-3] // k.shape[-3]
        k, v = (labels.shape(x, lambda t: t.repeat_interleave(repeat, -3)) for x in (k, v))
    scores = matmul(labels, q, permute(k, [*range(k.ndim - 2), k.ndim - 1, k.ndim - 2]))
    if causal:
        scores = labels.tie(scores, positional((q.shape[-2], k.shape[-2])))
    if mask is not None:
        scores = labels.tie(scores, mask)
    return matmul(labels, normalise(labels, scores, [scores.ndim - 1], "softmax"), v)


# --- convolution ---


def convolution(
    labels: Labels, x: Value, weight: Value, bias: Value | None, groups: int, transposed: bool, result: Sequence[int]
) -> Value:
    """Channels are contracted within each group; kernel and space are held."""
    n = weight.ndim - 2
    batched = x.ndim == n + 2
    if not batched:
        x = labels.shape(x, lambda t: t.unsqueeze(0))
    x = _held(labels, x, n)
    weight = _held(labels, weight, n)
    g = groups
    x = labels.shape(x, lambda t: t.unflatten(1, (g, -1)))
    weight = labels.shape(weight, lambda t: t.unflatten(0, (g, -1)))
    out = labels.contract(x, "bgi", weight, "gio" if transposed else "goi", "bgo")
    out = biased(labels, labels.shape(out, lambda t: t.flatten(1)), bias, 1)
    space = tuple(result[-n:])
    factors = tuple(f.reshape(*f.shape, *[1] * n) for f in out.factors)
    varies = out.varies | {2 + d for d, size in enumerate(space) if size > 1}
    full = Value((*out.shape, *space), factors, varies)
    return full if batched else labels.shape(full, lambda t: t[0])


def _held(labels: Labels, x: Value, n: int) -> Value:
    """The last n dimensions held and reduced away."""
    last = range(x.ndim - n, x.ndim)
    for factor in x.factors:
        labels.hold(factor, last)
    return labels.reduce(x, last)


@axis_rule("aten.conv1d", "aten.conv2d", "aten.conv3d")
def conv(
    labels: Labels, x: Value, weight: Value, bias: Value | None = None, *args: Any, result: Any, **kw: Any
) -> Value:
    """Arguments after the bias: stride, padding, dilation, groups."""
    groups = kw.get("groups", args[3] if len(args) > 3 else 1)
    return convolution(labels, x, weight, bias, groups, False, result)


@axis_rule("aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d")
def conv_transpose(
    labels: Labels, x: Value, weight: Value, bias: Value | None = None, *args: Any, result: Any, **kw: Any
) -> Value:
    """Arguments after the bias: stride, padding, output padding, groups, dilation."""
    groups = kw.get("groups", args[3] if len(args) > 3 else 1)
    return convolution(labels, x, weight, bias, groups, True, result)


@axis_rule("aten.convolution")
def general_convolution(labels: Labels, x: Value, weight: Value, bias: Value | None, *args: Any, result: Any) -> Value:
    """Arguments after the bias: stride, padding, dilation, transposed, output padding, groups."""
    return convolution(labels, x, weight, bias, args[5], args[3], result)


# --- space ---

SPATIAL = {
    **{f"{kind}_pool{n}d": n for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp") for n in (1, 2, 3)},
    **{f"max_pool{n}d_with_indices": n for n in (1, 2, 3)},
    **{f"upsample_{kind}2d": 2 for kind in ("nearest", "bilinear", "bicubic", "_nearest_exact")},
    **{f"_upsample_{kind}2d": 2 for kind in ("nearest_exact", "bilinear_aa", "bicubic_aa")},
    "upsample_nearest1d": 1,
    "upsample_linear1d": 1,
    "upsample_nearest3d": 3,
    "upsample_trilinear3d": 3,
    "reflection_pad1d": 1,
    "reflection_pad2d": 2,
    "replication_pad1d": 1,
    "replication_pad2d": 2,
    "grid_sampler": 2,
    "fft_rfft": 1,
    "fft_irfft": 1,
    "fft_fft": 1,
}
"""Operations over the last n dimensions, the same for every index of the others."""


def spatial(labels: Labels, x: Value, n: int, result: Any) -> Any:
    """Space is held; channels pass."""
    kept = _held(labels, x, n)
    several = isinstance(result, list)
    out = []
    for shape in result if several else [result]:
        space = shape[x.ndim - n :]
        factors = tuple(f.reshape(*f.shape, *[1] * n) for f in kept.factors)
        varies = kept.varies | {x.ndim - n + d for d, size in enumerate(space) if size > 1}
        out.append(Value(tuple(shape), factors, varies, "data"))
    return out if several else out[0]


# --- norms ---


@axis_rule("aten.batch_norm", "aten._native_batch_norm_legit_no_training", "aten.instance_norm")
def batch_norm(
    labels: Labels, x: Value, weight: Value | None, bias: Value | None, mean: Value | None, var: Value | None, *_: Any
) -> Value:
    """Each channel by its own statistics."""
    return with_vectors(labels, x, [weight, bias, mean, var], 1)


@axis_rule("aten.layer_norm", "aten.rms_norm")
def layer_norm(
    labels: Labels, x: Value, size: Sequence[int], weight: Value | None = None, bias: Value | None = None, *_: Any
) -> Value:
    """Normalised over the last dimensions."""
    out = normalise(labels, x, range(x.ndim - len(size), x.ndim), "layer_norm")
    vectors = [one for one in (weight, bias) if isinstance(one, Value)]
    for one in vectors:
        labels.role("elem", one)
    return labels.tie(out, *vectors)


@axis_rule("aten.group_norm")
def group_norm(
    labels: Labels, x: Value, groups: int, weight: Value | None = None, bias: Value | None = None, *_: Any
) -> Value:
    """Normalised over the channels of each group and space."""
    split = labels.shape(x, lambda t: t.unflatten(1, (groups, -1)))
    out = normalise(labels, split, range(2, split.ndim), "group_norm")
    return with_vectors(labels, labels.shape(out, lambda t: t.flatten(1, 2)), [weight, bias], 1)


@axis_rule("aten._weight_norm", "aten._weight_norm_interface")
def weight_norm(labels: Labels, v: Value, g: Value, dim: int = 0) -> Value:
    """``g v / |v|``, the norm over all dimensions but one."""
    return labels.tie(normalise(labels, v, [d for d in range(v.ndim) if d != dim % v.ndim], "weight_norm"), g)


@axis_rule("aten.prelu")
def prelu(labels: Labels, x: Value, weight: Value) -> Value:
    """A slope for each channel, or one for all."""
    for factor in x.factors:
        labels.mark("between", "prelu", factor)
    return with_vectors(labels, x, [weight], min(1, x.ndim - 1))


@axis_rule("aten.glu")
def glu(labels: Labels, x: Value, dim: int = -1) -> Value:
    """One half gates the other."""
    left, right = labels.shape(x, lambda t: t.chunk(2, dim))
    out = labels.tie(left, right)
    for factor in out.factors:
        labels.mark("between", "glu", factor)
    return out


# --- recurrence ---

GATES = {"aten.lstm": 4, "aten.gru": 3, "aten.rnn_tanh": 1, "aten.rnn_relu": 1}


@axis_rule("aten.lstm", "aten.gru", "aten.rnn_tanh", "aten.rnn_relu")
def recurrent(
    labels: Labels,
    x: Value,
    state: Any,
    weights: Sequence[Value],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    *,
    result: Any,
    op: str,
) -> list[Value]:
    """Unit j owns row ``g H + j`` of every gate g, and column j of the recurrent weight (of the projection, if any)."""
    gates, ways = GATES[op], 2 if bidirectional else 1
    per = len(weights) // (layers * ways)
    states = list(state) if isinstance(state, (list, tuple)) else [state]
    finals: list[list[Value]] = [[] for _ in states]
    layer_input = x
    for layer in range(layers):
        outs = []
        for way in range(ways):
            mine = list(weights[(layer * ways + way) * per :][:per])
            hidden, cell_state = _one_direction(
                labels, layer_input, states, mine, has_biases, gates, layer * ways + way
            )
            outs.append(hidden)
            for collected, value in zip(finals, (hidden, cell_state), strict=False):
                collected.append(value)
        layer_input = outs[0] if ways == 1 else cat(labels, outs, outs[0].ndim - 1)
    last = [stack(labels, [labels.reduce(v, [0, 1]) for v in one], 0) for one in finals]
    hidden_states = [labels.shape(v, lambda t: t.unsqueeze(1)) for v in last]
    shaped = [
        Value(tuple(shape), v.factors, v.varies | {1}) for v, shape in zip(hidden_states, result[1:], strict=True)
    ]
    whole = Value(tuple(result[0]), layer_input.factors, positional(result[0]).varies - {len(result[0]) - 1})
    return [whole, *shaped]


def _one_direction(
    labels: Labels, x: Value, states: Sequence[Value], weights: list[Value], biases: bool, gates: int, which: int
) -> tuple[Value, Value]:
    w_ih, w_hh, *rest = weights
    projection = rest[-1] if len(rest) % 2 else None
    rows = linear(labels, ordered_time(labels, x), w_ih, rest[0] if biases else None)
    by_gate = labels.shape(rows, lambda t: t.unflatten(-1, (gates, -1)))
    every = [labels.shape(by_gate, partial(torch.select, dim=-2, index=g)) for g in range(gates)]
    cell = every[0]
    for one in every[1:]:
        cell = labels.tie(cell, one)
    for factor in cell.factors:
        labels.mark("between", "recurrent", factor)
    hidden = cell if projection is None else linear(labels, cell, projection)
    for state, value in zip(states, (hidden, cell), strict=False):
        mine = labels.shape(state, lambda t: t.select(0, which))
        labels.tie(labels.reduce(value, [0], keepdim=True), labels.reduce(mine, range(mine.ndim - 1), keepdim=True))
    again = linear(labels, hidden, w_hh, rest[1] if biases else None)
    again = labels.shape(again, lambda t: t.unflatten(-1, (gates, -1)))
    for g in range(gates):
        labels.tie(cell, labels.shape(again, partial(torch.select, dim=-2, index=g)))
    return hidden, cell


def ordered_time(labels: Labels, x: Value) -> Value:
    """Batch and time are told by position, features are units."""
    for factor in x.factors:
        labels.hold(factor, range(x.ndim - 1))
    held = [dims_of(f) & {x.ndim - 1} for f in x.factors]
    factors = tuple(labels.quotient(f, keep) for f, keep in zip(x.factors, held, strict=True) if keep)
    lead = Value(x.shape, factors, x.varies)
    return lead if x.ndim == 3 else labels.shape(lead, lambda t: t.unsqueeze(0))
