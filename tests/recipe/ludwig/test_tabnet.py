import pytest
import torch

from pomona.errors import PomonaError
from pomona.nn.kan_attention import project_simplex
from pomona.recipe.ludwig.tabnet import GhostBatchNorm, TabNet


def test_sparsemax_is_the_projection_onto_the_simplex():
    torch.manual_seed(0)
    z = torch.randn(20, 6, dtype=torch.float64)
    p = project_simplex(z)
    torch.testing.assert_close(p.sum(-1), torch.ones(20, dtype=torch.float64))
    assert (p >= 0).all() and (p == 0).any()
    others = torch.rand(2000, 1, 6, dtype=torch.float64) ** 3
    others = others / others.sum(-1, keepdim=True)
    assert ((others - z).square().sum(-1) >= (p - z).square().sum(-1) - 1e-12).all()
    torch.testing.assert_close(project_simplex(torch.tensor([[0.5, 0.3]])), torch.tensor([[0.6, 0.4]]))


def test_masks_follow_the_equations_and_lie_on_the_simplex():
    torch.manual_seed(0)
    net = TabNet(6, width=5, relaxation=1.2, steps=3).double().eval()
    for attend in net.attend:
        torch.nn.init.normal_(attend[0].weight, std=5.0)  # so that masks have zeros
    x = torch.randn(30, 6, dtype=torch.float64)
    total, masks = net.masks(x)
    torch.testing.assert_close(masks.sum(-1), torch.ones(3, 30, dtype=torch.float64))
    assert (masks == 0).any()
    x = net.norm(x)
    a = net.transformers[0](x)[:, 5:]
    expected = 0
    for step in range(3):
        prior = (1.2 - masks[:step]).prod(0)
        torch.testing.assert_close(masks[step], project_simplex(prior * net.attend[step](a)))
        hidden = net.transformers[step + 1](masks[step] * x)
        expected, a = expected + hidden[:, :5].relu(), hidden[:, 5:]
    torch.testing.assert_close(total, expected)


def test_sparsity_loss_is_the_mean_entropy_of_the_masks_while_training():
    torch.manual_seed(0)
    net = TabNet(5, sparsity=0.5).double()
    x = torch.randn(16, 5, dtype=torch.float64)
    _, masks = net.masks(x)
    net(x)
    entropy = -torch.special.xlogy(masks, masks).sum(-1).mean()
    torch.testing.assert_close(net.aux_loss(), 0.5 * entropy)
    net.eval()(x)
    assert net.aux_loss() == 0


def test_ghost_batch_norm_normalises_each_chunk():
    norm = GhostBatchNorm(3, group=10).double()
    x = torch.randn(20, 3, dtype=torch.float64) + torch.arange(20)[:, None]
    for chunk in norm(x).split(10):
        torch.testing.assert_close(chunk.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-9, rtol=0)


def test_bad_relaxation_is_named():
    with pytest.raises(PomonaError, match="relaxation=0.5 must be 1 or more"):
        TabNet(3, relaxation=0.5)
