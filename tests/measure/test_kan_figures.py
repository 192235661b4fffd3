import pytest
import torch

from pomona.errors import PomonaError
from pomona.measure.kan_figures import diagram_figure, edge_figure
from pomona.nn.basis import fit_coefficients
from pomona.nn.kan_net import KAN


def fitted() -> tuple[KAN, torch.Tensor]:
    """y = x0^2 through the first of three hidden nodes, the others idle; x1 is not used."""
    net = KAN([2, 3, 1], base="zero", noise=0.0, generator=torch.Generator().manual_seed(0)).double()
    for layer in net.layers:
        layer.coefficients.data.zero_()
    net.fix_symbolic(0, 0, 0, "x^2", (1, 0, 1, 0))
    x = torch.rand(300, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    points = net.layers[1].basis.points()
    line = fit_coefficients(net.layers[1].basis, points, points[:, None] / net.layers[1].scale_spline.detach()[0, 0])
    net.layers[1].coefficients.data[:, 0] = line[:, 0]
    return net, x


def test_edges_are_drawn_by_size_over_the_range_of_their_inputs():
    net, x = fitted()
    figure = edge_figure(net, x, most=2)
    assert len(figure.data) == 2 and figure.layout.annotations[0].text == "0 → 0"
    curve = figure.data[0]
    assert min(curve.x) == pytest.approx(float(x[:, 0].min())) and max(curve.x) == pytest.approx(float(x[:, 0].max()))
    torch.testing.assert_close(torch.tensor(curve.y), torch.tensor(curve.x).square(), atol=1e-6, rtol=0)
    assert len(edge_figure(net, x, 1).data) == 3


def test_the_diagram_has_only_live_nodes_and_edges_with_their_formulas():
    net, x = fitted()
    figure = diagram_figure(net, x, names=["a", "b"])
    *lines, middles, nodes = figure.data
    assert len(lines) == 2 and list(nodes.text) == ["a", "b", "", "y0"]
    assert middles.text[0] == "x^2 (fixed)" and middles.text[1].startswith("x, R² 1.000")
    assert net.widths == [2, 3, 1]
    plain = diagram_figure(net, x, suggest=False)
    assert all(float(text) > 0 for text in plain.data[-2].text)


def test_bad_arguments_say_what_would_do():
    net, x = fitted()
    with pytest.raises(PomonaError, match="layer=2 is not one of the 2 layers"):
        edge_figure(net, x, 2)
    with pytest.raises(PomonaError, match="names has 1 entries for 2 inputs"):
        diagram_figure(net, x, names=["a"])
