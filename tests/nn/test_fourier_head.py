import copy
import math

import pytest
import torch
from scipy.ndimage import gaussian_filter1d

from pomona.errors import PomonaError
from pomona.nn.fourier_head import (
    Binning,
    FourierHead,
    GMMHead,
    LinearHead,
    PointHead,
    autocorrelation,
    smoothness,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def head(bins=50, n_freq=9, **options):
    torch.manual_seed(0)
    return FourierHead(6, bins, n_freq, **options).double()


GRID = torch.linspace(-1, 1, 4001, dtype=torch.float64)


def test_pdf_is_not_negative_and_integrates_to_one():
    p = head().pdf(draw(20, 6), GRID)
    assert p.min() >= -1e-6
    torch.testing.assert_close(torch.trapezoid(p, GRID), torch.ones(20).double(), atol=1e-4, rtol=0)


def test_pdf_is_the_series():
    layer, x = head(), draw(3, 6)
    c = torch.complex(*layer.coefficients(x).unbind(-2))
    k = torch.arange(1, 10).double()
    series = 0.5 + (c[:, None, 1:] * torch.exp(1j * math.pi * k * GRID[:, None])).sum(-1).real
    torch.testing.assert_close(layer.pdf(x, GRID), series)


@pytest.mark.parametrize("n", [1, 2, 9, 100])
def test_coefficients_equal_the_direct_sum_and_the_fft(n):
    a = draw(3, 2, n)
    z = torch.complex(a[:, 0], a[:, 1])
    direct = torch.stack([(z[:, : n - k] * z[:, k:].conj()).sum(-1) for k in range(n)], -1)
    for method in ("direct", "fft", "auto"):
        c = autocorrelation(a, method)
        torch.testing.assert_close(torch.complex(c[:, 0], c[:, 1]), direct, atol=1e-5, rtol=0)
    torch.testing.assert_close(autocorrelation(a)[:, 0, 0], a.square().sum((1, 2)))


def test_softmax_of_the_logits_is_the_normalised_density_at_the_bins():
    layer, x = head(), draw(20, 6)
    p = layer.pdf(x, layer.centres)
    torch.testing.assert_close(layer.pmf(x), p / p.sum(-1, keepdim=True), atol=1e-4, rtol=0)


def test_no_frequencies_give_the_uniform_distribution():
    layer = head(n_freq=0)
    torch.testing.assert_close(layer.pmf(draw(20, 6)), torch.full((20, 50), 0.02).double())
    torch.testing.assert_close(layer.pdf(draw(2, 6), GRID), torch.full((2, 4001), 0.5).double())


def test_parameter_count_and_period():
    layer = head()
    assert sum(p.numel() for p in layer.parameters()) == 2 * 10 * 7
    assert sum(p.numel() for p in LinearHead(6, 50).parameters()) == 50 * 7
    left, right = layer.pdf(draw(5, 6), torch.tensor([-1.0, 1.0]).double()).unbind(-1)
    torch.testing.assert_close(left, right)


def test_starts_near_zero_and_the_scale_of_the_amplitudes_does_not_matter():
    layer, x = head(), draw(4, 6)
    assert layer.linear.weight.abs().max() <= 1 / math.sqrt(6) / 100
    before = layer(x)
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(37)
    torch.testing.assert_close(layer(x), before)


def test_cdf_mean_and_samples_are_those_of_the_density():
    layer, x = head(), draw(3, 6)
    p = layer.pdf(x, GRID)
    torch.testing.assert_close(layer.cdf(x, GRID)[:, 1:], torch.cumulative_trapezoid(p, GRID), atol=1e-5, rtol=0)
    torch.testing.assert_close(layer.mean(x), torch.trapezoid(p * GRID, GRID), atol=1e-5, rtol=0)
    drawn = layer.sample(x, 20_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        layer.cdf(x, drawn).sort().values.mean(-1), torch.full((3,), 0.5).double(), atol=0.01, rtol=0
    )
    torch.testing.assert_close(drawn.mean(-1), layer.mean(x), atol=0.02, rtol=0)


def test_penalty_is_the_energy_of_the_slope():
    layer, x = head(gamma=0.1), draw(8, 6)
    layer(x)
    z = GRID.clone().requires_grad_()
    slopes = [torch.autograd.grad(layer.pdf(row, z).sum(), z)[0] for row in x]
    energy = torch.stack([torch.trapezoid(s.square(), GRID) for s in slopes]).mean()
    torch.testing.assert_close(layer.aux_loss(), 0.4 * energy, rtol=1e-5, atol=0)
    assert copy.deepcopy(layer).aux_loss() == 0  # after a forward pass in training, too
    layer.eval()(x)
    assert layer.aux_loss() == 0
    raw = head(gamma=0.1, penalty="raw")
    raw(x)
    c = raw.coefficients(x, normalised=False).square().sum(-2)
    expected = 0.1 * 2 * (2 * math.pi**2 * torch.arange(10).square() * c).sum(-1).mean()
    torch.testing.assert_close(raw.aux_loss(), expected)


def test_maximum_likelihood_finds_a_continuous_law():
    generator = torch.Generator().manual_seed(0)
    z = (0.3 + 0.15 * torch.randn(2000, generator=generator)).clamp(-1, 1)
    layer = FourierHead(1, 20, 6)
    optimiser = torch.optim.Adam(layer.parameters(), 1e-2)
    for _ in range(150):
        optimiser.zero_grad()
        layer.nll(torch.ones(2000, 1), z).backward()
        optimiser.step()
    assert abs(layer.mean(torch.ones(1)).item() - 0.3) < 0.02
    entropy = math.log(0.15 * math.sqrt(2 * math.pi * math.e))
    assert abs(layer.nll(torch.ones(2000, 1), z).item() - entropy) < 0.05


def test_gradients():
    layer, x = head(12, 4), draw(3, 6).requires_grad_()
    assert torch.autograd.gradcheck(layer, x)
    z = torch.rand(3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: layer.nll(x, z), x)
    assert torch.autograd.gradcheck(lambda a: autocorrelation(a, "fft"), draw(2, 2, 5).requires_grad_())


def test_an_input_of_nothing_gets_equal_logits():
    layer = head()
    with torch.no_grad():
        layer.linear.bias.zero_()
    assert layer(torch.zeros(1, 6).double()).std() == 0


def test_the_other_heads():
    x = draw(5, 6)
    gmm = GMMHead(6, 50, 3).double()
    z = (gmm.centres - gmm.linear(x).tanh()[..., None]) / (0.04 + 1e-3)
    expected = torch.exp(-z.square() / 2).sum(-2)
    torch.testing.assert_close(gmm.pmf(x), expected / expected.sum(-1, keepdim=True), atol=5e-4, rtol=0)
    assert GMMHead(6, 50, 3, full=True).double()(x).shape == (5, 50)
    smoothed = LinearHead(6, 50, laplace=0.1).double()
    expected = (smoothed.linear(x).softmax(-1) + 0.1) / (1 + 50 * 0.1)
    torch.testing.assert_close(smoothed.pmf(x), expected)
    point = PointHead(6, 50).double()
    nearest = (point.centres - point.mean(x)[:, None]).abs().argmin(-1)
    assert torch.equal(point(x).argmax(-1), nearest)


@pytest.mark.parametrize("mix", [0.0, 0.5, 1.0])
def test_binning_there_and_back(mix):
    values = draw(1000).exp()
    binning = Binning(values, 20, mix)
    z = binning.z(values)
    torch.testing.assert_close(binning.values(z), values)
    assert torch.equal(binning.tokens(values), ((z + 1) / 2 * 20).floor().clamp(0, 19).long())
    counts = binning.tokens(values).bincount(minlength=20)
    if mix == 1:
        assert (counts - 50).abs().max() <= 1
    if mix == 0:
        torch.testing.assert_close(binning.edges.diff(), binning.edges.diff()[:1].expand(20))


@pytest.mark.parametrize("bins", [50, 51])
def test_smoothness_is_the_filtered_difference(bins):
    p = draw(2, bins).softmax(-1)
    for row, value in zip(p, smoothness(p), strict=True):
        expected = 0.0
        for s in range(1, 101):
            filtered = gaussian_filter1d(row.numpy(), s, mode="wrap", truncate=8)
            expected += 6 / (math.pi * s) ** 2 * (row - torch.from_numpy(filtered)).norm()
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    flat = torch.full((bins,), 1 / bins).double()
    assert smoothness(flat) < 1e-12


def test_bad_input():
    with pytest.warns(UserWarning, match=r"n_freq=25 is not below half of 50 bins"):
        FourierHead(6, 50, 25)
    with pytest.raises(PomonaError, match=r"^n_freq=-1 and gamma=0.0 must be 0 or more"):
        FourierHead(6, 50, -1)
    with pytest.raises(PomonaError, match=r"^FourierHead takes 6 features on axis -1"):
        head()(draw(3, 5))
    with pytest.raises(PomonaError, match=r"^values are all equal"):
        Binning(torch.ones(4), 3)
    with pytest.raises(PomonaError, match=r"^method='ftt' is not known; did you mean fft\?"):
        autocorrelation(draw(2, 3), "ftt")
