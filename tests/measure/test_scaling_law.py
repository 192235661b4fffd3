import numpy as np
import pytest
import torch
from torch import nn

from pomona.data.task import tensors
from pomona.errors import PomonaError
from pomona.measure.scaling_law import (
    double_descent,
    frontier,
    optimal_allocation,
    scaling_law,
    train_compute,
    transfer,
)
from pomona.nets import Inputs, Outputs
from pomona.nets.scaling_mlp import InvertedBottleneckMLP
from pomona.train import Budget, Training

C = np.logspace(9, 14, 25)


@pytest.mark.parametrize(("a", "b", "alpha", "e_inf"), [(300, 0, 0.25, 0), (900, 3e10, 0.3, 0.05), (1e5, 0, 0.6, 0.1)])
def test_the_law_recovers_its_exponent(a, b, alpha, e_inf):
    noise = np.random.default_rng(0).normal(0, 1e-3, len(C))
    law = scaling_law(C, (a * (b + C) ** -alpha + e_inf) * np.exp(noise), bootstrap=20)
    assert law.alpha == pytest.approx(alpha, abs=0.01)
    assert law.e_inf == pytest.approx(e_inf, abs=0.01)
    assert law.r2 > 0.999
    low, high = law.interval()
    assert low < law.alpha < high and high - low < 0.1
    assert law(1e30) == pytest.approx(law.e_inf, abs=2e-3)


def test_a_pure_power_law():
    law = scaling_law(C, 20 * C**-0.1, shift=False, floor=False)
    assert (law.a, law.b, law.alpha, law.e_inf) == pytest.approx((20, 0, 0.1, 0), rel=1e-4)


def test_frontier_and_allocation():
    compute = np.array([1.0, 10.0, 10.0, 100.0, 100.0, 1000.0])
    error = np.array([0.5, 0.4, 0.2, 0.15, 0.4, 0.3])
    assert frontier(compute, error).tolist() == [0, 2, 3]
    assert frontier([1, 10, 100], [0.5, 0.45, 0.1]).tolist() == [0, 2]  # the middle one lies above the line
    c = np.logspace(0, 4, 9)
    found = optimal_allocation(c, c**-0.3, 7 * c**0.65, 2 * c**0.35)
    assert (found.data, found.parameters) == pytest.approx((0.65, 0.35))
    assert found.runs.tolist()[:1] + found.runs.tolist()[-1:] == [0, 8]


def test_compute_is_three_forward_passes_an_example():
    assert train_compute(nn.Linear(8, 4), torch.zeros(2, 8), 100) == 3 * 2 * 8 * 4 * 100


def task():
    x = torch.randn(120, 6, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    parts = [(x[i : i + 40], y[i : i + 40]) for i in (0, 40, 80)]
    return tensors("sign", Inputs("table", (6,)), Outputs("classes", 2), *parts)


def test_a_linear_probe_reads_what_the_features_hold():
    torch.manual_seed(0)
    net = InvertedBottleneckMLP(6, 3, thin=16, depth=1).train()
    scores = transfer(net, task())
    assert net.training
    assert scores["test"] > 0.8 and scores["decay"] in (1e-4, 1e-2, 1.0)


def test_error_over_width():
    reading = double_descent(
        lambda width: InvertedBottleneckMLP(6, 2, thin=width, depth=1), task(), (2, 16),
        budget=Budget("epochs", 3), training=Training(lr=1e-2, batch_size=16),
    )  # fmt: skip
    assert reading["width"] == [2, 16] and all(0 <= e <= 1 for e in reading["train"] + reading["test"])
    assert reading.figure is not None


def test_says_what_is_wrong():
    with pytest.raises(PomonaError, match="3 values of compute and 3 of error; the law needs as many, at least 4"):
        scaling_law([1, 2, 3], [0.3, 0.2, 0.1])
    with pytest.raises(PomonaError, match=r"must be above 0; the smallest are 0.0 and 0.1"):
        scaling_law([0, 1, 2, 3], [0.4, 0.3, 0.2, 0.1])
    with pytest.raises(PomonaError, match="fit with bootstrap=200"):
        scaling_law(C, C**-0.2).interval()
    with pytest.raises(PomonaError, match=r"Linear has no method features\(x\)"):
        transfer(nn.Linear(2, 2), task())
