r"""Dynamic channel pruning: from the activation before a layer predict which of its channels fire, for each input.

With the response :math:`a_c = \max_{hw} |h_c|` of channel c and its share :math:`p_c = a_c / \sum a` of the mass, the
largest channels are wanted whose shares together stay within tau:

.. math:: t_{(k)} = 1\Big[\sum_{j \le k} p_{(j)} \le \tau\Big], \qquad m = 1[\sigma(g(x)) > 1/2], \qquad
          L = \mathrm{CE} + \frac{1}{L} \sum_l \mathrm{BCE}(g_l(x_l), t_l)

The next layer sees :math:`m \odot h`. No weight of a sparsity loss has to be tuned, and what a tau will save can be
measured before any training, with the targets as masks.

Source: Fire Together Wire Together: A Dynamic Pruning Approach with Self-Supervised Mask Prediction (arXiv 2110.08232).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pomona.edit.ftwt_layers import ChannelMask, DynamicLayer, Masks, Pass, depthwise, mass_target, uniform_target
from pomona.errors import PomonaError, check_positive, unknown
from pomona.nets import cost
from pomona.trace.axes import axes as trace_axes
from pomona.trace.axis import AxisSet

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu_": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "mish": nn.Mish,
    "tanh": nn.Tanh,
}
"""Functions with f(0) = 0, so that a masked channel stays zero."""
POOLS = tuple(
    getattr(nn, f"{kind}Pool{d}d") for kind in ("Max", "Avg", "AdaptiveMax", "AdaptiveAvg") for d in (1, 2, 3)
)
KEEPS_ZERO = (*ACTIVATIONS.values(), *POOLS, nn.modules.dropout._DropoutNd, nn.Identity, nn.Flatten)
KEEPS_ZERO_NAMES = {*ACTIVATIONS, "dropout", "flatten", "mean", "amax"} | {
    f"{kind}_pool{d}d" for kind in ("max", "avg", "adaptive_max", "adaptive_avg") for d in (1, 2, 3)
}
FOLLOWS = (*ACTIVATIONS.values(), _BatchNorm, nn.modules.dropout._DropoutNd, nn.Identity)


class DynamicChannels(nn.Module):
    """A copy of a network whose convolutions compute other channels for each input.

    In training call :meth:`aux_loss` after the forward pass and add it to the task's loss, as
    :func:`pomona.train.fit` does.

    Args:
        net: a trained network that ``torch.fx`` can trace, best fine-tuned with a small learning rate; left as it was.
        example: a batch of its inputs.
        tau: share of the mass that is wanted, in (0, 1].
        ratio: in its place a share of the channels, equal for all inputs.
        mode: ``decoupled``: predictors learn from the cross-entropy of their masks alone and leave the network in
            peace; ``joint``: that reaches the network too, and the task's loss the predictors, straight through the
            threshold.
        hidden: units of a hidden layer (batch norm, relu) of each predictor; none by default.
        skip: names of convolutions to leave whole; ``first`` is the first one.
        residual: ``inner``: mask channels that one convolution alone makes; ``after``: also the sums of residual
            blocks, after their activation.
        seed: of the predictors' weights.

    Attributes:
        masks: ``predicted``; ``target``, what the predictors should say; ``all``, none masked; or
            ``masks(layer's name, logits (B, C)) -> (B, C)``.
        gather: for one input at a time, in evaluation: compute only what the masks leave. Same outputs.
        total: FLOPs of the whole network for one input.
        overhead: FLOPs of all predictors for one input.

    Raises:
        PomonaError: a network that cannot be traced or has no convolution to mask, or an option out of range.

    Source: Fire Together Wire Together (arXiv 2110.08232).
    """

    def __init__(
        self,
        net: nn.Module,
        example: Tensor,
        *,
        tau: float = 0.9,
        ratio: float | None = None,
        mode: Literal["decoupled", "joint"] = "decoupled",
        hidden: int | None = None,
        skip: Sequence[str] = ("first",),
        residual: Literal["inner", "after"] = "inner",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if mode not in ("decoupled", "joint"):
            raise unknown("mode", mode, ("decoupled", "joint"))
        if residual not in ("inner", "after"):
            raise unknown("residual", residual, ("inner", "after"))
        if hidden is not None:
            check_positive(hidden=hidden)
        self.shared = Pass(mode, _target(tau, ratio))
        self.tau, self.ratio = tau, ratio
        self.total = cost.flops(net, example)
        with torch.random.fork_rng():
            torch.default_generator.manual_seed(seed)
            self.net = _wired(net, example, self.shared, hidden, tuple(skip), residual)
        self.train(net.training)
        predictors = nn.ModuleList(layer.predictor for layer in self.layers() if layer.predictor is not None)
        self.overhead = sum(2 * m.weight.numel() for m in predictors.modules() if isinstance(m, nn.Linear))

    @property
    def masks(self) -> Masks:
        return self.shared.masks

    @masks.setter
    def masks(self, value: Masks) -> None:
        if not callable(value) and value not in ("predicted", "target", "all"):
            raise unknown("masks", value, ("predicted", "target", "all"))
        self.shared.masks = value

    @property
    def gather(self) -> bool:
        return self.shared.gather

    @gather.setter
    def gather(self, value: bool) -> None:
        self.shared.gather = value

    def layers(self) -> Iterator[DynamicLayer]:
        """The layers that masks change, in order."""
        return (module for module in self.net.modules() if isinstance(module, DynamicLayer))

    def forward(self, x: Tensor) -> Tensor:
        """(B, *) -> what the network gives.

        Raises:
            PomonaError: ``gather`` in training, with another number of inputs than one, or with targets as masks.
        """
        shared = self.shared
        if shared.gather and (self.training or len(x) != 1 or shared.masks in ("target", "all")):
            raise PomonaError(
                f"gather=True takes one input in evaluation mode and masks that are known before the layer; "
                f"got {len(x)}, training={self.training}, masks={shared.masks!r}"
            )
        shared.logits, shared.chosen, shared.losses = {}, {}, []
        return self.net(x)

    def aux_loss(self) -> Tensor:
        """Mean over layers of the masks' binary cross-entropy in the last forward pass, in training.

        Raises:
            PomonaError: if that was not in training mode.
        """
        if not self.shared.losses:
            raise PomonaError("aux_loss needs a forward pass in training mode before it")
        return torch.stack(self.shared.losses).mean()

    def kept(self) -> dict[str, float]:
        """Share of the channels that each layer's mask kept in the last forward pass, by its name."""
        return {key: float(mask.detach().mean()) for key, mask in self.shared.chosen.items()}

    @torch.no_grad()
    def active_flops(self, x: Tensor, batch_size: int = 512) -> Tensor:
        """(n,) FLOPs that the masks leave for each input, predictors (:attr:`overhead`) not counted.

        A layer costs ``FLOPs * k_out / C_out * k_in / C_in``; what is neither convolution nor linear counts whole.
        """
        training, gather = self.training, self.gather
        self.eval()
        self.gather = False
        found = []
        for part in x.split(batch_size):
            self(part)
            saved = torch.stack([((1 - layer.active()) * layer.flops).expand(len(part)) for layer in self.layers()])
            found.append(self.total - saved.sum(0))
        self.gather = gather
        self.train(training)
        return torch.cat(found)

    def estimate_flops(self, x: Tensor, tau: float | None = None) -> float:
        """Mean FLOPs for one input if the predictors were perfect: with the targets as masks, before any training.

        Args:
            x: inputs (n, *).
            tau: in place of the network's own.
        """
        target, masks = self.shared.target, self.masks
        if tau is not None:
            self.shared.target = _target(tau, None)
        self.masks = "target"
        try:
            return float(self.active_flops(x).double().mean())
        finally:
            self.shared.target, self.masks = target, masks

    def choose_tau(self, x: Tensor, budget: float, steps: int = 12) -> float:
        """The largest tau, by bisection, with which inputs like ``x`` take at most ``budget`` FLOPs; it is set.

        Raises:
            PomonaError: a budget that one channel a layer exceeds.
        """
        low, high = 1e-6, 1.0
        if (least := self.estimate_flops(x, low)) > budget:
            raise PomonaError(f"budget={budget:.0f} FLOPs is too small; one channel a layer takes {least:.0f}")
        if self.estimate_flops(x, high) <= budget:
            low = high
        for _ in range(steps if low < high else 0):
            middle = (low + high) / 2
            low, high = (middle, high) if self.estimate_flops(x, middle) <= budget else (low, middle)
        self.tau, self.ratio, self.shared.target = low, None, _target(low, None)
        return low


def _target(tau: float, ratio: float | None) -> Callable[[Tensor], Tensor]:
    for name, value in (("tau", tau), ("ratio", ratio)):
        if value is not None and not 0 < value <= 1:
            raise PomonaError(f"{name}={value} must lie above 0 and at most at 1")
    return partial(mass_target, tau=tau) if ratio is None else partial(uniform_target, ratio=ratio)


# --- the network with masks put in ------------------------------------------------------------------------------


def _wired(
    net: nn.Module, example: Tensor, shared: Pass, hidden: int | None, skip: tuple[str, ...], residual: str
) -> fx.GraphModule:
    trace = trace_axes(net, example)
    try:
        graph = fx.symbolic_trace(copy.deepcopy(net).eval())
    except Exception as error:  # fx raises whatever the network's own code meets
        raise PomonaError(f"the network cannot be traced by torch.fx: {str(error).splitlines()[0]}") from error
    with torch.no_grad():
        ShapeProp(graph).propagate(example)
    nodes = [node for node in graph.graph.nodes if node.op == "call_module"]
    used = [str(node.target) for node in nodes]
    modules = {node: graph.get_submodule(str(node.target)) for node in nodes}
    plain = [n for n, m in modules.items() if isinstance(m, _ConvNd) and not isinstance(m, _ConvTransposeNd)]
    names = [str(node.target) for node in plain]
    for name in skip:
        if name not in (*names, "first"):
            raise unknown("skip", name, ("first", *names))
    held: dict[fx.Node, str] = {}  # the mask on what a node gives
    for node in nodes:
        module, name = modules[node], str(node.target)
        if used.count(name) > 1 or not (node in plain or isinstance(module, nn.Linear)):
            continue
        size = node.meta["tensor_meta"].shape
        source = _source(node, held, graph) if node in plain or len(size) == 2 else None
        key, predictor, end = None, None, node
        if node in plain:
            end = _end(node, graph, residual == "after")
            left = name in skip or ("first" in skip and node is plain[0]) or end in held
            if depthwise(module):
                key = source
            elif not left and _maskable(trace, name, graph, residual == "after") and module.groups == 1:  # type: ignore[union-attr]
                key, predictor = name, _predictor(module, hidden)
        if source is None and key is None:
            continue
        if not isinstance(module, nn.Linear) and module.groups > 1 and not depthwise(module):  # type: ignore[operator]
            continue  # which channels a group reads does not go by the mask alone
        positions = size[:-1].numel() if isinstance(module, nn.Linear) else size.numel() // size[1]
        flops = 2.0 * module.weight.numel() * positions / len(example)  # type: ignore[operator, union-attr]
        graph.set_submodule(name, DynamicLayer(module, shared, source, key, predictor, flops))
        if key is not None:
            place = "mask_after_" + name.replace(".", "_")
            graph.add_submodule(place, ChannelMask(shared, key, judges=predictor is not None))
            with graph.graph.inserting_after(end):
                masked = graph.graph.call_module(place, (end,))
            masked.meta = dict(end.meta)
            end.replace_all_uses_with(masked, lambda user, new=masked: user is not new)
            held[masked] = held[end] = key
    if not held:
        raise PomonaError("the network has no convolution whose channels can be masked; check skip and residual")
    graph.recompile()
    return graph


def _predictor(conv: Any, hidden: int | None) -> nn.Sequential:
    """Pooled inputs (B, C_in) -> logits (B, C_out)."""
    inner = [] if hidden is None else [nn.Linear(conv.in_channels, hidden), nn.BatchNorm1d(hidden), nn.ReLU()]
    last = nn.Linear(conv.in_channels if hidden is None else hidden, conv.out_channels)
    return nn.Sequential(*inner, last).to(conv.weight)


def _maskable(trace: AxisSet, name: str, graph: nn.Module, sums: bool) -> bool:
    """Whether a convolution makes units that nothing normalises over, alone or (``sums``) with others."""
    for axis in trace.at(f"{name}.weight", 0):
        layers = {place.name.rpartition(".")[0] for place in axis.places if place.role == "out"}
        makers = {one for one in layers if not depthwise(graph.get_submodule(one))}
        if axis.kind == "unit" and not axis.coupled and (sums or makers == {name}):
            return True
    return False


def _named(node: fx.Node) -> str:
    return str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))


def _is(node: fx.Node, graph: nn.Module, kinds: tuple[Any, ...], names: Any) -> bool:
    if node.op == "call_module":
        return isinstance(graph.get_submodule(str(node.target)), kinds)
    return node.op in ("call_function", "call_method") and _named(node) in names


def _end(node: fx.Node, graph: nn.Module, through_sums: bool) -> fx.Node:
    """The last of the norms, activations (and sums) that alone read a convolution's output one after another."""
    names = {*ACTIVATIONS, "dropout", *(("add", "iadd", "add_") if through_sums else ())}
    while len(node.users) == 1 and _is(user := next(iter(node.users)), graph, FOLLOWS, names):
        node = user
    return node


def _source(node: fx.Node, held: dict[fx.Node, str], graph: nn.Module) -> str | None:
    """The mask on a layer's input, looked for behind what keeps zeros at zero and channels apart."""
    while len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
        if node in held:
            return held[node]
        if not _is(node, graph, KEEPS_ZERO, KEEPS_ZERO_NAMES) or not _apart(node, graph):
            return None
    return None


def _apart(node: fx.Node, graph: nn.Module) -> bool:
    """Whether a node that takes a mean or flattens leaves the batch and the channels in their order."""
    if _named(node) in ("mean", "amax"):
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        before = node.args[0].meta["tensor_meta"].shape  # type: ignore[union-attr]
        dims = (dims,) if isinstance(dims, int) else dims
        return isinstance(dims, (tuple, list)) and all(int(d) % len(before) >= 2 for d in dims)  # type: ignore[arg-type]
    module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, nn.Flatten):
        return module.start_dim >= 1
    start = node.args[1] if len(node.args) > 1 else node.kwargs.get("start_dim", 0)
    return _named(node) != "flatten" or (isinstance(start, int) and start >= 1)
