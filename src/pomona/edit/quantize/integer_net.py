"""A fake-quantised network as one that computes in integers.

Source: A Survey of Quantization Methods for Efficient Neural Network Inference (arXiv 2103.13630).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pomona.edit.quantize.calibrate import layers_of
from pomona.edit.quantize.integer import IntegerLayer, Kernel, obstacle
from pomona.errors import PomonaError

log = logging.getLogger("pomona.edit")
RELU = {nn.ReLU, F.relu, torch.relu, "relu", "relu_"}
MAX_POOL = {nn.MaxPool2d, F.max_pool2d}
MOVES = {nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, F.dropout}
MOVES |= {torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, torch.detach}
MOVES |= {"flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "contiguous", "detach"}
"""What leaves values as they are, so that codes pass it."""
SHAPE = {getattr, "size", "dim"}


def to_integer(net: nn.Module, kernel: Kernel = "auto") -> nn.Module:
    """The network of :func:`pomona.edit.quantize.quantize` with integer layers, for inference on the CPU.

    Where the code can be traced (``torch.fx``), a ReLU is computed within the layer before it and layers hand uint8
    codes to one another, through max pooling and changes of shape; elsewhere layers take and give floats. Layers that
    cannot run on integers stay as they are, and the log says why. The result has a ``state_dict``, can be copied, and
    ``torch.export`` gives the same arithmetic in portable operations.

    Args:
        net: with quantised weights and inputs, trained on or not; it is not changed.
        kernel: see :class:`pomona.edit.quantize.IntegerLayer`.

    Raises:
        PomonaError: if no layer can run on integers.
    """
    net = copy.deepcopy(net).eval().cpu()
    reasons = {}
    for name, layer in layers_of(net).items():
        reasons[name] = obstacle(layer)
        if reasons[name]:
            continue
        parent, _, leaf = name.rpartition(".")
        if not parent and not leaf:
            return IntegerLayer(layer, kernel).eval()
        setattr(net.get_submodule(parent), leaf, IntegerLayer(layer, kernel))
    if all(reasons.values()):
        found = "; ".join(f"{name}: {why}" for name, why in reasons.items()) or "it has none"
        raise PomonaError(f"no layer of the network can run on integers ({found})")
    for name, why in reasons.items():
        if why:
            log.info("%s stays in floating point: %s", name, why)
    return _joined(net).eval()


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, IntegerLayer) or super().is_leaf_module(m, module_qualified_name)


def _joined(net: nn.Module) -> nn.Module:
    """Layers that hand codes to one another, if ``torch.fx`` can trace the network."""
    try:
        traced = fx.GraphModule(net, _Tracer().trace(net), type(net).__name__)
    except Exception as error:  # whatever the user's code raises on a symbolic value
        log.warning("layers exchange floats, as the network cannot be traced: %s", error)
        return net
    nodes = list(traced.graph.nodes)
    calls = [node.target for node in nodes if node.op == "call_module"]
    for node in nodes:
        if node.op == "call_method" and node.target == "view":  # kernels give channels last, which has no such view
            node.target = "reshape"
        layer = _layer(traced, node)
        if layer is None:
            continue
        layer.contiguous = False
        if calls.count(node.target) == 1:  # a layer that is called twice can have no output of its own
            _join(traced, node, layer)
    traced.graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def _layer(net: fx.GraphModule, node: fx.Node) -> IntegerLayer | None:
    module = net.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, IntegerLayer) else None


def _kind(net: fx.GraphModule, node: fx.Node) -> Any:
    """A module's class, a function, or a method's name."""
    return type(net.get_submodule(str(node.target))) if node.op == "call_module" else node.target


def _join(net: fx.GraphModule, node: fx.Node, layer: IntegerLayer) -> None:
    users = list(node.users)
    if len(users) == 1 and _kind(net, users[0]) in RELU:
        layer.relu = True
        users[0].replace_all_uses_with(node)
        net.graph.erase_node(users[0])
    ends, pools = [], []
    for user, source in _reached(net, node):
        if _kind(net, user) in MAX_POOL:
            pools.append(user)
        elif _kind(net, user) not in MOVES:
            ends.append(_layer(net, user) if user.op == "call_module" and user.args[0] is source else None)
    first = next(iter(ends), None)
    if first is None or first.dynamic or any(end is None or not _same_codes(first, end) for end in ends):
        return
    layer.emit(first)
    for pool in pools:
        _pool_codes(net, pool)


def _reached(net: fx.GraphModule, node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(user, what it uses) behind ``node``, through whatever codes can pass; questions of shape left out."""
    for user in node.users:
        kind = _kind(net, user)
        if kind in SHAPE:
            continue
        yield user, node
        if kind in MOVES or kind in MAX_POOL:
            yield from _reached(net, user)


def _same_codes(one: IntegerLayer, other: IntegerLayer) -> bool:
    same = one.in_scale == other.in_scale and one.in_zero == other.in_zero and one.top == other.top
    return bool(same) and not other.dynamic


def _pool_codes(net: fx.GraphModule, node: fx.Node) -> None:
    """Replace max pooling by that of codes."""
    if node.op == "call_module":
        pool: Any = net.get_submodule(str(node.target))
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
        node.kwargs = {name: getattr(pool, name) for name in names}
        node.op = "call_function"
    node.target = max_pool_codes


def max_pool_codes(
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    """Max pooling of (batch, channels, height, width) uint8 codes, which rise with their values."""
    if torch.compiler.is_exporting():
        return F.max_pool2d(x.float(), kernel_size, stride, padding, dilation, ceil_mode).to(torch.uint8)
    pairs = [[v, v] if isinstance(v, int) else list(v) for v in (kernel_size, stride or kernel_size, padding, dilation)]
    return torch.ops.quantized.max_pool2d(x, *pairs, ceil_mode)
