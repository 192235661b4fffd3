"""The data card: what was found in the data and what was done about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table


@dataclass
class ColumnCard:
    """One column of the source: the kind it was given (``dropped`` if unused), its gaps and what was done."""

    name: str
    kind: str
    missing: int = 0
    distinct: int = 0
    note: str = ""


@dataclass
class DataCard:
    """What a person should know of a task's data before believing a result on it.

    Attributes:
        source: where the rows came from.
        rows: rows used, over all splits.
        target: name of the target.
        task: ``classes`` or ``number``.
        splits: rows in each split.
        split_by: how the rows were divided.
        classes: rows of each class, over all splits (empty for a number).
        columns: the columns of a table, counted on training rows.
        notes: everything else that was found or changed, a sentence each.
        synthetic: whether the data are generated, not collected.
    """

    source: str
    rows: int
    target: str
    task: str
    splits: dict[str, int] = field(default_factory=dict)
    split_by: str = ""
    classes: dict[str, int] = field(default_factory=dict)
    columns: list[ColumnCard] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    synthetic: bool = False

    def to_json(self) -> dict[str, Any]:
        """The card as JSON-able data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> DataCard:
        """The inverse of :meth:`to_json`."""
        return cls(**{**data, "columns": [ColumnCard(**column) for column in data["columns"]]})

    def facts(self) -> list[tuple[str, str]]:
        """The card's short lines, as (heading, text)."""
        lines = [
            ("source", self.source + (" (synthetic data)" if self.synthetic else "")),
            ("target", f"{self.target} ({'classes' if self.task == 'classes' else 'a number'})"),
            ("rows", f"{self.rows:,}: " + ", ".join(f"{n:,} {name}" for name, n in self.splits.items())),
            ("split", self.split_by),
        ]
        if self.classes:
            shown = [f"{name} {count:,}" for name, count in list(self.classes.items())[:10]]
            more = f", ... ({len(self.classes)} in all)" if len(self.classes) > 10 else ""
            lines.append(("classes", ", ".join(shown) + more))
        return lines + [("note", note) for note in self.notes]

    def render(self) -> Group:
        """The card for a terminal, as a rich renderable; ``str(card)`` is the plain text."""
        facts = Table.grid(padding=(0, 2))
        for heading, text in self.facts():
            facts.add_row(heading, escape(text))
        if not self.columns:
            return Group(facts)
        table = Table("column", "kind", "missing", "distinct", "note")
        for column in self.columns:
            counts = f"{column.missing:,}", f"{column.distinct:,}"
            table.add_row(escape(column.name), column.kind, *counts, escape(column.note))
        return Group(facts, table)

    def __str__(self) -> str:
        console = Console(width=120, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self.render())
        return "\n".join(line.rstrip() for line in capture.get().splitlines())
