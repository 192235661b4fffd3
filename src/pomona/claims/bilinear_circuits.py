"""Whether a transformer that is tensor algebra loses nothing against one with an activation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from pomona.claims.characters import train_characters
from pomona.claims.lab import TUNING_SEED, log, seeded
from pomona.claims.verdict import Comparison, Scale
from pomona.data.text import CharacterText, kjv_characters
from pomona.measure.bilinear_circuits import expand_paths
from pomona.nets.bilinear_transformer import BilinearTransformer
from pomona.nets.cost import parameters
from pomona.nets.decoder import DecoderLM

SIZES: dict[Scale, dict[str, Any]] = {
    "smoke": {"text": 200_000, "dim": 16, "heads": 2, "steps": 4, "batch": 4, "length": 16, "rates": (1e-2,)},
    "full": {"text": None, "dim": 64, "heads": 4, "steps": 800, "batch": 16, "length": 32, "rates": (3e-3, 1e-2)},
    "gpu": {"text": None, "dim": 64, "heads": 4, "steps": 5000, "batch": 64, "length": 64, "rates": (3e-3, 1e-2)},
}
NATS = 0.03
WINDOWS = 256


def bilinear_circuits(scale: Scale, seeds: Sequence[int]) -> Comparison:
    """Claimed: a one-layer bilinear transformer's loss is at most 0.03 nats above that of a ReLU one.

    Characters of the King James Bible, no norms, feed-forward parts of equal parameters, the same batches, the learning
    rate of each chosen on validation. In the details: GELU and SwiGLU; the largest difference between the bilinear
    model's logits and the sum of its paths; test loss with the paths kept in order of norm, beginning with the direct
    one (claimed: a third of the paths give 90 % of the gain over bigrams), and the rank correlation of a path's norm
    and the loss when it alone is left out (claimed above 0.5).
    """
    sizes = SIZES[scale]
    text = kjv_characters(sizes["text"])
    makers = _makers(len(text.vocabulary), sizes)
    details: dict[str, Any] = {}
    for name, make in makers.items():
        tuning = [
            _train(make, text, sizes, lr, seeds[0] + TUNING_SEED)[1]["valid"]
            for lr in sizes["rates"]
            if len(sizes["rates"]) > 1
        ]
        lr = sizes["rates"][int(np.nanargmin(tuning))] if tuning else sizes["rates"][0]
        runs = [_train(make, text, sizes, lr, seed) for seed in seeds]
        nets = [net for net, _ in runs if name == "bilinear" and isinstance(net, BilinearTransformer)]
        if nets:
            details["paths"] = [paths_in_order(net, text, sizes["length"]) for net in nets]
        details[name] = {"lr": lr, "parameters": parameters(runs[0][0]), "bits": [r["test"] for _, r in runs]}
        log.info("%s: %s", name, details[name])
    return Comparison(
        method=details["bilinear"]["bits"],
        baseline=details["relu"]["bits"],
        metric="test bits per character",
        method_name="bilinear feed-forward part",
        baseline_name="ReLU feed-forward part of equal parameters",
        better="lower",
        margin=-NATS / math.log(2),
        paper="a note without experiments; it cites that bilinear parts do as well as ReLU and GELU in transformers",
        note="A small character model without norms.",
        details=details,
    )


def _makers(vocabulary: int, sizes: dict[str, Any]) -> dict[str, Callable[[], nn.Module]]:
    dim, heads, length = sizes["dim"], sizes["heads"], sizes["length"]

    def gated(gate: str | None) -> nn.Module:
        return BilinearTransformer(vocabulary, dim, heads, 1, 2 * dim, length, gate=gate)

    def plain(act: str) -> nn.Module:
        options: dict[str, Any] = {
            "norm": "none",
            "act": act,
            "tie": False,
            "bias": False,
            "branch_scale": 1.0,
            "embed_std": 1.0,
        }
        return DecoderLM(vocabulary, dim, 1, heads, 3 * dim, length, **options)

    return {
        "bilinear": partial(gated, None),
        "relu": partial(plain, "relu"),
        "gelu": partial(plain, "gelu"),
        "swiglu": partial(gated, "silu"),
    }


def _train(
    make: Callable[[], nn.Module], text: CharacterText, sizes: dict[str, Any], lr: float, seed: int
) -> tuple[nn.Module, dict[str, Any]]:
    net = seeded(make, seed)
    plan = {key: sizes[key] for key in ("steps", "batch", "length")}
    warmup = sizes["steps"] // 10
    return net, train_characters(net, text, **plan, warmup=warmup, windows=WINDOWS, lr=lr, seed=seed)


@torch.no_grad()
def paths_in_order(net: BilinearTransformer, text: CharacterText, length: int, windows: int = 64) -> dict[str, Any]:
    """Exactness of the path expansion, and what the paths are worth on test text, in bits per character."""
    net = net.double().eval()
    ids = text.split("test")[: windows * length + 1]
    x, y = ids[:-1].view(windows, length), ids[1:].view(windows, length)
    paths = expand_paths(net)
    pattern = net.attention(x)[0]
    logits = torch.stack([path.evaluate(x, pattern) for path in paths])

    def bits(logits: Tensor) -> float:
        return float(F.cross_entropy(logits.flatten(0, 1), y.flatten())) / math.log(2)

    whole = logits.sum(0)
    order = sorted(range(1, len(paths)), key=lambda i: -paths[i].norm(net))
    kept = [bits(logits[[0, *order[:count]]].sum(0)) for count in range(len(paths))]
    bigram = bits(_bigram_logits(text)[x])
    goal = bigram - 0.9 * (bigram - kept[-1])
    worth = [bits(whole - logits[i]) - kept[-1] for i in range(len(paths))]
    return {
        "largest error of the sum": float((whole - net(x)).abs().max()),
        "bigram": bigram,
        "bits with the first paths": kept,
        "order": [paths[i].name for i in (0, *order)],
        # the first count after which it stays there
        "paths for 90 % of the gain": 1 + max((n + 1 for n, value in enumerate(kept) if value > goal), default=0),
        "rank correlation of norm and worth": float(stats.spearmanr([p.norm(net) for p in paths], worth).statistic),
    }


def _bigram_logits(text: CharacterText) -> Tensor:
    """Logarithms of smoothed frequencies of the next character, (vocabulary, vocabulary)."""
    size = len(text.vocabulary)
    pairs = text.train[:-1] * size + text.train[1:]
    return (torch.bincount(pairs, minlength=size**2).double() + 1).view(size, size).log().log_softmax(-1)
