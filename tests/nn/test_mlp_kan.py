import copy

import pytest
import torch
from torch.func import functional_call, stack_module_state, vmap

from pomona.errors import PomonaError
from pomona.nn.feedforward import FeedForward
from pomona.nn.mlp_kan import KANExpertBank, MLPKANBlock, MLPKANMoE, MLPKANNet, expert_usage

D, H = 6, 8


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, D, dtype=torch.float64, generator=g(seed))


def moe(**options) -> MLPKANMoE:
    layer = MLPKANMoE(D, H, 4, generator=g(), **options).double()
    if layer.kans is not None:
        with torch.no_grad():
            for p in (*layer.kans.gains, *layer.kans.shifts):
                p.add_(0.3 * torch.randn(p.shape, dtype=p.dtype, generator=g(1)))
    return layer


def single(layer: MLPKANMoE, e: int, x: torch.Tensor) -> torch.Tensor:
    """Expert e by plain formulas."""
    if e < layer.n_mlp:
        bank = layer.mlps
        hidden = torch.nn.functional.gelu(x @ bank.up[e] + bank.up_bias[e])
        return hidden @ bank.down[e] + bank.down_bias[e]
    e -= layer.n_mlp
    for gain, shift, weight in zip(layer.kans.gains, layer.kans.shifts, layer.kans.weights, strict=True):
        x = torch.nn.functional.layer_norm(x, x.shape[-1:], gain[e], shift[e])
        u = (x[..., None] - layer.kans.centre) / 0.33
        x = (1 - torch.tanh(u) ** 2).flatten(-2) @ weight[e]
    return x


def test_all_experts_are_the_dense_weighted_sum():
    layer, x = moe(top_k=4), tokens(3, 5)
    p = layer.router(x).softmax(-1)
    dense = sum(p[..., e, None] * single(layer, e, x) for e in range(4))
    torch.testing.assert_close(layer(x), dense)
    few = moe(top_k=2)
    best, index = p.topk(2, -1)
    expected = torch.zeros_like(x)
    for b in range(3):
        for t in range(5):
            for k in range(2):
                expected[b, t] += best[b, t, k] / best[b, t].sum() * single(few, int(index[b, t, k]), x[b, t])
    torch.testing.assert_close(few(x), expected)


def test_gates_sum_to_one_and_exactly_top_k_are_used():
    layer, x = moe(top_k=2), tokens(50)
    seen = {}

    def watch(x, index, gate):
        seen.update(index=index, gate=gate)
        return x

    layer.experts = watch
    layer(x)
    assert (seen["gate"] > 0).all()
    torch.testing.assert_close(seen["gate"].sum(-1), torch.ones(50, dtype=torch.float64))
    assert all(len(row.unique()) == 2 for row in seen["index"])


def test_rswaf_basis_is_sech_squared_with_peak_one():
    bank = KANExpertBank(1, D, 3).double()
    x = torch.linspace(-3, 3, 31, dtype=torch.float64)
    expected = 1 / torch.cosh((x[:, None] - bank.centre) / 0.33) ** 2
    torch.testing.assert_close(bank.basis(x), expected)
    torch.testing.assert_close(bank.basis(bank.centre).diagonal(), torch.ones(8, dtype=torch.float64))
    assert bank.basis(x).max() <= 1


def test_permuting_tokens_permutes_the_output():
    for layer in (moe(), moe(router="soft", slots=2)):
        x, order = tokens(2, 9), torch.randperm(9, generator=g(1))
        torch.testing.assert_close(layer.train()(x)[:, order], layer(x[:, order]), rtol=0, atol=1e-12)


def test_one_mlp_expert_is_the_plain_ffn():
    one, dense = MLPKANMoE(D, H, 1, 1).double(), FeedForward(D, H).double()
    assert one.kans is None
    with torch.no_grad():
        for linear, weight, bias in ((dense.up, one.mlps.up, one.mlps.up_bias),
                                     (dense.down, one.mlps.down, one.mlps.down_bias)):  # fmt: skip
            linear.weight.copy_(weight[0].mT)
            linear.bias.copy_(bias[0])
    torch.testing.assert_close(one(tokens(4)), dense(tokens(4)))


def test_soft_router_mixes_in_and_back():
    layer, x = moe(router="soft", slots=2), tokens(2, 5)
    logits = layer.router(x)
    slots = logits.softmax(1).mT @ x
    y = torch.stack([single(layer, s // 2, slots[:, s]) for s in range(8)], 1)
    torch.testing.assert_close(layer(x), logits.softmax(-1) @ y)
    torch.testing.assert_close(layer(x[:, 0])[:1], layer(x[:1, 0]))  # rows of a batch do not mix


def test_balance_loss_is_off_unless_asked_for():
    assert moe()(tokens(9)).shape == (9, D)
    assert moe().aux_loss() == 0
    layer = moe(balance=0.5).train()
    layer(tokens(9))
    assert layer.aux_loss() > 0
    layer.aux_loss().backward()
    assert layer.router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("options", [{}, {"router": "soft"}, {"n_kan": 4}, {"n_kan": 0}, {"kan": "rbf"}], ids=str)
def test_gradients_stacks_and_empty_batches(options):
    layer, x = moe(**options), tokens(2, 3)
    assert torch.autograd.gradcheck(layer, x.clone().requires_grad_())
    assert layer(tokens(0, 3)).shape == (0, 3, D)
    many = [copy.deepcopy(layer) for _ in range(3)]
    for i, m in enumerate(many):
        torch.nn.init.normal_(m.router.weight, generator=g(i))
    parameters, buffers = stack_module_state(many)
    together = vmap(lambda p, b: functional_call(many[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(together, torch.stack([m(x) for m in many]))
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_blocks_and_nets_and_where_their_mass_goes():
    block = MLPKANBlock(16, 32, n_experts=4)
    assert block(torch.randn(2, 5, 16, generator=g())).shape == (2, 5, 16)
    net = MLPKANNet(4, 3, 16, depth=2, n_experts=4)
    x = torch.randn(20, 4, generator=g())
    assert net(x).shape == (20, 3)
    usage = expert_usage(net, {"a": x, "b": x + 3})
    assert usage["a"]["mlp"] + usage["a"]["kan"] == pytest.approx(1)
    assert usage["a"] != usage["b"]
    with torch.no_grad():
        for layer in net.blocks:
            layer.router.weight.zero_()
            layer.router.weight[3] = 1
            layer.top_k = 1
        net.norms[0].bias.fill_(1)
        net.norms[1].bias.fill_(1)
    assert expert_usage(net, {"a": x})["a"]["kan"] == pytest.approx(1)
    soft = MLPKANNet(4, 3, 16, n_experts=4, router="soft")
    assert sum(expert_usage(soft, {"a": x})["a"].values()) == pytest.approx(1)
    with pytest.raises(PomonaError, match="no MLPKANMoE layer"):
        expert_usage(torch.nn.Linear(4, 3), {"a": x})


def test_no_expert_is_run_on_tokens_of_the_other_kind():
    layer = moe(top_k=1)
    rows = []
    run = layer.kans.run
    layer.kans.run = lambda r, at: rows.append(len(r)) or run(r, at)
    x = tokens(40)
    layer(x)
    assert rows == [int((layer.router(x).argmax(-1) >= 2).sum())]


def test_bad_input_is_named():
    with pytest.raises(PomonaError, match="top_k=5 must be at most n_experts=4"):
        moe(top_k=5)
    with pytest.raises(PomonaError, match="kan='bspline' is not known"):
        moe(kan="bspline")
    with pytest.raises(PomonaError, match="router='top' is not known"):
        moe(router="top")
    with pytest.raises(PomonaError, match="MLPKANMoE takes 6 features"):
        moe()(torch.zeros(2, 3))
