import pytest
import torch

from pomona.errors import PomonaError
from pomona.nets.smp import TCN, smp_resnet, smp_stage, smp_tcn
from pomona.nets.specs import Inputs, Outputs


def test_networks_have_their_shapes_and_a_tcn_changes_resolution():
    x = torch.randn(3, 2, 11, generator=torch.Generator().manual_seed(0))
    net = smp_tcn(2, 5, 11, width=4, n_points=3).eval()
    assert net(x).shape == (3, 5)
    fine = torch.nn.functional.interpolate(x, 21, mode="linear", align_corners=True)
    net.resample(21)
    assert net.blocks[0].conv.kernel_size == (21,)
    assert net(fine).shape == (3, 5)
    images = torch.randn(2, 4, 8, 8)
    assert smp_stage(4, 2, 13)(images).shape == images.shape
    assert smp_resnet(Inputs("image", (4, 8, 8)), Outputs("classes", 3), width=4, depth=2)(images).shape == (2, 3)


def test_bad_input():
    with pytest.raises(PomonaError, match="readout='first' is not known"):
        TCN(1, 2, lambda index, width: torch.nn.Identity(), readout="first")
    with pytest.raises(PomonaError, match="small_kernel=4 must be an odd number, such as 5"):
        smp_stage(4, 1, 7, small_kernel=4)
