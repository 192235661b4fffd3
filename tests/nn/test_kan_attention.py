import math

import pytest
import torch

from pomona.errors import PomonaError
from pomona.nn.kan_attention import (
    KArAt,
    KArAtOperator,
    ViTTiny,
    attention_spectrum,
    project_simplex,
)
from pomona.nn.mixing import AttentionMixer


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(n: int = 5, dim: int = 8) -> torch.Tensor:
    return torch.randn(3, n, dim, dtype=torch.float64, generator=generator(1))


def test_identity_operator_with_softmax_is_softmax_attention():
    x = tokens()
    layer = KArAt(8, 5, heads=2, basis="identity", rank=5, project="softmax", generator=generator()).double()
    layer.operator.coefficients.data = torch.eye(5, dtype=torch.float64).expand(2, 5, 5)[..., None].clone()
    layer.operator.weight.data = torch.eye(5, dtype=torch.float64).repeat(2, 1, 1)
    plain = AttentionMixer(8, heads=2).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-12, atol=1e-13)
    layer.operator = torch.nn.Identity()
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-12, atol=1e-13)


def count(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("n, heads, grid, rank", [(17, 3, 3, 12), (9, 2, 1, 4)])
def test_operator_parameters_per_head_are_2_g_r_n_plus_n_r(n, heads, grid, rank):
    assert count(KArAtOperator(n, heads, grid=grid, rank=rank)) == heads * (2 * grid * rank * n + n * rank)
    assert count(KArAtOperator(n, heads, grid=grid, rank="full")) == heads * 2 * grid * n * n


def test_simplex_projection_is_non_negative_sums_to_1_is_idempotent_and_keeps_the_simplex():
    x = 3 * torch.randn(200, 7, dtype=torch.float64, generator=generator())
    y = project_simplex(x)
    assert (y >= 0).all() and (y == 0).any()
    torch.testing.assert_close(y.sum(-1), torch.ones(200, dtype=torch.float64))
    torch.testing.assert_close(project_simplex(y), y)
    inside = x.softmax(-1)
    torch.testing.assert_close(project_simplex(inside), inside)
    others = torch.distributions.Dirichlet(torch.ones(7, dtype=torch.float64)).sample((500,))
    assert ((x - y).norm(dim=-1)[:, None] <= torch.cdist(x, others) + 1e-12).all()


def test_universal_layers_hold_the_same_parameters_and_do_not_grow_with_depth():
    def operators(attention, depth):
        net = ViTTiny(8, 4, 1, dim=12, depth=depth, heads=2, attention=attention)
        return net, [block.mixer.operator for block in net.blocks]

    net, (first, second, third) = operators("G2U", 3)
    assert first.coefficients is second.coefficients is third.coefficients and first.weight is third.weight
    alone = count(first)
    bare = count(ViTTiny(8, 4, 1, dim=12, depth=3, heads=2, attention="softmax"))
    assert count(net) - bare == alone
    net, (first, second) = operators("G2B", 2)
    assert first.coefficients is not second.coefficients
    assert count(net) - count(ViTTiny(8, 4, 1, dim=12, depth=2, heads=2, attention="softmax")) == 2 * alone


def test_fourier_operator_is_2_pi_periodic_in_each_logit():
    operator = KArAtOperator(5, 2, generator=generator()).double()
    logits = torch.randn(3, 2, 5, 5, dtype=torch.float64, generator=generator(2))
    turns = torch.randint(-3, 4, logits.shape, generator=generator(3)).double()
    torch.testing.assert_close(operator(logits + 2 * math.pi * turns), operator(logits))
    assert not torch.allclose(operator(logits + 1.0), operator(logits))


def test_fourier_operator_is_its_formula():
    operator = KArAtOperator(4, 2, grid=2, rank=3, generator=generator()).double()
    logits = torch.randn(2, 4, 4, dtype=torch.float64, generator=generator(2))
    u, v = operator.coefficients[..., :2], operator.coefficients[..., 2:]
    m = torch.tensor([1.0, 2.0], dtype=torch.float64)
    for h in range(2):
        for row in range(4):
            angle = logits[h, row][None, :, None] * m
            inner = (u[h] * angle.cos() + v[h] * angle.sin()).sum((1, 2))
            torch.testing.assert_close(operator(logits)[h, row], operator.weight[h] @ inner)


def test_start_has_the_papers_variances():
    operator = KArAtOperator(64, 4, grid=3, generator=generator())
    assert float(operator.coefficients.detach().var()) == pytest.approx(1 / (64 * 3), rel=0.05)
    assert float(operator.weight.detach().var()) == pytest.approx(2 / (64 + 12), rel=0.1)


@pytest.mark.parametrize("basis", ["bspline", "rbf", "mexican_hat", "rational", "identity"])
@pytest.mark.parametrize("rank", [3, "full"])
def test_any_basis_and_projection_work_and_have_gradients(basis, rank):
    layer = KArAt(8, 5, basis=basis, rank=rank, project="simplex", generator=generator()).double()
    x = tokens()[:1].requires_grad_()
    weights = layer.attention(x)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert torch.autograd.gradcheck(layer, x)


def test_spectrum_is_cut_at_the_rank():
    x = torch.randn(4, 1, 12, 12, generator=generator())
    for attention, rank in (("softmax", 17), ("G3B", 4)):
        net = ViTTiny(12, 3, 1, dim=16, depth=2, heads=2, attention=attention, rank=4).train()
        values = attention_spectrum(net, x)
        assert values.shape == (2, 2, 17) and net.training
        assert (values.diff(dim=-1) <= 1e-6).all()
        assert ((values > 1e-5 * values[..., :1]).sum(-1) == rank).all()
    assert net(x).shape == (4, 10)


def test_bad_arguments_say_what_would_do():
    layer = KArAt(8, 5)
    with pytest.raises(PomonaError, match="KArAt takes no mask"):
        layer(torch.zeros(1, 5, 8), torch.ones(1, 5))
    with pytest.raises(PomonaError, match="x has 4 tokens, but this mixer was made for tokens=5"):
        layer(torch.zeros(1, 4, 8))
    with pytest.raises(PomonaError, match="KArAtOperator takes 3 features on axis -3"):
        KArAtOperator(5, 3)(torch.zeros(2, 1, 5, 5))  # not one head's row for all
    with pytest.raises(PomonaError, match="must be 'softmax' or such as 'G3B'"):
        ViTTiny(attention="G3")
    with pytest.raises(PomonaError, match="net=Linear has no KArAt layer"):
        attention_spectrum(torch.nn.Linear(1, 1), torch.zeros(1, 1))
