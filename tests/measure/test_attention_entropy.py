import pytest
import torch
from torch import nn

from pomona.errors import PomonaError
from pomona.measure.attention_entropy import (
    attention_entropy,
    entropy_histogram,
    ffn_stats,
    nonlinearity_count,
    rank_of_representations,
    row_entropy,
)
from pomona.nets.decoder import DecoderLM

T = 6


@pytest.fixture
def model() -> DecoderLM:
    torch.manual_seed(0)
    return DecoderLM(11, 16, 3, 2, max_len=T).double()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(11, (5, T), generator=torch.Generator().manual_seed(1))


def causal(seed: int = 0) -> torch.Tensor:
    scores = torch.randn(3, T, T, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def test_entropy_of_uniform_and_of_one_hot_attention(model, tokens):
    rows = torch.arange(1.0, T + 1, dtype=torch.float64)
    uniform = torch.ones(T, T, dtype=torch.float64).tril() / rows[:, None]
    torch.testing.assert_close(row_entropy(uniform), rows.log(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(row_entropy(uniform, True), torch.ones(T - 1, dtype=torch.float64))
    assert row_entropy(torch.eye(T)).eq(0).all()
    for block in model.blocks:
        nn.init.zeros_(block.attention.qkv.weight)  # equal scores
    torch.testing.assert_close(attention_entropy(model, tokens), rows.log().mean().expand(3, 2), rtol=1e-12, atol=1e-12)


def test_entropy_does_not_depend_on_the_order_of_keys_and_is_at_most_1_when_normalised():
    pattern = causal()
    order = torch.randperm(T, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(row_entropy(pattern[..., order]), row_entropy(pattern), rtol=1e-12, atol=1e-12)
    normalised = row_entropy(pattern, True)
    assert normalised.ge(0).all() and normalised.le(1).all()


def test_heads_are_sorted_into_quarters():
    shares, overload, collapse = entropy_histogram(torch.tensor([[0.9, 0.1], [0.8, 1.0], [0.0, 0.3], [0.2, 0.5]]))
    torch.testing.assert_close(shares[0], torch.tensor([0.5, 0, 0, 0.5], dtype=torch.float64))
    assert overload == 0.75 and collapse == 0.5
    assert entropy_histogram(torch.tensor([[1.5]]), 2.0).overload == 1.0


def test_counts_of_nonlinear_operations(model, tokens):
    counts = nonlinearity_count(model, tokens)
    assert counts == {"softmax": (6, 6 * T * T), "LayerNorm": (7, 7 * T * 16), "GELU": (3, 3 * T * 64)}


def test_a_unit_for_one_class_has_selectivity_1_and_one_for_all_0(tokens):
    class Unit(nn.Module):
        def __init__(self, only: bool) -> None:
            super().__init__()
            self.only = only

        def set_tokens(self, tokens: torch.Tensor) -> None:
            self.tokens = tokens

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            on = (self.tokens == self.tokens[0, 0]).float() if self.only else torch.ones(self.tokens.shape)
            return on[..., None].expand(*x.shape[:-1], 64)

    model = DecoderLM(11, 16, 2, 2, max_len=T, act="relu")
    model.blocks[0].ffn.up, model.blocks[1].ffn.up = Unit(True), Unit(False)
    stats = ffn_stats(model, tokens)
    torch.testing.assert_close(stats["selectivity"], torch.tensor([1.0, 0.0]))
    share = (tokens != tokens[0, 0]).float().mean()
    torch.testing.assert_close(stats["sparsity"], torch.tensor([share, 0.0]))


def test_rank_counts_equal_directions(model, tokens):
    ranks = rank_of_representations(model, tokens)
    assert ranks.shape == (4,) and ranks.ge(1).all() and ranks.le(16).all()
    nn.init.zeros_(model.position.weight)
    with torch.no_grad():
        model.token.weight.copy_(torch.arange(11.0)[:, None] * torch.eye(3, 16)[2])
    assert float(rank_of_representations(model, tokens)[0]) == pytest.approx(1)


def test_says_what_it_needs(model, tokens):
    with pytest.raises(PomonaError, match="sequences of at least 2"):
        attention_entropy(model, tokens[:, :1])
    with pytest.raises(PomonaError, match=r"Linear has no method attention\(tokens\)"):
        attention_entropy(nn.Linear(2, 2), tokens)
