import pytest
import torch

from pomona.errors import PomonaError
from pomona.nn.experts import load
from pomona.nn.hash_tables import HASHES, HashTable, balanced_table, hash_table, snapshot_table

VOCAB, E = 2000, 16


def zipf(vocab: int = VOCAB, total: int = 100_000) -> torch.Tensor:
    share = 1 / torch.arange(10, vocab + 10, dtype=torch.float64)  # no single token exceeds a bucket
    return (total * share / share.sum()).round()


def text(counts: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(counts)).repeat_interleave(counts.long())[None]


def test_balanced_table_is_even_and_random_is_not():
    counts = zipf()
    assert counts.max() < counts.sum() / E
    balanced = hash_table("balanced", E, VOCAB, counts=counts).load(text(counts)).imbalance
    other = hash_table("balanced", E, VOCAB, counts=counts, seed=3).load(text(counts)).imbalance
    random = [hash_table("random", E, VOCAB, seed=seed).load(text(counts)).imbalance for seed in range(5)]
    assert balanced < 1.1
    assert other < 1.1
    assert min(random) - 1 > 3 * (balanced - 1)


def test_unseen_tokens_map_by_modulus():
    table = HashTable(balanced_table(4, torch.tensor([5.0, 0, 3, 2])), 4)
    assert table(torch.tensor([[1, 9, 4]])).tolist() == [[1, 1, 0]]


def test_keys_look_where_they_say():
    ids = torch.tensor([[3, 1, 4, 1]])
    table = torch.tensor([0, 1, 2, 3, 4])
    at = {key: HashTable(table, 5, key=key)(ids).tolist()[0] for key in ("token", "previous", "next", "position")}
    assert at == {"token": [3, 1, 4, 1], "previous": [4, 3, 1, 4], "next": [1, 4, 1, 4], "position": [0, 1, 2, 3]}
    bigram = hash_table("bigram", E, VOCAB)
    pairs = torch.cartesian_prod(torch.arange(60), torch.arange(60))
    seen = bigram(pairs)[:, 1]
    assert load(seen, E).imbalance < 1.3
    assert len(seen.view(60, 60)[:, 0].unique()) > E // 2  # the token before matters
    longer = torch.cat([torch.full_like(pairs[:, :1], 7), pairs], 1)
    assert torch.equal(bigram(longer)[:, 2], seen)  # and nothing earlier


def test_clusters_keep_like_tokens_together_and_dispersed_apart():
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(4, 8, generator=generator)
    embeddings = centres.repeat_interleave(40, 0) + torch.randn(160, 8, generator=generator)
    counts = zipf(160)
    clustered = hash_table("clustered", 4, 160, embeddings=embeddings).table.view(4, 40)
    assert all(len(row.unique()) == 1 for row in clustered)
    dispersed = hash_table("dispersed", 4, 160, embeddings=embeddings, counts=counts).table.view(4, 40)
    assert all(row.bincount(minlength=4).tolist() == [10] * 4 for row in dispersed)


def test_snapshot_takes_the_routers_majority():
    tokens, index = torch.tensor([[0, 0, 0, 2]]), torch.tensor([[1, 1, 0, 2]])
    assert snapshot_table(3, 4, tokens, index).tolist() == [1, -1, 2, -1]


@pytest.mark.parametrize("kind", HASHES)
def test_every_hash_is_fixed_by_its_seed(kind):
    embeddings = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(50)[None]
    one, other = (hash_table(kind, 4, 50, embeddings=embeddings, seed=1) for _ in range(2))
    assert torch.equal(one(ids), other(ids))
    assert 0 <= int(one(ids).min()) <= int(one(ids).max()) < 4
    assert "n_experts=4" in repr(one)


def test_what_cannot_be_made_is_said():
    with pytest.raises(PomonaError, match="hash='balancd' is not known; did you mean balanced"):
        hash_table("balancd", 4, 10)
    with pytest.raises(PomonaError, match="needs embeddings=, one row for each of the 10 tokens"):
        hash_table("clustered", 4, 10)
    with pytest.raises(PomonaError, match="counts has 3 entries"):
        hash_table("balanced", 4, 10, counts=torch.ones(3))
    with pytest.raises(PomonaError, match="table must hold experts 0 .. 3"):
        HashTable(torch.tensor([4]), 4)
