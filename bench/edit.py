"""Tracing and editing: seconds, and what half the width is worth in FLOPs and in latency.

A ResNet-50 and a 12-layer transformer, both plain modules with random weights. Time is wall time on the threads given;
latency is the median over forward passes of the two networks in turn. A FLOP ratio that is not matched by latency is
what a small layer costs whatever its size.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pomona.edit.operations import duplicate, permute, take
from pomona.trace.axes import axes

TARGETS = {"resnet50": {"trace": 10.0, "edit": 1.0}, "transformer": {"trace": 15.0, "edit": 1.0}}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    rows = [measure(name, chosen.repetitions) for name in chosen.cases]
    if chosen.json:
        print(json.dumps({"torch": torch.__version__, "threads": chosen.threads, "rows": rows}, indent=1))
        return
    for row in rows:
        before, after = row["parameters"]
        print(f"{row['case']}: {row['axes']} axes, {before / 1e6:.1f}M parameters, {after / 1e6:.1f}M at half width")
        print("  " + ", ".join(f"{key} {value:.2f} s" for key, value in row["seconds"].items())
              + f" (target: trace {row['target']['trace']:.0f} s, an edit {row['target']['edit']:.0f} s)")  # fmt: skip
        print(f"  {row['flops_ratio']:.1f}x fewer FLOPs, {row['latency_ratio']:.1f}x faster "
              f"({row['latency_ms'][0]:.1f} -> {row['latency_ms'][1]:.1f} ms)")  # fmt: skip


if __name__ == "__main__":
    main()
