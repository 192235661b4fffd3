"""Entropy of causal attention, and what else tells a language model without norms from one with them.

Source: ReLU's Revival: On the Entropic Overload in Normalization-Free Large Language Models, arXiv 2410.09637.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pomona.errors import PomonaError, check_positive
from pomona.nets.decoder import DecoderLM
from pomona.nn.activation import is_activation
from pomona.nn.norm import is_norm


def row_entropy(pattern: Tensor, normalised: bool = False) -> Tensor:
    """Shannon entropy -sum p log p, in nats, of each row of causal attention.

    Args:
        pattern: weights (*, T, T), row t a distribution over tokens 0..t.
        normalised: divide row t by its largest possible entropy log(t + 1), and leave out row 0, which has none.

    Returns:
        (*, T), or (*, T - 1) when normalised
    """
    entropy = torch.special.entr(pattern).sum(-1)
    if not normalised:
        return entropy
    most = torch.arange(2, pattern.shape[-1] + 1, device=pattern.device, dtype=pattern.dtype).log()
    return (entropy[..., 1:] / most).clamp(0, 1)


@torch.no_grad()
def attention_entropy(model: DecoderLM | nn.Module, tokens: Tensor, *, normalised: bool = False) -> Tensor:
    """Mean entropy of each head's rows, over positions and sequences.

    Args:
        model: has ``attention(tokens)``: weights (layers, B, heads, T, T).
        tokens: (B, T), T at least 2.
        normalised: see `row_entropy`.

    Returns:
        (layers, heads)

    Raises:
        PomonaError: if the model gives no attention weights, or T is 1.
    """
    if not hasattr(model, "attention"):
        raise PomonaError(f"{type(model).__name__} has no method attention(tokens), which must give its weights")
    if tokens.shape[-1] < 2:
        raise PomonaError(f"tokens have shape {tuple(tokens.shape)}; entropy needs sequences of at least 2")
    return row_entropy(model.attention(tokens), normalised).mean(dim=(1, -1))  # type: ignore[operator]


class EntropyHistogram(NamedTuple):
    """Heads by entropy.

    Attributes:
        shares: (layers, 4) of the layer's heads in [0, M/4), [M/4, M/2), [M/2, 3M/4), [3M/4, M].
        overload: share of the heads of the first half of the layers that lie in the top quarter.
        collapse: share of the heads of the second half of the layers that lie in the bottom quarter.
    """

    shares: Tensor
    overload: float
    collapse: float


def entropy_histogram(entropy: Tensor, maximum: float = 1.0) -> EntropyHistogram:
    """Sort heads (layers, heads) into quarters of ``maximum``: 1 for normalised entropy.

    With an odd number of layers the middle one counts as early.
    """
    check_positive(maximum=maximum)
    quarter = (4 * entropy / maximum).floor().clamp(0, 3).long()
    shares = nn.functional.one_hot(quarter, 4).double().mean(1)
    half = (len(entropy) + 1) // 2
    late = shares[half:, 0]
    return EntropyHistogram(shares, float(shares[:half, 3].mean()), float(late.mean()) if len(late) else 0.0)


def _watch(model: nn.Module, tokens: Tensor, wanted: Callable[[nn.Module], bool]) -> list[tuple[nn.Module, Tensor]]:
    """Every call of a ``wanted`` module in one forward pass: the module and its output."""
    seen: list[tuple[nn.Module, Tensor]] = []

    def note(module: nn.Module, _: Any, output: Tensor) -> None:
        seen.append((module, output))

    handles = [module.register_forward_hook(note) for module in model.modules() if wanted(module)]
    try:
        with torch.no_grad():
            model(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def nonlinearity_count(model: DecoderLM, tokens: Tensor) -> dict[str, tuple[int, int]]:
    """How often each kind of nonlinear operation is called, and on how many numbers a sequence in all.

    Returns:
        {'softmax' or the class of the norm or activation: (calls, numbers)}; softmax is counted a head, over T x T
    """
    _, batch, heads, length, _ = model.attention(tokens).shape
    calls = heads * len(model.blocks)
    counts = {"softmax": (calls, calls * length**2)}
    for module, output in _watch(model, tokens, lambda m: is_norm(m) or is_activation(m)):
        name = type(module).__name__
        times, numbers = counts.get(name, (0, 0))
        counts[name] = times + 1, numbers + output.numel() // max(batch, 1)
    return counts


def ffn_stats(model: DecoderLM, tokens: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
    """How selective and how sparse the hidden units of each feed-forward part are.

    For each unit, selectivity = (m_max - m_rest) / (m_max + m_rest), with m the mean magnitude of its activation over
    the tokens of one class, m_max of the class where it is largest and m_rest the mean over the other classes: 0 for a
    unit that is the same for all, 1 for one that answers to one class alone. Sparsity is the share of activations that
    are 0 or below.

    Args:
        model: with one activation in each feed-forward part.
        tokens: (B, T).
        labels: classes of the tokens (B, T), the tokens themselves by default.

    Returns:
        'selectivity' and 'sparsity', (layers,)

    Raises:
        PomonaError: if there is only one class, or a feed-forward part without an activation module.
    """
    classes, index = (tokens if labels is None else labels).flatten().unique(return_inverse=True)
    if len(classes) < 2:
        raise PomonaError(f"labels hold {len(classes)} class; selectivity needs at least 2")
    inside = {m for block in model.blocks for m in block.ffn.modules()}  # type: ignore[union-attr]
    outputs = [out for _, out in _watch(model, tokens, lambda m: m in inside and is_activation(m))]
    if len(outputs) != len(model.blocks):
        raise PomonaError(f"{len(outputs)} activation modules in {len(model.blocks)} feed-forward parts; need one each")
    counts = torch.bincount(index)[:, None]
    selectivity, sparsity = [], []
    for output in outputs:
        units = output.flatten(0, -2)
        sums = units.new_zeros(len(classes), units.shape[1]).index_add_(0, index, units.abs())
        means = sums / counts
        most = means.amax(0)
        rest = (means.sum(0) - most) / (len(classes) - 1)
        selectivity.append(((most - rest) / (most + rest).clamp_min(torch.finfo(units.dtype).tiny)).mean())
        sparsity.append((units <= 0).to(units.dtype).mean())
    return {"selectivity": torch.stack(selectivity), "sparsity": torch.stack(sparsity)}


@torch.no_grad()
def rank_of_representations(model: DecoderLM, tokens: Tensor) -> Tensor:
    """exp(entropy) of the normalised singular values of the centred features, of the embedding and of each block.

    Returns:
        (layers + 1,), from 1 to the width
    """
    ranks = []
    for x in model.states(tokens):
        features = x.flatten(0, 1)
        values = torch.linalg.svdvals(features - features.mean(0))
        ranks.append(torch.special.entr(values / values.sum()).sum().exp())
    return torch.stack(ranks)
