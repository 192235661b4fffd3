import pytest
import torch
import torch.nn.functional as F

from pomona.errors import PomonaError
from pomona.nn.phm import PHMLinear
from pomona.nn.structured import LowRankLinear, StructuredConv2d, StructuredLinear


def make(kind, **options):
    return kind(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0), **options)


LAYERS = [
    lambda: make(LowRankLinear, rank=3),
    lambda: make(LowRankLinear, rank=2, diag=True),
    lambda: make(PHMLinear, n=2),
    lambda: make(PHMLinear, n=3, pad=True),
]


@pytest.mark.parametrize("build", LAYERS)
def test_product_equals_dense_weight(build):
    layer = build()
    for batch in (0, 1, 5, 64):
        x = torch.randn(batch, 8, dtype=torch.float64)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight(), layer.bias))
        torch.testing.assert_close(layer.fold()(x), layer(x))


@pytest.mark.parametrize("build", LAYERS)
def test_project_recovers_its_own_weight(build):
    layer, target = build(), build().weight().detach() * 1.7
    layer.project_(target)
    exact = getattr(layer, "diagonal", None) is None and not getattr(layer, "pad", False)
    # with a diagonal or padding the fit alternates between two parts, and only comes near
    assert layer.relative_error(target) < (1e-10 if exact else 0.05)


def test_low_rank_projection_is_the_best_of_its_rank():
    matrix = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    layer = make(LowRankLinear, rank=3).project_(matrix)
    left_over = torch.linalg.svdvals(matrix)[3:].norm() / matrix.norm()
    assert layer.relative_error(matrix) == pytest.approx(float(left_over))


def test_low_rank_counts_and_variance():
    layer = LowRankLinear(512, 256, rank=16, generator=torch.Generator().manual_seed(0))
    assert layer.n_params() == 16 * (512 + 256) + 256
    assert layer.flops(3) == 3 * 2 * 16 * (512 + 256)
    assert float(layer.weight().detach().var()) == pytest.approx(2 / (512 + 256), rel=0.1)
    rank = LowRankLinear.rank_for(512, 256, 512 * 256 // 4)
    assert abs(rank * (512 + 256) - 512 * 256 // 4) < (512 + 256)


def test_conv_equals_convolution_with_its_kernel():
    conv = PHMLinear.conv(4, 6, 3, stride=2, padding=1, n=2, dtype=torch.float64)
    assert isinstance(conv, StructuredConv2d)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    patches = F.unfold(x, 3, padding=1, stride=2).transpose(1, 2)
    torch.testing.assert_close(conv(x).flatten(2), conv.linear(patches).transpose(1, 2))


def test_conv_of_phm_is_a_kronecker_product_over_channels():
    conv = PHMLinear.conv(4, 6, 3, n=2, bias=False, dtype=torch.float64)
    rules, blocks = conv.linear.rules, conv.linear.blocks.unflatten(-1, (2, 3, 3))
    kernel = sum(
        torch.stack([torch.cat([rules[i, a, b] * blocks[i] for b in range(2)], 1) for a in range(2)]).flatten(0, 1)
        for i in range(2)
    )
    torch.testing.assert_close(conv.weight(), kernel)


def test_gradients():
    layer = make(LowRankLinear, rank=2, diag=True)
    parameters = tuple(layer.parameters())
    x = torch.randn(3, 8, dtype=torch.float64)

    def function(*values):
        names = [name for name, _ in layer.named_parameters()]
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, parameters)


def test_bad_input():
    with pytest.raises(PomonaError, match="rank=9 must lie between 1 and 8"):
        LowRankLinear(8, 8, rank=9)
    with pytest.raises(PomonaError, match="diag=True needs a square matrix, got 4 x 8"):
        LowRankLinear(8, 4, rank=2, diag=True)
    with pytest.raises(PomonaError, match=r"matrix has shape \(3, 8\), not \(8, 8\)"):
        LowRankLinear(8, 8, rank=2).project_(torch.zeros(3, 8))
    with pytest.raises(PomonaError, match="cannot be fitted"):
        StructuredLinear(2, 2).project_(torch.zeros(2, 2))
