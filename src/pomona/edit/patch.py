"""Sizes that modules hold as attributes, changed to those of their new tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from pomona.edit.layout import Change
from pomona.trace.axis import Axis

Shape = tuple[int, ...]

# attribute <- (tensor, dim); a layer of another class is left to ``patch_named``
KNOWN: dict[type[nn.Module], dict[str, tuple[str, int]]] = {
    nn.Linear: {"out_features": ("weight", 0), "in_features": ("weight", 1)},
    nn.Bilinear: {"out_features": ("weight", 0), "in1_features": ("weight", 1), "in2_features": ("weight", 2)},
    nn.Embedding: {"num_embeddings": ("weight", 0), "embedding_dim": ("weight", 1)},
    nn.EmbeddingBag: {"num_embeddings": ("weight", 0), "embedding_dim": ("weight", 1)},
    nn.GroupNorm: {"num_channels": ("weight", 0)},
    nn.PReLU: {"num_parameters": ("weight", 0)},
    nn.RNNBase: {"input_size": ("weight_ih_l0", 1), "proj_size": ("weight_hr_l0", 0)},
    nn.RNNCellBase: {"input_size": ("weight_ih", 1), "hidden_size": ("weight_hh", 1)},
}
HEADS = (
    "num_heads",
    "n_heads",
    "n_head",
    "nhead",
    "heads",
    "num_attention_heads",
    "num_kv_heads",
    "num_key_value_heads",
)
HEAD_SIZES = ("head_dim", "head_size", "attention_head_size", "d_head", "dim_head")
WIDTHS = (
    "embed_dim", "kdim", "vdim", "hidden_size", "hidden_dim", "hidden_features", "inner_dim", "attn_dim",
    "all_head_size", "split_size", "dim", "d_model", "channels", "num_channels", "in_channels", "out_channels",
    "mid_channels", "num_features", "in_features", "out_features", "features", "width", "planes", "nf", "nx",
    "intermediate_size", "groups",
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Old and new sizes of an edit.

    Attributes:
        shapes: (old, new) shape of the tensors that an edit touched, by name.
        groups: how many groups of a convolution or a group norm come or go, by its name.
        heads: (old, new) number of bundles, by the name of a tensor they lie in.
        runs: (old, new) number of units in each group of an axis that has several, likewise.
    """

    shapes: Mapping[str, tuple[Shape, Shape]]
    groups: Mapping[str, int] = field(default_factory=dict)
    heads: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    runs: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        net: nn.Module,
        edited: Sequence[tuple[Axis, Change]],
        old: Mapping[str, Shape],
        new: Mapping[str, Shape],
    ) -> Sizes:
        """Read off the axes: where every unit is made of whole groups, groups come and go with the units."""
        groups: dict[str, int] = {}
        heads, runs = {}, {}
        for axis, change in edited:
            more = len(change.source) - axis.size
            for place in axis.places:
                if axis.kind == "block":
                    heads[place.name] = (axis.size, len(change.source))
                elif axis.groups > 1:
                    runs[place.name] = (axis.size // axis.groups, len(change.source) // axis.groups)
                prefix, leaf = owner(place.name)
                module = net.get_submodule(prefix)
                count = getattr(module, "num_groups" if isinstance(module, nn.GroupNorm) else "groups", 1)
                if place.dim or leaf != "weight" or not isinstance(module, (_ConvNd, nn.GroupNorm)) or count == 1:
                    continue
                per = old[place.name][0] // count
                row = torch.sort(place.index[0] // per).values
                if len(row) % per == 0 and (row.view(-1, per) == row[::per, None]).all():
                    groups[place.name] = groups.get(place.name, 0) + more * len(row) // per
        by_module = {owner(name)[0]: number for name, number in groups.items()}
        return cls({name: (old[name], new[name]) for name in new}, by_module, heads, runs)


def owner(name: str) -> tuple[str, str]:
    """The module a tensor belongs to and its name there, seen through parametrizations.

    >>> owner("0.parametrizations.weight.original0")
    ('0', 'weight')
    """
    before, _, after = f".{name}".partition(".parametrizations.")
    prefix, _, leaf = before.rpartition(".")
    return (before[1:], after.split(".")[0]) if after else (prefix[1:], leaf)


def patch_known(net: nn.Module, sizes: Sizes) -> None:
    """Sizes held by PyTorch's own layers, read from their new tensors."""
    touched = {owner(name)[0] for name in sizes.shapes}
    for prefix, module in net.named_modules():
        if prefix not in touched:
            continue
        for kind, table in KNOWN.items():
            if isinstance(module, kind):
                for attribute, (leaf, dim) in table.items():
                    if hasattr(module, leaf) and hasattr(module, attribute):
                        setattr(module, attribute, getattr(module, leaf).shape[dim])
        if isinstance(module, nn.RNNBase):
            gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
            module.hidden_size = module.get_parameter("weight_hh_l0").shape[0] // gates
            module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and module.weight is not None:
            module.normalized_shape = tuple(module.weight.shape)
        elif isinstance(module, _NormBase):
            module.num_features = len(next(t for t in (module.weight, module.running_mean) if t is not None))
        elif isinstance(module, nn.GroupNorm):
            module.num_groups += sizes.groups.get(prefix, 0)
        elif isinstance(module, _ConvNd):
            module.groups += sizes.groups.get(prefix, 0)
            first, second = len(module.weight), module.weight.shape[1] * module.groups
            module.out_channels, module.in_channels = (second, first) if module.transposed else (first, second)


def patch_named(net: nn.Module, sizes: Sizes) -> None:
    """Sizes held under usual names by modules of the user's own, where old and new size leave no doubt.

    What it makes is only believed if the network then equals its resized graph.
    """
    known = (*KNOWN, _NormBase, _ConvNd, nn.LayerNorm, nn.RMSNorm)
    for prefix, module in net.named_modules():
        if isinstance(module, known):
            continue
        inside = {name: pair for name, pair in sizes.shapes.items() if not prefix or name.startswith(prefix + ".")}
        widths = _clear((a, b) for old, new in inside.values() for a, b in zip(old, new, strict=True))
        counts = _clear(pair for name, pair in sizes.heads.items() if name in inside)
        per_head = _clear(pair for name, pair in sizes.runs.items() if name in inside)
        for names, table in ((HEADS, counts), (HEAD_SIZES, per_head), (WIDTHS, widths)):
            for attribute in names:
                value = vars(module).get(attribute)
                if isinstance(value, int) and value in table:
                    setattr(module, attribute, table[value])


def _clear(pairs) -> dict[int, int]:  # type: ignore[no-untyped-def]
    """Old size to new, of those that changed to one new size only."""
    found: dict[int, set[int]] = {}
    for old, new in pairs:
        found.setdefault(old, set()).add(new)
    return {old: new.pop() for old, new in found.items() if len(new) == 1 and new != {old}}
