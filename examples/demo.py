"""`make demo`: which of these ideas helps on scikit-learn's handwritten digits, and what does each cost?

Every candidate gets the same splits, batches, seeds and tuning trials. The table appears in the terminal, the report in
report.html, and every network in ./pomona-zoo.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

# these networks are so small that waking a second thread costs more than it saves
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pomona as pm

CANDIDATES = [
    "mlp",
    "mlp act=gelu",
    "mlp norm=layer",
    "kan",
    "quadratic",
    "bilinear",
    "phm",
    "hopfield",
    "convnet width=16",
    "convnet width=16 act=gelu",
    "convnet width=16 pool=gated",
    "convnet width=16 pool=tree",
    "resnet width=8",
    "mixer",
    "mixer mixer=fourier",
    "mixer mixer=attention",
]


def main(
    report: str | Path = "report.html", epochs: float = 12, trials: int = 2, seeds: int = 3, zoo: str | None = None
) -> pm.Study:
    """Run the study, print it and write its report."""
    from pomona.cli.tables import print_study

    start = time.perf_counter()
    print(f"{len(CANDIDATES)} candidates, 1,797 digits; {trials} tuning trials, {seeds} seeds each, {epochs:g} epochs")
    study = pm.compare(
        "digits",
        candidates=CANDIDATES,
        seeds=seeds,
        trials=trials,
        epochs=epochs,
        device="cpu",
        zoo=zoo,
        progress=sys.stderr.isatty(),
    )
    print_study(study)
    print(f"report: {study.report(report)} ({time.perf_counter() - start:.0f} s)")
    return study


if __name__ == "__main__":
    main()
