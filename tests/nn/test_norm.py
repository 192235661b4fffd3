import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pomona.errors import PomonaError
from pomona.nn.norm import (
    NORMS,
    BatchNorm,
    DyT,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    Norm,
    RMSNorm,
    ScaleNorm,
    is_norm,
    standardize,
    weight_norm,
)

SHAPES = {0: (4, 3, 8), 1: (4, 8, 5), 2: (4, 8, 5, 3)}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def perturbed(norm):
    norm = norm.double()
    with torch.no_grad():
        for k, p in enumerate(norm.parameters()):
            p.add_(0.3 * draw(*p.shape, seed=k))
    return norm


def test_layer_norm_matches_torch_forward_and_backward():
    x, upstream = draw(6, 5, 4), draw(6, 5, 4, seed=1)
    for shape in (4, (5, 4)):
        norm = perturbed(LayerNorm(shape))
        results = []
        for function in (norm, lambda v, n=norm: F.layer_norm(v, n.weight.shape, n.weight, n.bias, n.eps)):
            leaf = x.clone().requires_grad_()
            y = function(leaf)
            results.append((y, *torch.autograd.grad(y, (leaf, norm.weight, norm.bias), upstream)))
        for ours, theirs in zip(*results, strict=True):
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    single = LayerNorm(4)
    assert torch.allclose(single(x.float()), F.layer_norm(x.float(), (4,)), rtol=0, atol=1e-6)


def test_layer_norm_is_invariant_to_scale_and_shift():
    norm = perturbed(LayerNorm(8, eps=1e-30))
    x = draw(5, 8)
    assert torch.allclose(norm(3.7 * x - 2.2), norm(x), atol=1e-12)


def test_zero_mean_and_unit_variance_before_gain_and_bias():
    y = LayerNorm(64, eps=1e-12, affine=False)(5 * draw(7, 64) + 3)
    assert y.mean(-1).abs().max() < 1e-12
    assert torch.allclose(y.var(-1, correction=0), torch.ones(7, dtype=torch.float64))


def test_train_and_eval_agree_and_batch_size_one_works():
    norm = perturbed(LayerNorm(8))
    x = draw(5, 8)
    assert torch.equal(norm.train()(x), copy.deepcopy(norm).eval()(x))
    assert torch.allclose(norm(x[:1]), norm(x)[:1], atol=1e-14)


def test_rms_norm_equals_layer_norm_on_zero_mean_input():
    x = draw(5, 8)
    x = x - x.mean(-1, keepdim=True)
    assert torch.allclose(RMSNorm(8).double()(x), LayerNorm(8).double()(x), atol=1e-12)


def test_standardize_closed_form_passes_first_second_and_forward_checks():
    x = draw(3, 4, 2).requires_grad_()
    for dims in (-1, (1, 2), (1,)):
        call = lambda v, d=dims: standardize(v, d, 1e-3)  # noqa: E731
        assert torch.autograd.gradcheck(call, (x,), check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(call, (x,))


def test_standardize_under_nested_transforms():
    x = draw(6, 8)

    def loss(v):
        return (standardize(v) ** 3).sum()

    def plain(v):
        return (F.layer_norm(v, (8,)) ** 3).sum()

    for transform in (torch.func.grad, torch.func.jacfwd, torch.func.hessian):
        assert torch.allclose(torch.vmap(transform(loss))(x), torch.vmap(transform(plain))(x), atol=1e-10)


@pytest.mark.parametrize("dims", [0, 1, 2])
@pytest.mark.parametrize("kind", NORMS)
def test_every_norm_keeps_shape_and_passes_gradcheck(kind, dims):
    if kind == "instance" and dims == 0:
        with pytest.raises(PomonaError, match="norm='instance' needs positions"):
            Norm(kind, 8, dims)
        return
    norm = Norm(kind, 8, dims).double()
    assert kind == "none" or is_norm(norm)
    x = draw(*SHAPES[dims])
    assert norm(x).shape == x.shape
    small = x[:2].requires_grad_()
    assert torch.autograd.gradcheck(perturbed(norm), (small,), atol=1e-6)
    if kind != "batch":
        assert norm(x[:0]).shape == x[:0].shape
        assert norm.float().bfloat16()(x.bfloat16()).dtype == torch.bfloat16
        norm.double()
        assert torch.allclose(torch.vmap(norm)(x[None].expand(3, *x.shape))[1], norm(x))


def test_norms_agree_with_torch():
    x1, x2 = draw(4, 8, 5), draw(4, 8, 5, 3)
    assert torch.allclose(GroupNorm(8, 2, groups=4).double()(x2), F.group_norm(x2, 4))
    assert torch.allclose(InstanceNorm(8, 1).double()(x1), F.instance_norm(x1))
    assert torch.allclose(LayerNorm(8, 2, over="all").double()(x2), F.group_norm(x2, 1))
    assert torch.allclose(
        LayerNorm(8, 2).double()(x2), F.layer_norm(x2.movedim(1, -1), (8,)).movedim(-1, 1), atol=1e-12
    )
    tokens = x1.transpose(1, 2)
    assert torch.allclose(RMSNorm(8).double()(tokens), F.rms_norm(tokens, (8,), eps=1e-5))
    assert torch.allclose(BatchNorm(8).double()(tokens), nn.BatchNorm1d(8).double()(x1).transpose(1, 2))


def test_scale_norm_and_dyt_formulas():
    x = draw(5, 8)
    assert torch.allclose(ScaleNorm(8).double()(x).norm(dim=-1), torch.full((5,), 8**0.5, dtype=torch.float64))
    assert torch.allclose(DyT(8).double()(x), torch.tanh(0.5 * x))


def test_group_norm_never_defaults_to_groups_of_one():
    assert [GroupNorm(width).groups for width in (4, 8, 7, 64, 512)] == [1, 2, 1, 16, 32]


def test_weight_norm_keeps_the_function_and_fixes_the_length():
    layer = nn.Conv2d(3, 4, 3).double()
    x = draw(2, 3, 5, 5)
    y = layer(x)
    weight_norm(layer)
    assert torch.allclose(layer(x), y)
    with torch.no_grad():
        layer.parametrizations.weight.original1.mul_(7)
    assert torch.allclose(layer(x), y)


def test_layer_norm_exports():
    norm = LayerNorm(8)
    x = torch.randn(3, 8)
    assert torch.allclose(torch.export.export(norm, (x,)).module()(x), norm(x))


@pytest.mark.slow
def test_layer_norm_compiles_forward_and_backward():
    norm = LayerNorm(8)
    x = torch.randn(3, 8, requires_grad=True)
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    grads = [torch.autograd.grad(f(x).pow(3).sum(), x)[0] for f in (norm, compiled)]
    assert torch.allclose(*grads, atol=1e-5)


def test_bad_input():
    with pytest.raises(PomonaError, match="norm='layr' is not known; did you mean layer"):
        Norm("layr", 8)
    with pytest.raises(PomonaError, match="does not take these options"):
        Norm("layer", 8, groups=2)
    with pytest.raises(PomonaError, match="eps=0 must be a number above 0"):
        LayerNorm(8, eps=0)
    with pytest.raises(PomonaError, match="over='al' is not known"):
        LayerNorm(8, 1, over="al")
    with pytest.raises(PomonaError, match="features=8 cannot be divided into groups=3"):
        GroupNorm(8, groups=3)
    with pytest.raises(PomonaError, match="batch norm with dims=2 takes 4 axes, got 2"):
        BatchNorm(8, 2)(torch.zeros(2, 8))
