"""What a network does differently while many of its kind are trained as one: random draws and a few products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pomona.errors import PomonaError


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
    gets alone. With ``fast`` linear layers and cross-entropy take forms that suit a stack.

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
        if self.fast and func is F.linear:
            return _linear(*args, **kwargs)
        if self.fast and func is F.cross_entropy and _plain_cross_entropy(args, kwargs):
            return CrossEntropy.apply(*args)[0]
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


class StackedLinear(torch.autograd.Function):
    """x W^T + b for every member at once: x (K, N, in) or (N, in) for all, W (K, out, in), b (K, out) or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        if x.ndim == 2:
            # one wide product; its result is read as (K, N, out) where it lies
            rows = weight.reshape(-1, x.shape[1])
            wide = x @ rows.T if bias is None else torch.addmm(bias.reshape(-1), x, rows.T)
            return wide.view(len(x), *weight.shape[:2]).transpose(0, 1)
        if bias is None:
            return torch.bmm(x, weight.transpose(1, 2))
        return torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        to_x, to_w = ctx.needs_input_grad[:2]
        if x.ndim == 2:
            wide = grad.transpose(0, 1).reshape(len(x), -1)
            dx = wide @ weight.reshape(-1, x.shape[1]) if to_x else None
            dw = (wide.T @ x).view(weight.shape) if to_w else None
        else:
            dx = torch.bmm(grad, weight) if to_x else None
            dw = torch.bmm(grad.transpose(1, 2), x) if to_w else None
        return dx, dw, grad.sum(1) if ctx.has_bias and ctx.needs_input_grad[2] else None


class Linear(torch.autograd.Function):
    """:func:`torch.nn.functional.linear` under vmap, by :class:`StackedLinear`."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.has_bias = inputs[2] is not None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        return grad @ weight, flat.T @ x.flatten(0, -2), flat.sum(0) if ctx.has_bias else None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        if in_dims[1] is None or (bias is not None and in_dims[2] is None):
            weight = _front(weight, in_dims[1], info.batch_size)
            bias = None if bias is None else _front(bias, in_dims[2], info.batch_size)
        if in_dims[0] is None:
            out = StackedLinear.apply(x.flatten(0, -2) if x.ndim != 2 else x, weight, bias)
            return out.reshape(info.batch_size, *x.shape[:-1], weight.shape[1]) if x.ndim != 2 else out, 0
        x = x.movedim(in_dims[0], 0)
        rows = x if x.ndim == 3 else x.reshape(len(x), -1, x.shape[-1])
        out = StackedLinear.apply(rows, weight, bias)
        return out if x.ndim == 3 else out.reshape(*x.shape[:-1], weight.shape[1]), 0


def _front(t: Tensor, dim: int | None, members: int) -> Tensor:
    return t.expand(members, *t.shape) if dim is None else t.movedim(dim, 0)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    plain = weight.ndim == 2 and input.ndim >= 2 and input.dtype == weight.dtype and input.numel() > 0
    plain = plain and not torch.is_autocast_enabled(input.device.type)
    return Linear.apply(input, weight, bias) if plain else F.linear(input, weight, bias)


class CrossEntropy(torch.autograd.Function):
    """mean over the batch of log sum exp z - z_y, with its gradient softmax(z) - onehot(y) made on the way."""

    @staticmethod
    def forward(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        largest = z.amax(-1, keepdim=True)
        p = (z - largest).exp_()
        total = p.sum(-1, keepdim=True)
        index = y.unsqueeze(-1)
        loss = (total.log() + largest - z.gather(-1, index)).mean((-2, -1))
        grad = p.div_(total).scatter_add_(-1, index, torch.full_like(index, -1, dtype=z.dtype))
        return loss, grad.div_(y.shape[-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0][..., None, None] * ctx.saved_tensors[0], None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], z: Tensor, y: Tensor) -> Any:
        z, y = _front(z, in_dims[0], info.batch_size), _front(y, in_dims[1], info.batch_size)
        return CrossEntropy.apply(z, y), (0, 0)


def _plain_cross_entropy(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this is the mean over a batch of class indices, nothing else asked."""
    asked = [name for name, value in kwargs.items() if value is not None and _DEFAULTS.get(name) != value]
    return len(args) == 2 and not asked and args[0].ndim == 2 and args[1].ndim == 1 and len(args[0]) > 0


_DEFAULTS = {"ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0}
