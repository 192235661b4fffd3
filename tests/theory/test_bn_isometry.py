import math

import numpy as np
import pytest
import torch

from pomona.errors import PomonaError
from pomona.nets.iso_mlp import IsoMLP
from pomona.theory.bn_isometry import (
    compare_depths,
    expected_gap,
    gaps,
    gradient_bound,
    gradient_growth,
    isometry_gap,
    jacobian_log_norm,
    layer_gradients,
    ortho_gap,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def linear_net(width, depth, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return IsoMLP(width, width, depth, 3, act="id", **options, generator=generator).double()


def test_gap_is_zero_for_orthogonal_rows_and_keeps_under_scale_and_rotation():
    x, q = draw(5, 8), torch.linalg.qr(draw(8, 8, seed=1)).Q
    gap = isometry_gap(x)
    gram = x @ x.T
    torch.testing.assert_close(gap, (gram.trace() / 5).log() - torch.logdet(gram) / 5)
    assert gap > 0 and ortho_gap(x) > 0
    for same in (3 * x, x @ q):
        torch.testing.assert_close(isometry_gap(same), gap)
        torch.testing.assert_close(ortho_gap(same), ortho_gap(x))
    for zero in (isometry_gap(7 * q), isometry_gap(q[:5]), ortho_gap(7 * q)):
        torch.testing.assert_close(zero, torch.zeros(()).double(), atol=1e-12, rtol=0)
    assert isometry_gap(draw(9, 8)) == torch.inf and isometry_gap(draw(4, 5, 8)).shape == (4,)


def test_orthogonal_input_has_gap_zero_at_all_depths():
    q = torch.linalg.qr(draw(16, 16)).Q
    net = linear_net(16, 30)
    outputs = net.hidden(q)
    torch.testing.assert_close(net.norms[0](q), 4 * q)  # scaled to mean square one, else unchanged
    torch.testing.assert_close(gaps(net, q), torch.zeros(31).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(outputs[-1] @ outputs[-1].T, 16 * torch.eye(16).double(), atol=1e-4, rtol=0)


def test_gap_does_not_increase_in_the_mean_over_layers():
    x = draw(8, 8)
    paths = torch.stack([gaps(linear_net(8, 40, seed), x) for seed in range(50)])
    mean, error = paths.mean(0), paths.diff(dim=1).std(0) / 50**0.5
    assert (mean.diff() <= 2 * error).all()
    assert mean[-1] < mean[0] / 10
    predicted = expected_gap(float(mean[0]), 8, range(41))
    assert (mean.numpy() <= predicted + 1e-9).all()


def test_gradients_of_the_linear_net_stay_bounded_and_the_others_explode():
    configs = {
        "linear": {"act": "id"},
        "sin": {"act": "sin", "gain_exponent": 0.0},
        "shaped": {"act": "sin", "gain_exponent": -0.5},
    }
    table = compare_depths(configs, (20, 60), width=16)
    assert abs(table["linear"]["growth"]) < 0.02 and abs(table["shaped"]["growth"]) < 0.02
    assert table["sin"]["growth"] > 0.05
    assert table["linear"]["gaps"][1] < table["linear"]["gaps"][0]
    x, y = draw(16, 16), torch.arange(16) % 3
    largest = layer_gradients(linear_net(16, 60), x, y).log().max()
    assert largest <= gradient_bound(float(isometry_gap(x)), 16)


def test_gradient_norms_and_jacobian_by_hand():
    net, x, y = linear_net(6, 1), draw(6, 6), torch.arange(6) % 3
    torch.nn.functional.cross_entropy(net(x), y).backward()
    torch.testing.assert_close(layer_gradients(net, x, y)[0], net.weights[0].grad.norm())
    jacobian = torch.autograd.functional.jacobian(lambda z: net.hidden(z)[-1], x)
    estimate = jacobian_log_norm(net, x, 3000, torch.Generator().manual_seed(0))
    assert abs(estimate - math.log(jacobian.norm())) < 0.02
    assert abs(gradient_growth([1, 2, 3], np.exp([0.5, 1.0, 1.5])) - 0.5) < 1e-12
    assert gradient_growth([1, 2], [1.0, math.inf]) == math.inf


def test_bad_input():
    with pytest.warns(UserWarning, match=r"the 10 examples span 8 dimensions"):
        layer_gradients(linear_net(8, 2), draw(10, 8), torch.arange(10) % 3)
    with pytest.raises(PomonaError, match=r"^depths has 1 and norms 1 entries; give two or more"):
        gradient_growth([1], [1.0])
