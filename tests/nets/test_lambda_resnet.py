import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pomona.errors import PomonaError
from pomona.nets.lambda_resnet import LambdaBlock, LambdaResNet
from pomona.nn.lambda_layer import LambdaConv2d


def test_block_is_a_bottleneck_with_a_lambda_layer_between_and_starts_as_its_shortcut():
    x = torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(0))
    block = LambdaBlock(16, 4, scope=3, k=4)
    assert isinstance(block.spatial, LambdaConv2d)
    torch.testing.assert_close(block(x), F.relu(x))
    strided = LambdaBlock(16, 8, 2, scope=3, k=4)
    assert strided(x).shape == (2, 32, 3, 3)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("scope", [3, None])
def test_hybrid_network_has_lambda_layers_in_its_later_stages(scope, large):
    net = LambdaResNet(3, 5, (22, 18), depths=(1, 1, 2, 1), width=8, scope=scope, k=4, large=large)
    kinds = [isinstance(block.spatial, LambdaConv2d) for block in net.blocks]
    assert kinds == [False, False, True, True, True]
    x = torch.randn(4, 3, 22, 18)
    net(x).sum().backward()
    assert net(x).shape == (4, 5)
    assert all(p.grad is not None for p in net.parameters())


def test_a_local_network_takes_other_resolutions_and_any_spatial_part():
    net = LambdaResNet(1, 3, (8, 8), stages=("L",), depths=(1,), width=8, scope=3, k=4).eval()
    assert net(torch.randn(2, 1, 13, 9)).shape == (2, 3)
    seen = []
    net = LambdaResNet(
        1, 3, (8, 8), stages=(lambda n, s, size: seen.append((n, s, size)) or nn.Identity(),), depths=(2,), width=4
    )
    assert seen == [(4, 1, (8, 8))] * 2 and net(torch.randn(2, 1, 8, 8)).shape == (2, 3)


def test_bad_arguments_say_what_would_do():
    with pytest.raises(PomonaError, match="stages='X' is not known"):
        LambdaResNet(3, 5, stages=("X",), depths=(1,))
    with pytest.raises(PomonaError, match=r"depths=\(1, 1\) must give one depth for each of the 1 stages"):
        LambdaResNet(3, 5, stages=("L",), depths=(1, 1))
