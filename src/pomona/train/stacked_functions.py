"""What a network does differently while many of its kind are trained as one: random draws, and forms of layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pomona.errors import PomonaError
from pomona.train.stacked_layers import STACKED, attention


@dataclass(frozen=True)
class Draw:
    """One random tensor that a forward pass asks for.

    Attributes:
        kind: ``keep`` (a dropout mask, already divided by the probability to keep), ``uniform`` or ``normal``.
        shape: of one member's draw.
        dtype: of the draw.
        keep: probability to keep an entry, for ``keep``.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    keep: float = 1.0

    def fill(self, out: Tensor, generator: torch.Generator) -> None:
        """Draw into ``out`` exactly what the network alone would draw from ``generator``."""
        if self.kind == "keep":
            out.bernoulli_(self.keep, generator=generator)
        elif self.kind == "uniform":
            out.uniform_(generator=generator)
        else:
            out.normal_(generator=generator)

    def members(self, generators: Sequence[torch.Generator]) -> Tensor:
        """(members, *shape), each member's from its own generator."""
        out = torch.empty(len(generators), *self.shape, dtype=self.dtype, device=generators[0].device)
        for row, generator in zip(out, generators, strict=True):
            self.fill(row, generator)
        return out.div_(self.keep) if self.kind == "keep" else out


class StackedFunctions(TorchFunctionMode):
    """Within it random draws come out of ``noise``, in their order; with ``None`` they are recorded and made as usual.

    A dropout mask is drawn as :mod:`torch` draws it, so that a member with its own generator gets the masks that it
    gets alone. With ``fast`` layers take the forms of :mod:`pomona.train.stacked_layers`.

    Attributes:
        draws: what was asked for.

    Raises:
        PomonaError: for other random functions, which cannot be drawn a member at a time.
    """

    def __init__(self, noise: Sequence[Tensor] | None = None, fast: bool = False) -> None:
        super().__init__()
        self.noise, self.fast = noise, fast
        self.draws: list[Draw] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return self._dropout(_DROPOUTS[func], *args, **kwargs)
        if func in _TENSORS:
            return self._tensor(func, args, kwargs)
        if func in _REFUSED:
            raise PomonaError(f"a layer draws by torch.{func.__name__}, which cannot be drawn a member at a time")
        if func is F.scaled_dot_product_attention:
            with self:  # its dropout is drawn here, too
                return attention(*args, **kwargs)
        if self.fast and func in STACKED and not torch.is_autocast_enabled(_device(args, kwargs)):
            return STACKED[func](*args, **kwargs)
        return func(*args, **kwargs)

    def _next(self, draw: Draw, device: torch.device) -> Tensor:
        self.draws.append(draw)
        if self.noise is not None:
            return self.noise[len(self.draws) - 1]
        out = torch.empty(draw.shape, dtype=draw.dtype, device=device)
        draw.fill(out, torch.Generator(device))
        return out

    def _dropout(
        self, feature: bool, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or p == 0:
            return input
        if p == 1:
            return input * 0
        shape = input.shape if not feature else (*input.shape[:2], *(1,) * (input.ndim - 2))
        return input * self._next(Draw("keep", tuple(shape), input.dtype, 1 - p), input.device)

    def _tensor(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if kwargs.get("generator") is not None:
            return func(*args, **kwargs)  # a layer's own generator: the dry run tells whether that can be stacked
        kind, like = _TENSORS[func]
        if like:
            like_it = args[0] if args else kwargs["input"]
            shape, dtype, device = tuple(like_it.shape), kwargs.get("dtype") or like_it.dtype, like_it.device
        else:
            size = args or (kwargs["size"],)
            shape = tuple(size[0]) if isinstance(size[0], (tuple, list)) else tuple(size)
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            device = torch.device(kwargs.get("device") or "cpu")
        return self._next(Draw(kind, shape, dtype), device)


_DROPOUTS = {F.dropout: False, F.dropout1d: True, F.dropout2d: True, F.dropout3d: True}
_TENSORS = {
    torch.rand: ("uniform", False),
    torch.rand_like: ("uniform", True),
    torch.randn: ("normal", False),
    torch.randn_like: ("normal", True),
}
_REFUSED = {
    *(torch.bernoulli, torch.multinomial, torch.normal, torch.poisson, torch.randint, torch.randint_like),
    *(torch.randperm, Tensor.bernoulli, Tensor.bernoulli_, Tensor.uniform_, Tensor.normal_, Tensor.exponential_),
    *(F.alpha_dropout, F.feature_alpha_dropout, F.rrelu, Tensor.multinomial, Tensor.random_),
}


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    return next((t.device.type for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), "cpu")
