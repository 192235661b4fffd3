import pytest
import torch
from torch import nn

from pomona.errors import PomonaError
from pomona.nets.cost import flops, latency, match_width, parameters, training_memory


def test_flops_of_a_linear_layer_are_two_a_weight():
    assert flops(nn.Linear(7, 5), torch.randn(2, 7)) == 2 * 7 * 5


def test_flops_of_a_convolution_are_two_a_weight_and_place():
    assert flops(nn.Conv2d(3, 4, 3, padding=1, bias=False), torch.randn(2, 3, 8, 8)) == 2 * (3 * 4 * 9) * 64


def test_measuring_leaves_the_network_and_the_generator_as_they_were():
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x, state = torch.randn(16, 4), torch.random.get_rng_state()
    flops(net, x), training_memory(net, x), latency(net, x, repeats=2)
    assert net.training and all(module.training for module in net.modules())
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_shared_parameters_count_once_and_frozen_ones_not():
    layer = nn.Linear(4, 4)
    assert parameters(nn.Sequential(layer, layer)) == 20
    layer.bias.requires_grad_(False)
    assert parameters(layer) == 16


def test_training_memory_holds_activations_and_gradients():
    net = nn.Sequential(nn.Linear(100, 200), nn.ReLU(), nn.Linear(200, 10))
    gradients = 4 * parameters(net)
    small, large = training_memory(net, torch.randn(10, 100)), training_memory(net, torch.randn(1000, 100))
    assert small >= gradients
    assert large >= 1000 * 200 * 4 * 2  # both activations of the hidden layer are kept for the way back
    assert large < 20 * 1000 * 200 * 4


def test_training_memory_is_of_training_not_of_evaluation():
    drop = nn.Sequential(nn.Linear(50, 500), nn.Dropout(0.5), nn.Linear(500, 2))
    plain = nn.Sequential(nn.Linear(50, 500), nn.Linear(500, 2))
    x = torch.randn(500, 50)
    assert training_memory(drop.eval(), x) > training_memory(plain, x) + 500 * 500


def test_latency_is_a_time():
    assert 0 < latency(nn.Linear(8, 8), torch.randn(4, 8), repeats=3) < 1


@pytest.mark.parametrize("target", [300, 5_000, 100_000])
def test_the_width_comes_nearest_to_the_target(target):
    def make(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(10, width), nn.Linear(width, 3))

    width = match_width(make, target)
    gap = abs(parameters(make(width)) - target)
    assert gap <= 0.02 * target
    assert gap <= abs(parameters(make(width + 1)) - target) and gap <= abs(parameters(make(width - 1)) - target)


def test_widths_that_cannot_be_built_are_stepped_over():
    def make(width: int) -> nn.Module:
        if width % 12:
            raise PomonaError(f"width={width} must be a multiple of 12")
        return nn.Linear(100, width)

    assert match_width(make, 101 * 120) == 120
    with pytest.raises(PomonaError, match=r"^no width between 1 and 8192 can be built$"):
        match_width(lambda width: make(1), 1000)
