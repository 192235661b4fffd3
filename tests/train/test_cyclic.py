import pytest
import torch
from torch import nn

from pomona.data.task import tensors
from pomona.errors import PomonaError
from pomona.nets.specs import Inputs, Outputs
from pomona.train.budget import Budget
from pomona.train.cyclic import Cyclic, CyclicSchedule, RangeCurve, lr_range_test, vmap_range_test
from pomona.train.loop import fit
from pomona.train.settings import Training

POLICIES = ["triangular", "triangular2", "exp_range"]
SGD = Training(device="cpu", optimizer="sgd", momentum=0.0, weight_decay=0.0, clip=None, batch_size=16)


def quadratic_task(n=48):
    """Inputs +-1 in one dimension with target 0: the loss of w x is w^2, with curvature 2, whatever the batch."""
    x = torch.ones(n, 1)
    x[::2] = -1
    part = (x, torch.zeros(n, 1))
    return tensors("quadratic", Inputs("table", (1,)), Outputs("number", 1), part, part, part)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1, 1))

    def forward(self, x):
        return x * self.w


def blobs(n=96):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 3
    x = 2 * torch.randn(3, 4, generator=g)[y] + torch.randn(n, 4, generator=g)
    third = n // 3
    parts = [(x[i * third : (i + 1) * third], y[i * third : (i + 1) * third]) for i in range(3)]
    return tensors("blobs", Inputs("table", (4,)), Outputs("classes", 3, ("a", "b", "c")), *parts)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def test_triangular_hits_its_corners_and_its_mean():
    lr = CyclicSchedule(0.1, 0.5, step_size=10)
    assert [lr(0), lr(10), lr(20)] == pytest.approx([0.1, 0.5, 0.1], abs=1e-14)
    assert sum(lr(t) for t in range(20)) / 20 == pytest.approx(0.3)


@pytest.mark.parametrize("policy", [*POLICIES, lambda cycle: 1 / cycle])
@pytest.mark.parametrize("down", [None, 5])
def test_it_equals_torchs_scheduler(policy, down):
    schedule = CyclicSchedule((0.001, 0.02), (0.3, 0.5), 17, policy, 0.999, down, cycle_momentum=(0.8, 0.95))
    groups = [{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(2)]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    scheduler = schedule.scheduler(optimizer)
    for t in range(1000):
        for i, group in enumerate(optimizer.param_groups):
            assert group["lr"] == pytest.approx(schedule(t, i), abs=1e-12)
            assert group["momentum"] == pytest.approx(schedule.momentum(t), abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_peaks_of_triangular2_halve_and_exp_range_at_one_is_triangular():
    halving = CyclicSchedule(0.1, 0.5, 10, "triangular2")
    for cycle in range(1, 6):
        assert halving(20 * cycle - 10) == pytest.approx(0.1 + 0.4 / 2 ** (cycle - 1), abs=1e-12)
    one, triangular = CyclicSchedule(0.1, 0.5, 10, "exp_range", gamma=1.0), CyclicSchedule(0.1, 0.5, 10)
    assert [one(t) for t in range(100)] == [triangular(t) for t in range(100)]


@pytest.mark.parametrize("policy", POLICIES)
def test_equal_bounds_are_a_constant_rate(policy):
    schedule = CyclicSchedule(0.2, 0.2, 7, policy)
    assert {schedule(t) for t in range(50)} == {0.2}


def test_round_budget_ends_at_the_low_point():
    for total, down in ((1000, None), (970, 20), (5, None)):
        schedule = CyclicSchedule(0.1, 0.5, 30, step_size_down=down).round_budget(total)
        assert total / schedule.period == pytest.approx(round(total / schedule.period))
        assert schedule(total) == pytest.approx(0.1)


@pytest.mark.parametrize("policy", POLICIES)
def test_progress_form_equals_the_iteration_form(policy):
    total, cycles = 120, 3
    by_step = CyclicSchedule(0.2, 1.0, total / cycles / 2, policy, gamma=0.99)
    by_progress = Cyclic(cycles, policy, floor=0.2, gamma=0.99)
    assert [by_progress(t / total, t) for t in range(total)] == pytest.approx([by_step(t) for t in range(total)])
    assert by_progress(1.0, total) == pytest.approx(0.2)


def test_range_test_leaves_network_and_generators_unchanged():
    net, task = network(), blobs()
    optimizer = torch.optim.Adam(net.parameters())
    before = {name: t.clone() for name, t in net.state_dict().items()}
    rng = torch.random.get_rng_state()
    curve = lr_range_test(net, task, SGD, steps=40, validate_every=5)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert net.training and all(p.grad is None for p in net.parameters()) and not optimizer.state
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert len(curve.lr) == len(curve.raw) == len(curve.loss) > 30
    assert all(0 <= value <= 1 for _, value in curve.metric)
    again = lr_range_test(net, task, SGD, steps=40)
    assert again.raw == curve.raw
    low, high = curve.suggest()
    assert 1e-5 <= low <= high <= 10


def test_range_test_brackets_the_stable_rate_of_a_quadratic():
    # steps multiply w by 1 - 2 lr: the loss falls below lr = 1 and grows above it
    curve = lr_range_test(Scale(), quadratic_task(), SGD, lo=1e-3, hi=100, steps=150, stop_factor=1e6)
    low, high = curve.suggest()
    assert curve.diverged or curve.raw[-1] > curve.raw[0]
    assert 1e-3 <= low < high < 1
    linear = lr_range_test(Scale(), quadratic_task(), SGD, lo=0.1, hi=0.9, steps=9, mode="linear")
    assert linear.lr == pytest.approx([0.1 * i for i in range(1, 10)])
    assert linear.raw[1] == pytest.approx((1 - 2 * 0.1) ** 2)


def test_range_test_stops_on_divergence():
    curve = lr_range_test(Scale(), quadratic_task(), SGD, lo=2.0, hi=20, steps=100)
    assert curve.diverged and len(curve.lr) < 100
    with pytest.raises(PomonaError, match="the loss does not fall"):
        curve.suggest()


def test_vmapped_rates_equal_separate_trainings():
    task, rates = blobs(), [0.01, 0.3, 1.0]
    net = nn.Sequential(*[m for m in network() if not isinstance(m, nn.Dropout)])
    settings = SGD.model_copy(
        update={"momentum": 0.9, "clip": 0.5, "weight_decay": 0.1, "schedule": "constant", "warmup": 0.0}
    )
    losses = vmap_range_test(net, task, rates, settings, steps=6)
    assert losses.shape == (6, 3)
    for i, rate in enumerate(rates):
        own = settings.model_copy(update={"lr": rate})
        entries = fit(net, task, own, budget=Budget("examples", 6 * 16), validations=6, keep="last").curve
        torch.testing.assert_close(losses[:, i], torch.tensor([e["train_loss"] for e in entries]), rtol=2e-3, atol=1e-4)


def test_vmapped_rates_diverge_where_theory_says():
    losses = vmap_range_test(Scale(), quadratic_task(), [0.1, 0.5, 0.9, 1.1], SGD, steps=40)
    assert losses[-1, 1] < 1e-12 and losses[-1, 0] < losses[0, 0] and losses[-1, 2] < losses[0, 2]
    assert losses[-1, 3] > losses[0, 3]


def test_smoothed_loss_is_the_bias_corrected_average():
    curve = lr_range_test(Scale(), quadratic_task(), SGD, lo=0.1, hi=0.4, steps=5, smooth=0.5)
    average = 0.0
    for i, (raw, loss) in enumerate(zip(curve.raw, curve.loss, strict=True)):
        average = 0.5 * average + 0.5 * raw
        assert loss == pytest.approx(average / (1 - 0.5 ** (i + 1)))


def test_a_metric_caps_the_suggestion():
    lr = [10.0 ** (i / 10 - 3) for i in range(40)]
    raw = [5 - i / 10 for i in range(40)]
    free = RangeCurve(lr, raw, raw, [])
    capped = RangeCurve(lr, raw, raw, [(lr[5], 0.3), (lr[20], 0.8), (lr[30], 0.4)])
    assert free.suggest()[1] > capped.suggest()[1] == lr[20]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CyclicSchedule(0.1, 0.5, 10, "square"), "policy='square' is not known"),
        (lambda: CyclicSchedule(0.5, 0.1, 10), "no higher than"),
        (lambda: CyclicSchedule(0.1, 0.5, 0), "step_size=0 must be a number above 0"),
        (lambda: Cyclic(floor=2.0), "floor=2.0 must be in"),
        (lambda: lr_range_test(Scale(), quadratic_task(), lo=1.0, hi=0.1), "0 < lo < hi"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(PomonaError, match=message):
        make()
