"""A table of your own: compare candidates, then predict new rows.

The table is synthetic: a random generator draws customers and a rule of our own decides who leaves. Put your own CSV in
its place.
Run it with `python examples/own_csv.py [FOLDER]`; the files go to FOLDER, or the current folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd

import pomona as pm

PLANS = ("basic", "plus", "business")
WORDS = ("slow support", "good value for us", "too expensive now", "works as promised", "billing was wrong twice")


def customers(rows: int, seed: int) -> pd.DataFrame:
    """Synthetic customers with columns of every common type, some cells empty."""
    rng = np.random.default_rng(seed)
    age = rng.integers(18, 80, rows).astype(float)
    plan = rng.choice(PLANS, rows, p=[0.5, 0.35, 0.15])
    since = pd.Timestamp("2019-01-01") + pd.to_timedelta(rng.integers(0, 2000, rows), unit="D")
    spend = np.exp(rng.normal(3.5, 0.6, rows)).round(2)
    newsletter = rng.choice(["yes", "no"], rows)
    remark = rng.integers(0, len(WORDS), rows)
    # the rule: dear plans and bad remarks make customers leave, more so the young
    drive = 0.02 * (45 - age) + 0.8 * (plan == "business") + 1.2 * np.isin(remark, (0, 2, 4)) + 0.3 * (spend > 40) - 0.9
    leaves = rng.random(rows) < 1 / (1 + np.exp(-2.5 * drive))
    age[rng.random(rows) < 0.05] = np.nan
    return pd.DataFrame(
        {
            "customer_id": np.arange(10_000, 10_000 + rows),
            "age": age,
            "plan": plan,
            "since": since.strftime("%Y-%m-%d"),
            "monthly_spend": [f"${value:,.2f}" for value in spend],
            "newsletter": newsletter,
            "remark": [f"{WORDS[k]} ({rng.integers(1, 99)} days)" for k in remark],
            "churned": np.where(leaves, "yes", "no"),
        }
    )


def main(folder: Path) -> None:
    """Write the tables, compare, predict."""
    print("The data of this example are synthetic.\n")
    customers(1000, seed=0).to_csv(folder / "customers.csv", index=False)
    customers(5, seed=1).drop(columns="churned").to_csv(folder / "new_customers.csv", index=False)

    study = pm.compare(
        folder / "customers.csv",
        "churned",
        candidates=["mlp", "mlp act=gelu norm=layer", "mlp linear=quadratic act=identity"],
        seeds=3,
        trials=0,
        epochs=15,
        metric="auroc",
        device="cpu",
        zoo=str(folder / "pomona-zoo"),
    )
    print(study.task.card, "\n")
    print(study.table()[["kind", "auroc", "low", "high", "difference", "parameters", "seconds"]].round(3), "\n")
    print(*study.sentences, sep="\n")

    best = study.best  # chosen on validation
    predicted = best.predict(pd.read_csv(folder / "new_customers.csv"))
    print(f"\npredictions of {best.record.id} ({best.recipe}):\n{predicted.round(3)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path())
