import copy

import pytest
import torch
import torch.nn.functional as F

from pomona.errors import PomonaError
from pomona.nn.hyperzzw import (
    BRANCHES,
    GIBS,
    RGU,
    HyperChannelInteraction,
    HyperInteraction,
    HyperZZWLocal,
    SFNEBlock,
    SiGLU,
    SlowNet,
    hyper_zzw,
    slow_loss,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_global_operator_of_ones_is_z_times_z():
    z = draw(2, 3, 5, 5)
    torch.testing.assert_close(hyper_zzw(torch.ones(3, 5, 5), z), z @ z, rtol=0, atol=0)
    kernel, fast = draw(3, 5, 5, seed=1), draw(2, 3, 5, 5, seed=2)
    torch.testing.assert_close(hyper_zzw(kernel, z, fast), torch.einsum("chk,bchk,bckw->bchw", kernel, z, fast))
    torch.testing.assert_close(hyper_zzw(kernel, z, fast, context=False), kernel @ fast)
    torch.testing.assert_close(hyper_zzw(kernel, z, how="elementwise"), kernel * z * z)


def test_series_operator_is_a_causal_convolution():
    kernel, z, fast = draw(3, 6), draw(2, 3, 6, seed=1), draw(2, 3, 6, seed=2)
    expected = torch.zeros_like(z)
    for n in range(6):
        for m in range(n + 1):
            expected[..., n] += kernel[:, m] * z[..., m] * fast[..., n - m]
    torch.testing.assert_close(hyper_zzw(kernel, z, fast, how="conv"), expected)
    assert hyper_zzw(kernel, z[:0], how="conv").shape == (0, 3, 6)


def test_local_operator_without_context_is_a_depthwise_convolution():
    local, z = HyperZZWLocal(3, 5, context=None).double(), draw(2, 3, 8, 8)
    expected = F.conv2d(z, local.slow()[:, None], padding=2, groups=3)
    torch.testing.assert_close(local(z), expected)
    contextual = HyperZZWLocal(3, 3).double()
    for index, kernel in enumerate(contextual.kernel(z)):
        one = F.conv2d(z[index : index + 1], kernel[:, None], padding=1, groups=3)
        torch.testing.assert_close(contextual(z)[index : index + 1], one)


def test_local_context_of_a_batch_is_its_mean_and_of_a_sample_its_own():
    sample, batch = (HyperZZWLocal(3, 3, context=kind).double() for kind in ("sample", "batch"))
    batch.load_state_dict(sample.state_dict())
    z = draw(4, 3, 8, 8)
    torch.testing.assert_close(sample(z)[:2], sample(z[:2]))
    assert (batch(z)[:2] - batch(z[:2])).abs().max() > 1e-6
    torch.testing.assert_close(batch(z[:1]), sample(z[:1]))


def test_slow_kernel_depends_on_coordinates_and_parameters_only():
    block = SFNEBlock(3, 3, (6, 6)).double()
    seen = []
    block.slow.register_forward_hook(lambda _m, _i, kernel: seen.append(kernel.detach()))
    for seed, batch in ((0, 2), (1, 5)):
        block(draw(batch, 3, 6, 6, seed=seed))
    assert torch.equal(*seen)
    slow = SlowNet(2, (4, 4), hidden=5, layers=2).double()
    c = torch.cartesian_prod(*2 * [torch.linspace(-1, 1, 4, dtype=torch.float64)])
    z = torch.sin(c @ slow.rate[0].T + slow.phase[0])
    z = torch.sin(c @ slow.rate[1].T + slow.phase[1]) * (z @ slow.weight[0].T + slow.bias[0]) + slow.position[0]
    torch.testing.assert_close(slow(), (z @ slow.out.T).T.reshape(2, 4, 4))
    assert (slow.bias[0] == 1).all()
    assert (slow.phase[0] == 0).all()
    again = [SlowNet(2, (9,), generator=torch.Generator().manual_seed(3))() for _ in range(2)]
    assert torch.equal(*again)


def test_slow_loss_of_equal_kernels_is_zero_and_moves_slow_networks_only():
    a = SFNEBlock(2, 4, (4, 4)).double()
    b = SFNEBlock(4, 2, (4, 4)).double()
    kernel = a.slow()
    assert float(slow_loss([kernel, kernel, kernel.repeat(2, 1, 1)]).detach()) == 0
    slow_loss([a.slow(), b.slow()]).backward()
    for block in (a, b):
        for name, parameter in block.named_parameters():
            assert (parameter.grad is not None) == name.startswith("slow.")
    tiled = F.mse_loss(a.slow().repeat(2, 1, 1), b.slow())
    torch.testing.assert_close(slow_loss([a.slow(), b.slow()]), tiled)


def test_gibs_has_mean_zero_in_every_group_of_an_example():
    norm, x = GIBS(6, 3), (5 + 3 * draw(4, 6, 5, 5)).float()
    for mode in (True, False):
        y = norm.train(mode)(x).unflatten(1, (3, 2)).flatten(2)
        assert y.mean(-1).abs().max() < 1e-5
        torch.testing.assert_close(y.var(-1, unbiased=False), torch.ones(4, 3), rtol=1e-3, atol=1e-3)
    assert not list(norm.parameters())


@pytest.mark.parametrize("branch", BRANCHES)
def test_every_branch_alone_keeps_size_dtype_and_examples_apart(branch):
    block, z = SFNEBlock(3, 5, (6, 6), branches=[branch]).double().eval(), draw(4, 3, 6, 6)
    y = block(z)
    assert y.shape == (4, 5, 6, 6)
    torch.testing.assert_close(block(z)[:2], block(z[:2]))
    assert block(z[:0]).shape == (0, 5, 6, 6)
    assert torch.isfinite(block.float()(1e3 * z.float())).all()
    assert copy.deepcopy(block).bfloat16()(z.bfloat16()).dtype == torch.bfloat16
    if branch not in ("fast", "siglu"):
        plain = SFNEBlock(3, 5, (6, 6), branches=[branch], context=False).double().eval()
        plain.load_state_dict(block.double().state_dict(), strict=False)
        assert (plain(z) - block(z)).abs().max() > 1e-9


def test_gates_are_sigmoids_of_twice_expanded_means():
    z = draw(2, 3, 4, 4)
    channel, both = HyperChannelInteraction(3).double(), HyperInteraction(3, (4, 4)).double()
    s = z.mean((2, 3))
    torch.testing.assert_close(channel(z), z * (channel.slow() * s * s).sigmoid()[..., None, None])
    m = z.mean(1, keepdim=True)
    expected = z * both.gate(z) * (both.slow_space() * m * m).sigmoid()
    torch.testing.assert_close(both(z), expected)


@pytest.mark.parametrize(
    "layer", [RGU(2, (3, 3)), SiGLU(2), HyperZZWLocal(2), HyperInteraction(2, (3, 3))], ids=lambda m: type(m).__name__
)
def test_gradients(layer):
    names, values = zip(*((n, p.double().requires_grad_()) for n, p in layer.state_dict().items()), strict=True)
    assert torch.autograd.gradcheck(
        lambda z, *p: torch.func.functional_call(layer, dict(zip(names, p, strict=True)), (z,)),
        (draw(2, 2, 3, 3).requires_grad_(), *values),
        fast_mode=True,
    )


def test_bad_input():
    with pytest.raises(PomonaError, match="how='matmul' takes square maps"):
        hyper_zzw(torch.ones(1), draw(1, 1, 2, 3))
    with pytest.raises(PomonaError, match="branches='locale' is not known"):
        SFNEBlock(2, 2, (4, 4), branches=["locale"])
    with pytest.raises(PomonaError, match="size=.4, 4. is what this block was made for"):
        SFNEBlock(2, 2, (4, 4))(torch.ones(1, 2, 6, 6))
    with pytest.raises(PomonaError, match=r"size=\(4, 6\) must be square for global branches"):
        SFNEBlock(2, 2, (4, 6))
    with pytest.raises(PomonaError, match="repeat=3 is how many channels the earlier input must have"):
        SFNEBlock(2, 2, (4, 4), repeat=3)(torch.ones(1, 2, 4, 4))
    with pytest.raises(PomonaError, match="k=4 must be an odd number, such as 5"):
        SFNEBlock(2, 2, (4, 4), branches=["local4"])
    with pytest.raises(PomonaError, match="context='all' is not known; choose one of sample, batch, None"):
        HyperZZWLocal(2, context="all")
