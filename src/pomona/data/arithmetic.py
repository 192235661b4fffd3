"""Arithmetic on sums: a network must find which numbers to add and what to do with the two sums, beyond its range."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pomona.data.task import Split, Task
from pomona.errors import PomonaError, check_positive, unknown
from pomona.nets.specs import Inputs, Outputs

OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "square": lambda a, b: a.square(),
    "sqrt": lambda a, b: a.sqrt(),
}
"""What is done with the two sums; the last two take the first alone."""


class ArithmeticTask(Task):
    """y = op(sum of a subset of x, sum of another), x uniform, in another range for the test than for training.

    Synthetic: drawn by rule, nothing is measured. The subsets are runs of neighbouring inputs at a random place.

    Args:
        op: ``add``, ``sub``, ``mul``, ``div``, ``square`` or ``sqrt``.
        input_size: numbers in x.
        subset_ratio: share of them in each subset.
        overlap_ratio: share of a subset that is in the other, too.
        train_range: of x in training (and in validation, unless ``valid_range`` is given).
        test_range: of x in the test.
        valid_range: of x in validation.
        sizes: examples for training, validation and test.
        seed: of the subsets and of x.

    Inputs (n, input_size), targets (n, 1), both float32; the loss is the mean squared error.

    Raises:
        PomonaError: for an unknown operation, ratios that leave no subset or do not fit, or roots of negative sums.

    Source: Neural Arithmetic Units (arXiv 2001.05016).
    """

    def __init__(
        self,
        op: str = "mul",
        input_size: int = 100,
        subset_ratio: float = 0.25,
        overlap_ratio: float = 0.5,
        train_range: tuple[float, float] = (1.0, 2.0),
        test_range: tuple[float, float] = (2.0, 6.0),
        valid_range: tuple[float, float] | None = None,
        sizes: tuple[int, int, int] = (65536, 1024, 4096),
        seed: int = 0,
    ) -> None:
        if op not in OPERATIONS:
            raise unknown("op", op, OPERATIONS)
        check_positive(input_size=input_size, **dict(zip(("train", "valid", "test"), sizes, strict=True)))
        subset = round(subset_ratio * input_size)
        shared = int(overlap_ratio * subset)
        span = 2 * subset - shared
        if not (subset > 0 and 0 <= shared <= subset and span <= input_size):
            raise PomonaError(
                f"subset_ratio={subset_ratio} and overlap_ratio={overlap_ratio} must leave two subsets of at "
                f"least 1 that span no more than all {input_size} inputs; they have {subset} and span {span}"
            )
        ranges = (train_range, valid_range or train_range, test_range)
        if op == "sqrt" and min(low for low, _ in ranges) < 0:
            raise PomonaError(f"op='sqrt' needs ranges above 0, not {ranges}")
        generator = torch.Generator().manual_seed(seed)
        start = int(torch.randint(input_size - span + 1, (), generator=generator))
        self.op = op
        self.subsets = torch.zeros(2, input_size, dtype=torch.float64)
        self.subsets[0, start : start + subset] = 1
        self.subsets[1, start + subset - shared : start + span] = 1
        splits = {}
        for name, (low, high), size in zip(("train", "valid", "test"), ranges, sizes, strict=True):
            x = torch.rand(size, input_size, generator=generator) * (high - low) + low
            splits[name] = Split(x, self.answer(x).float())
        super().__init__(op, Inputs("table", (input_size,)), Outputs("number", 1, (op,)), splits)

    def answer(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """(n, input_size) -> (n, 1) in float64, with ``weights`` (2, input_size) in the place of the subsets."""
        a, b = (x.double() @ (self.subsets if weights is None else weights).T).unbind(1)
        return OPERATIONS[self.op](a, b)[:, None]

    def threshold(self, eps: float = 1e-5) -> float:
        """Mean squared error on the test of right subsets whose every weight is off by ``eps``, towards the inside."""
        x = self.splits["test"].x
        return float((self.answer(x, (self.subsets - eps).abs()) - self.answer(x)).square().mean())

    def solved(self, output: Tensor, eps: float = 1e-5) -> bool:
        """Whether outputs (n, 1) on the test have an error below ``threshold``."""
        error = (output.double() - self.answer(self.splits["test"].x)).square().mean()
        return bool(error < self.threshold(eps))
