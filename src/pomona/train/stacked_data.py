"""Batches, scores and signatures of many networks that are trained as one."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from pomona.data.task import Task


class Orders:
    """Index batches of many members: (batch,) where all have one seed, else (members, batch).

    Each member's are those of :func:`pomona.train.loop.batches` with its seed. A fresh order is drawn an epoch.
    """

    def __init__(self, count: int, batch_size: int, seeds: Sequence[int], device: torch.device) -> None:
        self.count, self.size, self.device = count, min(batch_size, count), device
        self.shared = len(set(seeds)) == 1
        self.generators = [torch.Generator().manual_seed(seed) for seed in (seeds[:1] if self.shared else seeds)]

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            orders = torch.stack([torch.randperm(self.count, generator=g) for g in self.generators])
            steps = self.count // self.size
            epoch = orders[:, : steps * self.size].to(self.device).reshape(-1, steps, self.size).transpose(0, 1)
            for index in epoch.contiguous():
                if len(index) != len(self.generators):  # members left within this epoch
                    index = index[self.kept]
                yield index[0] if self.shared else index

    def take(self, rows: Tensor) -> None:
        """Keep only these members, also for the rest of the running epoch."""
        raise NotImplementedError
