"""Do magnitude invariant parametrisations make hypernetworks converge faster?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pomona.claims.lab import log, seeded
from pomona.claims.verdict import Comparison, Scale
from pomona.data import Task, load
from pomona.weights.mip import mip_convert
from pomona.weights.reparametrized import Reparametrized

SIZES: dict[str, dict[str, Any]] = {
    "smoke": {"steps": 60, "every": 20, "rates": {"adam": (1e-3,), "sgd": (1e-1,)}},
    "full": {"steps": 800, "every": 10, "rates": {"adam": (1e-4, 3e-4, 1e-3), "sgd": (1e-3, 1e-2, 1e-1)}},
    "gpu": {"steps": 1500, "every": 5, "rates": {"adam": (1e-4, 3e-4, 1e-3), "sgd": (1e-3, 1e-2, 1e-1)}},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"encode": None, "residual": False},
    "encoding only": {"encode": "cos_sin", "residual": False},
    "residual only": {"encode": None, "residual": True},
    "mip": {"encode": "cos_sin", "residual": True},
}
TARGET = 0.9
PROBES = (0.1, 0.3, 0.5, 0.7, 0.9)


def mip(scale: Scale, seeds: Sequence[int]) -> Comparison:
    """MIP reaches 90 % validation accuracy in fewer steps than the ordinary parametrisation.

    A hypernetwork makes the weights of a 64-64-10 network that reads digits blurred to a degree ``g``,
    uniform on [0, 1] and drawn anew for each batch. Each parametrisation is trained at every rate of the
    same grid, with Adam and with momentum SGD; what decides is the mean of ln(steps) over the whole grid, so
    that no rate is chosen for anybody. A run that does not arrive counts as arriving at its last step, which
    can only favour the slower side.
    """
    size = SIZES[scale]
    task = load("digits")
    results: dict[str, list[float]] = {name: [] for name in VARIANTS}
    steps: dict[str, dict[str, list[int]]] = {name: {} for name in VARIANTS}
    spread: dict[str, dict[str, list[float]]] = {name: {} for name in VARIANTS}
    censored = False
    for seed in seeds:
        for name, options in VARIANTS.items():
            logs = []
            for optimizer, rates in size["rates"].items():
                last = []
                for lr in rates:
                    net = seeded(partial(_hypernetwork, options), seed)
                    reached, final = _train(net, task, optimizer, lr, seed, size["steps"], size["every"])
                    censored |= reached is None
                    logs.append(math.log(reached or size["steps"]))
                    steps[name].setdefault(f"{optimizer} {lr:g}", []).append(reached or size["steps"])
                    last.append(final)
                spread[name].setdefault(optimizer, []).append(max(last) - min(last))
            results[name].append(sum(logs) / len(logs))
            log.info("mip %s seed %d: mean ln(steps) %.3f", name, seed, results[name][-1])
    return Comparison(
        method=results["mip"],
        baseline=results["default"],
        metric=f"mean over learning rates of ln(steps to {TARGET:.0%} validation accuracy)",
        method_name="MIP: cosine-sine encoding and residual weights",
        baseline_name="default parametrisation of the same hypernetwork",
        paper="Faster and stabler convergence with Adam and with SGD, on every task and in every ablation.",
        better="lower",
        note="Digits and a small network; the paper has Bayesian, registration and scale-space networks.",
        censored=censored,
        details={
            "mean_steps": {
                name: {setting: _mean(values) for setting, values in by.items()} for name, by in steps.items()
            },
            "mean_log_steps": {name: _mean(values) for name, values in results.items()},
            "final_accuracy_range_over_rates": {
                name: {optimizer: _mean(values) for optimizer, values in by.items()} for name, by in spread.items()
            },
            "weight_std_at_g": {
                name: _weight_std(seeded(partial(_hypernetwork, options), seeds[0]))
                for name, options in VARIANTS.items()
            },
        },
    )


def _hypernetwork(options: dict[str, Any]) -> Reparametrized:
    layers = nn.Linear(64, 64), nn.Linear(64, 10)
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    target = nn.Sequential(nn.Flatten(), layers[0], nn.ReLU(), layers[1])
    return mip_convert(target, {"g": (1,)}, **options)


def _blurred(x: Tensor) -> Tensor:
    """Images (batch, 1, 8, 8) through a binomial filter, twice."""
    line = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = torch.outer(line, line)[None, None]
    for _ in range(2):
        x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel)
    return x


def _train(
    net: nn.Module, task: Task, optimizer: str, lr: float, seed: int, steps: int, every: int
) -> tuple[int | None, float]:
    """Steps to the target (None if it was not reached) and the final validation accuracy."""
    (x, y), (xv, yv) = ((task.splits[s].x, task.splits[s].y) for s in ("train", "valid"))
    soft, soft_v = _blurred(x), _blurred(xv)
    if optimizer == "adam":
        step_rule: torch.optim.Optimizer = torch.optim.Adam(net.parameters(), lr=lr, fused=True)
    else:
        step_rule = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, fused=True)
    generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def accuracy() -> float:
        hits = [(net(torch.lerp(xv, soft_v, g), torch.tensor([g])).argmax(-1) == yv).double().mean() for g in PROBES]
        return float(torch.stack(hits).mean())

    reached, final = None, 0.0
    for step in range(1, steps + 1):
        index = torch.randint(len(x), (64,), generator=generator)
        g = torch.rand(1, generator=generator)
        step_rule.zero_grad(set_to_none=True)
        F.cross_entropy(net(torch.lerp(x[index], soft[index], g), g), y[index]).backward()
        step_rule.step()
        if step == steps or (reached is None and step % every == 0):
            final = accuracy()
            if reached is None and final >= TARGET:
                reached = step
    return reached, final


@torch.no_grad()
def _weight_std(net: nn.Module) -> dict[str, float]:
    """Standard deviation of the generated weights at the start, at small and large inputs."""
    grid = torch.tensor([[0.01], [0.1], [1.0]])
    std = net.get_submodule("generator")(grid).std(-1)
    return {f"{g:g}": value for g, value in zip((0.01, 0.1, 1.0), std.tolist(), strict=True)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
