import copy
import io
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pomona.edit.quantize import IntegerLayer, Quantizer, quantize, sqnr, to_integer
from pomona.edit.quantize.integer import encode, fixed_point, multiply, onednn_is_exact
from pomona.errors import PomonaError

KERNELS = ["plain", pytest.param("onednn", marks=pytest.mark.skipif(not onednn_is_exact(8), reason="no exact int8"))]
A8 = Quantizer(8, symmetric=False, signed=False)


def data(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def convnet():
    torch.manual_seed(0)
    conv = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 12, 3, padding="same")]
    dense = [nn.Linear(12 * 36, 20), nn.ReLU(), nn.Linear(20, 5)]
    return nn.Sequential(*conv, nn.ReLU(), nn.Dropout(), nn.Flatten(), *dense).eval()


def test_fixed_point_multiplier_and_shift():
    multiplier = torch.tensor([0.0123, 0.5, 0.99999, 1.7, 3e-6], dtype=torch.float64)
    whole, shift = fixed_point(multiplier)
    assert ((whole >= 2**30) & (whole <= 2**31)).all()
    assert torch.allclose(whole.double() * 2.0 ** (-shift.double()), multiplier, rtol=2**-31)
    totals = torch.randint(-(2**31), 2**31, (5, 1000), generator=torch.Generator().manual_seed(0))
    exact = totals.double() * multiplier[:, None]
    assert ((multiply(totals, whole[:, None], shift[:, None]) - exact).abs() <= 0.5 + exact.abs() * 2**-31).all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("weights", [Quantizer(8), Quantizer(4, granularity="channel"), Quantizer(8, restricted=False)])
@pytest.mark.parametrize("acts", [A8, Quantizer(8), Quantizer(5, symmetric=False), Quantizer(8, symmetric=False)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_agrees_with_fake_quantisation_within_a_step(kernel, weights, acts, bias):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(30, 20, bias=bias), nn.ReLU(), nn.Linear(20, 4)), data(64, 30)
    q = quantize(net, x, weights, acts)
    integer = to_integer(q, kernel)
    with torch.no_grad():
        first = integer.get_submodule("0")
        codes, step = first(x), float(first.out_scale)
        assert codes.dtype == torch.uint8 and first.relu
        hidden = q[2].input_quant(q[1](q[0](x)))
        assert ((codes - first.out_zero) * step - hidden).abs().max() <= step * 1.0001
        one = to_integer(quantize(net[0], x, weights, acts), kernel)
        assert isinstance(one, IntegerLayer)
        fine = float(one.in_scale * one.weight_scale.max())  # the step of int32 sums, which a bias is rounded to
        assert (one(x) - quantize(net[0], x, weights, acts)(x)).abs().max() <= fine


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_convolutional_network_hands_codes_from_layer_to_layer(kernel):
    net, x = convnet(), data(16, 3, 12, 12)
    q = quantize(net, x)
    integer = to_integer(q, kernel)
    layers = [part for part in integer.modules() if isinstance(part, IntegerLayer)]
    assert [bool(layer.out_top) for layer in layers] == [True, True, True, False]
    assert [layer.relu for layer in layers] == [True, True, True, False]
    assert sqnr(q(x), integer(x)) > 35 and sqnr(net(x), integer(x)) > 25
    assert integer(x[:1]).shape == (1, 5) and integer(x[:0]).shape == (0, 5)


@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("options", [{"stride": 2, "padding": 1}, {"dilation": 2}, {"groups": 2, "padding": "same"}])
@pytest.mark.parametrize("kernel", KERNELS)
def test_convolutions_of_any_dimension_and_geometry(conv, options, kernel):
    torch.manual_seed(0)
    layer, x = conv(4, 6, 3, **options), data(3, 4, *[7] * {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[conv])
    q = quantize(layer, x)
    integer = to_integer(q, kernel)
    out = integer(x)
    assert out.is_contiguous() and out.shape == layer(x).shape
    assert (out - q(x)).abs().max() <= float(integer.in_scale * integer.weight_scale.max())


@pytest.mark.parametrize("kernel", KERNELS)
def test_dynamic_ranges_are_those_of_each_input(kernel):
    net, x = convnet(), data(16, 3, 12, 12)
    q = quantize(net, x, mode="dynamic")
    integer = to_integer(q, kernel)
    assert sqnr(q(9 * x), integer(9 * x)) > 30


def test_asymmetric_weights_run_in_plain_arithmetic():
    net, x = nn.Linear(20, 8), data(40, 20)
    for weights in (Quantizer(8, symmetric=False), Quantizer(8, symmetric=False, signed=False, granularity="channel")):
        q = quantize(net, x, weights)
        integer = to_integer(q)
        assert integer.kernel == "plain"
        assert (integer(x) - q(x)).abs().max() <= float(integer.in_scale * integer.weight_scale.max())
        with pytest.raises(PomonaError, match="kernel='onednn' cannot run the layer: its weights are not symmetric"):
            to_integer(q, "onednn")


def test_sums_end_codes_where_layers_meet():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            h = self.a(x).relu()
            return self.c(F.relu(h + self.b(h))).view(x.shape[0], -1)

    torch.manual_seed(0)
    net, x = Residual(), data(32, 8)
    q = quantize(net, x)
    integer = to_integer(q)
    assert not any(part.out_top for part in integer.modules() if isinstance(part, IntegerLayer))
    assert sqnr(q(x), integer(x)) > 50


def test_branches_with_one_range_share_codes():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x):
            h = F.relu(self.a(x))
            return self.b(h) + self.c(h)

    torch.manual_seed(0)
    net, x = Branches(), data(32, 8)
    q = quantize(net, x)
    integer = to_integer(q)
    assert integer.a.out_top == 255
    assert sqnr(q(x), integer(x)) > 40


def test_a_network_that_cannot_be_traced_exchanges_floats(caplog):
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(400, 3)

        def forward(self, x):
            h = self.a(x)
            return self.b((h if h.sum() > 0 else -h).view(len(x), -1))

    torch.manual_seed(0)
    net, x = Fickle(), data(8, 3, 12, 12)
    q = quantize(net, x)
    with caplog.at_level(logging.WARNING, "pomona.edit"):
        integer = to_integer(q)
    assert "layers exchange floats, as the network cannot be traced" in caplog.text
    assert sqnr(q(x), integer(x)) > 50


def test_layers_that_cannot_run_on_integers_stay(caplog):
    net, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), data(20, 8)
    q = quantize(net, x, {"0": Quantizer(4, mapping="log2"), "2": Quantizer(8)})
    with caplog.at_level(logging.INFO, "pomona.edit"):
        integer = to_integer(q)
    assert "0 stays in floating point: its weight has mapping='log2'" in caplog.text
    assert isinstance(integer.get_submodule("2"), IntegerLayer)
    assert sqnr(q(x), integer(x)) > 60
    with pytest.raises(PomonaError, match="no layer of the network can run on integers .0: its weight is not quant"):
        to_integer(net)


def test_weights_are_int8_in_the_state_dict_and_copies_agree():
    net, x = convnet(), data(16, 3, 12, 12)
    integer, other = to_integer(quantize(net, x)), to_integer(quantize(net, 2 * x))
    out = integer(x)
    assert {v.dtype for k, v in integer.state_dict().items() if k.endswith(".weight")} == {torch.int8}
    other(x)
    other.load_state_dict(integer.state_dict())
    assert torch.equal(other(x), out)
    assert torch.equal(copy.deepcopy(integer)(x), out)


def test_export_gives_the_same_in_portable_operations():
    net, x = convnet(), data(16, 3, 12, 12)
    for mode in ("ptq", "dynamic"):
        integer = to_integer(quantize(net, x, mode=mode))
        program = torch.export.export(integer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        assert not any("onednn" in str(node.target) for node in program.graph.nodes)
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        buffer.seek(0)
        assert sqnr(integer(x[:5]), torch.export.load(buffer).module()(x[:5])) > 35


def test_float64_networks_give_float64():
    net, x = nn.Linear(6, 3).double(), data(9, 6).double()
    assert to_integer(quantize(net, x))(x).dtype == torch.float64


def test_codes_of_images_have_the_channels_last():
    codes = encode(data(2, 3, 4, 5), 0.1, 100, 255)
    assert codes.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(codes, (data(2, 3, 4, 5) / 0.1).round().add(100).clamp(0, 255).byte())


def test_unknown_kernel():
    net, x = nn.Linear(6, 3), data(9, 6)
    with pytest.raises(PomonaError, match="kernel='fbgem' is not known"):
        to_integer(quantize(net, x), "fbgem")
