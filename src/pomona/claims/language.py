"""Language modelling on word pieces, as several claims use it: networks map ids (batch, time) to logits over pieces."""

from __future__ import annotations

import time
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pomona.data.text import CharacterText, kjv_characters
from pomona.data.word_pieces import PieceText, word_pieces
from pomona.train.optim import make_optimizer
from pomona.train.rule import with_hook
from pomona.train.schedules import Cosine, Warmup
from pomona.train.settings import Training


@cache
def kjv_pieces(characters: int, vocab: int) -> PieceText:
    """The first so many characters of the King James Bible in ``vocab`` word pieces."""
    return word_pieces(kjv_characters(characters), vocab)


@torch.no_grad()
def nats(net: nn.Module, text: CharacterText, split: str, length: int, windows: int = 256) -> float:
    """Mean cross-entropy a piece over the first ``windows`` consecutive windows of a split."""
    ids = text.split(split)[: windows * length + 1]
    count = (len(ids) - 1) // length
    x, y = ids[: count * length].view(count, length), ids[1 : count * length + 1].view(count, length)
    training = net.training
    net.eval()
    total = sum(
        float(F.cross_entropy(net(a).flatten(0, 1), b.flatten(), reduction="sum"))
        for a, b in zip(x.split(32), y.split(32), strict=True)
    )
    net.train(training)
    return total / y.numel()


def train_language(
    net: nn.Module,
    text: CharacterText,
    *,
    steps: int,
    batch: int,
    length: int,
    lr: float,
    seed: int,
    warmup: float = 0.05,
    clip: float = 1.0,
    extra: tuple[Tensor, int] | None = None,
) -> float:
    """Train by AdamW on random windows, in place, with the hooks of layers; returns seconds.

    Args:
        net: ids (batch, time) -> logits (batch, time, vocabulary).
        text: where the windows come from.
        steps: optimiser steps.
        batch: windows a step.
        length: pieces a window.
        lr: highest learning rate, of a cosine schedule after ``warmup`` of the steps.
        seed: of the windows.
        warmup: share of the steps.
        clip: largest norm of the gradient.
        extra: rows (n, k) of ids, and how many random ones join each step; every piece of text and rows counts alike.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = make_optimizer(net, Training(lr=lr))
    schedule = Warmup(Cosine(), warmup)
    auxiliary, after = with_hook(net, "aux_loss"), with_hook(net, "post_step")
    start = time.perf_counter()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net.train()
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"] * schedule(step / steps, step)
            parts = [text.batches("train", batch, length, generator)]
            if extra is not None:
                rows = extra[0][torch.randint(len(extra[0]), (extra[1],), generator=generator)]
                parts.append((rows[:, :-1], rows[:, 1:]))
            loss = torch.zeros(())
            for x, y in parts:
                loss = loss + F.cross_entropy(net(x).flatten(0, 1), y.flatten(), reduction="sum")
                for module in auxiliary:
                    loss = loss + y.numel() * module.aux_loss()  # type: ignore[operator]
            count = sum(y.numel() for _, y in parts)
            optimizer.zero_grad(set_to_none=True)
            (loss / count).backward()
            nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            with torch.no_grad():
                for module in after:
                    module.post_step()  # type: ignore[operator]
    return time.perf_counter() - start
