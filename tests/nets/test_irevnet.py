import math

import pytest
import torch
from torch import nn

from pomona.errors import PomonaError
from pomona.nets.irevnet import IRevNet


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def small(**options):
    torch.manual_seed(0)
    return IRevNet(1, 3, **{"blocks": (2, 2), "strides": (1, 2)} | options).double()


def trained(net):
    """In evaluation mode, with running statistics of some batches."""
    for seed in range(3):
        net(1 + 2 * draw(8, 1, 8, 8, seed=seed))
    return net.eval()


@pytest.mark.parametrize("options", [{}, {"init": "injective-pad", "width": 5}, {"kernels": (3, 3, 3)}])
def test_inverse_of_the_features_is_the_input(options):
    net, x = trained(small(**options)), draw(3, 1, 8, 8, seed=9)
    torch.testing.assert_close(net.reconstruct(x), x, rtol=0, atol=1e-10)
    torch.testing.assert_close(net.float().reconstruct(x.float()), x.float(), rtol=0, atol=1e-5)


def test_volume_is_preserved_and_features_are_as_many_as_inputs():
    net, x = trained(small()), draw(1, 1, 4, 4)
    assert net.forward_features(x).numel() == x.numel()
    jacobian = torch.func.jacrev(lambda x: net.forward_features(x).flatten())(x).reshape(16, 16)
    assert abs(float(torch.linalg.slogdet(jacobian).logabsdet.detach())) < 1e-10
    wide = trained(small(init="injective-pad", width=4))
    assert wide.forward_features(x).numel() == 2 * x.numel()


def test_without_functions_the_network_permutes_its_input():
    net, x = trained(small()), draw(2, 1, 8, 8)
    for block in net.body.blocks:
        nn.init.zeros_(block.function[-1].weight)
    y = net.forward_features(x)
    assert torch.equal(y.flatten(1).sort().values, x.flatten(1).sort().values)


def test_reversible_training_steps_equal_stored_ones():
    stored, recomputed = small(dropout=0.2), small(dropout=0.2, reversible=True)
    for net in (stored, recomputed):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for seed in range(2):
            optimizer.zero_grad()
            net(draw(8, 1, 8, 8, seed=seed)).square().mean().backward()
            optimizer.step()
    for name, value in stored.state_dict().items():
        torch.testing.assert_close(recomputed.state_dict()[name], value, rtol=1e-8, atol=1e-9)


def test_path_between_images_starts_and_ends_at_them():
    net, a, b = trained(small()), draw(2, 1, 8, 8), draw(2, 1, 8, 8, seed=1)
    path = net.interpolate(a, b, 4)
    assert path.shape == (4, 2, 1, 8, 8)
    torch.testing.assert_close(path[0], a, rtol=0, atol=1e-10)
    torch.testing.assert_close(path[-1], b, rtol=0, atol=1e-10)


def test_depth_and_channels_of_the_papers_network():
    with torch.device("meta"):
        net = IRevNet(3, 1000)
    assert len(net.body.blocks) == 100
    assert net.head.in_features == 3 * 4 * math.prod((4, 4, 4, 4))
    assert net.shrink == 32


def test_bad_input():
    with pytest.raises(PomonaError, match="side of the image=6 cannot be divided into 2 x product of strides=4"):
        small()(draw(1, 1, 6, 8))
    with pytest.raises(PomonaError, match="width=1 must be at least 2 with init='injective-pad'"):
        small(init="injective-pad", width=1)
    with pytest.raises(PomonaError, match="width=0 must be at least 2 with init='injective-pad'"):
        small(init="injective-pad", width=0)
    with pytest.raises(PomonaError, match="init='splits' is not known; did you mean split"):
        small(init="splits")
    with pytest.raises(PomonaError, match="kernels=2 must be an odd number, such as 3"):
        small(kernels=(1, 2, 1))
    with pytest.raises(PomonaError, match="must be as many, and kernels three"):
        small(strides=(1,))
