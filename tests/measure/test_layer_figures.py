import math

import pytest
import torch
from torch import nn

from pomona.errors import PomonaError
from pomona.measure.layer_figures import (
    block_figure,
    edge_functions_figure,
    eigenvector_figure,
    figures,
    kernel_figure,
    usage_figure,
)
from pomona.nn.bilinear import Bilinear, BilinearNet
from pomona.nn.gaudi_gblr import GaudiGBLR
from pomona.nn.kan import KANLayer


def test_eigenvectors_of_each_class_are_images_with_their_values():
    net = BilinearNet(16, 8, 3)
    figure = eigenvector_figure(net, directions=3, pairs=2)
    assert len(figure.data) == 6
    assert len(figure.data[0].z) == len(figure.data[0].z[0]) == 4
    assert figure.layout.annotations[0].text.startswith("class 0: ")
    lone = eigenvector_figure(Bilinear(9, 5, bias=True), directions=2, pairs=3)
    assert len(lone.data) == 6


def test_edge_functions_run_over_the_grid():
    layer = KANLayer(3, 2, grid_range=(-2.0, 1.0))
    figure = edge_functions_figure(layer, most=4)
    assert len(figure.data) == 4
    assert (figure.data[0].x[0], figure.data[0].x[-1]) == (-2.0, 1.0)
    i, o = (int(n) for n in figure.layout.annotations[0].text.split(" → "))
    x = torch.tensor(figure.data[0].x)[:, None].expand(-1, 3)
    torch.testing.assert_close(torch.tensor(figure.data[0].y), layer.edges(x)[:, o, i].detach())


def test_kernels_are_drawn_one_a_picture():
    conv = nn.Conv2d(2, 3, 5)
    figure = kernel_figure(conv)
    assert len(figure.data) == 6
    torch.testing.assert_close(torch.tensor(figure.data[1].z).flip(0), conv.weight[0, 1].detach())
    with pytest.raises(PomonaError, match="Linear has no kernels to draw"):
        kernel_figure(nn.Linear(2, 2))


def test_blocks_cover_what_the_weight_does():
    layer = GaudiGBLR(
        12, 8, width_init=0.4, sigma=math.inf, anneal_steps=0, generator=torch.Generator().manual_seed(0)
    ).eval()
    cover = torch.tensor(block_figure(layer).data[0].z)
    assert cover.shape == (8, 12)
    assert torch.equal(cover > 0, layer.weight().abs() > 0)


def test_slots_are_ranked_by_use():
    figure = usage_figure(torch.tensor([[1.0, 0.0], [5.0, 2.0]]))
    assert figure.data[0].y == (5.0, 2.0, 1.0)
    assert "3 were read" in figure.layout.xaxis.title.text


def test_every_layer_of_a_network_that_has_a_figure_is_named():
    net = nn.Sequential(nn.Linear(4, 4), GaudiGBLR(4, 4), nn.Sequential(Bilinear(4, 4), Bilinear(4, 4, gate="relu")))
    assert [name for name, _ in figures(net)] == ["1 (GaudiGBLR)", "2.0 (Bilinear)"]
