"""The weights of a network as one vector: named, with roles and axes, and callable in batches."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, replace_all_batch_norm_modules_, vmap
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pomona.errors import PomonaError, unknown

Patterns = str | Iterable[str]
Weights = Tensor | Mapping[str, Tensor]

NORM_LAYERS: tuple[type[nn.Module], ...] = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_AXES: dict[str, tuple[str, ...]] = {
    "linear": ("out", "in"),
    "conv": ("out", "in", "depth", "height", "width"),
    "conv_transpose": ("in", "out", "depth", "height", "width"),
    "embedding": ("token", "feature"),
}


def as_patterns(patterns: Patterns) -> tuple[str, ...]:
    """One glob pattern or several, as a tuple."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def matches(name: str, patterns: Patterns) -> bool:
    """Whether a name fits one of the patterns; ``*.weight`` also fits the bare ``weight`` of a layer."""
    return any(fnmatchcase(name, p) or fnmatchcase("." + name, p) for p in as_patterns(patterns))


@dataclass(frozen=True)
class ParamSpec:
    """One parameter of a network and its place ``[offset, offset + numel)`` in the weight vector."""

    name: str
    shape: tuple[int, ...]
    offset: int
    numel: int
    role: str  # weight, bias, norm_scale, norm_shift, embedding or other
    axes: tuple[str, ...]
    fan_in: int
    fan_out: int
    layer: str  # qualified name of the module that owns it

    @property
    def slice(self) -> slice:
        """Where the parameter lies in the weight vector."""
        return slice(self.offset, self.offset + self.numel)


class WeightSpace:
    r"""The chosen parameters of a network as one vector :math:`\theta \in \mathbb{R}^P`.

    Tied parameters appear once, under their first name. The network is referred to, not copied (except for
    ``norm="batch"``).

    Args:
        net: any module.
        include, exclude: glob patterns over parameter names.
        norm: what happens to normalisation layers: ``"learn"`` keeps their scales and shifts in the space,
            ``"free"`` leaves them out, and ``"batch"`` leaves them out and lets batch norm always use the
            statistics of its batch (on a copy of the network), so that a batch of networks may be called in
            training mode.

    Raises:
        PomonaError: if no parameter is left, or a vector or dict does not fit.
    """

    def __init__(
        self,
        net: nn.Module,
        include: Patterns = "*",
        exclude: Patterns = (),
        norm: Literal["learn", "free", "batch"] = "learn",
    ) -> None:
        if norm not in ("learn", "free", "batch"):
            raise unknown("norm", norm, ("learn", "free", "batch"))
        if norm == "batch":
            net = replace_all_batch_norm_modules_(copy.deepcopy(net))
        self.net, self.norm = net, norm
        specs: list[ParamSpec] = []
        offset = 0
        for name, param in net.named_parameters():
            layer, _, leaf = name.rpartition(".")
            module = net.get_submodule(layer)
            if not matches(name, include) or matches(name, exclude):
                continue
            if norm != "learn" and isinstance(module, NORM_LAYERS):
                continue
            role, axes = _describe(module, leaf, param.ndim)
            fan_in, fan_out = _fans(param.shape, axes, module)
            shape = tuple(param.shape)
            specs.append(ParamSpec(name, shape, offset, param.numel(), role, axes, fan_in, fan_out, layer))
            offset += param.numel()
        if not specs:
            raise PomonaError(f"include={include!r} leaves no parameter of {type(net).__name__}; try include='*'")
        self.specs: tuple[ParamSpec, ...] = tuple(specs)
        self.names: tuple[str, ...] = tuple(spec.name for spec in specs)
        self.numel: int = offset

    def __len__(self) -> int:
        return len(self.specs)

    def __repr__(self) -> str:
        return f"WeightSpace({type(self.net).__name__}, {len(self)} parameters, {self.numel} numbers)"

    # --- vector and dict ------------------------------------------------------------------------------------

    def flatten(self, params: Mapping[str, Tensor]) -> Tensor:
        """Join a dict of ``(*lead, *shape)`` tensors into a vector ``(*lead, P)``."""
        missing = [name for name in self.names if name not in params]
        if missing:
            raise PomonaError(f"params lacks {missing[0]!r}; the space needs {', '.join(self.names)}")
        flat = []
        for spec in self.specs:
            value = params[spec.name]
            lead = value.shape[: value.ndim - len(spec.shape)]
            flat.append(value.reshape(*lead, spec.numel))
        return torch.cat(flat, dim=-1)

    def unflatten(self, vec: Tensor) -> dict[str, Tensor]:
        """Cut a vector ``(*lead, P)`` into a dict of ``(*lead, *shape)`` tensors."""
        if vec.shape[-1:] != (self.numel,):
            raise PomonaError(f"vec has shape {tuple(vec.shape)}; its last dimension must be {self.numel}")
        lead = vec.shape[:-1]
        return {spec.name: vec[..., spec.slice].reshape(*lead, *spec.shape) for spec in self.specs}

    def as_dict(self, weights: Weights) -> dict[str, Tensor]:
        """A vector or dict of weights as a dict holding exactly the names of the space."""
        if isinstance(weights, Tensor):
            return self.unflatten(weights)
        missing = [name for name in self.names if name not in weights]
        if missing:
            raise PomonaError(f"weights lacks {missing[0]!r}; the space needs {', '.join(self.names)}")
        return {name: weights[name] for name in self.names}

    def read(self) -> Tensor:
        """The network's present weights, a detached vector ``(P,)``."""
        own = dict(self.net.named_parameters())
        return torch.cat([own[name].detach().flatten() for name in self.names])

    @torch.no_grad()
    def write(self, vec: Weights) -> None:
        """Copy a vector ``(P,)`` (or a dict) into the network."""
        own = dict(self.net.named_parameters())
        for name, value in self.as_dict(vec).items():
            own[name].copy_(value)

    # --- calling --------------------------------------------------------------------------------------------

    def call(
        self,
        weights: Weights,
        *inputs: Any,
        batch: Literal["pair", "cross"] | None = None,
        net: nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the network with other weights; whatever is outside the space stays the network's own.

        Args:
            weights: vector ``(*lead, P)`` or dict of ``(*lead, *shape)`` tensors.
            inputs: what the network is called with; keyword arguments are shared by all networks of a batch.
            batch: ``None``: one network, no leading dimensions. ``"pair"``: the i-th network on the i-th
                input, every input having the same leading dimensions. ``"cross"``: each network on the same
                inputs.
            net: another network with the same parameter (or buffer) names to run instead.

        Returns:
            The network's output, with the leading dimensions in front for a batch.
        """
        if batch not in (None, "pair", "cross"):
            raise unknown("batch", batch, ("pair", "cross"))
        net = self.net if net is None else net
        params = self.as_dict(weights)
        first = self.specs[0]
        lead = params[first.name].shape[: params[first.name].ndim - len(first.shape)]
        if batch is None:
            if lead:
                raise PomonaError(f"weights have leading dimensions {tuple(lead)}; say batch='pair' or 'cross'")
            return functional_call(net, params, inputs, kwargs)
        if not lead:
            raise PomonaError(f"batch={batch!r} needs weights with a leading dimension, got a single network")

        n = len(lead)
        params = {name: value.flatten(0, n - 1) for name, value in params.items()}
        if batch == "pair":
            for x in inputs:
                if not isinstance(x, Tensor) or x.shape[:n] != lead:
                    raise PomonaError(f"batch='pair' needs inputs that lead with {tuple(lead)}, as the weights do")
            inputs = tuple(x.flatten(0, n - 1) for x in inputs)

        def one(p: dict[str, Tensor], *x: Any) -> Any:
            return functional_call(net, p, x, kwargs)

        in_dims = (0, *([0 if batch == "pair" else None] * len(inputs)))
        out = vmap(one, in_dims=in_dims, randomness="different")(params, *inputs)
        return torch.utils._pytree.tree_map(lambda y: y.unflatten(0, lead), out) if n > 1 else out

    # --- fresh weights and blocks ---------------------------------------------------------------------------

    def sample_init(self, n: int, seed: int, reset: Callable[[nn.Module], Any] | None = None) -> Tensor:
        """Draw ``n`` fresh initialisations ``(n, P)``, the same ones for the same seed.

        Args:
            n: how many.
            seed: of the random numbers; the global generator is left as it was.
            reset: re-initialises a network in place; by default each module's own ``reset_parameters`` is
                run, children first.

        Raises:
            PomonaError: if a module owns parameters of the space but cannot reset them.
        """
        net = copy.deepcopy(self.net)
        run = reset or reset_network
        if reset is None:
            for layer in {spec.layer for spec in self.specs}:
                if _own_reset(net.get_submodule(layer)) is None:
                    kind = type(net.get_submodule(layer)).__name__
                    raise PomonaError(f"{layer or 'the network'} ({kind}) has no reset_parameters; pass reset=")
        copied = copy.copy(self)
        copied.net = net
        draws = []
        with torch.random.fork_rng(devices=_cuda_devices(net)):
            torch.manual_seed(seed)
            for _ in range(n):
                run(net)
                draws.append(copied.read())
        return torch.stack(draws) if draws else self.read().new_empty(0, self.numel)

    def blocks(self, by: Literal["tensor", "layer", "module"] = "tensor") -> dict[str, tuple[ParamSpec, ...]]:
        """Group the parameters by tensor, by layer (owning module) or by top-level child of the network."""
        keys: dict[str, Callable[[ParamSpec], str]] = {
            "tensor": lambda spec: spec.name,
            "layer": lambda spec: spec.layer,
            "module": lambda spec: spec.name.split(".")[0] if spec.layer else "",
        }
        if by not in keys:
            raise unknown("by", by, keys)
        groups: dict[str, list[ParamSpec]] = {}
        for spec in self.specs:
            groups.setdefault(keys[by](spec), []).append(spec)
        return {key: tuple(group) for key, group in groups.items()}


def reset_network(net: nn.Module) -> None:
    """Run each module's own ``reset_parameters``, children first, drawing from the global generator."""
    for module in reversed(list(net.modules())):
        reset = _own_reset(module)
        if reset is not None:
            reset()


def _own_reset(module: nn.Module) -> Callable[[], Any] | None:
    for name in ("reset_parameters", "_reset_parameters"):
        reset = getattr(module, name, None)
        if callable(reset):
            return reset
    return None


def _cuda_devices(net: nn.Module) -> Sequence[torch.device]:
    return list({p.device for p in net.parameters() if p.device.type == "cuda"})


def _describe(module: nn.Module, leaf: str, ndim: int) -> tuple[str, tuple[str, ...]]:
    """Role of a parameter and the names of its dimensions."""
    is_bias = leaf.startswith("bias") or leaf.endswith("_bias")
    if isinstance(module, NORM_LAYERS):
        return ("norm_shift" if is_bias else "norm_scale"), ("feature",) * min(ndim, 1) + _numbered(ndim, 1)
    if is_bias:
        return "bias", ("out",) * min(ndim, 1) + _numbered(ndim, 1)
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding", _AXES["embedding"]
    if isinstance(module, _ConvNd):
        names = _AXES["conv_transpose" if isinstance(module, _ConvTransposeNd) else "conv"]
        return "weight", names[:2] + names[len(names) - (ndim - 2) :] if ndim > 2 else names[:ndim]
    if ndim == 2:
        return "weight", _AXES["linear"]
    return ("weight" if ndim > 2 else "other"), _numbered(ndim)


def _numbered(ndim: int, start: int = 0) -> tuple[str, ...]:
    return tuple(f"dim{d}" for d in range(start, ndim))


def _fans(shape: Sequence[int], axes: tuple[str, ...], module: nn.Module) -> tuple[int, int]:
    """Inputs a unit sums over and outputs it feeds; a bias has the fan-in of its layer's weight."""
    if "in" in axes and "out" in axes:
        window = math.prod(shape) // max(1, shape[axes.index("in")] * shape[axes.index("out")])
        return shape[axes.index("in")] * window, shape[axes.index("out")] * window
    weight = getattr(module, "weight", None)
    if axes[:1] == ("out",) and isinstance(weight, Tensor) and weight.ndim >= 2:
        return weight[0].numel(), shape[0]
    return 1, shape[0] if shape else 1
