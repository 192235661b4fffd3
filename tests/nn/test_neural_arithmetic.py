import copy

import pytest
import torch
from torch import nn

from pomona.errors import PomonaError
from pomona.nn.neural_arithmetic import (
    NAC,
    NALU,
    NAU,
    NMU,
    UNITS,
    GatedNMU,
    NACMul,
    arithmetic_net,
    set_steps,
    sparsity_error,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def unit(kind, weight):
    layer = kind(weight.shape[1], weight.shape[0]).double()
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def test_nmu_with_two_ones_is_the_product_and_with_none_is_one():
    x = draw(50, 6)
    layer = unit(NMU, torch.tensor([[0, 1, 0, 0, 1, 0], [0] * 6]).double())
    assert torch.equal(layer(x)[:, 0], x[:, 1] * x[:, 4])
    assert torch.equal(layer(x)[:, 1], torch.ones(50).double())


def test_nau_with_signs_is_the_exact_signed_sum():
    x = torch.randint(-9, 9, (50, 4)).double()
    layer = unit(NAU, torch.tensor([[1, -1, 0, 1]]).double())
    assert torch.equal(layer(x)[:, 0], x[:, 0] - x[:, 1] + x[:, 3])


def test_regulariser_is_zero_at_integers_only():
    assert unit(NAU, torch.tensor([[1, -1, 0]]).double()).regulariser() == 0
    assert unit(NMU, torch.tensor([[1, 0, 0]]).double()).regulariser() == 0
    for kind in (NAU, NMU):
        layer = unit(kind, torch.tensor([[1, 0.3, 0.9]]).double())
        torch.testing.assert_close(layer.regulariser(), torch.tensor(0.4 / 3).double())
        torch.testing.assert_close(layer.sparsity_error(), torch.tensor(0.3).double())


def test_nmu_gradient_with_factors_of_exactly_zero():
    for zeros in (0, 1, 2):
        x = draw(5)
        layer = unit(NMU, torch.full((1, 5), 0.5).double())
        x[:zeros] = -1  # 0.5 * -1 + 0.5 = 0
        layer(x).sum().backward()
        factors = 0.5 * x + 0.5
        others = torch.stack([torch.cat([factors[:i], factors[i + 1 :]]).prod() for i in range(5)])
        torch.testing.assert_close(layer.weight.grad[0], (x - 1) * others)


@pytest.mark.parametrize("kind", [NAU, NMU])
def test_weights_stay_inside_the_range_after_every_step(kind):
    layer = kind(4, 3)
    optimiser = torch.optim.SGD(layer.parameters(), 1.0)
    for _ in range(20):
        optimiser.zero_grad()
        (100 * layer(torch.randn(8, 4))).sum().backward()
        optimiser.step()
        with torch.no_grad():
            layer.post_step()
        assert layer.low <= layer.weight.min() and layer.weight.max() <= 1
    assert layer.step == 20


def test_regulariser_rises_between_its_two_steps():
    layer = unit(NMU, torch.full((1, 2), 0.5).double())
    layer.ramp = (2, 6)
    found = []
    for _ in range(8):
        found.append(layer.aux_loss().item())
        with torch.no_grad():
            layer.post_step()
    assert found == [0, 0, 0, 1.25, 2.5, 3.75, 5, 5]
    net = set_steps(nn.Sequential(NAU(3, 2), GatedNMU(2, 1)), 1000)
    assert net[0].ramp == net[1].add.ramp == net[1].multiply.ramp == (200, 350)


def test_initial_ranges():
    wide, narrow = NAU(400, 200).weight, NAU(2, 2).weight
    assert 0.099 < wide.abs().max() <= 0.1
    assert narrow.abs().max() <= 0.5
    product = NMU(50, 50).weight
    assert 0.25 <= product.min() < 0.26 and 0.74 < product.max() <= 0.75


def test_accumulators_are_their_equations():
    x = draw(20, 4)
    plain, log, both = (kind(4, 3).double() for kind in (NAC, NACMul, NALU))
    torch.testing.assert_close(plain(x), x @ (plain.w_hat.tanh() * plain.m_hat.sigmoid()).T)
    expected = (x.abs() + 1e-7).log() @ (log.w_hat.tanh() * log.m_hat.sigmoid()).T
    torch.testing.assert_close(log(x), expected.exp())
    g = (x @ both.gate.T).sigmoid()
    w = both.add.weight
    torch.testing.assert_close(both(x), g * (x @ w.T) + (1 - g) * ((x.abs() + 1e-7).log() @ w.T).exp())
    assert sum(p.numel() for p in both.parameters()) == 3 * 12
    assert sum(p.numel() for p in NALU(4, 3, shared=False).parameters()) == 5 * 12


def test_a_copy_of_a_nalu_still_shares_its_weights():
    other = copy.deepcopy(NALU(4, 3))
    assert other.add.w_hat is other.multiply.w_hat


@pytest.mark.parametrize("name", UNITS)
def test_gradients(name):
    layer = UNITS[name](4, 3).double()
    assert torch.autograd.gradcheck(layer, draw(5, 4).requires_grad_())


def test_a_net_with_the_right_weights_multiplies_two_sums():
    net = arithmetic_net("nau", "nmu", 6, steps=100).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0]]))
        net[1].weight.fill_(1)
    x = draw(20, 6)
    torch.testing.assert_close(net(x)[:, 0], x[:, :3].sum(1) * x[:, 2:4].sum(1))
    assert sparsity_error(net) == 0


def test_bad_input():
    with pytest.raises(PomonaError, match=r"^unit='nmuu' is not known; did you mean nmu"):
        arithmetic_net("nau", "nmuu", 3)
    with pytest.raises(PomonaError, match=r"^ramp=\(5, 5\) must be the step at which"):
        NAU(3, 2, ramp=(5, 5))
    with pytest.raises(PomonaError, match=r"^NMU takes 3 features on axis -1"):
        NMU(3, 2)(torch.ones(4))
    with pytest.raises(PomonaError, match=r"^net has no arithmetic unit"):
        sparsity_error(nn.Linear(2, 2))
