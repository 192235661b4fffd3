"""Latency of int8 networks beside their float32 originals, on one thread.

Each network is quantised (8-bit weights by channel, 8-bit inputs), made integer, and takes turns with the original
within one run; the ratio is the median over turns, whose two halves ran side by side. PyTorch's dynamically quantised
linear layers stand beside where the network has only those. Signal to quantisation noise says that both compute the
same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pomona.edit.quantize import quantize, sqnr, stored_bytes, to_integer

BATCHES = (1, 64)


def wide_linear() -> tuple[nn.Module, tuple[int, ...]]:
    sizes = (1024, 2048, 2048, 2048)
    hidden = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], 10)), (sizes[0],)


def conv_net() -> tuple[nn.Module, tuple[int, ...]]:
    widths = (3, 64, 128, 128)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * 16, 10)), (3, 32, 32)


class Residual(nn.Module):
    """A block whose sum is in floats: codes stop at it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.second(self.first(x))).relu()


def residual_net() -> tuple[nn.Module, tuple[int, ...]]:
    stem = [nn.Conv2d(3, 64, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*stem, *(Residual(64) for _ in range(4)), nn.AdaptiveAvgPool2d(1), nn.Flatten()), (3, 32, 32)


NETS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "linear 1024-2048x3-10": wide_linear,
    "conv 64-128-128": conv_net,
    "residual 64x4": residual_net,
}


def milliseconds(call: Callable[[], Any], least: float = 0.02) -> float:
    count, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < least or not count:
        call()
        count += 1
    return 1000 * spent / count


@torch.inference_mode()
def compare(nets: dict[str, nn.Module], x: Tensor, turns: int) -> dict[str, Any]:
    """Milliseconds a call, and how many times faster than ``float32``."""
    times: dict[str, list[float]] = {name: [] for name in nets}
    for turn in range(turns + 1):
        for name, net in nets.items():
            value = milliseconds(lambda net=net: net(x))  # type: ignore[misc]
            if turn:  # the first packs weights
                times[name].append(value)
    ratios = {name: [a / b for a, b in zip(times["float32"], own, strict=True)] for name, own in times.items()}
    return {
        "milliseconds": {name: round(statistics.median(own), 4) for name, own in times.items()},
        "speedup": {name: round(statistics.median(own), 2) for name, own in ratios.items() if name != "float32"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--turns", type=int, default=15)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = []
    for name, make in NETS.items():
        torch.manual_seed(0)
        net, shape = make()
        net(torch.randn(64, *shape))  # statistics of the norms
        net.eval()
        calibration = torch.randn(128, *shape)
        integer = to_integer(quantize(net, calibration))
        dynamic = to_integer(quantize(net, calibration, mode="dynamic"))
        nets = {"float32": net, "int8": integer, "int8 dynamic": dynamic}
        if name.startswith("linear"):
            nets["torch dynamic"] = torch.ao.quantization.quantize_dynamic(net, {nn.Linear})
        for batch in BATCHES:
            x = torch.randn(batch, *shape)
            with torch.inference_mode():
                signal = round(sqnr(net(x), integer(x)), 1)
            row = {"net": name, "batch": batch, **compare(nets, x, given.turns), "sqnr_db": signal}
            row["size_ratio"] = round(stored_bytes(net) / stored_bytes(integer), 2)
            rows.append(row)
            if not given.json:
                print(f"{name}, batch {batch}: {row['milliseconds']} ms; faster {row['speedup']}; {signal} dB")
    if given.json:
        print(json.dumps({"capability": torch.backends.cpu.get_cpu_capability(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
