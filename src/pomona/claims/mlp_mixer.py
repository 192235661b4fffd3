"""Whether MLP-Mixer comes level with convolutions as data grows, and does not mind how the patches are ordered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pomona.claims.lab import Arm, compare_arms, grid, log
from pomona.claims.verdict import Comparison, Scale
from pomona.data import load
from pomona.data.task import Split, Task
from pomona.nn.feedforward import FeedForward
from pomona.nn.mixing import AttentionMixer, MixerNet
from pomona.nn.mlp_mixer import MLPMixer, PatchStem
from pomona.train.budget import Budget
from pomona.train.settings import Training

SIZES: dict[Scale, dict[str, Any]] = {
    "smoke": {"limit": 400, "few": 100, "passes": 1, "rates": [2e-3], "dim": 16, "depth": 1},
    "full": {"limit": 6000, "few": 500, "passes": 3, "rates": [1e-2, 3e-3], "dim": 32, "depth": 2},
    "gpu": {"limit": 20000, "few": 1000, "passes": 6, "rates": [1e-2, 3e-3], "dim": 64, "depth": 4},
}
PATCH, GRID = 4, 7
SHUFFLED_SEEDS = 2
"""Seeds of the runs on shuffled images, which do not decide."""


def mlp_mixer(scale: Scale, seeds: Sequence[int]) -> Comparison:
    """Claimed: with the most images, Mixer's test accuracy is no more than 1.5 points below a conv net's.

    Fashion-MNIST, networks of equal parameters, equal numbers of images seen. In the details: the same for an
    attention network; with few images (claimed: the conv net leads Mixer by 3 points); and with the patches, and
    the pixels within each, in one shuffled order for all images (claimed: Mixer changes by less than half a point,
    the conv net loses 3; learning rates as chosen before).
    """
    sizes = SIZES[scale]
    many = load("fashion_mnist", limit=sizes["limit"])
    dim, depth = sizes["dim"], sizes["depth"]
    makers: dict[str, Callable[[], nn.Module]] = {
        "mixer": partial(_mixer, dim, depth),
        "attention": partial(_attention, dim, depth),
        "conv": _conv(dim, depth),
    }
    arms = {name: Arm(make, Training()) for name, make in makers.items()}
    count = len(many.splits["train"])
    budget, settings = Budget("examples", sizes["passes"] * count), grid(lr=sizes["rates"])
    plain = compare_arms(arms, many, seeds, budget=budget, settings=settings)
    # Few images converge sooner: half of the examples suffice.
    half = Budget("examples", sizes["passes"] * count // 2)
    few = compare_arms(arms, partial(_fewer, many, sizes["few"]), seeds, budget=half, settings=settings)
    details: dict[str, Any] = {
        f"{count} images": {name: outcome.summary() for name, outcome in plain.items()},
        f"{sizes['few']} images": {name: outcome.summary() for name, outcome in few.items()},
    }
    again = {name: Arm(makers[name], Training(), grid=[plain[name].chosen]) for name in ("mixer", "conv")}
    shuffled = compare_arms(again, partial(shuffle, many), seeds[:SHUFFLED_SEEDS], budget=budget)
    details["shuffled"] = {
        name: {
            "accuracy": outcome.values("accuracy"),
            "mean change": float(
                np.subtract(outcome.values("accuracy"), plain[name].values("accuracy")[:SHUFFLED_SEEDS]).mean()
            ),
        }
        for name, outcome in shuffled.items()
    }
    log.info("shuffled: %s", details["shuffled"])
    return Comparison(
        method=plain["mixer"].values("accuracy"),
        baseline=plain["conv"].values("accuracy"),
        metric="accuracy on test",
        method_name="MLP-Mixer",
        baseline_name="convolutional network of equal parameters",
        margin=-0.015,
        paper="about 76 % on ImageNet from scratch against 80 % of a vision transformer, within a point of it after "
        "pre-training on 300 million images",
        note="Fashion-MNIST, a few thousand images, two layers: far from the paper's scale.",
        details=details,
    )


def _mixer(dim: int, depth: int) -> nn.Module:
    return MLPMixer(28, PATCH, 1, classes=10, dim=dim, depth=depth, token_width=dim, channel_width=2 * dim)


class _Positions(nn.Module):
    """Tokens of patches with a learned position added: (B, 1, 28, 28) -> (B, N, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.patches = PatchStem((28, 28), PATCH, 1, dim)
        self.position = nn.Parameter(0.02 * torch.randn(self.patches.tokens, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.patches(x) + self.position


def _attention(dim: int, depth: int) -> nn.Module:
    return MixerNet(
        _Positions(dim),
        dim,
        lambda: AttentionMixer(dim),
        lambda: FeedForward(dim, 2 * dim),
        depth=depth,
        head=nn.Linear(dim, 10),
    )


def _conv(dim: int, depth: int) -> Callable[[], nn.Module]:
    """Two 3 x 3 convolutions with max pooling, the width chosen to have the mixer's number of parameters."""

    def make(width: int) -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(2 * width * 49, 10)),
        )

    def count(net: nn.Module) -> int:
        return sum(p.numel() for p in net.parameters())

    with torch.random.fork_rng():
        target = count(_mixer(dim, depth))
        width = min(range(1, 65), key=lambda n: abs(count(make(n)) - target))
    return lambda: make(width)


def _fewer(task: Task, count: int, seed: int) -> Task:
    """The task with ``count`` random training images, other ones for each seed."""
    x, y = task.splits["train"]
    chosen = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[:count]
    return replace(task, splits=task.splits | {"train": Split(x[chosen], y[chosen])})


def shuffle(task: Task, seed: int) -> Task:
    """The task with the patches, and the pixels within each, of all images in one random order."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randperm(GRID**2, generator=generator)
    pixels = torch.randperm(PATCH**2, generator=generator)

    def move(x: Tensor) -> Tensor:
        cut = x.view(-1, GRID, PATCH, GRID, PATCH).permute(0, 1, 3, 2, 4).reshape(-1, GRID**2, PATCH**2)
        back = cut[:, patches][:, :, pixels].view(-1, GRID, GRID, PATCH, PATCH)
        return back.permute(0, 1, 3, 2, 4).reshape(x.shape)

    return replace(task, splits={name: Split(move(split.x), split.y) for name, split in task.splits.items()})
