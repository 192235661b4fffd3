import copy
import math

import pytest
import torch
from torch import nn

from pomona.data.task import tensors
from pomona.errors import PomonaError
from pomona.nets.specs import Inputs, Outputs
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
    return [
        Member(make(10 + i), base.model_copy(update=changes[i % 3]), 7 if same_seed else i) for i in range(count)
    ]


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


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "nesterov", "rmsprop"])
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
