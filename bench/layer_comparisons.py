"""Every activation, norm and linear layer in an MLP on real data sets, by the fair protocol.

The result goes to ``docs/measured/layer_comparisons.json``, from which the page on layers is made. Linear layers are
compared at equal parameters.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import pomona as pm
from pomona.study.slots import sweep

OUT = Path(__file__).parent.parent / "docs" / "measured" / "layer_comparisons.json"
DATA: dict[str, dict[str, Any]] = {"digits": {}, "breast_cancer": {}, "diabetes": {}, "fashion_mnist": {"limit": 2000}}
TOO_SLOW = {("fashion_mnist", "linear")}
"""Some linear layers do a computation for each of 784 inputs and outputs."""
SLOTS = {"linear": "linear", "norm": "none", "act": "gelu"}
"""What is swept, and the name that the others are compared with."""
SEEDS, TRIALS, EPOCHS = 5, 4, 15.0


def compare(data: str, slot: str, seeds: int, trials: int, epochs: float) -> dict[str, Any]:
    names = sweep(f"{slot}=all", "mlp")
    with tempfile.TemporaryDirectory() as folder:
        study = pm.compare(
            data,
            candidates=names,
            optional=names,
            reference=f"mlp {slot}={SLOTS[slot]}",
            match="params" if slot == "linear" else None,
            seeds=seeds,
            trials=trials,
            epochs=epochs,
            references=False,
            zoo=folder,
            **DATA[data],
        )
        rows = [
            {
                "name": row.name.partition(f"{slot}=")[2],
                "mean": None if math.isnan(row.mean) else row.mean,
                "difference": row.difference and row.difference.mean,
                "interval": row.difference and list(row.difference.interval),
                "sure": bool(row.difference and row.difference.sure),
                "parameters": row.cost.get("parameters"),
                "seconds": row.cost.get("seconds"),
                "note": row.note,
            }
            for row in study.rows
        ]
        found = {"data": data, "slot": slot, "metric": study.metric, "seconds": study.seconds}
        return {**found, "rows": rows, "notes": study.notes}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--slots", nargs="+", default=list(SLOTS), choices=list(SLOTS))
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=list(DATA))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--epochs", type=float, default=EPOCHS)
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    found = json.loads(OUT.read_text()) if OUT.exists() else []
    for slot in chosen.slots:
        for data in (data for data in chosen.data if (data, slot) not in TOO_SLOW):
            start = time.perf_counter()
            new = compare(data, slot, chosen.seeds, chosen.trials, chosen.epochs)
            new |= {"seeds": chosen.seeds, "trials": chosen.trials, "epochs": chosen.epochs, "torch": torch.__version__}
            found = [f for f in found if (f["data"], f["slot"]) != (data, slot)] + [new]
            OUT.parent.mkdir(exist_ok=True)
            OUT.write_text(json.dumps(found, indent=1) + "\n")
            print(f"{data} {slot}: {len(new['rows'])} candidates, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
