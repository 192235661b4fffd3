"""A study in the terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pomona.study.sentences import SHARES

if TYPE_CHECKING:
    from pomona.study import Study


def short(value: float | None) -> str:
    """1234567 -> 1.23M; blank for nothing."""
    if value is None or math.isnan(value):
        return ""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def print_study(study: Study) -> None:
    """The ranking with intervals, differences and costs, then the plain sentences."""
    share = study.metric in SHARES
    factor = 100 if share else 1

    def number(value: float, signed: bool = False) -> str:
        if math.isnan(value):
            return ""
        sign = "+" if signed else ""
        return f"{factor * value:{sign}.1f}" if share else f"{value:{sign}.4g}"

    unit = " %" if share else ""
    table = Table(title=f"{study.task.name}: {study.metric}{unit} on test, {len(study.protocol.seeds)} seeds")
    table.add_column("candidate", overflow="fold", min_width=18)
    console = Console()
    headings = [study.metric, "95% interval", "difference", "P(better)", "params", "FLOPs", "s", "MB", "ms/256"]
    # a narrow terminal shows what matters most; --json and the report have everything
    headings = headings[: 9 if console.width >= 120 else 5 if console.width >= 96 else 4 if console.width >= 76 else 2]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    failures: list[str] = []
    for row in study.rows:
        style = "dim" if row.kind == "reference" else ""
        name = escape(row.name) + ("*" if row.kind == "reference" else "")
        if not row.values:
            table.add_row(name, f"[red]{row.status}[/]", style=style)
            failures.append(f"{row.name}: {row.note}")
            continue
        gap = row.difference
        memory, latency = row.cost.get("memory"), row.cost.get("latency_256")
        cells = [
            number(row.mean),
            f"{number(row.interval[0])} to {number(row.interval[1])}",
            number(gap.mean, signed=True) if gap else "",
            f"{gap.probability:.2f}" if gap and not math.isnan(gap.probability) else "",
            short(row.cost.get("parameters")),
            short(row.cost.get("flops")),
            short(row.cost.get("seconds")),
            short(memory / 1e6 if memory is not None else None),
            short(latency * 1e3 if latency is not None else None),
        ]
        table.add_row(name, *cells[: len(headings)], style=style)
    console.print(table)
    classical = "  * classical model" if study.references else ""
    reference = escape(study.protocol.reference)
    console.print(f"Differences are paired over seeds, against {reference}.{classical}", highlight=False)
    for sentence in [*failures, *study.sentences, *study.notes]:
        console.print(escape(sentence), highlight=False)
    best = study.best_record
    if best is not None:
        chosen = f"Chosen on validation, {best.candidate} (seed {best.seed}) is kept as {best.id}"
        console.print(escape(f"{chosen}: pomona predict {best.id} new.csv -o out.csv"), highlight=False)
