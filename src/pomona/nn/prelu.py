"""The parametric rectifier: a ReLU whose negative slope is learned."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pomona.errors import PomonaError, check_positive, unknown


def along_channels(parameter: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    """View a (channels,) tensor so that it broadcasts along ``channel_dim`` of ``x``."""
    shape = [1] * x.ndim
    shape[channel_dim] = -1
    return parameter.view(shape)


class PReLU(nn.Module):
    """Parametric ReLU.

        f(y) = max(0, y) + a min(0, y),        df/da = min(0, y)

    The slope has no sign constraint, and ``param_groups`` keeps weight decay off it: decay would pull it to
    ReLU.

    Args:
        features: number of channels with a slope of their own; 1 for one slope shared by the layer.
        init: first value of every slope.
        channel_dim: axis of the channels in the input.
        shared: one slope for the layer whatever ``features`` is (the paper's channel-shared variant).

    Shapes: (*, features, *) -> the same.

    Raises:
        PomonaError: if ``features`` is below 1.

    Source: Delving Deep into Rectifiers (arXiv 1502.01852).
    """

    kinks = (0.0,)
    out_factor = 1.0

    def __init__(self, features: int = 1, init: float = 0.25, channel_dim: int = -1, shared: bool = False) -> None:
        super().__init__()
        check_positive(features=features)
        self.features = 1 if shared else features
        self.channel_dim = channel_dim
        self.slope = nn.Parameter(torch.full((self.features,), float(init)))

    def forward(self, y: Tensor) -> Tensor:
        """f(x)."""
        a = self.slope if self.features == 1 else along_channels(self.slope, y, self.channel_dim)
        return torch.where(y > 0, y, a * y)

    def param_groups(self) -> list[dict[str, object]]:
        """No weight decay on the parameters of the function."""
        return [{"params": [self.slope], "weight_decay": 0.0}]

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"features={self.features}, channel_dim={self.channel_dim}"


class LearnableLeaky(PReLU):
    """A leaky ReLU with one learned slope, of a layer or (one module used everywhere) of a whole network.

        f(y) = max(0, y) + a min(0, y)

    Slope 0 is ReLU and slope 1 the identity. `learnable_leaky` makes them for the layers of a network.

    Args:
        init: first value of the slope.

    Shapes: (*) -> the same.

    Source: ReLU's Revival: On the Entropic Overload in Normalization-Free Large Language Models (arXiv 2410.09637).
    """

    def __init__(self, init: float = 0.01) -> None:
        super().__init__(1, init)


def learnable_leaky(per: str = "layer", init: float = 0.01) -> Callable[[int], nn.Module]:
    """A maker (features) -> `LearnableLeaky`, for `act=` of a network: a slope a layer, or one for all ('global').

    Raises:
        PomonaError: for another ``per``.
    """
    if per not in ("layer", "global"):
        raise unknown("per", per, ("layer", "global"))
    shared = LearnableLeaky(init)
    return lambda features: shared if per == "global" else LearnableLeaky(init)


def _slopes(module: nn.Module) -> Tensor | None:
    if isinstance(module, PReLU):
        return module.slope.detach()
    return module.weight.detach() if isinstance(module, nn.PReLU) else None


def _merge(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """One Linear for second(first(x)): W = W2 W1, b = W2 b1 + b2."""
    has_bias = first.bias is not None or second.bias is not None
    merged = nn.Linear(first.in_features, second.out_features, has_bias, first.weight.device, first.weight.dtype)
    with torch.no_grad():
        merged.weight.copy_(second.weight @ first.weight)
        if has_bias:
            bias = merged.bias.zero_()
            if first.bias is not None:
                bias += second.weight @ first.bias
            if second.bias is not None:
                bias += second.bias
    return merged


def absorb(net: nn.Module, tolerance: float = 0.0) -> nn.Module:
    """Remove the PReLUs that have become linear: a copy of ``net`` that computes the same function.

    A PReLU with every slope 1 is the identity, with every slope 0 a ReLU; others stay. In an
    ``nn.Sequential`` the two ``nn.Linear`` that come to stand side by side when a PReLU goes are multiplied
    into one.

    Args:
        net: a network, or a PReLU by itself.
        tolerance: a slope within this of 1 (or 0) counts as 1 (or 0); the function then changes by as much.

    Raises:
        PomonaError: if ``tolerance`` is negative.
    """
    if tolerance < 0:
        raise PomonaError(f"tolerance={tolerance} must be 0 or more")

    def simplify(module: nn.Module) -> nn.Module:
        slopes = _slopes(module)
        if slopes is not None:
            for value, simple in ((1.0, nn.Identity), (0.0, nn.ReLU)):
                if bool(((slopes - value).abs() <= tolerance).all()):
                    return simple()
            return module
        gone = []
        for name, child in list(module._modules.items()):
            if child is None:
                continue
            simpler = simplify(child)
            setattr(module, name, simpler)
            gone.append(simpler is not child and isinstance(simpler, nn.Identity))
        if type(module) is not nn.Sequential or not any(gone):
            return module
        layers: list[nn.Module] = []
        mergeable = False
        for child, absorbed in zip(module, gone, strict=True):
            if absorbed:
                mergeable = True
            elif mergeable and layers and isinstance(layers[-1], nn.Linear) and isinstance(child, nn.Linear):
                layers[-1] = _merge(layers[-1], child)
                mergeable = False
            else:
                layers.append(child)
                mergeable = False
        return nn.Sequential(*layers)

    return simplify(copy.deepcopy(net))
