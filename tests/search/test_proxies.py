import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pomona.errors import PomonaError
from pomona.search.mini_nets import CELL, build_net
from pomona.search.proxies import (
    PROXIES,
    ProxyAssisted,
    grad_sign,
    grasp,
    jacob_cov,
    naswot,
    naswot_kernel,
    psi,
    snip,
    spectrum_score,
    synflow,
)
from pomona.search.strategies import RandomSearch


def problem(n=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 6, 6, generator=g), torch.randint(3, (n,), generator=g)


def cnn(bn=False, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        norm = [nn.BatchNorm2d(4)] if bn else []
        return nn.Sequential(nn.Conv2d(1, 4, 3), *norm, nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def sample_gradients(net, x, y):
    weights = [net[0].weight, net[-1].weight]
    return [
        torch.cat([g.flatten() for g in torch.autograd.grad(F.cross_entropy(net(x[i : i + 1]), y[i : i + 1]), weights)])
        for i in range(len(x))
    ]


def test_one_sample_scores_its_nonzero_gradient_entries():
    net, (x, y) = cnn(), problem(1)
    (g,) = sample_gradients(net, x, y)
    assert grad_sign(net, x, y) == g.count_nonzero() < g.numel()


def test_copies_multiply_the_score_and_opposite_gradients_cancel():
    net, (x, y) = cnn(), problem(1)
    assert grad_sign(net, x.repeat(5, 1, 1, 1), y.repeat(5), chunk_size=2) == 5 * grad_sign(net, x, y)
    linear = nn.Linear(3, 1, bias=False)
    pair = torch.stack([torch.ones(3), -torch.ones(3)])
    assert grad_sign(linear, pair, torch.zeros(2), loss_fn=lambda o, t: o.mean()) == 0


def test_scaling_the_loss_or_changing_its_sign_leaves_the_score():
    net, (x, y) = cnn(), problem()
    expected = grad_sign(net, x, y)
    for factor in (3.7, 0.01, -1.0):
        assert grad_sign(net, x, y, loss_fn=lambda o, t, c=factor: c * F.cross_entropy(o, t)) == expected


def test_vmap_equals_a_loop_over_samples():
    net, (x, y) = cnn(), problem()
    expected = float(torch.stack([g.sign() for g in sample_gradients(net, x, y)]).sum(0).abs().sum())
    assert grad_sign(net, x, y, chunk_size=3) == expected
    assert grad_sign(net, x, y, bn="batch") == expected
    mean = grad_sign(net, x, y, reduce="mean")
    assert mean == pytest.approx(expected / (8 * (36 + 192))) and 0 < mean <= 1


def test_naswot_kernel_diagonal_is_the_number_of_relu_units():
    net, (x, _) = cnn(), problem()
    kernel = naswot_kernel(net, x)
    assert (kernel.diag() == 4 * 4 * 4).all()
    codes = (net[0](x) > 0).flatten(1)
    assert kernel[0, 1] == (codes[0] == codes[1]).sum()


def test_naswot_sees_functional_activations_and_equal_inputs_are_singular():
    class Functional(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner[2:][1](self.inner[2](F.relu(self.inner[0](x))))

    net, (x, y) = cnn(), problem()
    torch.testing.assert_close(naswot_kernel(Functional(net), x), naswot_kernel(net, x))
    assert naswot(net, x, y) > naswot(net, x[:4], y[:4])
    assert naswot(net, x[:1].repeat(2, 1, 1, 1), y[:2]) == float("-inf")


@pytest.mark.parametrize("bn", ["frozen", "batch"])
def test_batchnorm_modes_equal_their_loops(bn):
    net, (x, y) = cnn(bn=True), problem()
    if bn == "frozen":
        reference = cnn(bn=True)
        reference[1].momentum = None
        reference.train()(x)
        gradients = sample_gradients(reference.eval(), x, y)
    else:
        out = net.train()(x)
        weights = [net[0].weight, net[-1].weight]
        gradients = [
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(
                        F.cross_entropy(out[i : i + 1], y[i : i + 1]), weights, retain_graph=True
                    )
                ]
            )
            for i in range(len(x))
        ]
    expected = float(torch.stack([g.sign() for g in gradients]).sum(0).abs().sum())
    # signs of entries at rounding error may differ
    assert grad_sign(cnn(bn=True), x, y, bn=bn) == pytest.approx(expected, rel=5e-3)


def test_repeats_average_over_new_initialisations_and_keep_the_global_generator():
    net, (x, y) = cnn(), problem()
    state = torch.random.get_rng_state()
    twice = grad_sign(net, x, y, repeats=2, seed=5)
    assert twice == grad_sign(net, x, y, repeats=2, seed=5) != grad_sign(net, x, y)
    constant = grad_sign(net, x, y, repeats=3, init_fn=lambda n: n.load_state_dict(net.state_dict()))
    assert constant == pytest.approx(grad_sign(net, x, y))
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("name", PROXIES)
def test_every_proxy_gives_a_finite_number_and_leaves_the_network_alone(name):
    net, (x, y) = cnn(bn=True).train(), problem()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    value = PROXIES[name](net, x, y)
    assert isinstance(value, float) and value == value and abs(value) != float("inf")
    assert value == PROXIES[name](net, x, y)
    assert net.training and all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("name", PROXIES)
def test_a_cell_without_a_path_scores_no_better_than_one_of_convolutions(name):
    x, y = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8)
    dead, alive = (
        PROXIES[name](build_net("mini-cell", dict.fromkeys(CELL, op), seed=0), x, y) for op in ("none", "conv3")
    )
    assert dead == dead
    if name != "grasp":  # of either sign
        assert dead < alive


def test_snip_and_grasp_equal_autograd():
    net, (x, y) = cnn(), problem()
    weights = [net[0].weight, net[-1].weight]
    g = torch.autograd.grad(F.cross_entropy(net(x), y), weights, create_graph=True)
    assert snip(net, x, y) == pytest.approx(
        float(sum((w * d).abs().sum() for w, d in zip(weights, g, strict=True)).detach())
    )
    hg = torch.autograd.grad(sum((d * d.detach()).sum() for d in g), weights)
    assert grasp(net, x, y) == pytest.approx(
        -float(sum((w * h).sum() for w, h in zip(weights, hg, strict=True)).detach()), rel=1e-4
    )


def test_synflow_of_a_bias_free_chain_is_layers_times_the_sum_of_path_products():
    net = nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False))
    paths = (net[2].weight.abs().double() @ net[0].weight.abs().double()).sum()
    assert synflow(net, torch.randn(2, 4), torch.zeros(2)) == pytest.approx(2 * float(paths.detach()))


def test_spectrum_score_is_largest_for_orthogonal_rows_and_punishes_equal_ones():
    k, n = 1e-5, 4
    rows = torch.linalg.qr(torch.randn(9, n + 1).double()).Q.mT
    rows = torch.linalg.qr((rows[:n] - rows[:n].mean(1, keepdim=True)).mT).Q.mT
    best = -n * (torch.log(torch.tensor(1 + k)) + 1 / (1 + k))
    assert spectrum_score(rows) == pytest.approx(float(best), rel=1e-6)
    assert spectrum_score(torch.cat([rows, rows[:1]])) < -0.9 / k
    assert spectrum_score(torch.ones(3, 5)) < -2.9 / k


def test_jacob_cov_of_a_linear_network_is_the_worst():
    x, y = problem()
    assert jacob_cov(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), x, y) < -6.9e5 < jacob_cov(cnn(), x, y)


def test_psi_equals_the_double_sum_and_bounds_the_loss_at_the_joint_optimum():
    g = torch.Generator().manual_seed(0)
    n, p, h = 6, 3, 2.0
    optima = torch.randn(n, p, generator=g, dtype=torch.float64)
    value = psi(optima, h)
    assert value == pytest.approx(h**0.5 / n**2 * float(torch.cdist(optima, optima, p=1).sum()))
    curvature = h * torch.rand(n, p, generator=g, dtype=torch.float64)  # least squares with optima theta_i*
    joint = (curvature * optima).sum(0) / curvature.sum(0)
    loss = (curvature * (joint - optima).square()).sum() / (2 * n)
    assert 0 < loss <= n**3 / 2 * value**2
    assert psi(optima[:1], h) == 0


def test_proxy_assisted_asks_for_the_best_of_a_pool():
    told = []

    class Source(RandomSearch):
        def tell(self, arch, score):
            told.append((arch["a"], score))

    strategy = ProxyAssisted(Source({"a": tuple(range(1000))}, seed=0), lambda arch: arch["a"], pool=10)
    reference = RandomSearch({"a": tuple(range(1000))}, seed=0)
    arch = strategy.ask()
    assert arch["a"] == max(reference.ask()["a"] for _ in range(10))
    strategy.tell(arch, 0.5)
    assert told == [(arch["a"], 0.5)]


def test_bad_input_messages():
    x, y = problem()
    with pytest.raises(PomonaError, match="bn='freeze' is not known"):
        grad_sign(cnn(), x, y, bn="freeze")
    with pytest.raises(PomonaError, match="no convolution or linear layer; use params='all'"):
        snip(nn.Sequential(nn.Flatten(), nn.LayerNorm(36)), x, y)
    with pytest.raises(PomonaError, match="calls no activation function"):
        naswot_kernel(nn.Flatten(), x)
