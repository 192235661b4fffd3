"""Spatial mixing without weights: max-pooling and its kin in place of spatial convolutions and of attention.

Source: Learning Features with Parameter-Free Layers, arXiv 2202.02777.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, check_divisible, check_positive, unknown
from pomona.nn.check import check_input, check_odd
from pomona.nn.mixing import hide


class Shift2d(nn.Module):
    """Each of k x k groups of channels moved by another one of the displacements within a k x k window.

    Shape:
        (B, C, H, W) -> (B, C, H', W')

    Source: Shift: A Zero FLOP, Zero Parameter Alternative to Spatial Convolutions, arXiv 1711.08141.
    """

    def __init__(self, k: int = 3, stride: int = 1, padding: int | None = None) -> None:
        super().__init__()
        self.k, self.stride, self.padding = k, stride, k // 2 if padding is None else padding

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        height, width = (side + 2 * self.padding - self.k + 1 for side in x.shape[-2:])
        parts = F.pad(x, (self.padding,) * 4).tensor_split(self.k**2, 1)
        steps = [(i, j) for i in range(self.k) for j in range(self.k)]
        moved = [p[..., i : i + height, j : j + width] for p, (i, j) in zip(parts, steps, strict=True)]
        return torch.cat(moved, 1)[..., :: self.stride, :: self.stride]

    def extra_repr(self) -> str:
        """Sizes."""
        return f"k={self.k}, stride={self.stride}"


class DeformableMaxPool2d(nn.Module):
    """y(p) = max over the k x k taps of x(p + tap + offset), offsets (in pixels) predicted by a convolution of x.

    Starts as max-pooling: the offsets are 0 at first. Positions beyond the edge take the value at the edge.

    Args:
        channels: C.
        k: side of the window, odd.
        stride: of the windows.

    Shape:
        (B, C, H, W) -> (B, C, H', W')
    """

    def __init__(self, channels: int, k: int = 3, stride: int = 1) -> None:
        super().__init__()
        check_odd(k=k)
        self.k, self.stride = k, stride
        self.offsets = nn.Conv2d(channels, 2 * k * k, k, stride, k // 2)
        for parameter in self.offsets.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        check_input(self, x)
        height, width = x.shape[-2:]
        dtype = torch.promote_types(x.dtype, torch.float32)
        rows, columns = (torch.arange(0, side, self.stride, device=x.device, dtype=dtype) for side in (height, width))
        taps = torch.arange(self.k, device=x.device, dtype=dtype) - self.k // 2
        y = (rows[:, None] + taps[:, None, None, None]).expand(self.k, self.k, len(rows), len(columns))
        z = (columns + taps[:, None, None]).expand_as(y)
        taken_at = torch.stack([z, y], -1).flatten(0, 1)  # (k k, H', W', 2), as (column, row)
        where = taken_at + self.offsets(x).to(dtype).unflatten(1, (self.k**2, 2)).movedim(2, -1)
        where = 2 * where / where.new_tensor([max(width - 1, 1), max(height - 1, 1)]) - 1
        taken = F.grid_sample(x.to(dtype), where.flatten(1, 2), padding_mode="border", align_corners=True)
        return taken.unflatten(2, (self.k**2, -1)).amax(2).to(x.dtype)


class Subsample(nn.Module):
    """Every ``stride``-th pixel: the spatial operation that does nothing."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H / stride, W / stride)"""
        return x[..., :: self.stride, :: self.stride]


# (channels, k, stride, padding) -> module
OPS: dict[str, Callable[[int, int, int, int], nn.Module]] = {
    "max": lambda c, k, s, p: nn.MaxPool2d(k, s, p),
    "avg": lambda c, k, s, p: nn.AvgPool2d(k, s, p, count_include_pad=False),
    "depthwise": lambda c, k, s, p: nn.Conv2d(c, c, k, s, p, groups=c, bias=False),
    "conv": lambda c, k, s, p: nn.Conv2d(c, c, k, s, p, bias=False),
    "shift": lambda c, k, s, p: Shift2d(k, s, p),
    "deform": lambda c, k, s, p: DeformableMaxPool2d(c, k, s),
    "identity": lambda c, k, s, p: Subsample(s),
}
LEARNED = ("conv", "depthwise")
"""Operations that norm and activation follow in a bottleneck."""


class SpatialOp(nn.Module):
    """One operation over k x k neighbourhoods that keeps the channels.

    Args:
        kind: max, avg, shift or identity, without parameters; depthwise or conv; deform, a max-pooling whose taps move.
        channels: C.
        k: side of the window, odd.
        stride: of the windows.
        padding: on each side, what keeps the size by default.

    Shape:
        (B, C, H, W) -> (B, C, H', W')

    Raises:
        PomonaError: for an unknown kind or an even window.

    Source: Learning Features with Parameter-Free Layers, arXiv 2202.02777.
    """

    def __init__(
        self, kind: str = "max", channels: int = 1, *, k: int = 3, stride: int = 1, padding: int | None = None
    ) -> None:
        super().__init__()
        if kind not in OPS:
            raise unknown("kind", kind, OPS)
        check_positive(channels=channels, stride=stride)
        check_odd(k=k)
        padding = k // 2 if padding is None else padding
        if padding > k // 2 or (padding != k // 2 and kind in ("deform", "identity")):
            raise PomonaError(f"padding={padding} must be {k // 2} with kind={kind!r} and k={k}")
        self.kind, self.channels, self.stride = kind, channels, stride
        self.op = OPS[kind](channels, k, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        check_input(self, x)
        return self.op(x)

    def extra_repr(self) -> str:
        """Kind."""
        return f"{self.kind!r}, {self.channels}"


def named_op(name: str, channels: int, stride: int = 1) -> SpatialOp:
    """``conv3``, ``dw3``, ``max3``, ``avg5``, ``identity``: a kind and its window."""
    kind = name.rstrip("0123456789")
    k = int(name[len(kind) :] or 3)
    return SpatialOp({"dw": "depthwise"}.get(kind, kind), channels, k=k, stride=stride)


def spatial_unit(op: nn.Module, channels: int) -> nn.Sequential:
    """The operation, then norm and ReLU if it is a convolution, as published."""
    after = [nn.BatchNorm2d(channels), nn.ReLU()] if getattr(op, "kind", "") in LEARNED else []
    return nn.Sequential(op, *after)


def _pointwise(channels: int, out: int, *after: nn.Module, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out), *after)


class PFBottleneck(nn.Module):
    """y = relu(x + BN(W_2 op(relu(BN(W_1 x))))), with a 1x1 convolution of x where sizes change.

    Args:
        channels: of the input.
        mid: channels of the operation.
        expansion: channels of the output, in mid.
        op: a kind of `SpatialOp`, or a module that keeps mid channels and has the stride.
        stride: of the operation.
        k: side of its window.

    Shape:
        (B, channels, H, W) -> (B, expansion mid, H / stride, W / stride)

    Source: Learning Features with Parameter-Free Layers, arXiv 2202.02777.
    """

    def __init__(
        self, channels: int, mid: int, *, expansion: int = 4, op: str | nn.Module = "max", stride: int = 1, k: int = 3
    ) -> None:
        super().__init__()
        check_positive(channels=channels, mid=mid, expansion=expansion)
        out = expansion * mid
        self.reduce = _pointwise(channels, mid, nn.ReLU())
        self.spatial = spatial_unit(SpatialOp(op, mid, k=k, stride=stride) if isinstance(op, str) else op, mid)
        self.expand = _pointwise(mid, out)
        same = stride == 1 and channels == out
        self.shortcut: nn.Module = nn.Identity() if same else _pointwise(channels, out, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        check_input(self, x)
        return F.relu(self.shortcut(x) + self.expand(self.spatial(self.reduce(x))))


class PFInvertedBottleneck(nn.Module):
    """y = BN(W_2 op(relu6(BN(W_1 x)))), plus x where sizes agree: wide inside, linear at the end.

    Args:
        channels, out: of input and output.
        expansion: channels of the operation, in those of the input.
        op, stride, k: as in `PFBottleneck`.

    Shape:
        (B, channels, H, W) -> (B, out, H / stride, W / stride)
    """

    def __init__(
        self, channels: int, out: int, *, expansion: int = 6, op: str = "max", stride: int = 1, k: int = 3
    ) -> None:
        super().__init__()
        check_positive(channels=channels, out=out, expansion=expansion)
        mid = expansion * channels
        self.body = nn.Sequential(
            _pointwise(channels, mid, nn.ReLU6()),
            spatial_unit(SpatialOp(op, mid, k=k, stride=stride), mid),
            _pointwise(mid, out),
        )
        self.same = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        check_input(self, x)
        return x + self.body(x) if self.same else self.body(x)


class PFConv2d(nn.Sequential):
    """y = W op(x) + b: a parameter-free operation, then a 1x1 convolution, in the place of a spatial convolution.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, bias: as in `torch.nn.Conv2d`.
        op: max, avg, shift or identity.

    Shape:
        (B, in_channels, H, W) -> (B, out_channels, H', W')
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        bias: bool = True,
        *,
        op: str = "max",
    ) -> None:
        spatial = SpatialOp(op, in_channels, k=kernel_size, stride=stride, padding=padding)
        super().__init__(spatial, nn.Conv2d(in_channels, out_channels, 1, bias=bias))


def hybrid_conv2d(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 3,
    stride: int = 1,
    padding: int | None = None,
    bias: bool = True,
    *,
    op: str = "max",
) -> nn.Module:
    """The paper's rule: a `PFConv2d` where resolution and channels stay, an ordinary convolution where they change."""
    if stride == 1 and in_channels == out_channels:
        return PFConv2d(in_channels, out_channels, kernel_size, stride, padding, bias, op=op)
    padding = kernel_size // 2 if padding is None else padding
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=bias)


hybrid_conv2d.tunable = {"op": ["max", "avg", "shift"]}  # type: ignore[attr-defined]


class PFAttention(nn.Module):
    """y_n = max over the k x k neighbours of token n, or k in a row of tokens: attention without weights.

    Args:
        rows: of the token grid; 1 for a sequence.
        k: side of the window, odd.
        cls: leave the first token as it is.

    Shape:
        (B, N, D), mask (B, N) or None -> (B, N, D)

    Source: Learning Features with Parameter-Free Layers, arXiv 2202.02777.
    """

    tunable = {"k": [3, 5]}

    def __init__(self, *, rows: int = 1, k: int = 3, cls: bool = False) -> None:
        super().__init__()
        check_positive(rows=rows)
        check_odd(k=k)
        self.rows, self.k, self.cls = rows, k, cls

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See the class."""
        check_input(self, x)
        first, tokens = x.split([int(self.cls), x.shape[-2] - int(self.cls)], -2)
        check_divisible("tokens", tokens.shape[-2], "rows", self.rows)
        if mask is not None:  # padding must not win a maximum
            tokens = torch.where(mask[..., int(self.cls) :, None].bool(), tokens, float("-inf"))
        image = tokens.mT.unflatten(-1, (self.rows, -1))
        tall = self.k if self.rows > 1 else 1
        image = F.pad(image, (self.k // 2, self.k // 2, tall // 2, tall // 2), value=float("-inf"))
        y = image.unfold(-2, tall, 1).unfold(-2, self.k, 1).amax((-2, -1)).flatten(-2).mT
        return torch.cat([first, hide(y, None if mask is None else mask[..., int(self.cls) :])], -2)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"rows={self.rows}, k={self.k}, cls={self.cls}"


class MixedSpatialOp(nn.Module):
    """y = sum_o p_o op_o(x): a choice among operations that trains with the weights.

    p is softmax(alpha), or with ``gumbel`` in training a sample: softmax((alpha + Gumbel noise) / tau).

    Args:
        channels: C.
        ops: names as in `named_op`.
        stride: of every operation.
        gumbel: sample p.
        tau: temperature of the sample.

    Shape:
        (B, C, H, W) -> (B, C, H', W')

    Source: DARTS: Differentiable Architecture Search, arXiv 1806.09055.
    """

    def __init__(
        self,
        channels: int,
        ops: Sequence[str] = ("conv3", "dw3", "max3", "avg3", "identity"),
        *,
        stride: int = 1,
        gumbel: bool = False,
        tau: float = 1.0,
    ) -> None:
        super().__init__()
        check_positive(tau=tau, ops=len(ops))
        self.names, self.gumbel, self.tau = tuple(ops), gumbel, tau
        # without affine, no operation can win by scale
        self.ops = nn.ModuleList(
            nn.Sequential(named_op(name, channels, stride), nn.BatchNorm2d(channels, affine=False)) for name in ops
        )
        self.alpha = nn.Parameter(torch.zeros(len(ops)))

    def weights(self) -> Tensor:
        """p: (ops,)."""
        if self.gumbel and self.training:
            return F.gumbel_softmax(self.alpha, self.tau)
        return self.alpha.softmax(0)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return sum(p * op(x) for p, op in zip(self.weights(), self.ops, strict=True))  # type: ignore[return-value]

    def chosen(self) -> str:
        """The operation of the largest weight."""
        return self.names[int(self.alpha.argmax())]


def receptive_field(blocks: int, k: int = 3) -> int:
    """Side of the square of inputs that one output sees after ``blocks`` operations of stride 1: 1 + blocks (k - 1)."""
    return 1 + blocks * (k - 1)


def eligible(net: nn.Module) -> list[str]:
    """Names of the k x k convolutions, k odd, that keep their channels and that a 1x1 convolution follows."""
    convs = [(name, m) for name, m in net.named_modules() if isinstance(m, nn.Conv2d)]
    return [
        name
        for (name, m), (_, after) in itertools.pairwise(convs)
        if m.in_channels == m.out_channels
        and m.kernel_size[0] == m.kernel_size[1] > 1
        and m.kernel_size[0] % 2
        and m.stride[0] == m.stride[1]
        and math.prod(after.kernel_size) == 1
    ]
