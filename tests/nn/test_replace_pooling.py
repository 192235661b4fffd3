import pytest
import torch
from torch import nn

from pomona.errors import PomonaError
from pomona.nn.pool import GatedPool2d, MixedPool2d, TreePool2d
from pomona.nn.replace_pooling import invariance, move, replace_pooling, tree_gated_max_avg


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.AvgPool2d(2)),
        nn.Flatten(),
        nn.LazyLinear(3),
    ).eval()


X = torch.randn(5, 1, 9, 9, generator=torch.Generator().manual_seed(1))


def test_geometry_is_kept_and_the_old_net_untouched():
    net = make_net()
    net(X)
    new = replace_pooling(net, ["tree", "gated"])
    assert isinstance(new[1], TreePool2d)
    assert isinstance(new[2][1], GatedPool2d)
    assert isinstance(net[1], nn.MaxPool2d)
    assert new[1].kernel_size == (3, 3)
    assert new[1].padding == (1, 1)
    assert new(X).shape == net(X).shape
    back = replace_pooling(new, ["max", "avg"])
    assert torch.equal(back(X), net(X))


def test_example_gives_the_sizes_that_sharing_needs():
    new = replace_pooling(make_net(), "mixed", example=X, share="region_channel")
    assert isinstance(new[1], MixedPool2d)
    assert new[1].mixture.shape == (4, 5, 5)
    assert new[2][1].mixture.shape == (6, 2, 2)
    with pytest.raises(PomonaError, match="share='channel' needs channels"):
        replace_pooling(make_net(), "gated", share="channel")


def test_combination_is_tree_then_gated():
    new = tree_gated_max_avg(make_net())
    assert isinstance(new[1], TreePool2d)
    assert isinstance(new[2][1], GatedPool2d)


def test_moves_are_exact_where_pixels_meet_pixels():
    torch.testing.assert_close(move(X, "rotate", 0), X)
    torch.testing.assert_close(move(X, "scale", 1), X)
    torch.testing.assert_close(move(X, "shift_x", 2)[..., 2:], X[..., :-2])
    torch.testing.assert_close(move(X, "shift_y", -1)[..., :-1, :], X[..., 1:, :])
    torch.testing.assert_close(move(X, "rotate", 180), X.flip(-1, -2), atol=1e-5, rtol=1e-5)
    turned = move(X, "rotate", 90)
    assert any(torch.allclose(turned, torch.rot90(X, k, (-2, -1)), atol=1e-5) for k in (1, 3))
    wide = torch.randn(1, 1, 4, 8)
    torch.testing.assert_close(move(wide, "rotate", 180), wide.flip(-1, -2), atol=1e-5, rtol=1e-5)


def test_invariance_is_the_accuracy_on_moved_images():
    net = make_net()
    labels = net(X).argmax(1)
    scores = invariance(net, X, labels, "shift_x", [0, 3])
    assert scores[0.0] == 1
    assert scores[3.0] == float((net(move(X, "shift_x", 3)).argmax(1) == labels).float().mean())


def test_bad_input():
    with pytest.raises(PomonaError, match="kinds has 3 names; the net has 2 pooling layers"):
        replace_pooling(make_net(), ["max"] * 3)
    with pytest.raises(PomonaError, match="kinds='gate' is not known; did you mean gated"):
        replace_pooling(make_net(), "gate")
    with pytest.raises(PomonaError, match="transform='spin' is not known"):
        move(X, "spin", 1)
