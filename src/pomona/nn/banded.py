"""Products with matrices whose rows are non-zero on short circular arcs, as a few small dense products.

For the inference of layers such as `pomona.nn.gaudi_gblr.GaudiGBLR` (arXiv 2310.18882).
"""

from __future__ import annotations

from itertools import chain, pairwise

import numpy as np
import torch
from torch import Tensor, nn

from pomona.nn.check import check_input

OVERHEAD = 3000
"""What one more product costs beside its arithmetic, in multiply-adds an example (measured on CPUs, batches of 256)."""


def arcs(active: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First point and length of the shortest circular arc around the true entries of each row of (rows, n)."""
    rows, n = active.shape
    start, length = np.zeros(rows, int), np.zeros(rows, int)
    for row in range(rows):
        there = active[row].nonzero()[0]
        if len(there):
            gaps = np.diff(there, append=there[0] + n)
            widest = int(gaps.argmax())
            start[row], length[row] = there[(widest + 1) % len(there)], n + 1 - gaps[widest]
    return start, length


def group(start: np.ndarray, length: np.ndarray, n: int) -> tuple[float, np.ndarray, list[int]]:
    """Cut rows into groups whose arcs lie together: (cost, order of the rows, where each group begins in it).

    A group costs rows x the length of the arc around all of its arcs. For an order of the rows the cheapest cuts follow
    from dynamic programming; of two orders, by place and by size then place, the cheaper one is taken.
    """
    best: tuple[float, np.ndarray, list[int]] | None = None
    for size in (np.zeros_like(length), np.frexp(length)[1]):
        order = np.lexsort((start, size))
        low, high = start[order], start[order] + length[order]
        count = len(order)
        cost, cut = np.zeros(count + 1), np.zeros(count + 1, int)
        for i in range(count - 1, -1, -1):
            lowest, highest = np.minimum.accumulate(low[i:]), np.maximum.accumulate(high[i:])
            span = np.minimum(highest - lowest, n)
            total = np.arange(1, count - i + 1) * span + OVERHEAD + cost[i + 1 :]
            cut[i] = i + 1 + int(total.argmin())
            cost[i] = total.min()
        cuts = [0]
        while cuts[-1] < count:
            cuts.append(int(cut[cuts[-1]]))
        if best is None or cost[0] < best[0]:
            best = (float(cost[0]), order, cuts)
    assert best is not None
    return best


class _Bands(nn.Module):
    """A matrix (rows, n), cut into groups of rows with the columns that they use."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.n = n = matrix.shape[1]
        start, length = arcs((matrix != 0).cpu().numpy())
        _, self.order, cuts = group(start, length, n)
        self.pieces: list[list[tuple[str, int, int, int, int]]] = []
        """For each group its blocks, two where the arc wraps around: name, range of rows, range of columns."""
        for number, (first, last) in enumerate(pairwise(cuts)):
            rows = self.order[first:last]
            low = int(start[rows].min())
            high = min(int((start[rows] + length[rows]).max()), low + n)
            kept = matrix[torch.as_tensor(rows, device=matrix.device)]
            self.pieces.append([])
            for part, (a, b) in enumerate(((low, min(high, n)), (0, high - n))):
                if b > a:
                    name = f"block{number}_{part}"
                    self.register_buffer(name, kept[:, a:b].contiguous())
                    self.pieces[-1].append((name, first, last, a, b))

    def narrow(self, x: Tensor) -> Tensor:
        """M x^T: (batch, n) -> (rows in `order`, batch); so a permutation of rows later copies whole rows."""
        parts = []
        for (name, _, _, a, b), *wrapped in self.pieces:
            z = getattr(self, name) @ x[:, a:b].T
            for other, _, _, c, d in wrapped:
                z = z.addmm_(getattr(self, other), x[:, c:d].T)
            parts.append(z)
        return torch.cat(parts) if parts else x.T[:0]

    def widen(self, z: Tensor, bias: Tensor | None) -> Tensor:
        """z^T M + b: (rows in `order`, batch) -> (batch, n)."""
        y = z.new_zeros(z.shape[1], self.n) if bias is None else bias.repeat(z.shape[1], 1)
        for name, first, last, a, b in chain.from_iterable(self.pieces):
            y[:, a:b].addmm_(z[first:last].T, getattr(self, name))
        return y


class BandedLinear(nn.Module):
    """y = U^T V x + b for inference, where rows of U and V are non-zero on short circular arcs.

    Args:
        u: (rank, out_features).
        v: (rank, in_features).
        bias: (out_features,) or None.

    Shape:
        (*, in_features) -> (*, out_features)
    """

    order: Tensor
    bias: Tensor | None

    def __init__(self, u: Tensor, v: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        u, v = u.detach(), v.detach()
        self.in_features, self.out_features = v.shape[1], u.shape[1]
        there = (u != 0).any(1) & (v != 0).any(1)
        u, v = u[there], v[there]
        self.narrow, self.widen = _Bands(v), _Bands(u)
        place = np.argsort(self.narrow.order)[self.widen.order]
        self.register_buffer("order", torch.as_tensor(place, device=u.device))
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self._entries = int((u != 0).sum() + (v != 0).sum())

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        check_input(self, x, self.in_features)
        z = self.narrow.narrow(x.reshape(-1, self.in_features))
        return self.widen.widen(z.index_select(0, self.order), self.bias).reshape(*x.shape[:-1], self.out_features)

    def flops(self, batch: int = 1) -> int:
        """Two for each entry of U and V that is not 0, a row."""
        return 2 * batch * self._entries

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        products = sum(len(pieces) for pieces in self.narrow.pieces + self.widen.pieces)
        return f"{self.in_features}, {self.out_features}, products={products}"
