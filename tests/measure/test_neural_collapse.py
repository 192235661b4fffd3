import pytest
import torch
from torch import nn

from pomona.errors import PomonaError
from pomona.measure.neural_collapse import class_means, layer_features, nc_metrics, neural_collapse, simplex_etf
from pomona.measure.reading import Reading


def collapsed(means, n=5):
    labels = torch.arange(len(means)).repeat_interleave(n)
    return means[labels], labels


def test_all_metrics_are_zero_at_a_collapsed_etf():
    frame = simplex_etf(4, 6, generator=torch.Generator().manual_seed(0))
    h, y = collapsed(3 * frame + 1.0)  # a shift: ETF distances are of centred means
    values = nc_metrics(h, y, 2 * frame, predictions=y)
    for name in ("nc1", "nc2_etf", "nc3", "nc4"):
        assert values[name] < 1e-7, name
    assert values["nc2_of"] > 0.1


def test_orthogonal_frame_and_its_generalised_lengths():
    lengths = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    h, y = collapsed(torch.diag(lengths.sqrt()))
    values = nc_metrics(h, y, torch.diag(lengths.sqrt()), lengths=lengths)
    assert values["nc2_gof"] < 1e-12 and values["nc3_of"] < 1e-12
    assert values["nc2_of"] > 0.1 and values["nc2_etf"] > 0.1


def test_nc1_equals_the_naive_formula_and_ignores_rotation_shift_and_scale():
    g = torch.Generator().manual_seed(1)
    y = torch.arange(3).repeat(40)
    h = torch.randn(120, 5, generator=g, dtype=torch.float64) + 2 * torch.randn(3, 5, generator=g).double()[y]
    means, _ = class_means(h, y)
    within, centred = h - means[y], means - means.mean(0)
    naive = torch.trace(within.mT @ within / 120 @ torch.linalg.pinv(centred.mT @ centred / 3, rtol=1e-9)) / 3
    assert nc_metrics(h, y)["nc1"] == pytest.approx(float(naive))
    q, _ = torch.linalg.qr(torch.randn(5, 5, generator=g, dtype=torch.float64))
    assert nc_metrics(7 * h @ q + 3, y)["nc1"] == pytest.approx(float(naive))


def test_nc4_counts_disagreements_with_the_nearest_mean():
    h, y = collapsed(torch.eye(2).double(), 2)
    assert nc_metrics(h, y, predictions=torch.tensor([0, 1, 1, 1]))["nc4"] == 0.25


def test_linear_chain_gives_every_layer_the_product_of_the_weights_above():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5, bias=False), nn.Linear(5, 3, bias=False))
    x, y = torch.randn(9, 4), torch.arange(3).repeat(3)
    features, weights, logits, _ = layer_features(net, [(x, y)])
    assert list(features) == ["0", "2", "3"] and set(weights) == {"2", "3"}
    torch.testing.assert_close(weights["2"], net[3].weight @ net[2].weight)
    torch.testing.assert_close(features["2"] @ weights["2"].mT, logits)


def test_reading_of_a_task_a_pair_and_a_loader_agree_and_leave_the_network_as_it_was():
    class Task:
        splits = {"train": (torch.randn(30, 1, 4, 4), torch.arange(3).repeat(10))}

    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).train()
    net[1].eval()
    pair = Task.splits["train"]
    readings = [
        neural_collapse(net, data) for data in (Task(), pair, [(pair[0][:7], pair[1][:7]), (pair[0][7:], pair[1][7:])])
    ]
    assert isinstance(readings[0], Reading) and readings[0]["nc1"] == readings[0]["nc1@4"]
    for other in readings[1:]:
        assert other["nc2_of"] == pytest.approx(readings[0]["nc2_of"], rel=1e-5)
    assert net.training and not net[1].training and not net[4]._forward_hooks
    conv = neural_collapse(net, pair, layers=["2", "4"])
    assert "nc1@2" in conv.values and conv.figure is not None


def test_bad_input_messages():
    with pytest.raises(PomonaError, match="no example of class 1 of 3"):
        nc_metrics(torch.randn(2, 3), torch.tensor([0, 2]))
    with pytest.raises(PomonaError, match="layers='fcc' is not known"):
        layer_features(nn.Sequential(nn.Linear(2, 2)), [], ["fcc"])
    with pytest.raises(PomonaError, match="dim=3 must be at least classes=4"):
        simplex_etf(4, 3)
