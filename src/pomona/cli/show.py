"""What ``pomona show KEY`` tells of a paper, derived from its row, its code and the ledger."""

from __future__ import annotations

import inspect
import json
import re
from importlib import resources
from typing import Any

from pomona import catalog


def options_of(part: Any) -> dict[str, str]:
    """Argument -> default (empty when required), from the signature."""
    try:
        parameters = inspect.signature(part).parameters.values()
    except (TypeError, ValueError):
        return {}
    shown = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name != "self"]
    return {p.name: "" if p.default is p.empty else repr(p.default) for p in shown}


def equation_of(doc: str) -> str:
    """The docstring up to its first section: the line that says what it is, and its equation."""
    lines = []
    for line in doc.splitlines():
        if re.match(r"^(Args|Attributes|Shapes?|Raises|Returns|Source|Sources|Example|Examples):?", line.strip()):
            break
        lines.append(line)
    return "\n".join(lines).strip()


def usage(paper: catalog.Paper) -> list[str]:
    """How to use it, in three lines: as a layer or function, as a candidate, as a claim."""
    lines = []
    if paper.parts:
        module, _, name = paper.parts[0].partition(":")
        public = module.rsplit(".", 1)[0] if module.count(".") > 1 else module
        exported = name in getattr(__import__(public, fromlist=[name]), "__all__", ())
        lines.append(f"from {public if exported else module} import {name}")
    for slot, names in paper.slots.items():
        lines.append(f"pomona compare data.csv --target y --candidates {candidate(slot, names[0])!r}")
        break
    if paper.claim:
        lines.append(f"pomona claim {paper.key}")
    return lines


def candidate(slot: str, name: str) -> str:
    """A candidate that has ``name`` in ``slot``, on the plainest backbone with that slot."""
    home = {"pool": "convnet", "conv": "convnet", "mixer": "mixer", "ffn": "mixer"}
    return f"{home.get(slot, 'mlp')} {slot}={name}"


def verdicts(key: str) -> list[dict[str, Any]]:
    """The ledger's entries of a paper."""
    path = resources.files("pomona.claims").joinpath("ledger.json")
    return [entry for entry in json.loads(path.read_text(encoding="utf-8")) if entry["key"] == key]


def describe(paper: catalog.Paper) -> dict[str, Any]:
    """Everything, as data."""
    parts = [(path, catalog.load(path)) for path in paper.parts]
    return {
        "key": paper.key,
        "title": paper.title,
        "arxiv": paper.arxiv,
        "year": paper.year,
        "family": paper.family,
        "kind": paper.kind,
        "status": paper.status,
        "parts": [
            {"path": path, "equation": equation_of(inspect.getdoc(part) or ""), "options": options_of(part)}
            for path, part in parts
        ],
        "slots": paper.slots,
        "facts": [name.replace("_", " ") for name in paper.facts],
        "claim": paper.claim,
        "figures": list(paper.figures),
        "ledger": verdicts(paper.key),
        "usage": usage(paper),
    }


def render(data: dict[str, Any]) -> None:
    """The description for a terminal."""
    from rich.console import Console
    from rich.markup import escape

    out = Console(highlight=False)
    out.print(f"[bold]{data['key']}[/]  {escape(data['title'])} ({data['year']}), arXiv {data['arxiv']}")
    out.print(f"family {data['family']}, {data['kind']}, {data['status']}")
    for part in data["parts"]:
        out.print(f"\n[bold]{part['path'].replace(':', '.')}[/]")
        out.print(escape(part["equation"]))
        for name, default in part["options"].items():
            out.print(f"  {name}{'=' + escape(default) if default else ''}")
    for slot, names in data["slots"].items():
        out.print(f"\n[bold]slot[/] {', '.join(f'{slot}={name}' for name in names)}")
    if data["facts"]:
        out.print("\n[bold]facts tested[/]")
        for fact in data["facts"]:
            out.print(f"  {escape(fact)}")
    for entry in data["ledger"]:
        out.print(
            f"\n[bold]claim {entry['verdict']}[/] ({entry['scale']}, {len(entry['seeds'])} seeds, {entry['date']})"
        )
        interval = f" [{entry['interval'][0]:+.4g}, {entry['interval'][1]:+.4g}]" if entry["interval"] else ""
        out.print(
            escape(
                f"  {entry['method']} against {entry['baseline']}: {entry['effect']:+.4g}{interval}, {entry['metric']}"
            )
        )
        out.print(escape(f"  paper: {entry['paper']}"))
        if entry["note"]:
            out.print(escape(f"  {entry['note']}"))
    if data["figures"]:
        out.print("\n[bold]figures[/] (of a kept network: pomona plot ID)")
        for figure in data["figures"]:
            out.print(f"  {figure.replace(':', '.')}")
    if data["usage"]:
        out.print("\n[bold]use[/]")
        for line in data["usage"]:
            out.print(f"  {escape(line)}")
    if data["status"] == "open":
        out.print("\nThis paper is in the catalogue; its system is still to come.")
