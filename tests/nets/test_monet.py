import pytest
import torch
from torch import nn

from pomona.errors import PomonaError
from pomona.nets.monet import MONet, MONetTabular, PyramidEmbedding
from pomona.nn.mu_layer import degree_along_line


def test_embedding_is_linear_in_the_image():
    embed = PyramidEmbedding(2, 6, 4).double()
    x, y = torch.randn(2, 3, 2, 8, 8, dtype=torch.float64)
    zero = embed(torch.zeros_like(x))
    torch.testing.assert_close(embed(x + 2 * y) - zero, embed(x) - zero + 2 * (embed(y) - zero))
    assert embed(x).shape == (3, 6, 2, 2)


@pytest.mark.parametrize("pyramid", [True, False])
def test_stages_halve_the_resolution_and_everything_learns(pyramid):
    net = MONet(1, 5, (8, 12), (1, 2), pyramid=pyramid, drop_path=0.0)
    x = torch.randn(4, 1, 28, 28)
    assert not net(x).any()
    nn.init.normal_(net.head.weight)
    net(x).square().sum().backward()
    assert net(x).shape == (4, 5) and all(p.grad is not None for p in net.parameters())
    assert not any("GELU" in type(m).__name__ or "ReLU" in type(m).__name__ for m in net.modules())


def test_two_tabular_blocks_are_a_polynomial_of_degree_sixteen_without_norms():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = MONetTabular(3, 2, 6, 2, norm=False).double()
        nn.init.normal_(net.head.weight)
        line = 10 * torch.randn(3, dtype=torch.float64)  # long: the highest power stands out from rounding
    assert degree_along_line(net, torch.zeros(3).double(), line, most=20) == 16
    assert degree_along_line(net.blocks[0], torch.ones(6).double(), torch.ones(6).double()) == 4


def test_the_papers_sizes_are_there():
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in MONet.sized(name).parameters()) / 1e6 for name in ("T", "S")}
    assert counts == pytest.approx({"T": 10.3, "S": 32.9}, abs=1.0)


def test_bad_arguments_say_what_would_do():
    with pytest.raises(PomonaError, match="patch=3 must be even for two scales"):
        MONet(1, 2, patch=3)
    with pytest.raises(PomonaError, match=r"depths=\(1,\) must give one depth for each of dims=\(8, 9\)"):
        MONet(1, 2, (8, 9), (1,))
    with pytest.raises(PomonaError, match="name='L' is not known"):
        MONet.sized("L")
