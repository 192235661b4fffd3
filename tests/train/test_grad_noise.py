import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pomona.data.task import tensors
from pomona.errors import PomonaError
from pomona.nets.specs import Inputs, Outputs
from pomona.train.budget import Budget
from pomona.train.grad_noise import AnnealedGradientNoise, FixedGradientNoise, deep_mlp
from pomona.train.loop import fit
from pomona.train.settings import Training


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def task(n=60):
    x = torch.randn(n, 4, generator=generator())
    y = (x[:, 0] > 0).long()
    part = n // 3
    parts = [(x[i * part : (i + 1) * part], y[i * part : (i + 1) * part]) for i in range(3)]
    return tensors("signs", Inputs("table", (4,)), Outputs("classes", 2, ("a", "b")), *parts)


def test_variance_starts_at_eta_and_decays_as_a_power():
    noise = AnnealedGradientNoise(eta=0.3, gamma=0.55)
    assert noise.variance(0) == 0.3
    assert [noise.variance(t) * (1 + t) ** 0.55 for t in (1, 10, 1000)] == pytest.approx([0.3] * 3)


@pytest.mark.parametrize("step", [0, 7, 500])
def test_added_noise_has_the_stated_variance_and_no_mean(step):
    clean = torch.linspace(-1, 1, 100_000, dtype=torch.float64).reshape(100, 1000)
    noise = AnnealedGradientNoise(eta=0.3)
    added = noise({"w": clean}, step, generator(1))["w"] - clean
    sigma2 = 0.3 / (1 + step) ** 0.55
    assert float(added.var()) == pytest.approx(sigma2, rel=0.02)
    assert abs(float(added.mean())) < 4 * (sigma2 / added.numel()) ** 0.5


def test_zero_eta_is_bit_identical_to_no_transform():
    net, training = deep_mlp(4, 2, depth=2, width=8), Training(device="cpu", batch_size=5)
    plain, silent, noisy = (
        fit(net, task(), training, budget=Budget("epochs", 3), transforms=t, keep="last").net
        for t in ([], [AnnealedGradientNoise(0.0)], [AnnealedGradientNoise(0.1)])
    )
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), silent.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(plain.parameters(), noisy.parameters(), strict=True))


def test_a_zero_network_moves_only_its_last_bias_without_noise():
    net = deep_mlp(4, 2, depth=3, width=8, init="zero").double()
    x = torch.randn(10, 4, generator=generator(), dtype=torch.float64)
    F.cross_entropy(net(x), torch.tensor([0, 1, 1, 0, 1, 1, 1, 0, 0, 1])).backward()
    last = net[-1].bias
    for parameter in net.parameters():
        assert bool((parameter.grad == 0).all()) == (parameter is not last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    AnnealedGradientNoise(0.01).attach(optimizer)
    optimizer.step()
    assert all(bool((parameter != 0).all()) for parameter in net.parameters())


def test_state_round_trip_gives_the_same_next_noise():
    weight = nn.Parameter(torch.zeros(5))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    attached = AnnealedGradientNoise().attach(optimizer, seed=4)

    def step():
        weight.grad = torch.ones(5)
        optimizer.step()
        return weight.grad.clone()

    for _ in range(100):
        step()
    saved = attached.state_dict()
    first = step()
    resumed = AnnealedGradientNoise().attach(optimizer, seed=99)
    attached.detach()
    assert not torch.equal(step(), first)
    resumed.load_state_dict(saved)
    assert saved["step"] == 100
    assert torch.equal(step(), first)
    resumed.detach()
    assert torch.equal(step(), torch.ones(5))


def test_a_vector_of_noise_scales_gives_each_member_its_own():
    grads = {"w": torch.zeros(3, 200, 100), "b": torch.zeros(3)}
    noisy = AnnealedGradientNoise(1.0, noise_scale=[0.0, 1.0, 3.0])(grads, 0, generator())
    assert noisy["w"].flatten(1).std(1).tolist() == pytest.approx([0, 1, 3], rel=0.03)
    assert noisy["b"][0] == 0 and bool((noisy["b"][1:] != 0).all())
    assert not bool(grads["w"].any()), "pure: what is given stays"


def test_only_chosen_gradients_get_noise_and_relative_noise_follows_each_layer():
    grads = {"w": torch.full((300, 300), 2.0), "b": torch.ones(300)}
    noisy = AnnealedGradientNoise(0.25, params="matrices", per_layer_relative=True)(grads, 0, generator())
    assert torch.equal(noisy["b"], grads["b"])
    assert float((noisy["w"] - 2).std()) == pytest.approx(0.5 * 2, rel=0.02)
    named = AnnealedGradientNoise(0.25, params=lambda name, grad: name == "b")(grads, 0, generator())
    assert torch.equal(named["w"], grads["w"]) and not torch.equal(named["b"], grads["b"])
    members = {"w": torch.stack([torch.ones(300, 300), torch.full((300, 300), 4.0)])}
    both = AnnealedGradientNoise(1.0, per_layer_relative=True, noise_scale=[1.0, 1.0])(members, 0, generator())
    assert (both["w"] - members["w"]).flatten(1).std(1).tolist() == pytest.approx([1, 4], rel=0.02)


def test_fixed_noise_does_not_decay():
    noise = FixedGradientNoise(0.2)
    assert noise.variance(0) == noise.variance(1000) == pytest.approx(0.04)


def test_noise_after_clipping_is_the_default():
    assert AnnealedGradientNoise().after_clip
    assert not AnnealedGradientNoise(where="pre").after_clip


@pytest.mark.parametrize(("init", "scale"), [("kaiming", (2 / 50) ** 0.5), ("small", 0.1), ("zero", 0.0)])
def test_deep_mlp_has_the_stated_weights(init, scale):
    net = deep_mlp(784, 10, init=init)
    layers = [m for m in net if isinstance(m, nn.Linear)]
    assert len(layers) == 21
    hidden = torch.cat([m.weight.detach().flatten() for m in layers[1:20]])
    assert float(hidden.std()) == pytest.approx(scale, rel=0.03)
    assert not any(bool(m.bias.any()) for m in layers)
    assert net(torch.ones(0, 1, 28, 28)).shape == (0, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": -1.0}, "eta=-1.0 must be 0 or more"),
        ({"where": "post-clip"}, "where='post-clip' is not known"),
        ({"params": "biases"}, "params='biases' is not known"),
        ({"noise_scale": [-1.0]}, "noise_scale="),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(PomonaError, match=message):
        AnnealedGradientNoise(**options)


def test_unstacked_gradients_with_member_scales_are_refused():
    with pytest.raises(PomonaError, match="noise_scale has 3 members"):
        AnnealedGradientNoise(noise_scale=[1.0, 2.0, 3.0])({"w": torch.zeros(4, 4)}, 0, generator())
