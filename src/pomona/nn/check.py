"""What every layer checks of its input: one sentence that names the layer, what it wants and what it was given."""

from __future__ import annotations

from torch import Tensor, nn

from pomona.errors import PomonaError


def check_input(layer: nn.Module | str, x: Tensor, features: int | None = None, dim: int = -1) -> None:
    """Raise unless ``x`` holds floating-point numbers, ``features`` of them on axis ``dim`` where that is given."""
    if not isinstance(x, Tensor):  # a proxy, while torch.fx traces the layer
        return
    name = layer if isinstance(layer, str) else type(layer).__name__
    if not x.is_floating_point():
        raise PomonaError(f"{name} takes floating-point numbers, not {x.dtype}; call .float() on its input")
    if features is not None and (x.dim() < 1 or x.shape[dim] != features):
        raise PomonaError(f"{name} takes {features} features on axis {dim}; its input has shape {tuple(x.shape)}")


def check_odd(**fields: int) -> None:
    """Raise for the first window that has no middle: one that is not an odd number above zero."""
    for field, value in fields.items():
        if value < 1 or value % 2 == 0:
            raise PomonaError(f"{field}={value} must be an odd number, such as {max(3, value + 1)}")


def check_longest(layer: nn.Module, length: int, longest: int, field: str = "tokens") -> None:
    """Raise if a sequence of ``length`` is longer than what the layer was made for."""
    if length > longest:
        name = type(layer).__name__
        raise PomonaError(f"{name} was made for {field}={longest}, its input has {length}; make it with that many")
