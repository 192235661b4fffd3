"""``pomona claim`` and ``pomona claims``."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from typing import Annotated

import typer

from pomona import catalog

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("claim")(claim)
    app.command("claims")(claims)


def claim(
    key: Annotated[str, typer.Argument(help="A paper's key.")],
    scale: Annotated[str, typer.Option(help="smoke (seconds), full (minutes) or gpu.")] = "full",
    seeds: Annotated[str | None, typer.Option(help="How many, such as 5, or which, such as 1000:1005.")] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Keep the verdict in the ledger of the source tree.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a paper's headline claim: does it hold here?"""
    from rich.console import Console
    from rich.logging import RichHandler

    from pomona.claims import run

    log = logging.getLogger("pomona.claims")
    if not as_json:
        log.addHandler(RichHandler(console=Console(stderr=True), show_path=False, show_level=False))
        log.setLevel(logging.INFO)
    verdict = run.claim(key, scale, seeds)  # type: ignore[arg-type]
    if record:
        run.write_ledger(verdict)
    if as_json:
        print(json.dumps(run.plain(asdict(verdict)), indent=1, ensure_ascii=False))
        return
    print(verdict.sentence())
    print(f"paper: {verdict.paper}")
    if verdict.censored:
        print("censored: some run ended at its budget before it gave its number")
    if verdict.note:
        print(verdict.note)
    print(f"{len(verdict.seeds)} seeds, {verdict.scale} scale, {verdict.seconds:.0f} s")
    if scale == "smoke":
        print("The smoke scale only shows that the claim runs; it decides nothing.")


def claims(
    family: Annotated[str | None, typer.Option(help="Only this family of papers.")] = None, as_json: Json = False
) -> None:
    """The ledger: our own full runs of every claim."""
    from importlib import resources

    from pomona.errors import unknown

    papers = catalog.papers()
    families = list(dict.fromkeys(p.family for p in papers.values()))
    if family is not None and family not in families:
        raise unknown("family", family, families)
    entries = json.loads(resources.files("pomona.claims").joinpath("ledger.json").read_text(encoding="utf-8"))
    entries = [e for e in entries if family is None or papers[e["key"]].family == family]
    if as_json:
        print(json.dumps(entries, indent=1, ensure_ascii=False))
        return
    width = max((len(e["key"]) for e in entries), default=3)
    for e in entries:
        effect = f"{e['effect']:+9.3g}" if e["effect"] is not None else f"{'-':>9}"
        interval = "[{:+.3g}, {:+.3g}]".format(*e["interval"]) if e["interval"] else ""
        print(f"{e['key']:<{width}}  {e['verdict']:<9}  {effect} {interval:<20} {e['metric']}")
    recorded = {e["key"] for e in entries}
    waiting = [p.key for p in papers.values() if p.claim and p.key not in recorded and (family in {None, p.family})]
    if waiting:
        print(f"not run at full scale yet: {', '.join(waiting)}")
