import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pomona.errors import PomonaError
from pomona.nn.gaudi_gblr import GaudiGBLR, gaudi_mask

INF = math.inf


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def layer(*sizes, **options):
    return GaudiGBLR(*sizes, generator=seeded(), dtype=torch.float64, **options)


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("n", [32, 31])
def test_sharp_mask_is_a_box(n):
    mask = gaudi_mask(vector(6 / n), vector(5 / n), n)[0]
    expected = torch.zeros(n, dtype=torch.float64)
    expected[5:11] = 1
    torch.testing.assert_close(mask, expected)
    around = gaudi_mask(vector(6 / n), vector((n - 2) / n), n)[0]
    torch.testing.assert_close(around, expected.roll(-7))


@pytest.mark.parametrize("sigma", [0.3, 1.0, 17.0, INF])
def test_mean_of_the_mask_is_the_width(sigma):
    width = torch.linspace(0, 1, 9, dtype=torch.float64)
    torch.testing.assert_close(gaudi_mask(width, width.flip(0), 33, sigma).mean(-1), width)


def test_full_boxes_are_low_rank_and_disjoint_ones_block_diagonal():
    full = layer(12, 8, r=2, rank_ratio=0.5, width_init=1.0, sigma=INF)
    assert full.blocks == 2
    expected = sum(u.T @ v for u, v in zip(full.u, full.v, strict=True))
    torch.testing.assert_close(full.weight(), expected)
    assert torch.linalg.matrix_rank(full.weight()) == 4
    blocks = layer(12, 8, r=3, rank_ratio=1.5, width_init=0.25, loc_init="linspace", sigma=INF)
    assert blocks.blocks == 4
    parts = [u[:, 2 * k : 2 * k + 2].T @ v[:, 3 * k : 3 * k + 3] for k, (u, v) in enumerate(zip(blocks.u, blocks.v))]  # noqa: B905
    torch.testing.assert_close(blocks.weight(), torch.block_diag(*parts))


def test_gradients_of_widths_and_locations():
    width, location = vector(0.0, 0.2, 0.7).requires_grad_(), vector(0.1, 0.5, 0.9).requires_grad_()
    assert torch.autograd.gradcheck(lambda w, at: gaudi_mask(w, at, 12, 2.0), (width, location))
    towards = torch.randn(12, dtype=torch.float64, generator=seeded())
    of_width, of_location = torch.autograd.grad(
        (gaudi_mask(width, location, 12, 2.0) @ towards).sum(), (width, location)
    )
    assert torch.isfinite(of_width).all() and (of_width != 0).all()
    assert torch.isfinite(of_location).all() and (of_location[1:] != 0).all()
    assert of_location[0] == 0  # a box of no width is nowhere


@pytest.mark.parametrize("sigma", [5.0, 100.0, INF])
@pytest.mark.parametrize("sizes", [(40, 24), (33, 47)])
def test_compact_equals_the_masked_product(sizes, sigma):
    net = layer(*sizes, cost=0.3, r=2, sigma=sigma, loc_init="uniform").eval()
    nn.init.normal_(net.bias, generator=seeded())
    x = torch.randn(2, 5, sizes[0], dtype=torch.float64, generator=seeded())
    small = net.compact()
    torch.testing.assert_close(small(x), F.linear(x, net.weight(), net.bias))
    assert small(x[:0]).shape == (0, 5, sizes[1])
    assert small.flops() == net.flops()
    if sigma == INF:
        assert net.flops() == 2 * 2 * int(net.usage()["size"].sum())


def test_cost_and_variance_at_the_start():
    for cost in (0.125, 0.5, 1.0):
        net = GaudiGBLR(96, 64, cost=cost, sigma=INF, generator=seeded()).eval()
        assert net.usage()["cost"] == pytest.approx(cost, rel=0.06)
    outputs = [
        GaudiGBLR(256, 64, cost=cost, sigma=sigma, generator=seeded())(
            torch.randn(500, 256, generator=seeded(1))
        ).detach()
        for cost in (0.25, 0.5)
        for sigma in (1.0, INF)
    ]
    for y in outputs:
        assert float(y.square().mean()) == pytest.approx(1, rel=0.2)


def test_training_shrinks_to_the_cost_and_sharpens():
    net = layer(16, 16, cost=0.5, shrink=0.01, sigma_end=11.0, anneal_steps=100).project_(torch.eye(16))
    assert bool((net.width == 1).all())
    with torch.no_grad():
        net.location += 1.5
        costs = []
        for step in range(120):
            net.post_step()
            assert float(net.sigma) == pytest.approx(1 + 0.1 * (step + 1) if step < 100 else INF)
            costs.append(float(16 * net.width.sum() / 16**2))
    assert costs[0] == pytest.approx(2 * 0.99)
    assert costs[-1] == pytest.approx(0.5)  # and no lower
    assert bool(((net.location >= 0) & (net.location < 1)).all())


def test_projection_is_exact_where_the_rank_allows():
    matrix = torch.randn(6, 9, dtype=torch.float64, generator=seeded())
    assert layer(9, 6).project_(matrix).relative_error(matrix) < 1e-10
    half = layer(9, 6, rank_ratio=0.5).project_(matrix)
    left_over = torch.linalg.svdvals(matrix)[3:].norm() / matrix.norm()
    assert half.relative_error(matrix) == pytest.approx(float(left_over))


def test_replaces_dense_layers():
    linear, conv = nn.Linear(9, 6).double(), nn.Conv2d(4, 6, 3, padding=1, stride=2).double()
    x, image = torch.randn(3, 9, dtype=torch.float64), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(GaudiGBLR.like(linear)(x), linear(x))
    torch.testing.assert_close(GaudiGBLR.like(conv)(image), conv(image))
    with pytest.raises(PomonaError, match="cannot be replaced: only groups=1"):
        GaudiGBLR.like(nn.Conv2d(4, 4, 3, groups=2))


def test_large_batches_go_through_the_dense_matrix():
    net = layer(6, 5).eval()
    x = torch.randn(40, 6, dtype=torch.float64, generator=seeded())
    torch.testing.assert_close(net(x), torch.cat([net(row[None]) for row in x]))


def test_bad_input():
    with pytest.raises(PomonaError, match=r"width_init='slpr' is not known; did you mean splr\?"):
        GaudiGBLR(8, 8, width_init="slpr")
    with pytest.raises(PomonaError, match="loc_init='there' is not known"):
        GaudiGBLR(8, 8, loc_init="there")
    with pytest.raises(PomonaError, match="GaudiGBLR takes 8 features on axis -1"):
        GaudiGBLR(8, 8)(torch.zeros(2, 7))
