import copy

import pytest
import torch
from torch.func import functional_call, grad, stack_module_state, vmap

from pomona.errors import PomonaError
from pomona.nets.cost import flops
from pomona.nn.experts import ExpertBank, TokenContext, balance_loss, load, segment_matmul, segments, top_gates

E, D = 5, 4


def bank(seed: int = 0, **options) -> ExpertBank:
    return ExpertBank(E, D, 6, bias=True, generator=torch.Generator().manual_seed(seed), **options).double()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def choices(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(E, shape, generator=torch.Generator().manual_seed(seed))


def one_by_one(b: ExpertBank, x: torch.Tensor, index: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    assert b.up_bias is not None and b.down_bias is not None
    y = torch.zeros(*x.shape[:-1], b.out_features, dtype=x.dtype)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in index.shape)).tolist():
        *at, k = place
        e = int(index[(*at, k)])
        if e < E:
            hidden = b.act(x[tuple(at)] @ b.up[e] + b.up_bias[e])
            y[tuple(at)] += gate[(*at, k)] * (hidden @ b.down[e] + b.down_bias[e])
    return y


def test_dispatch_equals_a_loop_over_tokens():
    b, x, index = bank(), tokens(3, 4), choices(3, 4, 2)
    index[0, 0, 1] = E  # sent to nobody
    gate = torch.rand(3, 4, 2, dtype=torch.float64)
    torch.testing.assert_close(b(x, index, gate), one_by_one(b, x, index, gate))
    torch.testing.assert_close(b(x, index[..., 0]), one_by_one(b, x, index[..., :1], torch.ones_like(gate)))
    glu = bank(act="swiglu")
    torch.testing.assert_close(glu(x, index, gate), one_by_one(glu, x, index, gate))


def test_first_and_second_gradients_are_right():
    w = torch.randn(3, D, 2, dtype=torch.float64, requires_grad=True)
    x = tokens(6).requires_grad_()
    bounds = torch.tensor([[0, 2], [3, 3], [3, 5]])  # rows 2 and 5 belong to nobody
    assert torch.autograd.gradcheck(lambda x, w: segment_matmul(x, w, bounds), (x, w))
    assert torch.autograd.gradgradcheck(lambda x, w: segment_matmul(x, w, bounds), (x, w))
    assert torch.equal(segment_matmul(x, w, bounds)[[2, 5]], torch.zeros(2, 2, dtype=torch.float64))


def test_vmap_over_banks_and_choices_and_their_gradients():
    banks, x = [bank(seed) for seed in range(3)], tokens(7)
    index = torch.stack([choices(7, 2, seed=seed) for seed in range(3)])
    index[:, 3:5] = E  # sent to nobody
    parameters, _ = stack_module_state(banks)
    base = copy.deepcopy(banks[0])

    def total(p, x, index):
        return functional_call(base, p, (x, index)).square().sum()

    for dims, i in ((0, index), (None, index[0])):
        together = vmap(grad(total), (0, None, dims))(parameters, x, i)
        for k, b in enumerate(banks):
            alone = grad(total)(dict(b.named_parameters()), x, index[k] if dims == 0 else i)
            for name, value in alone.items():
                torch.testing.assert_close(together[name][k], value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keeps_the_dtype_and_takes_nothing(dtype):
    b = bank().to(dtype)
    assert b(tokens(3).to(dtype), choices(3, 2), torch.ones(3, 2)).dtype == dtype
    assert b(tokens(0).to(dtype), choices(0, 2)).shape == (0, D)


@pytest.mark.slow
def test_compiles_whole():
    b, x, index = bank(), tokens(6), choices(6, 2)
    compiled = torch.compile(b, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, index), b(x, index))
    compiled(x, index).sum().backward()


def test_operations_are_counted():
    class Routed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bank = ExpertBank(E, D, 6)

        def forward(self, x):
            return self.bank(x, torch.zeros(len(x), 1, dtype=torch.long))

    assert flops(Routed(), torch.zeros(2, D)) == 2 * 2 * D * 6


def test_rank_counts_earlier_entries_of_the_same_expert():
    assert segments(torch.tensor([2, 0, 2, 2, 0]), 3).rank().tolist() == [0, 0, 1, 2, 1]


def test_load_statistics():
    result = load(torch.tensor([0, 0, 0, 1, 3]), 3)  # 3 is nobody
    assert result.count.tolist() == [3, 1, 0]
    assert result.share.tolist() == [0.75, 0.25, 0.0]
    assert result.imbalance == pytest.approx(3 / (4 / 3))


def test_gates_sum_to_one_and_balance_is_one_when_uniform():
    logits = torch.randn(8, E, dtype=torch.float64)
    index, gate, p = top_gates(logits, 2)
    torch.testing.assert_close(gate.sum(-1), torch.ones(8, dtype=torch.float64))
    assert torch.equal(index[:, 0], logits.argmax(-1))
    torch.testing.assert_close(p, logits.softmax(-1))
    even = torch.full((E, E), 1 / E)
    assert float(balance_loss(even, torch.arange(E)[:, None])) == pytest.approx(1)
    assert float(balance_loss(p[:0], index[:0])) == 0


def test_token_context_says_what_is_missing():
    context, x = TokenContext(), torch.zeros(2, 3, D)
    with pytest.raises(PomonaError, match="tokens=None"):
        context(x)
    context.set_tokens(torch.zeros(2, 5, dtype=torch.long))
    assert context(x).shape == (2, 5)
    with pytest.raises(PomonaError, match="does not fit states"):
        context(torch.zeros(3, 3, D))
    assert copy.deepcopy(context).held.value.dim() == 0


def test_wrong_sizes_are_named():
    with pytest.raises(PomonaError, match=r"index of shape \(2, 1\) does not fit tokens of shape \(3, 4\)"):
        bank()(tokens(3), choices(2, 1))
    with pytest.raises(PomonaError, match="n_experts=0"):
        ExpertBank(0, 4, 4)
