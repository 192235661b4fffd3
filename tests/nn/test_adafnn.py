import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from pomona.data.functional import FDATask, phi
from pomona.errors import PomonaError
from pomona.nn.adafnn import (
    AdaFNN,
    BasisLayer,
    FunctionalNet,
    GridBasis,
    MicroMLPs,
    SplineBasis,
    fpca,
    trapezoid_weights,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def times(count, seed=0):
    inner = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).sort().values
    return torch.cat([torch.zeros(1), inner, torch.ones(1)])


class Fixed(nn.Module):
    """Given functions as a basis."""

    def __init__(self, functions, n_basis):
        super().__init__()
        self.functions, self.n_basis = functions, n_basis

    def forward(self, t):
        return self.functions(t)


def layer(**options):
    torch.manual_seed(0)
    return BasisLayer(3, 21, (8, 8), **options).double()


def test_constant_function_and_basis_have_score_one_on_any_grid():
    for seed in range(5):
        fixed = BasisLayer(grid=times(20, seed), micro=Fixed(lambda t: torch.ones_like(t)[None], 1)).double()
        torch.testing.assert_close(fixed(torch.ones(1, 22).double()), torch.ones(1, 1).double())


@pytest.mark.parametrize("points", [51, 200])
def test_frozen_true_functions_give_the_coefficients(points):
    task = FDATask(1, points, sizes=(100, 10, 10))
    x, scale = task.splits["train"].x.double(), task.extra["coefficients"][:100] @ phi(task.extra["grid"])
    frozen = BasisLayer(grid=points, micro=Fixed(phi, 50)).double()
    frozen.weights = trapezoid_weights(task.extra["grid"])
    torch.testing.assert_close(frozen(x * scale.std()), task.extra["coefficients"][:100], atol=1e-3, rtol=0)


def test_orthogonal_functions_are_not_punished_and_sparsity_is_bounded():
    frozen = BasisLayer(grid=51, micro=Fixed(phi, 50)).double()
    frozen.grid = torch.linspace(0, 1, 51, dtype=torch.float64)
    sparse, similar = frozen.penalties()
    assert similar < 1e-6
    for seed in range(5):
        torch.manual_seed(seed)
        sparse, similar = BasisLayer(4, times(30, seed)).double().penalties()
        assert 0 < sparse <= 1 and 0 <= similar <= 1


def test_scores_change_with_the_square_of_the_step_when_points_are_inserted():
    torch.manual_seed(0)
    micro = MicroMLPs(3, (8, 8), dropout=0.0).double()
    changes = []
    for points in (26, 51, 101):
        t = torch.linspace(0, 1, points, dtype=torch.float64)
        x = torch.sin(5 * t)[None]
        middle = (t[1:] + t[:-1]) / 2, (x[:, 1:] + x[:, :-1]) / 2
        finer, order = torch.cat([t, middle[0]]).sort()
        coarse = BasisLayer(grid=points, micro=micro).double()
        changes.append((coarse(x, t) - coarse(torch.cat([x, middle[1]], 1)[:, order], finer)).abs().max())
    assert 3 < changes[0] / changes[1] < 5 and 3 < changes[1] / changes[2] < 5


def test_stacked_functions_are_small_networks_of_their_own():
    torch.manual_seed(0)
    micro, t = MicroMLPs(3, (5, 4), dropout=0.0).double(), times(9)
    for i, values in enumerate(micro(t)):
        h = t[:, None]
        for k in range(3):
            h = h @ micro.weights[k][i] + micro.biases[k][i]
            if k < 2:
                h = h + nn.functional.layer_norm(h, h.shape[-1:]) * micro.gains[k][i] + micro.shifts[k][i]
                h = nn.functional.selu(h)
        torch.testing.assert_close(values, h[:, 0], atol=1e-10, rtol=1e-6)
    assert len(MicroMLPs(3, (5, 4), norm=False).gains) == 0


def test_times_of_each_curve_and_masks():
    net = layer(dropout=0.0)
    x = draw(4, 12)
    grids = torch.stack([times(10, seed) for seed in range(4)])
    together = net(x, grids)
    torch.testing.assert_close(together, torch.stack([net(row, t) for row, t in zip(x, grids, strict=True)]))
    seen = torch.rand(4, 12, generator=torch.Generator().manual_seed(0)) < 0.7
    alone = [net(row[m], t[m]) for row, t, m in zip(x, grids, seen, strict=True)]
    torch.testing.assert_close(net(torch.where(seen, x, torch.nan), grids, seen), torch.stack(alone))
    assert torch.equal(net(draw(4, 21), mask=torch.zeros(4, 21, dtype=torch.bool)), torch.zeros(4, 3).double())


def test_channels_have_functions_of_their_own():
    net, x = layer(channels=2, dropout=0.0), draw(5, 2, 21)
    scores = torch.einsum("bcj,ckj->bck", x * net.weights, net.bases()).flatten(1)
    torch.testing.assert_close(net(x), scores)
    assert net.bases().shape == (2, 3, 21)
    shared = BasisLayer(grid=21, micro=SplineBasis(6), channels=2).double()
    assert shared(x).shape == (5, 12)


def test_normalised_functions_have_length_one():
    net = layer(normalise="forward", dropout=0.0)
    torch.testing.assert_close(net.bases().square() @ net.weights, torch.ones(1, 3).double())
    at_other_times = net.bases(times(7))
    ratio = at_other_times / net._values(times(7))
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio))
    # a penalty on normalised functions does not care for their lengths
    penal = layer(lambda1=1.0, lambda2=1.0, normalise="forward", dropout=0.0)
    penal.aux_loss().backward()
    last = penal.micro.weights[-1]
    bias = penal.micro.biases[-1]
    along = (last * last.grad).sum((1, 2)) + (bias * bias.grad).sum((1, 2))
    torch.testing.assert_close(along, torch.zeros(3).double(), atol=1e-12, rtol=0)


def test_penalties_of_a_sample_of_functions():
    net = layer(lambda1=1.0, lambda2=1.0, sample=1, dropout=0.0)
    full = layer(lambda1=1.0, lambda2=1.0, dropout=0.0)
    torch.manual_seed(0)
    drawn = torch.stack([torch.stack(net.penalties()) for _ in range(200)]).mean(0)
    torch.testing.assert_close(drawn, torch.stack(full.penalties()), rtol=0.1, atol=0)
    assert BasisLayer(1, 21).penalties()[1] == 0


def test_principal_functions_are_orthonormal_and_ordered():
    task = FDATask(1, 51, sizes=(300, 10, 10))
    x = task.splits["train"].x.double()
    basis = fpca(x, 51, share=0.95)
    w = trapezoid_weights(torch.linspace(0, 1, 51).double())
    gram = (basis.values * w) @ basis.values.T
    torch.testing.assert_close(gram, torch.eye(basis.n_basis).double(), atol=1e-6, rtol=0)
    scores = BasisLayer(grid=51, micro=basis).double()(x)
    variances = scores.var(0)
    assert (variances.diff() < 0).all() and variances.sum() / ((x - x.mean(0)).square() @ w).mean() > 0.95
    assert (basis.values[0] @ (w * phi(basis.grid)[0])).abs() > 0.99
    assert fpca(x, 51, n_basis=4).n_basis == 4


def test_fixed_bases_and_the_linear_model():
    t = times(30)
    splines = SplineBasis(9).double()
    torch.testing.assert_close(splines(t).sum(0), torch.ones(32).double())
    grid = torch.linspace(0, 1, 11, dtype=torch.float64)
    line = GridBasis(grid, grid[None])
    torch.testing.assert_close(line(t), t[None])
    linear = FunctionalNet(BasisLayer(grid=21, micro=splines), (), out=2).double()
    x = draw(7, 21)
    torch.testing.assert_close(linear(2 * x) - linear(x), linear(x) - linear(0 * x))
    scaled = linear.scale_(x)
    torch.testing.assert_close((scaled.basis(x) / scaled.spread).std(0), torch.ones(9).double())


def test_contract():
    net = AdaFNN(3, 21, (8, 8), (16,), out=2).eval()
    assert net(torch.randn(0, 21)).shape == (0, 2) and net(torch.randn(2, 5, 21)).shape == (2, 5, 2)
    half = copy.deepcopy(net).bfloat16()(torch.randn(4, 21).bfloat16())
    assert half.dtype == torch.bfloat16 and half.isfinite().all()
    nets = [AdaFNN(3, 21, (8, 8), (16,)).eval() for _ in range(3)]
    x = torch.randn(4, 21)
    together = vmap(lambda p, b: functional_call(nets[0], (p, b), (x,)))(*stack_module_state(nets))
    torch.testing.assert_close(together, torch.stack([net(x) for net in nets]))
    one, other = (MicroMLPs(3, (4,), generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one.eval()(x), other.eval()(x))


def test_gradients():
    net = layer(dropout=0.0, lambda1=0.5, lambda2=0.5, normalise="forward")
    parameters = dict(net.named_parameters())

    def run(x, *values):
        given = dict(zip(parameters, values, strict=True))
        return functional_call(net, given, (x,))

    assert torch.autograd.gradcheck(run, (draw(2, 21).requires_grad_(), *parameters.values()), fast_mode=True)


def test_bad_input():
    with pytest.raises(PomonaError, match=r"^grid must be two or more increasing times in \[0, 1\]"):
        BasisLayer(grid=[0.0, 0.5, 0.5])
    with pytest.raises(PomonaError, match=r"^BasisLayer takes 51 features on axis -1"):
        BasisLayer()(torch.ones(2, 50))
    with pytest.raises(PomonaError, match=r"^BasisLayer takes channels=2 on axis -2"):
        BasisLayer(channels=2)(torch.ones(3, 51))
    with pytest.raises(PomonaError, match=r"^n_basis=3 must be above the order k=3"):
        SplineBasis(3)
    with pytest.raises(PomonaError, match=r"^normalise='forwards' is not known; did you mean forward"):
        BasisLayer(normalise="forwards")
