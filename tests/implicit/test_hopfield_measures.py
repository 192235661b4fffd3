import pytest
import torch
from torch import nn

from pomona.errors import PomonaError
from pomona.implicit.hopfield import Hopfield, hopfield_retrieve
from pomona.implicit.hopfield_measures import (
    ClassicalHopfield,
    MILNet,
    head_report,
    mass_count,
    retrieval_bound,
    separation,
    sphere,
    storage_test,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_separation_is_the_gap_to_the_nearest_other_pattern():
    x = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 3.0]])
    torch.testing.assert_close(separation(x), torch.tensor([2.0, -1.0, 6.0]))


def test_one_update_error_is_within_the_bound():
    patterns = sphere(30, 64, 8.0, seeded()).double()
    for beta in (0.25, 1.0):
        for relative in (0.0, 0.01, 0.1, 0.25):
            state = patterns + relative * sphere(30, 64, 8.0, seeded(1)).double()
            error = (hopfield_retrieve(state, patterns, beta) - patterns).norm(dim=-1)
            bound = retrieval_bound(patterns, (state - patterns).norm(dim=-1), beta)
            assert (error <= bound + 1e-12).all()
    assert retrieval_bound(patterns, torch.zeros(30).double(), 1.0).max() < 1e-6  # and it says something


def test_storage_is_exponential_where_the_classical_network_fails():
    found = storage_test(32, 1024, generator=seeded())
    assert found["retrieved"] > 0.95 and found["error"] < 0.1 and found["separation"] > 0
    assert storage_test(32, 1024, beta=0.05, generator=seeded())["retrieved"] < 0.1
    patterns = torch.randint(0, 2, (64, 32), generator=seeded()).float() * 2 - 1
    assert (ClassicalHopfield(patterns)(patterns) == patterns).all(1).float().mean() < 0.1


def test_classical_network_retrieves_a_few_patterns_and_its_energy_falls():
    patterns = torch.randint(0, 2, (3, 100), generator=seeded()).double() * 2 - 1
    net = ClassicalHopfield(patterns)
    noisy = patterns.clone()
    noisy[:, :15] *= -1
    before = net.energy(noisy)
    after = net(noisy)
    assert (net.energy(after) <= before).all()
    assert (after == patterns).all() and (net(noisy, 2, "sync") == patterns).all()


def test_mass_count_is_the_least_number_of_entries():
    weight = torch.tensor([[1.0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25], [0.1, 0.5, 0.1, 0.3], [0, 0.95, 0.05, 0]])
    assert mass_count(weight).tolist() == [1, 4, 3, 1]


def test_head_report_tells_averaging_metastable_and_single_apart():
    groups = torch.eye(4).repeat_interleave(4, 0) * 10 + 0.01 * torch.randn(16, 4, generator=seeded())
    plain = {"static": ("state", "stored", "projected"), "norm": False, "out_projection": False}
    kinds = {}
    for beta in (1e-6, 0.1, 1e4):
        net = nn.Sequential(Hopfield(4, beta=beta, **plain))
        (report,) = head_report(net, groups[None])
        kinds[beta] = (report.kind, report.layer, report.patterns)
    assert kinds == {1e-6: ("averaging", "0", 16), 0.1: ("metastable", "0", 16), 1e4: ("single", "0", 16)}
    assert net.training and not net[0]._forward_pre_hooks


@pytest.mark.parametrize("pooling", ["hopfield", "gated", "mean", "max"])
def test_bag_network_ignores_padding_and_order(pooling):
    net = MILNet(5, 2, pooling=pooling).double()
    bags = torch.randn(3, 7, 5, dtype=torch.float64, generator=seeded())
    padding = torch.arange(7).expand(3, 7) < 4
    out = net(bags, padding)
    torch.testing.assert_close(out, net(bags[:, [2, 0, 1, 3]]))
    assert out.shape == (3, 2) and torch.autograd.gradcheck(net, (bags[:1].requires_grad_(),))


def test_bad_arguments_say_what_would_do():
    with pytest.raises(PomonaError, match="must be a matrix of -1 and 1"):
        ClassicalHopfield(torch.zeros(2, 3))
    with pytest.raises(PomonaError, match="holds no Hopfield module"):
        head_report(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(PomonaError, match="pooling='hopfeld' is not known; did you mean hopfield"):
        MILNet(5, pooling="hopfeld")
