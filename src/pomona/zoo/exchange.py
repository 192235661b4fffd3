"""The corpus as a folder of JSON and code, to be shared and merged."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pomona.errors import PomonaError
from pomona.zoo import code as codes
from pomona.zoo.record import Record
from pomona.zoo.tables import dumps, loads

if TYPE_CHECKING:
    from pomona.zoo.corpus import Corpus

OWN = ("id", "created", "weights")
"""What each zoo fills itself."""


def write(corpus: Corpus, path: Path) -> None:
    """Write every network and trial of the corpus into the folder ``path``."""
    try:
        (path / "nn").mkdir(parents=True, exist_ok=True)
        for name in corpus.networks():
            _, text, task = corpus.find(name)
            (path / "nn" / f"{name}.py").write_text(text, encoding="utf-8")
            (path / "nn" / f"{name}.json").write_text(dumps({"task": task}))
        for pipeline, group in _pipelines(corpus.trials()).items():
            folder = path / re.sub(r"[^\w.-]", "-", pipeline)
            folder.mkdir(exist_ok=True)
            epochs: dict[int, list[dict[str, Any]]] = {}
            rest = []
            for record in group:
                for point in record.curve:
                    shared = {"uid": record.index, "seed": record.seed, "prm": record.recipe["prm"]}
                    epochs.setdefault(point["epoch"], []).append(shared | point)
                rest.append({k: v for k, v in asdict(record).items() if k not in (*OWN, "curve")})
            for epoch, points in epochs.items():
                (folder / f"{epoch}.json").write_text(dumps(points))
            (folder / "trials.json").write_text(dumps(rest))
    except OSError as error:
        raise PomonaError(f"path={str(path)!r} cannot be written to ({error.strerror})") from error


def _pipelines(records: list[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.candidate, []).append(record)
    return groups


def read(corpus: Corpus, path: Path) -> int:
    """Add the networks and trials in the folder ``path``; what is there already is left alone."""
    if not (path / "nn").is_dir():
        raise PomonaError(f"path={str(path)!r} holds no exported corpus; give the folder that export('json') wrote")
    known = set(corpus.networks())
    for file in sorted((path / "nn").glob("*.py")):
        name, _, digest = file.stem.partition("-")
        text = file.read_text(encoding="utf-8")
        if codes.identity(text) != digest:
            raise PomonaError(f"{file} is not the code its name says; export it again")
        if file.stem not in known:
            corpus.register(text, name, _json(file.with_suffix(".json"))["task"])
    new = 0
    for file in sorted(path.glob("*/trials.json")):
        curves: dict[int, list[dict[str, Any]]] = {}
        for epoch in sorted((f for f in file.parent.glob("*.json") if f.stem.isdigit()), key=lambda f: int(f.stem)):
            for point in _json(epoch):
                kept = {key: value for key, value in point.items() if key not in {"uid", "seed", "prm"}}
                curves.setdefault(point["uid"], []).append(kept)
        for fields in _json(file):
            record = Record(**fields, curve=curves.get(fields["index"], []))
            new += corpus.zoo._unit(record) is None
            corpus.zoo.add(record)
    return new


def _json(file: Path) -> Any:
    try:
        return loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PomonaError(f"{file} cannot be read as JSON: {error}") from error
