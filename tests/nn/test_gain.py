import math

import pytest
import torch
from torch import nn

from pomona.errors import PomonaError
from pomona.nn.activation import act
from pomona.nn.gain import (
    derivative_second_moment,
    gain,
    gauss_hermite,
    gaussian_rule,
    second_moment,
)


def test_gauss_hermite_integrates_polynomials_exactly():
    z, weights = gauss_hermite(64)
    moments = [float((weights * z**k).sum()) for k in range(9)]
    assert moments == pytest.approx([1, 0, 1, 0, 3, 0, 15, 0, 105], abs=1e-10)


def test_kinked_rule_integrates_polynomials_exactly():
    z, weights = gaussian_rule(64, (-3.0, 0.4))
    assert [float((weights * z**k).sum()) for k in range(5)] == pytest.approx([1, 0, 1, 0, 3], abs=1e-12)


def test_relu_second_moment_is_half():
    assert second_moment(torch.relu) == pytest.approx(0.5, abs=1e-12)
    assert second_moment(nn.ReLU()) == pytest.approx(0.5, abs=1e-12)
    assert derivative_second_moment(nn.ReLU()) == pytest.approx(0.5, abs=1e-12)


def test_gelu_second_moment_is_about_0_4252():
    assert second_moment(act("gelu")) == pytest.approx(0.4252, abs=5e-5)


def test_leaky_gain_is_the_papers_formula():
    for a in (0.0, 0.01, 0.25, 1.0):
        assert gain(nn.LeakyReLU(a)) == pytest.approx(math.sqrt(2 / (1 + a * a)), abs=1e-9)


def test_hardswish_agrees_with_a_fine_sum():
    z = torch.linspace(-12, 12, 2_400_001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi) * 1e-5
    exact = float((nn.functional.hardswish(z).square() * density).sum())
    assert second_moment(nn.Hardswish()) == pytest.approx(exact, abs=1e-9)


def test_fast_oscillation_gets_more_points():
    assert second_moment(act("sine", w0=15.0)) == pytest.approx(0.5 * (1 - math.exp(-2 * 225)), abs=1e-6)


def test_selu_keeps_unit_second_moment():
    assert second_moment(nn.SELU()) == pytest.approx(1.0, abs=1e-6)


def test_scale_enters_before_the_function():
    assert second_moment(nn.ReLU(), scale=3.0) == pytest.approx(4.5, abs=1e-9)


def test_width_changing_activations_see_independent_inputs():
    # E[u^2] E[g(v)^2] = E[g(v)^2]; for the larger of two normals the second moment is that of one
    assert second_moment(act("geglu")) == pytest.approx(second_moment(act("gelu")), abs=1e-9)
    assert second_moment(act("maxout")) == pytest.approx(1.0, abs=1e-9)
    assert second_moment(act("crelu")) == pytest.approx(0.5, abs=1e-12)
    assert derivative_second_moment(act("maxout")) == pytest.approx(1.0, abs=1e-9)


def test_channelwise_slopes_are_averaged():
    module = act("prelu", features=2)
    with torch.no_grad():
        module.slope.copy_(torch.tensor([0.0, 1.0]))
    assert second_moment(module) == pytest.approx(0.75, abs=1e-9)


def test_bad_input():
    with pytest.raises(PomonaError, match="points=0 must be at least 1"):
        gauss_hermite(0)
    with pytest.raises(PomonaError, match="a gain needs a number above 0"):
        gain(torch.zeros_like)
    with pytest.raises(PomonaError, match="scale=0 must be a number above 0"):
        second_moment(torch.relu, scale=0)
