import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pomona.errors import PomonaError
from pomona.nn.reversible import RevBlock, RevSequential, squeeze, unsqueeze


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def convolutions(dropout=0.0):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(dropout), nn.Conv2d(4, 3, 1)
    )


def strided():
    return nn.Sequential(nn.Conv2d(3, 12, 2, 2), nn.BatchNorm2d(12), nn.Tanh())


@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 3, 4, 6), (1, 2, 4, 4, 2), (0, 3, 4, 4)])
def test_squeeze_is_exact_and_keeps_the_norm(shape):
    x = draw(*shape)
    y = squeeze(x, 2)
    assert y.shape == (shape[0], shape[1] * 2 ** (len(shape) - 2), *(n // 2 for n in shape[2:]))
    assert torch.equal(unsqueeze(y, 2), x)
    assert torch.equal(y.flatten().sort().values, x.flatten().sort().values)
    torch.testing.assert_close(y.norm(), x.norm(), rtol=1e-14, atol=0)
    if len(shape) == 4 and len(x):
        assert torch.equal(y, F.pixel_unshuffle(x, 2))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recomputed_gradients_equal_those_of_stored_activations(dropout):
    stored = RevSequential(
        [convolutions(dropout), convolutions(), RevBlock(strided(), 2), nn.Sequential(nn.Conv2d(12, 12, 1), nn.Tanh())]
    ).double()
    recomputed = copy.deepcopy(stored)
    recomputed.reversible = True
    results = []
    for net in (stored, recomputed):
        torch.manual_seed(3)
        x1, x2 = draw(4, 3, 4, 4).requires_grad_(), draw(4, 3, 4, 4, seed=1).requires_grad_()
        y1, y2 = net(x1, x2)
        (y1.sin().sum() + y2.square().sum()).backward()
        results.append([y1, y2, x1.grad, x2.grad, *(p.grad for p in net.parameters()), *net.buffers()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    assert int(recomputed.blocks[0].function[1].num_batches_tracked) == 1


def test_works_on_vectors_and_series_and_frozen_parameters():
    net = RevSequential([nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(4)], reversible=True).double()
    net.blocks[1].requires_grad_(False)
    x1, x2 = draw(2, 7, 5), draw(2, 7, 5, seed=1)
    back = net.inverse(*net(x1, x2))
    torch.testing.assert_close(back[0], x1, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(back[1], x2, rtol=1e-12, atol=1e-12)
    net(x1, x2)[1].sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())
    series = RevSequential([RevBlock(nn.Conv1d(2, 4, 2, 2), 2)]).double()
    x = draw(3, 2, 6), draw(3, 2, 6, seed=2)
    torch.testing.assert_close(series.inverse(*series(*x)), x, rtol=1e-12, atol=1e-12)
    assert len(series.states(*x)) == 2


@pytest.mark.parametrize("reversible", [True, False])
def test_gradients(reversible):
    net = RevSequential([nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Tanh())], reversible=reversible).double()
    names, values = zip(*((n, p.detach().clone().requires_grad_()) for n, p in net.named_parameters()), strict=True)
    inputs = draw(3, 2).requires_grad_(), draw(3, 2, seed=1).requires_grad_()

    def run(x1, x2, *p):
        return torch.func.functional_call(net, dict(zip(names, p, strict=True)), (x1, x2))

    assert torch.autograd.gradcheck(run, (*inputs, *values))


def test_bad_input():
    with pytest.raises(PomonaError, match="side=5 cannot be divided into k=2 equal parts"):
        squeeze(draw(1, 1, 5), 2)
    with pytest.raises(PomonaError, match="must hold at least one module"):
        RevSequential([])
    with pytest.raises(PomonaError, match="RevSequential takes floating-point numbers, not torch.int64"):
        RevSequential([nn.Linear(2, 2)])(torch.ones(1, 2).long(), torch.ones(1, 2))
