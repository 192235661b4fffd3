import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pomona.errors import PomonaError
from pomona.nn.pool import (
    POOLS,
    GatedPool2d,
    GeMPool2d,
    LpPool2d,
    MixedPool2d,
    Pool2d,
    PowerPool2d,
    SoftPool2d,
    StochasticPool2d,
    TreePool2d,
)

GEOMETRIES = [
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    {"kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 0), "ceil_mode": True},
    {"kernel_size": 2, "stride": 3, "padding": 1, "ceil_mode": True},
]


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_mixture_of_one_is_max_and_of_zero_is_average(geometry):
    x = draw(2, 3, 8, 9)
    torch.testing.assert_close(MixedPool2d(**geometry, initial=1.0)(x), nn.MaxPool2d(**geometry)(x), rtol=0, atol=0)
    for include in (True, False):
        pool = MixedPool2d(**geometry, initial=0.0, count_include_pad=include)
        average = nn.AvgPool2d(**geometry, count_include_pad=include)
        torch.testing.assert_close(pool(x), average(x), rtol=0, atol=0)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_regions_are_those_of_torch(geometry):
    x, pool = draw(2, 3, 8, 9), Pool2d(**geometry)
    assert torch.equal(pool.regions(x, float("-inf")).amax(-1), pool.max(x))
    sums = F.avg_pool2d(x, pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode, divisor_override=1)
    torch.testing.assert_close(pool.regions(x).sum(-1), sums)
    filters = draw(5, pool.area)
    torch.testing.assert_close(pool.respond(x, filters), torch.einsum("bchwk,mk->bcmhw", pool.regions(x), filters))


def test_gated_with_zero_mask_equals_mixed_with_one_half():
    x = draw(2, 3, 8, 8)
    torch.testing.assert_close(GatedPool2d(3, 2).double()(x), MixedPool2d(3, 2).double()(x))


def test_gate_is_the_sigmoid_of_the_filter_response():
    pool, x = GatedPool2d(2, share="channel", channels=3).double(), draw(2, 3, 6, 6)
    nn.init.normal_(pool.mask)
    a = torch.einsum("bchwk,ck->bchw", pool.regions(x), pool.mask[:, 0]).sigmoid()
    torch.testing.assert_close(pool(x), a * pool.max(x) + (1 - a) * pool.average(x))


def test_parameter_counts():
    def count(pool):
        return sum(p.numel() for p in pool.parameters())

    assert count(MixedPool2d(3)) == 1
    assert count(GatedPool2d(3)) == 9
    assert count(TreePool2d(3, depth=2)) == 3 * 9
    assert count(TreePool2d(3, depth=3)) == (4 + 3) * 9
    sizes = {"channels": 5, "out_size": (2, 4)}
    for share, sets in (("layer", 1), ("channel", 5), ("region", 8), ("region_channel", 40)):
        assert count(MixedPool2d(3, share=share, **sizes)) == sets
        assert count(GatedPool2d(3, share=share, **sizes)) == 9 * sets
        assert count(TreePool2d(3, share=share, **sizes)) == 27 * sets


@pytest.mark.parametrize("kind", [MixedPool2d, GatedPool2d, TreePool2d])
def test_shared_and_separate_parameters_agree_when_equal(kind):
    x = draw(2, 5, 4, 8)
    plain = kind(2).double()
    expected = plain(x)
    for share in ("channel", "region", "region_channel"):
        pool = kind(2, share=share, channels=5, out_size=(2, 4)).double()
        with torch.no_grad():
            for own, shared in zip(pool.parameters(), plain.parameters(), strict=True):
                own.copy_(shared.expand_as(own))
        torch.testing.assert_close(pool(x), expected)
        with torch.no_grad():
            first = next(pool.parameters())[0]  # of the channels, or of the single set of all channels
            (first if "channel" in share else first[0]).add_(1)
        changed = (pool(x) - expected).abs() > 1e-9
        assert changed.any()
        assert not changed[:, 1:].any() if "channel" in share else not changed[:, :, 1:].any()


def test_tree_with_equal_leaves_ignores_the_gates_and_is_a_convolution():
    pool, x = TreePool2d(3, 2, depth=3).double(), draw(2, 3, 9, 9)
    with torch.no_grad():
        pool.leaves.copy_(draw(1, 9).expand(4, 9))
        pool.gates.copy_(draw(3, 9, seed=1))
    kernel = pool.leaves[0].view(1, 1, 3, 3).expand(3, 1, 3, 3)
    torch.testing.assert_close(pool(x), F.conv2d(x, kernel, stride=2, groups=3))


def test_tree_is_the_recursion():
    pool, x = TreePool2d(2, depth=3).double(), draw(2, 3, 6, 6)
    with torch.no_grad():
        pool.leaves.copy_(draw(4, 4))
        pool.gates.copy_(draw(3, 4, seed=1))
    leaf = torch.einsum("bchwk,mk->mbchw", pool.regions(x), pool.leaves)
    g = torch.einsum("bchwk,mk->mbchw", pool.regions(x), pool.gates).sigmoid()
    left, right = g[0] * leaf[0] + (1 - g[0]) * leaf[1], g[1] * leaf[2] + (1 - g[1]) * leaf[3]
    torch.testing.assert_close(pool(x), g[2] * left + (1 - g[2]) * right)


def test_tree_starts_near_average_pooling():
    x = draw(2, 3, 6, 6)
    torch.testing.assert_close(TreePool2d(2, noise=0.0).double()(x), F.avg_pool2d(x, 2))


@pytest.mark.parametrize("geometry", [{"kernel_size": 2}, {"kernel_size": 3, "stride": 2}])
def test_mixed_and_gated_lie_between_average_and_max(geometry):
    x = draw(2, 3, 9, 9)
    gated = GatedPool2d(**geometry).double()
    nn.init.normal_(gated.mask)
    for pool in (
        gated,
        MixedPool2d(**geometry, initial=0.3).double(),
        MixedPool2d(**geometry, initial=0.9, sigmoid=True).double(),
    ):
        y = pool(x)
        assert (y <= pool.max(x)).all()
        assert (y >= pool.average(x) - 1e-12).all()


def test_power_pools():
    x = draw(2, 3, 6, 6)
    torch.testing.assert_close(LpPool2d(2, p=3.0).double()(x), F.lp_pool2d(x.abs(), 3.0, 2))
    torch.testing.assert_close(GeMPool2d(2, p=1.0).double()(x.abs()), F.avg_pool2d(x.abs(), 2))
    torch.testing.assert_close(GeMPool2d(2, p=200.0).double()(x.abs()), F.max_pool2d(x.abs(), 2), rtol=0.02, atol=0)
    assert GeMPool2d(2).p.requires_grad
    assert not LpPool2d(2).p.requires_grad
    zeros = torch.zeros(1, 1, 2, 2, requires_grad=True)
    PowerPool2d(2)(zeros).sum().backward()
    assert torch.isfinite(zeros.grad).all()


def test_soft_pool_is_the_softmax_average_and_ignores_padding():
    x = draw(2, 3, 6, 6) - 5
    values = Pool2d(2).regions(x)
    torch.testing.assert_close(SoftPool2d(2)(x), (values.softmax(-1) * values).sum(-1))
    assert (SoftPool2d(2, padding=1)(x) < 0).all()


def test_stochastic_pool_draws_in_proportion():
    x = torch.tensor([[1.0, 3.0], [0.0, 6.0]]).expand(20000, 1, 2, 2)
    pool = StochasticPool2d(2, generator=torch.Generator().manual_seed(0))
    drawn = pool(x).flatten()
    for value, probability in ((1.0, 0.1), (3.0, 0.3), (6.0, 0.6)):
        assert float((drawn == value).float().mean()) == pytest.approx(probability, abs=0.015)
    assert not (drawn == 0).any()
    pool.eval()
    assert float(pool(x)[0]) == pytest.approx(0.1 * 1 + 0.3 * 3 + 0.6 * 6)
    assert torch.equal(pool(torch.zeros(1, 1, 2, 2)), torch.zeros(1, 1, 1, 1))
    assert torch.equal(pool.train()(torch.zeros(1, 1, 2, 2)), torch.zeros(1, 1, 1, 1))


@pytest.mark.parametrize("share", ["layer", "channel", "region", "region_channel"])
def test_gradients_of_gate_masks(share):
    pool = GatedPool2d(2, share=share, channels=2, out_size=2).double()
    x = draw(1, 2, 4, 4)
    mask = draw(*pool.mask.shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda mask: torch.func.functional_call(pool, {"mask": mask}, (x,)), (mask,))


def test_gradients_of_trees():
    pool, x = TreePool2d(2, depth=3).double(), draw(1, 2, 4, 4)
    leaves, gates = draw(4, 4).requires_grad_(), draw(3, 4).requires_grad_()

    def function(leaves, gates):
        return torch.func.functional_call(pool, {"leaves": leaves, "gates": gates}, (x,))

    assert torch.autograd.gradcheck(function, (leaves, gates))


@pytest.mark.parametrize("kind", POOLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_pool_halves_any_batch_in_any_dtype(kind, dtype):
    pool = POOLS[kind](kernel_size=2, stride=2).to(dtype)
    for batch in (0, 2):
        x = torch.rand(batch, 3, 6, 8).to(dtype)
        assert pool(x).shape == (batch, 3, 3, 4)
        assert pool(x).dtype == dtype
    torch.testing.assert_close(pool.eval()(x.mT), pool(x.mT.contiguous()))


def test_bad_input():
    with pytest.raises(PomonaError, match="share='maps' is not known"):
        GatedPool2d(2, share="maps")
    with pytest.raises(PomonaError, match="share='channel' needs channels"):
        GatedPool2d(2, share="channel")
    with pytest.raises(PomonaError, match="share='region' needs out_size"):
        TreePool2d(2, share="region")
    with pytest.raises(PomonaError, match=r"padding=\(2, 2\) is more than half of kernel_size=\(3, 3\)"):
        MixedPool2d(3, padding=2)
