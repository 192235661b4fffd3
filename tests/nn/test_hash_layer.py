import copy

import pytest
import torch
from torch.func import functional_call, stack_module_state, vmap

from pomona.errors import PomonaError
from pomona.nets.decoder import DecoderLM
from pomona.nn.feedforward import FeedForward
from pomona.nn.hash_layer import BaseLayer, HashFFN, MultiHashFFN, SwitchFFN
from pomona.nn.hash_tables import random_table

D, H, E, V = 6, 8, 4, 30


def states(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def layer(**options) -> HashFFN:
    return HashFFN(D, H, E, V, generator=torch.Generator().manual_seed(0), **options).double()


def loop(one, h, tokens):
    """Token by token: the oracle of the sorted implementation."""
    y = torch.zeros_like(h)
    for b in range(h.shape[0]):
        for t in range(h.shape[1]):
            for k, table in enumerate(one.tables):
                e = int(table(tokens[b : b + 1])[0, t]) + k * E
                y[b, t] += torch.relu(h[b, t] @ one.bank.up[e]) @ one.bank.down[e]
    return y


def test_one_expert_is_the_dense_ffn():
    one = HashFFN(D, H, 1, V).double()
    dense = FeedForward(D, H, lambda n, m: torch.nn.Linear(n, m, bias=False), lambda n: torch.nn.ReLU()).double()
    with torch.no_grad():
        dense.up.weight.copy_(one.bank.up[0].mT)
        dense.down.weight.copy_(one.bank.down[0].mT)
    torch.testing.assert_close(one(states(2, 5), ids(2, 5)), dense(states(2, 5)))


def test_routing_depends_only_on_the_token_itself():
    one, h, tokens = layer(hash="random"), states(2, 5), ids(2, 5)
    other = ids(2, 5, seed=2)
    other[:, 2] = tokens[:, 2]
    y, z = one(h, tokens), one(h, other)
    assert torch.equal(y[:, 2], z[:, 2])
    assert not torch.equal(y, z)


def test_balanced_table_has_even_load_on_zipf_tokens():
    share = 1 / torch.arange(10, 2010, dtype=torch.float64)
    counts = (50_000 * share / share.sum()).round()
    text = torch.arange(2000).repeat_interleave(counts.long())[None]
    one = HashFFN(D, H, 16, 2000, counts=counts)
    random = HashFFN(D, H, 16, 2000, hash="random")
    assert one.load(text)[0].imbalance < 1.1
    assert random.load(text)[0].imbalance > 1.3


def test_sorted_segments_equal_a_loop_over_tokens():
    for one in (layer(), MultiHashFFN(D, H, E, V, 4, hash="random").double()):
        torch.testing.assert_close(one(states(3, 7), ids(3, 7)), loop(one, states(3, 7), ids(3, 7)), rtol=0, atol=1e-6)


def test_identical_hashes_are_one_hash_with_concatenated_slices():
    one = layer(hash="random")
    multi = MultiHashFFN(D, H, E, V, 2, hash=one.tables[0]).double()
    with torch.no_grad():
        one.bank.up.copy_(torch.cat(multi.bank.up.chunk(2), 2))
        one.bank.down.copy_(torch.cat(multi.bank.down.chunk(2), 1))
    torch.testing.assert_close(multi(states(2, 5), ids(2, 5)), one(states(2, 5), ids(2, 5)))


def test_hashes_of_a_multi_hash_differ_and_parameters_are_those_of_one():
    multi = MultiHashFFN(D, H, E, V, 2, counts=1000 / torch.arange(1, V + 1))
    assert not torch.equal(multi.tables[0].table, multi.tables[1].table)
    assert sum(p.numel() for p in multi.parameters()) == E * 2 * D * H
    assert 0.9 * H**-0.5 < float(multi.bank.down.detach().abs().max()) <= H**-0.5


def test_a_language_model_hands_over_its_tokens_and_generation_keeps_them():
    lm = DecoderLM(V, D, 1, 2, max_len=8, make_ffn=lambda d, h, i: HashFFN(d, H, E, V, hash="bigram")).double()
    lm.eval()
    tokens = ids(2, 8)
    y = lm(tokens)
    ffn = lm.blocks[0].ffn
    assert torch.equal(ffn.context.held.value, tokens)
    torch.testing.assert_close(ffn(states(2, 8))[:, -1:], ffn(states(2, 8)[:, -1:]))  # the last state alone
    other = tokens.clone()
    other[:, -1] = 0
    torch.testing.assert_close(lm(other)[:, :-1], y[:, :-1])  # causal
    assert copy.deepcopy(lm)(tokens).shape == (2, 8, V)


@pytest.mark.parametrize("make", [lambda: layer(), lambda: MultiHashFFN(D, H, E, V, 2).double()], ids=["hash", "multi"])
def test_gradients_empty_batches_and_stacks(make):
    one, tokens = make(), ids(2, 3)
    assert torch.autograd.gradcheck(lambda h: one(h, tokens), states(2, 3).requires_grad_())
    assert one(states(0, 3), ids(0, 3)).shape == (0, 3, D)
    assert one(states(2, 0), tokens).shape == (2, 0, D)
    assert one.bfloat16()(states(2, 3).bfloat16(), tokens).dtype == torch.bfloat16
    many = [make() for _ in range(3)]
    parameters, buffers = stack_module_state(many)
    base = copy.deepcopy(many[0])
    h = states(2, 3)
    together = vmap(lambda p, b: functional_call(base, (p, b), (h, tokens)))(parameters, buffers)
    torch.testing.assert_close(together, torch.stack([m(h, tokens) for m in many]))


def test_switch_gates_by_its_probability_and_drops_beyond_capacity():
    switch = SwitchFFN(D, H, E, capacity_factor=1.0).double()
    h = states(12)
    p = switch.router(h).softmax(-1)
    with torch.no_grad():
        switch.router.weight.zero_()
        switch.router.weight[0] = 1.0
    up, down = switch.bank.up[0], switch.bank.down[0]
    h = h.abs()  # all go to expert 0
    whole = switch.router(h).softmax(-1)[:, :1] * (torch.relu(h @ up) @ down)
    assert p.shape == (12, E)
    torch.testing.assert_close(switch.eval()(h), whole)
    y = switch.train()(h)
    torch.testing.assert_close(y[:3], whole[:3])  # capacity 12 / 4
    assert torch.equal(y[3:], torch.zeros_like(y[3:]))
    torch.testing.assert_close(switch.aux_loss(), 0.01 * E * switch.router(h).softmax(-1)[:, 0].mean())
    assert copy.deepcopy(switch).aux_loss() == 0


def test_base_layer_balances_in_training_and_is_greedy_after():
    base = BaseLayer(D, H, E).double()
    score = states(8) @ base.centroids.mT
    index = base.assign(score)
    assert index.bincount(minlength=E).tolist() == [2] * E
    best = score.gather(1, index[:, None]).sum()
    for seed in range(20):
        shuffled = torch.arange(E).repeat(2)[torch.randperm(8, generator=torch.Generator().manual_seed(seed))]
        assert score.gather(1, shuffled[:, None]).sum() <= best + 1e-9
    greedy = score.argmax(-1)
    expected = torch.stack(
        [
            score[i, e].sigmoid() * (torch.relu(h @ base.bank.up[e]) @ base.bank.down[e])
            for i, (h, e) in enumerate(zip(states(8), greedy, strict=True))
        ]
    )
    torch.testing.assert_close(base.eval()(states(8)), expected)
    assert base.train()(states(0)).shape == (0, D)
    halves = BaseLayer(D, H, E, group=4).double()
    chosen = torch.cat([halves.assign((states(8) @ halves.centroids.mT)[i : i + 4]) for i in (0, 4)])
    gate = (states(8) @ halves.centroids.mT).gather(1, chosen[:, None]).sigmoid()
    torch.testing.assert_close(halves(states(8)), halves.bank(states(8), chosen[:, None], gate))


def test_bad_input_is_named():
    with pytest.raises(PomonaError, match="tokens=None"):
        layer()(states(2, 3))
    with pytest.raises(PomonaError, match="hidden=8 cannot be divided into n_hash=3 equal parts"):
        MultiHashFFN(D, H, E, V, 3)
    with pytest.raises(PomonaError, match="hash names 1 functions, but n_hash=2"):
        MultiHashFFN(D, H, E, V, 2, hash=["random"])
    with pytest.raises(PomonaError, match="HashFFN takes 6 features"):
        layer()(states(2, 3)[..., :4], ids(2, 3))
    assert random_table(3, 5).shape == (5,)
