"""Batch norms folded into the layer before them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.nn.utils import fuse_conv_bn_weights, fuse_linear_bn_weights

from pomona.edit.apply import tensors
from pomona.edit.edit import Edit
from pomona.trace.program import export

LINEAR = ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold_batch_norms(net: nn.Module, *example: object) -> Edit:
    """Fold each batch norm into the convolution or linear layer that it follows: exact in evaluation mode.

    ``w' = w gamma / sqrt(var + eps)``, ``b' = (b - mean) gamma / sqrt(var + eps) + beta``; the norm becomes an
    ``nn.Identity``. Norms stay that do not directly follow such a layer, whose layer feeds something else too or is
    used twice, or that are of a class of the user's own; the edit's notes name them.

    Args:
        net: any module; it is not changed.
        example: the arguments of one forward pass.

    Raises:
        PomonaError: the network cannot be exported.

    Source: Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference
    (arXiv 1712.05877).
    """
    program = export(net, *example)
    held = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs if spec.target is not None}
    nodes = list(program.graph_module.graph.nodes)
    norms = [node for node in nodes if node.op == "call_function" and _operation(node) == "batch_norm"]
    new, notes = copy.deepcopy(net), []
    with torch.no_grad():
        for node in norms:
            before, names = node.args[0], [held.get(getattr(arg, "name", "")) for arg in node.args[1:5]]
            prefix = str(names[2]).rpartition(".")[0]
            norm: Any = new.get_submodule(prefix) if names[2] else None
            layer: Any = _layer(before, held, new)
            if layer is None or type(norm) not in NORMS or sum(_same(node, other) for other in norms) > 1:
                notes.append(f"kept: batch norm {prefix or node.name!r}")
                continue
            fuse: Any = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
            more = (layer.transposed,) if fuse is fuse_conv_bn_weights else ()
            statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias, *more)
            layer.weight, layer.bias = fuse(layer.weight, layer.bias, *statistics)
            parent, _, leaf = prefix.rpartition(".")
            setattr(new.get_submodule(parent), leaf, nn.Identity())
    return Edit(new, {}, tuple(notes))


def _operation(node: Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).split(".")[0]


def _same(node: Node, other: Node) -> bool:
    return node.args[1:5] == other.args[1:5]


def _layer(node: Node, held: dict[str, str], net: nn.Module) -> nn.Module | None:
    """The module that alone makes the input of a norm and nothing else, with weights of its own."""
    if _operation(node) not in LINEAR or len(node.users) > 1:
        return None
    weight: Any = node.args[1]
    name = held.get(getattr(weight, "name", ""), "")
    prefix, _, leaf = name.rpartition(".")
    module: Any = net.get_submodule(prefix)
    flat = not isinstance(module, nn.Linear) or node.meta["val"].ndim == 2  # else the norm is along another dimension
    plain = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and leaf == "weight" and len(weight.users) == 1
    shared = sum(tensor is getattr(module, "weight", None) for tensor in tensors(net).values()) > 1
    grouped = getattr(module, "transposed", False) and module.groups > 1
    return module if plain and flat and not shared and not grouped else None
