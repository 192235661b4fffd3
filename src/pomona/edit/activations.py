"""What the units of two networks put out on the same inputs: correlations to match by, statistics to repair by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from pomona.errors import PomonaError
from pomona.trace.axis import Axis, AxisSet

_ATEN = torch.ops.aten
CHANNEL = {
    _ATEN.linear.default: -1,
    **{getattr(_ATEN, f"conv{d}d").default: 1 for d in (1, 2, 3)},
    **{getattr(_ATEN, f"conv{d}d").padding: 1 for d in (1, 2, 3)},
}
"""Operations whose outputs are one channel a row of their weight -> the dimension of the channels."""


@dataclass(frozen=True)
class Producer:
    """An operation that produces units: its node, the names of its weight and bias, and the channels' dimension."""

    node: fx.Node
    weight: str
    bias: str | None
    dim: int


def producers(graph: fx.Graph) -> Iterator[Producer]:
    """The linear layers and convolutions of an exported graph whose weight is a parameter as it stands."""
    for node in graph.nodes:
        if node.target in CHANNEL and node.args[1].op == "get_attr":
            bias = node.args[2] if len(node.args) > 2 else None
            name = str(bias.target) if isinstance(bias, fx.Node) and bias.op == "get_attr" else None
            yield Producer(node, str(node.args[1].target), name, CHANNEL[node.target])


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, wanted: list[Producer]) -> None:
        super().__init__(module)
        self.wanted = {one.node: one for one in wanted}
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        out = super().run_node(n)
        if n in self.wanted:
            one = self.wanted[n]
            rows = out.movedim(one.dim, 0).flatten(1)
            known = self.found.get(one.weight)  # a layer may be used more than once
            self.found[one.weight] = rows if known is None else torch.cat([known, rows], 1)
        return out


@torch.no_grad()
def unit_outputs(net: nn.Module, axes: AxisSet, inputs: Tensor) -> dict[str, Tensor]:
    """Weight's name -> (rows of the weight, examples and positions) of the outputs of linear layers and convolutions,
    for a network of the traced one's architecture, in evaluation mode.
    """
    module = axes.program.module()
    wanted = list(producers(module.graph))
    recorder = _Recorder(module, wanted)
    own = {**dict(net.named_parameters(remove_duplicate=False)), **dict(net.named_buffers(remove_duplicate=False))}
    size = axes.example[0].shape[0]
    parts: list[dict[str, Tensor]] = []
    kept = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    state = {name: own[name] for name in kept if name in own}
    for part in inputs.split(size):
        if len(part) < size:
            break  # the graph was exported at this batch size
        recorder.found = {}
        functional_call(_Run(recorder), {f"module.{k}": v for k, v in state.items()}, (part,))
        parts.append(recorder.found)
    if not parts:
        raise PomonaError(f"data has {len(inputs)} inputs; the trace's example needs {size} or more")
    return {one.weight: torch.cat([p[one.weight] for p in parts], 1) for one in wanted}


class _Run(nn.Module):
    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.module = recorder.module
        self._recorder = (recorder,)

    def forward(self, x: Tensor) -> object:
        return self._recorder[0].run(x)


@dataclass
class Correlations:
    """Correlations of the units of two networks; those of b in b's own order.

    Attributes:
        by_weight: name of a producing weight -> (its rows in a, its rows in b).
    """

    by_weight: Mapping[str, Tensor]

    def gain(self, axis: Axis) -> Tensor:
        """(units, units): correlations summed over all that produces the axis and over each unit's own rows."""
        total = torch.zeros(axis.size, axis.size, dtype=torch.float64)
        for place in axis.places:
            if place.role == "out" and place.dim == 0 and place.name in self.by_weight:
                found = self.by_weight[place.name]
                for j in range(place.index.shape[1]):
                    total += found[place.index[:, j]][:, place.index[:, j]]
        return total


def unit_correlations(net_a: nn.Module, net_b: nn.Module, axes: AxisSet, inputs: Tensor) -> Correlations:
    """Pearson's correlation of every unit of a with every unit of b over examples and positions."""
    a, b = (unit_outputs(net, axes, inputs) for net in (net_a, net_b))
    return Correlations({name: _standard(a[name]) @ _standard(b[name]).T / a[name].shape[1] for name in a})


def _standard(rows: Tensor) -> Tensor:
    rows = rows.double()
    return (rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True, correction=0).clamp_min(1e-12)


@torch.no_grad()
def normalise_like(net: nn.Module, ends: tuple[nn.Module, nn.Module], axes: AxisSet, inputs: Tensor) -> None:
    r"""Give each unit of a merged network the mean of the ends' means and deviations, layer after layer (in place).

    .. math:: w \leftarrow w\, \bar\sigma / \sigma, \qquad b \leftarrow (b - \mu)\, \bar\sigma / \sigma + \bar\mu

    Layers without a bias keep their mean scaled, as they have nowhere to put a shift.
    """
    a, b = (unit_outputs(end, axes, inputs) for end in ends)
    tensors = dict(net.named_parameters(remove_duplicate=False))
    for one in producers(axes.program.module().graph):
        now = unit_outputs(net, axes, inputs)[one.weight]
        mean = (a[one.weight].mean(1) + b[one.weight].mean(1)) / 2
        deviation = (a[one.weight].std(1) + b[one.weight].std(1)) / 2
        scale = deviation / now.std(1).clamp_min(1e-12)
        tensors[one.weight].mul_(scale.view(-1, *[1] * (tensors[one.weight].ndim - 1)))
        if one.bias is not None:
            tensors[one.bias].sub_(now.mean(1)).mul_(scale).add_(mean)
