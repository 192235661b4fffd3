from itertools import pairwise

import pytest
import torch
from torch.autograd import gradcheck
from torch.func import functional_call, jacrev

from pomona.errors import PomonaError
from pomona.nn.activation import act
from pomona.nn.matrix_activation import BandTMAF, DiagTMAF, TridiagTMAF, from_activation

Y = 3 * torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def random_band(bandwidth: int, **options) -> BandTMAF:
    layer = BandTMAF(6, bandwidth, **options).double()
    torch.nn.init.normal_(layer.levels, generator=torch.Generator().manual_seed(1))
    return layer


def naive(layer: BandTMAF, y: torch.Tensor) -> torch.Tensor:
    """The defining sum, one number at a time."""
    out, (n, b) = torch.zeros_like(y), (layer.features, layer.bandwidth)
    for row, x in enumerate(y.tolist()):
        for i in range(n):
            for j in range(max(0, i - b), min(n, i + b + 1)):
                interval = sum(x[j] > s for s in layer.kinks)
                out[row, i] += layer.levels[i % len(layer.levels), j - i + b, interval] * x[j]
    return out


@pytest.mark.parametrize("bandwidth", [0, 1, 2, 7])
@pytest.mark.parametrize("shared", [False, True])
def test_equals_the_defining_sum_and_its_matrix(bandwidth, shared):
    layer = random_band(bandwidth, shared=shared)
    torch.testing.assert_close(layer(Y), naive(layer, Y))
    matrix = layer.matrix(Y)
    torch.testing.assert_close(torch.einsum("bij,bj->bi", matrix, Y), layer(Y))
    torch.testing.assert_close(jacrev(layer)(Y[0]), matrix[0])
    image = Y.view(5, 4, 6).movedim(-1, 1)
    layer.channel_dim = 1
    torch.testing.assert_close(layer(image), naive(layer, Y).view(5, 4, 6).movedim(-1, 1))


def test_default_init_is_relu_and_two_levels_around_0_are_leaky_relu():
    for make in (DiagTMAF, TridiagTMAF):
        assert torch.equal(make(6).double()(Y), Y.relu())
    leaky = DiagTMAF(6, knots=[0.0], init="leaky_relu").double()
    torch.testing.assert_close(leaky.levels[0, 0], torch.tensor([0.01, 1.0], dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(leaky(Y), torch.where(Y > 0, Y, leaky.levels[0, 0, 0] * Y))


def test_level_gradients_are_the_input_in_its_interval():
    layer = random_band(1)
    assert gradcheck(lambda t, y: functional_call(layer, {"levels": t}, (y,)), (layer.levels, Y[:4].requires_grad_()))
    diagonal = random_band(0)
    grads = torch.autograd.grad(diagonal(Y.detach()).sum(), diagonal.levels)[0]
    one_hot = grads.new_zeros(20, 6, 6).scatter_(2, torch.bucketize(Y.detach(), diagonal.knots)[..., None], 1)
    assert torch.equal(one_hot.sum(-1), torch.ones_like(Y))
    torch.testing.assert_close(grads[:, 0], (one_hot * Y.detach()[..., None]).sum(0))


def test_tridiagonal_with_zero_off_diagonals_equals_diagonal():
    diagonal, tridiagonal = random_band(0), random_band(1)
    with torch.no_grad():
        tridiagonal.levels.zero_()
        tridiagonal.levels[:, 1] = diagonal.levels[:, 0]
    torch.testing.assert_close(tridiagonal(Y), diagonal(Y))


@pytest.mark.parametrize("name", ["gelu", "tanh", "elu", "gcu"])
def test_from_activation_converges_as_knots_are_refined(name):
    x = torch.linspace(-3, 3, 2001, dtype=torch.float64)[:, None]
    errors = []
    for knots in (9, 17, 33, 65):
        layer = from_activation(name, torch.linspace(-3, 3, knots).tolist()).double().requires_grad_(False)
        errors.append(float((layer(x) - act(name)(x)).abs().max()))
    for coarse, fine in pairwise(errors):
        assert 1.5 < coarse / fine < 2.5


def test_levels_of_one_are_the_identity():
    torch.testing.assert_close(DiagTMAF(6, init="identity").double()(Y), Y)
    net = torch.nn.Sequential(torch.nn.Linear(6, 6), TridiagTMAF(6, init="identity"), torch.nn.Linear(6, 2)).double()
    a, b = Y[:2]
    torch.testing.assert_close(net(0.3 * a + 0.7 * b), 0.3 * net(a) + 0.7 * net(b))


def test_knots_are_trained_through_the_hat():
    layer = DiagTMAF(1, knots=[-1.0, 1.0], init="identity", ste=0.5).double()
    with torch.no_grad():
        layer.levels.copy_(torch.tensor([[[0.0, 1.0, 3.0]]]))
    y = torch.tensor([[0.75]], dtype=torch.float64)
    torch.testing.assert_close(layer(y), y)  # the surrogate adds nothing to the value
    slope = torch.autograd.grad(layer(y).sum(), layer.knots)[0]
    torch.testing.assert_close(slope, torch.tensor([0.0, -2 * 0.75 * 1.0], dtype=torch.float64))
    # over many inputs the surrogate is the slope of the smoothed sum: moving the knot up by e loses jump * y * e
    ys = torch.linspace(0, 2, 4001, dtype=torch.float64)[:, None]
    mean = torch.autograd.grad(layer(ys).mean() * 2, layer.knots)[0][1]
    torch.testing.assert_close(mean, torch.tensor(-2.0, dtype=torch.float64), rtol=1e-3, atol=0)
    with torch.no_grad():
        layer.knots.copy_(torch.tensor([2.0, -1.0]))
        layer.post_step()
    assert layer.knots.tolist() == [-1.0, 2.0]


def test_random_init_shared_functions_and_what_is_not_decayed():
    torch.manual_seed(0)
    layer = TridiagTMAF(6, init="random", shared=True)
    assert layer.levels.shape == (1, 3, 6)
    assert layer.levels[:, [0, 2]].eq(0).all()
    assert 0 < layer.levels[:, 1].abs().max() < 1
    assert layer.param_groups() == [{"params": [layer.levels], "weight_decay": 0.0}]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiagTMAF(4, knots=[1.0, 0.0]), r"knots=\[1.0, 0.0\] must be one or more increasing numbers"),
        (lambda: DiagTMAF(4, knots=0), "knots=0 must be one or more increasing numbers"),
        (lambda: BandTMAF(4, bandwidth=-1), "bandwidth=-1 and ste=0.0 must be 0 or more"),
        (lambda: DiagTMAF(4, init="sigmoid"), "is 0 at 0, and this function is not"),
        (lambda: DiagTMAF(4)(torch.zeros(2, 5)), "BandTMAF takes 4 features on axis -1; its input has shape"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(PomonaError, match=message):
        make()
