"""Microseconds per network and training step: one at a time, against populations.

The same networks are trained by turns within one run: by the library's own loop, by the shortest PyTorch loop with
fused Adam, as a population, and by JAX's ``jit(vmap(scan))`` where JAX is installed. All do the same work: no
clipping, no validation but the population's and the library's one at the end. A row tells besides what a population
costs as a study runs it, clipping and validating. Set-up and tracing count, JAX's compilation does not. Times are
wall-clock, each of PyTorch's with one thread and with two, of which the better one counts.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pomona.data import Task, load
from pomona.nets.build import build
from pomona.train import Budget, Training, batches, fit
from pomona.train.population import Member, fit_population

SETTINGS = Training(device="cpu", precision="float32", optimizer="adam", weight_decay=0.0, patience=None, clip=None)
THREADS = (1, 2)
CASES = {
    "W=32 K=32": ("mlp", 32, 32),
    "W=128 K=32": ("mlp", 128, 32),
    "convnet K=16": ("convnet width=8", 0, 16),
}
TARGETS = {"W=32 K=32": 8.0, "W=128 K=32": 3.0, "convnet K=16": 3.0}


def network(kind: str, width: int, task: Task, seed: int) -> nn.Module:
    if kind != "mlp":
        return build(kind, task, seed=seed)
    torch.manual_seed(seed)
    sizes = [64, width, width]
    hidden = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))


def plain(net: nn.Module, task: Task, steps: int, seed: int) -> nn.Module:
    """The shortest loop in PyTorch."""
    net = copy.deepcopy(net).train()
    x, y = task.splits["train"]
    optimizer = torch.optim.Adam(net.parameters(), lr=SETTINGS.lr, fused=True)
    for _, index in zip(range(steps), batches(len(x), SETTINGS.batch_size, seed), strict=False):
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(net(x[index]), y[index]).backward()
        optimizer.step()
    return net


def jax_steps(task: Task, width: int, count: int) -> Callable[[int], None]:
    """jit(vmap(scan)) over the same MLP, with Adam written out."""
    import jax
    import jax.numpy as jnp

    x, y = (jnp.asarray(t.flatten(1).numpy() if t.ndim > 1 else t.numpy()) for t in task.splits["train"])
    sizes = [64, width, width, 10]

    def init(key: Any) -> Any:
        keys = jax.random.split(key, 3)
        pairs = zip(keys, sizes[:-1], sizes[1:], strict=True)
        return [(jax.random.normal(k, (a, b)) / a**0.5, jnp.zeros(b)) for k, a, b in pairs]

    def loss(params: Any, xb: Any, yb: Any) -> Any:
        for w, b in params[:-1]:
            xb = jax.nn.relu(xb @ w + b)
        logits = xb @ params[-1][0] + params[-1][1]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), yb[:, None], 1).mean()

    def train(key: Any, steps: int) -> Any:
        params = init(key)
        zeros = jax.tree.map(jnp.zeros_like, params)

        def step(carry: Any, t: Any) -> Any:
            p, m, v, k = carry
            k, sub = jax.random.split(k)
            index = jax.random.randint(sub, (SETTINGS.batch_size,), 0, len(x))
            g = jax.grad(loss)(p, x[index], y[index])
            m = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, m, g)
            v = jax.tree.map(lambda a, b: 0.999 * a + 0.001 * b * b, v, g)
            c1, c2 = 1 - 0.9 ** (t + 1), 1 - 0.999 ** (t + 1)
            p = jax.tree.map(lambda a, b, c: a - SETTINGS.lr * (b / c1) / (jnp.sqrt(c / c2) + 1e-8), p, m, v)
            return (p, m, v, k), None

        return jax.lax.scan(step, (params, zeros, zeros, key), jnp.arange(steps))[0][0]

    run = jax.jit(jax.vmap(train, in_axes=(0, None)), static_argnums=1)
    keys = jax.random.split(jax.random.PRNGKey(0), count)
    return lambda steps: jax.block_until_ready(run(keys, steps)) and None


def measure(name: str, task: Task, steps: int, repetitions: int) -> dict[str, Any]:
    kind, width, count = CASES[name]
    nets = [network(kind, width, task, seed) for seed in range(count)]
    budget = Budget("examples", steps * SETTINGS.batch_size)
    few = 2  # networks that the loops train: each costs the same

    def population(seeds: list[int], settings: Training, validations: int) -> Callable[[], object]:
        members = [Member(net, settings, seed) for net, seed in zip(nets, seeds, strict=True)]
        return lambda: fit_population(members, task, budget=budget, validations=validations)

    each = list(range(count))
    ways: dict[str, tuple[Callable[[], object], int]] = {
        "pomona loop": (
            lambda: [fit(nets[i], task, SETTINGS, budget=budget, seed=i, validations=1) for i in range(few)], few
        ),
        "plain loop": (lambda: [plain(nets[i], task, steps, i) for i in range(few)], few),
        "population": (population(each, SETTINGS, 1), count),
        "population, shared batches": (population([0] * count, SETTINGS, 1), count),
        "population, as in a study": (population(each, SETTINGS.model_copy(update={"clip": 1.0}), 0), count),
    }  # fmt: skip
    timed = {f"{label}, {n} thread{'s' * (n > 1)}": (*way, n) for label, way in ways.items() for n in THREADS}
    if kind == "mlp" and importlib.util.find_spec("jax"):
        jitted = jax_steps(task, width, count)
        timed["jax"] = (lambda: jitted(steps), count, THREADS[-1])
    seconds: dict[str, list[float]] = {label: [] for label in timed}
    for turn in range(repetitions + 1):  # the first does not count
        for label, (way, trained, threads) in timed.items():
            torch.set_num_threads(threads)
            start = time.perf_counter()
            way()
            if turn:
                seconds[label].append((time.perf_counter() - start) / trained / steps * 1e6)
    medians = {label: round(statistics.median(values), 1) for label, values in seconds.items()}
    best = {label: min(medians[key] for key in timed if timed[key][0] is way) for label, (way, _) in ways.items()}
    if "jax" in medians:
        best["jax"] = medians["jax"]
    return {
        "case": name,
        "steps": steps,
        "microseconds": medians,
        "best": best,
        "speedup": round(best["plain loop"] / best["population"], 2),
        "target": TARGETS[name],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    chosen = parser.parse_args()
    task = load("digits")
    rows = [measure(name, task, chosen.steps, chosen.repetitions) for name in chosen.cases]
    if chosen.json:
        print(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))
        return
    for row in rows:
        print(f"{row['case']}, {row['steps']} steps, microseconds per network and step")
        for label, value in row["microseconds"].items():
            print(f"  {label:<38} {value:>8.1f}")
        print(f"  plain loop / population {row['speedup']:.1f}x, target {row['target']:.0f}x")
    if not importlib.util.find_spec("jax"):
        print("JAX is not installed, so it was not compared")


if __name__ == "__main__":
    main()
