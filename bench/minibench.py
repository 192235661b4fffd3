"""Train every architecture of the MiniBench spaces, three seeds each, and write the tables.

    python bench/minibench.py mini-cell mini-cell-digits mini-mlp

Resumable: rows already in a table are kept.  One thread; about a quarter of an hour for all three.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from pomona.search import minibench
from pomona.search.minibench import CELL, MLP, Images, Protocol, arch_key, cost, enumerate_archs, train_arch

FOLDER = Path(minibench.__file__).parent
FASHION = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it
TABLES = {
    "mini-cell": (CELL, "fashion", Protocol()),
    "mini-cell-digits": (CELL, "digits", Protocol(epochs=8)),
    "mini-mlp": (MLP, "fashion", Protocol(epochs=6, lr=3e-3)),
}


def read_idx(path: Path) -> torch.Tensor:
    raw = gzip.decompress(path.read_bytes())
    dims = raw[3]
    shape = np.frombuffer(raw, ">i4", count=dims, offset=4)
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape).copy())


def fashion() -> Images:
    x, y, x_test, y_test = (
        read_idx(FASHION / f"{part}.gz")
        for part in (
            "train-images-idx3-ubyte",
            "train-labels-idx1-ubyte",
            "t10k-images-idx3-ubyte",
            "t10k-labels-idx1-ubyte",
        )
    )
    x, x_test = (F.avg_pool2d(part[:, None].float() / 255, 2) for part in (x, x_test))
    return Images.split(x, y.long(), x_test, y_test.long(), n_train=4000, n_valid=2000, n_test=4000)


def digits() -> Images:
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.from_numpy(data.images).float()[:, None] / 16, torch.from_numpy(data.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return Images.split(x[500:], y[500:], x[:500], y[:500], n_train=900, n_valid=397, n_test=500)


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    sources = {"fashion": fashion, "digits": digits}
    for name in names:
        variables, source, protocol = TABLES[name]
        images = sources[source]()
        path = FOLDER / f"minibench_{name}.json"
        table = json.loads(path.read_text()) if path.exists() else {"rows": {}, "seconds": 0.0}
        table |= {
            "name": name,
            "data": {"name": source, "train": len(images.x_train), "valid": len(images.x_valid), "test": len(images.x_test)},
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
            print(f"{name} {i + 1}/{len(archs)} {arch_key(arch)} {rounded['test']} {table['seconds']:.0f} s", flush=True)
            part = path.with_suffix(".part")
            part.write_text(json.dumps(table, indent=0))
            part.replace(path)


if __name__ == "__main__":
    main(sys.argv[1:] or list(TABLES))
