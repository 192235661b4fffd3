"""What quantisation saves and costs, layer by layer.

Source: A Survey of Quantization Methods for Efficient Neural Network Inference (arXiv 2103.13630).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from pomona.edit.quantize.calibrate import as_batches, capture, float_weight, input_quant, layers_of, weight_quant
from pomona.edit.quantize.fake import FakeQuant, only


def sqnr(signal: Tensor, quantized: Tensor) -> float:
    """Signal to quantisation noise, ``10 log10(sum r^2 / sum (r - r^)^2)`` in dB."""
    signal, quantized = signal.detach().double(), quantized.detach().double()
    return float(10 * torch.log10(signal.square().sum() / (signal - quantized).square().sum()))


def stored_bytes(net: nn.Module) -> float:
    """Bytes of the parameters and buffers that a packed file would hold: codes, scales, zeros, and the rest as it is.

    Works for plain networks, for those of ``quantize`` and, up to their scales, of ``to_integer``.
    """
    total = 0.0
    quants = [part for part in net.modules() if isinstance(part, FakeQuant)]
    inside = {id(t) for q in quants for t in (*q.parameters(), *q.buffers())}
    by_weight = {}
    for layer in layers_of(net).values():
        quant = weight_quant(layer)
        if quant is not None:
            original = layer.parametrizations["weight"].original  # type: ignore[index, union-attr]
            by_weight[id(original)] = original.numel() * quant.quantizer.bits / 8
    for tensor in (*net.parameters(), *net.buffers()):
        if id(tensor) not in inside:
            total += by_weight.get(id(tensor), tensor.numel() * tensor.element_size())
    return total + sum(_grid_bytes(quant) for quant in quants)


def _grid_bytes(quant: FakeQuant) -> float:
    if quant.quantizer.mapping != "uniform":
        return quant.levels.numel() * quant.levels.element_size()
    whole = 0 if quant.quantizer.symmetric else quant.zero.numel() * quant.quantizer.bits / 8
    return quant.scale.numel() * quant.scale.element_size() + whole


@torch.no_grad()
def report(net: nn.Module, example: Tensor | tuple[Any, ...] | Iterable[Any]) -> pd.DataFrame:
    """A row for each quantised layer; the float network is the same with its quantisers switched off.

    Columns: ``weight_bits``, ``act_bits``; ``bytes`` of the weight's codes and levels, ``float_bytes`` before;
    ``weight_sqnr`` and ``output_sqnr`` (dB) of the weight and of the layer's output within the quantised network;
    ``sensitivity``, the relative squared error of the network's output when this layer alone is quantised.

    Args:
        net: of :func:`pomona.edit.quantize.quantize`, trained on or not.
        example: as for ``quantize``.
    """
    training = net.training
    net.eval()
    batches = as_batches(example)

    def outputs() -> Tensor:
        return torch.cat([torch.cat([leaf.flatten() for leaf in _leaves(net(*batch))]) for batch in batches])

    with only(net):
        reference = outputs()
    rows = []
    for name, layer in layers_of(net).items():
        weights, inputs = weight_quant(layer), input_quant(layer)
        if weights is None and inputs is None:
            continue
        weight, own = float_weight(layer), layer.weight.detach()  # type: ignore[union-attr, operator]
        with only(net):
            _, clean = capture(net, name, batches)
        _, noisy = capture(net, name, batches)
        with only(net, name):
            alone = outputs()
        before = weight.numel() * weight.element_size()
        rows.append(
            {
                "layer": name,
                "weight_bits": weights.quantizer.bits if weights else 8 * weight.element_size(),
                "act_bits": inputs.quantizer.bits if inputs else 8 * weight.element_size(),
                "bytes": weight.numel() * weights.quantizer.bits / 8 + _grid_bytes(weights) if weights else before,
                "float_bytes": before,
                "weight_sqnr": sqnr(weight, own),
                "output_sqnr": sqnr(clean, noisy),
                "sensitivity": float((alone - reference).square().sum() / reference.square().sum()),
            }
        )
    net.train(training)
    return pd.DataFrame(rows)


def _leaves(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output of any structure."""
    leaves, _ = torch.utils._pytree.tree_flatten(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
