import copy

import pytest
import torch
from torch import fx, nn
from torch.autograd import gradcheck
from torch.func import functional_call, grad, stack_module_state, vmap

from pomona.errors import PomonaError
from pomona.nets.build import build
from pomona.nets.specs import Inputs, Outputs
from pomona.nn.evonorm import EvoNormB0, EvoNormB1, EvoNormB2, EvoNormS0, EvoNormS1, EvoNormS2, replace_norm_act

KINDS = [EvoNormB0, EvoNormB1, EvoNormB2, EvoNormS0, EvoNormS1, EvoNormS2]
X = torch.randn(4, 6, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def s0(v: float, **options) -> EvoNormS0:
    layer = EvoNormS0(6, 2, **options).double()
    nn.init.constant_(layer.v, v)
    return layer


def group_std(x: torch.Tensor, groups: int, eps: float = 1e-5) -> torch.Tensor:
    var = x.view(len(x), groups, -1).var(-1, correction=0)
    return (var + eps).sqrt().repeat_interleave(6 // groups, 1)[..., None, None]


def test_s0_is_half_a_group_norm_without_centring_and_tends_to_relu():
    torch.testing.assert_close(s0(0, groups=3)(X), 0.5 * X / group_std(X, 3))
    torch.testing.assert_close(s0(1e4, groups=2)(X), X.relu() / group_std(X, 2), atol=1e-3, rtol=0)
    torch.testing.assert_close(EvoNormS1(6, 2, groups=2).double()(X), s0(1, groups=2)(X))
    rms = X.view(4, 2, -1).square().mean(-1).add(1e-5).sqrt().repeat_interleave(3, 1)[..., None, None]
    torch.testing.assert_close(EvoNormS2(6, 2, groups=2).double()(X), X * X.sigmoid() / rms)


def test_b0_denominator_is_the_larger_deviation_when_v_is_0():
    layer = EvoNormB0(6, 2).double()
    nn.init.zeros_(layer.v)
    x = X * torch.tensor([0.1, 1, 1, 5], dtype=torch.float64).view(4, 1, 1, 1)
    batch = (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    instance = (x.var((2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(layer(x), x / torch.maximum(batch, instance))
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * (batch.flatten() ** 2 - 1e-5))
    square = (x.square().mean((2, 3), keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(EvoNormB1(6, 2).double()(x), x / torch.maximum(batch, (x + 1) * square))
    torch.testing.assert_close(EvoNormB2(6, 2).double()(x), x / torch.maximum(batch, square - x))


def test_only_b0_in_training_depends_on_the_rest_of_the_batch():
    b0 = EvoNormB0(6, 2).double()
    b0(X)
    torch.testing.assert_close(s0(1)(X)[:2], s0(1)(X[:2]))
    assert not torch.allclose(b0(X)[:2], b0(X[:2]))
    b0.eval()
    torch.testing.assert_close(b0(X)[:2], b0(X[:2]))


def test_s0_is_invariant_to_scale_only_when_v_is_0():
    exact, gated = s0(0, eps=1e-12), s0(1, eps=1e-12)
    torch.testing.assert_close(exact(10 * X), exact(X))
    assert (gated(10 * X) - gated(X)).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_zero_variance_stays_finite(kind):
    layer = kind(6, 2)
    x = torch.randn(1, 6, 1, 1, generator=torch.Generator().manual_seed(0)).requires_grad_()
    layer(x).sum().backward()
    assert torch.isfinite(layer(x)).all() and torch.isfinite(x.grad).all()
    assert torch.isfinite(EvoNormS0(6, 2, groups=6)(torch.full((2, 6, 1, 1), 3.0))).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dims", [0, 1, 2])
def test_gradients_shapes_and_half_precision(kind, dims):
    layer = kind(6, dims).double()
    x = X[(slice(2), slice(None), *[slice(3)] * dims, *[0] * (2 - dims))].requires_grad_()
    assert gradcheck(lambda x: functional_call(layer, {}, (x,)), (x,), atol=1e-4)
    assert layer(x).shape == x.shape
    half = copy.deepcopy(layer).bfloat16()
    assert half(x.bfloat16()).dtype == half.bias.dtype == torch.bfloat16
    before = layer.running_var.clone() if hasattr(layer, "running_var") else None
    assert len(layer(x[:0])) == 0
    assert before is None or torch.equal(layer.running_var, before)


def test_b0_trains_in_a_stack():
    layers = [EvoNormB0(6, 2).double() for _ in range(3)]
    parameters, buffers = stack_module_state(layers)

    def run(parameters, buffers, x):
        after = {name: b.clone() for name, b in buffers.items()}
        return functional_call(layers[0], (parameters, after), (x,)).square().sum(), after

    x = torch.stack([X, 2 * X, 3 * X])
    grads, after = vmap(grad(run, has_aux=True))(parameters, buffers, x)
    for i in range(3):
        alone = EvoNormB0(6, 2).double()
        alone(x[i]).square().sum().backward()
        torch.testing.assert_close(after["running_var"][i], alone.running_var)
        torch.testing.assert_close(grads["v"][i], alone.v.grad)


class Functional(nn.Module):
    """Activations as a function and as one module used twice; the last norm has none."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.first, self.second, self.third = nn.BatchNorm2d(6), nn.GroupNorm(2, 6), nn.BatchNorm2d(6)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(self.conv(x)))
        x = x + self.act(self.second(x))
        return self.act(self.third(x) + x)


def test_pairs_are_replaced_in_sequentials_and_in_graphs():
    x = torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(1))
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    ).eval()
    new = replace_norm_act(plain, EvoNormS0)
    assert [type(m) for m in new] == [nn.Conv2d, EvoNormS0, nn.Identity, nn.Conv2d, nn.BatchNorm2d]
    assert new[1].dims == 2 and not new.training and isinstance(plain[1], nn.BatchNorm2d)

    net = Functional()
    new = replace_norm_act(net, EvoNormB0, dims=2)
    assert isinstance(new, fx.GraphModule)
    assert isinstance(new.first, EvoNormB0) and isinstance(new.second, EvoNormB0)
    assert isinstance(new.third, nn.BatchNorm2d)
    h = new.first(new.conv(x))
    h = h + new.second(h)
    torch.testing.assert_close(new(x), (new.third(h) + h).relu())
    with pytest.raises(PomonaError, match="net has no norm that an activation follows"):
        replace_norm_act(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), EvoNormS0)


@pytest.mark.parametrize("backbone", ["mlp", "convnet width=8", "resnet width=8 depth=2"])
def test_backbones_take_it_for_norm_and_activation(backbone):
    class Sized:
        inputs, outputs = Inputs("image", (1, 8, 8)), Outputs("classes", 3)

    net = build(f"{backbone} norm=evonorm_s0 act=identity", Sized())
    assert any(isinstance(m, EvoNormS0) for m in net.modules())
    assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    dense = replace_norm_act(build(f"{backbone} norm=batch", Sized()), EvoNormB0)
    assert dense(torch.randn(2, 1, 8, 8)).isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EvoNormS0(6, groups=4), "features=6 cannot be divided into groups=4 equal parts"),
        (lambda: EvoNormB0(6, momentum=2), r"momentum=2 must be in \[0, 1\]"),
        (lambda: EvoNormB0(6, 2)(X[:, :4]), "EvoNormB0 takes 6 features on axis -3; its input has shape"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(PomonaError, match=message):
        make()
