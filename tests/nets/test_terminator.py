import torch

from pomona.nets.terminator import Terminator


def test_shapes_auxiliary_loss_and_no_residual():
    torch.manual_seed(0)
    net = Terminator(1, 3, (8, 8), width=4, blocks=3, slow_weight=0.1)
    x = torch.randn(2, 1, 8, 8)
    assert net(x).shape == (2, 3)
    assert float(net.aux_loss().detach()) > 0
    assert float(Terminator(1, 3, (8, 8), width=4, slow_weight=0.0).aux_loss()) == 0
    local = Terminator(1, 3, (8, 8), width=4, branches=["local3", "fast"])
    assert float(local.aux_loss()) == 0
    torch.nn.init.zeros_(net.blocks[-1].bottleneck.weight)  # nothing passes the last block by
    torch.testing.assert_close(net(x)[0], net(x)[1])
