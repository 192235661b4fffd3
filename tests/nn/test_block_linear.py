import pytest
import torch
import torch.nn.functional as F

from pomona.errors import PomonaError
from pomona.nn.block_linear import BlockDiagonalLinear, BlockSparseLinear, MonarchLinear

LAYERS = [
    (BlockDiagonalLinear, {"blocks": 4}, 0.25),
    (MonarchLinear, {"blocks": 4, "middle": 32}, 0.375),
    (BlockSparseLinear, {"block": 8, "density": 0.25}, 0.25),
]


@pytest.mark.parametrize("kind, options, cost", LAYERS)
def test_product_variance_and_cost(kind, options, cost):
    layer = kind(64, 32, **options, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 500, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight(), layer.bias))
    assert layer.flops() == cost * 2 * 64 * 32
    assert layer.n_params() == layer.flops() // 2 + 32
    assert float(layer(x).detach().square().mean()) == pytest.approx(1, rel=0.15)
    assert layer(x[:, :0]).shape == (3, 0, 32)


def test_block_sparse_has_as_many_blocks_in_each_row():
    there = BlockSparseLinear(64, 32, 0.5, 8).weight().detach().unflatten(0, (4, 8)).unflatten(2, (8, 8)) != 0
    assert (there.any(3).any(1).sum(1) == 4).all()


def test_bad_input():
    with pytest.raises(PomonaError, match="in_features=10 cannot be divided into blocks=4"):
        BlockDiagonalLinear(10, 8)
    with pytest.raises(PomonaError, match="density=0 must be above 0"):
        BlockSparseLinear(32, 32, 0)
