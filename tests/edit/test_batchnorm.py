import torch
from torch import nn

from pomona.edit.batchnorm import fold_batch_norms


def unsettled(net):
    """With statistics and scales that are not those of an untrained network."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 3)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return net.double().eval()


def test_folding_is_exact_and_leaves_no_norm():
    torch.manual_seed(0)
    net = unsettled(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8, affine=False),
            nn.ConvTranspose2d(8, 3, 2), nn.BatchNorm2d(3), nn.Flatten(),
            nn.Linear(75, 6), nn.BatchNorm1d(6),
        )
    )  # fmt: skip
    x = torch.randn(3, 2, 8, 8).double()
    edit = fold_batch_norms(net, x)
    torch.testing.assert_close(edit.net(x), net(x), rtol=0, atol=1e-11)
    kept = [i for i, module in enumerate(edit.net) if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert kept == [] and edit.notes == ()
    assert isinstance(net[1], nn.BatchNorm2d) and net[0].bias is None


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.first, self.after = nn.Conv1d(2, 2, 1), *(nn.BatchNorm1d(2) for _ in range(3))

    def forward(self, x):
        return self.norm(self.conv(self.first(x))) + self.after(self.conv(x))


def test_norms_that_cannot_be_folded_stay():
    torch.manual_seed(0)
    net, x = unsettled(Shared()), torch.randn(3, 2, 5).double()
    edit = fold_batch_norms(net, x)
    assert torch.equal(edit.net(x), net(x))
    assert sorted(edit.notes) == [f"kept: batch norm '{name}'" for name in ("after", "first", "norm")]
