"""Linear layers, convolutions, batch norm, pooling, attention and cross-entropy of many networks at once.

Inside a stack the batch is the last axis in memory, (members, channels, height, width, batch), although each network
sees its own (batch, channels, height, width): a member's layer is then one matrix product, whose rows are long.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F
from torch.nn.modules.utils import _pair

WIDEST = 8 * 2**20
"""Bytes of one member's unfolded patches from which on torch's own convolution is left to do the work."""


def _front(t: Tensor, dim: int | None, members: int) -> Tensor:
    return t.expand(members, *t.shape) if dim is None else t.movedim(dim, 0)


def _batched(*tensors: Any) -> bool:
    return all(isinstance(t, Tensor) and torch._C._functorch.is_batchedtensor(t) for t in tensors)


# -- linear ------------------------------------------------------------------------------------------------------


class StackedLinear(Function):
    """W x^T + b for every member: x (K, N, in) or, for all, (N, in); W (K, out, in); b (K, out) -> (K, out, N)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        if x.ndim == 2:  # one wide product
            rows = weight.reshape(-1, x.shape[1])
            wide = rows @ x.T if bias is None else torch.addmm(bias.reshape(-1, 1), rows, x.T)
            return wide.view(*weight.shape[:2], len(x))
        if bias is None:
            return torch.bmm(weight, x.transpose(1, 2))
        return torch.baddbmm(bias.unsqueeze(2), weight, x.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        to_x, to_w = ctx.needs_input_grad[:2]
        if x.ndim == 2:
            wide = grad.reshape(-1, len(x))
            dx = wide.T @ weight.reshape(-1, x.shape[1]) if to_x else None
            dw = (wide @ x).view(weight.shape) if to_w else None
        else:
            dx = torch.bmm(weight.transpose(1, 2), grad).transpose(1, 2) if to_x else None
            dw = torch.bmm(grad, x) if to_w else None
        return dx, dw, grad.sum(2) if ctx.has_bias and ctx.needs_input_grad[2] else None


class _Linear(Function):
    """:func:`torch.nn.functional.linear` under vmap, by :class:`StackedLinear`."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is kept: the stacked form has its own gradient."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        weight = _front(weight, in_dims[1], info.batch_size)
        bias = None if bias is None else _front(bias, in_dims[2], info.batch_size)
        x = x if in_dims[0] is None else x.movedim(in_dims[0], 0)
        batch = x.shape[0 if in_dims[0] is None else 1 : -1]
        if in_dims[0] is None:
            rows = x.reshape(-1, x.shape[-1])
        else:
            rows = x if len(batch) == 1 else x.reshape(len(x), -1, x.shape[-1])
        out = StackedLinear.apply(rows, weight, bias).transpose(1, 2)
        return out if len(batch) == 1 else out.reshape(len(out), *batch, -1), 0


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`torch.nn.functional.linear`."""
    ours = _batched(weight) and weight.ndim == 2 and input.ndim >= 2 and input.dtype == weight.dtype
    return _Linear.apply(input, weight, bias) if ours and input.numel() > 0 else F.linear(input, weight, bias)


# -- convolution ---------------------------------------------------------------------------------------------------


class StackedConv2d(Function):
    """Convolution of every member: x (K, B, C, H, W), W (K, O, C, h, w) -> (K, O, H', W', B), as patches times kernel.

    Patches are laid out once more for the gradient rather than kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        padded = _pad(x, padding)
        ctx.save_for_backward(padded, weight)
        ctx.stride, ctx.padding = stride, padding
        columns, size = _columns(padded, weight.shape[3:], stride)
        return torch.bmm(weight.flatten(2), columns).view(*weight.shape[:2], *size)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        padded, weight = ctx.saved_tensors
        (height, width), (down, right), kernel = ctx.padding, ctx.stride, weight.shape[3:]
        grad = grads[0].flatten(2)
        dx = dw = None
        if ctx.needs_input_grad[1]:
            dw = torch.bmm(grad, _columns(padded, kernel, ctx.stride)[0].transpose(1, 2)).view(weight.shape)
        if ctx.needs_input_grad[0]:
            size = grads[0].shape[2:]
            parts = torch.bmm(weight.flatten(2).transpose(1, 2), grad).view(*padded.shape[:2], *kernel, *size)
            whole = torch.zeros_like(padded)
            for i in range(kernel[0]):
                for j in range(kernel[1]):
                    there = whole[:, :, i : i + down * size[0] : down, j : j + right * size[1] : right]
                    there.add_(parts[:, :, i, j])
            inner = whole[:, :, height : whole.shape[2] - height, width : whole.shape[3] - width]
            dx = inner.permute(0, 4, 1, 2, 3)
        return dx, dw, None, None


def _pad(x: Tensor, padding: tuple[int, int]) -> Tensor:
    """(K, B, C, H, W) -> (K, C, H + 2p, W + 2q, B)."""
    last = x.permute(0, 2, 3, 4, 1)
    if padding == (0, 0):
        return last.contiguous()
    (p, q), (members, channels, height, width, batch) = padding, last.shape
    padded = x.new_zeros(members, channels, height + 2 * p, width + 2 * q, batch)
    padded[:, :, p : p + height, q : q + width] = last
    return padded


def _columns(padded: Tensor, kernel: Any, stride: tuple[int, int]) -> tuple[Tensor, torch.Size]:
    """Patches (K, C h w, H' W' B), and (H', W', B)."""
    patches = padded.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1]).permute(0, 1, 5, 6, 2, 3, 4)
    return patches.reshape(len(padded), -1, patches.shape[4:].numel()), patches.shape[4:]


class _Conv2d(Function):
    """:func:`torch.nn.functional.conv2d` under vmap, by :class:`StackedConv2d`."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        return F.conv2d(x, weight, None, stride, padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is kept: the stacked form has its own gradient."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor, *sizes: tuple[int, int]) -> Any:
        x, weight = _front(x, in_dims[0], info.batch_size), _front(weight, in_dims[1], info.batch_size)
        return StackedConv2d.apply(x, weight, *sizes).permute(0, 4, 1, 2, 3), 0


def conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    """:func:`torch.nn.functional.conv2d`."""
    plain = input.ndim == 4 and groups == 1 and _pair(dilation) == (1, 1) and not isinstance(padding, str)
    if plain and _batched(weight) and input.dtype == weight.dtype and input.device.type == "cpu" and input.numel() > 0:
        stride, padding = _pair(stride), _pair(padding)
        sides = [(n + 2 * p - k) // s + 1 for n, p, k, s in
                 zip(input.shape[2:], padding, weight.shape[2:], stride, strict=True)]  # fmt: skip
        patches = len(input) * weight[0].numel() * math.prod(sides) * input.element_size()
        if min(sides) > 0 and patches <= WIDEST:
            out = _Conv2d.apply(input, weight, stride, padding)
            return out if bias is None else out + bias.view(-1, 1, 1)
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


# -- batch norm and pooling -------------------------------------------------------------------------------------------


class _BatchNorm(Function):
    """Batch norm under vmap: every member's channel is a channel of one call. Also gives the new running statistics."""

    @staticmethod
    def forward(
        x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None, training: bool,
        momentum: float, eps: float,
    ) -> Any:  # fmt: skip
        mean, var = (None if t is None else t.clone() for t in (mean, var))
        return F.batch_norm(x, mean, var, weight, bias, training, momentum, eps), mean, var

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is kept: the stacked form has its own gradient."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *args: Any) -> Any:
        *vectors, training, momentum, eps = args
        x = _front(x, in_dims[0], info.batch_size)
        members, _, channels = x.shape[:3]
        last = x.movedim(1, -1)  # (K, C, ..., B)
        mean, var, weight, bias = (
            None if v is None else _front(v, dim, members).reshape(-1)
            for v, dim in zip(vectors, in_dims[1:5], strict=True)
        )
        mean, var = (None if t is None else t.clone() for t in (mean, var))
        out = F.batch_norm(
            last.reshape(1, members * channels, -1), mean, var, weight, bias, training, momentum, eps
        )  # fmt: skip
        after = [None if t is None else t.view(members, channels) for t in (mean, var)]
        return (out.view(last.shape).movedim(-1, 1), *after), (0, *(None if t is None else 0 for t in after))


def batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """:func:`torch.nn.functional.batch_norm`."""
    if not _batched(input) or input.ndim < 2 or (training and input.numel() <= input.shape[1]):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    out, mean, var = _BatchNorm.apply(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if training and running_mean is not None and running_var is not None:
        running_mean.copy_(mean)
        running_var.copy_(var)
    return out


class _Planes(Function):
    """A function of each channel's plane under vmap: (B, C, H, W) of all members as (K C, B, H, W) where they lie."""

    @staticmethod
    def forward(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is kept: the stacked form has its own gradient."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, function: Callable[[Tensor], Tensor]) -> Any:
        last = x.movedim(in_dims[0] or 0, 0).permute(0, 2, 3, 4, 1)
        planes = last.reshape(-1, *last.shape[2:]).permute(0, 3, 1, 2)
        out = function(planes).permute(0, 2, 3, 1)
        return out.reshape(*last.shape[:2], *out.shape[1:]).permute(0, 4, 1, 2, 3), 0


def planes(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A pooling function of torch, so applied."""

    def apply(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not _batched(input) or input.ndim != 4 or kwargs.get("return_indices"):
            return function(input, *args, **kwargs)
        return _Planes.apply(input, lambda x: function(x, *args, **kwargs))

    return apply


def mean(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """:func:`torch.mean`; over a picture's height and width as a pooling, whose gradient keeps the layout."""
    over = {"dim", "keepdim"}.issuperset(kwargs) and len(args) <= 1 and (args or (kwargs.get("dim"),))[0]
    plane = isinstance(over, (tuple, list)) and sorted(d % 4 for d in over) == [2, 3]
    if not plane or input.ndim != 4 or not _batched(input) or not input.is_floating_point():
        return torch.mean(input, *args, **kwargs)
    size = input.shape[2:]
    pooled = _Planes.apply(input, lambda x: F.avg_pool2d(x, size))
    return pooled if kwargs.get("keepdim") else pooled.flatten(1)


# -- attention and loss -----------------------------------------------------------------------------------------------


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """softmax(Q K^T / sqrt(d) + mask) V, as :func:`torch.nn.functional.scaled_dot_product_attention` computes it.

    Written out, because torch's own has no batched form on the CPU.
    """
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(groups, -3) for t in (key, value))
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    if attn_mask is not None:
        blocked = attn_mask.dtype == torch.bool
        scores = torch.where(attn_mask, scores, -math.inf) if blocked else scores + attn_mask
    weights = scores.softmax(-1)
    if attn_mask is not None:  # a query that may look at nothing gets zeros
        weights = weights.masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0)
    return F.dropout(weights, dropout_p) @ value


class CrossEntropy(Function):
    """mean over the batch of log sum exp z - z_y, with its gradient softmax(z) - onehot(y) made on the way."""

    @staticmethod
    def forward(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = z.transpose(-1, -2)  # (..., classes, batch): reductions over an axis that is not the last are fast
        largest = z.amax(-2, keepdim=True)
        p = (z - largest).exp_()
        total = p.sum(-2, keepdim=True)
        index = y.unsqueeze(-2)
        loss = (total.log().add_(largest) - z.gather(-2, index)).mean((-2, -1))
        grad = p.div_(total).scatter_add_(-2, index, torch.full_like(index, -1, dtype=z.dtype))
        return loss, grad.transpose(-1, -2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * (grads[0] / grad.shape[-2])[..., None, None], None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], z: Tensor, y: Tensor) -> Any:
        z, y = _front(z, in_dims[0], info.batch_size), _front(y, in_dims[1], info.batch_size)
        return CrossEntropy.apply(z, y), (0, 0)


def cross_entropy(*args: Any, **kwargs: Any) -> Tensor:
    """:func:`torch.nn.functional.cross_entropy`."""
    asked = any(value is not None and _DEFAULTS.get(name) != value for name, value in kwargs.items())
    if len(args) == 2 and not asked and args[0].ndim == 2 and args[1].ndim == 1 and len(args[0]) > 0:
        return CrossEntropy.apply(*args)[0]
    return F.cross_entropy(*args, **kwargs)


_DEFAULTS = {"ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0}

STACKED: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.linear: linear,
    F.conv2d: conv2d,
    F.batch_norm: batch_norm,
    F.cross_entropy: cross_entropy,
    Tensor.mean: mean,
    torch.mean: mean,
    **{f: planes(f) for f in (F.max_pool2d, torch.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d)},
}
"""Function of torch -> what takes its place in a stack."""
