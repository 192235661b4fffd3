"""What quantisers learn from a few batches: ranges of activations, and shifts of the mean."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pomona.edit.quantize.fake import FakeQuant, Shift
from pomona.edit.quantize.quantizer import Grid, Quantizer
from pomona.errors import PomonaError

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Batches = Sequence[tuple[Any, ...]]


def as_batches(example: Tensor | tuple[Any, ...] | Iterable[Any]) -> Batches:
    """A tensor is a batch, a tuple the arguments of one batch, and any other iterable holds several of either."""
    if isinstance(example, (Tensor, tuple)):
        example = [example]
    found = [batch if isinstance(batch, tuple) else (batch,) for batch in example]
    if not found:
        raise PomonaError("example holds no batch; give a tensor, a tuple of arguments or a list of those")
    return found


def layers_of(net: nn.Module) -> dict[str, nn.Module]:
    """Linear layers and convolutions by name."""
    return {name: module for name, module in net.named_modules() if isinstance(module, LAYERS)}


def weight_quant(layer: nn.Module) -> FakeQuant | None:
    """The quantiser of the layer's weight."""
    chain = getattr(layer, "parametrizations", {})
    return next((part for part in chain["weight"] if isinstance(part, FakeQuant)), None) if "weight" in chain else None


def input_quant(layer: nn.Module) -> FakeQuant | None:
    """The quantiser of the layer's input."""
    return layer._modules.get("input_quant")  # type: ignore[return-value]


def float_weight(layer: nn.Module) -> Tensor:
    """The layer's weight before its quantiser, with whatever else (masks, say) comes first."""
    if weight_quant(layer) is None:
        return layer.weight.detach()  # type: ignore[union-attr, operator]
    chain: Any = layer.parametrizations["weight"]  # type: ignore[index]
    weight = chain.original
    for part in chain:
        if isinstance(part, FakeQuant):
            break
        weight = part(weight)
    return weight.detach()


def run_layer(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's operation with other weights."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    return layer._conv_forward(x, weight, bias)  # type: ignore[operator]


@dataclass
class Statistics:
    """What a layer's input was like: extremes of each batch, and evenly spaced values of it."""

    low: list[Tensor] = field(default_factory=list)
    high: list[Tensor] = field(default_factory=list)
    sample: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, most: int = 65_536) -> None:
        """Take a batch into account."""
        if x.numel():
            flat = x.detach().flatten()
            self.low.append(flat.min().view(1, 1))
            self.high.append(flat.max().view(1, 1))
            self.sample.append(flat[:: max(1, len(flat) // most)])

    @property
    def rows(self) -> Tensor:
        """(1, n) sampled values."""
        return torch.cat(self.sample)[None]

    def grid(self, quantizer: Quantizer) -> Grid:
        """The levels for these inputs."""
        if quantizer.mapping != "uniform" or quantizer.range not in ("minmax", "ema"):
            return quantizer.fit(self.rows)
        if quantizer.range == "minmax":
            return quantizer.uniform(torch.stack(self.low).amin(0), torch.stack(self.high).amax(0))
        low, high = self.low[0], self.high[0]
        for a, b in zip(self.low[1:], self.high[1:], strict=True):
            low, high = (old + (1 - quantizer.momentum) * (new - old) for old, new in ((low, a), (high, b)))
        return quantizer.uniform(low, high)


@contextmanager
def _hooked(hooks: Iterable[Any]) -> Iterator[None]:
    hooks = list(hooks)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def observe(net: nn.Module, names: Iterable[str], batches: Batches) -> dict[str, Statistics]:
    """Statistics of the layers' inputs, in the order in which the network first calls them; uncalled ones lack."""
    seen: dict[str, Statistics] = {}

    def watch(name: str) -> Any:
        return lambda _, args: seen.setdefault(name, Statistics()).add(args[0])

    layers = layers_of(net)
    with _hooked(layers[name].register_forward_pre_hook(watch(name)) for name in names):
        for batch in batches:
            net(*batch)
    return seen


@torch.no_grad()
def capture(net: nn.Module, name: str, batches: Batches) -> tuple[Tensor, Tensor]:
    """All inputs (behind their quantiser) and outputs of one layer, batches joined."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs.append(args[0].detach())
        outputs.append(output.detach())

    with _hooked([net.get_submodule(name).register_forward_hook(keep)]):
        for batch in batches:
            net(*batch)
    return torch.cat(inputs), torch.cat(outputs)


@torch.no_grad()
def correct_bias(net: nn.Module, layers: Mapping[str, nn.Module], batches: Batches) -> None:
    """Add ``E[W x] - E[W^ x]`` to each layer's bias, in place, one layer after the other.

    Source: Data-Free Quantization Through Weight Equalization and Bias Correction (arXiv 1906.04721), the variant
    with data.
    """
    for name, layer in layers.items():
        if weight_quant(layer) is None:
            continue
        x, _ = capture(net, name, batches)
        error = run_layer(layer, x, float_weight(layer) - layer.weight, None)  # type: ignore[operator]
        channel = 1 if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) else error.ndim - 1
        shift = error.mean([d for d in range(error.ndim) if d != channel])
        if layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros_like(shift))
        nn.utils.parametrize.register_parametrization(layer, "bias", Shift(shift))  # type: ignore[attr-defined]
