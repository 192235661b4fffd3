"""Integer execution: int8 weights, uint8 activations, int32 sums, by oneDNN's kernels or by plain arithmetic."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pomona.edit.quantize.calibrate import float_weight, input_quant, weight_quant
from pomona.edit.quantize.quantizer import Quantizer, Uniform
from pomona.errors import PomonaError, unknown

Kernel = Literal["auto", "onednn", "plain"]
OPERATIONS = (F.linear, F.conv1d, F.conv2d, F.conv3d)


def fixed_point(multiplier: Tensor) -> tuple[Tensor, Tensor]:
    """``M = M0 2^-shift`` with ``M0`` of 31 bits: a real multiplier as whole numbers, both int64.

    Source: Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference
    (arXiv 1712.05877).
    """
    mantissa, exponent = torch.frexp(multiplier.double())
    whole = (mantissa * 2**31).round().long()
    return whole, 31 - exponent.long()


def multiply(total: Tensor, whole: Tensor, shift: Tensor) -> Tensor:
    """``round(total M)`` of int32 sums by a 64-bit product and a rounding shift; halves go up."""
    shift = shift.clamp(max=62)
    return (total.long() * whole + (1 << (shift - 1))) >> shift


def onednn_is_exact(bits: int) -> bool:
    """Whether oneDNN's int8 kernels are here and cannot saturate: older x86 adds pairs of products in 16 bits."""
    here = torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")
    return here and (bits < 8 or torch.cpu._is_vnni_supported())


def encode(x: Tensor, scale: Tensor | float, zero: Tensor | float, top: int) -> Tensor:
    """uint8 codes ``clamp(round(x / S) + Z, 0, top)``, of images with the channels last, as the kernels like them."""
    codes = (x / scale).round_().add_(zero).clamp_(0, top)
    return codes.to(torch.uint8, memory_format=torch.channels_last if x.ndim == 4 else torch.preserve_format)


def obstacle(layer: nn.Module) -> str:
    """Why the layer cannot run on integers; empty if it can."""
    weights, inputs = weight_quant(layer), input_quant(layer)
    for name, quant in (("weight", weights), ("input", inputs)):
        if quant is None:
            return f"its {name} is not quantised"
        if quant.quantizer.mapping != "uniform":
            return f"its {name} has mapping={quant.quantizer.mapping!r}, not uniform levels"
        if quant.quantizer.bits > 8:
            return f"its {name} has {quant.quantizer.bits} bits, more than 8"
    if weights is not None and isinstance(weights.quantizer.granularity, int):
        return "its weight has ranges within a channel"
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        return f"it pads by {layer.padding_mode!r}"
    if layer.__dict__.get("padding") == "same" and _same(layer) is None:
        return "its padding differs between the sides"
    return ""


def _same(layer: Any) -> list[int] | None:
    """What ``padding="same"`` adds on each side; ``None`` when the sides differ."""
    total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return None if any(t % 2 for t in total) else [t // 2 for t in total]


def _geometry(layer: Any) -> dict[str, Any]:
    """Stride, padding, dilation and groups, in the kernels' order."""
    named = {"valid": [0] * len(layer.stride), "same": _same(layer)}
    padding = named[layer.padding] if isinstance(layer.padding, str) else list(layer.padding)
    return {"stride": list(layer.stride), "padding": padding, "dilation": list(layer.dilation), "groups": layer.groups}


class IntegerLayer(nn.Module):
    r"""A linear layer or convolution on codes.

    .. math:: q_3 = Z_3 + M \sum (q_1 - Z_1)(q_2 - Z_2), \qquad M = S_1 S_2 / S_3

    It takes floats, which it quantises, or the uint8 codes that the layer before it emits; it gives floats, or codes
    where :meth:`emit` has told it the next layer's. Under ``torch.export`` it is plain arithmetic on its integers.

    Args:
        layer: with a uniform quantiser of at most 8 bits on weight and input.
        kernel: ``onednn``; ``plain``, exact integer arithmetic with a fixed-point multiplier, slow; ``auto``, oneDNN
            where it is exact and the weights symmetric.

    Raises:
        PomonaError: if the layer has no such quantisers, or ``onednn`` was asked for and cannot do it.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_zero: Tensor
    bias: Tensor | None
    in_scale: Tensor
    in_zero: Tensor
    out_scale: Tensor
    out_zero: Tensor

    def __init__(self, layer: nn.Module, kernel: Kernel = "auto") -> None:
        super().__init__()
        if kernel not in ("auto", "onednn", "plain"):
            raise unknown("kernel", kernel, ("auto", "onednn", "plain"))
        reason = obstacle(layer)
        weights, inputs = weight_quant(layer), input_quant(layer)
        if reason or weights is None or inputs is None:
            raise PomonaError(f"the layer cannot run on integers: {reason}")
        weight = float_weight(layer)
        grid = weights.grid_for(weight)
        assert isinstance(grid, Uniform)
        outs, self.dims = len(weight), weight.ndim - 2
        shift = 128 if grid.qmax > 127 else 0
        self.register_buffer("weight", (weights.codes(weight) - shift).to(torch.int8))
        self.register_buffer("weight_scale", grid.scale.detach().float().expand(outs, 1).reshape(-1).clone())
        self.register_buffer("weight_zero", (grid.zero.expand(outs, 1).reshape(-1) - shift).long().clone())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float().clone())  # type: ignore[union-attr, operator]
        self.quantizer: Quantizer = inputs.quantizer
        self.dynamic = inputs.update == "dynamic"
        source = inputs.grid()
        assert isinstance(source, Uniform)
        self.offset = -source.qmin  # codes are stored from 0: uint8
        self.top = source.qmax - source.qmin
        self.register_buffer("in_scale", source.scale.detach().double().reshape(()).clone())
        self.register_buffer("in_zero", (source.zero.long() + self.offset).reshape(()).clone())
        self.register_buffer("out_scale", torch.ones((), dtype=torch.float64))
        self.register_buffer("out_zero", torch.zeros((), dtype=torch.long))
        self.out_top = 0  # the greatest code emitted; 0: floats are
        self.relu = False
        self.contiguous = True  # floats in rows, as views of them need; kernels give channels last
        self.dtype = weight.dtype
        self.geometry: dict[str, Any] = {} if isinstance(layer, nn.Linear) else _geometry(layer)
        symmetric = not self.weight_zero.any()
        fast = symmetric and onednn_is_exact(self.quantizer.bits)
        if kernel == "onednn" and not fast:
            why = "this CPU or build has no exact int8 kernels" if symmetric else "its weights are not symmetric"
            raise PomonaError(f"kernel='onednn' cannot run the layer: {why}; use kernel='auto'")
        self.kernel = "onednn" if fast and kernel != "plain" else "plain"
        self._packed: tuple[Any, ...] | None = None
        self.register_load_state_dict_post_hook(_unpack)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # oneDNN's layout can be neither copied nor stored

    def emit(self, other: IntegerLayer) -> None:
        """Give codes as ``other`` takes them instead of floats."""
        self.out_scale.copy_(other.in_scale)
        self.out_zero.copy_(other.in_zero)
        self.out_top, self._packed = other.top, None

    def forward(self, x: Tensor) -> Tensor:
        """Floats or codes in, floats or codes out."""
        if self.kernel == "onednn" and x.numel() and not torch.compiler.is_exporting():
            return self._onednn(x)
        scale, zero = self._source(x)
        codes = x if x.dtype == torch.uint8 else encode(x, scale.to(x), zero.to(x), self.top)
        return (self._portable if torch.compiler.is_exporting() else self._plain)(codes, scale, zero)

    def _source(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero of the input's codes."""
        if not self.dynamic or not x.numel():
            return self.in_scale, self.in_zero
        grid = self.quantizer.fit(x.detach().reshape(1, -1))
        return grid.scale.double().reshape(()), grid.zero.reshape(()).long() + self.offset  # type: ignore[union-attr]

    def _sum(self, codes: Tensor, zero: Tensor) -> Tensor:
        """``sum (q_1 - Z_1)(q_2 - Z_2)``, in the dtype of ``codes``."""
        weight = self.weight.to(codes) - self.weight_zero.to(codes).view(-1, *[1] * (self.weight.ndim - 1))
        return OPERATIONS[self.dims](codes - zero, weight, **self.geometry)

    def _each(self, values: Tensor) -> Tensor:
        """Values of the output channels, to be broadcast over the output."""
        return values.view(-1, *[1] * self.dims)

    def _portable(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The same in floating point, in operations that every exporter knows."""
        total = self._sum(codes.float(), zero.float()) * self._each(self.weight_scale * scale.float())
        total = total if self.bias is None else total + self._each(self.bias)
        total = total.relu() if self.relu else total
        if self.out_top:
            return encode(total, self.out_scale.float(), self.out_zero.float(), self.out_top)
        return self._floats(total)

    def _plain(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Integer arithmetic; sums are below 2^53, so that float64 holds them exactly."""
        total = self._sum(codes.double(), zero)
        step = self.weight_scale.double() * scale
        if self.bias is not None:
            total = total + self._each((self.bias.double() / step).round())
        total = total.clamp_min(0) if self.relu else total
        if not self.out_top:
            return self._floats(total * self._each(step))
        whole, shift = (self._each(part) for part in fixed_point(step / self.out_scale))
        return (multiply(total.long(), whole, shift) + self.out_zero).clamp(0, self.out_top).to(torch.uint8)

    def _onednn(self, x: Tensor) -> Tensor:
        if self._packed is None:
            self._packed = self._pack()
        packed, scale, zero, out_scale, out_zero = self._packed
        if self.dynamic:
            scale, zero = (part.item() for part in self._source(x))
        if x.dtype != torch.uint8:
            x = encode(x, scale, zero, self.top)
        dtype = torch.uint8 if self.out_top else torch.float32
        given = (x, scale, zero, packed, self.weight_scale, self.weight_zero, self.bias, *self.geometry.values())
        asked: tuple[Any, ...] = (out_scale, out_zero, dtype, "relu" if self.relu else "none", [], "")
        out = (torch.ops.onednn.qconv_pointwise if self.dims else torch.ops.onednn.qlinear_pointwise)(*given, *asked)
        if self.out_top:
            return out if self.out_top == 255 else out.clamp_(max=self.out_top)
        return self._floats(out)

    def _floats(self, out: Tensor) -> Tensor:
        return (out.contiguous() if self.contiguous else out).to(self.dtype)

    def _pack(self) -> tuple[Any, ...]:
        """The weight in oneDNN's layout and the scales as numbers: made at the first call, not stored."""
        scale, zero = float(self.in_scale), int(self.in_zero)
        if self.dims:
            geometry = self.geometry.values()
            packed = torch.ops.onednn.qconv_prepack(self.weight, self.weight_scale, scale, zero, *geometry, None)
        else:
            packed = torch.ops.onednn.qlinear_prepack(self.weight, None)
        return packed, scale, zero, float(self.out_scale), int(self.out_zero)

    def extra_repr(self) -> str:
        """Shape and kernel."""
        gives = "codes" if self.out_top else "floats"
        return f"weight={tuple(self.weight.shape)}, kernel={self.kernel}, relu={self.relu}, gives={gives}"


def _unpack(layer: IntegerLayer, _: Any) -> None:
    """Other weights were loaded: their layout is to be made anew."""
    layer._packed = None
