"""Whether ReLU overtakes GELU once a language model has no norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pomona.claims.characters import train_characters
from pomona.claims.lab import TUNING_SEED, log, seeded
from pomona.claims.verdict import Comparison, Scale
from pomona.data.text import CharacterText, kjv_characters
from pomona.measure.attention_entropy import attention_entropy, entropy_histogram, ffn_stats, rank_of_representations
from pomona.nets.decoder import DecoderLM
from pomona.nn.prelu import LearnableLeaky, learnable_leaky

SIZES: dict[Scale, dict[str, Any]] = {
    "smoke": {
        "text": 200_000,
        "dim": 16,
        "layers": 2,
        "length": 16,
        "batch": 4,
        "steps": 4,
        "windows": 8,
        "rates": (1e-2,),
    },
    "full": {
        "text": None,
        "dim": 48,
        "layers": 4,
        "length": 32,
        "batch": 16,
        "steps": 300,
        "windows": 256,
        "rates": (1e-3, 3e-3, 1e-2),
    },
    "gpu": {
        "text": None,
        "dim": 96,
        "layers": 4,
        "length": 64,
        "batch": 32,
        "steps": 1500,
        "windows": 512,
        "rates": (1e-3, 3e-3, 1e-2),
    },
}
LEAKY_SEEDS = 2
"""Seeds of the learned slopes, which do not decide."""

Activations = Mapping[str, str | Callable[[], Callable[[int], nn.Module]]]


def norm_free_lm(scale: Scale, seeds: Sequence[int]) -> Comparison:
    """Claimed: GELU's loss less ReLU's is larger without layer norm than with it.

    Causal transformers on the King James Bible, with and without norms, each with the learning rate chosen on
    validation out of three; without norms branches are scaled by 1 / sqrt(2 layers). Weights start at GPT-2's scale
    (0.02 at width 768) for the width here, and the rate warms up over a tenth of the steps. A run that diverges counts
    as a uniform guess and marks the verdict censored. In the details: share of early heads of high entropy (claimed:
    highest for GELU without norms) and of late heads of low entropy, slopes learned from 0.01 with ReLU's rate
    (claimed: below 0.1 without norms), selectivity and sparsity of the units, effective rank of the features.
    """
    sizes, text = SIZES[scale], kjv_characters(SIZES[scale]["text"])
    cells = compare_activations(
        text, sizes, seeds, ("pre", "none"), {"gelu": "gelu", "relu": "relu"}, rates=sizes["rates"]
    )
    for norm in ("pre", "none"):
        leaky: Activations = {f"leaky, a slope per {per}": _leaky(per) for per in ("layer", "global")}
        rate = cells[norm, "relu"]["lr"]
        cells |= compare_activations(text, sizes, seeds[:LEAKY_SEEDS], (norm,), leaky, rates=(rate,))
    gap = {
        norm: [g - r for g, r in zip(cells[norm, "gelu"]["bits"], cells[norm, "relu"]["bits"], strict=True)]
        for norm in ("pre", "none")
    }
    return Comparison(
        method=gap["none"],
        baseline=gap["pre"],
        metric="test bits per character of GELU less those of ReLU",
        method_name="without norms",
        baseline_name="with layer norm",
        censored=any(cell["diverged"] for cell in cells.values()),
        paper="ReLU has 8.2 % lower perplexity than GELU without layer norm in a model of 125 million parameters, and "
        "is slightly behind with it; 58 % of early heads are of high entropy with GELU",
        note="Small character models, trained briefly.",
        details={f"{norm}, {act}": cell for (norm, act), cell in cells.items()},
    )


def _leaky(per: str) -> Callable[[], Callable[[int], nn.Module]]:
    return lambda: learnable_leaky(per)


def compare_activations(
    text: CharacterText,
    sizes: Mapping[str, Any],
    seeds: Sequence[int],
    norms: Sequence[Literal["pre", "none"]],
    acts: Activations,
    *,
    rates: Sequence[float],
) -> dict[tuple[str, str], dict[str, Any]]:
    """Train a `DecoderLM` for each norm and activation on the same batches, the rate of each chosen on validation.

    Args:
        sizes: an entry of ``SIZES``.
        acts: name -> name of an activation, or () -> (features) -> activation.
        rates: learning rates to choose from.

    Returns:
        (norm, activation) -> ``lr``, test ``bits`` a seed, number ``diverged``, and means over seeds of what
        `diagnose` gives
    """

    def train(norm: Literal["pre", "none"], act: Any, lr: float, seed: int) -> tuple[DecoderLM, dict[str, Any]]:
        net = seeded(
            lambda: DecoderLM(
                len(text.vocabulary),
                sizes["dim"],
                sizes["layers"],
                4,
                max_len=sizes["length"],
                norm=norm,
                act=act if isinstance(act, str) else act(),
                init_std=0.02 * math.sqrt(768 / sizes["dim"]),
            ),
            seed,
        )
        assert isinstance(net, DecoderLM)
        plan = {key: sizes[key] for key in ("steps", "batch", "length", "windows")}
        return net, train_characters(net, text, **plan, warmup=sizes["steps"] // 10, lr=lr, seed=seed)

    tokens = text.batches("valid", 16, sizes["length"], torch.Generator().manual_seed(0))[0]
    guess = math.log2(len(text.vocabulary))
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for norm in norms:
        for name, act in acts.items():
            tuning = [train(norm, act, lr, seeds[0] + TUNING_SEED)[1]["valid"] for lr in rates if len(rates) > 1]
            known = [math.inf if math.isnan(bits) else bits for bits in tuning]
            lr = rates[known.index(min(known))] if known else rates[0]
            runs = [train(norm, act, lr, seed) for seed in seeds]
            bits = [result["test"] if math.isfinite(result["test"]) else guess for _, result in runs]
            sound = [diagnose(net, tokens) for net, result in runs if math.isfinite(result["test"])]
            means = {key: torch.stack([d[key] for d in sound]).mean(0).tolist() for key in (sound[0] if sound else ())}
            cells[norm, name] = {"lr": lr, "bits": bits, "diverged": len(runs) - len(sound), "tuning": tuning, **means}
            log.info("%s, %s: %s", norm, name, cells[norm, name])
    return cells


def diagnose(net: DecoderLM, tokens: Tensor) -> dict[str, Tensor]:
    """Entropy, overload and collapse of the heads, ranks, selectivity, sparsity and learned slopes."""
    entropy = attention_entropy(net, tokens, normalised=True)
    histogram = entropy_histogram(entropy)
    slopes = [m.slope.detach() for m in net.modules() if isinstance(m, LearnableLeaky)]
    return {
        "entropy": entropy,
        "overload": torch.tensor(histogram.overload),
        "collapse": torch.tensor(histogram.collapse),
        "rank": rank_of_representations(net, tokens),
        **ffn_stats(net, tokens),
        **({"slopes": torch.cat(slopes)} if slopes else {}),
    }
