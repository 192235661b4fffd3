import pytest
import torch

from pomona.errors import PomonaError
from pomona.nets.raft_mlp import SIZES, RaftMLP

LEVELS = [{"dim": 8, "depth": 1, "patch": 4, "kernels": (4, 8)}, {"dim": 12, "depth": 2, "raft": 3}]


@pytest.mark.parametrize("mixer", ["raft", "original"])
@pytest.mark.parametrize("shortcut", [True, False])
def test_takes_other_resolutions(mixer, shortcut):
    net = RaftMLP(LEVELS, 1, 5, 24, mixer=mixer, shortcut=shortcut, drop_path=0.1)
    for side in (24, 36, 30):
        assert net(torch.randn(2, 1, side, side)).shape == (2, 5)
    net(torch.randn(4, 1, 24, 24)).square().sum().backward()
    unused = [name for name, p in net.named_parameters() if p.grad is None]
    assert not unused


def test_levels_before_the_last_scale_and_shift_it():
    net = RaftMLP([*LEVELS, {"dim": 6, "depth": 1}], 1, 5, 24).double().eval()
    x = torch.randn(2, 1, 24, 24, dtype=torch.float64)
    pooled, y = [], x
    for level, norm in zip(net.levels, net.norms, strict=True):
        y = level(y)
        pooled.append(norm(y).mean((1, 2)))
        y = y.movedim(-1, 1)
    first, second = (m(p) for m, p in zip(net.modulations, pooled, strict=False))
    f = second[:, :6] * pooled[2] + second[:, 6:]
    torch.testing.assert_close(net(x), net.head(first[:, :6] * f + first[:, 6:]))


def test_the_papers_sizes():
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in RaftMLP.sized(name).parameters()) / 1e6 for name in SIZES}
    assert counts == pytest.approx({"S": 9.9, "M": 21.4, "L": 36.2}, abs=0.1)


def test_bad_arguments_say_what_would_do():
    with pytest.raises(PomonaError, match="levels is empty"):
        RaftMLP([])
    with pytest.raises(PomonaError, match="a level has no 'depth'"):
        RaftMLP([{"dim": 8}])
    with pytest.raises(PomonaError, match=r"kernels=\(4, 8\) must have patch=2 as their smallest"):
        RaftMLP([{"dim": 8, "depth": 1, "kernels": (4, 8)}])
    with pytest.raises(PomonaError, match="name='XL' is not known"):
        RaftMLP.sized("XL")
