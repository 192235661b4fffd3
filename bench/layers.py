"""What every layer costs beside ``nn.Linear`` or ``nn.Conv2d``: of the same shape, and of as many parameters.

One thread. The layers of a comparison take turns; a time is processor time, the least over the turns, of a forward
pass and of a training step's forward and backward pass. Memory is the peak that such a step allocates. Growth is the
slope of log time over log size.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pomona import catalog, options
from pomona.nets.cost import flops, parameters, training_memory
from pomona.nets.scaling import scaling
from pomona.nn import KANLayer
from pomona.nn.fnet import fourier_mixer
from pomona.nn.gaudi_gblr import GaudiGBLR
from pomona.nn.lambda_layer import LambdaLayer
from pomona.nn.memory_layer import MemoryLayer
from pomona.nn.mixing import AttentionMixer
from pomona.nn.phm import PHMLinear

ROWS, FEATURES, CHANNELS, SIDE = 256, 64, 32, 16
IMAGE = (16, CHANNELS, SIDE, SIDE)
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "linear": ({"in_features": FEATURES, "out_features": FEATURES, "bias": True}, (ROWS, FEATURES)),
    "act": ({"features": FEATURES, "channel_dim": -1}, (ROWS, FEATURES)),
    "norm": ({"features": FEATURES, "dims": 0}, (ROWS, FEATURES)),
    "ffn": ({"dim": FEATURES, "hidden": FEATURES}, (ROWS, FEATURES)),
    "memory": ({"features": FEATURES}, (ROWS, FEATURES)),
    "head": ({"in_features": FEATURES, "out_features": FEATURES}, (ROWS, FEATURES)),
    "mixer": ({"dim": FEATURES, "tokens": 16}, (ROWS // 16, 16, FEATURES)),
    "conv": (
        {
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "kernel_size": 3,
            "stride": 1,
            "padding": 1,
            "bias": True,
        },
        IMAGE,
    ),
    "pool": ({"kernel_size": 2, "stride": 2, "channels": CHANNELS}, IMAGE),
}
"""Sizes and input of the layers of each slot."""
Timed = dict[str, tuple[nn.Module, Tensor]]


def plain(slot: str, out: int) -> nn.Module:
    """The ordinary layer with another number of outputs."""
    return nn.Conv2d(CHANNELS, out, 3, padding=1) if slot in ("conv", "pool") else nn.Linear(FEATURES, out)


def forward(layer: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        layer(x)


def step(layer: nn.Module, x: Tensor) -> None:
    y = layer(x)
    total = (y[0] if isinstance(y, tuple) else y).sum()
    if total.requires_grad:  # mixer=none gives zeros, whatever comes in
        total.backward()


def milliseconds(
    timed: Timed, run: Callable[[nn.Module, Tensor], None], turns: int, least: float = 0.01
) -> list[float]:
    """Of each layer; each turn lasts ``least`` seconds or one call."""
    loops = []
    for layer, x in timed.values():
        run(layer, x)
        start = time.process_time()
        run(layer, x)
        loops.append(max(1, math.ceil(least / max(time.process_time() - start, 1e-6))))
    best = [math.inf] * len(timed)
    for _ in range(turns):
        for i, ((layer, x), count) in enumerate(zip(timed.values(), loops, strict=True)):
            start = time.process_time()
            for _ in range(count):
                run(layer, x)
            best[i] = min(best[i], (time.process_time() - start) / count * 1e3)
    return best


def compare(slot: str, name: str, turns: int) -> dict[str, Any]:
    """One layer beside the ordinary ones."""
    sizes, shape = CASES[slot]
    try:
        layer = options.make(slot, name, **sizes)
    except ValueError as error:  # instance norm needs positions
        return {"slot": slot, "name": name, "left out": str(error)}
    x = torch.randn(shape, requires_grad=True)
    same = plain(slot, CHANNELS if slot in ("conv", "pool") else FEATURES)
    count = parameters(layer)
    of_one = parameters(plain(slot, 1))
    timed = {"layer": (layer, x), "same shape": (same, x)}
    if count >= of_one:
        timed["as many parameters"] = (plain(slot, round(count / of_one)), x)
    times = {"forward": milliseconds(timed, forward, turns), "step": milliseconds(timed, step, turns)}
    return {
        "slot": slot,
        "name": name,
        "parameters": count,
        "flops": flops(layer, x.detach()),
        "flops, same shape": flops(same, x.detach()),
        "memory": training_memory(layer, x.detach()),
        "memory, same shape": training_memory(same, x.detach()),
        **{key: dict(zip(timed, values, strict=True)) for key, values in times.items()},
    }


def kan(turns: int) -> dict[str, Any]:
    """64 -> 64, grid 5, order 3, batch 256, beside pykan's layer."""
    x, ours = torch.randn(256, 64).requires_grad_(), KANLayer(64, 64, grid=5, k=3)
    timed: Timed = {"pomona": (ours, x), "linear": (nn.Linear(64, parameters(ours) // 65), x)}
    if importlib.util.find_spec("kan"):
        from kan import KANLayer as PyKANLayer

        timed["pykan"] = (PyKANLayer(64, 64, num=5, k=3), x)
    return dict(zip(timed, milliseconds(timed, step, turns), strict=True))


def structured(turns: int) -> dict[str, dict[str, float]]:
    """1024 -> 1024, batch 256: FLOPs and time of a step, over those of the dense layer."""
    x = torch.randn(256, 1024, requires_grad=True)
    layers = {
        "PHM n=4": PHMLinear(1024, 1024, 4),
        "PHM n=8": PHMLinear(1024, 1024, 8),
        "GBLR, a quarter of the cost": GaudiGBLR(1024, 1024, cost=0.25, sigma=math.inf, anneal_steps=0).eval(),
    }
    layers["GBLR, made compact"] = layers["GBLR, a quarter of the cost"].compact()
    timed: Timed = {"dense": (nn.Linear(1024, 1024), x), **{name: (layer, x) for name, layer in layers.items()}}
    times = {run.__name__: milliseconds(timed, run, turns) for run in (forward, step)}
    base = flops(timed["dense"][0], x.detach())
    return {
        name: {
            "flops": flops(layer, x.detach()) / base,
            **{run: values[i + 1] / values[0] for run, values in times.items()},
        }
        for i, (name, layer) in enumerate(layers.items())
    }


def growth(turns: int) -> dict[str, Any]:
    """How costs grow with the slots of a memory, and with the tokens of a sequence."""
    slots = (2**12, 2**14, 2**16, 2**18)
    timed = {n: (MemoryLayer(64, math.isqrt(n), heads=1, k_dim=64, topk=8), torch.randn(512, 64)) for n in slots}
    times = milliseconds({str(n): pair for n, pair in timed.items()}, forward, turns)
    found: dict[str, Any] = {
        "memory layer, slots": {
            "sizes": slots, "ms": times, "exponents": {"seconds": float(np.polyfit(np.log(slots), np.log(times), 1)[0])}
        }
    }  # fmt: skip
    mixers: dict[str, Callable[[int], nn.Module]] = {
        "Fourier": lambda n: fourier_mixer(64, n),
        "lambda, a window of 7": lambda n: LambdaLayer(64, n, scope=7, ndim=1),
        "lambda, all": lambda n: LambdaLayer(64, n, ndim=1),
        "attention": lambda n: AttentionMixer(64, heads=4),
    }
    for name, make in mixers.items():
        cost = scaling(make, (256, 512, 1024, 2048), 64, repeats=turns)
        found[f"{name}, tokens"] = {
            "sizes": cost.tokens, "ms": [1e3 * t for t in cost.seconds], "exponents": cost.exponents()
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.add_argument("--slots", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--turns", type=int, default=5)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found: dict[str, Any] = {
        "rows": [compare(slot, name, chosen.turns) for slot in chosen.slots for name in catalog.slots()[slot]],
        "kan": kan(chosen.turns),
        "structured": structured(chosen.turns),
        "growth": growth(chosen.turns),
    }
    if chosen.json:
        print(json.dumps(found))
        return
    for r in (r for r in found["rows"] if "step" in r):
        same, equal = r["step"]["same shape"], r["step"].get("as many parameters", math.nan)
        ratio = f"{r['step']['layer'] / same:7.1f}x same shape {r['step']['layer'] / equal:7.1f}x as many parameters"
        print(f"{r['slot']:7} {r['name']:18} {r['parameters']:8,} parameters {r['step']['layer']:8.3f} ms {ratio}")
    print(json.dumps({key: found[key] for key in ("kan", "structured", "growth")}, indent=2))


if __name__ == "__main__":
    main()
