"""Does the training protocol move accuracy more than the choice of architecture?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from pomona.claims.lab import log
from pomona.claims.verdict import Comparison, Scale
from pomona.search.minibench import Images, MiniBench, Protocol, train_arch
from pomona.search.nas_eval import (
    Bench,
    Trial,
    ablate_space,
    benchmark,
    kendall_tau,
    relative_improvement,
    seed_sensitivity,
    variance_components,
)
from pomona.search.proxies import grad_sign, num_params
from pomona.search.strategies import Arch, RandomSearch, Ranked, RegularizedEvolution

SIZES: dict[Scale, dict[str, Any]] = {
    "smoke": {"space": "mini-cell-digits", "train": 100, "archs": 2, "depth_archs": 3, "samples": 4, "every": 25},
    "full": {"space": "mini-cell", "train": 1500, "archs": 6, "depth_archs": 10, "samples": 32, "every": 1},
    "gpu": {"space": "mini-cell", "train": 4000, "archs": 20, "depth_archs": 60, "samples": 64, "every": 1},
}
TRICKS: dict[str, dict[str, Any]] = {
    "base": {},
    "+ auxiliary head": {"auxiliary": 0.4},
    "+ DropPath": {"drop_path": 0.1},
    "+ cutout": {"cutout": 4},
    "+ shift and mirror": {"shift": 1},
    "+ epochs": {"epochs": 2.0},
    "+ channels": {"channels": 12},
}
"""Cumulative; epochs are multiples of the base."""


def nas_eval(scale: Scale, seeds: Sequence[int]) -> Comparison:
    """Claimed: tricks of training raise mean accuracy by more than the interquartile range over architectures.

    Random mini-cell architectures are trained by the table's protocol and then with an auxiliary head, DropPath,
    cutout, shifts and mirroring, more epochs and more channels added one after another.  Against the gain of the
    last step over the first stands the interquartile range of test accuracy over all cells of the table.  In the
    details: gain and variance of each step; relative improvement of search methods over the mean random
    architecture on two data sets; Kendall's tau between seeds and between one and two cells a stage.
    """
    size = SIZES[scale]
    bench = MiniBench(size["space"])
    images = _first(bench.images(), size["train"])
    uniform = RandomSearch(bench.variables, seed=seeds[0])
    archs = [uniform.ask() for _ in range(size["archs"])]
    steps: list[np.ndarray] = []  # (architectures, seeds) each
    settings: dict[str, Any] = {}
    for name, change in TRICKS.items():
        settings = {**settings, **change}
        train = partial(_train, bench, images, settings, seeds)
        steps.append(np.array([train(arch) for arch in archs]))
        log.info("nas_eval %s: mean %.2f", name, steps[-1].mean())
    scores = bench.scores().numpy()
    quartiles = np.quantile(scores, [0.25, 0.75], axis=0)
    spread = (quartiles[1] - quartiles[0]).tolist()
    gains = (steps[-1] - steps[0]).mean(0).tolist()
    ladder = np.stack(steps)
    details: dict[str, Any] = {
        "mean accuracy": dict(zip(TRICKS, ladder.mean((1, 2)).tolist(), strict=True)),
        "variance components": variance_components(ladder, ["protocol", "architecture", "seed"]),
        "search": _searches(size, seeds),
        "seed sensitivity": seed_sensitivity(scores)._asdict(),
        "depth tau": _depth(size["depth_archs"], size["train"], seeds),
        "mean of ablated spaces": _ablated(bench),
    }
    return Comparison(
        method=gains,
        baseline=[spread[seed % len(spread)] for seed in seeds],
        metric="points of test accuracy",
        method_name="mean gain from the training protocol",
        baseline_name="interquartile range over all architectures of the space",
        paper="Protocol adds about 3 points to random cells, which span about 1; many searches gain under 1 %.",
        note="125 small cells on part of Fashion-MNIST, a far more varied space than the paper's; no supernet methods.",
        details=details,
    )


def _first(images: Images, n: int) -> Images:
    """``n`` training images, few for validation (not read here), half of the test images of Fashion-MNIST."""
    small = {"x_train": n, "y_train": n, "x_valid": 50, "y_valid": 50, "x_test": 2000, "y_test": 2000}
    return images._replace(**{name: getattr(images, name)[:size] for name, size in small.items()})


def _train(
    bench: MiniBench, images: Images, settings: Mapping[str, Any], seeds: Sequence[int], arch: Arch
) -> list[float]:
    """Test accuracy of each seed under the table's protocol with these changes."""
    base = bench.protocol
    build = {name: settings[name] for name in ("channels", "cells") if name in settings}
    tricks = {name: settings[name] for name in ("auxiliary", "drop_path", "cutout", "shift") if name in settings}
    epochs = round(base.epochs * settings.get("epochs", 1.0))
    protocol = Protocol(epochs, base.batch_size, base.lr, base.weight_decay, {**base.build, **build}, **tricks)
    return train_arch(bench.name, arch, images, protocol, seeds=seeds)["test"]


def _searches(size: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    """Relative improvement in percent of each method on each table, with the exact mean of the space as a check."""
    benches = {name: MiniBench(name) for name in ("mini-cell", "mini-cell-digits")[-1 if size["every"] > 1 else 0 :]}
    images = {name: bench.images() for name, bench in benches.items()}

    def by_proxy(proxy: Any, bench: Bench, seed: int) -> Ranked:
        assert isinstance(bench, MiniBench)
        source = images[bench.name]
        rows = torch.randperm(len(source.x_train), generator=torch.Generator().manual_seed(seed))[: size["samples"]]
        x, y = source.x_train[rows], source.y_train[rows]
        return Ranked(bench.archs[:: size["every"]], lambda arch: proxy(bench.build(arch, seed=seed), x, y))

    methods = {
        "random search": Trial(lambda bench, seed: RandomSearch(bench.variables, seed=seed)),
        "evolution": Trial(lambda bench, seed: RegularizedEvolution(bench.variables, seed=seed)),
        "grad_sign top-1": Trial(partial(by_proxy, grad_sign), 1),
        "parameters top-1": Trial(partial(by_proxy, num_params), 1),
    }
    out: dict[str, Any] = {}
    for result in benchmark(methods, benches, seeds=seeds, protocol="the table's"):
        exact = benches[result.dataset].scores().mean(1).tolist()
        row = {key: round(value, 3) for key, value in result.improvement._asdict().items()}
        row["over the exact mean"] = round(relative_improvement(result.accuracies, exact).value, 3)
        out[f"{result.method}, {result.dataset}"] = row
    values = [row["value"] for row in out.values()]
    return {**out, "median": float(np.median(values)), "at or below 0": sum(value <= 0 for value in values)}


def _depth(count: int, n_train: int, seeds: Sequence[int]) -> float:
    """Kendall's tau between mean accuracies with one and with two cells a stage, on digits, where it is cheap."""
    digits = MiniBench("mini-cell-digits")
    images = _first(digits.images(), n_train)
    order = np.random.default_rng(seeds[0]).permutation(len(digits))[:count]
    shallow, deep = (
        [float(np.mean(_train(digits, images, {"cells": cells}, seeds, digits.archs[i]))) for i in order]
        for cells in (1, 2)
    )
    return kendall_tau(shallow, deep)


def _ablated(bench: MiniBench) -> dict[str, float]:
    """Mean test accuracy over each smaller space."""
    out = {}
    for name, variables in ablate_space(bench.variables).items():
        inside = [arch for arch in bench.archs if all(arch[key] in variables[key] for key in variables)]
        out[name] = float(np.mean([bench.score(arch) for arch in inside]))
    return out
