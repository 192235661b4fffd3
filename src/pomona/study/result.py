"""The result of a comparison: table, curves, plain sentences, and the best network."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pomona.data.task import Task
from pomona.recipe.execute import Restored, restore
from pomona.study.protocol import Protocol
from pomona.study.references import Reference
from pomona.study.sentences import SHARES, conclude
from pomona.study.stats import Difference, bootstrap_interval, paired_difference, relative_improvement
from pomona.zoo import Record, Zoo

COSTS = ("parameters", "flops", "seconds", "memory", "latency_1", "latency_256")


@dataclass
class Row:
    """One line of the table.

    Attributes:
        name: the candidate as written, or the classical model.
        kind: ``network`` or ``reference``.
        status: ``ok``, ``diverged``, ``error`` or ``unfinished``.
        values: the test metric, one a seed.
        mean: their mean.
        interval: 95% bootstrap interval of the mean over seeds.
        difference: to the reference candidate, positive is better.
        relative: per cent better than the average network.
        metrics: mean of every test metric.
        valid: mean validation metric.
        cost: parameters, FLOPs, seconds, memory, latencies.
        recipe: the tuned recipe as text.
        note: why a row has no numbers, or what limits them.
    """

    name: str
    kind: str
    status: str = "ok"
    values: list[float] = field(default_factory=list)
    mean: float = math.nan
    interval: tuple[float, float] = (math.nan, math.nan)
    difference: Difference | None = None
    relative: float = math.nan
    metrics: dict[str, float] = field(default_factory=dict)
    valid: float = math.nan
    cost: dict[str, float] = field(default_factory=dict)
    recipe: str = ""
    note: str = ""


@dataclass
class Study:
    """A finished (or stopped) comparison.

    Attributes:
        id: in the zoo.
        task: what was compared on.
        protocol: what every candidate got.
        records: of the final trainings, label -> one a seed.
        references: classical models.
        seconds: wall-clock of the study.
        tuning: of the tuning trials, label -> one a trial.
        notes: which candidates could not be trained as one stacked network, and why.
    """

    id: str
    task: Task
    protocol: Protocol
    zoo: Zoo
    records: dict[str, list[Record]]
    references: list[Reference]
    seconds: float = 0.0
    tuning: dict[str, list[Record]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rows = self._rows()

    @property
    def metric(self) -> str:
        """What is ranked by."""
        return self.protocol.metric

    def _rows(self) -> list[Row]:
        rows = [self._network_row(label, records) for label, records in self.records.items()]
        rows += [self._reference_row(reference) for reference in self.references]
        for row in rows:
            if row.values:
                row.mean = float(np.mean(row.values))
                low, high = bootstrap_interval(row.values)
                # Student's interval knows nothing of the ends of the scale
                row.interval = (max(low, 0.0), min(high, 1.0)) if self.metric in SHARES else (low, high)
        networks = [row for row in rows if row.kind == "network" and row.status == "ok"]
        higher = self.task.higher_is_better
        for row, value in zip(networks, relative_improvement([r.mean for r in networks], higher), strict=True):
            row.relative = value
        base = next((row for row in rows if row.name == self.protocol.reference), None)
        for row in rows:
            if base is not None and base.values and row.values and row is not base:
                row.difference = paired_difference(row.values, base.values, higher)
        sign = -1 if higher else 1
        return sorted(rows, key=lambda row: (sign * row.mean if math.isfinite(row.mean) else math.inf, row.name))

    def _network_row(self, label: str, records: list[Record]) -> Row:
        good = [record for record in records if record.status == "ok"]
        row = Row(label, "network")
        if len(good) < len(self.protocol.seeds):
            bad = [record for record in records if record.status != "ok"]
            row.status = bad[0].status if bad else "unfinished"
            row.note = bad[0].error if bad else f"{len(good)} of {len(self.protocol.seeds)} seeds finished"
            if bad and len(bad) < len(records):
                row.note = f"{len(bad)} of {len(records)} seeds: {row.note}"
        if row.status == "ok":
            row.values = [record.metrics["test"][self.metric] for record in good]
            for name in good[0].metrics["test"]:
                row.metrics[name] = float(np.mean([record.metrics["test"][name] for record in good]))
            row.valid = float(np.mean([record.metrics["valid"][self.metric] for record in good]))
        for name in COSTS:
            found = [record.cost[name] for record in good if name in record.cost]
            if found:
                row.cost[name] = float(np.mean(found))
        if good:
            from pomona.recipe.recipe import Recipe

            row.recipe = str(Recipe(**good[0].recipe))
        return row

    def _reference_row(self, reference: Reference) -> Row:
        row = Row(reference.name, "reference", note=reference.note, cost={"seconds": reference.seconds})
        if not reference.test:
            row.status = "error"
            return row
        row.values = [metrics[self.metric] for metrics in reference.test]
        row.valid = float(np.mean([metrics[self.metric] for metrics in reference.valid]))
        for name in reference.test[0]:
            row.metrics[name] = float(np.mean([metrics[name] for metrics in reference.test]))
        return row

    def row(self, name: str) -> Row:
        """The row of a candidate or classical model."""
        return next(row for row in self.rows if row.name == name)

    def table(self) -> pd.DataFrame:
        """One row a candidate and classical model, best first.

        Columns: ``kind``, the metric and its interval (``low``, ``high``), the paired ``difference`` to the reference
        with ``difference_low``, ``difference_high`` and the ``probability`` of improvement, ``relative`` (per cent over
        the average network), ``parameters``, ``flops``, ``seconds`` of a training, ``memory`` (bytes), ``latency_1``
        and ``latency_256`` (seconds), the other metrics, ``status`` and ``note``.
        """
        lines = []
        for row in self.rows:
            line: dict[str, Any] = {"name": row.name, "kind": row.kind, self.metric: row.mean}
            line |= {"low": row.interval[0], "high": row.interval[1]}
            gap = row.difference
            line |= {
                "difference": gap.mean if gap else math.nan,
                "difference_low": gap.interval[0] if gap else math.nan,
                "difference_high": gap.interval[1] if gap else math.nan,
                "probability": gap.probability if gap else math.nan,
                "relative": row.relative,
            }
            line |= {name: row.cost.get(name, math.nan) for name in COSTS}
            line |= {name: value for name, value in row.metrics.items() if name not in {self.metric}}
            line |= {"status": row.status, "note": row.note}
            lines.append(line)
        frame = pd.DataFrame(lines).set_index("name")
        last = ["status", "note"]  # classical models lack some metrics, whose columns would come after these
        return frame[[*(column for column in frame if column not in last), *last]]

    @property
    def sentences(self) -> list[str]:
        """Two or three plain sentences: what is better, what cannot be told apart, what is cheap and good."""
        return conclude(self.rows, self.metric, self.task.higher_is_better, self.protocol.reference)

    @property
    def curves(self) -> pd.DataFrame:
        """Learning curves of the final trainings: name, seed, step, examples, seconds, train_loss, valid_loss, the
        metric.
        """
        frames = [
            pd.DataFrame(record.curve).assign(name=label, seed=record.seed)
            for label, records in self.records.items()
            for record in records
            if record.curve
        ]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    @property
    def best_record(self) -> Record | None:
        """The network with the best validation of the candidate with the best mean validation: test has no say."""
        sign = 1 if self.task.higher_is_better else -1
        rows = [row for row in self.rows if row.kind == "network" and row.status == "ok" and math.isfinite(row.valid)]
        if not rows:
            return None
        name = max(rows, key=lambda row: sign * row.valid).name
        return max(self.records[name], key=lambda record: sign * record.metrics["valid"][self.metric])

    @property
    def best(self) -> Restored:
        """The network to keep, with its pipeline.

        Raises:
            PomonaError: if no candidate finished.
        """
        from pomona.errors import PomonaError

        record = self.best_record
        if record is None:
            raise PomonaError("no candidate finished, so there is no best network")
        return restore(self.zoo, record.id)

    def to_json(self, path: str | Path | None = None) -> dict[str, Any]:
        """Everything of the study as JSON-able data, written to ``path`` if given."""
        best = self.best_record
        data = {
            "study": self.id,
            "task": {
                "name": self.task.name,
                "fingerprint": self.protocol.fingerprint,
                "metric": self.metric,
                "higher_is_better": self.task.higher_is_better,
                "outputs": asdict(self.task.outputs),
                "inputs": {"kind": self.task.inputs.kind, "shape": list(self.task.inputs.shape)},
                "card": self.task.card.to_json() if self.task.card else None,
            },
            "protocol": self.protocol.model_dump(),
            "rows": [asdict(row) for row in self.rows],
            "sentences": self.sentences,
            "notes": self.notes,
            "curves": {
                label: [{"seed": record.seed, "points": record.curve} for record in records]
                for label, records in self.records.items()
            },
            "best": {"id": best.id, "candidate": best.candidate} if best else None,
            "networks": {label: [record.id for record in records] for label, records in self.records.items()},
            "environment": next((records[0].versions for records in self.records.values() if records), {}),
            "seconds": self.seconds,
        }
        cleaned = plain(data)
        if path is not None:
            Path(path).write_text(json.dumps(cleaned, indent=1, allow_nan=False), encoding="utf-8")
        return cleaned

    def report(self, path: str | Path) -> Path:
        """Write the self-contained HTML report.

        The report stands a floor above the comparison, so it is looked up when asked for.
        """
        import importlib

        return importlib.import_module("pomona.report").write(self, path)

    def __repr__(self) -> str:
        return "\n".join(
            [f"Study {self.id} on {self.task.name}", self.table().iloc[:, :6].to_string(), *self.sentences, *self.notes]
        )


def plain(value: Any) -> Any:
    """JSON has no nan: it becomes null; keys become text, numpy numbers plain ones."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
