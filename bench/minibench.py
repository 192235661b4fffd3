"""Train every architecture of the MiniBench spaces, three seeds each, and write the tables.

    python bench/minibench.py mini-cell mini-cell-digits mini-mlp

Resumable: rows already in a table are kept.  One thread; about a quarter of an hour for all three.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

import torch

from pomona.search import minibench
from pomona.search.mini_nets import arch_key, enumerate_archs
from pomona.search.minibench import SOURCES, TABLES, cost, train_arch

FOLDER = Path(minibench.__file__).parent


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    for name in names:
        variables, source, protocol = TABLES[name]
        images = SOURCES[source]()
        sizes = {split: len(getattr(images, f"x_{split}")) for split in ("train", "valid", "test")}
        path = FOLDER / f"minibench_{name}.json"
        table = json.loads(path.read_text()) if path.exists() else {"rows": {}, "seconds": 0.0}
        table |= {
            "name": name,
            "data": {"name": source, **sizes},
            "protocol": dataclasses.asdict(protocol),
            "variables": {key: list(options) for key, options in variables.items()},
        }
        archs = list(enumerate_archs(variables))
        for i, arch in enumerate(archs):
            if arch_key(arch) in table["rows"]:
                continue
            start = time.perf_counter()
            row = train_arch(name, arch, images, protocol)
            rounded = {split: [round(value, 3) for value in values] for split, values in row.items()}
            table["rows"][arch_key(arch)] = rounded | cost(name, arch, tuple(images.x_train.shape[1:]))
            table["seconds"] = round(table["seconds"] + time.perf_counter() - start, 2)
            print(
                f"{name} {i + 1}/{len(archs)} {arch_key(arch)} {rounded['test']} {table['seconds']:.0f} s", flush=True
            )
            part = path.with_suffix(".part")
            part.write_text(json.dumps(table, indent=0))
            part.replace(path)


if __name__ == "__main__":
    main(sys.argv[1:] or list(TABLES))
