import numpy as np
import pytest
import torch

from pomona.claims.quadratic_neuron import clip_by_group, mlp, quadratic_neuron, wider
from pomona.nn.quadratic import QuadraticLinear


def test_groups_are_clipped_apart():
    generator = torch.Generator()
    grads = {"1.weight_r": torch.tensor([3.0, 4.0]), "1.weight_g": torch.tensor([0.3]), "1.bias_b": torch.tensor([0.4])}
    clipped = clip_by_group(grads, 0, generator)
    torch.testing.assert_close(clipped["1.weight_r"], torch.tensor([0.6, 0.8]))
    assert torch.equal(clipped["1.weight_g"], grads["1.weight_g"])


def test_wider_net_has_the_parameters_of_the_quadratic_one():
    def count(net):
        return sum(p.numel() for p in net.parameters())

    quadratic = count(mlp(QuadraticLinear, [64, 32, 32, 32, 10]))
    size = wider(64, 10, 3, 32)
    assert count(mlp(torch.nn.Linear, [64, size, size, size, 10])) == pytest.approx(quadratic, rel=0.03)


def test_smoke():
    evidence = quadratic_neuron("smoke", (0, 1))
    assert len(evidence.method) == len(evidence.baseline) == 2
    assert np.isfinite(evidence.differences).all()
    assert set(evidence.details) == {"depth 3", "rings"}
    parameters = {name: summary["parameters"] for name, summary in evidence.details["depth 3"].items()}
    assert parameters["linear, equal parameters"] == pytest.approx(parameters["relinear"], rel=0.03)
