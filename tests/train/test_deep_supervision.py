import copy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from pomona import compare
from pomona.data import load
from pomona.errors import PomonaError
from pomona.train.budget import Budget
from pomona.train.deep_supervision import (
    DeeplySupervised,
    DeepSupervision,
    cross_entropy,
    feature_probe,
    squared_hinge,
)
from pomona.train.loop import batches, fit
from pomona.train.settings import Training

G = torch.Generator().manual_seed(0)
X = torch.randn(6, 2, 5, 5, dtype=torch.float64, generator=G)
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def make_net() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, 2), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)),
    )
    return net.double()


def supervise(**options) -> DeeplySupervised:
    torch.manual_seed(1)
    return DeeplySupervised(make_net(), **{"taps": ["1", "3", "6"], "example": X, **options})


def grads(value: torch.Tensor, net: nn.Module) -> list[torch.Tensor]:
    return list(torch.autograd.grad(value, list(net.parameters()), retain_graph=True, materialize_grads=True))


def plain(model: DeeplySupervised) -> torch.Tensor:
    return model.loss(model.net(X), Y) + model.penalty * model.net[-1].weight.square().sum()


def same(a: list[torch.Tensor], b: list[torch.Tensor], exact: bool = False) -> None:
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right, **({"rtol": 0, "atol": 0} if exact else {}))


@pytest.mark.parametrize("heads", ["linear", "gap", "svm"])
@pytest.mark.parametrize("loss", ["ce", "sqhinge"])
def test_without_weight_gradients_are_the_plain_ones_and_export_is_the_net(heads, loss):
    model = supervise(weights=0.0, heads=heads, loss=loss)
    same(grads(model.objective(X, Y), model.net), grads(plain(model), model.net), exact=True)
    exported = model.export()
    assert exported.state_dict().keys() == make_net().state_dict().keys()
    assert not any(m._forward_hooks for m in exported.modules())
    torch.testing.assert_close(exported(X), model(X))
    assert model.companion_parameters == sum(p.numel() for p in model.heads.parameters()) > 0


def test_companions_below_gamma_do_not_push():
    for decay, pushes in (("linear", False), ("hinge", False), ("none", True)):
        model = supervise(gamma=100.0, decay=decay)
        found, expected = grads(model.objective(X, Y), model.net), grads(plain(model), model.net)
        if pushes:
            assert not torch.equal(found[0], expected[0])
        else:
            same(found, expected, exact=True)


def test_squared_hinge_is_zero_where_all_margins_are_one():
    z = torch.tensor([[3.0, 2.0, 1.0], [0.0, 1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 1])
    assert squared_hinge(z, y) == 0
    assert torch.autograd.grad(squared_hinge(z, y), z)[0].abs().max() == 0
    torch.testing.assert_close(squared_hinge(torch.zeros(2, 3), y), torch.tensor(2.0))
    by_hand = torch.tensor(0.5**2 + 2.0**2)
    torch.testing.assert_close(squared_hinge(torch.tensor([[1.0, 0.5, 2.0]]), y[:1]), by_hand)
    assert gradcheck(lambda z: squared_hinge(z, Y[:4]), torch.randn(4, 3, dtype=torch.float64).requires_grad_())
    sequence = torch.randn(2, 3, 4)
    torch.testing.assert_close(
        cross_entropy(sequence, torch.zeros(2, 3).long()), -sequence.log_softmax(-1)[..., 0].mean()
    )


def test_gradient_is_the_sum_of_the_companions_and_the_outputs():
    model = supervise(weights=[0.3, 0.5, 0.7], gamma=0.1)
    total = grads(plain(model), model.net)
    for weight, value in zip(model.weights, model.values(model.run(X)[1], Y), strict=True):
        total = [t + 0.75 * weight * g for t, g in zip(total, grads(value, model.net), strict=True)]
    same(grads(model.objective(X, Y, progress=0.25), model.net), total)


def test_schedule_ends_at_zero():
    model = supervise(weights=0.4)
    assert [model.weight(0, t) for t in (0.0, 0.5, 1.0)] == [0.4, 0.2, 0.0]
    assert supervise(decay="hinge").weight(0, 1.0) == 0.1
    same(grads(model.objective(X, Y, 1.0), model.net), grads(plain(model), model.net))


def test_probe_and_local_stop_the_gradient():
    probe = supervise(gradient="probe")
    same(grads(probe.objective(X, Y), probe.net), grads(plain(probe), probe.net), exact=True)
    assert all(g.abs().max() > 0 for g in grads(probe.objective(X, Y), probe.heads))
    local = supervise(gradient="local")
    value = local.weights[0] * local.values(local.run(X)[1], Y)[0]
    same(grads(local.objective(X, Y), local.net)[:2], grads(value, local.net)[:2])


def test_tied_companions_share_the_last_layer():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)]
    net = nn.Sequential(nn.Embedding(7, 8), *blocks, nn.Linear(8, 7))
    tokens = torch.randint(7, (4, 5), generator=G)
    model = DeeplySupervised(net, ["1", "2"], example=tokens, heads="tied")
    torch.testing.assert_close(model.predict(tokens, 1), net[4](net[2](net[1](net[0](tokens)))))
    assert model.objective(tokens, tokens).isfinite() and model.companion_parameters == 0
    with pytest.raises(PomonaError, match="heads='tied' needs taps as wide as the input of '7'"):
        supervise(heads="tied")


def test_early_exits_stop_at_their_layer_and_report_cost():
    model = supervise().eval()
    called = []
    model.net[5].register_forward_hook(lambda *_: called.append(1))
    expected = model.companion(1, model.net[:4](X))
    torch.testing.assert_close(model.predict(X, 1), expected)
    torch.testing.assert_close(model.predict(X, "3"), expected)
    assert not called
    torch.testing.assert_close(model.predict(X), model.net(X))
    costs = model.costs(X[:1])
    assert costs[0] < costs[-1]
    never, always = model.early_exit(X, 1.1), model.early_exit(X, 0.0)
    assert never.exit.tolist() == [3] * 6 and never.cost > 1
    torch.testing.assert_close(never.logits, model(X))
    assert always.exit.tolist() == [0] * 6 and abs(always.cost - costs[0] / costs[-1]) < 1e-12


def test_rule_takes_the_steps_of_the_wrapped_network():
    task = load("digits", limit=200)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))
    settings = Training(optimizer="sgd", lr=0.1, momentum=0, weight_decay=0, clip=None, warmup=0, schedule="constant")
    rule = DeepSupervision(horizon=10, weights=0.5)
    done = fit(net, task, settings, budget=Budget("examples", 64 * 4), rule=rule, keep="last")
    model = rule.model(done.net, done.state)
    assert float(done.state["step"]) == 4

    other = DeepSupervision(horizon=10, weights=0.5)
    other.init(net, task.loss, (task.example, task.splits["train"].y[:2]))
    alone = copy.deepcopy(other.supervised).train()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    order = batches(len(task.splits["train"]), 64, 0)
    for step in range(4):
        index = next(order)
        optimizer.zero_grad()
        alone.objective(task.splits["train"].x[index], task.splits["train"].y[index], step / 10).backward()
        optimizer.step()
    for a, b in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert feature_probe(done.net, task, ["2", "4"]).keys() == {"2", "4"}
    assert set(alone.layer_gradient_norms(*task.splits["valid"])) == {"1.weight", "3.weight", "5.weight"}


def test_candidates_have_it_as_their_rule():
    candidates = [f"{net} rule=deep_supervision:horizon=10" for net in ("mlp width=8", "convnet width=2 norm=batch")]
    study = compare("digits", candidates=candidates, seeds=1, trials=1, examples=256, references=False)
    assert study.table()["status"].tolist() == ["ok", "ok"]
    assert (study.table()["parameters"] < 1000).all()  # companions do not count


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: supervise(heads="lineer"), "heads='lineer' is not known; did you mean linear"),
        (lambda: supervise(loss="hinge"), "loss='hinge' is not known"),
        (lambda: supervise(taps=["9"]), "taps='9' is not known"),
        (lambda: supervise(weights=[1.0]), "weights has 1 entries for 3 taps"),
        (lambda: supervise().predict(X, "2"), "exit='2' is not known"),
        (lambda: DeepSupervision(horizon=0), "horizon=0 must be 1 step or more"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(PomonaError, match=message):
        make()
