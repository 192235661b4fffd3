import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pomona.errors import PomonaError
from pomona.nn.coord_kernel import CoordKernel, convolve, horizon_size, relative_grid
from pomona.nn.smpconv import WeightNet


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Wave(nn.Module):
    """K[o, i](c) = cos((o + 2 i) sum c + phase)."""

    def __init__(self, out, into):
        super().__init__()
        self.phase = nn.Parameter(draw(out, into, 1))

    def forward(self, x):
        out, into, _ = self.phase.shape
        rate = torch.arange(out)[:, None, None] + 2 * torch.arange(into)[:, None]
        return torch.cos(rate * x.sum(-1) + self.phase)


def test_grid_runs_from_minus_one_to_one():
    grid = relative_grid((3, 2), draw(1))
    assert grid.tolist() == [[-1, -1], [-1, 1], [0, -1], [0, 1], [1, -1], [1, 1]]
    assert relative_grid((1,), draw(1)).tolist() == [[0]]


def test_horizons():
    assert [horizon_size("full", 8), horizon_size("full", 8, causal=True)] == [15, 8]
    assert [horizon_size("same", 8), horizon_size("same", 8, causal=True), horizon_size(5, 8)] == [9, 8, 5]
    with pytest.raises(PomonaError, match="kernel_size=4 must be odd where the kernel is centred, such as 5"):
        horizon_size(4, 8)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("shape", "taps"), [((17,), (5,)), ((30,), (30,)), ((9, 12), (3, 4))])
def test_fft_and_direct_agree(groups, stride, shape, taps):
    x, kernel, bias = draw(3, 4, *shape), draw(8, 4 // groups, *taps, seed=1), draw(8, seed=2)
    direct, fft = (convolve(x, kernel, bias, (stride,) * len(shape), groups, way) for way in ("direct", "fft"))
    torch.testing.assert_close(fft, direct, rtol=1e-10, atol=1e-10)
    auto = convolve(x.float(), kernel.float(), bias.float(), (stride,) * len(shape), groups)
    torch.testing.assert_close(auto.double(), direct, rtol=1e-4, atol=1e-4)


def test_is_an_ordinary_convolution_with_its_kernel():
    layer, x = CoordKernel(Wave(6, 2), 4, 6, (3, 5), dim=2, groups=2, stride=2, padding=1).double(), draw(2, 4, 9, 8)
    nn.init.normal_(layer.bias)
    expected = F.conv2d(x, layer.kernel(), layer.bias, 2, 1, groups=2)
    torch.testing.assert_close(layer(x), expected)
    centred = CoordKernel(Wave(4, 4), 4, 4, 7).double()
    torch.testing.assert_close(centred(draw(2, 4, 9)), F.conv1d(draw(2, 4, 9), centred.kernel(), padding=3))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_irregular_times_on_the_grid_give_the_regular_convolution(causal, groups):
    layer, x = CoordKernel(Wave(4, 4 // groups), 4, 4, 5, causal=causal, groups=groups).double(), draw(2, 4, 9)
    nn.init.normal_(layer.bias)
    times = torch.arange(9.0, dtype=torch.float64)
    torch.testing.assert_close(layer(x, times), layer(x))
    torch.testing.assert_close(layer(x, times.expand(2, 9) + 3.5), layer(x))
    later = x.clone()
    later[..., 5:] += 1
    same = torch.equal(layer(x, times)[..., :5], layer(later, times)[..., :5])
    assert same == causal


def test_resample_keeps_values_at_matching_coordinates():
    layer = CoordKernel(Wave(2, 3), 3, 2, 5).double()
    before = layer.kernel()
    layer.resample(9)
    torch.testing.assert_close(layer.kernel()[..., ::2], before, rtol=0, atol=1e-14)
    layer.resample(5)
    layer.resample(9, rescale=True)
    torch.testing.assert_close(layer.kernel()[..., ::2], before / 2)
    assert layer(draw(2, 3, 20)).shape == (2, 2, 20)


@pytest.mark.parametrize("conv", ["direct", "fft"])
def test_gradients(conv):
    layer, x = CoordKernel(WeightNet(2, 2, hidden=4, taps=5, omega=2.0), 2, 2, 5, conv=conv).double(), draw(2, 2, 6)
    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    names = [n for n, _ in layer.named_parameters()]
    assert torch.autograd.gradcheck(
        lambda x, *p: torch.func.functional_call(layer, dict(zip(names, p, strict=True)), (x,)),
        (x.requires_grad_(), *values),
    )


@pytest.mark.parametrize("conv", ["direct", "fft"])
def test_empty_batch_half_precision_and_vmap(conv):
    layer = CoordKernel(Wave(4, 1), 4, 4, 5, groups=4, conv=conv)
    assert layer.double()(draw(0, 4, 9)).shape == (0, 4, 9)
    assert layer.bfloat16()(draw(2, 4, 9).bfloat16()).dtype == torch.bfloat16
    layer.double()
    params = {name: torch.stack([p.detach(), p.detach() + 1]) for name, p in layer.named_parameters()}
    x = draw(2, 4, 9)
    out = torch.vmap(lambda p: torch.func.functional_call(layer, p, (x,)))(params)
    torch.testing.assert_close(out[0], layer(x))


def test_bad_input():
    layer = CoordKernel(Wave(2, 3), 3, 2, 5).double()
    with pytest.raises(PomonaError, match="takes 3 features on axis 1"):
        layer(draw(2, 4, 9))
    with pytest.raises(PomonaError, match="takes .batch, channels, 1 positions.; its input has shape"):
        layer(draw(3, 9))
    with pytest.raises(PomonaError, match="conv='slow' is not known"):
        CoordKernel(Wave(2, 3), 3, 2, 5, conv="slow")
    with pytest.raises(PomonaError, match="t has 8 times; the sequence has 9 steps"):
        layer(draw(2, 3, 9), torch.arange(8.0))
    with pytest.raises(PomonaError, match=r"t is for sequences, with stride=1, padding=None .* padding=\(0,\)"):
        CoordKernel(Wave(2, 3), 3, 2, 5, padding=0)(draw(2, 3, 9), torch.arange(9.0))
    with pytest.raises(PomonaError, match="dim=2 must be 1 where causal"):
        CoordKernel(Wave(2, 3), 3, 2, 5, dim=2, causal=True)
