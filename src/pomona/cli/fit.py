"""``pomona fit``: a declaration in YAML, trained on a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pomona.errors import PomonaError

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("fit")(fit)


def fit(
    config: Annotated[Path, typer.Argument(help="Inputs, outputs and the rest in YAML.", show_default=False)],
    data: Annotated[Path, typer.Argument(help="CSV, TSV or Parquet.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the trained network to this folder.")] = None,
    target: Annotated[
        list[str] | None, typer.Option("--target", "-t", help="Write CONFIG for this target first, if it is not there.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed, in place of the config's.")] = None,
    as_json: Json = False,
) -> None:
    """Train what a config declares: several inputs and outputs of any type."""
    from rich.console import Console

    from pomona.recipe.ludwig import fit as fit_declaration

    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PomonaError(f"out={str(out)!r} is there already; name a new folder")
    if target and not config.exists():
        _write(config, data, target)
    with Console(stderr=True).status(f"training {config.name} on {data.name}"):
        fitted = fit_declaration(config, data, seed=seed)
    if out is not None:
        fitted.save(out)
    if as_json:
        found = {"test": fitted.test, "trials": fitted.trials, "out": str(out) if out else None}
        print(json.dumps({**found, "parameters": sum(p.numel() for p in fitted.net.parameters())}, indent=1))
        return
    for name, metrics in fitted.test.items():
        print(f"{name:<16}" + "  ".join(f"{metric} {value:.4f}" for metric, value in metrics.items()))
    if out is not None:
        print(f'written to {out}; Fitted.load("{out}").predict("new.csv") uses it')


def _write(config: Path, data: Path, target: list[str]) -> None:
    import yaml

    from pomona.recipe.ludwig import infer
    from pomona.recipe.ludwig.fit import read

    text = yaml.safe_dump(infer(read(data)[0], target), sort_keys=False)
    config.write_text(text, encoding="utf-8")
