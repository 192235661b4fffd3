"""Tracing and editing: seconds, memory, and what half the width is worth in FLOPs and in latency.

A ResNet-50 and a 12-layer transformer, both plain modules with random weights. Time is wall time on the threads given;
latency is the median over forward passes of the two networks in turn. A FLOP ratio that is not matched by latency is
what a small layer costs whatever its size. Memory is by how much the peak of a fresh process (Linux) rises above its
start while ``take`` runs, in copies of the weights. Matching is Git Re-Basin's by weights, of two ResNet-20 with random
weights, in processor time as well, which other processes do not lengthen.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pomona.edit.git_rebasin import match
from pomona.edit.operations import duplicate, permute, take
from pomona.trace.axes import axes

TARGETS = {"resnet50": {"trace": 10.0, "edit": 1.0}, "transformer": {"trace": 15.0, "edit": 1.0}}
MATCHING_SECONDS, COPIES = 30.0, 1.0
STATUS = Path("/proc/self/status")


def conv_bn(i: int, o: int, kernel: int = 1, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(o))


class Bottleneck(nn.Module):
    def __init__(self, i: int, width: int, stride: int) -> None:
        super().__init__()
        o = 4 * width
        self.a, self.b, self.c = conv_bn(i, width), conv_bn(width, width, 3, stride), conv_bn(width, o)
        self.short = nn.Identity() if i == o and stride == 1 else conv_bn(i, o, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.short(x) + self.c(F.relu(self.b(F.relu(self.a(x))))))


def resnet50() -> nn.Module:
    layers: list[nn.Module] = [conv_bn(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    i = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            width = 64 * 2**stage
            layers.append(Bottleneck(i, width, 2 if stage and not block else 1))
            i = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(i, 1000))


class Basic(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.a, self.b = conv_bn(i, o, 3, stride), conv_bn(o, o, 3)
        self.short = nn.Identity() if i == o and stride == 1 else conv_bn(i, o, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.short(x) + self.b(F.relu(self.a(x))))


def resnet20(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    blocks = [Basic(i, o, 1 if i == o else 2) for i, o in pairwise(widths)]
    return nn.Sequential(
        conv_bn(3, 16, 3), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    )


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(b, t, self.num_heads * self.head_dim))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def transformer(width: int = 512, heads: int = 8, depth: int = 12) -> nn.Module:
    layers = [Layer(width, heads) for _ in range(depth)]
    return nn.Sequential(nn.Embedding(1000, width), *layers, nn.LayerNorm(width), nn.Linear(width, 1000))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "resnet50": (resnet50, lambda: torch.randn(1, 3, 224, 224)),
    "transformer": (transformer, lambda: torch.randint(1000, (1, 128))),
}


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def flops(net: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    return counter.get_total_flops()


def latencies(nets: list[nn.Module], x: Tensor, repetitions: int) -> list[float]:
    """Median seconds of a forward pass of each, taken in turn."""
    seconds: list[list[float]] = [[] for _ in nets]
    with torch.no_grad():
        for _ in range(repetitions):
            for net, held in zip(nets, seconds, strict=True):
                held.append(timed(lambda net=net: net(x))[1])
    return [statistics.median(held[1:] or held) for held in seconds]


def measure(name: str, repetitions: int) -> dict[str, Any]:
    torch.manual_seed(0)
    make, example = CASES[name]
    net, x = make().eval(), example()
    found, trace = timed(lambda: axes(net, x))
    half, cut = timed(lambda: take(net, found, 0.5))
    generator = torch.Generator().manual_seed(0)
    orders = {axis.name: axis.random_order(generator) for axis in found}
    copies = {a.name: [0] for a in found if a.groups == 1 and not a.coupled and any(p.role == "in" for p in a.places)}
    _, permuting = timed(lambda: permute(net, found, orders))
    _, copying = timed(lambda: duplicate(net, found, copies))
    work = [flops(one, x) for one in (net, half.net)]
    latency = latencies([net, half.net], x, repetitions)
    return {
        "case": name,
        "parameters": [sum(p.numel() for p in one.parameters()) for one in (net, half.net)],
        "axes": len(found),
        "seconds": {
            key: round(value, 3)
            for key, value in {"trace": trace, "take": cut, "permute": permuting, "duplicate": copying}.items()
        },
        "target": TARGETS[name],
        "flops": work,
        "flops_ratio": round(work[0] / work[1], 2),
        "latency_ms": [round(1e3 * one, 2) for one in latency],
        "latency_ratio": round(latency[0] / latency[1], 2),
        "plain": type(half.net) is type(net),
    }


def matching() -> dict[str, Any]:
    """Seconds to match two ResNet-20, the trace included."""
    a, b = (resnet20(seed).eval() for seed in range(2))
    start = time.process_time()
    found, wall = timed(lambda: match(a, b, axes(a, torch.randn(1, 3, 32, 32))))
    seconds = {"processor": round(time.process_time() - start, 2), "wall": round(wall, 2)}
    return {"seconds": seconds, "target": MATCHING_SECONDS, "steps": len(found.history) - 1}


def resident(name: str) -> int:
    """``VmRSS`` or ``VmHWM`` (its peak) of this process, in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())
    return 1024 * int(found.group(1)) if found else 0


def rise(keep: float) -> dict[str, float]:
    """By how much memory rises above its start while ``take`` keeps a share of a ResNet-50, in copies of its weights.

    ``forward`` is the rise of a forward pass alone on the traced example, which ``take`` runs to prove its result.
    """
    net, x = resnet50().eval(), torch.randn(1, 3, 224, 224)
    found = axes(net, x)
    take(resnet20(0), axes(resnet20(0), torch.randn(1, 3, 32, 32)))  # libraries and their buffers are there
    weights = sum(t.numel() * t.element_size() for t in net.state_dict().values())

    def above(call: Callable[[], Any]) -> tuple[float, Any]:
        ctypes.CDLL(None).malloc_trim(0)  # what is free but kept would hide what is taken
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        start = resident("VmRSS")
        result = call()
        return (resident("VmHWM") - start) / weights, result

    with torch.no_grad():
        forward, _ = above(lambda: net(x))
    bare, edit = above(lambda: take(net, found, keep, verify=False))
    del edit
    proved, edit = above(lambda: take(net, found, keep))
    kept = sum(t.numel() * t.element_size() for t in edit.net.state_dict().values()) / weights
    rises = {"take": proved, "without verifying": bare, "forward": forward, "result": kept}
    return {key: round(value, 2) for key, value in rises.items()}


def memory() -> dict[str, Any]:
    """``rise`` at two shares, each in a process of its own."""
    command = [sys.executable, __file__, "--rise"]
    shares = ("0.5", "1.0")
    said = [subprocess.run([*command, keep], check=True, capture_output=True, text=True).stdout for keep in shares]
    return {"copies": dict(zip(shares, map(json.loads, said), strict=True)), "target": COPIES}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rise", type=float, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.rise:
        print(json.dumps(rise(chosen.rise)))
        return
    rows = [measure(name, chosen.repetitions) for name in chosen.cases]
    matched, extra = matching(), memory()
    if chosen.json:
        versions = {"torch": torch.__version__, "threads": chosen.threads}
        print(json.dumps({**versions, "rows": rows, "matching": matched, "memory": extra}, indent=1))
        return
    for row in rows:
        before, after = row["parameters"]
        print(f"{row['case']}: {row['axes']} axes, {before / 1e6:.1f}M parameters, {after / 1e6:.1f}M at half width")
        print("  " + ", ".join(f"{key} {value:.2f} s" for key, value in row["seconds"].items())
              + f" (target: trace {row['target']['trace']:.0f} s, an edit {row['target']['edit']:.0f} s)")  # fmt: skip
        print(f"  {row['flops_ratio']:.1f}x fewer FLOPs, {row['latency_ratio']:.1f}x faster "
              f"({row['latency_ms'][0]:.1f} -> {row['latency_ms'][1]:.1f} ms)")  # fmt: skip
    seconds = matched["seconds"]
    print(f"matching of two ResNet-20: {seconds['processor']:.1f} s of processor, {seconds['wall']:.1f} s in all, "
          f"{matched['steps']} steps (target: {matched['target']:.0f} s)")  # fmt: skip
    for keep, copies in extra["copies"].items():
        print(f"take({keep}) of ResNet-50: " + ", ".join(f"{key} {value:.2f}" for key, value in copies.items())
              + f" copies of the weights (target: {extra['target']:.0f})")  # fmt: skip


if __name__ == "__main__":
    main()
