import pytest
import torch

from pomona.errors import PomonaError
from pomona.nets.iso_mlp import BatchScale, IsoMLP, haar


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make(seed=0, **options):
    return IsoMLP(8, 8, 5, 3, generator=torch.Generator().manual_seed(seed), **options).double()


def test_haar_matrices_are_orthogonal_and_of_mean_zero():
    generator = torch.Generator().manual_seed(0)
    matrices = torch.stack([haar(4, 4, generator) for _ in range(4000)])
    eye = torch.eye(4).expand(4000, 4, 4)
    torch.testing.assert_close(matrices @ matrices.mT, eye, atol=1e-5, rtol=0)
    assert matrices[:, 0, 0].mean().abs() < 3 * 0.5 / 4000**0.5  # a uniform column has entries of variance 1/4
    assert abs(matrices[:, 0, 0].var() - 0.25) < 0.02


def test_gain_cancels_without_an_activation():
    x = draw(8, 8)
    plain = make(act="id", gain_exponent=0.0)(x)
    for exponent in (-1.0, -0.5, 2.0):
        torch.testing.assert_close(make(act="id", gain_exponent=exponent)(x), plain)


@pytest.mark.parametrize("order", ["act_norm", "norm_act"])
@pytest.mark.parametrize("centre", [False, True])
def test_forward_is_the_equation(order, centre):
    net, x = make(act="tanh", gain_exponent=-1.0, order=order, centre=centre), draw(8, 8)

    def norm(h):
        h = h - h.mean(0) if centre else h
        return h / h.square().mean(0).sqrt()

    h = x
    for layer, weight in enumerate(net.weights):
        z = h @ weight.T
        h = norm(torch.tanh(z / (layer + 1))) if order == "act_norm" else torch.tanh(norm(z) / (layer + 1))
    torch.testing.assert_close(net(x), h @ net.head.weight.T)


def test_evaluation_takes_running_statistics():
    x = 3 * draw(2000, 4) + torch.tensor([0.0, 1.0, 2.0, -5.0])
    for centre in (False, True):
        norm = BatchScale(4, centre).double()
        batch = norm(x)
        torch.testing.assert_close(norm.eval()(x), batch)
        reference = torch.nn.BatchNorm1d(4, eps=1e-12, affine=False).double()
        if centre:
            torch.testing.assert_close(batch, reference(x))
        assert norm(x[:0]).shape == (0, 4)
        for _ in range(300):
            norm.train()(x + 1)
        torch.testing.assert_close(norm.eval()(x + 1), norm.train()(x + 1))


def test_rectangular_layers_gaussian_weights_and_images():
    net = IsoMLP(12, 20, 3, 4, weights="gaussian", generator=torch.Generator().manual_seed(0))
    assert net(torch.randn(5, 3, 2, 2)).shape == (5, 4)
    assert abs(net.weights[1].var() * 20 - 1) < 0.2
    wide = IsoMLP(12, 20, 1, 4).weights[0]
    torch.testing.assert_close(wide.T @ wide, torch.eye(12), atol=1e-5, rtol=0)
    a, b = (IsoMLP(4, 4, 2, 2, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_gradients():
    net = make(act="sin")
    assert torch.autograd.gradcheck(net, draw(4, 8).requires_grad_())


def test_bad_input():
    with pytest.raises(PomonaError, match=r"^act='sine' is not known; did you mean sin"):
        IsoMLP(4, 4, 2, 2, act="sine")
    with pytest.raises(PomonaError, match=r"^IsoMLP takes 8 features on axis -1"):
        make()(draw(4, 7))
