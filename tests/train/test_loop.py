import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pomona.data.task import tensors
from pomona.errors import PomonaError
from pomona.nets.specs import Inputs, Outputs
from pomona.train.budget import Budget
from pomona.train.loop import batches, choose_device, evaluate, fit, predict
from pomona.train.rule import Update
from pomona.train.settings import Training


def blobs(n=120, noise=0.7):
    """Three separable clouds in four dimensions."""
    g = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(3, 4, generator=g)
    y = torch.arange(n) % 3
    x = centres[y] + noise * torch.randn(n, 4, generator=g)
    third = n // 3
    parts = [(x[i * third : (i + 1) * third], y[i * third : (i + 1) * third]) for i in range(3)]
    return tensors("blobs", Inputs("table", (4,)), Outputs("classes", 3, ("a", "b", "c")), *parts)


def network(seed=0, dropout=0.2):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3))


CPU = Training(device="cpu", precision="float32", batch_size=10)


def weights(net):
    return torch.cat([t.flatten().double() for t in net.state_dict().values()])


def test_same_seed_same_result_bit_for_bit():
    net = network()
    first, second, other = (fit(net, blobs(), CPU, budget=Budget("epochs", 3), seed=s) for s in (1, 1, 2))
    assert torch.equal(weights(first.net), weights(second.net))
    assert not torch.equal(weights(first.net), weights(other.net))
    drop = {"seconds"}
    assert [{k: v for k, v in e.items() if k not in drop} for e in first.curve] == [
        {k: v for k, v in e.items() if k not in drop} for e in second.curve
    ]


def test_the_global_generator_and_the_given_network_are_untouched():
    net = network().eval()
    before, state = weights(net), torch.random.get_rng_state()
    fit(net, blobs(), CPU, budget=Budget("epochs", 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(weights(net), before) and not net.training and net[0].weight.grad is None


def test_it_learns():
    task = blobs()
    result = fit(network(), task, CPU.model_copy(update={"lr": 0.02}), budget=Budget("epochs", 30))
    assert evaluate(result.net, task, "test")["accuracy"] > 0.9
    assert result.valid["accuracy"] == result.curve[result.best]["accuracy"]
    torch.testing.assert_close(result.predict(task.splits["test"].x), predict(result.net, task.splits["test"].x))


@pytest.mark.parametrize(
    ("kind", "amount", "steps"), [("epochs", 3, 12), ("examples", 70, 7), ("flops", 3 * 5 * 10 * 9, 9)]
)
def test_budgets_are_kept_to_the_step(kind, amount, steps):
    result = fit(network(), blobs(), CPU, budget=Budget(kind, amount), flops_per_example=5)
    assert (result.steps, result.examples, result.stopped) == (steps, 10 * steps, "budget")
    assert result.curve[-1]["step"] == steps


def test_a_budget_in_seconds_ends_near_it_with_a_last_validation():
    result = fit(network(), blobs(), CPU.model_copy(update={"patience": None}), budget=Budget("seconds", 0.3))
    assert 0.3 <= result.seconds < 1.5
    assert result.curve[-1]["step"] == result.steps > 0
    tiny = fit(network(), blobs(), CPU, budget=Budget("seconds", 1e-9))
    assert tiny.steps == 1 and len(tiny.curve) == 1


def test_patience_stops_and_the_best_weights_are_kept():
    # a rate this high wanders off at once, so that an early validation stays the best
    training = CPU.model_copy(update={"lr": 3.0, "patience": 3, "schedule": "constant", "warmup": 0.0, "clip": None})
    task = blobs(noise=2.0)
    result = fit(network(), task, training, budget=Budget("epochs", 200))
    assert result.stopped == "patience"
    assert len(result.curve) == result.best + 1 + 3
    again = evaluate(result.net, task, "valid")
    assert again["loss"] == pytest.approx(result.curve[result.best]["valid_loss"], rel=1e-5)
    assert result.curve[result.best]["accuracy"] == max(e["accuracy"] for e in result.curve)
    last = fit(
        network(), task, training.model_copy(update={"patience": None}), budget=Budget("epochs", 20), keep="last"
    )
    assert last.best == len(last.curve) - 1
    assert evaluate(last.net, task, "valid")["loss"] == pytest.approx(last.curve[-1]["valid_loss"], rel=1e-5)


def test_divergence_is_reported_and_finite_weights_kept():
    training = CPU.model_copy(update={"optimizer": "sgd", "lr": 1e30, "clip": None, "schedule": "constant"})
    result = fit(network(dropout=0.0), blobs(), training, budget=Budget("epochs", 50))
    assert result.stopped == "diverged"
    assert bool(weights(result.net).isfinite().all())
    assert all(math.isfinite(e["valid_loss"]) for e in result.curve)


class Hooked(nn.Linear):
    def __init__(self, weight):
        super().__init__(4, 3)
        self.strength = weight

    def aux_loss(self):
        return self.strength * self.weight.square().sum()

    def post_step(self):
        self.bias.clamp_(min=0)

    def param_groups(self):
        return [{"params": [self.bias], "lr_scale": 0.0}]


def test_hooks_are_honoured():
    training = CPU.model_copy(update={"lr": 0.05})
    nets = [fit(Hooked(w), blobs(), training, budget=Budget("epochs", 10), keep="last").net for w in (0.0, 10.0)]
    free, held = nets
    assert held.weight.norm() < 0.5 * free.weight.norm()
    net = Hooked(0.0)
    with torch.no_grad():
        net.bias.copy_(torch.tensor([-1.0, 0.5, 2.0]))
    trained = fit(net, blobs(), CPU, budget=Budget("epochs", 2)).net
    assert torch.equal(trained.bias, torch.tensor([0.0, 0.5, 2.0])), "clamped by post_step, unmoved by a rate of 0"
    assert not torch.equal(trained.weight, net.weight)


class Slow:
    """The network's exact gradient, as a rule of another class would give it."""

    noise = 2

    def init(self, net, loss, example):
        self.net, self.loss = net, loss
        self.seen = []
        return {"count": torch.zeros(())}

    def grads(self, params, buffers, state, batch, noise):
        self.seen.append(noise)

        def objective(p):
            after = {k: b.clone() for k, b in buffers.items()}
            return self.loss(torch.func.functional_call(self.net, {**p, **after}, (batch[0],)), batch[1]), after

        gradient, (value, after) = torch.func.grad_and_value(objective, has_aux=True)(params)
        return Update(gradient, after, {"count": state["count"] + 1}, value)

    def predict(self, params, buffers, state, x):
        return torch.func.functional_call(self.net, {**params, **buffers}, (x,))


def test_a_rule_object_trains_like_backprop_and_gets_its_noise_and_state():
    net, rule = network(dropout=0.0), Slow()
    own = fit(net, blobs(), CPU, budget=Budget("epochs", 2), rule=rule, keep="last")
    usual = fit(net, blobs(), CPU, budget=Budget("epochs", 2), keep="last")
    torch.testing.assert_close(weights(own.net), weights(usual.net), rtol=1e-4, atol=1e-6)
    assert float(own.state["count"]) == own.steps == 8
    noise = torch.cat(rule.seen)
    assert noise.shape == (80, 2) and float(noise.min()) >= 0 and float(noise.max()) < 1
    x = blobs().splits["test"].x
    torch.testing.assert_close(own.predict(x), own.net(x).detach())


def test_transforms_run_before_or_after_clipping():
    norms = {}

    class Record:
        def __init__(self, name, after):
            self.name, self.after_clip = name, after

        def __call__(self, grads, step, generator):
            norms.setdefault(self.name, []).append(float(torch.stack([g.norm() for g in grads.values()]).norm()))
            return {name: 5 * g for name, g in grads.items()}

    training = CPU.model_copy(update={"clip": 0.01})
    fit(
        network(),
        blobs(),
        training,
        budget=Budget("epochs", 1),
        transforms=[Record("after", True), Record("before", False)],
    )
    assert len(norms["after"]) == len(norms["before"]) == 4
    assert min(norms["before"]) > 0.02
    assert norms["after"] == pytest.approx([0.01] * 4, rel=1e-3)


def test_callbacks_and_validations_are_called():
    steps, entries = [], []
    result = fit(
        network(),
        blobs(),
        CPU,
        budget=Budget("epochs", 5),
        callbacks=[lambda net, step: steps.append(step)],
        on_validation=entries.append,
        validations=3,
    )
    assert steps == list(range(21))
    assert entries == result.curve and [e["step"] for e in entries] == [7, 14, 20]


def test_a_loss_function_takes_the_place_of_the_tasks():
    seen = []

    def loss(output, target):
        seen.append(len(target))
        return F.multi_margin_loss(output, target)

    fit(network(), blobs(), CPU, budget=Budget("epochs", 1), loss=loss)
    assert seen == [10] * 4, "training batches only"


def test_batches_are_permutations_and_depend_on_the_seed_alone():
    order = batches(10, 4, seed=3)
    epochs = [[next(order) for _ in range(2)] for _ in range(3)]
    assert all(len(set(torch.cat(epoch).tolist())) == 8 for epoch in epochs)
    again = batches(10, 4, seed=3)
    assert all(torch.equal(next(again), b) for epoch in epochs for b in epoch)
    assert not torch.equal(epochs[0][0], epochs[1][0])


def test_predict_chunks_and_restores_the_mode():
    net = network()
    x = blobs().splits["train"].x
    out = predict(net, x, batch_size=7)
    assert net.training
    torch.testing.assert_close(out, copy.deepcopy(net).eval()(x).detach())


def test_a_device_that_is_not_here_is_named():
    with pytest.raises(PomonaError, match="device='nonsense' is not available here"):
        choose_device("nonsense")
