"""What the training loop costs beside a loop written by hand that takes the same steps.

Both train the same network on the same batches with fused AdamW, warm-up and cosine, clipping, a validation an epoch
with loss and accuracy, and the best weights kept. They must end in the same weights, bit for bit, or the comparison is
refused. They take turns within one run, on one thread. Processor time is measured, which other processes disturb
least; the ratio is the median over turns, whose two halves ran side by side.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pomona.data import Task, load
from pomona.nets.build import build
from pomona.train import Budget, Training, fit

TARGET = 1.05
SETTINGS = Training(device="cpu", precision="float32", patience=None)


def by_hand(net: nn.Module, task: Task, epochs: int, seed: int) -> nn.Module:
    """The loop as one would write it for this one case."""
    net = copy.deepcopy(net)
    x, y = task.splits["train"]
    valid_x, valid_y = task.splits["valid"]
    matrices = [p for p in net.parameters() if p.ndim > 1]
    vectors = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": SETTINGS.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=SETTINGS.lr, fused=True)
    generator = torch.Generator().manual_seed(seed)
    size = SETTINGS.batch_size
    per_epoch = len(x) // size
    total, step = epochs * per_epoch, 0
    best, best_state = math.inf, copy.deepcopy(net.state_dict())
    curve = []
    net.train()
    for _ in range(epochs):
        running = torch.zeros(())
        for index in torch.randperm(len(x), generator=generator)[: per_epoch * size].split(size):
            progress = step / total
            rate = (1 + math.cos(math.pi * progress)) / 2
            if progress < SETTINGS.warmup:
                rate *= max(progress / SETTINGS.warmup, 0.02)
            for group in optimizer.param_groups:
                group["lr"] = SETTINGS.lr * rate
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(net(x[index]), y[index])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), SETTINGS.clip or 0.0)
            optimizer.step()
            running += loss.detach()
            step += 1
        net.eval()
        with torch.no_grad():
            output = net(valid_x)
            valid_loss = float(F.cross_entropy(output, valid_y))
            accuracy = float((output.argmax(-1) == valid_y).float().mean())
        net.train()
        curve.append((step, float(running) / per_epoch, valid_loss, accuracy))
        if -accuracy + 1e-6 * valid_loss < best:
            best, best_state = -accuracy + 1e-6 * valid_loss, copy.deepcopy(net.state_dict())
    net.load_state_dict(best_state)
    return net.eval()


def by_pomona(net: nn.Module, task: Task, epochs: int, seed: int) -> nn.Module:
    return fit(net, task, SETTINGS, budget=Budget("epochs", epochs), seed=seed).net


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(s, t) for s, t in pairs)


def measure(candidate: str, task: Task, epochs: int, repetitions: int) -> dict[str, Any]:
    """Median processor seconds of both loops, taking turns, after one unmeasured round."""
    net = build(candidate, task)
    loops = {"by hand": by_hand, "pomona": by_pomona}
    ends = {name: loop(net, task, epochs, 0) for name, loop in loops.items()}
    if not same(*ends.values()):
        raise SystemExit(f"{candidate}: the two loops end in different weights, so their times cannot be compared")
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(repetitions):
        for name in loops if turn % 2 else reversed(loops):
            start = time.process_time()
            loops[name](net, task, epochs, 0)
            seconds[name].append(time.process_time() - start)
    hand, own = (statistics.median(seconds[name]) for name in ("by hand", "pomona"))
    steps = epochs * (len(task.splits["train"]) // SETTINGS.batch_size)
    return {
        "candidate": candidate,
        "steps": steps,
        "by_hand_us_per_step": round(1e6 * hand / steps, 1),
        "pomona_us_per_step": round(1e6 * own / steps, 1),
        "ratio": round(statistics.median(b / a for a, b in zip(*seconds.values(), strict=True)), 4),
        "repetitions": repetitions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--candidates", nargs="+", default=["mlp", "convnet width=8"])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    task = load("digits")
    rows = [measure(candidate, task, chosen.epochs, chosen.repetitions) for candidate in chosen.candidates]
    if chosen.json:
        print(json.dumps({"target": TARGET, "torch": torch.__version__, "rows": rows}, indent=1))
    else:
        print(f"{'candidate':<18} {'steps':>6} {'by hand':>12} {'pomona':>12} {'ratio':>7}")
        for row in rows:
            hand, own = (f"{row[key]:.0f} us/step" for key in ("by_hand_us_per_step", "pomona_us_per_step"))
            print(f"{row['candidate']:<18} {row['steps']:>6} {hand:>12} {own:>12} {row['ratio']:>7.3f}")
    if max(row["ratio"] for row in rows) > TARGET:
        print(f"above the target ratio of {TARGET}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
