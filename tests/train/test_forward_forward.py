import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pomona.data.task import tensors
from pomona.errors import PomonaError
from pomona.nets.build import build
from pomona.nets.specs import Inputs, Outputs
from pomona.train.budget import Budget
from pomona.train.forward_forward import ForwardForward, hybrid
from pomona.train.loop import fit
from pomona.train.rule import Rule, split_tensors
from pomona.train.settings import Training

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(10, 6, generator=G, dtype=torch.float64), torch.arange(10) % 3
NOISE = torch.rand(10, 1, generator=G, dtype=torch.float64)


def mlp(depth=3, seed=0, head=True):
    torch.manual_seed(seed)
    layers = []
    for i in range(depth):
        layers += [nn.Linear(6 if i == 0 else 8, 8), nn.ReLU()]
    return nn.Sequential(*layers, *([nn.Linear(8, 3)] if head else [])).double()


def bound(net, x=X, **options):
    rule = ForwardForward(**{"label": "embed", **options})
    return rule, rule.init(net, F.cross_entropy, (x[:2], Y[:2]))


def update(rule, state, net, batch=(X, Y), noise=NOISE):
    return rule.grads(*split_tensors(net), state, batch, noise)


def image_task(n=150):
    """Three bright bars in noisy 6 x 6 images."""
    y = torch.arange(n) % 3
    x = 0.3 * torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    x[torch.arange(n), 0, 1 + 2 * y] += 1
    third = n // 3
    parts = [(x[i * third : (i + 1) * third], y[i * third : (i + 1) * third]) for i in range(3)]
    return tensors("bars", Inputs("image", (1, 6, 6)), Outputs("classes", 3, ("a", "b", "c")), *parts)


def test_it_is_a_rule():
    assert isinstance(ForwardForward(), Rule)


@pytest.mark.parametrize("options", [{"collaborate": False}, {"gamma_layers": "previous"}, {"gamma_layers": "all"}])
def test_gradient_of_a_block_is_that_of_its_own_loss(options):
    net = mlp()
    rule, state = bound(net, **options)
    got = update(rule, state, net).grads
    params, _ = split_tensors(net)
    for i, name in enumerate(["0.weight", "2.weight", "4.weight"]):
        own = torch.func.grad(lambda p, i=i: rule.losses({**params, **p}, (X, Y), NOISE)[i])(dict(params))
        torch.testing.assert_close(got[name], own[name])
        assert all(not bool(own[other].any()) for other in params if int(other[0]) != 2 * i)
    assert "6.weight" not in got, "the head takes no part"


def test_with_previous_layers_later_weights_do_not_matter():
    net = mlp()
    rule, state = bound(net, gamma_layers="previous")
    everyone, with_state = bound(net, gamma_layers="all")
    before, all_before = update(rule, state, net).grads, update(everyone, with_state, net).grads
    with torch.no_grad():
        net[4].weight.mul_(1.5)
    after, all_after = update(rule, state, net).grads, update(everyone, with_state, net).grads
    for name in ("0.weight", "0.bias", "2.weight"):
        assert torch.equal(before[name], after[name])
        assert not torch.equal(all_before[name], all_after[name])


def test_collaboration_scales_each_samples_plain_gradient():
    net = mlp()
    plain, _ = bound(net, collaborate=False, goodness="mean")
    together, _ = bound(net, goodness="mean")
    params, _ = split_tensors(net)
    for one in range(3):
        batch, noise = (X[one : one + 1], Y[one : one + 1]), NOISE[one : one + 1]
        labels = torch.cat([batch[1], plain.wrong_labels(params, *batch, noise)])
        h = plain.inputs(params, torch.cat([batch[0]] * 2), labels)[0]
        for real, sign in ((0, 1.0), (1, -1.0)):
            signs = torch.tensor([sign], dtype=torch.float64)

            def gradients(rule, h=h[real : real + 1], signs=signs):
                total = lambda p: torch.stack(rule.block_losses(rule.run(p, h)[0], signs)).sum()  # noqa: E731
                return torch.func.grad(total)(params)

            a, b = gradients(plain), gradients(together)
            goods = torch.stack([plain.good(out)[0] for out in plain.run(params, h[real : real + 1])[0]])
            ratio = torch.sigmoid(-sign * (goods.sum() - 3)) / torch.sigmoid(-sign * (goods - 1))
            for i, name in enumerate(["0.weight", "2.weight", "4.weight"]):
                torch.testing.assert_close(b[name], ratio[i] * a[name])


def test_a_single_block_is_plain_forward_forward():
    net = mlp(depth=1)
    rule, state = bound(net)
    plain, plain_state = bound(net, collaborate=False)
    a, b = update(rule, state, net), update(plain, plain_state, net)
    assert all(torch.equal(a.grads[name], b.grads[name]) for name in a.grads) and torch.equal(a.loss, b.loss)


def test_loss_is_the_logistic_loss_of_goodness_against_the_number_of_units():
    net = mlp(depth=1)
    rule, state = bound(net, collaborate=False, norm="none")
    wrong = rule.wrong_labels({}, X, Y, NOISE)
    assert bool((wrong != Y).all()) and bool(((wrong >= 0) & (wrong < 3)).all())
    value = 0.0
    for labels, sign in ((Y, 1), (wrong, -1)):
        x = X.clone()
        x[:, :3] = F.one_hot(labels, 3) * X.abs().amax(1, keepdim=True)
        value = value + F.softplus(-sign * (net[:2](x).square().sum(1) - 8)).mean() / 2
    torch.testing.assert_close(update(rule, state, net).loss, value.detach())


def test_rms_normalisation_hides_the_scale_of_a_blocks_input():
    net = mlp()
    rule, _ = bound(net)
    params, _ = split_tensors(net)
    h = X
    for c in (0.5, 7.0):
        for a, b in zip(rule.run(params, h)[0], rule.run(params, c * h)[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    # and a block's output scale does not reach the next block
    scaled = {**params, "0.weight": 3 * params["0.weight"], "0.bias": 3 * params["0.bias"]}
    torch.testing.assert_close(rule.run(scaled, h)[0][1], rule.run(params, h)[0][1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("label", ["embed", "add"])
def test_predict_equals_one_pass_for_each_label(label):
    net = mlp()
    rule, state = bound(net, label=label)
    params, buffers = split_tensors(net)
    tensors_ = {**params, **state}
    logits = rule.predict(params, buffers, state, X)
    for k in (2, 0, 1):
        outputs, _ = rule.run(tensors_, rule.inputs(tensors_, X, torch.full((10,), k))[0])
        torch.testing.assert_close(logits[:, k], sum(rule.good(h) for h in outputs[1:]))
    full, _ = bound(net, label=label, skip_first=False)
    assert bool((full.predict(params, buffers, state, X) > logits).all())
    assert rule.predict(params, buffers, state, X[:0]).shape == (0, 3)


def test_hard_negatives_follow_the_networks_own_goodness():
    net = mlp()
    rule, _ = bound(net, negatives="hard", goodness="mean")
    params, _ = split_tensors(net)
    x = X[:1].expand(30_000, -1)
    y = torch.zeros(30_000, dtype=torch.long)
    drawn = rule.wrong_labels(params, x, y, torch.rand(30_000, 1, generator=torch.Generator().manual_seed(2)).double())
    expected = rule.predict(params, {}, {}, X[:1])[0, 1:].softmax(0)
    shares = torch.bincount(drawn, minlength=3) / 30_000
    assert shares[0] == 0
    torch.testing.assert_close(shares[1:].double(), expected, atol=0.015, rtol=0)


def test_population_by_vmap_equals_a_loop():
    nets = [mlp(seed=s) for s in range(3)]
    rule, state = bound(nets[0], negatives="hard", label="add")
    params, _ = torch.func.stack_module_state(nets)
    params = {name: p.detach() for name, p in params.items()}
    stacked = torch.vmap(rule.grads, in_dims=(0, 0, None, None, None))(params, {}, state, (X, Y), NOISE)
    logits = torch.vmap(rule.predict, in_dims=(0, 0, None, None))(params, {}, state, X)
    for i, net in enumerate(nets):
        alone = update(rule, state, net)
        torch.testing.assert_close(stacked.loss[i], alone.loss)
        for name, gradient in alone.grads.items():
            torch.testing.assert_close(stacked.grads[name][i], gradient)
        torch.testing.assert_close(logits[i], rule.predict(*split_tensors(net), state, X))


def test_gradients_match_finite_differences():
    net = mlp(depth=1)
    rule, _ = bound(net)
    params, _ = split_tensors(net)
    bias = params.pop("0.bias").clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda b: rule.losses({**params, "0.bias": b}, (X, Y), NOISE)[0], (bias,))


def accuracy(result, task):
    x, y = task.splits["test"]
    return float((result.predict(x).argmax(1) == y).float().mean())


@pytest.mark.parametrize(
    "options",
    [
        # with summed goodness the first block soon explains everything, and the second learns little
        {"skip_first": False},
        {"skip_first": False, "negatives": "hard"},
        {"goodness": "mean"},
        {"collaborate": False},
        {"label": "none"},
    ],
)
def test_it_learns_images_on_the_mlp_backbone(options):
    task = image_task()
    net = build("mlp width=32 depth=2", task)
    settings = Training(device="cpu", lr=5e-3, batch_size=25, patience=None)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    rule = ForwardForward(**options)
    result = fit(net, task, settings, budget=Budget("epochs", 100), rule=rule)
    assert accuracy(result, task) > 0.85
    trained = result.net.state_dict()
    assert all(torch.equal(net.state_dict()[name], t) for name, t in before.items())
    assert torch.equal(trained["head.weight"], before["head.weight"]) == (options.get("label") != "none")


def test_it_learns_tables_whose_labels_are_added_to_the_stem():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(150) % 3
    x = 2 * torch.randn(3, 4, generator=g)[y] + 0.5 * torch.randn(150, 4, generator=g)
    parts = [(x[i : i + 50], y[i : i + 50]) for i in (0, 50, 100)]
    task = tensors("blobs", Inputs("table", (4,)), Outputs("classes", 3, ("a", "b", "c")), *parts)
    net = build("mlp width=64 depth=2", task)
    settings = Training(device="cpu", lr=5e-3, batch_size=25)
    result = fit(net, task, settings, budget=Budget("epochs", 60), rule=ForwardForward())
    assert set(result.state) == {"label_codes"}
    assert accuracy(result, task) > 0.85


def test_convolutional_blocks_learn_too():
    task = image_task()
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten())
    settings = Training(device="cpu", lr=5e-3, batch_size=25, patience=None)
    rule = ForwardForward(classes=3, goodness="mean", skip_first=False)
    result = fit(nn.Sequential(*layers), task, settings, budget=Budget("epochs", 60), rule=rule)
    assert result.curve[-1]["train_loss"] < 0.9 * result.curve[0]["train_loss"]
    assert accuracy(result, task) > 0.5, "a third is chance"


def test_hybrids_mix_patches_of_two_images():
    x = torch.stack([torch.zeros(1, 16, 16), torch.ones(1, 16, 16)])
    mixed = hybrid(x, torch.rand(2, 256, generator=torch.Generator().manual_seed(0)))
    assert set(mixed.unique().tolist()) == {0.0, 1.0}
    assert 0.1 < float(mixed[0].mean()) < 0.9
    changes = (mixed[0].diff(dim=-1) != 0).float().mean()
    assert float(changes) < 0.25, "patches, not pixels"
    assert hybrid(torch.randn(4, 3, 9), torch.rand(4, 9)).shape == (4, 3, 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"goodness": "max"}, "goodness='max' is not known"),
        ({"theta": "layers"}, "theta='layers' must be units or a number"),
        ({"label": "append"}, "label='append' is not known"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(PomonaError, match=message):
        ForwardForward(**options)


def test_unsuitable_tasks_and_networks_are_refused():
    with pytest.raises(PomonaError, match="needs class targets"):
        ForwardForward().init(mlp(), F.mse_loss, (X[:2], X[:2]))
    with pytest.raises(PomonaError, match="6 inputs cannot hold a one-hot label of 9"):
        bound(mlp(), classes=9)
    with pytest.raises(PomonaError, match="label=none needs a network whose head"):
        bound(mlp(head=False), label="none")
    with pytest.raises(PomonaError, match="has no blocks"):
        bound(nn.Linear(6, 3).double())
