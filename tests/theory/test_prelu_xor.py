import pytest
import torch
from torch import nn

from pomona.errors import PomonaError
from pomona.nn.prelu import PReLU
from pomona.theory.prelu_xor import (
    MODELS,
    SingleNeuron,
    TwoLayerXOR,
    explain,
    grid_solutions,
    level_crossings,
    separates,
    xor_points,
    xor_study,
)

Z = torch.linspace(-3, 3, 13, dtype=torch.float64)


def neuron(w: tuple[float, float], slope: float) -> SingleNeuron:
    model = SingleNeuron(PReLU(init=slope)).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor(w))
    return model


def test_opposite_weights_and_slope_minus_one_give_xor_exactly():
    x, y = xor_points("01")
    assert neuron((1.0, -1.0), -1.0)(x).tolist() == y.tolist() == [0, 1, 1, 0]
    x, y = xor_points("pm1")
    assert (0.5 * neuron((1.0, -1.0), -1.0)(x)).tolist() == y.tolist()
    for slope in (-0.3, -2.0):
        x, y = xor_points("01")
        assert separates(neuron((0.7, -0.7), slope)(x), y)


def test_equal_signs_end_at_the_linear_fit():
    x, y = xor_points("01")
    model = neuron((0.4, 0.7), 0.25)
    (model(x) - y).square().mean().backward()
    assert model.act.slope.grad == 0

    class Positive(SingleNeuron):
        def __init__(self) -> None:
            super().__init__()
            nn.init.uniform_(self.weight, 0.05, 1)

    study = xor_study(Positive, [0.5], 5, 120, init="default")
    assert not study.solved.any()
    torch.testing.assert_close(study.parameters["weight"], torch.full_like(study.parameters["weight"], 1 / 3))
    torch.testing.assert_close(study.loss / 2, torch.full_like(study.loss, 1 / 6))
    assert (study.parameters["act.slope"] == 0.25).all()


def test_prelu_is_abs_relu_identity_and_a_maximum():
    def f(a: float) -> torch.Tensor:
        return PReLU(init=a).double()(Z)

    assert torch.equal(f(-1), Z.abs()) and torch.equal(f(0).abs(), Z.relu()) and torch.equal(f(1), Z)
    for a in (-2.0, 0.5, 1.0):
        torch.testing.assert_close(f(a), torch.maximum(Z, a * Z))


def test_no_monotone_activation_separates_xor():
    for coding in ("01", "pm1"):
        assert grid_solutions(torch.tanh, coding=coding) == 0
        assert grid_solutions(torch.relu, coding=coding) == 0
        assert grid_solutions(torch.abs, coding=coding) > 0
    assert grid_solutions(lambda z: z * torch.cos(z)) > 0


@pytest.mark.parametrize("optimiser", ["gd", "sgd", "adam"])
@pytest.mark.parametrize("model", MODELS)
def test_each_member_is_trained_as_alone(optimiser, model):
    study = xor_study(model, [0.05, 0.2], 3, 12, optimiser=optimiser, seed=4)
    start = xor_study(model, [1e-300], 3, 1, optimiser="gd", seed=4).parameters
    x, y = xor_points("01")
    draws = torch.Generator().manual_seed(4)
    torch.randint(2**31, (), generator=draws)
    alone = MODELS[model]().double()
    with torch.no_grad():
        for name, p in alone.named_parameters():
            p.copy_(start[name][0, 2])
        for name, p in alone.named_parameters():  # the points come after the weights of all members
            if not name.startswith("act"):
                torch.rand((3, *p.shape), generator=draws, dtype=p.dtype)
    maker = torch.optim.Adam if optimiser == "adam" else torch.optim.SGD
    chosen = maker(alone.parameters(), lr=0.2)
    for _ in range(12):
        one = torch.randint(4, (), generator=draws)[None] if optimiser == "sgd" else slice(None)
        chosen.zero_grad()
        (alone(x[one]) - y[one]).square().mean().backward()
        chosen.step()
    for name, p in alone.named_parameters():
        torch.testing.assert_close(study.parameters[name][1, 2], p.detach())


def test_success_is_told_with_its_step_and_area():
    study = xor_study("prelu", [0.02, 0.2], 40, 250, coding="pm1", seed=1)
    assert study.rate[1] > 0.95
    assert ((study.converged >= 0) == study.solved).all()
    assert 0 < study.area() <= 1 and study.area() == pytest.approx(
        (study.area(slice(20)) + study.area(slice(20, 40))) / 2
    )
    again = xor_study("prelu", [0.02, 0.2], 40, 250, coding="pm1", seed=1)
    assert torch.equal(study.converged, again.converged)
    half = xor_study("prelu", [0.3], 200, 250, coding="01")
    signs = (half.parameters["weight"][0].prod(-1) < 0) == half.solved[0]
    assert signs.double().mean() > 0.95


def test_two_half_planes_explain_it():
    assert level_crossings(-1.0, 0.5) == [-0.5, 0.5]
    assert level_crossings(0.25, 0.5) == [0.5] and level_crossings(0.25, -0.5) == [-2.0]
    picture = explain()
    assert picture.solved and len(picture.crossings) == 2
    assert not explain(slope=0.25).solved
    torch.testing.assert_close(picture.output, (picture.x[:, None] - picture.x[None]).abs())
    assert torch.equal(picture.above, picture.output > 0.5)


def test_models_have_three_or_nine_numbers():
    counts = {name: sum(p.numel() for p in make().parameters()) for name, make in MODELS.items()}
    assert counts == {"prelu": 3, "gcu": 3, "mlp_tanh": 9, "mlp_relu": 9}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: xor_study(coding="10"), "coding='10' is not known"),
        (lambda: xor_study("prelus"), "model='prelus' is not known; did you mean prelu"),
        (lambda: xor_study(optimiser="rms"), "optimiser='rms' is not known"),
        (lambda: xor_study(lrs=[0.1, 0.1]), r"lrs=\(0.1, 0.1\) must be increasing numbers above 0"),
        (lambda: xor_study(n_init=0), "n_init=0 must be a number above 0"),
        (lambda: level_crossings(1.0, 0.0), "level=0 is met by every slope"),
        (lambda: explain((0.0, 0.0)), "gives a constant output"),
        (lambda: TwoLayerXOR()(torch.zeros(1, 3)), "TwoLayerXOR takes 2 features on axis -1"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(PomonaError, match=message):
        make()
