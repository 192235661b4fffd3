"""Arithmetic modulo p: small tasks on which networks memorise long before they generalise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from pomona.data.task import Split, Task
from pomona.errors import PomonaError, unknown
from pomona.nets.specs import Inputs, Outputs

OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda i, j: i + j,
    "sub": lambda i, j: i - j,
    "x2xyy2": lambda i, j: i * i + i * j + j * j,
}
"""The label of a pair, before it is taken modulo p; ``rand`` draws labels that follow no rule."""


class GrokTask(Task):
    """All pairs (i, j) of residues modulo p, labelled by an operation; a random share is for training.

    Synthetic: drawn by rule, nothing is measured.

    Args:
        p: the modulus; a prime, in the papers.
        op: ``add`` (i + j), ``sub`` (i - j), ``x2xyy2`` (i^2 + ij + j^2) or ``rand`` (labels drawn at random).
        frac: share of the pairs to train on, rounded down.
        symmetric: only pairs with i <= j, of which there are p (p + 1) / 2, rather than all p^2.
        valid: share of the other pairs that validate; the rest test.
        seed: of the split, and of the labels of ``rand``.

    Inputs are tokens (n, 2) as int64, targets the classes 0..p-1.

    Raises:
        PomonaError: for an unknown operation, p below 2, or a share that leaves a split empty.

    Source: Grokking: Generalization Beyond Overfitting on Small Algorithmic Datasets (arXiv 2201.02177); symmetric
    pairs as in arXiv 2310.19470.
    """

    def __init__(
        self,
        p: int = 67,
        op: Literal["add", "sub", "x2xyy2", "rand"] = "add",
        frac: float = 0.4,
        symmetric: bool = True,
        valid: float = 0.25,
        seed: int = 0,
    ) -> None:
        if op not in (*OPERATIONS, "rand"):
            raise unknown("op", op, (*OPERATIONS, "rand"))
        if p < 2:
            raise PomonaError(f"p={p} must be 2 or more")
        generator = torch.Generator().manual_seed(seed)
        pairs = torch.cartesian_prod(torch.arange(p), torch.arange(p))
        if symmetric:
            pairs = pairs[pairs[:, 0] <= pairs[:, 1]]
        order = torch.randperm(len(pairs), generator=generator)
        if op == "rand":
            labels = torch.randint(p, (len(pairs),), generator=generator)
        else:
            labels = OPERATIONS[op](*pairs.unbind(1)) % p
        first = int(frac * len(pairs))
        second = first + round(valid * (len(pairs) - first))
        parts = order.tensor_split([first, second]) if 0 <= frac <= 1 and 0 <= valid <= 1 else ()
        if not all(map(len, parts)) or not parts:
            raise PomonaError(f"frac={frac} and valid={valid} of {len(pairs)} pairs leave a split empty")
        self.p, self.op, self.symmetric = p, op, symmetric
        splits = {name: Split(pairs[i], labels[i]) for name, i in zip(("train", "valid", "test"), parts, strict=True)}
        super().__init__(
            f"{op} modulo {p}",
            Inputs("tokens", (2,), vocabulary=p),
            Outputs("classes", p, tuple(map(str, range(p)))),
            splits,
        )
