import math

import pytest
import torch

from pomona.errors import PomonaError
from pomona.measure.neural_collapse import simplex_etf
from pomona.theory.nc_deep_linear import DeepLinearUFM, nc_deep_linear, shrink


def fitted(counts, dims, lams, seed=0, **kw):
    net = DeepLinearUFM(counts, dims, lams, generator=torch.Generator().manual_seed(seed), **kw)
    return net, net.fit()


def class_means(net):
    k = len(net.weights[-1])
    return torch.stack([net.features[:, net.labels == c].mean(1) for c in range(k)]).detach()


def test_the_checked_values_of_one_layer():
    solution = nc_deep_linear((30, 10, 4), 8e-3, 1)
    torch.testing.assert_close(solution.sigma, torch.tensor([5.1252, 2.8103, 1.6480]).double(), atol=5e-5, rtol=0)
    assert solution.loss == pytest.approx(0.080892, abs=5e-7)


@pytest.mark.parametrize(
    "counts, dims, lams, kw",
    [
        ((30, 10, 4), (5,), 8e-3, {}),
        ((30, 10, 4), (6,), (2e-3, 9e-3), {}),
        ((20, 12, 6), (5, 4), (3e-3, 1e-3, 2e-3), {}),
        ((20, 20, 20), (5, 5, 4), 5e-4, {}),
        ((12, 12, 12), (5, 4), 2e-3, {"bias": True}),
        ((20, 12, 4), (5,), 4e-3, {"bias": True}),
        ((10, 10, 10, 10), (6,), 5e-3, {"loss": "ce", "bias": True}),
        ((10, 10, 10), (5, 4), 2e-3, {"loss": "ce"}),
        ((30, 10, 4), (2,), 8e-3, {}),
    ],
)
def test_lbfgs_from_random_init_reaches_the_predicted_loss_and_singular_values(counts, dims, lams, kw):
    net, loss = fitted(counts, dims, lams, **kw)
    solution = nc_deep_linear(counts, lams, len(dims), width=min(dims), **kw)
    assert loss == pytest.approx(solution.loss, abs=1e-8)
    expected = solution.sigma.sort(descending=True).values
    torch.testing.assert_close(net.singular_values(), expected, atol=1e-4, rtol=0)
    weight = net.classifier().detach()
    torch.testing.assert_close(weight @ weight.mT, solution.W_gram, atol=1e-3, rtol=1e-3)
    means = class_means(net)
    torch.testing.assert_close(means @ means.mT, solution.H_gram, atol=1e-3, rtol=1e-3)


def test_one_layer_class_vanishes_exactly_at_its_threshold():
    solution = nc_deep_linear((40, 10, 2), 3e-2, 1)
    torch.testing.assert_close(solution.sigma, torch.tensor([4.7646, 1.6023, 0.0]).double(), atol=5e-5, rtol=0)
    assert solution.collapsed.tolist() == [False, False, True]
    n, total = 4, 24
    for factor, gone in ((1 - 1e-9, False), (1 + 1e-9, True)):
        lam = math.sqrt(n * factor) / total  # n_k = N^2 lam_W lam_H at factor 1
        assert bool(nc_deep_linear((20, n), lam, 1).collapsed[1]) is gone


def test_deeper_threshold_is_a_jump():
    low, high = 1e-4, 1.0
    for _ in range(80):  # bisect the decay at which the class disappears
        middle = (low * high) ** 0.5
        low, high = (middle, high) if shrink(3.0, 20, middle, 2)[0] > 0 else (low, middle)
    assert shrink(3.0, 20, low, 2)[0] > 1.0
    assert shrink(3.0, 20, high, 2)[0] == 0
    assert shrink(3.0, 20, low, 2)[1] == pytest.approx(9 / 40, rel=1e-6)


def test_simplex_etf_has_cosine_minus_one_over_k_minus_one_and_rank_k_minus_one():
    for k in (2, 3, 7):
        frame = simplex_etf(k, k + 2, generator=torch.Generator().manual_seed(k))
        gram = frame @ frame.mT
        expected = torch.full((k, k), -1 / (k - 1), dtype=torch.float64).fill_diagonal_(1)
        torch.testing.assert_close(gram, expected)
        assert torch.linalg.matrix_rank(gram) == k - 1


def test_balanced_three_layers_have_three_equal_singular_values():
    solution = nc_deep_linear((20, 20, 20), 5e-4, 3)
    torch.testing.assert_close(solution.sigma, torch.full((3,), 4.45793).double(), atol=5e-6, rtol=0)


def test_balance_law_at_a_stationary_point():
    net, _ = fitted((15, 9, 5), (6, 5), (4e-3, 1e-3, 2e-3), seed=3)
    torch.testing.assert_close(net.balance(), net.balance()[:1].expand(3), rtol=1e-6, atol=1e-8)
    assert net.balance().min() > 1e-3


def test_one_layer_lengths_follow_the_closed_form():
    counts, lam_w, lam_h = (30, 10, 4), 2e-3, 9e-3
    solution = nc_deep_linear(counts, (lam_w, lam_h), 1)
    n = torch.tensor(counts).double()
    torch.testing.assert_close(solution.W_gram.diag(), solution.sigma * math.sqrt(lam_h / lam_w))
    torch.testing.assert_close(solution.H_gram.diag(), solution.sigma * math.sqrt(lam_w / lam_h) / n)
    assert solution.H_gram.triu(1).count_nonzero() == 0


def test_free_bias_and_cross_entropy_give_a_simplex_etf():
    for kw in ({"bias": True}, {"loss": "ce"}):
        solution = nc_deep_linear((20,) * 4, 1e-3, 2, **kw)
        for gram in (solution.W_gram, solution.H_gram):
            etf = simplex_etf(4)
            torch.testing.assert_close(gram / gram[0, 0], etf @ etf.mT, atol=1e-9, rtol=0)


def test_narrow_width_keeps_the_largest_classes():
    wide, narrow = nc_deep_linear((30, 10, 4), 8e-3, 1), nc_deep_linear((30, 10, 4), 8e-3, 1, width=2)
    torch.testing.assert_close(narrow.sigma[:2], wide.sigma[:2])
    assert narrow.sigma[2] == 0 and narrow.loss > wide.loss and narrow.unique
    assert not nc_deep_linear((10, 10, 10), 1e-3, 1, width=2).unique


def test_objective_gradient():
    net = DeepLinearUFM((3, 2), (3, 2), 1e-2, bias=True, generator=torch.Generator().manual_seed(0))
    names = [name for name, _ in net.named_parameters()]

    def objective(*parts):
        return torch.func.functional_call(
            Objective(net), dict(zip([f"net.{n}" for n in names], parts, strict=True)), ()
        )

    assert torch.autograd.gradcheck(objective, [p.detach().requires_grad_() for p in net.parameters()])


class Objective(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self):
        return self.net.objective()


def test_bad_input_messages():
    with pytest.raises(PomonaError, match=r"counts=\(3, 2\) must be equal for loss='ce'"):
        nc_deep_linear((3, 2), 1e-2, 1, loss="ce")
    with pytest.raises(PomonaError, match=r"M\+1=3 of them"):
        nc_deep_linear((3, 2), (1e-2, 1e-2), 2)
    with pytest.raises(PomonaError, match="loss='mce' is not known"):
        DeepLinearUFM((3, 2), (4,), 1e-2, loss="mce")
