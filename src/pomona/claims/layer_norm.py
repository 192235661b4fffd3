"""Whether layer normalisation speeds up a recurrent network, and holds at batches too small for batch norm."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pomona.claims.characters import train_characters
from pomona.claims.lab import TUNING_SEED, Arm, compare_arms, grid, log, seeded
from pomona.claims.verdict import Comparison, Scale
from pomona.data import load
from pomona.data.text import CharacterText, kjv_characters
from pomona.nn.init import init_
from pomona.nn.norm import Norm
from pomona.seq.norm_rnn import LayerNormLSTM
from pomona.train.budget import Budget
from pomona.train.settings import Training

SIZES: dict[Scale, dict[str, Any]] = {
    "smoke": {"text": 200_000, "hidden": 8, "length": 10, "steps": 10, "check": 5, "limit": 300, "examples": 300},
    "full": {"text": None, "hidden": 64, "length": 50, "steps": 600, "check": 20, "limit": 4000, "examples": 8000},
    "gpu": {"text": None, "hidden": 128, "length": 100, "steps": 1500, "check": 30, "limit": 10000, "examples": 80000},
}
RATES = (2e-3, 5e-3, 1e-2)
BATCH = 16
FAR = 1000


def layer_norm(scale: Scale, seeds: Sequence[int]) -> Comparison:
    """Claimed: an LSTM with layer norm needs fewer updates to the loss at which a plain LSTM ends.

    Characters of the King James Bible, one layer, Adam, the learning rate chosen on validation out of three for each;
    both start with orthogonal recurrent weights, forget bias 1 and other biases 0. Updates are counted on the
    validation loss, at the same checks for both; a seed whose normalised LSTM never gets there counts all steps and is
    marked censored. In the details: the length of the cell state after 100 and 1000 characters, and the test accuracy
    of an MLP on Fashion-MNIST without norm, with batch norm and with layer norm at batch 128 and 4 (claimed: equal at
    128, layer norm 1 to 3 points above batch norm at 4).
    """
    sizes = SIZES[scale]
    text = kjv_characters(sizes["text"])
    details: dict[str, Any] = {}
    chosen = {}
    for kind in ("plain", "layer"):
        tuning = {lr: _train(kind, text, sizes, lr, seeds[0] + TUNING_SEED)[1]["curve"][-1][1] for lr in RATES}
        chosen[kind] = min(RATES, key=tuning.__getitem__)
    updates: dict[str, list[float]] = {"plain": [], "layer": []}
    bits: dict[str, list[float]] = {"plain": [], "layer": []}
    lengths: dict[str, list[list[float]]] = {"plain": [], "layer": []}
    reached_all = True
    for seed in seeds:
        runs = {kind: _train(kind, text, sizes, chosen[kind], seed) for kind in updates}
        goal = runs["plain"][1]["curve"][-1][1]
        for kind, (net, result) in runs.items():
            reached = [step for step, value in result["curve"] if value <= goal]
            reached_all &= bool(reached)
            updates[kind].append(float(reached[0] if reached else sizes["steps"]))
            bits[kind].append(result["test"])
            lengths[kind].append(_cell_lengths(net, text))
        log.info("seed %d: updates %s, bits %s", seed, *({k: v[-1] for k, v in d.items()} for d in (updates, bits)))
    for kind in updates:
        near, far = torch.tensor(lengths[kind]).mean(0).tolist()
        mean_bits = sum(bits[kind]) / len(seeds)
        details[kind] = {"lr": chosen[kind], "bits": mean_bits, "cell at 100": near, f"cell at {FAR}": far}
    details["mlp"] = _mlps(sizes, seeds)
    return Comparison(
        method=updates["layer"],
        baseline=updates["plain"],
        metric="updates until the final validation loss of the plain LSTM",
        method_name="LSTM with layer norm",
        baseline_name="plain LSTM",
        better="lower",
        censored=not reached_all,
        paper="layer norm makes recurrent networks reach a given loss in clearly fewer updates, and trains at batch 4",
        note="A small character model with few updates.",
        details=details,
    )


class CharacterLSTM(nn.Module):
    """Embedding, one LSTM layer ('plain' or 'layer' for layer norm) and a linear map to the vocabulary.

    Shapes:
        ids (batch, time) -> logits (batch, time, vocabulary)
    """

    def __init__(self, kind: str, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        make = nn.LSTM if kind == "plain" else LayerNormLSTM
        self.lstm = make(hidden, hidden, batch_first=True)
        weights = dict(self.lstm.named_parameters())
        with torch.no_grad():
            if kind == "plain":
                for block in weights["weight_hh_l0"].chunk(4):
                    nn.init.orthogonal_(block)
                weights["bias_hh_l0"].zero_()
                # gates in the order input, forget, cell, output
                weights["bias_ih_l0"].zero_()[hidden : 2 * hidden] = 1.0
            else:
                # forget gate first
                weights["cells.0.bias"][:hidden] = 1.0
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the next character."""
        return self.head(self.lstm(self.embedding(ids))[0])


def _train(
    kind: str, text: CharacterText, sizes: dict[str, Any], lr: float, seed: int
) -> tuple[CharacterLSTM, dict[str, Any]]:
    net = seeded(lambda: CharacterLSTM(kind, len(text.vocabulary), sizes["hidden"]), seed)
    steps, every = sizes["steps"], sizes["check"]
    result = train_characters(
        net,
        text,
        steps=steps,
        batch=BATCH,
        length=sizes["length"],
        lr=lr,
        seed=seed,
        check_at=range(every, steps + 1, every),
    )
    assert isinstance(net, CharacterLSTM)
    return net, result


@torch.no_grad()
def _cell_lengths(net: CharacterLSTM, text: CharacterText) -> list[float]:
    """Mean length of the cell state after 100 and after ``FAR`` characters of test text, read in 16 places."""
    ids = text.split("test")[: 16 * FAR].view(16, FAR)
    _, (_, near) = net.lstm(net.embedding(ids[:, :100]))
    _, (_, far) = net.lstm(net.embedding(ids))
    return [float(c[0].norm(dim=-1).mean()) for c in (near, far)]


def _mlps(sizes: dict[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    """Mean test accuracy for each norm at batch 128 and 4, with as many examples seen."""
    task = load("fashion_mnist", limit=sizes["limit"])

    def make(kind: str) -> nn.Module:
        def unit(i: int, o: int) -> list[nn.Module]:
            return [nn.Linear(i, o), Norm(kind, o), nn.ReLU()]

        return init_(nn.Sequential(nn.Flatten(), *unit(784, 256), *unit(256, 256), nn.Linear(256, 10)))

    table: dict[str, Any] = {}
    for batch in (128, 4):
        training = Training(
            optimizer="adam", weight_decay=0, batch_size=batch, schedule="constant", warmup=0, clip=None
        )
        outcomes = compare_arms(
            {kind: Arm(partial(make, kind), training) for kind in ("none", "batch", "layer")},
            task,
            seeds,
            budget=Budget("examples", sizes["examples"]),
            settings=grid(lr=[3e-4, 2e-3]),
        )
        table[f"batch {batch}"] = {kind: outcome.summary() for kind, outcome in outcomes.items()}
        log.info("batch %d: %s", batch, table[f"batch {batch}"])
    return table
