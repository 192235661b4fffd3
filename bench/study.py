"""A whole study, every trial and seed of a candidate trained as one, against one network at a time.

Both take turns within one run on the same data, and each may use the number of threads that suits it better. What
counts is wall-clock from the loaded data to the finished table: tuning, training, scoring, cost and the zoo.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from typing import Any

import torch

from pomona.data import Task, load
from pomona.study import compare

TARGET = 3.0
DIGITS = [
    "mlp", "mlp act=gelu", "mlp act=tanh", "mlp act=silu", "mlp norm=layer", "mlp norm=batch", "mlp dropout=0.2",
    "mlp width=32", "mlp depth=3", "mlp act=gelu norm=layer", "mlp residual=add", "kan width=16",
]  # fmt: skip
FASHION = ["mlp", "mlp act=gelu norm=layer", "mlp dropout=0.2", "mlp norm=batch", "mlp width=128", "mlp depth=3"]


def once(task: Task, candidates: list[str], trials: int, epochs: float, population: bool) -> tuple[float, list[str]]:
    """Seconds of a study of three seeds, and its notes."""
    with tempfile.TemporaryDirectory() as zoo:
        start = time.perf_counter()
        study = compare(
            task, candidates=candidates, trials=trials, seeds=3, epochs=epochs, references=False, device="cpu",
            population=population, zoo=zoo,
        )  # fmt: skip
        return time.perf_counter() - start, study.notes


def measure(name: str, task: Task, candidates: list[str], trials: int, epochs: float, alone: bool) -> dict[str, Any]:
    """The best of one and two threads, for populations and, if asked for, one network at a time."""
    row: dict[str, Any] = {"data": name, "candidates": len(candidates), "trials": trials, "seeds": 3, "epochs": epochs}
    once(task, candidates[:1], 0, 1, True)  # imports and first calls
    for population in [True, False] if alone else [True]:
        found = {}
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found[threads], notes = once(task, candidates, trials, epochs, population)
        key = "population" if population else "alone"
        row[f"{key}_seconds"] = {str(threads): round(value, 1) for threads, value in found.items()}
        row["notes"] = row.get("notes", []) + notes
    if alone:
        fastest = {key: min(row[f"{key}_seconds"].values()) for key in ("population", "alone")}
        row["speedup"] = round(fastest["alone"] / fastest["population"], 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--data", choices=["digits", "fashion_mnist"], default="digits")
    parser.add_argument("--population-only", action="store_true")
    chosen = parser.parse_args()
    digits = chosen.data == "digits"
    task = load("digits") if digits else load("fashion_mnist", limit=20_000)
    row = measure(chosen.data, task, DIGITS if digits else FASHION, chosen.trials, chosen.epochs,
                  not chosen.population_only)  # fmt: skip
    if chosen.json:
        print(json.dumps({"torch": torch.__version__, "target": TARGET, "rows": [row]}, indent=1))
        return
    for key, value in row.items():
        print(f"{key:<20} {value}")


if __name__ == "__main__":
    main()
