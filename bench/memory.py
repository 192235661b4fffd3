"""Peak memory of a population, against the sum of what its members take when each trains alone.

Each measurement is a process of its own (Linux): it trains a small network first, so that libraries and their buffers
are there, resets the peak of its resident memory, trains, and tells by how much the peak rose above the start.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import subprocess
import sys
from pathlib import Path

import torch

from pomona.data import load
from pomona.nets.build import build
from pomona.train import Budget, Training
from pomona.train.loop import fit
from pomona.train.population import Member, fit_population

TARGET = 1.3
CASES = {"mlp width=256": 32, "convnet width=16": 16}
SETTINGS = Training(device="cpu", precision="float32", patience=None, batch_size=64)
STATUS = Path("/proc/self/status")


def resident(name: str) -> int:
    """``VmRSS`` or ``VmHWM`` (its peak) of this process, in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())
    return 1024 * int(found.group(1)) if found else 0


def rise(candidate: str, count: int) -> int:
    """Bytes by which memory rises above its start while this process trains ``count`` networks, of which one alone."""
    torch.set_num_threads(1)
    task, budget = load("digits"), Budget("examples", 64 * 104)
    small = [Member(build(candidate.split()[0] + " width=4", task), SETTINGS) for _ in range(2)]
    if count == 1:
        fit(small[0].net, task, SETTINGS, budget=budget)
    else:
        fit_population(small, task, budget=budget)
    nets = [build(candidate, task, seed=seed) for seed in range(count)]
    ctypes.CDLL(None).malloc_trim(0)  # what is free but kept would hide what is taken
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    start = resident("VmRSS")
    if count == 1:
        fit(nets[0], task, SETTINGS, budget=budget)
    else:
        members = [Member(net, SETTINGS, seed) for seed, net in enumerate(nets)]
        fit_population(members, task, budget=budget, stack_size=count)
    return resident("VmHWM") - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.add_argument("--rise", nargs=2, metavar=("CANDIDATE", "COUNT"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.rise:
        print(rise(chosen.rise[0], int(chosen.rise[1])))
        return
    rows = []
    for candidate, count in CASES.items():
        one, together = (
            int(subprocess.run([sys.executable, __file__, "--rise", candidate, str(n)], check=True, capture_output=True,
                               text=True).stdout) / 2**20
            for n in (1, count)
        )  # fmt: skip
        row = {"alone_mib": one, "sum_mib": one * count, "population_mib": together, "ratio": together / one / count}
        rows.append({"candidate": candidate, "members": count, **{key: round(value, 2) for key, value in row.items()}})
    if chosen.json:
        print(json.dumps({"target": TARGET, "rows": rows}, indent=1))
        return
    for row in rows:
        print(f"{row['candidate']}: {row['members']} members need {row['population_mib']} MiB together, "
              f"{row['sum_mib']} MiB in sum alone: {row['ratio']}x")  # fmt: skip


if __name__ == "__main__":
    main()
