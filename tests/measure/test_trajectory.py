import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pomona.errors import PomonaError
from pomona.measure.linear_path import Evaluator, default_alphas, linear_path
from pomona.measure.trajectory import (
    DeepLinearToy,
    StoreCheckpoints,
    gradient_alignment,
    residual_plane,
    residual_walk,
    trajectory_view,
)


@pytest.fixture(scope="module")
def trained():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(80, 4, generator=g).double(), torch.randint(3, (80,), generator=g)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    store = StoreCheckpoints()
    store(net, 0)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    for step in range(1, 41):
        optimiser.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimiser.step()
        store(net, step)
    return net, store, Evaluator(net, (x, y))


def flat(theta):
    return torch.cat([v.flatten() for v in theta.values()])


def test_callback_keeps_first_and_last_weights(trained):
    net, store, _ = trained
    assert store.steps[0] == 0 and store.steps[-1] == 40 and len(store.steps) < 15
    torch.testing.assert_close(flat(store.checkpoints[-1]), flat(net.state_dict()))
    every = StoreCheckpoints(ratio=1)
    for step in range(4):
        every(net, step)
    assert every.steps == [0, 1, 2, 3]


def test_trajectory_starts_at_origin_ends_at_one_zero_and_obeys_pythagoras(trained):
    _, store, evaluate = trained
    view = trajectory_view(store.checkpoints, evaluate)
    assert view.along[0] == 0 == view.residual[0]
    assert view.along[-1] == pytest.approx(1) and view.residual[-1] == pytest.approx(0, abs=1e-12)
    offsets = torch.stack([flat(theta) - flat(store.checkpoints[0]) for theta in store.checkpoints])
    torch.testing.assert_close(view.length**2 * (view.along**2 + view.residual**2), offsets.square().sum(1))
    assert view.residual[1:-1].min() > 0
    assert view.loss[-1] < view.loss[0] and len(view.best_alpha) == len(store.steps)
    assert view.figure().data[0].type == "scatter3d"


def test_residual_walk_passes_through_the_checkpoint(trained):
    _, store, evaluate = trained
    view = trajectory_view(store.checkpoints)
    t = 4
    walk = residual_walk(evaluate, store.checkpoints, alphas=view.along[t : t + 1])
    torch.testing.assert_close(walk[t], evaluate([store.checkpoints[t]])[0])
    line = linear_path(evaluate.net, store.checkpoints[0], store.checkpoints[-1], evaluate.batches[0])
    torch.testing.assert_close(residual_walk(evaluate, store.checkpoints)[0], line.loss)
    plane = residual_plane(evaluate, store.checkpoints, t, betas=torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(plane[0], line.loss)
    torch.testing.assert_close(plane[1], residual_walk(evaluate, store.checkpoints)[t])


def test_gradient_alignment_is_one_on_an_isotropic_quadratic():
    net = nn.Linear(3, 1, bias=False).double()
    x, y = torch.eye(3).double(), torch.tensor([[1.0], [2.0], [3.0]]).double()
    evaluate = Evaluator(net, (x, y), loss_fn=F.mse_loss)
    ends = [{"weight": torch.zeros(1, 3).double()}, {"weight": y.mT}]
    torch.testing.assert_close(gradient_alignment(evaluate, ends), torch.ones(1).double())


def test_scalar_product_has_the_closed_form_loss():
    toy, a, b, y = DeepLinearToy(2, 3.0), 0.2, 1.5, 3.0
    t = default_alphas()
    full = lambda v: torch.full((2, 1, 1), v, dtype=torch.float64)  # noqa: E731
    torch.testing.assert_close(toy.path(full(a), full(b), t), (y - ((1 - t) * a + t * b) ** 2) ** 2 / 2)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_matrix_product_path_equals_direct_evaluation(depth):
    g = torch.Generator().manual_seed(depth)
    toy = DeepLinearToy(depth, torch.randn(3, 3, generator=g), std=1.0, generator=g)
    a, b = torch.randn(2, depth, 3, 3, generator=g, dtype=torch.float64)
    direct = []
    for t in default_alphas():
        with torch.no_grad():
            toy.weight.copy_(torch.lerp(a, b, t))
        direct.append(toy().detach())
    torch.testing.assert_close(toy.path(a, b, default_alphas()), torch.stack(direct))


def test_origin_is_a_saddle_of_the_product_and_gradients_are_right():
    toy = DeepLinearToy(2, 1.0)
    weight = torch.zeros(2, 1, 1, dtype=torch.float64, requires_grad=True)
    call = lambda w: torch.func.functional_call(toy, {"weight": w}, ())  # noqa: E731
    assert torch.autograd.grad(call(weight), weight)[0].abs().max() == 0
    values = torch.linalg.eigvalsh(torch.func.hessian(call)(weight).reshape(2, 2))
    assert values[0] < 0 < values[1]
    assert torch.autograd.gradcheck(call, torch.randn(2, 1, 1).double().requires_grad_())


def test_bad_input_messages():
    theta = {"w": torch.zeros(2)}
    with pytest.raises(PomonaError, match="begin and end at the same weights"):
        trajectory_view([theta, theta])
    with pytest.raises(PomonaError, match="has 1 entries"):
        trajectory_view([theta])
    with pytest.raises(PomonaError, match="ratio=0.5 must be at least 1"):
        StoreCheckpoints(0.5)
