"""Running a claim and keeping the ledger of our own full runs."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pomona import catalog
from pomona.claims.verdict import Evidence, Scale
from pomona.errors import PomonaError, unknown

SCALES: dict[str, int] = {"smoke": 2, "full": 5, "gpu": 5}
"""Scale -> how many seeds it runs by default."""
LEDGER = Path(str(resources.files("pomona.claims"))) / "ledger.json"


@dataclass
class Verdict:
    """What came of a claim; an entry of the ledger.

    Attributes:
        key: of the paper.
        kind: ``comparison``, ``prediction`` or ``bound``.
        scale: ``smoke``, ``full`` or ``gpu``.
        verdict: ``holds``, ``fails`` or ``undecided``.
        effect: method minus baseline in the better direction; worst deviation in standard errors; or smallest room
            to the bound.
        interval: 95% interval of the effect, for comparisons.
        margin: what the effect had to exceed.
        method: what was tried.
        baseline: what it was compared with.
        metric: what was measured.
        paper: the paper's own figure.
        seeds: that were run.
        seconds: wall-clock.
        machine: where.
        commit: of the code.
        date: of the run.
        note: caveats, and why it fails where it does.
        censored: whether some run ended at its budget before it gave its number.
        details: further results.
    """

    key: str
    kind: str
    scale: str
    verdict: str
    effect: float
    interval: list[float] | None
    margin: float
    method: str
    baseline: str
    metric: str
    paper: str
    seeds: list[int]
    seconds: float
    machine: str
    commit: str
    date: str
    note: str = ""
    censored: bool = False
    details: dict[str, Any] = field(default_factory=dict)

    def sentence(self) -> str:
        """The verdict in one line."""
        if self.kind == "comparison":
            low, high = self.interval or (float("nan"), float("nan"))
            against = f" against a margin of {self.margin:.3g}" if self.margin else ""
            figure = f"{self.effect:+.4g} [{low:+.4g}, {high:+.4g}]{against} in {self.metric}"
        elif self.kind == "prediction":
            figure = f"worst deviation {self.effect:.3g} standard errors of {self.metric}"
        else:
            figure = f"smallest room to the bound {self.effect:.3g} in {self.metric}"
        return f"{self.key} {self.verdict}: {self.method} against {self.baseline}, {figure}"


def parse_seeds(text: str | int | Sequence[int] | None, scale: str) -> list[int]:
    """``5`` -> 0..4, ``"1000:1005"`` -> 1000..1004, ``None`` -> the scale's own number.

    Raises:
        PomonaError: if it is neither, or empty.
    """
    if text is None:
        return list(range(SCALES[scale]))
    if isinstance(text, str):
        low, colon, high = text.partition(":")
        try:
            seeds = list(range(int(low), int(high))) if colon else list(range(int(low)))
        except ValueError:
            raise PomonaError(f"seeds={text!r} must be a number, such as 5, or a range, such as 1000:1005") from None
    else:
        seeds = list(range(text)) if isinstance(text, int) else list(text)
    if len(set(seeds)) < len(seeds):
        raise PomonaError(f"seeds={text!r} names a seed twice")
    if not seeds:
        raise PomonaError(f"seeds={text!r} names no seed; use a number, such as 5, or a range, such as 1000:1005")
    return seeds


def claim(key: str, scale: Scale = "full", seeds: int | str | Sequence[int] | None = None) -> Verdict:
    """Run a paper's headline claim.

    Args:
        key: of the paper.
        scale: ``smoke`` (seconds; exercises the code, decides nothing), ``full`` (minutes on two cores) or ``gpu``.
        seeds: a number, ``"1000:1005"`` or a list.

    Raises:
        PomonaError: if there is no such paper, claim or scale.
    """
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    paper = catalog.paper(key)
    if not paper.claim:
        ready = [p.key for p in catalog.papers().values() if p.claim]
        raise PomonaError(f"{key} has no claim yet; those that have are {', '.join(ready)}")
    chosen = parse_seeds(seeds, scale)
    start = time.perf_counter()
    evidence: Evidence = catalog.load(paper.claim)(scale, chosen)
    seconds = time.perf_counter() - start
    interval = evidence.interval
    return Verdict(
        key=key,
        kind=evidence.kind,
        scale=scale,
        verdict=evidence.decision,
        effect=evidence.effect,
        interval=list(interval) if interval is not None else None,
        margin=getattr(evidence, "margin", 0.0),
        method=evidence.method_name,
        baseline=evidence.baseline_name,
        metric=evidence.metric,
        paper=evidence.paper,
        seeds=chosen,
        seconds=round(seconds, 1),
        machine=machine(),
        commit=commit(),
        date=datetime.now(UTC).date().isoformat(),
        note=evidence.note,
        censored=evidence.censored,
        details=plain(evidence.details),
    )


def machine() -> str:
    """The machine in words."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return f"{platform.system()} {where}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def commit() -> str:
    """The commit of the source tree, or empty where there is none."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short=10", "HEAD"], cwd=LEDGER.parent, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip()


def plain(value: Any) -> Any:
    """JSON-able: numpy and tensors to numbers and lists, floats to six digits, nan to null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value


def read_ledger(path: Path = LEDGER) -> list[dict[str, Any]]:
    """The entries, in the catalogue's order."""
    if not path.exists():
        return []
    return json.loads(path.read_text(encoding="utf-8"))


def write_ledger(verdict: Verdict, path: Path = LEDGER) -> None:
    """Put a verdict in place of the key's earlier one at the same scale; a note written by hand is kept while the
    verdict stands.
    """
    entries = read_ledger(path)
    entry = plain(asdict(verdict))
    for old in entries:
        if (old["key"], old["scale"]) == (verdict.key, verdict.scale) and old["verdict"] == verdict.verdict:
            entry["note"] = old["note"] or entry["note"]
    kept = [e for e in entries if (e["key"], e["scale"]) != (verdict.key, verdict.scale)]
    order = {key: i for i, key in enumerate(catalog.papers())}
    kept = sorted([*kept, entry], key=lambda e: (order.get(e["key"], len(order)), e["scale"]))
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)
