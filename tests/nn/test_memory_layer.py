import copy

import pytest
import torch

from pomona.errors import PomonaError
from pomona.nets.cost import flops, parameters
from pomona.nets.decoder import DecoderLM
from pomona.nn.memory_layer import FlatKeyMemory, FlatKeys, MemoryLayer, MemoryValues, ProductKeys, memory_ffns
from pomona.train.optim import make_optimizer
from pomona.train.settings import Training

D = 8


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, D, dtype=torch.float64, generator=g(seed))


@pytest.mark.parametrize(("n_keys", "topk"), [(6, 4), (3, 7), (5, 25)])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_product_keys_find_the_best_of_all_sums(n_keys, topk, qk_norm):
    keys = ProductKeys(n_keys, 2, 4, qk_norm=qk_norm, generator=g()).double()
    q = torch.randn(9, 2, 4, dtype=torch.float64, generator=g(1))
    score, slot = keys(q, topk)
    first, second = keys.half_scores(q).unbind(-2)
    every = (first[..., :, None] + second[..., None, :]).flatten(-2)
    best, at = every.topk(topk, -1)
    torch.testing.assert_close(score, best)
    assert torch.equal(slot, at)


def test_flat_keys_are_the_oracle():
    product, flat = MemoryLayer(D, 6, topk=5, generator=g()).double(), FlatKeyMemory(D, 6, topk=5).double()
    state = {name: value for name, value in product.state_dict().items() if name != "keys.keys"}
    flat.load_state_dict(state, strict=False)
    assert isinstance(flat.keys, FlatKeys)
    flat.keys.copy_(product.keys)
    torch.testing.assert_close(flat(inputs(7)), product(inputs(7)))


def test_all_slots_with_identity_values_are_softmax_attention():
    layer = MemoryLayer(9, 3, 1, 4, topk=9, plus=False, generator=g()).double()
    with torch.no_grad():
        layer.values.weight.copy_(torch.eye(9))
    x = torch.randn(5, 9, dtype=torch.float64, generator=g(1))
    full = FlatKeys(3, 1, 4).double().copy_(layer.keys).keys[0, 0]
    torch.testing.assert_close(layer(x), (layer.query(x) @ full.mT).softmax(-1))


def test_two_layers_hold_one_shared_pool():
    pool = MemoryValues(36, D)
    one, two = MemoryLayer(D, 6, shared=pool), MemoryLayer(D, 6, shared=pool)
    assert one.values.weight is two.values.weight
    both = parameters(torch.nn.ModuleList([one, two]))
    assert both == 2 * parameters(one) - pool.weight.numel()
    copied = copy.deepcopy(torch.nn.ModuleList([one, two]))
    assert copied[0].values.weight is copied[1].values.weight


@pytest.mark.parametrize("sparse", [False, True])
def test_only_the_rows_read_receive_gradient(sparse):
    layer = MemoryLayer(D, 10, heads=2, topk=3, sparse=sparse, generator=g()).double()
    x = inputs(1)
    layer(x).sum().backward()
    gradient = layer.values.weight.grad
    assert gradient.is_sparse == sparse
    rows = gradient.to_dense().abs().sum(1).nonzero()[:, 0]
    assert torch.equal(rows, layer.read(x)[0].unique())
    assert len(rows) <= 2 * 3


def test_operations_do_not_grow_with_the_values_but_with_n_keys():
    heads, k_dim = 4, 4
    few, many, wide = (flops(MemoryLayer(D, n, heads, k_dim, 8), torch.zeros(2, D)) for n in (8, 16, 32))
    assert many - few == 2 * heads * k_dim * 8
    assert wide - many == 2 * (many - few)  # four times the slots, twice the search
    assert flops(FlatKeyMemory(D, 16, k_dim=4, topk=8), torch.zeros(2, D)) > many


def test_output_is_the_papers():
    layer = MemoryLayer(D, 5, heads=2, topk=3, v_dim=6, generator=g()).double()
    x = inputs(4)
    slot, share = layer.read(x)
    y = (share[..., None] * layer.values.weight[slot]).sum((1, 2))
    gated = y * torch.nn.functional.silu(x @ layer.gate.weight.mT)
    torch.testing.assert_close(layer(x), gated @ layer.out.weight.mT)
    peer = MemoryLayer(D, 5, heads=2, topk=3, peer=True, plus=False, generator=g()).double()
    slot, share = peer.read(x)
    hidden = torch.nn.functional.gelu(torch.einsum("nd,nhkd->nhk", x, peer.values.inputs[slot]))
    torch.testing.assert_close(peer(x), torch.einsum("nhk,nhkv->nv", share * hidden, peer.values.weight[slot]))


@pytest.mark.parametrize("options", [{}, {"peer": True}, {"qk_norm": True}, {"query_batch_norm": True}], ids=str)
def test_gradients_of_every_variant(options):
    layer = MemoryLayer(D, 5, 2, topk=4, generator=g(), **options).double().eval()
    assert torch.autograd.gradcheck(layer, inputs(3).requires_grad_())
    assert layer(inputs(0)).shape == (0, D)
    assert layer.bfloat16()(inputs(3).bfloat16()).dtype == torch.bfloat16


def test_values_have_their_own_learning_rate_and_no_decay():
    layer = MemoryLayer(D, 5, lr_scale=0.25, topk=4)
    optimizer = make_optimizer(layer, Training(lr=4e-3))
    (group,) = (group for group in optimizer.param_groups if group["params"][0] is layer.values.weight)
    assert group["lr"] == pytest.approx(1e-3)
    assert group["weight_decay"] == 0


def test_usage_and_revival_of_dead_keys():
    layer = MemoryLayer(D, 16, heads=2, topk=2, generator=g()).double()
    with torch.no_grad():
        layer.query.weight.mul_(0.05)
        layer.query.bias.uniform_(-1, 1, generator=g(3))  # all queries alike: few slots are used
    x = inputs(200)
    before = layer.usage(x)
    assert before.weight.sum() == pytest.approx(1)
    assert before.kl > 1
    moved = layer.reset_dead(x, g(2))
    after = layer.usage(x)
    assert moved > 30
    assert after.hit > before.hit
    even = MemoryLayer(D, 3, heads=1, topk=9, plus=False).double()
    with torch.no_grad():
        even.keys.keys.zero_()
    assert even.usage(x).hit == 1
    assert even.usage(x).kl == pytest.approx(0, abs=1e-6)


def test_memories_stand_at_equally_spaced_blocks_over_one_pool():
    make = memory_ffns(6, 3, n_keys=4, topk=2)
    lm = DecoderLM(20, D, 6, 2, max_len=5, make_ffn=make)
    found = [i for i, block in enumerate(lm.blocks) if isinstance(block.ffn, MemoryLayer)]
    assert found == [1, 3, 5]
    assert len({id(lm.blocks[i].ffn.values) for i in found}) == 1
    assert lm(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, 20)


def test_bad_input_is_named():
    with pytest.raises(PomonaError, match="topk=10 must be at most the 9 slots of n_keys=3"):
        MemoryLayer(D, 3, topk=10)
    with pytest.raises(PomonaError, match="k_dim=3 cannot be divided into halves=2 equal parts"):
        MemoryLayer(D, 8, k_dim=3)
    with pytest.raises(PomonaError, match="shared has 10 slots, but n_keys=4 makes 16"):
        MemoryLayer(D, 4, topk=4, shared=MemoryValues(10, D))
    with pytest.raises(PomonaError, match="places=4 must be between 1 and layers=2"):
        memory_ffns(2, 4, n_keys=4)
    with pytest.raises(PomonaError, match="MemoryLayer takes 8 features"):
        MemoryLayer(D)(torch.zeros(2, 3))
