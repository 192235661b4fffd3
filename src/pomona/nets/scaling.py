"""How the cost of a token mixer grows with the number of tokens: operations, memory of training, and time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pomona.errors import PomonaError, check_positive
from pomona.nets.cost import flops, training_memory


@dataclass(frozen=True)
class Scaling:
    """Costs by length.

    Attributes:
        tokens: the lengths.
        flops: of a forward pass of one example (fused attention on the CPU is not counted by torch).
        bytes: peak that a forward and backward pass of the batch allocates, parameters not counted.
        seconds: of a forward and backward pass of the batch.
    """

    tokens: list[int]
    flops: list[int]
    bytes: list[int]
    seconds: list[float]

    def exponents(self) -> dict[str, float]:
        """Slope of each cost against length, both logarithmic, by least squares: 1 is linear, 2 quadratic."""
        logs = np.log(self.tokens)
        return {
            name: float(np.polyfit(logs, np.log(np.maximum(getattr(self, name), 1e-12)), 1)[0])
            for name in ("flops", "bytes", "seconds")
        }


def scaling(
    make: Callable[[int], nn.Module], tokens: Sequence[int], dim: int, *, batch: int = 1, repeats: int = 3
) -> Scaling:
    """Measure a mixer (batch, N, dim) -> (batch, N, ...) at several lengths.

    Args:
        make: N -> mixer.
        tokens: at least two lengths N.
        dim: features of a token.
        batch: sequences at a time.
        repeats: timed passes, of which the fastest counts; one more comes before them.

    Raises:
        PomonaError: for fewer than two lengths.
    """
    check_positive(dim=dim, batch=batch, repeats=repeats)
    if len(set(tokens)) < 2:
        raise PomonaError(f"tokens={list(tokens)} must be at least two lengths, such as [128, 256, 512]")
    generator = torch.Generator().manual_seed(0)
    found = Scaling(list(tokens), [], [], [])
    for n in tokens:
        mixer, x = make(n), torch.randn(batch, n, dim, generator=generator)
        found.flops.append(flops(mixer, x))
        found.bytes.append(training_memory(mixer, x))
        spent = []
        x.requires_grad_()  # a mixer may have no parameters
        for _ in range(repeats + 1):
            start = time.perf_counter()
            mixer(x).square().mean().backward()
            spent.append(time.perf_counter() - start)
        found.seconds.append(min(spent[1:]))
    return found
