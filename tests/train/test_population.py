import copy
import math

import pytest
import torch
from torch import nn

from pomona.data.task import tensors
from pomona.errors import PomonaError
from pomona.nets.specs import Inputs, Outputs
from pomona.nn.mixing import AttentionMixer
from pomona.train import Budget, Training, fit
from pomona.train.population import Member, can_stack, choose_stack_size, fit_population
from pomona.train.stacked_run import Stack

F64 = Training(device="cpu", precision="float64", batch_size=16, lr=0.01)
STEPS = Budget("examples", 16 * 200)


def task(shape=(6,)):
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(3, *shape, generator=g)
    y = torch.arange(240) % 3
    x = centres[y] + 1.5 * torch.randn(240, *shape, generator=g)
    parts = [(x[i::3], y[i::3]) for i in range(3)]
    parts = [(x[:160], y[:160]), (x[160:200], y[160:200]), (x[200:], y[200:])]
    kind = "table" if len(shape) == 1 else "image"
    return tensors("clouds", Inputs(kind, shape), Outputs("classes", 3, ("a", "b", "c")), *parts)


def mlp(seed, dropout=0.0, norm=False):
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 12), *([nn.BatchNorm1d(12)] if norm else []), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))


def convnet(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.2), nn.Flatten(),
        nn.Linear(4 * 9, 3),
    )  # fmt: skip


def population(make, base=F64, same_seed=False, count=3):
    """Members that differ in all that may differ."""
    changes = [
        {"lr": 0.01, "weight_decay": 0.1, "clip": 0.5},
        {"lr": 0.003, "weight_decay": 0.0, "clip": None, "warmup": 0.2},
        {"lr": 0.02, "weight_decay": 0.01, "clip": 1.0, "schedule": "linear"},
    ]
    return [Member(make(10 + i), base.model_copy(update=changes[i % 3]), 7 if same_seed else i) for i in range(count)]


def weights(net):
    return torch.cat([t.flatten().double() for t in net.state_dict().values()])


def assert_same_as_alone(members, data, budget=STEPS, fits=None, **options):
    fits = fits or fit_population(members, data, budget=budget, keep="last", **options)
    for member, found in zip(members, fits, strict=True):
        alone = fit(
            member.net, data, member.training, budget=member.budget or budget, seed=member.seed, keep="last", **options
        )
        assert (found.stopped, found.steps, found.examples, found.best) == (
            alone.stopped, alone.steps, alone.examples, alone.best
        )  # fmt: skip
        torch.testing.assert_close(weights(found.net), weights(alone.net), rtol=0, atol=1e-9)
        assert len(found.curve) == len(alone.curve)
        for a, b in zip(found.curve, alone.curve, strict=True):
            assert a.keys() == b.keys() and list(a) == list(b)
            for name in a.keys() - {"seconds"}:  # the loop adds up training losses in single precision
                assert a[name] == pytest.approx(b[name], rel=1e-6 if name == "train_loss" else 1e-9, abs=1e-9)
        assert not found.net.training and found.valid.keys() == alone.valid.keys()
        data_x = data.splits["test"].x.double()
        torch.testing.assert_close(found.predict(data_x), alone.predict(data_x), rtol=0, atol=1e-8)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "nesterov", "rmsprop", "lion"])
def test_a_member_of_a_stack_equals_the_same_member_alone_for_each_optimizer(optimizer):
    base = F64.model_copy(update={"optimizer": optimizer})
    assert_same_as_alone(population(mlp, base), task())


@pytest.mark.parametrize("same_seed", [True, False])
@pytest.mark.parametrize(
    "make", [lambda s: mlp(s, norm=True), lambda s: mlp(s, dropout=0.3), lambda s: mlp(s, 0.2, True)]
)
def test_a_member_equals_itself_alone_with_batch_norm_and_dropout(make, same_seed):
    assert_same_as_alone(population(make, same_seed=same_seed), task())


def test_a_member_equals_itself_alone_as_a_convnet_with_channel_dropout():
    assert_same_as_alone(population(convnet), task((1, 6, 6)))


class Hooked(nn.Linear):
    """A layer with every hook."""

    def aux_loss(self):
        return 0.1 * self.weight.square().sum()

    def post_step(self):
        self.weight.copy_(self.weight.clamp(max=0.2))

    def param_groups(self):
        return [{"params": [self.bias], "lr_scale": 0.5, "weight_decay": 0.3}]


def hooked(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Hooked(8, 3))


@pytest.mark.parametrize("optimizer", ["adamw", "nesterov"])
def test_auxiliary_losses_projections_and_parameter_groups_are_each_members_own(optimizer):
    members = population(hooked, F64.model_copy(update={"optimizer": optimizer}))
    assert_same_as_alone(members, task())
    net = fit_population(members, task(), budget=STEPS)[0].net
    assert net[2].weight.max() <= 0.2


def test_forward_forward_runs_stacked():
    base = F64.model_copy(update={"rule": "forward_forward"})
    assert_same_as_alone(population(mlp, base), task(), Budget("examples", 16 * 60))


def test_gradient_noise_of_each_members_own_scale_runs_stacked():
    members = population(mlp)
    noisy = [
        Member(m.net, m.training.model_copy(update={"transform": f"grad_noise:eta=0.01,noise_scale={i}"}), m.seed)
        for i, m in enumerate(members)
    ]
    assert_same_as_alone(noisy, task())
    alone = fit(members[0].net, task(), members[0].training, budget=STEPS, seed=0, keep="last")
    quiet = fit_population(noisy, task(), budget=STEPS, keep="last")[0]
    torch.testing.assert_close(weights(quiet.net), weights(alone.net), rtol=0, atol=1e-9)


def test_members_may_have_budgets_of_their_own():
    members = [
        Member(m.net, m.training, m.seed, Budget("epochs", 2 + 5 * i)) for i, m in enumerate(population(mlp, count=3))
    ]
    assert_same_as_alone(members, task())


def test_best_weights_patience_and_curve_are_each_members_own():
    base = F64.model_copy(update={"patience": 3, "schedule": "constant", "warmup": 0.0})
    members = [Member(mlp(i), base.model_copy(update={"lr": lr}), i) for i, lr in enumerate((0.1, 1e-3, 0.03, 0.01))]
    fits = fit_population(members, task(), budget=Budget("epochs", 30))
    for member, found in zip(members, fits, strict=True):
        alone = fit(member.net, task(), member.training, budget=Budget("epochs", 30), seed=member.seed)
        assert (found.stopped, found.steps, found.best) == (alone.stopped, alone.steps, alone.best)
        assert found.valid == pytest.approx(alone.valid, rel=1e-9)
        torch.testing.assert_close(weights(found.net), weights(alone.net), rtol=0, atol=1e-8)
    assert {found.stopped for found in fits} == {"patience"} and len({found.steps for found in fits}) > 1


def test_members_that_stopped_early_are_compacted_away(monkeypatch):
    members = [Member(m.net, m.training, m.seed, Budget("epochs", 1 if i < 2 else 4)) for i, m in
               enumerate(population(lambda s: mlp(s, 0.2, True), count=4))]  # fmt: skip
    sizes = []
    step = Stack.step
    monkeypatch.setattr(Stack, "step", lambda self, number: (sizes.append(len(self.ids)), step(self, number)))
    assert_same_as_alone(members, task())
    assert sizes[-1] == 2 and 4 in sizes


@pytest.mark.parametrize("same_seed", [True, False])
def test_nan_in_one_member_leaves_the_others_untouched_to_the_bit(same_seed):
    base = F64.model_copy(update={"precision": "float32"})
    healthy = population(lambda s: mlp(s, 0.2, True), base, same_seed, count=4)
    sick = copy.deepcopy(healthy)
    with torch.no_grad():
        sick[1].net[0].weight[0, 0] = math.nan
    budget = Budget("examples", 16 * 60)
    a, b = fit_population(healthy, task(), budget=budget), fit_population(sick, task(), budget=budget)
    assert b[1].stopped == "diverged" and b[1].best == -1 and not b[1].curve
    for i in (0, 2, 3):
        assert a[i].stopped == b[i].stopped == "budget"
        assert torch.equal(weights(a[i].net), weights(b[i].net))


def test_the_given_networks_and_the_global_generator_are_untouched():
    members = population(lambda s: mlp(s, 0.2))
    before, state = [weights(m.net) for m in members], torch.random.get_rng_state()
    fit_population(members, task(), budget=Budget("epochs", 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(weights(m.net), w) for m, w in zip(members, before, strict=True))


def test_chunks_give_the_same_numbers_and_validations_are_told():
    members, told = population(mlp, count=5), []
    fits = fit_population(
        members, task(), budget=STEPS, stack_size=2, keep="last", on_validation=lambda i, e: told.append((i, e["step"]))
    )
    assert_same_as_alone(members, task(), fits=fits)
    assert {i for i, _ in told} == set(range(5))
    assert len(told) == sum(len(found.curve) for found in fits)


def test_too_many_members_for_memory_are_chunked_with_a_warning(monkeypatch):
    monkeypatch.setattr("pomona.train.population._free_memory", lambda: 100_000)
    with pytest.warns(UserWarning, match=r"at a time"):
        size = choose_stack_size(population(mlp, count=40), task())
    assert 1 <= size < 40


class Branching(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else -super().forward(x)


class Counting(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Scaled(nn.Linear):
    def __init__(self, factor):
        super().__init__(6, 3)
        self.factor = factor

    def forward(self, x):
        return self.factor * super().forward(x)


def test_what_cannot_be_stacked_says_why():
    data = task()

    def reason(nets, **changes):
        members = [Member(net, F64.model_copy(update={k: v[i] for k, v in changes.items()}), i) for i, net in
                   enumerate(nets)]  # fmt: skip
        return can_stack(members, data)

    assert reason([mlp(0), mlp(1)]) is None
    assert reason([mlp(0), nn.Linear(6, 3)]).startswith("networks 0 and 1 differ in parameter")
    assert reason([mlp(0, 0.1), mlp(1, 0.2)]) == "networks 0 and 1 differ in 2.p"
    assert reason([Scaled(1.0), Scaled(2.0)]) == "networks 0 and 1 differ in factor"
    assert reason([mlp(0), mlp(1)], optimizer=("adam", "sgd")) == "optimizer differs: adam, sgd"
    assert "vmap refuses" in reason([Branching(6, 3), Branching(6, 3)])
    assert reason([Counting(6, 3), Counting(6, 3)]) == "a forward pass changes calls, which is not a tensor"
    clock = can_stack([Member(mlp(0))], data, budget=Budget("seconds", 1))
    assert clock is not None and "seconds" in clock
    with pytest.raises(PomonaError, match="optimizer differs: adamw, sgd"):
        fit_population([Member(mlp(0), F64), Member(mlp(1), F64.model_copy(update={"optimizer": "sgd"}))], data)
    with pytest.raises(PomonaError, match="stack_size=0 must be 1 or more"):
        fit_population([Member(mlp(0), F64)], data, stack_size=0)


def test_no_members_no_fits():
    assert fit_population([], task()) == []


def test_a_member_equals_itself_alone_with_attention():
    def attentive(seed):
        torch.manual_seed(seed)
        return nn.Sequential(AttentionMixer(6, heads=2), nn.Flatten(), nn.Linear(24, 3))

    assert_same_as_alone(population(attentive), task((4, 6)), Budget("examples", 16 * 100))


def test_a_long_training_measures_how_many_to_train_at_once(monkeypatch):
    paces = {32: 3.0, 16: 1.0, 8: 2.0}
    tried = []
    monkeypatch.setattr(
        "pomona.train.population._pace", lambda members, *_: tried.append(len(members)) or paces[len(members)]
    )
    members = population(mlp, count=32)
    assert choose_stack_size(members, task(), Budget("epochs", 100)) == 16 and tried == [32, 16, 8]
    assert choose_stack_size(members, task(), Budget("epochs", 1)) == 32 and len(tried) == 3
    monkeypatch.undo()
    state = torch.random.get_rng_state()
    assert choose_stack_size(members[:16], task(), Budget("epochs", 200)) in {8, 16}
    assert torch.equal(torch.random.get_rng_state(), state)
