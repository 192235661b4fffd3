"""Character-level language modelling, as several claims use it: networks that map ids (batch, time) to logits
(batch, time, vocabulary).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pomona.data.text import CharacterText


def _logits(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def bits_per_character(net: nn.Module, text: CharacterText, split: str, length: int, windows: int = 64) -> float:
    """Mean cross-entropy in bits over the first ``windows`` consecutive windows of a split, state reset at each."""
    net.eval()
    ids = text.split(split)[: windows * length + 1]
    count = (len(ids) - 1) // length
    x, y = ids[: count * length].view(count, length), ids[1 : count * length + 1].view(count, length)
    loss = F.cross_entropy(_logits(net(x)).flatten(0, 1), y.flatten())
    net.train()
    return float(loss) / math.log(2)


def train_characters(
    net: nn.Module,
    text: CharacterText,
    *,
    steps: int,
    batch: int,
    length: int,
    lr: float,
    seed: int,
    clip: float = 1.0,
    warmup: int = 0,
    windows: int = 64,
    check_at: Sequence[int] = (),
) -> dict[str, Any]:
    """Train by Adam on random windows, in place.

    The rate rises linearly over the first ``warmup`` steps; ``windows`` of each split are scored.

    Returns:
        ``valid`` and ``test`` bits per character, ``seconds`` of training, and ``curve``: (step, validation bits)
        at ``check_at``.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, fused=True)
    checks, curve = set(check_at), []
    spent = 0.0
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net.train()
        for step in range(1, steps + 1):
            start = time.perf_counter()
            x, y = text.batches("train", batch, length, generator)
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(_logits(net(x)).flatten(0, 1), y.flatten()).backward()
            nn.utils.clip_grad_norm_(net.parameters(), clip)
            if step <= warmup + 1:
                for group in optimizer.param_groups:
                    group["lr"] = lr * min(1.0, step / (warmup + 1))
            optimizer.step()
            spent += time.perf_counter() - start
            if step in checks:
                curve.append((step, bits_per_character(net, text, "valid", length, windows)))
    return {
        "valid": bits_per_character(net, text, "valid", length, windows),
        "test": bits_per_character(net, text, "test", length, windows),
        "seconds": spent,
        "curve": curve,
    }
