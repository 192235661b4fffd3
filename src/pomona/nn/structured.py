"""Linear layers whose weight matrix has a structure: fewer parameters than ``out_features * in_features``."""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pomona.errors import PomonaError, check_positive
from pomona.nn.check import check_input


class StructuredLinear(nn.Module):
    """A linear map y = W x + b whose W is made from fewer numbers.

    A subclass gives `weight` (the dense matrix). Where a cheaper product exists it also gives `product`,
    where a dense matrix can be fitted, `project_`, and where the product costs less than a dense one,
    `flops`.

    Args:
        in_features: size of the last axis of the input.
        out_features: size of the last axis of the output.
        bias: add a learned b, which starts at zero.

    Shape:
        (*, in_features) -> (*, out_features)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive(in_features=in_features, out_features=out_features)
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    def weight(self) -> Tensor:
        """The dense W, (out_features, in_features)."""
        raise NotImplementedError(f"{type(self).__name__} does not define weight()")

    def product(self, x: Tensor) -> Tensor:
        """W x for x of shape (*, in_features), without the bias."""
        return F.linear(x, self.weight())

    def forward(self, x: Tensor) -> Tensor:
        """W x + b."""
        check_input(self, x, self.in_features)
        y = self.product(x)
        return y if self.bias is None else y + self.bias

    def project_(self, matrix: Tensor) -> Self:
        """Set the parameters so that W is as near to ``matrix`` (out_features, in_features) as it can be."""
        raise PomonaError(f"{type(self).__name__} cannot be fitted to a dense matrix; use one that defines project_")

    def n_params(self) -> int:
        """How many numbers are trained, bias included."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def flops(self, batch: int = 1) -> int:
        """Floating point operations of one forward pass; a multiply-add counts as two."""
        return 2 * batch * self.in_features * self.out_features

    def relative_error(self, matrix: Tensor) -> float:
        """||W - matrix|| / ||matrix|| in the Frobenius norm."""
        with torch.no_grad():
            return float((self.weight() - matrix).norm() / matrix.norm())

    def fold(self) -> nn.Linear:
        """A plain `torch.nn.Linear` that computes the same, for inference."""
        weight = self.weight().detach()
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, weight.device, weight.dtype)
        with torch.no_grad():
            linear.weight.copy_(weight)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear

    @classmethod
    def conv(
        cls,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        **options: Any,
    ) -> StructuredConv2d:
        """The same structure as a 2-d convolution: W of shape (out_channels, in_channels * kh * kw)."""
        kh, kw = _pair(kernel_size)
        linear = cls(in_channels * kh * kw, out_channels, bias=bias, **options)
        return StructuredConv2d(linear, (kh, kw), stride, padding, dilation)

    @classmethod
    @torch.no_grad()
    def like(cls, layer: nn.Linear | nn.Conv2d, **options: Any) -> StructuredLinear | StructuredConv2d:
        """The same structure in the place of a dense layer, fitted to its weight: what `swap` wants as ``make``.

        Raises:
            PomonaError: for a convolution in groups or with padding other than zeros.
        """
        options = {"device": layer.weight.device, "dtype": layer.weight.dtype, **options}
        bias = layer.bias is not None
        new: StructuredLinear | StructuredConv2d
        if isinstance(layer, nn.Linear):
            new = linear = cls(layer.in_features, layer.out_features, bias=bias, **options)
        elif layer.groups == 1 and layer.padding_mode == "zeros":
            sizes = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
            new = cls.conv(layer.in_channels, layer.out_channels, *sizes, bias, **options)  # type: ignore[arg-type]
            linear = new.linear
        else:
            raise PomonaError(f"{layer} cannot be replaced: only groups=1 and padding_mode='zeros' can")
        linear.project_(layer.weight.flatten(1))
        if linear.bias is not None and layer.bias is not None:
            linear.bias.copy_(layer.bias)
        return new.train(layer.training)

    def check_matrix(self, matrix: Tensor) -> None:
        """Raise unless ``matrix`` has the shape of W."""
        if tuple(matrix.shape) != (self.out_features, self.in_features):
            raise PomonaError(f"matrix has shape {tuple(matrix.shape)}, not ({self.out_features}, {self.in_features})")

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class StructuredConv2d(nn.Module):
    """A 2-d convolution whose kernel is a `StructuredLinear` weight, folded to (out, in, kh, kw).

    Channels are the outer index of the columns of W and kernel positions the inner one, so a structure over
    blocks of columns (as in a Kronecker product) is a structure over blocks of channels.

    Args:
        linear: maps in_channels * kh * kw to out_channels.
        kernel_size: kh, kw.
        stride, padding, dilation: as in `torch.nn.Conv2d`.

    Shape:
        (batch, in_channels, height, width) -> (batch, out_channels, height', width')
    """

    def __init__(
        self,
        linear: StructuredLinear,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.kernel_size = _pair(kernel_size)
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        area = self.kernel_size[0] * self.kernel_size[1]
        if linear.in_features % area:
            raise PomonaError(
                f"linear.in_features={linear.in_features} must be a multiple of the {area} kernel positions"
            )
        self.in_channels = linear.in_features // area
        self.out_channels = linear.out_features

    def weight(self) -> Tensor:
        """The kernel, (out_channels, in_channels, kh, kw)."""
        return self.linear.weight().unflatten(1, (self.in_channels, *self.kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with the structured kernel."""
        return F.conv2d(x, self.weight(), self.linear.bias, self.stride, self.padding, self.dilation)

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class LowRankLinear(StructuredLinear):
    """A linear layer of low rank, W = L Q or W = L Q + diag(D): the control at equal parameters.

    L is (out_features, rank) and Q is (rank, in_features). Their entries are normal with the standard
    deviation that gives W the variance of Glorot's initialisation, Var(W) = rank Var(L) Var(Q) = 2 / (in +
    out).

    Args:
        in_features, out_features, bias: as in `StructuredLinear`.
        rank: columns of L. By default the rank that costs a quarter of the dense parameters.
        diag: add a learned diagonal D, which starts at zero; needs a square W.
        generator: source of the initial values.

    Raises:
        PomonaError: if the rank is below 1 or above min(in_features, out_features), or `diag` is asked of a
            matrix that is not square.

    Source:
        Low-rank passthrough neural networks, arXiv 1603.03116, for the form with a diagonal.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int | None = None,
        bias: bool = True,
        *,
        diag: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        if rank is None:
            rank = self.rank_for(in_features, out_features, in_features * out_features // 4)
        if not 1 <= rank <= min(in_features, out_features):
            raise PomonaError(f"rank={rank} must lie between 1 and {min(in_features, out_features)}")
        if diag and in_features != out_features:
            raise PomonaError(f"diag=True needs a square matrix, got {out_features} x {in_features}")
        self.rank = rank
        std = (2 / ((in_features + out_features) * rank)) ** 0.25
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.left = nn.Parameter(torch.empty(out_features, rank, **factory).normal_(0, std, generator=generator))
        self.right = nn.Parameter(torch.empty(rank, in_features, **factory).normal_(0, std, generator=generator))
        self.diagonal = nn.Parameter(torch.zeros(out_features, **factory)) if diag else None

    @staticmethod
    def rank_for(in_features: int, out_features: int, parameters: int) -> int:
        """The rank whose factors come nearest to ``parameters`` numbers (at least 1)."""
        best = round(parameters / (in_features + out_features))
        return min(max(1, best), in_features, out_features)

    def weight(self) -> Tensor:
        """L Q (+ diag(D))."""
        weight = self.left @ self.right
        return weight if self.diagonal is None else weight + torch.diag(self.diagonal)

    def product(self, x: Tensor) -> Tensor:
        """L (Q x) (+ D x)."""
        y = F.linear(F.linear(x, self.right), self.left)
        return y if self.diagonal is None else y + self.diagonal * x

    @torch.no_grad()
    def project_(self, matrix: Tensor, iterations: int = 20) -> Self:
        """The nearest matrix of this rank (truncated SVD); with a diagonal, the two are fitted in turn."""
        self.check_matrix(matrix)
        diagonal = torch.zeros_like(matrix.diagonal())
        for _ in range(1 if self.diagonal is None else iterations):
            rest = matrix if self.diagonal is None else matrix - torch.diag(diagonal)
            u, s, vh = torch.linalg.svd(rest, full_matrices=False)
            root = s[: self.rank].sqrt()
            left, right = u[:, : self.rank] * root, root[:, None] * vh[: self.rank]
            if self.diagonal is not None:
                diagonal = (matrix - left @ right).diagonal()
        self.left.copy_(left)
        self.right.copy_(right)
        if self.diagonal is not None:
            self.diagonal.copy_(diagonal)
        return self

    def flops(self, batch: int = 1) -> int:
        """Two thin products."""
        extra = 0 if self.diagonal is None else 2 * self.out_features
        return batch * (2 * self.rank * (self.in_features + self.out_features) + extra)

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        return f"{super().extra_repr()}, rank={self.rank}, diag={self.diagonal is not None}"


def glorot_variance(in_features: int, out_features: int) -> float:
    """The variance of Glorot's initialisation, 2 / (in + out)."""
    return 2 / (in_features + out_features)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
