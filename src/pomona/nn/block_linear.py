"""Fixed block structures, the controls of structures that are learned: block-diagonal, Monarch and block-sparse.

Compared in Differentiable Learning of Generalized Structured Matrices for Efficient Deep Neural Networks, arXiv
2310.18882.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pomona.errors import PomonaError, check_divisible
from pomona.nn.structured import StructuredLinear


class BlockDiagonalLinear(StructuredLinear):
    """W = diag(W_1, ..., W_b); block i maps part i of the input to part i of the output.

    Entries have variance b / in_features, so that outputs have that of the inputs.

    Args:
        in_features, out_features: sizes, both divisible by ``blocks``.
        blocks: b; the cost is that of a dense layer over b.
        generator: source of the initial values.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        blocks: int = 4,
        bias: bool = True,
        *,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        check_divisible("in_features", in_features, "blocks", blocks)
        check_divisible("out_features", out_features, "blocks", blocks)
        super().__init__(in_features, out_features, bias, **options)
        shape = (blocks, out_features // blocks, in_features // blocks)
        self.blocks = nn.Parameter(torch.empty(shape, **options).normal_(0, shape[2] ** -0.5, generator=generator))

    def weight(self) -> Tensor:
        """The dense W."""
        return torch.block_diag(*self.blocks)

    def product(self, x: Tensor) -> Tensor:
        """All blocks at once."""
        return torch.einsum("...bi,boi->...bo", x.unflatten(-1, (len(self.blocks), -1)), self.blocks).flatten(-2)

    def flops(self, batch: int = 1) -> int:
        """Two for each entry of the blocks, a row."""
        return 2 * batch * self.blocks.numel()


class MonarchLinear(StructuredLinear):
    """W = P^T R P L: two block-diagonal matrices with a transposition of the blocks between.

    Args:
        in_features, out_features: sizes, divisible by ``blocks``.
        blocks: blocks of each factor.
        middle: features between the two, the smaller side by default.
        generator: source of the initial values.

    Source: Monarch: Expressive Structured Matrices for Efficient and Accurate Training, arXiv 2204.00595.
    """

    def __init__(
        self, in_features: int, out_features: int, blocks: int = 4, bias: bool = True, *, middle: int | None = None,
        generator: torch.Generator | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias, **options)
        middle = min(in_features, out_features) if middle is None else middle
        self.first = BlockDiagonalLinear(in_features, middle, blocks, False, generator=generator, **options)
        self.second = BlockDiagonalLinear(middle, out_features, blocks, False, generator=generator, **options)

    def weight(self) -> Tensor:
        """The dense W."""
        return self.product(
            torch.eye(self.in_features, dtype=self.first.blocks.dtype, device=self.first.blocks.device)
        ).T

    def product(self, x: Tensor) -> Tensor:
        """L, the features dealt out to all blocks, R."""
        middle = self.first.product(x).unflatten(-1, (len(self.first.blocks), -1)).mT.flatten(-2)
        return self.second.product(middle)

    def flops(self, batch: int = 1) -> int:
        """Of both factors."""
        return self.first.flops(batch) + self.second.flops(batch)


class BlockSparseLinear(StructuredLinear):
    """W with a random part of its square blocks, the same number in each row of blocks; the rest is zero.

    Args:
        in_features, out_features: sizes, divisible by ``block``.
        density: part of the blocks that are there.
        block: side of a block.
        generator: source of the initial values and of the places.
    """

    columns: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        density: float = 0.25,
        block: int = 16,
        bias: bool = True,
        *,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        check_divisible("in_features", in_features, "block", block)
        check_divisible("out_features", out_features, "block", block)
        if not 0 < density <= 1:
            raise PomonaError(f"density={density} must be above 0 and at most 1")
        super().__init__(in_features, out_features, bias, **options)
        rows, columns = out_features // block, in_features // block
        kept = max(1, round(density * columns))
        chosen = torch.rand(rows, columns, generator=generator).argsort(1)[:, :kept]
        self.register_buffer("columns", chosen.to(options.get("device")))
        shape = (rows, kept, block, block)
        std = (kept * block) ** -0.5
        self.blocks = nn.Parameter(torch.empty(shape, **options).normal_(0, std, generator=generator))

    def weight(self) -> Tensor:
        """The dense W."""
        rows, _, block, _ = self.blocks.shape
        grid = self.blocks.new_zeros(rows, self.in_features // block, block, block)
        index = self.columns[..., None, None].expand_as(self.blocks)
        return grid.scatter(1, index, self.blocks).transpose(1, 2).flatten(2).flatten(0, 1)

    def flops(self, batch: int = 1) -> int:
        """Two for each entry of the blocks, a row, where a kernel for sparse blocks is there (none is here)."""
        return 2 * batch * self.blocks.numel()
