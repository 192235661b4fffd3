"""What a study says, in two or three plain sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pomona.study.stats import Difference, paired_difference

if TYPE_CHECKING:
    from pomona.study.result import Row

SHARES = {"accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece"}


def amount(value: float, metric: str) -> str:
    """A value of a metric as people say it: shares in per cent."""
    return f"{100 * value:.1f}%" if metric in SHARES else f"{value:.4g}"


def gap(value: float, metric: str) -> str:
    """A difference of a metric: shares in points."""
    return f"{100 * abs(value):.1f} points" if metric in SHARES else f"{abs(value):.3g}"


def listed(names: Sequence[str], most: int = 6) -> str:
    """``a, b and c``; long lists end in a count."""
    names = list(names)
    if len(names) > most:
        return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} more"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def conclude(rows: Sequence[Row], metric: str, higher_is_better: bool, reference: str) -> list[str]:
    """What is better than what and how surely; what cannot be told apart; the cheapest good choice; classical models.

    "Better" is said only where the 95% Student-t interval of the paired difference excludes zero.
    """
    networks = [row for row in rows if row.kind == "network" and row.status == "ok" and row.values]
    classical = [row for row in rows if row.kind == "reference" and row.values]
    if not networks:
        return ["No network finished, so nothing can be compared."]
    best = networks[0]
    seeds = len(best.values)
    out = []

    equal: list[tuple[Row, Difference]] = []
    worse: list[tuple[Row, Difference]] = []
    for row in networks[1:]:
        difference = paired_difference(best.values, row.values, higher_is_better)
        (worse if difference.sure and difference.mean > 0 else equal).append((row, difference))
    head = f"The best network is {best.name} with {metric} {amount(best.mean, metric)}"
    if worse:
        least = min(difference.mean for _, difference in worse)
        most = max(difference.mean for _, difference in worse)
        by = (
            gap(least, metric)
            if gap(least, metric) == gap(most, metric)
            else f"{gap(least, metric)} to {gap(most, metric)}"
        )
        names = listed([row.name for row, _ in worse])
        out.append(f"{head}, better than {names} by {by} (95% sure over {seeds} seeds).")
    elif len(networks) > 1:
        out.append(f"{head}, but over {seeds} seed{'s' * (seeds > 1)} no other network is surely worse.")
    else:
        out.append(f"{head}.")
    if equal:
        names = listed([best.name, *(row.name for row, _ in equal)])
        within = max(abs(difference.mean) for _, difference in equal)
        out.append(f"{names} cannot be told apart here (means within {gap(within, metric)}).")
    good = [best, *(row for row, _ in equal)]
    priced = [row for row in good if row.cost.get("seconds")]
    if len(priced) > 1:
        cheap = min(priced, key=lambda row: row.cost["seconds"])
        small = min(priced, key=lambda row: row.cost["parameters"])
        named = f"{cheap.name} trains fastest ({cheap.cost['seconds']:.1f} s)"
        if small is cheap:
            named += f" and is smallest ({small.cost['parameters']:,.0f} parameters)"
        else:
            named += f" and {small.name} is smallest ({small.cost['parameters']:,.0f} parameters)"
        out.append(f"Among these, {named}.")
    if classical:
        top = classical[0]
        difference = paired_difference(top.values, best.values, higher_is_better)
        figures = f"{top.name}, {amount(top.mean, metric)}"
        if difference.mean > 0 and difference.sure:
            verdict = f"A classical model beats every network: {figures}, by {gap(difference.mean, metric)}."
        elif difference.mean < 0 and difference.sure:
            verdict = (
                f"The best classical model ({figures}) is behind the best network by {gap(difference.mean, metric)}."
            )
        else:
            verdict = f"The best classical model ({figures}) and the best network cannot be told apart."
        out.append(verdict)
    return out
