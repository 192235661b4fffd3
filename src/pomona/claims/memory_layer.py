"""Whether a product-key memory in place of one feed-forward part makes a language model remember more facts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pomona.claims.lab import TUNING_SEED, log, seeded
from pomona.claims.language import kjv_pieces, nats, train_language
from pomona.claims.verdict import Comparison, Scale
from pomona.nets.cost import flops, parameters
from pomona.nets.decoder import DecoderLM
from pomona.nn.feedforward import FeedForward
from pomona.nn.hash_layer import SwitchFFN
from pomona.nn.memory_layer import MemoryLayer

SIZES: dict[Scale, dict[str, Any]] = {
    "smoke": {"pieces": (20_000, 100), "facts": (16, 4, 16), "steps": 2, "batch": 2, "rows": 8, "rates": [5e-3]},
    "full": {
        "pieces": (1_000_000, 500),
        "facts": (512, 16, 512),
        "steps": 800,
        "batch": 4,
        "rows": 160,
        "rates": [1e-2, 4e-3],
    },
    "gpu": {
        "pieces": (4_000_000, 2000),
        "facts": (2048, 16, 2048),
        "steps": 4000,
        "batch": 16,
        "rows": 512,
        "rates": [4e-3, 1e-3],
    },
}
DIM, HIDDEN, LENGTH, LAYERS, HEADS, TOPK = 64, 256, 32, 2, 4, 8
TIMES = 2.0
"""How many times as many facts as the dense model the memory must hold."""


def memory_layer(scale: Scale, seeds: Sequence[int]) -> Comparison:
    """Claimed: with a memory of 64^2 slots twice as many facts are recalled as with a dense feed-forward part of at
    least as many operations, and more than with one four times as wide.

    Two-layer language models see the King James Bible and random facts (subject, relation) -> object, a sequence of
    three tokens each, for equal steps; recall is the share of all facts whose object is the likeliest token. (Facts can
    only be learned from training; there are no others to test on.) Learning rates, for the values as for the rest, by
    the recall of half as long a run with other facts. In the details: cross-entropy on the test part of the text
    (claimed: within 0.03 nats of dense), and with one seed Switch and memories of 16^2 and 128^2 slots (claimed: recall
    rises with slots).
    """
    sizes = SIZES[scale]
    results: dict[str, dict[str, Any]] = {}
    for name, (make, decides) in _models().items():
        rates = sizes["rates"] if decides else [results["memory 64^2" if "memory" in name else "dense"]["lr"]]
        own = seeds if decides else seeds[:1]
        half = sizes | {"steps": sizes["steps"] // 2}
        tuned = [_run(make, half, lr, seeds[0] + TUNING_SEED, "valid")["recall"] for lr in rates if len(rates) > 1]
        lr = rates[max(range(len(tuned)), key=tuned.__getitem__)] if tuned else rates[0]
        runs = [_run(make, sizes, lr, seed, "test") for seed in own]
        results[name] = {"lr": lr, "tuning": tuned} | {key: [run[key] for run in runs] for key in runs[0]}
        log.info("%s: %s", name, results[name])
    memory, dense, wide = (results[name] for name in ("memory 64^2", "dense", "dense, 4 times as wide"))
    rise = [results[f"memory {n}^2"]["recall"][0] for n in (16, 64, 128)]
    difference = [m - d for m, d in zip(memory["text"], dense["text"], strict=True)]
    return Comparison(
        method=memory["recall"],
        baseline=[max(TIMES * d, w) for d, w in zip(dense["recall"], wide["recall"], strict=True)],
        metric="share of the facts recalled",
        method_name="language model with a memory of 64^2 slots",
        baseline_name=f"the larger of {TIMES:g} times the dense model's recall and that of one with 4 times the width",
        paper="1.3B model with 64M keys: 13.7 on NaturalQuestions against 7.8 dense at equal operations",
        note="Small models and random facts, each seen about 16 times.",
        details={
            "operations of memory over dense": memory["flops"][0] / dense["flops"][0],
            "text within 0.03 nats": abs(sum(difference) / len(difference)) < 0.03,
            "text, memory minus dense": difference,
            "recall rises with slots": rise == sorted(rise),
            "models": results,
        },
    )


def _models() -> dict[str, tuple[Callable[[], nn.Module], bool]]:
    """What stands in the second block, and whether it decides."""

    def memory(n_keys: int) -> nn.Module:
        return MemoryLayer(DIM, n_keys, HEADS, topk=TOPK)

    return {
        "dense": (lambda: FeedForward(DIM, HIDDEN), True),
        "dense, 4 times as wide": (lambda: FeedForward(DIM, 4 * HIDDEN), True),
        "memory 64^2": (partial(memory, 64), True),
        "memory 16^2": (partial(memory, 16), False),
        "memory 128^2": (partial(memory, 128), False),
        "switch": (lambda: SwitchFFN(DIM, HIDDEN, 16, act="gelu"), False),
    }


def random_facts(first: int, sizes: tuple[int, int, int], seed: int) -> Tensor:
    """Every (subject, relation) with a random object, as token ids from ``first`` on: (subjects * relations, 3)"""
    subjects, relations, objects = sizes
    pairs = torch.cartesian_prod(torch.arange(subjects), subjects + torch.arange(relations))
    values = torch.randint(objects, (len(pairs), 1), generator=torch.Generator().manual_seed(seed))
    return first + torch.cat([pairs, subjects + relations + values], 1)


def _run(make: Callable[[], nn.Module], sizes: dict[str, Any], lr: float, seed: int, split: str) -> dict[str, float]:
    text = kjv_pieces(*sizes["pieces"])
    facts = random_facts(text.size, sizes["facts"], seed)

    def ffn(dim: int, hidden: int, index: int) -> nn.Module:
        return make() if index == LAYERS // 2 else FeedForward(dim, hidden)

    vocab = text.size + sum(sizes["facts"])
    net = seeded(lambda: DecoderLM(vocab, DIM, LAYERS, hidden=HIDDEN, max_len=LENGTH, make_ffn=ffn), seed)
    seconds = train_language(
        net,
        text,
        steps=sizes["steps"],
        batch=sizes["batch"],
        length=LENGTH,
        lr=lr,
        seed=seed,
        extra=(facts, sizes["rows"]),
    )
    return {
        "recall": _recall(net, facts),
        "text": nats(net, text, split, LENGTH),
        "parameters": parameters(net),
        "flops": flops(net, text.train[: 2 * LENGTH].view(2, LENGTH)),
        "seconds": seconds,
    }


@torch.no_grad()
def _recall(net: nn.Module, facts: Tensor) -> float:
    net.eval()
    right = [net(rows[:, :2])[:, -1].argmax(-1) == rows[:, 2] for rows in facts.split(1024)]
    return float(torch.cat(right).float().mean())
