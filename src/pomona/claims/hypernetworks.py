"""Does rescaling a recurrent network's weights at every step help, and can a small network make kernels?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from pomona.claims.characters import train_characters
from pomona.claims.lab import TUNING_SEED, Arm, compare_arms, grid, log, seeded
from pomona.claims.verdict import Comparison, Scale
from pomona.data import kjv_characters, load
from pomona.seq.norm_rnn import LayerNormLSTM
from pomona.train import Budget, Training
from pomona.weights.hyper_rnn import HyperLSTM
from pomona.weights.hypernetworks import hyperize

# the layer-norm arms are secondary and trained where time allows
SIZES: dict[str, dict[str, Any]] = {
    "smoke": {"hidden": 16, "steps": 4, "batch": 4, "length": 8, "layer_norm": True, "epochs": 0.2, "width": 16},
    "full": {"hidden": 64, "steps": 750, "batch": 32, "length": 32, "layer_norm": False, "epochs": 8, "width": 32},
    "gpu": {"hidden": 128, "steps": 3000, "batch": 32, "length": 64, "layer_norm": True, "epochs": 30, "width": 64},
}
RATES = (5e-3, 1e-2)
EMBEDDING = 32


def hypernetworks(scale: Scale, seeds: Sequence[int]) -> Comparison:
    """A HyperLSTM predicts characters better than an LSTM of as many parameters after equally many steps.

    The King James Bible, both without layer norm, each at the better of two learning rates (chosen on
    validation with a seed of its own). Seconds of training stand in the details, since a HyperLSTM's step
    costs more; so does the static form: a residual network of six convolutions on digits against the same
    with all but its first kernel generated.
    """
    size = SIZES[scale]
    text = kjv_characters()
    makers = _makers(len(text.vocabulary), size["hidden"], size["layer_norm"])
    run = partial(train_characters, text=text, steps=size["steps"], batch=size["batch"], length=size["length"])
    bits: dict[str, list[float]] = {}
    details: dict[str, Any] = {}
    for name, make in makers.items():
        tuning = {
            lr: run(seeded(make, seeds[0] + TUNING_SEED), lr=lr, seed=seeds[0] + TUNING_SEED)["valid"] for lr in RATES
        }
        lr = min(tuning, key=lambda rate: tuning[rate])
        results = []
        for seed in seeds:
            results.append(run(seeded(make, seed), lr=lr, seed=seed))
            log.info("hypernetworks %s seed %d: %.4f bits", name, seed, results[-1]["test"])
        bits[name] = [result["test"] for result in results]
        details[name] = {
            "bits_per_character": sum(bits[name]) / len(seeds),
            "seconds": sum(result["seconds"] for result in results) / len(seeds),
            "lr": lr,
            "parameters": _count(make()),
        }
    details["static, on digits"] = _static(size["width"], size["epochs"], seeds)
    return Comparison(
        method=bits["HyperLSTM"],
        baseline=bits["LSTM"],
        metric="test bits per character",
        method_name="HyperLSTM",
        baseline_name="LSTM of as many parameters",
        paper="Characters of Penn Treebank: 1.265 bits for the HyperLSTM, 1.31 for the LSTM, at equal width 1000.",
        better="lower",
        note="A thousandth of the paper's training, and equal parameters instead of equal width.",
        details=details,
    )


class CharacterNet(nn.Module):
    """Embedding, a recurrent network and a linear head: ids (batch, time) to logits (batch, time, vocabulary)."""

    def __init__(self, vocabulary: int, cell: nn.Module, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, EMBEDDING)
        self.cell = cell
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the next character."""
        return self.head(self.cell(self.embed(ids))[0])


def _makers(vocabulary: int, hidden: int, layer_norm: bool) -> dict[str, Callable[[], nn.Module]]:
    """The arms; the plain ones have the width that comes nearest to the parameters of the HyperLSTM."""

    def hyper(norm: bool) -> nn.Module:
        cell = HyperLSTM(EMBEDDING, hidden, layer_norm=norm, recurrent_dropout=0.0, batch_first=True)
        return CharacterNet(vocabulary, cell, hidden)

    def plain(cell: type[nn.Module], width: int) -> nn.Module:
        return CharacterNet(vocabulary, cell(EMBEDDING, width, batch_first=True), width)

    def matched(cell: type[nn.Module], norm: bool) -> Callable[[], nn.Module]:
        goal = _count(hyper(norm))
        width = min(range(hidden // 2, 2 * hidden), key=lambda w: abs(_count(plain(cell, w)) - goal))
        return partial(plain, cell, width)

    arms: dict[str, Callable[[], nn.Module]] = {"LSTM": matched(nn.LSTM, False), "HyperLSTM": partial(hyper, False)}
    if layer_norm:
        arms |= {"layer-norm LSTM": matched(LayerNormLSTM, True), "layer-norm HyperLSTM": partial(hyper, True)}
    return arms


class ResidualConvNet(nn.Module):
    """Six convolutions, the last four in two residual blocks, and a linear head on the mean over space."""

    def __init__(self, width: int, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(1, width), nn.ReLU(), _conv(width, width), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(_conv(width, width), nn.ReLU(), _conv(width, width)) for _ in range(2)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images (batch, 1, height, width)."""
        x = self.stem(x)
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.head(x.mean((-2, -1)))


def _conv(in_channels: int, out_channels: int) -> nn.Module:
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


def _static(width: int, epochs: float, seeds: Sequence[int]) -> dict[str, Any]:
    arms = {
        "ordinary": Arm(partial(ResidualConvNet, width), Training()),
        "hyper": Arm(lambda: hyperize(ResidualConvNet(width), z_dim=16, base=16), Training()),
    }
    settings = grid(lr=[2e-3, 5e-3])
    outcomes = compare_arms(arms, load("digits"), seeds, budget=Budget("epochs", epochs), settings=settings)
    return {name: outcome.summary() for name, outcome in outcomes.items()}


def _count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())
