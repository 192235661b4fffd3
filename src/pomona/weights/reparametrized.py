"""A network whose weights are a function: of an embedding, of a condition, of a few numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pomona.errors import PomonaError, unknown
from pomona.weights.space import Weights, WeightSpace


class Reparametrized(nn.Module):
    r"""A network run with generated weights, :math:`y = f(x;\, \theta = G(c))`.

    The parameters of the space are gone from the network: what is trained is the generator, and whatever of
    the network lies outside the space (none by default). The given network is copied, never changed.

    Args:
        net: any module.
        generator: ``generator(*context)`` gives a vector ``(*lead, P)`` or a dict of ``(*lead, *shape)``
            tensors.
        space: the parameters to generate; all of them if left out.

    Call it as ``net(x, *context)``; a network of several inputs takes them as a tuple ``x``. Without leading
    dimensions one set of weights serves the whole batch ``x``. With them, ``(B, P)``, ``batch="pair"`` (the
    default) gives example ``x[i]`` its own network, and ``batch="cross"`` runs every network on all of ``x``.

    Raises:
        PomonaError: if a tied parameter is in the space (it would have to be generated twice).
    """

    def __init__(
        self, net: nn.Module, generator: nn.Module | Callable[..., Weights], space: WeightSpace | None = None
    ) -> None:
        super().__init__()
        space = WeightSpace(net) if space is None else space
        # norm="batch" has its own copy of the network, without running statistics
        self.net = _without_parameters(space.net if space.norm == "batch" else net, space)
        self.generator = generator
        self._order = [name for name, _ in net.named_parameters(remove_duplicate=False)]
        self.space = copy.copy(space)
        self.space.net = self.net

    def weights(self, *context: Any) -> dict[str, Tensor]:
        """The generated weights, by name."""
        return self.space.as_dict(self.generator(*context))

    def forward(self, x: Any, *context: Any, batch: Literal["pair", "cross"] | None = None) -> Any:
        """The network's output on ``x`` with the weights that ``context`` gives."""
        if batch not in (None, "pair", "cross"):
            raise unknown("batch", batch, ("pair", "cross"))
        weights = self.weights(*context)
        first = self.space.specs[0]
        lead = weights[first.name].ndim - len(first.shape)
        inputs = x if isinstance(x, tuple) else (x,)
        if not lead:
            return self.space.call(weights, *inputs)
        if batch == "cross":
            return self.space.call(weights, *inputs, batch="cross")
        # each example is a batch of one for its own network
        out = self.space.call(weights, *(value.unsqueeze(lead) for value in inputs), batch="pair")
        return torch.utils._pytree.tree_map(lambda y: y.squeeze(lead), out)

    @torch.no_grad()
    def materialize(self, *context: Any) -> nn.Module:
        """A plain network, independent of the generator, with the weights generated for one context."""
        weights = self.weights(*context)
        net = copy.deepcopy(self.net)
        for spec in self.space.specs:
            if tuple(weights[spec.name].shape) != spec.shape:
                got = tuple(weights[spec.name].shape)
                raise PomonaError(
                    f"materialize needs one network, but {spec.name} came as {got} instead of {spec.shape}"
                )
            module, leaf = _owner(net, spec.name)
            del module._buffers[leaf]
            module.register_parameter(leaf, nn.Parameter(weights[spec.name].detach().clone()))
        _restore_order(net, self._order)
        return net


def _owner(net: nn.Module, name: str) -> tuple[nn.Module, str]:
    layer, _, leaf = name.rpartition(".")
    return net.get_submodule(layer), leaf


def _without_parameters(net: nn.Module, space: WeightSpace) -> nn.Module:
    """A copy in which unsaved buffers, each one expanded zero, stand in for the parameters of the space."""
    net = copy.deepcopy(net)
    names: dict[int, list[str]] = {}
    for name, param in net.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
    for spec in space.specs:
        module, leaf = _owner(net, spec.name)
        own = module._parameters.get(leaf)
        if own is None:
            raise PomonaError(f"net has no parameter {spec.name!r}; build the space from the same network")
        if len(names[id(own)]) > 1:
            raise PomonaError(f"{spec.name!r} is tied to {names[id(own)][1]!r}; exclude it from the space or untie it")
        del module._parameters[leaf]
        placeholder = torch.zeros((), dtype=own.dtype, device=own.device).expand(spec.shape)
        module.register_buffer(leaf, placeholder, persistent=False)
    return net


def _restore_order(net: nn.Module, names: list[str]) -> None:
    """Bring every module's own parameters back into the order of ``names``."""
    rank = {name: position for position, name in enumerate(names)}
    for prefix, module in net.named_modules():
        own = module._parameters
        for leaf in sorted(own, key=lambda leaf: rank.get(f"{prefix}.{leaf}".lstrip("."), -1)):
            own[leaf] = own.pop(leaf)
