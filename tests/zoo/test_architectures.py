import tempfile
from pathlib import Path

import pytest
import torch

from pomona.zoo import code as codes
from pomona.zoo import settings, worker

CODES = codes.shipped()
SHAPES = {"table": (30,), "series": (1, 40), "image": (1, 8, 8), "colour": (3, 12, 10)}


def loaded(code):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.py"
        path.write_text(code)
        return worker.load(path)


def network(name, shape, seed=0, outputs=4):
    module = loaded(codes.contract(CODES[name]))
    names = module.supported_hyperparameters()
    prm = settings.mapped(dict.fromkeys(names, 0.5) | {"batch": 32})
    torch.manual_seed(seed)
    return module.Net(shape, (outputs,), prm, torch.device("cpu")), prm, names


def test_at_least_fifteen_architectures_of_different_code_are_shipped():
    assert len(CODES) >= 15
    assert len({codes.identity(code) for code in CODES.values()}) == len(CODES)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("name", CODES)
def test_architectures_take_tables_series_and_images(name, kind):
    net, _, _ = network(name, SHAPES[kind])
    net.eval()
    x = torch.randn(5, *SHAPES[kind])
    assert net(x).shape == (5, 4)
    assert torch.allclose(net(x)[:2], net(x[:2]), atol=1e-5)
    assert net(x[:0]).shape == (0, 4)


@pytest.mark.parametrize("name", CODES)
def test_architectures_learn_a_separable_problem(name):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 1, 8, 8, generator=generator)
    y = (x[:, 0, :4].mean((1, 2)) > x[:, 0, 4:].mean((1, 2))).long()
    x[:, 0, :4] += y[:, None, None]
    net, prm, names = network(name, SHAPES["image"], outputs=2)
    assert names <= prm.keys()
    net.train_setup(prm)
    before = torch.nn.functional.cross_entropy(net(x), y).item()
    for _ in range(8):
        net.train()
        net.learn(list(zip(x.split(32), y.split(32), strict=True)))
    net.eval()
    assert (net(x).argmax(-1) == y).double().mean() > 0.85
    assert torch.nn.functional.cross_entropy(net(x), y).item() < before


@pytest.mark.parametrize("name", CODES)
def test_every_parameter_gets_a_gradient(name):
    net, _, _ = network(name, SHAPES["series"])
    net.train()
    net(torch.randn(6, 1, 40)).square().sum().backward()
    assert [key for key, value in net.named_parameters() if value.grad is None] == []


def test_factorization_equals_the_sum_over_pairs():
    net, _, _ = network("factorization", (5,))
    body, x = net.body.double(), torch.randn(3, 5, dtype=torch.float64)
    factors = body.factors.unflatten(-1, (4, -1))  # (features, outputs, rank)
    pairs = sum(
        (factors[i] * factors[j]).sum(-1) * (x[:, i] * x[:, j])[:, None] for i in range(5) for j in range(i + 1, 5)
    )
    assert torch.allclose(body(x), body.linear(x) + pairs)


def test_code_without_training_is_completed_and_full_code_is_left_alone():
    full = CODES["transformer"]
    assert codes.contract(full) == full
    done = codes.contract(CODES["mlp"])
    assert 'return {"depth", "dropout", "lr", "momentum", "width"}' in done
    assert codes.contract(done) == done


def factory(in_shape, out_shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(in_shape[0], out_shape[0]))  # noqa: F821


def test_factories_and_modules_of_code_are_adapted():
    text, name = codes.source(factory)
    assert name == "factory"
    module = loaded(codes.contract(text))
    net = module.Net((3,), (2,), {"lr": 0.1, "momentum": 0.9}, "cpu")
    assert net(torch.zeros(4, 3)).shape == (4, 2)
    assert module.supported_hyperparameters() == {"lr", "momentum"}
    assert codes.source(settings)[1] == "settings"


@pytest.mark.parametrize(
    "code, message",
    [
        ("def f(:", "code is not valid Python: .* in line 1"),
        ("x = 1", "code has no class Net"),
        ("def a(): pass\ndef b(): pass", "code has no class Net"),
        ("class Net:\n    def learn(self, d): pass", r"Net lacks train_setup\(\)"),
        (
            "class Net:\n    def learn(self, d): pass\n    def train_setup(self, p): pass",
            "code lacks a function supported_hyperparameters",
        ),
    ],
)
def test_code_that_breaks_the_contract_is_explained(code, message):
    from pomona.errors import PomonaError

    with pytest.raises(PomonaError, match=message):
        codes.contract(code)


def test_quality_falls_with_poor_code_and_is_high_for_what_is_shipped():
    poor = "import os\nfrom math import *\n" + "x = 1  # " + "long " * 40 + "\ntry:\n    x\nexcept:\n    x\n"
    assert codes.quality(poor) < 0.6
    assert min(codes.quality(code) for code in CODES.values()) > 0.95


def test_op_counts_count_calls_and_operators():
    counts = codes.op_counts("y = nn.Linear(3, 4)(relu(x) @ w) + relu(x) @ w")
    assert counts == {"Linear": 1, "relu": 2, "MatMult": 2, "Add": 1}
